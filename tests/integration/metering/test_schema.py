"""The schema is what tables.py says, and keeps what must not change, whoever tries."""

from collections.abc import Iterator
from datetime import date

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from psycopg import Connection
from psycopg.rows import TupleRow
from sqlalchemy import create_engine, pool

from services.kit.database_setup import migrate
from services.metering.tables import metadata
from tests.conftest import Database


@pytest.fixture
def runtime(database: Database) -> Iterator[Connection[TupleRow]]:
    with psycopg.connect(database.url("metering").get_secret_value(), autocommit=True) as connection:
        yield connection


@pytest.fixture
def owner(database: Database) -> Iterator[Connection[TupleRow]]:
    with psycopg.connect(database.url("metering_owner").get_secret_value(), autocommit=True) as connection:
        yield connection


def test_the_migrations_make_the_tables_of_tables_py(database: Database) -> None:
    url = database.url("metering_owner").get_secret_value()
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=pool.NullPool)
    parts = ("schema_version", "usage_log_", "seen_")
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "include_name": lambda name, kind, _parents: kind != "table" or not str(name).startswith(parts),
            },
        )
        assert compare_metadata(context, metadata) == []


def test_migrating_again_changes_nothing(database: Database) -> None:
    migrate(service="metering", owner_url=database.url("metering_owner"))


def test_every_business_table_begins_with_the_partition(owner: Connection[TupleRow]) -> None:
    first = owner.execute(
        "SELECT relname, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid"
        " WHERE relnamespace = 'metering'::regnamespace AND relkind IN ('r', 'p') AND attnum = 1"
    ).fetchall()
    others = {"schema_version", "members", "dead_letters", "price_versions", "meter_versions", "archived_months"}
    assert {table for table, column in first if column != "partition"} == others


def test_a_month_is_kept_as_all_parts_of_the_log(owner: Connection[TupleRow], runtime: Connection[TupleRow]) -> None:
    runtime.execute("SELECT ensure_usage_month('2021-05-01')")

    kept = owner.execute(
        "SELECT inhrelid::regclass::text, reloptions, (SELECT array_agg(attname::text ORDER BY attname)"
        " FROM pg_attribute WHERE attrelid = inhrelid AND attstattarget = 0)"
        " FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid WHERE inhparent = 'usage_log'::regclass"
    ).fetchall()

    wanted = (["autovacuum_freeze_min_age=0"], ["amounts", "context", "data", "line_items", "posted"])
    assert {part.removeprefix("metering."): found for part, *found in kept}.items() >= {
        "usage_log_2021_05": list(wanted),
        "usage_log_other": list(wanted),
    }.items()


LOGGED = (
    "INSERT INTO usage_log (partition, occurred_at, source, event_id, account, type, recorded_at, data)"
    " VALUES (1, '2026-01-01Z', 'demo', 'use-1', 'acme', 't', now(), '{}')"
)
CHARGE = (
    "UPDATE usage_log SET price_version = 'v', line_items = '[]', amounts = '[]', bundle_number = 1, line_number = 1"
)
SEEN = "INSERT INTO seen VALUES (1, 'demo', 'use-1', 'hash', '2026-01-01Z')"


def refused(connection: Connection[TupleRow], statement: str, kind: type[psycopg.Error] = psycopg.Error) -> None:
    with pytest.raises(kind):
        connection.execute(statement)


def test_logged_use_is_charged_once_and_never_changed(
    runtime: Connection[TupleRow], owner: Connection[TupleRow]
) -> None:
    runtime.execute("SELECT ensure_usage_month('2026-01-15')")
    runtime.execute(LOGGED)
    refused(runtime, "UPDATE usage_log SET bundle_number = 1", psycopg.errors.CheckViolation)
    runtime.execute(CHARGE)
    for statement in (CHARGE, "UPDATE usage_log SET amounts = '[1]'", CHARGE.replace("1,", "2,")):
        refused(runtime, statement, psycopg.errors.RaiseException)
    for statement in (
        "DELETE FROM usage_log",
        "TRUNCATE usage_log",
        "UPDATE usage_log SET account = 'x'",
        "DELETE FROM usage_log_2026_01",
        "INSERT INTO usage_log_2026_01 SELECT * FROM usage_log",
    ):
        refused(runtime, statement, psycopg.errors.InsufficientPrivilege)
    for statement in (
        "DELETE FROM usage_log",
        "TRUNCATE usage_log",
        "TRUNCATE usage_log_2026_01",
        "UPDATE usage_log SET account = 'x'",
        "UPDATE usage_log_2026_01 SET data = '[]'",
    ):
        refused(owner, statement, psycopg.errors.RaiseException)


