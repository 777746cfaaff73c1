"""Laws of tracing in metering: a span per traced use, once it is committed; the ledger is told the same for ever."""

from pathlib import Path
from typing import Final

import pytest

from tests.integration.metering.driving import Driver
from tests.traces import named, spans_in, traced
from tests.unit.metering.building import event

pytestmark = pytest.mark.anyio

TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT: Final = "00f067aa0ba902b7"
SAMPLED: Final = f"00-{TRACE}-{PARENT}-01"
OTHERWISE: Final = f"00-{TRACE[::-1]}-{PARENT}-01"


async def test_a_redelivered_event_never_yields_another_bundle_whatever_its_trace(
    driver: Driver, tmp_path: Path
) -> None:
    file = tmp_path / "traces.jsonl"
    with traced(file):
        async with driver.running():
            await driver.open("acme-1")
            await driver.until_open(["acme-1"])
            await driver.publish([event(1, traceparent=SAMPLED)])
            await driver.until_counted(new=1, charged=1)
            before = await driver.rows("SELECT payload FROM outbox")
            for again in (SAMPLED, OTHERWISE, None):
                await driver.publish([event(1, traceparent=again)])
            await driver.until_counted(new=1, charged=1, duplicate=3)
            assert await driver.rows("SELECT payload FROM outbox") == before
        (line,) = (await driver.charged()).values()
    charged, repeat, otherwise = named(spans_in(file), "meter")
    assert (charged["trace_id"], charged["parent_id"]) == (TRACE, PARENT)
    assert charged["attributes"]["scrip.outcome"] == "charged"
    assert charged["attributes"]["scrip.bundle"] == 1
    assert line.traceparent == f"00-{TRACE}-{charged['span_id']}-01"
    assert [each["attributes"]["scrip.outcome"] for each in (repeat, otherwise)] == ["repeat", "repeat"]


async def test_use_of_an_account_that_is_not_open_is_traced_as_set_aside_and_charged_later(
    driver: Driver, tmp_path: Path
) -> None:
    with traced(tmp_path / "traces.jsonl"):
        async with driver.running():
            await driver.publish([event(1, traceparent=SAMPLED)])
            await driver.until_counted(new=1, unattributed=1)
            await driver.open("acme-1")
            await driver.until_counted(new=1, charged=1)
        (line,) = (await driver.charged()).values()
    (span,) = named(spans_in(tmp_path / "traces.jsonl"), "meter")
    assert span["attributes"]["scrip.outcome"] == "set_aside"
    # Its trace is over by then.
    assert line.traceparent is None
