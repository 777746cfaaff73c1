"""Usage from the stream to the ledger's stream: logged once, charged once, whatever is repeated, mixed in or bad."""

import asyncio
import json
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import quote

import pytest
from nats.aio.client import Client

from contracts.envelope import MESSAGE_BYTES_MAX, MESSAGE_EVENTS_MAX
from contracts.partition import partition_of
from contracts.streams import CHARGES, METERING_CONSUMER, USAGE, usage_subject
from services.kit.dead_letters import list_letters
from services.kit.publish import Message, publish
from tests.eventually import eventually
from tests.integration.metering.driving import Driver, Json, stored
from tests.unit.metering.bad_reports import BAD
from tests.unit.metering.building import body, event

pytestmark = pytest.mark.anyio

ACCOUNTS: Final = [f"acme-{number}" for number in range(7)]


async def open_all(driver: Driver) -> None:
    await driver.open(*ACCOUNTS)
    await driver.until_open(ACCOUNTS)


async def unacknowledged(operator_nats: Client) -> int:
    info = await operator_nats.jetstream(timeout=5).consumer_info(USAGE, METERING_CONSUMER)
    return (info.num_ack_pending or 0) + (info.num_pending or 0)


async def test_use_is_logged_and_charged_and_the_ledger_is_told(driver: Driver) -> None:
    async with driver.running():
        await open_all(driver)
        await driver.publish(event(number) for number in range(500))
        await driver.until_counted(new=500, charged=500)
        charged = await driver.charged()
        assert len(charged) == 500
        bundles = len(await driver.bundles())

        async def all_told() -> bool:
            return await stored(driver.operator_nats, CHARGES) == bundles

        await eventually(all_told)

        async def all_acknowledged() -> bool:
            return await unacknowledged(driver.operator_nats) == 0

        await eventually(all_acknowledged)

    line = charged["use-3"]
    # (103 x 0.15 + 3 x 0.60) / 1e6
    assert [(each.amount, each.unit) for each in line.amounts] == [("0.00001725", "usd")]
    ((logged, amounts, items, bundle_number, line_number, price_version),) = await driver.rows(
        "SELECT data, amounts, line_items, bundle_number, line_number, price_version FROM usage_log"
        " WHERE event_id = 'use-3'"
    )
    assert logged == event(3)["data"]
    assert amounts == [{"unit": "usd", "amount": "0.00001725"}]
    assert [(item["quantity"], item["count"], item["exact"]) for item in items] == [
        ("input_tokens", 103, "0.00001545"),
        ("output_tokens", 3, "0.0000018"),
    ]
    assert price_version == line.price_version
    bundle = next(each for each in await driver.bundles() if (each.number, line in each.lines) == (bundle_number, True))
    assert bundle.lines[line_number - 1] == line


async def test_repeats_within_and_across_batches_are_charged_once(driver: Driver) -> None:
    deliveries = [event(number) for number in range(300)] * 3
    random.Random(5).shuffle(deliveries)
    async with driver.running():
        await open_all(driver)
        await driver.publish(deliveries[:500])
        await driver.publish(deliveries[500:])
        await driver.until_counted(new=300, charged=300, duplicate=600)
    async with driver.running():
        await driver.publish(deliveries)
        await driver.until_counted(new=300, charged=300, duplicate=1500)
    assert len(await driver.charged()) == 300


async def test_a_conflict_is_kept_apart_and_the_others_are_unaffected(driver: Driver) -> None:
    async with driver.running() as http:
        await open_all(driver)
        await driver.publish(event(number) for number in range(20))
        await driver.until_counted(new=20, charged=20)
        other = event(3, data_input_tokens=999_999)
        await driver.publish([other, event(50), other, event(4), event(3)])
        # The same conflicting content once more is a repeat of it.
        await driver.until_counted(new=21, charged=21, conflicting=1, duplicate=3)
        response = await http.get("/api/v1/conflicts", headers=driver.headers("operator"))
        (conflict,) = response.json()["conflicts"]
        assert (conflict["id"], conflict["account"], conflict["times"]) == ("use-3", "acme-3", 2)
        assert json.loads(conflict["body"]) == other
        assert conflict["body_sha256"] != conflict["first_body_sha256"]
        metrics = (await http.get("/metrics")).text
        assert "scrip_metering_conflicts_total" in metrics
        assert (await http.get("/readyz")).status_code == 200
    charged = await driver.charged()
    assert [(each.amount, each.unit) for each in charged["use-3"].amounts] == [("0.00001725", "usd")]


