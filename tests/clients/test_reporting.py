"""Reporting: accepted means kept until delivered or refused, whatever metering answers; no caller waits for it."""

import asyncio
import gzip
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scrip_client import (
    AsyncScrip,
    ClientClosed,
    InvalidEvent,
    NotDelivered,
    RefusedEvent,
    Scrip,
    SpoolFailed,
    SpoolFull,
    UsageEvent,
    model_used,
    recorder,
)
from scrip_client.spool import Spool
from tests.clients.stand_in import BAD, Fate, Metering, problem, refused_connection
from tests.eventually import eventually

URL: Final = "http://metering"


def scrip(metering: Metering, spool: Path | None, **more: Any) -> Scrip:
    return Scrip(URL, source="demo", token="t", spool=spool, transport=metering.transport, **more)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "spool.sqlite"


@contextmanager
def hurried() -> Iterator[None]:
    """Pauses between tries are short."""
    with patch.object(recorder, "retry_seconds", lambda *_, **__: 0.001):
        yield


def until(condition: Any, *, seconds: float = 5.0) -> None:
    asyncio.run(eventually(condition, seconds=seconds))


def test_an_event_arrives_as_it_was_reported(file: Path) -> None:
    metering = Metering()
    at = datetime(2026, 3, 14, 12, tzinfo=timezone(timedelta(hours=2)))
    with scrip(metering, file) as client:
        event = UsageEvent(
            account="acme/ana",
            type="pages.printed",
            data={"pages": 3, "who": "Ünsal"},
            id="use-1",
            time=at,
            attributes={"traceparent": "00-1-2-01"},
        )
        assert client.report(event) == "use-1"
        assert client.flush() == 0
    assert metering.taken["use-1"] == {
        "specversion": "1.0",
        "source": "demo",
        "id": "use-1",
        "type": "pages.printed",
        "subject": "acme/ana",
        "time": "2026-03-14T10:00:00.000000Z",
        "traceparent": "00-1-2-01",
        "data": {"pages": 3, "who": "Ünsal"},
    }
    (request,) = metering.requests
    assert request.url == f"{URL}/api/v1/events"
    assert request.headers["authorization"] == "Bearer t"
    assert request.headers["content-type"] == "application/cloudevents-batch+json"


def test_an_event_has_the_id_and_the_time_of_its_report_however_late_it_arrives(file: Path) -> None:
    metering = Metering([refused_connection] * 3)
    before = datetime.now(UTC)
    with hurried(), scrip(metering, file) as client:
        first = client.record("acme", "pages.printed", {"pages": 1})
        after = datetime.now(UTC)
        second = client.report(model_used(account="acme", provider="p", model="m", input_tokens=1, output_tokens=2))
        client.flush()
    assert sorted(metering.taken) == sorted([first, second])
    assert before <= datetime.fromisoformat(metering.taken[first]["time"]) <= after
    assert metering.taken[second]["data"] == {"provider": "p", "model": "m", "input_tokens": 1, "output_tokens": 2}


def test_a_cloud_event_may_be_reported_as_it_is(file: Path) -> None:
    metering = Metering()
    with scrip(metering, file) as client:
        client.report({"id": "1", "type": "t", "subject": "acme", "time": "2026-03-14T12:00:00+02:00", "x": 1})
    assert metering.taken["1"] == {
        "specversion": "1.0",
        "source": "demo",
        "id": "1",
        "type": "t",
        "subject": "acme",
        "time": "2026-03-14T12:00:00+02:00",
        "x": 1,
    }


@pytest.mark.parametrize(
    "event",
    [
        {"type": "t"},
        {"subject": "acme"},
        {"subject": "", "type": "t"},
        {"subject": "acme", "type": 1},
        {"subject": "acme", "type": "t", "data": [1]},
        {"subject": "acme", "type": "t", "data": {"x": float("nan")}},
        {"subject": "acme", "type": "t", "data": {"x": object()}},
        {"subject": "acme", "type": "t", "data": {"x": "y" * 70_000}},
        {"subject": "acme", "type": "t", "data": {"x": "\ud800"}},
        {"subject": "acme", "type": "t", "time": datetime(2026, 1, 1)},  # noqa: DTZ001 - that is what is wrong
        UsageEvent(account="acme", type="t", data=[1]),  # type: ignore[arg-type]  # that is what is wrong
        None,
        "acme",
        [],
    ],
)
def test_what_is_no_event_is_told_at_once(file: Path, event: Any) -> None:
    metering = Metering()
    with scrip(metering, file) as client:
        with pytest.raises(InvalidEvent):
            client.report(event)
        assert client.status().waiting == 0
    assert metering.requests == []


def test_a_durability_that_is_none_is_told_at_once(file: Path) -> None:
    for spool in (file, None):
        with pytest.raises(ValueError, match="durability"):
            scrip(Metering(), spool, durability="dsk")


