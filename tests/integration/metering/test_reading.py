"""Questions about everybody's use are read by several of Postgres' processes, and summed up by them."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from psycopg import AsyncConnection, sql

from services.metering.domain.meters import Aggregation, Meter, MeterQuestion
from services.metering.queries.meters import ask_meter
from services.metering.queries.usage import Selection, calls_after, usage_after
from tests.conftest import Database

pytestmark = pytest.mark.anyio

SINCE = datetime(2026, 11, 1, tzinfo=UTC)
UNTIL = SINCE + timedelta(days=30)
EVERYBODY = Selection(account=None, since=SINCE, until=UNTIL)


class Explained(AsyncConnection[Any]):
    """A connection that also asks how what it is asked is found out."""

    plans: list[str]

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        if isinstance(query, sql.Composed):
            cursor = await super().execute(sql.SQL("EXPLAIN ") + query, params)
            self.plans.append("\n".join(line for (line,) in await cursor.fetchall()))
        return await super().execute(query, params, **options)


USES = b"""
INSERT INTO usage_log (partition, occurred_at, source, event_id, account, type, recorded_at, data,
                       price_version, line_items, amounts, bundle_number, line_number)
SELECT n % 64, '2026-11-01'::timestamptz + n * interval '8 minutes', 'test', n::text, 'acme-' || n % 50,
       'scrip.model.used.v1', now(), '{"model": "a", "input_tokens": 7}',
       'v', '[]', jsonb_build_array(jsonb_build_object('unit', 'usd', 'amount', n::text)), n, 1
FROM generate_series(1, 5000) AS n
"""


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[Explained]:
    async with await AsyncConnection.connect(database.url("metering_owner").get_secret_value()) as owner:
        await owner.execute(USES)
        await owner.execute("ANALYZE usage_log")
    url = database.url("metering").get_secret_value()
    async with await Explained.connect(url, autocommit=True) as connection:
        connection.plans = []
        # As if there was much.
        await connection.execute(
            "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0"
        )
        yield connection


def is_shared(plan: str) -> bool:
    """Whether several processes read and sum up, and not only read for one that does."""
    return "Parallel" in plan and "Partial" in plan


@pytest.mark.parametrize("aggregation", ["COUNT", "SUM", "MIN", "MAX", "AVG"])
async def test_a_meter_is_summed_up_by_several_processes(connection: Explained, aggregation: Aggregation) -> None:
    meter = Meter(
        slug="tokens",
        aggregation=aggregation,
        event_type="scrip.model.used.v1",
        value=None if aggregation == "COUNT" else ("input_tokens",),
        group_by={"model": ("model",)},
    )

    await ask_meter(
        connection, meter, MeterQuestion(since=SINCE, until=UNTIL, size="DAY", zone=UTC, group_by=["model"])
    )

    assert [is_shared(plan) for plan in connection.plans] == [True], connection.plans


async def test_use_is_summed_up_by_several_processes(connection: Explained) -> None:
    await usage_after(connection, EVERYBODY, ["model"], None, limit=10)

    assert is_shared(connection.plans[0]), connection.plans


async def test_calls_are_read_by_several_processes(connection: Explained) -> None:
    await calls_after(connection, EVERYBODY, ["endpoint", "status"], None, limit=10)

    assert ["Parallel" in plan for plan in connection.plans] == [True], connection.plans