async def test_two_contents_in_one_batch_are_one_charge_and_one_conflict(driver: Driver) -> None:
    async with driver.running():
        await open_all(driver)
        await driver.publish([event(1), event(1, data_input_tokens=5), event(1, traceparent="00-2")])
        await driver.until_counted(new=1, charged=1, conflicting=1, duplicate=1)


async def test_bad_messages_are_dead_lettered_and_block_nothing(driver: Driver) -> None:
    async with driver.running():
        await open_all(driver)
        for number, (_, payload, _) in enumerate(BAD):
            await driver.publish_raw(payload, subject=f"usage.v1.{number % 64:02d}.demo")
            await driver.publish([event(number)])
        await driver.until_counted(new=len(BAD), charged=len(BAD), dead=len(BAD))
        letters = await list_letters(driver.connection, limit=200)
        assert sorted(letter.payload for letter in letters) == sorted(payload for _, payload, _ in BAD)
        for name, payload, place in BAD:
            letter = next(each for each in letters if each.payload == payload)
            assert place in {problem["field"] for problem in letter.problems}, name
            assert letter.reason


def in_one(*bodies: bytes) -> bytes:
    return b"[" + b", ".join(bodies) + b"]"


async def test_each_event_of_a_message_is_what_it_would_be_alone(driver: Driver) -> None:
    """New, a repeat, a conflict, another partition's, another source's, unreadable: whatever stands beside it."""
    partition = partition_of("acme-1")
    subject = usage_subject(partition=partition, source="demo")
    mine = [body(number, subject="acme-1") for number in range(1, 41)]
    conflict, elsewhere = body(1, subject="acme-1", data_input_tokens=5), body(50, subject="acme-2")
    foreign, unreadable = body(51, subject="acme-1", source="other"), b'{"id": 7}'
    async with driver.running():
        await open_all(driver)
        await driver.publish_raw(in_one(*mine, mine[0], conflict, elsewhere, foreign, unreadable), subject=subject)
        wanted = {"new": 41, "charged": 41, "conflicting": 1, "rerouted": 1, "dead": 2}
        await driver.until_counted(**wanted, duplicate=1)
        letters = await list_letters(driver.connection, limit=10)
        assert {letter.payload for letter in letters} == {foreign, unreadable}
        assert len({letter.stream_sequence for letter in letters}) == 1
        # Alone, and in another company: repeats.
        await driver.publish_raw(mine[3], subject=subject)
        await driver.publish_raw(b"\n " + in_one(*mine[:10]), subject=subject)
        await driver.publish_raw(in_one(mine[20]), subject=subject)
        await driver.until_counted(**wanted, duplicate=13)

        async def all_acknowledged() -> bool:
            return await unacknowledged(driver.operator_nats) == 0

        await eventually(all_acknowledged)
    assert len(await driver.charged()) == 41


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"[]", id="no event"),
        pytest.param(in_one(body(1), b"{"), id="not JSON"),
        pytest.param(in_one(*[b"{}"] * (MESSAGE_EVENTS_MAX + 1)), id="too many"),
        pytest.param(in_one(body(1), body(2), b'"%s"' % (b"x" * MESSAGE_BYTES_MAX)), id="too long"),
    ],
)
async def test_a_message_that_cannot_be_taken_apart_is_dead_lettered_whole(driver: Driver, payload: bytes) -> None:
    async with driver.running():
        await driver.publish_raw(payload)
        await driver.until_counted(dead=1)
    (letter,) = await list_letters(driver.connection, limit=10)
    assert letter.payload == payload


