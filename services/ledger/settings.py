"""What the ledger is told beyond what every service is told."""

from typing import Annotated

from pydantic import Field

from services.kit.settings import ServiceSettings


class LedgerSettings(ServiceSettings):
    """Environment variables with the prefix `SCRIP_`."""

    service: str = "ledger"
    batch_cost_max: Annotated[int, Field(gt=0)] = 4_000
    queue_cost_max: Annotated[int, Field(gt=0)] = 20_000
    outbox_keep_seconds: Annotated[float, Field(gt=0)] = 7 * 86_400.0
