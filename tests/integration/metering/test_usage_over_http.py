"""Usage over HTTP: 204 means on disk, a refusal means nothing was taken, and sending again is always safe."""

import asyncio
import gzip
import json
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import quote

import httpx2
import pytest
from pydantic import SecretStr

from contracts.envelope import SERVER_FILLED, events_of
from contracts.streams import USAGE
from infra.servers import EmbeddedNats
from services.kit.database import Writer
from services.kit.publish import PublishUnconfirmed, publish_batch
from services.metering import handlers, translate
from services.metering.handlers import Known, Reading
from services.metering.routes import events as routes
from tests.conftest import NatsAccount, refresh_streams
from tests.eventually import eventually
from tests.integration.metering.driving import Driver, Json, delivery, stored
from tests.unit.metering.bad_reports import BAD
from tests.unit.metering.building import NOON, body, event, price_book

pytestmark = pytest.mark.anyio

SINGLE: Final = "application/cloudevents+json"
BATCH: Final = "application/cloudevents-batch+json"
PLAIN: Final = "application/json"


async def report(
    http: httpx2.AsyncClient,
    driver: Driver,
    reported: Json | Sequence[Json] | bytes,
    *,
    content_type: str = PLAIN,
    headers: Mapping[str, str] | None = None,
) -> httpx2.Response:
    content = reported if isinstance(reported, bytes) else json.dumps(reported).encode()
    return await http.post(
        "/api/v1/events",
        content=content,
        headers={**(driver.headers() if headers is None else headers), "Content-Type": content_type},
    )


async def open_all(driver: Driver) -> None:
    accounts = [f"acme-{number}" for number in range(7)]
    await driver.open(*accounts)
    await driver.until_open(accounts)


FORMS: Final[Sequence[tuple[str, Any]]] = (
    (SINGLE, event(0)),
    (f"{SINGLE}; charset=UTF-8", event(1)),
    (BATCH, [event(2), event(3)]),
    (PLAIN, event(4)),
    (PLAIN, [event(5), event(6)]),
)


async def test_every_form_is_taken_and_charged(driver: Driver) -> None:
    async with driver.running() as http:
        await open_all(driver)
        for content_type, reported in FORMS:
            answer = await report(http, driver, reported, content_type=content_type)
            assert (answer.status_code, answer.content) == (204, b"")
        await driver.until_counted(new=7, charged=7)
        (counters,) = (await http.get("/api/v1/ingest?source=demo", headers=driver.headers("operator"))).json()[
            "sources"
        ]
        assert counters == {
            "source": "demo",
            "new": 7,
            "duplicate": 0,
            "conflicting": 0,
            "dead": 0,
            "unattributed": 0,
            "unpriced": 0,
            "charged": 7,
            "unmapped": 0,
            "rerouted": 0,
            "voided": 0,
        }


async def test_what_was_acknowledged_is_on_disk(driver: Driver) -> None:
    """A thousand at once, the largest batch; nobody reads them yet."""
    async with driver.running(driver.settings.model_copy(update={"batch_size_max": 1})) as http:
        before = time.monotonic()
        answer = await report(http, driver, [event(number) for number in range(1_000)], content_type=BATCH)
        assert answer.status_code == 204
        assert time.monotonic() - before < 5
        on_disk = await events_on_disk(driver)
        assert {json.loads(each)["id"] for each in on_disk} == {f"use-{number}" for number in range(1_000)}
        assert len(on_disk) == 1_000
        # The same request again: nothing more.
        assert (
            await report(http, driver, [event(number) for number in range(1_000)], content_type=BATCH)
        ).status_code == 204
        assert len(await events_on_disk(driver)) == 1_000


async def events_on_disk(driver: Driver) -> list[bytes]:
    """The events in the stream."""
    jetstream = driver.operator_nats.jetstream(timeout=5)
    state = (await jetstream.stream_info(USAGE)).state
    messages = [await jetstream.get_msg(USAGE, seq) for seq in range(state.first_seq, state.last_seq + 1)]
    return [event for message in messages for event in events_of(message.data or b"")]