async def test_a_letter_is_redriven_and_charged_once_however_often(driver: Driver) -> None:
    """Reported too far ahead, and re-driven when its time has come: on another partition's subject, or as it should."""
    async with driver.running() as http:
        await open_all(driver)
        headers = driver.headers("operator")
        early = body(1, time=(datetime.now(UTC) + timedelta(minutes=5, seconds=1)).isoformat())
        await driver.publish_raw(early, subject="usage.v1.63.demo")
        await driver.publish_raw(early, subject="usage.v1.62.demo")
        await driver.publish_raw(b"{", subject="usage.v1.62.demo")
        await driver.until_counted(dead=3)
        await asyncio.sleep(1.1)
        listed = (await http.get("/dead-letters", headers=headers)).json()["dead_letters"]
        answers = {}
        for letter in listed:
            answer = await http.post(f"/dead-letters/{letter['id']}/redrive", headers=headers)
            again = await http.post(f"/dead-letters/{letter['id']}/redrive", headers=headers)
            answers[letter["subject"], letter["stream_sequence"]] = (answer.status_code, again.status_code)
        assert sorted(answers.values()) == [(200, 409), (200, 409), (422, 422)]
        await driver.until_counted(dead=3, new=1, charged=1, duplicate=1)
        assert list(await driver.charged()) == ["use-1"]
        left = (await http.get("/dead-letters", headers=headers)).json()["dead_letters"]
        assert len(left) == 1
        assert (await http.get("/dead-letters", headers=driver.headers("demo"))).status_code == 403


async def test_use_costs_what_it_cost_when_it_happened(driver: Driver) -> None:
    catalogue = driver.settings.catalogue_file.read_text()
    change = datetime(2026, 3, 14, 11, tzinfo=UTC)
    dearer = catalogue.split("[[price_versions]]")[1]
    dearer = dearer.replace('"2024-07-18"', '"dearer"').replace('"2024-07-18T00:00:00Z"', f'"{change.isoformat()}"')
    path = driver.settings.tokens_file.with_name("catalogue.toml")
    path.write_text(f"{catalogue}\n[[price_versions]]\n{dearer.replace('0.15', '1.50').replace('0.60', '6.00')}")
    settings = driver.settings.model_copy(update={"catalogue_file": path})
    used = {"provider": "openai", "model": "gpt-4o-mini", "input_tokens": 1_000_000, "output_tokens": 0}
    before = event(1, time=(change - timedelta(seconds=1)).isoformat(), data=used)
    after = event(2, time=change.isoformat(), data=used)
    ancient = event(3, time="2019-12-31T23:59:59Z", data=used)
    unknown = event(4, data=used | {"model": "gpt-unheard-of"})
    async with driver.running(settings) as http:
        await open_all(driver)
        await driver.publish([after, before, ancient, unknown])
        await driver.until_counted(new=4, charged=2, unpriced=2)
        waiting = (await http.get("/api/v1/set-aside", headers=driver.headers("operator"))).json()["set_aside"]
        assert {(each["id"], each["reason"], each["key"]) for each in waiting} == {
            ("use-3", "unpriced", "openai/gpt-4o-mini"),
            ("use-4", "unpriced", "openai/gpt-unheard-of"),
        }
    charged = await driver.charged()
    assert {name: (line.price_version, line.amounts[0].amount) for name, line in charged.items()} == {
        "use-1": ("2024-07-18", "0.15"),
        "use-2": ("dearer", "1.5"),
    }


async def test_use_of_many_months_is_logged_in_the_month_it_happened(driver: Driver) -> None:
    times = ["1970-01-02T00:00:00Z", "2019-12-31T23:59:59.999999Z", "2020-01-01T00:00:00Z", "2025-02-28T23:00:00-02:00"]
    async with driver.running():
        await open_all(driver)
        await driver.publish(event(number, time=time) for number, time in enumerate(times))
        await driver.until_counted(new=4, charged=1, unpriced=3)
    found = await driver.rows("SELECT event_id, tableoid::regclass::text FROM usage_log ORDER BY event_id")
    assert found == [
        ("use-0", "usage_log_other"),
        ("use-1", "usage_log_other"),
        ("use-2", "usage_log_2020_01"),
        ("use-3", "usage_log_2025_03"),
    ]


async def test_use_on_another_partitions_subject_is_sent_on_and_charged_once(driver: Driver) -> None:
    """However often, on whatever subject, beside the same use where it belongs."""
    async with driver.running():
        await open_all(driver)
        for subject in ("usage.v1.63.demo", "usage.v1.xx.demo", "usage.v1.63.demo"):
            await driver.publish_raw(body(1), subject=subject)
        await driver.publish_raw(body(2, time=None), subject="usage.v1.63.demo")
        await driver.until_counted(rerouted=4, new=2, charged=2, duplicate=1)
        await driver.publish([event(1)])
        await driver.publish_raw(body(1, data_input_tokens=5), subject="usage.v1.63.demo")
        await driver.until_counted(rerouted=5, new=2, charged=2, duplicate=2, conflicting=1)
        assert await driver.rows("SELECT 1 FROM reroutes") == []
        ((subject,),) = await driver.rows("SELECT subject FROM usage_log WHERE event_id = 'use-1'")
        assert subject is None
    assert sorted(await driver.charged()) == ["use-1", "use-2"]


