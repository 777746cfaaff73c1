"""Laws of array literals: Postgres reads from them what was written."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import Connection, connect
from psycopg.rows import TupleRow

from services.kit.arrays import array
from tests.conftest import Database

texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8) | st.sampled_from(
    ("", "NULL", "null", '"', "\\", "{", "}", ",", "a\x1fb", "\n", " ")
)
times = st.integers(0, 7 * 10**15).map(lambda count: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=count))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "text": texts,
    "bigint": st.integers(-(2**63), 2**63 - 1),
    "boolean": st.booleans(),
    "bytea": st.binary(max_size=8),
    "timestamptz": times,
}


@pytest.fixture
def connection(database: Database) -> Any:
    with connect(database.superuser_url.get_secret_value(), options="-c timezone=UTC", autocommit=True) as opened:
        yield opened


@pytest.mark.parametrize("kind", sorted(VALUES))
def test_every_value_survives(connection: Connection[TupleRow], kind: str) -> None:
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(values=st.lists(VALUES[kind] | st.none() if kind != "bigint" else VALUES[kind], min_size=1, max_size=5))
    def survives(values: list[Any]) -> None:
        row = connection.execute(f"SELECT %s::{kind}[]".encode(), [array(values)]).fetchone()
        assert row == (values,)

    survives()


def test_times_of_other_zones_are_the_same_moment(connection: Connection[TupleRow]) -> None:
    moment = datetime(2026, 7, 1, 12, tzinfo=UTC) + timedelta(microseconds=1)
    row = connection.execute("SELECT %s::timestamptz[]", [array([moment])]).fetchone()
    assert row == ([moment],)