def test_no_caller_waits_for_metering(file: Path) -> None:
    answered = threading.Event()

    def slow() -> httpx2.Response:
        answered.wait(60)
        return httpx2.Response(503)

    with scrip(Metering([slow]), file) as client:
        started = time.monotonic()
        for number in range(100):
            client.record("acme", "t", {"n": number})
        assert time.monotonic() - started < 30
        assert client.status().waiting == 100
        answered.set()
        assert client.flush(10) == 0


def test_what_is_accepted_on_disk_is_there_when_report_returns(file: Path) -> None:
    with hurried(), scrip(Metering([refused_connection] * 1000), file) as client:
        event_id = client.record("acme", "t")
        other = Spool(file, bytes_max=1)
        ((_, body),) = other.oldest(events_max=10, bytes_max=1 << 20)
        other.close()
        assert json.loads(body)["id"] == event_id
        client.close(0)


def test_what_is_left_at_the_deadline_stays_and_the_next_process_delivers_it(file: Path) -> None:
    with patch.object(recorder, "retry_seconds", lambda *_, **__: 60.0):
        first = scrip(Metering([refused_connection] * 10), file)
        ids = {first.record("acme", "t") for _ in range(5)}
        started = time.monotonic()
        assert first.close(0.2) == 5
        assert time.monotonic() - started < 10
        assert first.close(0.2) == 0
    metering = Metering()
    with scrip(metering, file) as second:
        assert second.flush() == 0
    assert set(metering.taken) == ids
    assert metering.deliveries == 5


def test_a_closed_client_takes_nothing(file: Path) -> None:
    client = scrip(Metering(), file)
    client.close()
    with pytest.raises(ClientClosed):
        client.record("acme", "t")


