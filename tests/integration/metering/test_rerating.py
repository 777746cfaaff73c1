"""Re-rating and undoing: twice is once, in whatever slices, whoever dies; what is restored is what was, to the step."""

import random
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import httpx2
import psycopg
import pytest

from services.kit.clock import now
from services.metering.correcting import jobs, records, rerating, undoing
from services.metering.correcting.records import NewCorrection
from services.metering.correcting.settling import Settler
from tests.conftest import Database, NatsAccount
from tests.integration.metering.correcting import add, agree, ask, books, correct, named, undo, until, version
from tests.integration.metering.driving import Driver, Json
from tests.unit.metering.building import NOON, event

pytestmark = pytest.mark.anyio

PERIOD: Final = {"from": "2026-03-01T00:00:00Z", "to": "2026-04-01T00:00:00Z"}
EVERYBODY: Final = {"kind": "rerate", "account": "*", **PERIOD}
DEAR: Final = {"input_tokens": "3", "output_tokens": "1"}


async def rerate(http: httpx2.AsyncClient, driver: Driver, id: str, **more: Any) -> Json:
    """Re-rate, after a dry run that says the same."""
    body = {**EVERYBODY, **more}
    dry = await correct(http, driver, body, status=200, dry_run=True)
    await correct(http, driver, {"id": id, **body}, status=202)
    done = await until(http, driver, id, "done")
    assert (dry["difference"], dry["counts"], dry["complete"]) == (done["difference"], done["counts"], True)
    return done


async def start(http: httpx2.AsyncClient, driver: Driver, *numbers: int) -> None:
    """Two price versions, and use that is charged under the first."""
    await add(http, driver, version())
    # In force after all that tests report.
    await add(http, driver, version("dear", days_before=-5, usd=DEAR))
    accounts = sorted({f"acme-{number % 7}" for number in numbers})
    await driver.open(*accounts)
    await driver.until_open(accounts)
    await driver.publish([event(number) for number in numbers])
    await driver.until_counted(new=len(numbers), charged=len(numbers))


async def test_rerating_twice_is_once_and_undone_it_is_as_before(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerating, "EVENTS_MAX", 7)
    monkeypatch.setattr(undoing, "EVENTS_MAX", 7)
    async with driver.running() as http:
        await start(http, driver, *range(60))
        before = await agree(http, driver)
        done = await rerate(http, driver, "dear", price_version="dear")
        assert done["counts"] == {"events": 60, "corrected": 60}
        after = await agree(http, driver)
        for account, amounts in after.items():
            numbers = [number for number in range(60) if f"acme-{number % 7}" == account]
            assert amounts["usd"] == sum(Decimal(3 * (100 + number) + number) for number in numbers) / 1_000_000
        again = await rerate(http, driver, "again", price_version="dear")
        assert (again["counts"], again["difference"]) == ({"events": 60, "corrected": 0, "unchanged": 60}, {})
        assert await agree(http, driver) == after
        found = await ask(http, driver, "/api/v1/receipts/demo/use-7")
        assert (found["price_version"], found["revision"]) == ("dear", 1)
        one = await rerate(http, driver, "one", account="acme-1")
        assert one["counts"] == {"events": 9, "corrected": 9}
        assert (await agree(http, driver)) == after | {"acme-1": before["acme-1"]}
        # What was corrected since is left; undone, it stands as what it was.
        undone = await undo(http, driver, "dear")
        assert undone["counts"] | {"undone": 51, "left": 9} == undone["counts"]
        assert await agree(http, driver) == before
        await undo(http, driver, "one")
        assert await agree(http, driver) == before | {"acme-1": after["acme-1"]}
        receipt = await ask(http, driver, "/api/v1/receipts/demo/use-8")
        assert [each["undone"] for each in receipt["corrections"]] == [False, True]


