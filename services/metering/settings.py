"""What metering is told by its environment, beyond what every service is told."""

from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.kit.settings import ServiceSettings


class MeteringSettings(ServiceSettings):
    """`batch_size_max`: how many deliveries one transaction takes.

    `metering_age_days_max`: how long ago use may have happened that is reported. The most that HTTP takes at once:
    `metering_body_bytes_max` (as sent, and inflated), `metering_batch_events_max`, `metering_attributes_max` (of one
    event, beyond those that CloudEvents defines).
    """

    service: str = "metering"
    batch_size_max: Annotated[int, Field(ge=1, le=5_000)] = 3_000
    metering_age_days_max: Annotated[int, Field(ge=1, le=36_500)] = 35
    metering_body_bytes_max: Annotated[int, Field(ge=1_024, le=64 << 20)] = 4 << 20
    # A batch goes to the stream as one, and the server takes no more at once.
    metering_batch_events_max: Annotated[int, Field(ge=1, le=1_000)] = 1_000
    metering_attributes_max: Annotated[int, Field(ge=0, le=1_000)] = 32


class ArchiveSettings(BaseSettings):
    """What the command that archives is told: how long ago use happened that it archives, if nobody says when."""

    model_config = SettingsConfigDict(env_prefix="SCRIP_", frozen=True, extra="ignore")

    metering_archive_after_days: Annotated[int, Field(ge=1, le=36_500)] = 400
