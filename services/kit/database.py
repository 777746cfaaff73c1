"""Postgres: one writer connection, small pools for reads. Knows no table."""

import asyncio
import random
import re
import select
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Final

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from pydantic import SecretStr

from services.kit.telemetry import FAULTS, get_logger

log = get_logger(__name__)

# What it raises whose answer may come later: the work is to be tried again.
DATABASE_AWAY: Final = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, TimeoutError, OSError)
RECONNECT_SECONDS_MIN: Final = 0.05
RECONNECT_SECONDS_MAX: Final = 2.0

# A dead peer is noticed by the kernel within seconds, not hours.
_CONNECTION: Final = {
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}


class Writer:
    """One connection of its own, for one task: opened when first needed, opened again after a failure.

    A transaction whose commit was cut off may have been committed: whoever repeats it must find its own traces
    (head row, idempotency key, unique key).
    """

    def __init__(self, url: SecretStr, *, name: str) -> None:
        self._url = url
        self._name = name
        self._connection: AsyncConnection[TupleRow] | None = None

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection[TupleRow]]:
        """A transaction: begins with the first statement, commits at the end, rolls back on an exception.

        Waits for as long as no connection can be made: bound it with `asyncio.timeout` where that matters. Inside,
        `async with connection.pipeline()` sends statements together; `await connection.commit()` as the last one of
        a pipeline saves the round trip of the commit.
        """
        connection = await self._connected()
        try:
            yield connection
            await connection.commit()
        except Exception:
            try:
                await connection.rollback()
            except psycopg.Error:
                await self._drop()
            raise
        except BaseException:
            # Cancelled in the middle of an exchange: the connection's state is unknown.
            await self._drop()
            raise

    async def close(self) -> None:
        """Close the connection. A later transaction opens another."""
        await self._drop()

    async def _connected(self) -> AsyncConnection[TupleRow]:
        delay = RECONNECT_SECONDS_MIN
        while self._connection is None or self._connection.broken or self._connection.closed:
            await self._drop()
            try:
                self._connection = await AsyncConnection.connect(_conninfo(self._url, name=self._name))
            except psycopg.OperationalError as error:
                FAULTS.labels(place="database.connect").inc()
                log.error(
                    "database not reachable", connection=self._name, retry_seconds=delay, error=str(error).strip()
                )
                await asyncio.sleep(delay * random.uniform(0.8, 1.2))
                delay = min(delay * 2, RECONNECT_SECONDS_MAX)
        return self._connection

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


# What stands for a character that means something else where rows are copied.
_COPY_ODD: Final = re.compile(r"[\\\t\n\r]").search
_COPY_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def copy_text(rows: Collection[Sequence[str]]) -> str:
    """Rows as the text of a `COPY … FROM STDIN (NULL '')`: the empty text is null. To be written with `Copy.write`.

    In a twentieth of the time that `write_row` takes, as long as no value has a character to be escaped.
    """
    text = "\n".join(["\t".join(row) for row in rows])
    separators = sum(map(len, rows)) - len(rows)
    if "\\" in text or "\r" in text or text.count("\n") >= max(len(rows), 1) or text.count("\t") > separators:
        text = "\n".join(["\t".join([copy_value(value) for value in row]) for row in rows])
    return text + "\n" if text or rows else ""


def copy_value(text: str) -> str:
    """A value as it stands in such a text."""
    return text if _COPY_ODD(text) is None else text.translate(_COPY_ESCAPES)


Pool = AsyncConnectionPool[AsyncConnection[TupleRow]]


async def open_pool(url: SecretStr, *, name: str, connections_max: int = 4) -> Pool:
    """A small pool of autocommit connections, for reads and for what need not be batched.

    It connects in the background: that Postgres is down shows when a connection is asked for (PoolTimeout after 2 s).
    """
    connections = AsyncConnectionPool(
        _conninfo(url, name=name),
        kwargs={"autocommit": True},
        min_size=1,
        max_size=connections_max,
        timeout=2.0,
        name=name,
        open=False,
        reconnect_timeout=60.0,
        check=_check_idle,
    )
    await connections.open(wait=False)
    return connections


async def _check_idle(connection: AsyncConnection[TupleRow]) -> None:
    """Raises if a connection is of no use any more. One that the server has closed has something to be read: only then
    it is asked, which takes a round trip.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        await AsyncConnectionPool.check_connection(connection)


def database_check(connections: Pool) -> Callable[[], Awaitable[None]]:
    """A readiness check: raises unless a statement is answered."""

    async def check() -> None:
        async with connections.connection(timeout=0.8) as connection:
            await connection.execute("SELECT 1")

    return check


async def wait_for_database(url: SecretStr, *, timeout_seconds: float) -> None:
    """Return once Postgres takes connections. Raises TimeoutError, naming the last reason."""
    last: psycopg.OperationalError | None = None
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                try:
                    connection = await AsyncConnection.connect(_conninfo(url, name="scrip-wait"))
                except psycopg.OperationalError as error:
                    last = error
                    await asyncio.sleep(0.05)
                else:
                    await connection.close()
                    return
    except TimeoutError as error:
        raise TimeoutError(f"no database connection within {timeout_seconds:g} s: {last}") from error


async def durability(connection: AsyncConnection[TupleRow]) -> dict[str, str]:
    """What the server says about what it keeps: fsync, synchronous_commit, full_page_writes, …, server_version."""
    names = ["fsync", "synchronous_commit", "full_page_writes", "wal_sync_method", "server_version"]
    cursor = await connection.execute(
        "SELECT name, current_setting(name) FROM unnest(%s::text[]) WITH ORDINALITY AS n(name, place) ORDER BY place",
        [names],
    )
    return {str(name): str(value) for name, value in await cursor.fetchall()}


def _conninfo(url: SecretStr, *, name: str) -> str:
    return make_conninfo(url.get_secret_value(), **{**_CONNECTION, "application_name": name})
