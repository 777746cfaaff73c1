"""Laws of roles, schemas, migrations and the writer connection."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import AsyncConnection
from pydantic import SecretStr

from infra.servers import EmbeddedPostgres
from services.kit.database import (
    Pool,
    Writer,
    copy_text,
    database_check,
    durability,
    open_pool,
    wait_for_database,
)
from services.kit.database_setup import bootstrap, migrate
from tests.conftest import Database
from tests.integration.kit.conftest import VERSIONS


def test_bootstrap_and_migrate_may_run_again(kit_database: Database) -> None:
    for _ in range(2):
        bootstrap(
            SecretStr(kit_database.admin_url), database=kit_database.name, passwords=kit_database.passwords("kit")
        )
        migrate(service="kit", owner_url=kit_database.url("kit_owner"), versions=VERSIONS)
    with psycopg.connect(kit_database.url("kit_owner").get_secret_value()) as owner:
        assert owner.execute("SELECT version_num FROM schema_version").fetchall() == [("0001",)]


def test_two_migrations_at_once_wait_for_each_other(empty_database: Database) -> None:
    def install(_number: int) -> None:
        bootstrap(
            SecretStr(empty_database.admin_url),
            database=empty_database.name,
            passwords=empty_database.passwords("kit"),
        )
        migrate(service="kit", owner_url=empty_database.url("kit_owner"), versions=VERSIONS)

    with ThreadPoolExecutor(max_workers=4) as threads:
        list(threads.map(install, range(4)))
    with psycopg.connect(empty_database.url("kit").get_secret_value()) as runtime:
        assert runtime.execute("SELECT count(*) FROM outbox").fetchone() == (0,)


def test_every_right_is_granted_explicitly(kit_database: Database) -> None:
    with psycopg.connect(kit_database.url("kit_owner").get_secret_value()) as owner:
        owner.execute("CREATE TABLE nobodys (id int)")
        owner.execute("CREATE FUNCTION secret() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    with psycopg.connect(kit_database.url("kit").get_secret_value(), autocommit=True) as runtime:
        for statement in (
            "SELECT * FROM nobodys",
            "SELECT secret()",
            "CREATE TABLE kit.mine (id int)",
            "CREATE TABLE public.mine (id int)",
            "CREATE SCHEMA mine",
            "TRUNCATE outbox",
            "SET ROLE kit_owner",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                runtime.execute(statement)
        runtime.execute("CREATE TEMPORARY TABLE stage (id int)")


def test_roles_must_come_in_pairs(empty_database: Database) -> None:
    with pytest.raises(ValueError, match="pairs"):
        bootstrap(
            SecretStr(empty_database.admin_url),
            database=empty_database.name,
            passwords={"kit": SecretStr("x"), "other_owner": SecretStr("x")},
        )


@pytest.mark.anyio
async def test_the_writer_commits_or_rolls_back_and_goes_on_after_its_connection_is_killed(
    writer: Writer, kit_database: Database
) -> None:
    async with writer.transaction() as connection:
        await connection.execute("INSERT INTO relayed VALUES (1, 1)")

    async def write(*statements: str) -> None:
        async with writer.transaction() as connection:
            for statement in statements:
                await connection.execute(statement)

    with pytest.raises(psycopg.errors.UniqueViolation):
        await write("INSERT INTO relayed VALUES (2, 2)", "INSERT INTO relayed VALUES (1, 1)")
    async with writer.transaction() as connection:
        killed = connection.info.backend_pid
    async with await AsyncConnection.connect(kit_database.superuser_url.get_secret_value()) as admin:
        await admin.execute("SELECT pg_terminate_backend(%s)", [killed])
    with pytest.raises(psycopg.OperationalError):
        await write("INSERT INTO relayed VALUES (3, 3)")
    async with writer.transaction() as connection, connection.pipeline():
        await connection.execute("INSERT INTO relayed VALUES (4, 4)")
        await connection.execute("INSERT INTO relayed VALUES (5, 5)")
        await connection.commit()
    async with writer.transaction() as connection:
        cursor = await connection.execute("SELECT partition FROM relayed ORDER BY 1")
        assert await cursor.fetchall() == [(1,), (4,), (5,)]


@pytest.mark.anyio
async def test_a_cancelled_transaction_leaves_nothing_behind(writer: Writer) -> None:
    async def slow() -> None:
        async with writer.transaction() as connection:
            await connection.execute("INSERT INTO relayed VALUES (1, 1)")
            await connection.execute("SELECT pg_sleep(30)")

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await slow()
    async with writer.transaction() as connection:
        assert await (await connection.execute("SELECT count(*) FROM relayed")).fetchone() == (0,)


@pytest.mark.anyio
async def test_whatever_is_copied_as_text_stands_there_as_it_was(writer: Writer) -> None:
    odd = [
        "a",
        "\\",
        "\\N",
        "\\.",
        "a\tb",
        "\n",
        "\r\n",
        "\\t",
        "é\x7f\x85\u2028",
        '"',
        "'",
        " a ",
        "\x01",
        "\\x41",
        "{}",
    ]
    rows = [(str(number), one, other) for number, (one, other) in enumerate(zip(odd, reversed(odd), strict=True))]
    async with writer.transaction() as connection:
        await connection.execute("CREATE TEMPORARY TABLE copied (number int, one text, other text, nothing text)")
        async with connection.cursor() as cursor, cursor.copy("COPY copied FROM STDIN (NULL '')") as copy:
            await copy.write(copy_text([(*row, "") for row in rows]))
            await copy.write(copy_text([]))
        found = await (await connection.execute("SELECT * FROM copied ORDER BY number")).fetchall()
        await connection.execute("DROP TABLE copied")
    assert found == [(int(number), one, other, None) for number, one, other in rows]


@pytest.mark.anyio
async def test_durability_is_what_the_server_says(pool: Pool) -> None:
    async with pool.connection() as connection:
        facts = await durability(connection)
    assert facts["fsync"] == "on"
    assert facts["synchronous_commit"] == "on"
    assert facts["server_version"].startswith("18")


@pytest.mark.anyio
async def test_a_connection_that_the_server_has_closed_is_not_lent(pool: Pool, kit_database: Database) -> None:
    async with pool.connection() as connection:
        closed = connection.info.backend_pid
    async with await AsyncConnection.connect(kit_database.superuser_url.get_secret_value(), autocommit=True) as admin:
        # Until it has ended: what it says last is on its way then.
        ended = await (await admin.execute("SELECT pg_terminate_backend(%s, 5000)", [closed])).fetchone()
        assert ended == (True,)
    async with pool.connection() as connection:
        assert connection.info.backend_pid != closed
        assert await (await connection.execute("SELECT 1")).fetchone() == (1,)


@pytest.mark.anyio
async def test_writer_and_pool_outlive_a_killed_server(own_postgres: EmbeddedPostgres) -> None:
    url = SecretStr(own_postgres.url())
    writer, pool = Writer(url, name="writer"), await open_pool(url, name="pool")
    check = database_check(pool)
    async with writer.transaction() as connection:
        await connection.execute("CREATE TABLE kept (id int)")
    await check()

    async def keep_one() -> None:
        async with writer.transaction() as connection:
            await connection.execute("INSERT INTO kept VALUES (1)")

    assert own_postgres.process is not None
    own_postgres.process.kill()
    own_postgres.process.wait()
    with pytest.raises(Exception):  # noqa: B017 - any failure of whatever kind makes it not ready
        await check()
    # The first transaction meets the broken connection.
    with pytest.raises(psycopg.OperationalError):
        await keep_one()
    waiting = asyncio.create_task(keep_one())
    await asyncio.sleep(0.2)
    own_postgres.start()
    async with asyncio.timeout(10):
        await waiting
    await wait_for_database(url, timeout_seconds=5)
    async with pool.connection() as reading:
        assert await (await reading.execute("SELECT count(*) FROM kept")).fetchone() == (1,)
    await writer.close()
    await pool.close()