def test_events_go_together(file: Path) -> None:
    all_wait = threading.Event()

    def refused_once_all_wait() -> Exception:
        assert all_wait.wait(60)
        return refused_connection()

    metering = Metering([refused_once_all_wait])
    with hurried(), scrip(metering, file) as client:
        client.record("acme", "t")
        threads = [threading.Thread(target=lambda: [client.record("acme", "t") for _ in range(125)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        all_wait.set()
        client.flush(10)
    assert len(metering.taken) == 1_001
    assert len(metering.requests) < 20


def test_bad_events_are_set_apart_and_the_good_ones_arrive(file: Path) -> None:
    metering = Metering([refused_connection])
    told: list[RefusedEvent] = []
    with hurried(), scrip(metering, file, on_refused=told.append) as client:
        for number in range(50):
            client.record("acme", BAD if number % 10 == 3 else "t", id=f"use-{number}")
        assert client.flush() == 0
        assert {json.loads(each.body)["id"] for each in told} == {f"use-{number}" for number in (3, 13, 23, 33, 43)}
        assert told[0].problems == [{"field": "type", "detail": "unknown"}]
        status = client.status()
        assert (status.waiting, status.refused) == (0, 5)
        kept = client.refused(limit=3)
        kept = [*kept, *client.refused(limit=3, after=kept[-1].number)]
        assert [each.number for each in kept] == sorted(each.number for each in told)
        client.discard([each.number for each in kept[:4]])
        assert client.status().refused == 1
        client.send_again([kept[4].number])
        until(lambda: len(told) == 6)
    assert len(metering.taken) == 45


def test_a_callback_that_fails_stops_nothing(file: Path) -> None:
    metering = Metering()

    def fail(_: RefusedEvent) -> None:
        raise RuntimeError("somebody else's")

    with scrip(metering, file, on_refused=fail) as client:
        client.record("acme", BAD)
        client.record("acme", "t", id="good")
        assert client.flush() == 0
    assert set(metering.taken) == {"good"}


def test_a_batch_that_is_refused_without_saying_why_is_halved_until_the_bad_one_is_alone(file: Path) -> None:
    metering = Metering([refused_connection])
    look_at = metering._look_at

    def vague(request: httpx2.Request) -> httpx2.Response:
        answer = look_at(request)
        return problem(422, "invalid_request") if answer.status_code == 400 else answer

    with hurried(), patch.object(metering, "_look_at", vague), scrip(metering, file) as client:
        for number in range(33):
            client.record("acme", BAD if number == 20 else "t", id=f"use-{number}")
        assert client.flush() == 0
        (apart,) = client.refused()
        assert json.loads(apart.body)["id"] == "use-20"
    assert len(metering.taken) == 32


def test_bodies_are_compressed_where_that_is_understood(file: Path) -> None:
    metering = Metering()
    with scrip(metering, file) as client:
        client.record("acme", "t", {"text": "x" * 5_000}, id="long")
        client.flush()
    (request,) = metering.requests
    assert request.headers["content-encoding"] == "gzip"
    assert len(request.content) < 1_000
    assert json.loads(gzip.decompress(request.content))[0]["id"] == "long"


def test_events_go_plain_from_then_on_where_gzip_is_not_read(file: Path) -> None:
    metering = Metering(reads_gzip=False)
    with scrip(metering, file) as client:
        for name in ("first", "second"):
            client.record("acme", "t", {"text": "x" * 5_000}, id=name)
            assert client.flush() == 0
        assert client.refused() == []
    assert set(metering.taken) == {"first", "second"}
    assert ["content-encoding" in request.headers for request in metering.requests] == [True, False, False]


def test_a_full_spool_says_so_and_takes_events_again_once_others_are_delivered(file: Path) -> None:
    gate = threading.Event()
    metering = Metering([lambda: refused_connection() if gate.is_set() else _wait(gate)])
    with hurried(), scrip(metering, file, spool_bytes_max=200_000) as client:
        accepted: list[str] = []

        def fill() -> None:
            while True:
                accepted.append(client.record("acme", "t", {"text": "x" * 10_000}))

        with pytest.raises(SpoolFull, match=r"the spool is full: \d+ events wait and 0 are refused"):
            fill()
        assert len(accepted) > 10
        assert client.is_full()
        gate.set()
        assert client.flush() == 0
        assert not client.is_full()
        accepted.append(client.record("acme", "t"))
    assert set(metering.taken) == set(accepted)


def _wait(gate: threading.Event) -> Exception:
    gate.wait(10)
    return refused_connection()


def test_a_disk_that_fails_is_told_to_whoever_reports(file: Path) -> None:
    with scrip(Metering(), file) as client:
        with (
            patch.object(client.recorder._spool, "put", side_effect=sqlite3.OperationalError("disk I/O error")),
            pytest.raises(SpoolFailed, match="disk I/O error"),
        ):
            client.record("acme", "t")
        client.record("acme", "t", id="after")


def test_a_disk_that_hangs_is_not_waited_for_for_ever(file: Path) -> None:
    gate = threading.Event()
    client = scrip(Metering(), file, accept_seconds=0.2)
    put = client.recorder._spool.put

    def hang(bodies: Sequence[bytes]) -> int:
        gate.wait(10)
        return put(bodies)

    with patch.object(client.recorder._spool, "put", hang):
        with pytest.raises(SpoolFailed, match=r"not on disk within 0\.2 s"):
            client.record("acme", "t")
        gate.set()
        client.close()


def test_in_memory_a_report_waits_for_nothing_and_a_full_buffer_says_so(file: Path) -> None:
    gate = threading.Event()
    metering = Metering()
    client = scrip(metering, file, durability="memory", buffer_events_max=10)
    put = client.recorder._spool.put

    def hang(bodies: Sequence[bytes]) -> int:
        gate.wait(10)
        return put(bodies)

    with patch.object(client.recorder._spool, "put", hang):
        ids = {client.record("acme", "t") for _ in range(10)}
        with pytest.raises(SpoolFull, match="wait in memory"):
            client.record("acme", "t")
        gate.set()
        client.close()
    assert set(metering.taken) == ids


def test_what_was_accepted_in_memory_outlives_a_full_spool_and_a_failing_disk(file: Path) -> None:
    metering = Metering()
    with scrip(metering, file, durability="memory", spool_bytes_max=1_000) as client:
        put = client.recorder._spool.put
        failures = iter([sqlite3.OperationalError("disk I/O error"), None, None])

        def failing(bodies: Sequence[bytes]) -> int:
            if error := next(failures, None):
                raise error
            return put(bodies)

        with patch.object(client.recorder._spool, "put", failing):
            ids = [client.record("acme", "t", {"text": "x" * 300}) for _ in range(10)]
            assert client.flush(10) == 0
    assert sorted(metering.taken) == sorted(ids)


def test_without_a_file_what_is_not_delivered_is_handed_back(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="durability"):
        Scrip(URL, source="demo", token="t", spool=None)
    client = scrip(Metering([refused_connection] * 100), None, durability="memory")
    ids = [client.record("acme", "t") for _ in range(3)]
    with pytest.raises(NotDelivered) as found:
        client.close(0.1)
    assert [json.loads(body)["id"] for body in found.value.bodies] == ids
    metering = Metering()
    with scrip(metering, None, durability="memory") as client:
        again = [client.report(json.loads(body)) for body in found.value.bodies]
    assert again == ids
    assert set(metering.taken) == set(ids)


def test_a_wrong_token_loses_nothing_and_is_told(file: Path) -> None:
    metering = Metering([lambda: problem(401, "unauthenticated")] * 2)
    with hurried(), scrip(metering, file) as client:
        client.record("acme", "t", id="kept")
        until(lambda: client.status().failures > 0 or "kept" in metering.taken)
        assert client.flush() == 0
        assert client.status().problem is None
    assert set(metering.taken) == {"kept"}


def test_metering_is_left_alone_for_as_long_as_it_asks(file: Path) -> None:
    metering = Metering([lambda: problem(429, "slow_down", headers={"retry-after": "1"})])
    with scrip(metering, file) as client:
        client.record("acme", "t")
        until(lambda: len(metering.requests) == 1)
        started = time.monotonic()
        assert client.status().problem == "429 slow_down"
        assert client.flush(10) == 0
        assert time.monotonic() - started > 0.9


def test_who_closes_does_not_wait_out_a_pause_between_tries(file: Path) -> None:
    metering = Metering([refused_connection, lambda: problem(503, "stream_away")])
    pauses = iter([60.0])
    with patch.object(recorder, "retry_seconds", lambda *_, **__: next(pauses, 0.01)):
        client = scrip(metering, file)
        client.record("acme", "t", id="kept")
        until(lambda: client.status().failures == 1)
        started = time.monotonic()
        assert client.close(5) == 0
        assert time.monotonic() - started < 4
    assert set(metering.taken) == {"kept"}


def test_pauses_grow_anew_for_whoever_waits(file: Path) -> None:
    metering = Metering([lambda: problem(503, "stream_away")] * 4)
    asked: list[int] = []

    def pause(failures: int, **_: float) -> float:
        asked.append(failures)
        return 0.001 if len(asked) < 3 else 60.0 if len(asked) == 3 else 0.001

    with patch.object(recorder, "retry_seconds", pause), scrip(metering, file) as client:
        client.record("acme", "t")
        until(lambda: client.status().failures == 3)
        assert client.flush(5) == 0
    assert asked == [1, 2, 3, 1]


FATES: Final[Sequence[Fate]] = (
    None,
    refused_connection,
    lambda: httpx2.ReadTimeout("slow"),
    lambda: problem(503, "stream_away"),
    lambda: problem(429, "slow_down"),
    lambda: problem(401, "unauthenticated"),
    lambda: problem(500, "fault"),
    lambda: httpx2.Response(502, html="<html>"),
    lambda: httpx2.Response(400, html="<html>"),
    lambda: httpx2.Response(413, html="<html>"),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    fates=st.lists(st.sampled_from(FATES), max_size=12),
    kinds=st.lists(st.sampled_from(["t", "t", "t", BAD]), min_size=1, max_size=30),
    lost=st.integers(0, 3),
    reads_gzip=st.booleans(),
)
def test_whatever_is_answered_every_accepted_event_is_taken_or_kept_as_refused(
    fates: list[Fate], kinds: list[str], lost: int, reads_gzip: bool
) -> None:
    metering = Metering(fates, reads_gzip=reads_gzip)
    metering.loses_answers = lost
    with hurried(), scrip(metering, None, durability="memory") as client:
        ids = {client.record("acme", kind, {"text": "x" * 400}): kind for kind in kinds}
        assert client.flush(20) == 0
        refused = {json.loads(each.body)["id"] for each in client.refused()}
    assert set(metering.taken) == {name for name, kind in ids.items() if kind != BAD}
    assert refused == {name for name, kind in ids.items() if kind == BAD}


@pytest.mark.anyio
async def test_the_async_client_accepts_alike_and_stalls_nobody(file: Path) -> None:
    metering = Metering()
    async with AsyncScrip(URL, source="demo", token="t", spool=file, transport=metering.transport) as client:
        put = client.recorder._spool.put

        def slow(bodies: Sequence[bytes]) -> int:
            time.sleep(1.5)
            return put(bodies)

        with patch.object(client.recorder._spool, "put", slow):
            reports = asyncio.gather(*(client.record("acme", "t") for _ in range(200)))
            longest = 0.0
            while not reports.done():
                before = time.monotonic()
                await asyncio.sleep(0.005)
                longest = max(longest, time.monotonic() - before)
            ids = await reports
        assert longest < 1
        assert await client.flush() == 0
    assert set(metering.taken) == set(ids)
    with pytest.raises(ClientClosed):
        await client.record("acme", "t")


@pytest.mark.anyio
async def test_a_report_that_is_cancelled_harms_no_other(file: Path) -> None:
    metering = Metering()
    async with AsyncScrip(URL, source="demo", token="t", spool=file, transport=metering.transport) as client:
        tasks = [asyncio.ensure_future(client.record("acme", "t", id=f"use-{number}")) for number in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert await client.flush() == 0
    accepted = {each for each in found if isinstance(each, str)}
    assert {f"use-{number}" for number in range(1, 20, 2)} <= accepted <= set(metering.taken)
