"""Laws of a traced use: its line says under which span it was priced, and nothing else of it changes."""

from pathlib import Path
from typing import Final

import pytest

from contracts.metering import ChargeLine
from services.metering.handlers import Batch
from tests.integration.metering.driving import Json, batch_of
from tests.traces import traced
from tests.unit.metering.building import event, price_book

TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
SAMPLED: Final = f"00-{TRACE}-00f067aa0ba902b7-01"


def batch(*events: Json) -> Batch:
    return batch_of(events, price_book=price_book())


def lines(of: Batch) -> list[ChargeLine]:
    return [ChargeLine.model_validate_json(bytes(each.line)) for each in of.priced.values()]


def test_a_traced_use_is_charged_under_the_span_that_metered_it(tmp_path: Path) -> None:
    with traced(tmp_path / "traces.jsonl"):
        found = batch(event(1), event(2, traceparent=SAMPLED))
    plain, line = lines(found)
    (span,) = found.spans.values()
    assert plain.traceparent is None
    assert line.traceparent == span.traceparent
    assert line.traceparent.startswith(f"00-{TRACE}-")
    assert line.traceparent != SAMPLED


def test_of_repeats_in_a_batch_the_first_is_traced(tmp_path: Path) -> None:
    with traced(tmp_path / "traces.jsonl"):
        found = batch(*[event(1, traceparent=SAMPLED)] * 3)
    assert len(found.spans) == 1
    assert len(found.usages) == 3


@pytest.mark.parametrize("traceparent", ["nonsense", SAMPLED[:-1] + "0", "", 7, True])
def test_what_is_not_sampled_or_malformed_is_charged_as_if_it_said_nothing(
    traceparent: str | int, tmp_path: Path
) -> None:
    plain = batch(event(1))
    with traced(tmp_path / "traces.jsonl"):
        found = batch(event(1, traceparent=traceparent))
    assert not found.letters
    assert not found.spans
    assert found.priced == plain.priced


def test_with_tracing_off_a_bundles_bytes_are_those_of_an_untraced_one() -> None:
    plain, said = batch(event(1)), batch(event(1, traceparent=SAMPLED))
    assert said.priced == plain.priced
    assert [each.body_hash for each in said.usages] == [each.body_hash for each in plain.usages]
    assert not said.spans
