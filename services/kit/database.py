"""Postgres: one writer connection, small pools for reads, roles and schemas, migrations. Knows no table."""

import asyncio
import random
import select
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psycopg
from psycopg import AsyncConnection, Connection, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from pydantic import SecretStr
from sqlalchemy import create_engine, pool, text

from services.kit.telemetry import FAULTS, get_logger

log = get_logger(__name__)

# What it raises whose answer may come later: the work is to be tried again.
DATABASE_AWAY: Final = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, TimeoutError, OSError)
RECONNECT_SECONDS_MIN: Final = 0.05
RECONNECT_SECONDS_MAX: Final = 2.0

# Held by whoever creates roles and databases, and by whoever migrates a schema: two at once wait for each other.
_BOOTSTRAP_LOCK: Final = 0x5C_12_1B_00
_MIGRATE_LOCK: Final = 0x5C_12_1B_01

# What initdb makes lets everybody in.
_DATABASES_OF_INITDB: Final = ("postgres", "template1")

_SERVICES: Final = Path(__file__).resolve().parent.parent

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
_COPY_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def copy_text(rows: Iterable[Sequence[str]]) -> str:
    """Rows as the text of a `COPY … FROM STDIN (NULL '')`: the empty text is null. To be written with `Copy.write`.

    In a tenth of the time that `write_row` takes.
    """
    lines: list[str] = []
    for row in rows:
        line = "\t".join(row)
        if "\\" in line or "\n" in line or "\r" in line or line.count("\t") >= len(row):
            line = "\t".join([value.translate(_COPY_ESCAPES) for value in row])
        lines.append(line)
    lines.append("")
    return "\n".join(lines)


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


def bootstrap(admin_url: SecretStr, *, database: str, passwords: Mapping[str, SecretStr]) -> None:
    """Create the database, and per service its schemas and two roles; run again, it only sets passwords and rights.

    `passwords` has a `<service>` and a `<service>_owner` for every service. The owner role owns the schema `<service>`
    and migrates it, and `<service>_shadow`, where it rebuilds projections; the runtime role may use the first, and each
    table as that table's migration grants it. No role of a service gets into the databases that initdb made: there
    nobody connects any more who was not granted it by name.
    """
    services = sorted(role.removesuffix("_owner") for role in passwords if role.endswith("_owner"))
    if set(passwords) != {*services, *(f"{service}_owner" for service in services)}:
        raise ValueError(f"roles come in pairs <service> and <service>_owner, not {sorted(passwords)}")
    with psycopg.connect(admin_url.get_secret_value(), autocommit=True, application_name="scrip-bootstrap") as admin:
        admin.execute("SELECT pg_advisory_lock(%s)", [_BOOTSTRAP_LOCK])
        for role, password in passwords.items():
            _set_role(admin, role=role, password=password)
        if admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone() is None:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
        found = admin.execute("SELECT datname FROM pg_database WHERE datname = ANY(%s)", [[*_DATABASES_OF_INITDB]])
        for (name,) in found.fetchall():
            _run(admin, "REVOKE ALL ON DATABASE {name} FROM PUBLIC", name=name)
        with psycopg.connect(
            make_conninfo(admin_url.get_secret_value(), dbname=database), application_name="scrip-bootstrap"
        ) as inside:
            _set_rights(inside, database=database, services=services)


def migrate(*, service: str, owner_url: SecretStr, versions: Path | None = None) -> None:
    """Bring a service's schema to its newest version, as its owner role. Two at once wait for each other.

    One Alembic environment serves all services; each keeps its versions in `services/<service>/migrations/versions`
    and its version table in its own schema.
    """
    # Not imported by every service, which would start a fifth later.
    from alembic import command  # noqa: PLC0415 - see above
    from alembic.config import Config  # noqa: PLC0415 - see above

    config = Config()
    config.set_main_option("script_location", str(_SERVICES / "kit" / "migrations"))
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", str(versions or _SERVICES / service / "migrations" / "versions"))
    parameters = conninfo_to_dict(owner_url.get_secret_value())
    engine = create_engine(
        "postgresql+psycopg://",
        connect_args={**parameters, "application_name": f"scrip-migrate-{service}"},
        poolclass=pool.NullPool,
    )
    try:
        # The lock is the session's own, so that it outlives the transactions of the migration.
        with engine.connect() as connection:
            lock = {"space": _MIGRATE_LOCK, "service": service}
            connection.execute(text("SELECT pg_advisory_lock(:space, hashtext(:service))"), lock)
            connection.commit()
            config.attributes["connection"] = connection
            config.attributes["service"] = service
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def _conninfo(url: SecretStr, *, name: str) -> str:
    return make_conninfo(url.get_secret_value(), **{**_CONNECTION, "application_name": name})


def _set_role(admin: Connection[TupleRow], *, role: str, password: SecretStr) -> None:
    if admin.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone() is None:
        admin.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    # Hashed here, so that no statement log of the server ever holds it.
    verifier = admin.pgconn.encrypt_password(password.get_secret_value().encode(), role.encode(), b"scram-sha-256")
    admin.execute(
        sql.SQL(
            "ALTER ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS NOINHERIT PASSWORD {}"
        ).format(sql.Identifier(role), sql.Literal(verifier.decode()))
    )


def _set_rights(inside: Connection[TupleRow], *, database: str, services: list[str]) -> None:
    _run(inside, "REVOKE ALL ON DATABASE {database} FROM PUBLIC", database=database)
    _run(inside, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
    for service in services:
        names = {
            "database": database,
            "service": service,
            "owner": f"{service}_owner",
            "shadow": f"{service}_shadow",
        }
        _run(inside, "GRANT CONNECT ON DATABASE {database} TO {owner}, {service}", **names)
        # A batch is copied into a temporary table first.
        _run(inside, "GRANT TEMPORARY ON DATABASE {database} TO {service}", **names)
        _run(inside, "CREATE SCHEMA IF NOT EXISTS {service} AUTHORIZATION {owner}", **names)
        # Where the owner rebuilds projections; nobody else sees it.
        _run(inside, "CREATE SCHEMA IF NOT EXISTS {shadow} AUTHORIZATION {owner}", **names)
        _run(inside, "REVOKE ALL ON SCHEMA {service}, {shadow} FROM PUBLIC", **names)
        _run(inside, "GRANT USAGE ON SCHEMA {service} TO {service}", **names)
        for role in ("{service}", "{owner}"):
            # pg_temp last: a temporary table never hides one of the schema.
            _run(inside, f"ALTER ROLE {role} IN DATABASE {{database}} SET search_path = {{service}}, pg_temp", **names)
    for service in services:
        _run(
            inside,
            "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC",
            owner=f"{service}_owner",
        )


def _run(connection: Connection[TupleRow], statement: str, **names: str) -> None:
    identifiers = {name: sql.Identifier(value) for name, value in names.items()}
    connection.execute(sql.SQL(statement).format(**identifiers))
