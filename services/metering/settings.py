"""What metering is told by its environment, beyond what every service is told."""

from typing import Annotated

from pydantic import Field

from services.kit.settings import ServiceSettings


class MeteringSettings(ServiceSettings):
    """`batch_size_max`: how many deliveries one transaction takes."""

    service: str = "metering"
    batch_size_max: Annotated[int, Field(ge=1, le=5_000)] = 3_000