async def test_binary_and_structured_mode_are_one_use(driver: Driver) -> None:
    said = event(1, region="Zürich")
    headers = {f"ce-{name}": quote(text) for name, text in said.items() if name != "data"}
    message = Message(
        subject=usage_subject(partition=partition_of("acme-1"), source="demo"),
        payload=json.dumps(said["data"]).encode(),
        message_id=None,
        headers={**headers, "content-type": "application/json"},
    )
    async with driver.running() as http:
        await open_all(driver)
        await publish(driver.demo_nats, stream=USAGE, message=message)
        await driver.publish([said, said | {"datacontenttype": "application/json"}])
        await driver.until_counted(new=1, charged=1, duplicate=2)
        other = replace(message, headers={**headers, "ce-region": "Bern"})
        await publish(driver.demo_nats, stream=USAGE, message=other)
        await driver.until_counted(new=1, charged=1, duplicate=2, conflicting=1)
        (conflict,) = (await http.get("/api/v1/conflicts", headers=driver.headers("operator"))).json()["conflicts"]
        assert json.loads(conflict["body"]) == said | {"region": "Bern"}


async def test_use_of_another_type_is_logged_as_it_was_sent_and_waits_for_a_price(driver: Driver) -> None:
    used = {"path": "/v1", "size": 1.5, "tags": ["a", None]}
    async with driver.running() as http:
        await open_all(driver)
        await driver.publish([event(1, type="api-calls", data=used), event(2, type="api-calls", data=None)])
        await driver.until_counted(new=2, unpriced=2)
        assert await driver.rows("SELECT event_id, type, data FROM usage_log ORDER BY event_id") == [
            ("use-1", "api-calls", used),
            ("use-2", "api-calls", {}),
        ]
        waiting = (await http.get("/api/v1/set-aside", headers=driver.headers("operator"))).json()["set_aside"]
        assert {each["key"] for each in waiting} == {"type:api-calls"}


async def test_use_that_is_too_old_is_refused_as_the_setting_says_unless_it_is_a_repeat(driver: Driver) -> None:
    def of_days_ago(number: int, days: int) -> Json:
        return event(number, time=(datetime.now(UTC) - timedelta(days=days)).isoformat())

    known, other = of_days_ago(3, 36), of_days_ago(3, 37)
    async with driver.running():
        await open_all(driver)
        await driver.publish([known])
        await driver.until_counted(new=1, charged=1)
    async with driver.running(driver.settings.model_copy(update={"metering_age_days_max": 35})) as http:
        await driver.publish([of_days_ago(1, 34), of_days_ago(2, 36), known])
        await driver.until_counted(new=2, charged=2, dead=1, duplicate=1)
        headers = driver.headers()
        refused = await http.post("/api/v1/events", json=[known, of_days_ago(4, 36)], headers=headers)
        assert (refused.status_code, [each["index"] for each in refused.json()["errors"]]) == (400, [1])
        assert (await http.post("/api/v1/events", json=[known, of_days_ago(5, 1)], headers=headers)).status_code == 204
        await driver.until_counted(new=3, charged=3, dead=1, duplicate=2)
        asked = await http.post("/api/v1/events?debug=true", json=[other, known], headers=headers)
        assert [each["outcome"] for each in asked.json()["events"]] == ["conflicting", "duplicate"]
        # Put anew where it belongs, and judged there alike.
        await driver.publish_raw(json.dumps(known).encode(), subject="usage.v1.63.demo")
        await driver.publish_raw(json.dumps(of_days_ago(6, 36)).encode(), subject="usage.v1.63.demo")
        await driver.until_counted(new=3, charged=3, dead=2, duplicate=4, conflicting=1)
    letters = await list_letters(driver.connection, limit=10)
    assert {letter.reason for letter in letters} == {"time: the time is 36 days ago, more than 35 days"}
