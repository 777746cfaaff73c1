"""Void and amend: only the difference is posted, once, in whatever state the use is; and nothing of a dry run."""

import asyncio
from decimal import Decimal

import pytest

from contracts.partition import partition_of
from tests.integration.metering.correcting import add, agree, ask, books, correct, named, undo, version
from tests.integration.metering.driving import Driver, Json
from tests.unit.metering.building import event

pytestmark = pytest.mark.anyio


def data(input_tokens: int, output_tokens: int = 1, **more: object) -> Json:
    return {
        "provider": "openai",
        "model": "gpt-4o-mini",
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        **more,
    }


async def test_a_void_use_is_given_back_and_counts_for_nothing(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1", "acme-2")
        await driver.until_open(["acme-1", "acme-2"])
        await driver.publish([event(number, subject=f"acme-{number % 2 + 1}") for number in range(1, 7)])
        await driver.until_counted(new=6, charged=6)
        before = await agree(http, driver)
        dry = await correct(http, driver, {"kind": "void", "events": named(1, 2)}, status=200, dry_run=True)
        assert (dry["state"], dry["id"], dry["counts"]["corrected"]) == ("dry_run", None, 2)
        assert await agree(http, driver) == before
        body = {"id": "void-1", "kind": "void", "events": named(1, 2)}
        done = await correct(http, driver, body)
        assert done["difference"] == dry["difference"] == {"calls": "-2", "usd": "-0.000209"}
        assert (done["state"], done["events"]) == ("done", dry["events"])
        assert done["accounts"] == dry["accounts"]
        after = await agree(http, driver)
        assert before["acme-2"]["usd"] - after["acme-2"]["usd"] == Decimal("0.000103")
        assert before["acme-1"]["usd"] - after["acme-1"]["usd"] == Decimal("0.000106")
        # Again it is what it was, also for whoever has it void under another id.
        assert (await correct(http, driver, body, status=200))["counts"] == done["counts"]
        again = await correct(http, driver, body | {"id": "void-2"})
        assert (again["counts"], again["difference"]) == ({"corrected": 0, "events": 2, "unchanged": 2}, {})
        assert await agree(http, driver) == after
        assert (await driver.counters())["voided"] == 2
        found = await ask(http, driver, "/api/v1/receipts/demo/use-1")
        assert (found["status"], found["corrections"][0]["id"]) == ("void", "void-1")
        assert found["corrections"][0]["difference"] == {"calls": "-1", "usd": "-0.000103"}
        meter = await ask(http, driver, "/api/v1/usage?account=*&from=2026-03-01T00:00:00Z&to=2026-04-01T00:00:00Z")
        assert meter["usage"][0]["events"] == 4
        # Reported again it is a repeat, and stays void.
        await driver.publish([event(1, subject="acme-2")])
        await driver.until_counted(new=6, charged=4, voided=2, duplicate=1)
        assert await agree(http, driver) == after


async def test_an_amended_use_costs_what_its_data_say_up_and_down(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish([event(1, subject="acme-1"), event(2, subject="acme-1")])
        await driver.until_counted(new=2, charged=2)
        for number, (tokens, usd) in enumerate([(1000, "0.001002"), (10, "0.000012"), (500, "0.000502")]):
            body = {"id": f"amend-{number}", "kind": "amend", "events": [named(1)[0] | {"data": data(tokens)}]}
            dry = await correct(http, driver, body, status=200, dry_run=True)
            done = await correct(http, driver, body)
            assert done["difference"] == dry["difference"]
            assert (await correct(http, driver, body, status=200))["difference"] == done["difference"]
            assert (await agree(http, driver))["acme-1"] == {
                "usd": Decimal(usd) + Decimal("0.000106"), "calls": Decimal(2)
            }  # fmt: skip
            found = await ask(http, driver, "/api/v1/receipts/demo/use-1")
            assert (found["revision"], found["status"]) == (number + 1, "charged")
            assert found["amounts"][0]["amount"] == usd
            assert [each["superseded"] for each in found["versions"]] == [True] * (number + 1) + [False]
        # What went down has no line of its own.
        assert [each["bundle"] is None for each in found["versions"]] == [False, False, True, False]
        same = {"id": "same", "kind": "amend", "events": [named(1)[0] | {"data": data(500)}]}
        assert (await correct(http, driver, same))["counts"]["unchanged"] == 1
        other = {"id": "same", "kind": "amend", "events": [named(1)[0] | {"data": data(501)}]}
        assert (await correct(http, driver, other, status=409))["code"] == "correction_exists"
        void = await correct(http, driver, {"id": "void", "kind": "void", "events": named(1)})
        assert void["difference"] == {"calls": "-1", "usd": "-0.000502"}
        assert (await agree(http, driver))["acme-1"]["usd"] == Decimal("0.000106")
        refused = await correct(http, driver, other | {"id": "late"}, status=409)
        assert refused["code"] == "void"
        listed = await ask(http, driver, "/api/v1/corrections?limit=3")
        assert [each["id"] for each in listed["corrections"]] == ["void", "same", "amend-2"]
        rest = await ask(http, driver, f"/api/v1/corrections?after={listed['next_after']}")
        assert [each["id"] for each in rest["corrections"]] == ["amend-1", "amend-0"]
        items = await ask(http, driver, "/api/v1/corrections/amend-1/events")
        assert [(each["from_revision"], each["to_revision"]) for each in items["events"]] == [(1, 2)]


async def test_use_that_waits_is_voided_and_amended_too(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish(
            [
                event(1, subject="acme-1", data_model="unheard-of"),
                event(2, subject="acme-1", data_model="unheard-of"),
                event(3, subject="acme-3"),
                event(4, subject="acme-3"),
                event(5, subject="Acme GmbH"),
                event(6, subject="Acme GmbH"),
            ]
        )
        await driver.until_counted(new=6, unpriced=2, unattributed=2, unmapped=2)
        await correct(http, driver, {"id": "void", "kind": "void", "events": named(1, 3, 5)})
        await driver.until_counted(new=6, unpriced=1, unattributed=1, unmapped=1, voided=3)
        assert (await ask(http, driver, "/api/v1/receipts/demo/use-5"))["status"] == "void"
        amended = [each | {"data": data(1000)} for each in named(2, 4, 6)]
        done = await correct(http, driver, {"id": "amend", "kind": "amend", "events": amended})
        # What has a price now is charged at once; the rest when its account is known.
        assert done["difference"] == {"calls": "1", "usd": "0.001002"}
        await driver.until_counted(new=6, charged=1, unattributed=1, unmapped=1, voided=3)
        assert await agree(http, driver) == {"acme-1": {"usd": Decimal("0.001002"), "calls": Decimal(1)}}
        await driver.open("acme-3")
        alias = await http.put(
            "/api/v1/aliases/Acme%20GmbH", json={"account": "acme-1"}, headers=driver.headers("operator")
        )
        assert alias.status_code == 201
        assert partition_of("Acme GmbH") != partition_of("acme-1")
        await driver.until("SELECT sum(charged)::int FROM ingest_counters", 3)
        assert (await agree(http, driver)) == {
            "acme-1": {"usd": Decimal("0.002004"), "calls": Decimal(2)},
            "acme-3": {"usd": Decimal("0.001002"), "calls": Decimal(1)},
        }
        # What was charged and now has no price is given back, and waits.
        unheard = [named(2)[0] | {"data": data(7, model="unheard-of")}]
        gone = await correct(http, driver, {"id": "gone", "kind": "amend", "events": unheard})
        assert gone["difference"] == {"calls": "-1", "usd": "-0.001002"}
        receipt = await ask(http, driver, "/api/v1/receipts/demo/use-2")
        assert (receipt["status"], receipt["waits_for"]) == ("unpriced", "openai/unheard-of")
        soon = version("v2", days_before=10)
        soon["models"][0]["model"] = "unheard-of"
        await add(http, driver, soon)
        await driver.until("SELECT sum(unpriced)::int FROM ingest_counters", 0)
        found = await agree(http, driver)
        assert found["acme-1"] == {"usd": Decimal("0.001002") + Decimal("0.000009"), "calls": Decimal(2)}
        last = await correct(http, driver, {"id": "last", "kind": "void", "events": named(2)})
        assert last["difference"] == {"calls": "-1", "usd": "-0.000009"}
        await agree(http, driver)


async def test_what_had_waited_when_it_was_voided_is_charged_by_what_is_known_when_that_is_undone(
    driver: Driver,
) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish(
            [
                event(1, subject="acme-1", data_model="unheard-of"),
                event(2, subject="acme-3"),
                event(3, subject="Acme GmbH"),
                event(4, subject="acme-4"),
                event(5, subject="Acme GmbH"),
            ]
        )
        await driver.until_counted(new=5, unpriced=1, unattributed=2, unmapped=2)
        before = await driver.counters()
        await correct(http, driver, {"id": "a", "kind": "amend", "events": [named(5)[0] | {"data": data(1000)}]})
        await correct(http, driver, {"id": "v", "kind": "void", "events": named(1, 2, 3, 4, 5)})
        await undo(http, driver, "v")
        await undo(http, driver, "a")
        assert await driver.counters() == before
        await correct(http, driver, {"id": "w", "kind": "void", "events": named(1, 2, 3, 4)})
        await correct(http, driver, {"id": "b", "kind": "amend", "events": [named(5)[0] | {"data": data(1000)}]})
        # Meanwhile there are prices, accounts and aliases for all of them.
        soon = version("v2", days_before=10)
        soon["models"].append({**soon["models"][0], "model": "unheard-of"})
        await add(http, driver, soon)
        await driver.open("acme-3")
        await driver.until_open(["acme-3"])
        for subject in ("Acme%20GmbH", "acme-4"):
            alias = await http.put(
                f"/api/v1/aliases/{subject}", json={"account": "acme-1"}, headers=driver.headers("operator")
            )
            assert alias.status_code == 201, alias.text
        await driver.until("SELECT sum(charged)::int FROM ingest_counters", 1)
        await driver.until("SELECT count(*) FROM aliases WHERE pending", 0)
        undone = await undo(http, driver, "w")
        assert (undone["counts"]["undone"], undone["counts"]["left"]) == (4, 0)
        await driver.until("SELECT sum(charged)::int FROM ingest_counters", 5)
        found = await agree(http, driver)
        assert found == {
            "acme-1": {"usd": Decimal(1002 + 103 + 109 + 112) / 1_000_000, "calls": Decimal(4)},
            "acme-3": {"usd": Decimal(106) / 1_000_000, "calls": Decimal(1)},
        }
        # What was amended moved, and is what it was amended to.
        left = await undo(http, driver, "b")
        assert (left["counts"]["undone"], left["counts"]["left"]) == (0, 1)
        assert await agree(http, driver) == found


async def test_an_amended_use_that_moves_to_its_account_moves_as_it_is_now(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish([event(1, subject="acme-4"), event(2, subject="acme-4")])
        await driver.until_counted(new=2, unattributed=2)
        for tokens in (10, 1000):
            body = [named(1)[0] | {"data": data(tokens)}]
            await correct(http, driver, {"id": f"a-{tokens}", "kind": "amend", "events": body})
        await correct(http, driver, {"id": "v", "kind": "void", "events": named(2)})
        alias = await http.put("/api/v1/aliases/acme-4", json={"account": "acme-1"}, headers=driver.headers("operator"))
        assert alias.status_code == 201, alias.text
        await driver.until("SELECT sum(charged)::int FROM ingest_counters", 1)
        assert await agree(http, driver) == {"acme-1": {"usd": Decimal("0.001002"), "calls": Decimal(1)}}
        assert (await ask(http, driver, "/api/v1/receipts/demo/use-1"))["status"] == "charged"
        # Reported once more they are repeats.
        await driver.publish([event(1, subject="acme-4"), event(2, subject="acme-4")])
        await driver.until("SELECT sum(duplicate)::int FROM ingest_counters", 2)
        assert await agree(http, driver) == {"acme-1": {"usd": Decimal("0.001002"), "calls": Decimal(1)}}


async def test_what_cannot_be_corrected_is_named_and_nothing_is_done(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1", "other")
        await driver.until_open(["acme-1", "other"])
        await driver.publish([event(1, subject="acme-1"), event(1, subject="other"), event(2, subject="acme-1")])
        await driver.until_counted(new=3, charged=3)
        before = await books(driver)
        unknown = await correct(http, driver, {"id": "a", "kind": "void", "events": named(99)}, status=404)
        assert unknown["code"] == "unknown_event"
        both = await correct(http, driver, {"id": "a", "kind": "void", "events": named(2, 1, 99)}, status=409)
        assert [(each["pointer"], each["code"]) for each in both["errors"]] == [
            ("/body/events/1", "ambiguous"),
            ("/body/events/2", "unknown_event"),
        ]
        assert both["errors"][0]["accounts"] == ["acme-1", "other"]
        twice = await correct(http, driver, {"id": "a", "kind": "void", "events": named(2, 2)}, status=422)
        assert twice["code"] == "named_twice"
        bad = [named(2)[0] | {"data": data(-1, price_version="v1")}]
        invalid = await correct(http, driver, {"id": "a", "kind": "amend", "events": bad}, status=422)
        assert {each["pointer"] for each in invalid["errors"]} >= {"/body/events/0/data/input_tokens"}
        pinned = [named(2)[0] | {"data": data(1, price_version="v1")}]
        assert (await correct(http, driver, {"id": "a", "kind": "amend", "events": pinned}, status=422))["code"]
        assert (await correct(http, driver, {"kind": "void", "events": named(2)}, status=422))["code"] == "id_missing"
        for shape in ({"kind": "forget"}, {"kind": "void", "events": []}, {"kind": "void", "id": "a b"}):
            await correct(http, driver, {"id": "a", "events": named(2), **shape}, status=422)
        assert (await http.post("/api/v1/corrections", json={})).status_code == 401
        assert await books(driver) == before
        # The id was never used up. One of several is corrected by its account.
        one = [named(1, account="other")[0]]
        assert (await correct(http, driver, {"id": "a", "kind": "void", "events": one}))["counts"]["corrected"] == 1
        assert set(await agree(http, driver)) == {"acme-1"}
        header = await http.post(
            "/api/v1/corrections",
            json={"kind": "void", "reason": "a test", "events": named(2)},
            headers={**driver.headers("operator"), "Idempotency-Key": "b"},
        )
        assert (header.status_code, header.json()["id"]) == (201, "b")


async def test_of_the_same_correction_at_once_one_is_done(driver: Driver) -> None:
    async with driver.running() as http, driver.running() as other:
        await add(http, driver, version())
        accounts = [f"acme-{number}" for number in range(7)]
        await driver.open(*accounts)
        await driver.until_open(accounts)
        await driver.publish([event(number) for number in range(60)])
        bodies: list[Json] = [
            {"id": "a", "kind": "void", "events": named(*range(0, 30))},
            {"id": "b", "kind": "void", "events": named(*range(40, 10, -1))},
            {"id": "c", "kind": "amend", "events": [each | {"data": data(9)} for each in named(*range(41, 60))]},
        ]
        await driver.until_counted(new=60, charged=60)

        async def ask_for(body: Json, number: int) -> int:
            answer = await (http if number % 2 else other).post(
                "/api/v1/corrections", json={"reason": "a test", **body}, headers=driver.headers("operator")
            )
            return answer.status_code

        more = driver.publish([event(number) for number in range(60, 120)])
        statuses, _ = await asyncio.gather(
            asyncio.gather(*(ask_for(body, number) for number in range(4) for body in bodies)), more
        )
        assert sorted(statuses) == [200] * 9 + [201] * 3
        await driver.until_counted(new=120, charged=79, voided=41)
        await agree(http, driver)
