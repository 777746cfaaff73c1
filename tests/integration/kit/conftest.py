"""A service called `kit` that has the kit's tables and nothing else."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from pydantic import SecretStr

from services.kit.database import Pool, Writer, open_pool
from services.kit.database_setup import bootstrap, migrate
from tests.conftest import Database

VERSIONS: Final = Path(__file__).parent / "versions"


@pytest.fixture
def kit_database(empty_database: Database) -> Database:
    bootstrap(
        SecretStr(empty_database.admin_url), database=empty_database.name, passwords=empty_database.passwords("kit")
    )
    migrate(service="kit", owner_url=empty_database.url("kit_owner"), versions=VERSIONS)
    return empty_database


@pytest.fixture
async def pool(kit_database: Database) -> AsyncIterator[Pool]:
    connections = await open_pool(kit_database.url("kit"), name="test-pool")
    yield connections
    await connections.close()


@pytest.fixture
async def writer(kit_database: Database) -> AsyncIterator[Writer]:
    opened = Writer(kit_database.url("kit"), name="test-writer")
    yield opened
    await opened.close()


@pytest.fixture
async def connection(kit_database: Database) -> AsyncIterator[AsyncConnection[TupleRow]]:
    url = kit_database.url("kit").get_secret_value()
    async with await AsyncConnection.connect(url, autocommit=True) as opened:
        yield opened
