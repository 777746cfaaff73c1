"""The schema is what tables.py says, also when it was made step by step around rows that were there before."""

import shutil
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy.dialects import postgresql

from services import ledger
from services.kit.database_setup import bootstrap, migrate
from services.ledger import tables
from tests.conftest import Database

VERSIONS = Path(ledger.__file__).parent / "migrations" / "versions"

# Each index, and the question it answers. What is not asked for costs every write.
INDEXES = {
    "accounts_due": "what is due: the sweeper",
    "accounts_in_order": "accounts by prefix; a tree in order",
    "charge_lines_of_time": "the lines of a transaction",
    "commands_of_time": "the command of a transaction",
    "holds_of_account": "open holds of a tree",
    "holds_open": "overdue holds: the sweeper",
    "journal_statement": "statements, balances of the past, totals, exports",
    "lots_of_past": "lots for late charges",
    "lots_of_reference": "claims; statements by reference",
    "lots_to_begin": "lots granted for later that have begun: the sweeper",
    "lots_of_wallet": "an account's lots",
    "reversals_of_time": "the reversals of a transaction",
}


def test_the_tables_are_described_as_they_are(database: Database) -> None:
    with psycopg.connect(database.superuser_url.get_secret_value()) as connection:
        stored = {
            (table, column): (kind, nullable == "YES")
            for table, column, kind, nullable in connection.execute(
                "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns"
                " WHERE table_schema = 'ledger' AND table_name <> 'schema_version'"
            )
        }
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
    described = {
        (table.name, column.name): (column.type.compile(dialect=dialect).lower(), bool(column.nullable))
        for table in tables.metadata.tables.values()
        for column in table.columns
    }
    assert described == stored


def test_every_index_answers_a_question(database: Database) -> None:
    with psycopg.connect(database.superuser_url.get_secret_value()) as connection:
        rows = connection.execute(
            "SELECT indexname FROM pg_indexes WHERE schemaname = 'ledger' AND tablename = ANY (%s)"
            " AND right(indexname, 5) <> '_pkey'",
            [[table.name for table in (*tables.RECORD, *tables.PROJECTIONS)]],
        ).fetchall()
    assert {name for (name,) in rows} == set(INDEXES)


@pytest.fixture
def before_the_engine(tmp_path: Path) -> Path:
    """The versions before 0003."""
    for name in ("0001_spine.py", "0002_claims.py"):
        shutil.copy(VERSIONS / name, tmp_path)
    return tmp_path


def test_a_ledger_with_rows_is_brought_up_to_the_engine(empty_database: Database, before_the_engine: Path) -> None:
    bootstrap(
        SecretStr(empty_database.admin_url), database=empty_database.name, passwords=empty_database.passwords("ledger")
    )
    owner = empty_database.url("ledger_owner")
    migrate(service="ledger", owner_url=owner, versions=before_the_engine)
    with psycopg.connect(owner.get_secret_value()) as connection:
        for statement in ROWS:
            connection.execute(statement)
    migrate(service="ledger", owner_url=owner)
    with psycopg.connect(owner.get_secret_value(), options="-c timezone=UTC") as connection:
        lines = connection.execute("SELECT event_id, recorded_at::text FROM charge_lines").fetchall()
        assert lines == [("e1", "2026-07-01 12:00:00+00")]
        wallets = connection.execute("SELECT posted, owed, thresholds, low, full_posted FROM wallets").fetchall()
        assert wallets == [(5, 0, "[]", "[]", 0)]
        with pytest.raises(psycopg.errors.RaiseException):
            connection.execute("UPDATE charge_lines SET event_id = 'e2'")


_ID = "'00000000-0000-7000-8000-000000000001'"
_AT = "'2026-07-01 12:00Z'"
ROWS = (
    f"""
    INSERT INTO journal (partition, batch, position, transaction_id, kind, account, unit, posted, held, frozen,
                         occurred_at, recorded_at, hash)
    VALUES (7, 1, 1, {_ID}, 'charged', 'acme', 'usd', -1, 0, 0, {_AT}, {_AT}, decode(repeat('01', 32), 'hex'))
    """,
    f"""
    INSERT INTO charge_lines (partition, source, event_id, revision, account, occurred_at, scope, price_version,
                              own_key, amounts, split, line_number, batch, transaction_id)
    VALUES (7, 'demo', 'e1', 0, 'acme', {_AT}, '{{}}', 'v1', false, '[]', '[]', 1, 1, {_ID})
    """,
    f"INSERT INTO wallets VALUES (7, 'acme', 'usd', 'hard', 0, {_AT}, 1, 1, 5, 0, 0, 0)",
)
