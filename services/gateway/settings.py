"""What the gateway is told by its environment, beyond what every service is told."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from contracts.usage import ProviderName
from services.kit.settings import ServiceSettings


def _check_url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError("an address begins with http:// or https://")
    return text.rstrip("/")


Url = Annotated[str, AfterValidator(_check_url)]
Seconds = Annotated[float, Field(gt=0)]


class ProviderSettings(BaseModel):
    """Where a provider is, and what a client's leaving means there.

    `drain`: it goes on generating, and billing, so its stream is read to the end. `abort`: it stops when it is left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: Url
    on_disconnect: Literal["drain", "abort"] = "drain"


class GatewaySettings(ServiceSettings):
    """`providers` (SCRIP_PROVIDERS) is a JSON object by name; of two that serve a model the first is asked."""

    service: str = "gateway"
    # It has no tables.
    database_url: SecretStr = SecretStr("")
    metering_url: Url
    metering_token: SecretStr
    spool_file: Path
    spool_bytes_max: Annotated[int, Field(gt=0)] = 256 << 20
    providers: dict[ProviderName, ProviderSettings]

    body_bytes_max: Annotated[int, Field(gt=0)] = 8 << 20
    answer_bytes_max: Annotated[int, Field(gt=0)] = 64 << 20
    calls_max: Annotated[int, Field(gt=0)] = 1_000
    output_tokens_max: Annotated[int, Field(gt=0)] = 4_096
    output_tokens_max_by_model: Annotated[dict[str, Annotated[int, Field(gt=0)]], Field(default_factory=dict)]
    image_tokens_max: Annotated[int, Field(gt=0)] = 50_000

    key_cache_seconds: Annotated[float, Field(ge=0, le=5)] = 5.0
    price_refresh_seconds: Seconds = 5.0
    body_seconds: Seconds = 30.0
    # How long a partition of the ledger may be without an owner, and keyvault without an answer.
    ask_seconds: Seconds = 4.0
    publish_seconds: Seconds = 2.0
    connect_seconds: Seconds = 5.0
    first_byte_seconds: Seconds = 60.0
    between_seconds: Seconds = 60.0
    call_seconds: Annotated[float, Field(gt=0, le=3_600)] = 600.0
    # From the end of a call until its charge: longer than metering and the ledger may be away.
    hold_margin_seconds: Annotated[int, Field(gt=0, le=36_000)] = 300
    send_seconds: Seconds = 30.0
    keepalive_seconds: Seconds = 4.0