async def test_corrections_are_undone_in_turn_to_what_was_before_each(driver: Driver) -> None:
    async with driver.running() as http:
        await start(http, driver, *range(20))
        states = [await agree(http, driver)]
        amended = {**event(3)["data"], "input_tokens": 5000}
        for body in (
            {"id": "a", "kind": "amend", "events": [named(3)[0] | {"data": amended}]},
            {"id": "v", "kind": "void", "events": named(3, 4)},
        ):
            await correct(http, driver, body)
            states.append(await agree(http, driver))
        await rerate(http, driver, "r", price_version="dear")
        early = await correct(http, driver, {"id": "x", "kind": "void", "events": named(9)})
        assert early["counts"]["corrected"] == 1
        for id in ("x", "r", "v", "a"):
            await undo(http, driver, id)
            found = await agree(http, driver)
            if id in ("r", "v", "a"):
                assert found == states.pop()
        counted = await driver.counters()
        assert (counted["charged"], counted["voided"]) == (20, 0)
        receipt = await ask(http, driver, "/api/v1/receipts/demo/use-3")
        assert (receipt["status"], len(receipt["versions"])) == ("charged", 4)


async def test_what_is_pinned_waits_or_has_no_price_is_left(driver: Driver, nats_account: NatsAccount) -> None:
    gateway = await nats_account.connect("gateway")
    async with driver.running() as http:
        await start(http, driver, 1)
        pinned_use = [event(number, source="gateway", subject="acme-1", data_price_version="v1") for number in (11, 12)]
        await replace(driver, demo_nats=gateway).publish(pinned_use, source="gateway")
        await driver.publish(
            [event(2, subject="nobody"), event(3, subject="acme-1", data_model="unheard-of"), event(4, subject="A B")]
        )
        await driver.until_counted(new=6, charged=3, unattributed=1, unpriced=1, unmapped=1)
        done = await rerate(http, driver, "r", price_version="dear")
        assert done["counts"] == {"events": 5, "corrected": 1, "pinned": 2, "waiting": 1, "unpriced": 1}
        own = await rerate(http, driver, "own")
        assert own["counts"]["pinned"] == 2
        assert Decimal(own["difference"]["usd"]) == -Decimal(done["difference"]["usd"])
        pinned = await rerate(http, driver, "pinned", price_version="dear", include_pinned=True)
        assert pinned["counts"] == {"events": 5, "corrected": 3, "waiting": 1, "unpriced": 1}
        refused = await correct(http, driver, {"id": "no", **EVERYBODY, "include_pinned": True}, status=422)
        assert refused["errors"]
        assert (await correct(http, driver, {"id": "no", **EVERYBODY, "price_version": "v9"}, status=422))[
            "code"
        ] == "unknown_version"
        swapped = {"id": "no", **EVERYBODY, "from": PERIOD["to"], "to": PERIOD["from"]}
        await correct(http, driver, swapped, status=422)
        # A version that has the price is what is asked for: then it is charged, once.
        unheard = version("unheard", days_before=-6)
        unheard["models"][0]["model"] = "unheard-of"
        await add(http, driver, unheard)
        found = await rerate(http, driver, "unheard", price_version="unheard", model="unheard-of")
        assert found["counts"] == {"events": 1, "corrected": 1}
        await driver.until_counted(new=6, charged=4, unattributed=1, unmapped=1)
        await agree(http, driver)
        await undo(http, driver, "unheard")
        await driver.until_counted(new=6, charged=3, unattributed=1, unpriced=1, unmapped=1)
        await agree(http, driver)
    await gateway.close()


TIERS: Final = [{"up_to": "10", "price": "1"}, {"up_to": None, "price": "0.5"}]


def counting(id: str, *, days_before: int, first: str, free: str = "0", period: str = "month") -> Json:
    tiers = [{"up_to": "10", "price": first}, {"up_to": None, "price": "0.5"}]
    own = {"id": "renders", "type": "render", "unit": "usd", "quantity": "n", "kind": "graduated", "period": period}
    return version(id, days_before=days_before) | {"prices": [{**own, "tiers": tiers, "free": free}]}


