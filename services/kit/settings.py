"""What every service is told by its environment. Only a service's composition root (`app.py`) reads settings."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _check_traces_endpoint(text: str) -> str:
    """The URL that spans are posted to; of an address without a path, the one that OTLP has."""
    scheme, separator, rest = text.partition("://")
    if scheme not in ("http", "https") or not separator or not rest:
        raise ValueError("an address begins with http:// or https://")
    return text if rest.rstrip("/").count("/") else f"{text.rstrip('/')}/v1/traces"


class ServiceSettings(BaseSettings):
    """Environment variables with the prefix `SCRIP_`: SCRIP_NATS_URL, SCRIP_DATABASE_URL, …"""

    model_config = SettingsConfigDict(env_prefix="SCRIP_", frozen=True, extra="ignore")

    service: str
    nats_url: str = "nats://127.0.0.1:8090"
    nats_user: str
    nats_password: SecretStr
    database_url: SecretStr
    http_host: str = "127.0.0.1"
    http_port: Annotated[int, Field(ge=0, le=65535)]
    tokens_file: Path
    catalogue_file: Path
    log_level: str = "info"
    lease_seconds: Annotated[float, Field(gt=0)] = 3.0
    shutdown_seconds: Annotated[int, Field(gt=0)] = 10
    # Of the kit's tracing: where spans go, and how many of the traces that begin here are kept.
    traces_exporter: Literal["none", "otlp", "console", "file"] = "none"
    traces_endpoint: Annotated[str, AfterValidator(_check_traces_endpoint)] = "http://127.0.0.1:4318/v1/traces"
    traces_file: Path | None = None
    traces_sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _names_its_traces_file(self) -> Self:
        if self.traces_exporter == "file" and self.traces_file is None:
            raise ValueError("traces_exporter is file: traces_file must name it")
        return self
