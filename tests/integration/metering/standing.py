"""Has a process of metering stand still in the middle of a transaction, so that it is killed there and nowhere else."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from tests.conftest import Database
from tests.integration.metering.driving import WAIT_SECONDS_MAX

# What each transaction of a correction writes, as a rule in this order; and its commit, as which a trigger is deferred.
TABLES: Final = ("corrections", "outbox", "usage_log", "correction_items")
COMMIT: Final = "commit"
POINTS: Final = (*TABLES, COMMIT)

_MAKE: Final = """
CREATE TABLE metering.standing (connection text, point text);
CREATE FUNCTION metering.stand_still() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF EXISTS (SELECT FROM metering.standing
               WHERE connection = current_setting('application_name') AND point = TG_ARGV[0]) THEN
        PERFORM pg_advisory_xact_lock(1);
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER stands_at_commit AFTER INSERT ON metering.outbox DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION metering.stand_still('commit');
"""
_AT_TABLE: Final = """
CREATE TRIGGER stands_still BEFORE INSERT OR UPDATE ON metering.{table}
    FOR EACH STATEMENT EXECUTE FUNCTION metering.stand_still('{table}')
"""


class Standing:
    """Whoever comes to a point on a connection of that name stands still there, until it may go on."""

    def __init__(self, connection: AsyncConnection[TupleRow]) -> None:
        self._connection = connection

    async def begin(self, *, connection: str, point: str) -> None:
        """Have stand still who comes there from now on."""
        await self._connection.execute("SELECT pg_advisory_lock(1)")
        await self._connection.execute("INSERT INTO metering.standing VALUES (%s, %s)", [connection, point])

    async def until_reached(self) -> None:
        """Wait until somebody stands there."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while True:
            cursor = await self._connection.execute(
                "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
            )
            if cursor.rowcount:
                return
            assert time.monotonic() < deadline, "nobody came there"
            await asyncio.sleep(0.01)

    async def pass_others(self) -> None:
        """Have nobody else stand still, though who does goes on doing so."""
        await self._connection.execute("DELETE FROM metering.standing")

    async def end(self) -> None:
        """Let go on who stands there, if anybody does: without its process, as far as Postgres goes by itself."""
        await self._connection.execute("SELECT pg_advisory_unlock_all()")


@asynccontextmanager
async def standing(database: Database) -> AsyncIterator[Standing]:
    """Points at which metering can be made to stand still."""
    url = database.superuser_url.get_secret_value()
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(_MAKE)
        for table in TABLES:
            await connection.execute(_AT_TABLE.format(table=table))
        yield Standing(connection)