def render(number: int, n: int, *, account: str = "acme-1") -> Json:
    made = event(number, type="render", subject=account) | {"data": {"n": n}}
    # On four days.
    return made | {"time": (NOON + timedelta(days=number % 4, seconds=number)).isoformat()}


async def test_a_period_is_recounted_in_order_of_use(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, counting("g1", days_before=25, first="1"))
        await add(http, driver, counting("g2", days_before=-60, first="2", free="4"))
        await driver.open("acme-1", "acme-2")
        await driver.until_open(["acme-1", "acme-2"])
        for number in (5, 2, 7, 1, 4):
            await driver.publish([render(number, number)])
            await driver.until("SELECT count(*) FROM usage_log", len(await driver.rows("SELECT FROM seen")))
        await driver.publish([render(9, 30, account="acme-2"), event(40, subject="acme-2")])
        await driver.until_counted(new=7, charged=7)
        before = await agree(http, driver)
        assert before["acme-1"]["usd"] == 10 + Decimal("4.5")
        counters = await driver.rows("SELECT * FROM price_counters ORDER BY account")
        done = await rerate(http, driver, "g2", price_version="g2", type="render")
        assert done["counts"] == {"events": 6, "corrected": 6}
        after = await agree(http, driver)
        # 19 less 4 free: 10 at 2, 5 at a half.
        assert after["acme-1"]["usd"] == 20 + Decimal("2.5")
        # In order of time: days 0 (4), 1 (1, 5), 2 (2), 3 (7).
        assert [
            (await ask(http, driver, f"/api/v1/receipts/demo/use-{number}"))["amounts"][0]["amount"]
            for number in (4, 1, 5, 2, 7)
        ] == ["0", "2", "10", "4", "6.5"]
        again = await rerate(http, driver, "again", price_version="g2", type="render")
        assert (again["difference"], again["counts"]["corrected"]) == ({}, 0)
        assert await agree(http, driver) == after
        # What comes next counts from there.
        await driver.publish([render(11, 2)])
        await driver.until_counted(new=8, charged=8)
        assert (await agree(http, driver))["acme-1"]["usd"] == after["acme-1"]["usd"] + 1
        assert (await correct(http, driver, {"id": "v", "kind": "void", "events": named(11)}))["difference"] == {
            "usd": "-1"
        }
        assert (await undo(http, driver, "g2"))["counts"]["left"] == 0
        assert await agree(http, driver) == before
        assert await driver.rows("SELECT * FROM price_counters ORDER BY account") == counters


async def test_a_part_of_a_period_is_rerated_and_the_rest_keeps_its_cost(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, counting("g1", days_before=25, first="1"))
        await add(http, driver, counting("g2", days_before=-60, first="2"))
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish([render(number, 3) for number in range(8)])
        await driver.until_counted(new=8, charged=8)
        before = await agree(http, driver)
        part = {"from": "2026-03-15T00:00:00Z", "to": "2026-03-16T00:00:00Z", "price_version": "g2"}
        done = await rerate(http, driver, "part", **part)
        assert done["counts"]["events"] == 2
        after = await agree(http, driver)
        assert (await rerate(http, driver, "again", **part))["difference"] == {}
        assert await agree(http, driver) == after
        for number in (0, 2, 3):
            assert (await ask(http, driver, f"/api/v1/receipts/demo/use-{number}"))["revision"] == 0
        await undo(http, driver, "part")
        assert await agree(http, driver) == before
        assert await driver.rows("SELECT quantity, credit FROM price_counters") == [(24, 0)]