def test_a_version_is_superseded_once_and_never_counts_again(
    runtime: Connection[TupleRow], owner: Connection[TupleRow]
) -> None:
    runtime.execute(LOGGED)
    runtime.execute(CHARGE)
    second = LOGGED.replace("data)", "data, revision)").replace("'{}')", "'{}', 1)")
    refused(runtime, LOGGED, psycopg.errors.UniqueViolation)
    for statement in (
        "UPDATE usage_log SET superseded = true, amounts = '[1]'",
        "UPDATE usage_log SET superseded = false",
    ):
        refused(runtime, statement, psycopg.errors.RaiseException)
    refused(runtime, "UPDATE usage_log SET revision = 2", psycopg.errors.InsufficientPrivilege)
    runtime.execute("UPDATE usage_log SET superseded = true")
    runtime.execute(second)
    for connection in (runtime, owner):
        for change in ("superseded = false", "superseded = true"):
            refused(connection, f"UPDATE usage_log SET {change} WHERE revision = 0", psycopg.errors.RaiseException)
    # A later version may cost something and have no line; the first has one.
    free = "price_version = 'v', line_items = '[]', amounts = '[]'"
    refused(runtime, f"UPDATE usage_log SET {free} WHERE revision = 1", psycopg.errors.RaiseException)
    charged = LOGGED.replace("data)", "data, revision, price_version, line_items, amounts)")
    runtime.execute(charged.replace("'{}')", "'{}', 2, 'v', '[]', '[]')"))
    refused(runtime, charged.replace("use-1", "use-2").replace("'{}')", "'{}', 0, 'v', '[]', '[]')"))


def test_what_was_seen_is_never_forgotten(runtime: Connection[TupleRow], owner: Connection[TupleRow]) -> None:
    runtime.execute(SEEN)
    for statement in ("DELETE FROM seen", "UPDATE seen SET body_hash = 'x'", "TRUNCATE seen"):
        refused(runtime, statement, psycopg.errors.InsufficientPrivilege)
        refused(owner, statement, psycopg.errors.RaiseException)
    refused(owner, "TRUNCATE seen_3", psycopg.errors.RaiseException)


def test_the_outbox_and_the_directory_are_only_added_to(runtime: Connection[TupleRow]) -> None:
    for table in ("outbox", "directory"):
        for statement in (f"DELETE FROM {table}", f"TRUNCATE {table}", f"UPDATE {table} SET partition = 1"):
            refused(runtime, statement, psycopg.errors.InsufficientPrivilege)


def test_a_price_version_is_never_changed(runtime: Connection[TupleRow], owner: Connection[TupleRow]) -> None:
    version = "INSERT INTO price_versions VALUES (%s, %s, now(), 'operator', '[]')"
    runtime.execute(version, ["v1", "2026-01-01Z"])
    for twin in (["v1", "2026-01-02Z"], ["v2", "2026-01-01Z"]):
        with pytest.raises(psycopg.errors.UniqueViolation):
            runtime.execute(version, twin)
    for statement in (
        "DELETE FROM price_versions",
        "UPDATE price_versions SET models = '[1]'",
        "TRUNCATE price_versions",
    ):
        refused(runtime, statement, psycopg.errors.InsufficientPrivilege)
        refused(owner, statement, psycopg.errors.RaiseException)


def test_months_are_made_once_within_bounds_and_by_nobody_else(runtime: Connection[TupleRow]) -> None:
    def made(day: date) -> bool:
        row = runtime.execute("SELECT ensure_usage_month(%s)", [day]).fetchone()
        return bool(row and row[0])

    assert [made(date(2025, 12, 31)), made(date(2025, 12, 1)), made(date(2026, 1, 1))] == [True, False, True]
    for day in ("2019-12-31", "3000-01-01"):
        refused(runtime, f"SELECT ensure_usage_month('{day}')", psycopg.errors.RaiseException)
    refused(runtime, "CREATE TABLE mine (n int)", psycopg.errors.InsufficientPrivilege)


def test_logged_use_moves_only_to_the_account_that_its_name_turns_out_to_stand_for(
    runtime: Connection[TupleRow], owner: Connection[TupleRow]
) -> None:
    take = (
        "SELECT event_id FROM take_from_log(1::smallint, ARRAY['2026-01-01Z'::timestamptz], ARRAY['demo'],"
        " ARRAY['use-1'])"
    )
    alias = "INSERT INTO aliases VALUES (1, 'acme', 'other', now(), 'operator', true)"
    runtime.execute(LOGGED)
    # No alias: not even the owner lets it go.
    refused(runtime, take, psycopg.errors.RaiseException)
    refused(owner, "DELETE FROM usage_log", psycopg.errors.RaiseException)
    runtime.execute(alias)
    refused(runtime, "DELETE FROM usage_log", psycopg.errors.InsufficientPrivilege)
    assert runtime.execute(take).fetchall() == [("use-1",)]
    runtime.execute(LOGGED)
    runtime.execute(CHARGE)
    refused(runtime, take, psycopg.errors.RaiseException)
    # Under another name it is the account's own.
    runtime.execute(LOGGED.replace("use-1", "use-2").replace("data)", "data, subject)").replace("'{}')", "'{}', 'x')"))
    refused(runtime, take.replace("use-1", "use-2"), psycopg.errors.RaiseException)


def test_use_that_waits_has_its_body_or_its_account(runtime: Connection[TupleRow]) -> None:
    waiting = "INSERT INTO set_aside VALUES (1, 'demo', 'use-1', {}, '2026-01-01Z', '{}', 'key', now(), {})"
    for account, reason, body in (
        ("NULL", "unattributed", "NULL"),
        ("'acme'", "unmapped", "'{}'"),
        ("NULL", "unmapped", "NULL"),
        ("'acme'", "unpriced", "'{}'"),
        ("'acme'", "lost", "NULL"),
    ):
        refused(runtime, waiting.format(account, reason, body), psycopg.errors.CheckViolation)
    runtime.execute(waiting.format("NULL", "unmapped", "'{}'"))
