"""A ledger inside the test: its application with everything real, driven over HTTP, request/reply and CHARGES."""

from collections.abc import AsyncIterator, Callable, Mapping

import pytest
from nats.aio.client import Client
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from services.kit.settings import ServiceSettings
from services.ledger.settings import LedgerSettings
from tests.conftest import Database, NatsAccount
from tests.integration.ledger.driving import Driver


@pytest.fixture
def ledger_settings(service_settings: Callable[[str], ServiceSettings]) -> LedgerSettings:
    return LedgerSettings(**service_settings("ledger").model_dump())


@pytest.fixture
async def ledger_nats(nats_account: NatsAccount) -> AsyncIterator[Client]:
    client = await nats_account.connect("ledger")
    yield client
    await client.close()


@pytest.fixture
async def metering_nats(nats_account: NatsAccount) -> AsyncIterator[Client]:
    client = await nats_account.connect("metering")
    yield client
    await client.close()


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[AsyncConnection[TupleRow]]:
    url = database.superuser_url.get_secret_value()
    async with await AsyncConnection.connect(url, autocommit=True, options="-c search_path=ledger") as opened:
        yield opened


@pytest.fixture
def driver(
    ledger_settings: LedgerSettings,
    metering_nats: Client,
    ledger_nats: Client,
    superuser: AsyncConnection[TupleRow],
    tokens: Mapping[str, str],
) -> Driver:
    return Driver(
        settings=ledger_settings,
        metering_nats=metering_nats,
        ledger_nats=ledger_nats,
        superuser=superuser,
        tokens=tokens,
    )