async def test_a_void_in_a_period_leaves_what_all_else_costs(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, counting("g1", days_before=25, first="1", free="4"))
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish([render(0, 4)])
        await driver.until_counted(new=1, charged=1)
        await driver.publish([render(1, 6)])
        await driver.until_counted(new=2, charged=2)
        assert await agree(http, driver) == {"acme-1": {"usd": 6}}
        # The free ones were the void one's: what the other paid for is free now, and is given back.
        await correct(http, driver, {"id": "v", "kind": "void", "events": named(0)})
        await driver.until("SELECT (quantity, credit)::text FROM price_counters", "(6,0)")
        assert await agree(http, driver) == {"acme-1": {"usd": 2}}
        await driver.publish([render(2, 5)])
        await driver.until_counted(new=3, charged=2, voided=1)
        assert await agree(http, driver) == {"acme-1": {"usd": 7}}
        # Or re-rated, in one go.
        amend = {"id": "a", "kind": "amend", "events": [named(2)[0] | {"data": {"n": 2}}]}
        await correct(http, driver, amend)
        await rerate(http, driver, "r")
        assert await agree(http, driver) == {"acme-1": {"usd": 4}}
        assert await driver.rows("SELECT quantity, credit FROM price_counters") == [(8, 0)]


async def test_a_rerating_goes_on_where_whoever_died_left_it_while_use_comes(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerating, "EVENTS_MAX", 3)
    async with driver.running() as http:
        await start(http, driver, *range(40))
        gone_on, steps = jobs.step, 0

        async def dies(*arguments: Any, **more: Any) -> Any:
            nonlocal steps
            steps += 1
            done = await gone_on(*arguments, **more)
            if steps % 5 == 2:
                # After all was written, and before the commit.
                raise RuntimeError("killed")
            return done

        monkeypatch.setattr(jobs, "step", dies)
        monkeypatch.setattr(jobs.Corrector, "retry_seconds", 0.01)
        await correct(http, driver, {"id": "r", **EVERYBODY, "price_version": "dear"}, status=202)
        async with driver.running():
            await driver.publish([event(number) for number in range(40, 80)])
            await driver.publish([event(number) for number in range(80)])
            found = await until(http, driver, "r", "done")
        await driver.until_counted(new=80, charged=80, duplicate=80)
        assert found["counts"]["corrected"] >= 40
        await agree(http, driver)
        monkeypatch.setattr(jobs, "step", gone_on)
        await rerate(http, driver, "again", price_version="dear")
        after = await agree(http, driver)
        total = sum(Decimal(3 * (100 + number) + number) for number in range(80)) / 1_000_000
        assert sum(each["usd"] for each in after.values()) == total


async def test_what_counts_and_is_not_in_the_log_any_more_is_left(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, counting("g1", days_before=25, first="1"))
        await add(http, driver, counting("g2", days_before=-60, first="2"))
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish([render(0, 4)])
        await driver.until_counted(new=1, charged=1)
        await driver.rows("UPDATE price_counters SET quantity = 7 RETURNING partition")
        before = await books(driver)
        done = await rerate(http, driver, "r", price_version="g2")
        assert done["counts"] == {"events": 1, "corrected": 0, "not_all_here": 1}
        assert await books(driver) == before


async def test_what_is_archived_is_refused_and_never_left_out(driver: Driver, database: Database) -> None:
    async with driver.running() as http:
        await start(http, driver, *range(6))
        await correct(http, driver, {"id": "v", "kind": "void", "events": named(1)})
        body = {"id": "r", **EVERYBODY, "price_version": "dear"}
        with psycopg.connect(database.url("metering_owner").get_secret_value(), autocommit=True) as owner:
            owner.execute("INSERT INTO archived_months VALUES ('2026-03-01', 1, '{}', 'hash', now())")
            for dry_run in (True, False):
                refused = await correct(http, driver, body, status=409, dry_run=dry_run)
                assert (refused["code"], refused["months"]) == ("archived", ["2026-03"])
            backfill = {"id": "b", "kind": "backfill", "account": "acme-1", **PERIOD}
            assert (await correct(http, driver, backfill, status=409))["code"] == "archived"
            owner.execute("DELETE FROM archived_months")
        await rerate(http, driver, "r", price_version="dear")
        await agree(http, driver)


