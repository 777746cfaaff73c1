"""A metering process inside the test: its application with everything real, driven over NATS and HTTP."""

from collections.abc import AsyncIterator, Callable, Mapping

import psycopg
import pytest
from nats.aio.client import Client
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from services.kit.database import Writer
from services.kit.settings import ServiceSettings
from services.metering.settings import MeteringSettings
from tests.conftest import Database, NatsAccount
from tests.integration.metering.driving import Driver


@pytest.fixture
def metering_settings(service_settings: Callable[[str], ServiceSettings]) -> MeteringSettings:
    # Events of tests happened at one noon, long ago.
    return MeteringSettings(**service_settings("metering").model_dump(), metering_age_days_max=36_500)


@pytest.fixture
async def writer(database: Database) -> AsyncIterator[Writer]:
    opened = Writer(database.url("metering"), name="test-writer")
    yield opened
    await opened.close()


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[AsyncConnection[TupleRow]]:
    url = database.url("metering").get_secret_value()
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as opened:
        yield opened


@pytest.fixture
async def driver(
    metering_settings: MeteringSettings,
    nats_account: NatsAccount,
    operator_nats: Client,
    connection: AsyncConnection[TupleRow],
    tokens: Mapping[str, str],
) -> AsyncIterator[Driver]:
    demo_nats, ledger_nats = await nats_account.connect("demo"), await nats_account.connect("ledger")
    yield Driver(
        settings=metering_settings,
        demo_nats=demo_nats,
        ledger_nats=ledger_nats,
        operator_nats=operator_nats,
        connection=connection,
        tokens=tokens,
    )
    await demo_nats.close()
    await ledger_nats.close()
