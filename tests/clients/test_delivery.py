"""What an answer means for a batch, and how long is waited: laws of a pure function."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrip_client.delivery import (
    RETRY_SECONDS_MAX,
    BadBatch,
    BadEvents,
    Delivered,
    Later,
    NoGzip,
    Outcome,
    outcome,
    retry_seconds,
)

NOW: Final = datetime(2026, 3, 14, 12, tzinfo=UTC)
PROBLEM: Final = {"content-type": "application/problem+json"}


def answered(
    status: int,
    said: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    events: int = 3,
    gzipped: bool = False,
) -> Outcome:
    told = PROBLEM if said is not None else {}
    body = b"" if said is None else json.dumps(said).encode()
    return outcome(status, {**told, **(headers or {})}, body, events=events, gzipped=gzipped, now=NOW)


@given(status=st.integers(200, 299))
def test_a_success_is_delivered(status: int) -> None:
    assert answered(status) == Delivered()


@given(status=st.integers(300, 599), events=st.integers(1, 3), gzipped=st.booleans())
def test_an_answer_that_is_not_meterings_never_sets_an_event_apart(status: int, events: int, gzipped: bool) -> None:
    """A proxy may say anything; only "too large" of several events is worth trying with fewer."""
    found = outcome(status, {"content-type": "text/html"}, b"<html>", events=events, gzipped=gzipped, now=NOW)
    assert isinstance(found, Later | NoGzip) or (status == 413 and events > 1)


def test_bad_events_are_named_by_their_place() -> None:
    errors = [
        {"index": 2, "field": "type", "detail": "unknown"},
        {"index": 0, "field": "id", "detail": "missing"},
        {"index": 2, "field": "data", "detail": "not an object"},
    ]
    assert answered(400, {"code": "invalid_events", "errors": errors}) == BadEvents(
        {
            2: [{"field": "type", "detail": "unknown"}, {"field": "data", "detail": "not an object"}],
            0: [{"field": "id", "detail": "missing"}],
        }
    )


@pytest.mark.parametrize("errors", [None, [], [{"index": 3}], [{"index": -1}], [{"index": "0"}], ["x"], "x"])
def test_a_verdict_that_names_no_event_of_the_batch_is_on_all_of_it(errors: Any) -> None:
    assert isinstance(answered(400, {"code": "invalid_events", "errors": errors}), BadBatch)


def test_a_compressed_body_that_is_not_understood_is_sent_plain_before_anything_is_judged() -> None:
    for status, code in ((400, "not_a_batch"), (415, "unsupported_media_type")):
        assert answered(status, {"code": code}, gzipped=True) == NoGzip()
        assert isinstance(answered(status, {"code": code}), BadBatch | Later)
    assert isinstance(answered(400, {"code": "invalid_events", "errors": [{"index": 0}]}, gzipped=True), BadEvents)


@pytest.mark.parametrize("status", [401, 403, 404, 405, 301])
def test_a_wrong_address_or_token_loses_nothing(status: int) -> None:
    assert isinstance(answered(status, {"code": "unauthenticated"}), Later)


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("7", 7.0),
        ((NOW + timedelta(seconds=90)).strftime("%a, %d %b %Y %H:%M:%S GMT"), 90.0),
        ((NOW - timedelta(seconds=90)).strftime("%a, %d %b %Y %H:%M:%S GMT"), 0.0),
        ("soon", 0.0),
        ("99999999", 3600.0),
    ],
)
def test_retry_after_is_heeded(told: str, seconds: float) -> None:
    for status in (429, 503):
        found = answered(status, headers={"retry-after": told})
        assert isinstance(found, Later)
        assert found.seconds == seconds


@given(failures=st.integers(1, 10_000), at_least=st.floats(0, 3600), chance=st.floats(0, 1))
def test_the_pause_grows_is_bounded_and_never_shorter_than_asked(failures: int, at_least: float, chance: float) -> None:
    pause = retry_seconds(failures, at_least=at_least, chance=chance)
    assert pause >= at_least
    assert pause <= max(RETRY_SECONDS_MAX, at_least * 1.1)
    assert retry_seconds(failures + 1, at_least=at_least, chance=chance) >= pause


def test_those_who_failed_together_do_not_come_back_together() -> None:
    assert len({retry_seconds(5, at_least=0, chance=place / 10) for place in range(10)}) == 10
    assert len({retry_seconds(1, at_least=60, chance=place / 10) for place in range(10)}) == 10