async def test_a_correction_has_one_row_whoever_asks_at_once(driver: Driver) -> None:
    asked = NewCorrection(id="r", kind="rerate", body_hash=b"hash", parameters="{}", reason="a test", actor="operator")
    assert await records.begin(driver.connection, asked, state="done", recorded_at=now())
    assert not await records.begin(driver.connection, asked, state="done", recorded_at=datetime.now(UTC))


async def dry_undo(http: httpx2.AsyncClient, driver: Driver, id: str) -> Json:
    """What undoing a correction would come to."""
    answer = await http.post(
        f"/api/v1/corrections/{id}/undo?dry_run=true", json={"reason": "a try"}, headers=driver.headers("operator")
    )
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def in_all(books: Mapping[str, Mapping[str, Decimal]]) -> Decimal:
    """What is charged in usd."""
    return sum((amounts.get("usd", Decimal(0)) for amounts in books.values()), Decimal(0))


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_counts_of_a_period_go_back_the_way_they_came(
    driver: Driver, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)

    async def nothing(_: Settler) -> bool:
        return False

    # What is carried stays, and is compared.
    monkeypatch.setattr(Settler, "round", nothing)
    monkeypatch.setattr(undoing, "EVENTS_MAX", 2)
    async with driver.running() as http:
        await add(http, driver, counting("g1", days_before=25, first="1", free="3"))
        await add(http, driver, counting("g2", days_before=-60, first="2"))
        await driver.open("acme-1", "acme-2")
        await driver.until_open(["acme-1", "acme-2"])
        uses = [render(number, chance.randrange(9), account=f"acme-{number % 2 + 1}") for number in range(16)]
        chance.shuffle(uses)
        await driver.publish(uses)
        await driver.until_counted(new=16, charged=16)
        counters = "SELECT account, quantity, credit FROM price_counters ORDER BY account"
        states = [(await agree(http, driver), await driver.rows(counters))]
        for turn in range(8):
            id, numbers = f"c{turn}", chance.sample(range(16), 3)
            match chance.choice(["void", "amend", "rerate"]):
                case "void":
                    await correct(http, driver, {"id": id, "kind": "void", "events": named(*numbers)})
                case "amend":
                    receipts = [await ask(http, driver, f"/api/v1/receipts/demo/use-{number}") for number in numbers]
                    events = [
                        each | {"data": {"n": chance.randrange(20)}}
                        for each, receipt in zip(named(*numbers), receipts, strict=True)
                        if receipt["status"] != "void"
                    ]
                    if events:
                        await correct(http, driver, {"id": id, "kind": "amend", "events": events})
                    else:
                        await correct(http, driver, {"id": id, "kind": "void", "events": named(*numbers)})
                case "rerate":
                    under = chance.choice([{"price_version": "g2"}, {"price_version": "g1"}, {}])
                    part = chance.choice([{}, {"from": "2026-03-15T00:00:00Z"}, {"account": "acme-1"}])
                    await rerate(http, driver, id, **under, **part)
                    # Twice is once, in whatever state the counts were.
                    assert (await rerate(http, driver, f"{id}-again", **under, **part))["difference"] == {}
            states.append((await agree(http, driver), await driver.rows(counters)))
        # The latest first, each is as if it had never been; in slices, as its dry run says.
        for turn in reversed(range(8)):
            now_is, _ = states.pop()
            assert now_is == await agree(http, driver)
            before, stood_at = states[-1]
            dry = await dry_undo(http, driver, f"c{turn}")
            assert Decimal(dry["difference"].get("usd", 0)) == in_all(before) - in_all(now_is)
            assert (await undo(http, driver, f"c{turn}"))["counts"].get("left", 0) == 0
            assert await driver.rows(counters) == stood_at
        assert await agree(http, driver) == states[0][0]
