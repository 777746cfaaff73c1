"""The schema is what tables.py says, and keeps what must not change, whoever tries."""

from collections.abc import Iterator

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from psycopg import Connection
from psycopg.rows import TupleRow
from sqlalchemy import create_engine, pool

from services.billing.tables import metadata
from services.kit.database_setup import migrate
from tests.conftest import Database


@pytest.fixture
def runtime(database: Database) -> Iterator[Connection[TupleRow]]:
    with psycopg.connect(database.url("billing").get_secret_value(), autocommit=True) as connection:
        yield connection


@pytest.fixture
def owner(database: Database) -> Iterator[Connection[TupleRow]]:
    with psycopg.connect(database.url("billing_owner").get_secret_value(), autocommit=True) as connection:
        yield connection


def test_the_migrations_make_the_tables_of_tables_py(database: Database) -> None:
    url = database.url("billing_owner").get_secret_value()
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=pool.NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "include_name": lambda name, kind, _parents: kind != "table" or name != "schema_version",
            },
        )
        assert compare_metadata(context, metadata) == []


def test_migrating_again_changes_nothing(database: Database) -> None:
    migrate(service="billing", owner_url=database.url("billing_owner"))


EVENT = (
    "INSERT INTO stripe_events (event, number, type, payload, received_at, deliveries, status, failures)"
    " VALUES ('evt_1', 1, 't', '{}', now(), 1, 'received', 0)"
)
GRANTED = (
    "INSERT INTO payments (payment, status, account, package, quantity, price_minor, denomination, unit, paid, bonus,"
    " partition, number, recorded_at) VALUES ('pi_1', 'granted', 'acme', 'usd-10', 1, 1000, 'usd', 'usd', 1, 0, 1, 1,"
    " now())"
)


def refused(connection: Connection[TupleRow], statement: str, kind: type[psycopg.Error]) -> None:
    with pytest.raises(kind):
        connection.execute(statement)


def test_what_stripe_said_stays_as_it_was_said(runtime: Connection[TupleRow], owner: Connection[TupleRow]) -> None:
    runtime.execute(EVENT)
    runtime.execute("UPDATE stripe_events SET status = 'applied', deliveries = 2")
    for statement in ("UPDATE stripe_events SET payload = ''", "DELETE FROM stripe_events", "TRUNCATE stripe_events"):
        refused(runtime, statement, psycopg.errors.InsufficientPrivilege)
        refused(
            owner, statement if "TRUNCATE" not in statement else f"{statement} CASCADE", psycopg.errors.RaiseException
        )


def test_a_grant_is_never_changed(runtime: Connection[TupleRow], owner: Connection[TupleRow]) -> None:
    runtime.execute(GRANTED)
    runtime.execute("UPDATE payments SET session = 'cs_1'")
    for statement in (
        "UPDATE payments SET account = 'mallory'",
        "UPDATE payments SET paid = 2",
        "UPDATE payments SET number = 2",
    ):
        refused(runtime, statement, psycopg.errors.RaiseException)
        refused(owner, statement, psycopg.errors.RaiseException)
    refused(runtime, "DELETE FROM payments", psycopg.errors.InsufficientPrivilege)
    refused(owner, "DELETE FROM payments", psycopg.errors.RaiseException)


def test_a_payment_is_granted_with_all_its_terms_or_not_at_all(runtime: Connection[TupleRow]) -> None:
    refused(runtime, GRANTED.replace("'acme'", "NULL"), psycopg.errors.CheckViolation)
    refused(runtime, GRANTED.replace("'granted'", "'unpaid'"), psycopg.errors.CheckViolation)


def test_the_outbox_is_only_added_to(runtime: Connection[TupleRow]) -> None:
    for statement in ("DELETE FROM outbox", "TRUNCATE outbox", "UPDATE outbox SET number = 1"):
        refused(runtime, statement, psycopg.errors.InsufficientPrivilege)
