"""A billing process inside the test: its application with everything real, served on a socket, driven over HTTP."""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import psycopg
import pytest
from nats.aio.client import Client
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from pydantic import SecretStr

from services.billing.settings import BillingSettings
from services.kit.settings import ServiceSettings
from tests.conftest import Database
from tests.integration.billing.driving import SECRET, Driver
from tests.unit.billing.building import BILLING_CATALOGUE_FILE

SCOPES = {
    "operator": ["billing:read", "billing:write", "operate"],
    "shop": ["billing:read", "billing:write"],
    "demo": ["usage:write"],
}


@pytest.fixture
def tokens() -> Mapping[str, str]:
    """Tokens of `operator`, who may everything, of `shop`, who sells, and of `demo`, who may nothing here."""
    return {name: f"token-of-{name}" for name in SCOPES}


@pytest.fixture
def tokens_file(tmp_path: Path, tokens: Mapping[str, str]) -> Path:
    path = tmp_path / "tokens.json"
    rows = [
        {"principal": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), "scopes": SCOPES[name]}
        for name, token in tokens.items()
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def billing_settings(service_settings: Callable[[str], ServiceSettings]) -> BillingSettings:
    return BillingSettings(
        **service_settings("billing").model_dump(),
        stripe_api_key=SecretStr("sk_test_billing"),
        stripe_webhook_secrets=(SecretStr("whsec_older"), SecretStr(SECRET)),
        # Nobody is there, unless a test says so.
        stripe_api_base="http://127.0.0.1:9",
        stripe_timeout_seconds=5.0,
        billing_catalogue_file=BILLING_CATALOGUE_FILE,
    )


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[AsyncConnection[TupleRow]]:
    url = database.url("billing").get_secret_value()
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as opened:
        yield opened


@pytest.fixture
async def driver(
    billing_settings: BillingSettings,
    operator_nats: Client,
    connection: AsyncConnection[TupleRow],
    tokens: Mapping[str, str],
) -> Driver:
    return Driver(settings=billing_settings, operator_nats=operator_nats, connection=connection, tokens=tokens)