async def test_all_problems_of_all_bad_events_are_named_and_nothing_is_taken(driver: Driver) -> None:
    readable = [(payload, place) for _, payload, place in BAD if place]
    async with driver.running() as http:
        bodies = [body(1), *(payload for payload, _ in readable), body(2)]
        answer = await report(http, driver, b"[" + b",".join(bodies) + b"]", content_type=BATCH)
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["code"] == "invalid_events"
        named = {(each["index"], each["field"]) for each in problem["errors"]}
        assert {(index, place) for index, (_, place) in enumerate(readable, start=1)} <= named
        assert {index for index, _ in named} == set(range(1, len(readable) + 1))
        assert await stored(driver.operator_nats, USAGE) == 0


async def test_every_bad_event_is_refused_alone(driver: Driver) -> None:
    async with driver.running() as http:
        for name, payload, place in BAD:
            answer = await report(http, driver, payload, content_type=SINGLE)
            assert answer.status_code == 400, name
            assert place in {each["field"] for each in answer.json()["errors"]}, name
        assert await stored(driver.operator_nats, USAGE) == 0


NO_REPORTS: Final[Sequence[tuple[bytes, str, int, str]]] = (
    (b"[]", PLAIN, 400, "empty_batch"),
    (b"[]", BATCH, 400, "empty_batch"),
    (b"{}", BATCH, 400, "not_a_batch"),
    (b"[{},", BATCH, 400, "not_a_batch"),
    (b"[" * 50_000, BATCH, 400, "not_a_batch"),
    (b"", PLAIN, 400, "invalid_events"),
    (json.dumps([event(1)]).encode(), SINGLE, 400, "invalid_events"),
    (json.dumps([event(number) for number in range(1_001)]).encode(), BATCH, 413, "batch_too_large"),
    (b" " * (5 << 20), PLAIN, 413, "body_too_large"),
    (body(1), "text/plain", 415, "unsupported_media_type"),
    (body(1), "", 415, "unsupported_media_type"),
    (body(1), "application/cloudevents+avro", 415, "unsupported_media_type"),
)


async def test_what_is_no_report_is_refused_clearly(driver: Driver) -> None:
    async with driver.running() as http:
        for content, content_type, status, code in NO_REPORTS:
            answer = await report(http, driver, content, content_type=content_type)
            assert (answer.status_code, answer.json()["code"]) == (status, code), content[:20]
        assert await stored(driver.operator_nats, USAGE) == 0


async def test_only_who_may_report_use_reports_its_own(driver: Driver) -> None:
    async with driver.running() as http:
        for headers, status in (({}, 401), ({"Authorization": "Bearer guessed"}, 401)):
            assert (await report(http, driver, event(1), headers=headers)).status_code == status
        # The operator may do everything but speak for others.
        answer = await report(http, driver, event(1), headers=driver.headers("operator"))
        assert answer.status_code == 400
        assert [each["field"] for each in answer.json()["errors"]] == ["source"]
        assert (
            await report(http, driver, event(1, source="operator"), headers=driver.headers("operator"))
        ).status_code == 204
        for path in ("/api/v1/ingest", "/api/v1/conflicts", "/api/v1/set-aside"):
            assert (await http.get(path, headers=driver.headers("demo"))).status_code == 403
            assert (await http.get(path)).status_code == 401


async def test_a_batch_may_hold_the_same_event_twice_in_any_form(driver: Driver) -> None:
    async with driver.running() as http:
        await open_all(driver)
        twice = [event(1), dict(reversed(event(1).items())), event(2, time=None), event(2, time=None)]
        assert (await report(http, driver, twice)).status_code == 204
        await driver.until_counted(new=2, charged=2)


async def test_a_missing_time_is_filled_in_and_a_retry_is_still_a_repeat(driver: Driver) -> None:
    async with driver.running() as http:
        await open_all(driver)
        assert (await report(http, driver, event(1, time=None))).status_code == 204
        await driver.until_counted(new=1, charged=1)
        # Beyond the stream's window, too.
        await driver.publish([event(1, time="2026-01-01T00:00:00Z", scripfilled="time"), event(1, time=None)])
        assert (await report(http, driver, event(1, time=None))).status_code == 204
        await driver.until_counted(new=1, charged=1, duplicate=2)
        ((context,),) = await driver.rows("SELECT context FROM usage_log")
        assert context == {SERVER_FILLED: "time"}


