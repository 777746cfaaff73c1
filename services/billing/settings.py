"""What billing is told by its environment, beyond what every service is told."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from services.kit.settings import ServiceSettings


class BillingSettings(ServiceSettings):
    """`stripe_webhook_secrets`: separated by commas; while one is rotated, the old and the new are accepted.

    `stripe_api_base`: another Stripe than the real one, a simulator's. `webhook_tolerance_seconds`: how old a
    signature may be.
    """

    service: str = "billing"
    stripe_api_key: Annotated[SecretStr, Field(min_length=1)]
    stripe_webhook_secrets: Annotated[tuple[SecretStr, ...], NoDecode, Field(min_length=1)]
    stripe_api_base: str | None = None
    stripe_timeout_seconds: Annotated[float, Field(gt=0)] = 8.0
    webhook_tolerance_seconds: Annotated[int, Field(ge=1)] = 300
    billing_catalogue_file: Path

    @field_validator("stripe_webhook_secrets", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("stripe_api_base")
    @classmethod
    def _none_if_empty(cls, value: str | None) -> str | None:
        return value.rstrip("/") or None if value else None
