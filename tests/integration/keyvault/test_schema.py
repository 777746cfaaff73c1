"""The schema is what tables.py says, and keeps what must not change, whoever tries."""

from collections.abc import Iterator

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from psycopg import Connection
from psycopg.rows import TupleRow
from sqlalchemy import create_engine, pool

from services.keyvault.tables import metadata
from services.kit.database_setup import migrate
from tests.conftest import Database


@pytest.fixture
def runtime(database: Database) -> Iterator[Connection[TupleRow]]:
    with psycopg.connect(database.url("keyvault").get_secret_value(), autocommit=True) as connection:
        yield connection


@pytest.fixture
def owner(database: Database) -> Iterator[Connection[TupleRow]]:
    with psycopg.connect(database.url("keyvault_owner").get_secret_value(), autocommit=True) as connection:
        yield connection


def refused(connection: Connection[TupleRow], statement: str, kind: type[psycopg.Error]) -> None:
    with pytest.raises(kind):
        connection.execute(statement)


def test_the_migrations_make_the_tables_of_tables_py(database: Database) -> None:
    url = database.url("keyvault_owner").get_secret_value()
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
    migrate(service="keyvault", owner_url=database.url("keyvault_owner"))


def test_the_audit_trail_is_only_added_to(runtime: Connection[TupleRow], owner: Connection[TupleRow]) -> None:
    runtime.execute(
        "INSERT INTO audit (id, at, principal, action, detail) VALUES (uuidv7(), now(), 'me', 'secret_stored', '{}')"
    )
    for statement in ("DELETE FROM audit", "TRUNCATE audit", "UPDATE audit SET principal = 'you'"):
        refused(runtime, statement, psycopg.errors.InsufficientPrivilege)
        refused(owner, statement, psycopg.errors.RaiseException)
    assert runtime.execute("SELECT principal FROM audit").fetchall() == [("me",)]


def test_a_key_is_never_deleted_and_never_becomes_another(runtime: Connection[TupleRow]) -> None:
    for statement in (
        "DELETE FROM access_keys",
        "TRUNCATE access_keys",
        "UPDATE access_keys SET key_sha256 = ''",
        "UPDATE access_keys SET account = 'other/key_00000000'",
        "UPDATE access_keys SET expires_at = NULL",
        "CREATE TABLE mine (n int)",
    ):
        refused(runtime, statement, psycopg.errors.InsufficientPrivilege)
