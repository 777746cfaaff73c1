"""A keyvault process inside the test: its application with everything real, and beside it a ledger or its stand-in."""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
from nats.aio.client import Client
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from services.keyvault.settings import KeyvaultSettings
from services.keyvault.store import make_keyring_file
from services.kit.settings import ServiceSettings
from tests.conftest import Database, NatsAccount
from tests.integration.keyvault.driving import CATALOGUE, Driver, StandInLedger

SCOPES: Mapping[str, tuple[str, ...]] = {
    "operator": ("keyvault:read", "keyvault:write", "ledger:read", "operate"),
    "product": ("keyvault:read", "keyvault:write"),
    "viewer": ("keyvault:read",),
}


@pytest.fixture
def tokens() -> Mapping[str, str]:
    return {principal: f"token-of-{principal}" for principal in SCOPES}


@pytest.fixture
def tokens_file(tmp_path: Path, tokens: Mapping[str, str]) -> Path:
    path = tmp_path / "tokens.json"
    path.write_text(
        json.dumps(
            [
                {
                    "principal": principal,
                    "sha256": hashlib.sha256(token.encode()).hexdigest(),
                    "scopes": list(SCOPES[principal]),
                }
                for principal, token in tokens.items()
            ]
        )
    )
    return path


@pytest.fixture
def keyvault_settings(service_settings: Callable[[str], ServiceSettings], tmp_path: Path) -> KeyvaultSettings:
    keyring_file, catalogue_file = tmp_path / "keyring.json", tmp_path / "catalogue.toml"
    make_keyring_file(keyring_file)
    catalogue_file.write_text(CATALOGUE)
    return KeyvaultSettings(
        **service_settings("keyvault").model_dump()
        | {
            "keyring_file": keyring_file,
            "catalogue_file": catalogue_file,
            "sweep_seconds": 0.2,
            "uses_flush_seconds": 0.2,
        }
    )


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[AsyncConnection[TupleRow]]:
    url = database.superuser_url.get_secret_value()
    async with await AsyncConnection.connect(url, autocommit=True, options="-c search_path=keyvault") as opened:
        yield opened


@pytest.fixture
async def gateway_nats(nats_account: NatsAccount) -> AsyncIterator[Client]:
    client = await nats_account.connect("gateway")
    yield client
    await client.close()


@pytest.fixture
async def ledger(nats_account: NatsAccount) -> AsyncIterator[StandInLedger]:
    client = await nats_account.connect("ledger")
    stand_in = StandInLedger(client)
    await stand_in.start()
    yield stand_in
    await client.close()


@pytest.fixture
def driver(
    keyvault_settings: KeyvaultSettings,
    gateway_nats: Client,
    operator_nats: Client,
    superuser: AsyncConnection[TupleRow],
    tokens: Mapping[str, str],
) -> Driver:
    return Driver(
        settings=keyvault_settings,
        gateway_nats=gateway_nats,
        operator_nats=operator_nats,
        superuser=superuser,
        tokens=tokens,
    )
