"""What keyvault is told by its environment, beyond what every service is told."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from services.kit.settings import ServiceSettings


class KeyvaultSettings(ServiceSettings):
    """`keyring_file`: SCRIP_KEYRING_FILE. `lease_valid_seconds`: how long the gateway may keep a leased secret."""

    service: str = "keyvault"
    keyring_file: Path
    lease_valid_seconds: Annotated[int, Field(ge=1, le=3600)] = 60
    sweep_seconds: Annotated[float, Field(gt=0)] = 30.0
    uses_flush_seconds: Annotated[float, Field(gt=0)] = 5.0
    outbox_keep_seconds: Annotated[float, Field(gt=0)] = 7 * 86_400.0
