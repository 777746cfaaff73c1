"""What every service is told by its environment. Only a service's composition root (`app.py`) reads settings."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


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