async def test_a_report_whose_answer_was_lost_may_be_sent_again(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = 0

    async def losing(client: Any, *, stream: str, messages: Any) -> Any:
        nonlocal lost
        confirmed = await publish_batch(client, stream=stream, messages=messages)
        if lost == 0:
            lost += 1
            failed = dict.fromkeys(range(len(messages)), "no acknowledgement")
            raise PublishUnconfirmed(stream=stream, confirmed={}, failed=failed)
        return confirmed

    monkeypatch.setattr(routes, "publish_batch", losing)
    events = [event(number) for number in range(100)]
    async with driver.running() as http:
        await open_all(driver)
        first = await report(http, driver, events)
        assert (first.status_code, first.headers["retry-after"]) == (503, "2")
        assert "again" in first.json()["detail"]
        assert (await report(http, driver, events)).status_code == 204
        # In another order, and beyond the window of the stream.
        await driver.publish(reversed(events))
        await driver.until_counted(new=100, charged=100, duplicate=100)
        assert len(await driver.charged()) == 100


async def test_a_stream_that_is_away_is_said_so_and_nothing_is_lost(
    driver: Driver, own_nats: tuple[EmbeddedNats, NatsAccount]
) -> None:
    server, account = own_nats
    await refresh_streams(account)
    settings = driver.settings.model_copy(
        update={
            "nats_url": account.url,
            "nats_user": account.user("metering"),
            "nats_password": SecretStr(account.password("metering")),
        }
    )
    async with driver.running(settings) as http:
        server.stop()
        deadline = time.monotonic() + 2
        while (await http.get("/readyz")).status_code == 200:
            assert time.monotonic() < deadline, "still ready 2 seconds after NATS is gone"
            await asyncio.sleep(0.05)
        answer = await report(http, driver, [event(1), event(2)])
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        server.start()

        async def taken() -> bool:
            return (await report(http, driver, [event(1), event(2)])).status_code == 204

        await eventually(taken, seconds=15)
        await eventually(lambda: _set_aside(driver, 2), seconds=15)


async def _set_aside(driver: Driver, wanted: int) -> bool:
    return (await driver.counters())["unattributed"] == wanted


async def test_a_source_that_never_reported_has_zeros_and_a_wrong_cursor_is_refused(driver: Driver) -> None:
    async with driver.running() as http:
        headers = driver.headers("operator")
        (counters,) = (await http.get("/api/v1/ingest?source=nobody", headers=headers)).json()["sources"]
        assert set(counters.values()) == {"nobody", 0}
        assert (await http.get("/api/v1/ingest", headers=headers)).json() == {"sources": []}
        for after in ("x", "bnVsbA==", "💥", "WyJhIl0="):
            for path in ("conflicts", "set-aside"):
                answer = await http.get(f"/api/v1/{path}", params={"after": after}, headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (422, "invalid_cursor")
        assert (await http.get("/api/v1/conflicts?limit=0", headers=headers)).status_code == 422


async def test_conflicts_are_paged(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.publish([event(number) for number in range(5)])
        await driver.publish([event(number, data_input_tokens=1) for number in range(5)])
        await driver.until_counted(new=5, unattributed=5, conflicting=5)
        seen: list[str] = []
        query = "limit=2"
        for _ in range(3):
            page = (await http.get(f"/api/v1/conflicts?{query}", headers=driver.headers("operator"))).json()
            seen += [each["id"] for each in page["conflicts"]]
            query = f"limit=2&after={page['next_after']}"
        assert page["next_after"] is None
        assert sorted(seen) == [f"use-{number}" for number in range(5)]


# Compressed, in binary mode, within limits ----------------------------------------------------------------------------


async def test_a_compressed_report_is_taken(driver: Driver) -> None:
    gzipped = {**driver.headers(), "Content-Encoding": "gzip"}
    async with driver.running() as http:
        await open_all(driver)
        packed = gzip.compress(json.dumps([event(1), event(2)]).encode())
        assert (await report(http, driver, packed, headers=gzipped)).status_code == 204
        # Of several members, as gzip allows.
        half = len(body(3)) // 2
        packed = gzip.compress(body(3)[:half]) + gzip.compress(body(3)[half:])
        assert (await report(http, driver, packed, headers=gzipped)).status_code == 204
        answer = await report(http, driver, body(4), headers={**driver.headers(), "Content-Encoding": "identity"})
        assert answer.status_code == 204
        await driver.until_counted(new=4, charged=4)


_ZIPPED: Final = gzip.compress(body(1))
NOT_TAKEN: Final[Sequence[tuple[bytes, str, int, str]]] = (
    (gzip.compress(b" " * (4 << 20) + body(1)), "gzip", 413, "body_too_large"),
    (gzip.compress(b"") * 17, "gzip", 400, "not_gzip"),
    (_ZIPPED[:-1], "gzip", 400, "not_gzip"),
    (_ZIPPED + b"more", "gzip", 400, "not_gzip"),
    (body(1), "gzip", 400, "not_gzip"),
    (b"", "gzip", 400, "not_gzip"),
    (body(1), "br", 415, "unsupported_content_encoding"),
    (body(1), "gzip, gzip", 415, "unsupported_content_encoding"),
)


async def test_a_body_is_inflated_no_further_than_it_may_be_long(driver: Driver) -> None:
    bomb = gzip.compress(bytes(256 << 20))
    async with driver.running() as http:
        await report(http, driver, _ZIPPED, headers={**driver.headers(), "Content-Encoding": "gzip"})
        tracemalloc.start()
        try:
            answer = await report(http, driver, bomb, headers={**driver.headers(), "Content-Encoding": "gzip"})
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert peak_bytes < 8 * driver.settings.metering_body_bytes_max


async def test_what_cannot_be_inflated_is_refused_clearly(driver: Driver) -> None:
    async with driver.running() as http:
        for content, encoding, status, code in NOT_TAKEN:
            headers = {**driver.headers(), "Content-Encoding": encoding}
            answer = await report(http, driver, content, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (status, code), (content[:20], encoding)
            assert ("accept-encoding" in answer.headers) == (status == 415)
        assert await stored(driver.operator_nats, USAGE) == 0


async def test_a_report_in_binary_mode_is_the_same_as_in_structured_mode(driver: Driver) -> None:
    said = event(1, time=None, region="Zürich")
    data = json.dumps(said["data"]).encode()
    binary = {f"ce-{name}": quote(text) for name, text in said.items() if name != "data"}
    async with driver.running() as http:
        await open_all(driver)
        for _ in range(2):
            assert (await report(http, driver, data, headers={**driver.headers(), **binary})).status_code == 204
        assert (await report(http, driver, said)).status_code == 204
        await driver.publish([said])
        await driver.until_counted(new=1, charged=1, duplicate=1)
        empty = {**driver.headers(), **binary, "ce-id": "use-2", "ce-type": "heartbeat"}
        assert (await http.post("/api/v1/events", headers=empty)).status_code == 204
        await driver.until_counted(new=2, charged=1, unpriced=1, duplicate=1)
        wrong = {**driver.headers(), **binary, "ce-id": "%ff", "ce-data": "{}"}
        answer = await report(http, driver, data, headers=wrong)
        assert answer.status_code == 400
        assert {(each["index"], each["field"]) for each in answer.json()["errors"]} == {(0, "id"), (0, "data")}
        answer = await report(http, driver, b"<a/>", headers={**driver.headers(), **binary}, content_type="text/xml")
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


async def test_the_limits_are_settings_and_say_so(driver: Driver) -> None:
    settings = driver.settings.model_copy(
        update={
            "metering_body_bytes_max": 2_000,
            "metering_batch_events_max": 3,
            "metering_attributes_max": 1,
            "metering_age_days_max": 10,
        }
    )
    young = (datetime.now(UTC) - timedelta(days=9)).isoformat()
    old = (datetime.now(UTC) - timedelta(days=11)).isoformat()
    async with driver.running(settings) as http:
        assert (await report(http, driver, [event(number, time=young, region="eu") for number in range(3)])).is_success
        refused = [
            (await report(http, driver, [event(number, time=young) for number in range(4)]), 413, "more than 3"),
            (await report(http, driver, b" " * 2_001), 413, "more than 2000 bytes"),
            (await report(http, driver, event(5, time=young, a="1", b="2")), 400, "at most 1 extension attributes"),
            (await report(http, driver, event(6, time=old)), 400, "11 days ago, more than 10 days"),
        ]
        packed = gzip.compress(b" " * 2_001)
        answer = await report(http, driver, packed, headers={**driver.headers(), "Content-Encoding": "gzip"})
        refused.append((answer, 413, "the inflated body has more than 2000 bytes"))
        for answer, status, said in refused:
            assert answer.status_code == status
            assert said in answer.text
        await driver.until_counted(new=3, unattributed=3)


# What became of a report ----------------------------------------------------------------------------------------------


async def outcomes(http: httpx2.AsyncClient, driver: Driver, events: Sequence[Json]) -> list[str]:
    answer = await http.post("/api/v1/events?debug=true", json=events, headers=driver.headers())
    assert answer.status_code == 200, answer.text
    found = answer.json()["events"]
    assert [each["index"] for each in found] == list(range(len(events)))
    return [each["outcome"] for each in found]


async def test_whoever_asks_is_told_what_became_of_each_event(driver: Driver) -> None:
    async with driver.running() as http:
        await open_all(driver)
        assert await outcomes(http, driver, [event(1), event(2)]) == ["new", "new"]
        found = await outcomes(http, driver, [event(2), event(1, data_input_tokens=5), event(3), event(1), event(3)])
        assert found == ["duplicate", "conflicting", "new", "duplicate", "duplicate"]
        # Also of what came otherwise, and of what was reported as conflicting before.
        await driver.publish([event(4)])
        assert (await report(http, driver, [event(5)])).status_code == 204
        await driver.until_counted(new=5, charged=5, duplicate=3, conflicting=1)
        found = await outcomes(http, driver, [event(4), event(5), event(1, data_input_tokens=5)])
        assert found == ["duplicate", "duplicate", "conflicting"]
        await driver.until_counted(new=5, charged=5, duplicate=6, conflicting=1)
        assert await driver.rows("SELECT 1 FROM answers") == []
        bad = await http.post("/api/v1/events?debug=true", json=[event(6), event(7, id="")], headers=driver.headers())
        assert (bad.status_code, bad.json()["errors"][0]["index"]) == (400, 1)


async def test_of_equal_reports_at_once_exactly_one_is_new(driver: Driver) -> None:
    async with driver.running() as http:
        await open_all(driver)
        reports = (outcomes(http, driver, [event(number) for number in range(20)]) for _ in range(6))
        found = [outcome for each in await asyncio.gather(*reports) for outcome in each]
    assert sorted(found) == ["duplicate"] * 100 + ["new"] * 20


async def test_what_became_of_a_report_is_what_its_first_delivery_came_to(driver: Driver, writer: Writer) -> None:
    """Whoever committed and died before acknowledging is repeated: its answer stands."""
    message = translate.read_report(body(1), reporter="demo", received_at=NOON, question="asked:0")
    delivered = delivery(event(1))
    delivered.subject, delivered.headers = message.subject, dict(message.headers or {})
    for _ in range(2):
        reading = Reading(price_book=price_book(), received_at=NOON, age_max=timedelta(days=36_500))
        reading.add([delivered])
        await handlers.ingest(reading.batch(), writer=writer, known=Known())
    assert await driver.rows("SELECT question, outcome FROM answers") == [("asked:0", "new")]
    assert (await driver.counters())["duplicate"] == 1


async def test_whoever_asks_while_nothing_is_looked_at_is_told_that_it_is_on_disk(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "ANSWER_SECONDS_MAX", 0.3)
    paused = asyncio.Event()
    ingest = handlers.ingest

    async def waiting(*arguments: Any, **named: Any) -> handlers.Ingested:
        await paused.wait()
        return await ingest(*arguments, **named)

    monkeypatch.setattr(handlers, "ingest", waiting)
    async with driver.running() as http:
        assert await outcomes(http, driver, [event(1)]) == ["pending"]
        paused.set()
        await driver.until_counted(new=1, unattributed=1)
        assert await outcomes(http, driver, [event(1)]) == ["duplicate"]
