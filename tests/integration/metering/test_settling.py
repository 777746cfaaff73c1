"""What later use lowers is given back by itself: the same totals in any order, whoever dies, whatever is corrected."""

import asyncio
import random
import time
from decimal import Decimal
from typing import Any, Final

import httpx2
import pytest

from contracts.partition import partition_of
from services.metering.correcting import carrying, settling, undoing
from services.metering.correcting.settling import Settler
from tests.integration.metering.correcting import add, agree, ask, correct, named, undo, until, version
from tests.integration.metering.driving import WAIT_SECONDS_MAX, Driver, Json
from tests.integration.metering.test_rerating import render, rerate

pytestmark = pytest.mark.anyio

FALLS: Final = [{"up_to": "100", "price": "1"}, {"up_to": None, "price": "0.8"}]
FIXED: Final = {"id": "fee", "type": "render", "unit": "usd", "kind": "per_unit", "tiers": [{"price": "0.25"}]}


def falling(id: str = "volume", *, tiers: Any = FALLS, days_before: int = 25) -> Json:
    """All costs the price of the tier that it reaches; and each event a fee, whatever was counted."""
    own = {"id": "renders", "type": "render", "unit": "usd", "quantity": "n", "kind": "volume", "period": "month"}
    return version(id, days_before=days_before) | {"prices": [own | {"tiers": tiers}, FIXED]}


def cost(quantity: int, events: int) -> Decimal:
    """What `falling` says."""
    return Decimal("0.25") * events + quantity * (Decimal(1) if quantity <= 100 else Decimal("0.8"))


async def begin(http: httpx2.AsyncClient, driver: Driver, *accounts: str, prices: Json | None = None) -> None:
    await add(http, driver, prices or falling())
    await driver.open(*accounts)
    await driver.until_open(accounts)


async def until_settled(driver: Driver) -> None:
    """Wait until nothing is carried that is to be given back."""
    await driver.until("SELECT count(*)::int FROM price_counters WHERE credit < 0", 0)


async def kept(driver: Driver) -> dict[str, Decimal]:
    """What is charged and carried in a period is what all that is counted costs, at any moment; what that is."""
    found = await driver.rows(
        """
        SELECT account, count(u)::int, coalesce(sum((u.data ->> 'n')::int), 0)::int, c.quantity, c.credit,
               coalesce(sum((SELECT sum((each ->> 'amount')::numeric) FROM jsonb_array_elements(u.amounts) AS each)), 0)
        FROM price_counters AS c LEFT JOIN usage_log AS u USING (partition, account)
        WHERE u.partition IS NULL OR (NOT u.superseded AND u.price_version IS NOT NULL)
        GROUP BY account, c.quantity, c.credit
        """
    )
    for _, events, used, quantity, credit, charged in found:
        assert used == quantity
        assert charged + credit / Decimal(10**9) == cost(used, events)
    return {account: charged for account, *_, charged in found}


async def test_in_whatever_order_and_batches_the_same_is_charged_and_receipts_say_why(driver: Driver) -> None:
    chance = random.Random(20261121)
    quantities = [*range(1, 14), 1, 2, 3, 4, 3]
    assert sum(quantities) == 104
    accounts = [f"acme-{number}" for number in range(4)]
    uses = []
    for place, account in enumerate(accounts):
        order = [render(100 * place + number, n, account=account) for number, n in enumerate(quantities)]
        chance.shuffle(order)
        uses.append(order)
    async with driver.running() as http, driver.running():
        await begin(http, driver, *accounts)
        while any(uses):
            # Of one account after the other a batch, of whatever size.
            await driver.publish([uses_of.pop() for uses_of in uses for _ in range(chance.randrange(5)) if uses_of])
            await kept(driver)
            await asyncio.sleep(chance.random() / 2)
        await driver.until_counted(new=72, charged=72)
        await until_settled(driver)
        whole = cost(sum(quantities), len(quantities))
        assert await agree(http, driver) == {account: {"usd": whole} for account in accounts}
        assert await kept(driver) == dict.fromkeys(accounts, whole)
        found = (await ask(http, driver, "/api/v1/corrections?limit=100"))["corrections"]
        assert found
        assert {(each["kind"], each["state"], each["actor"]) for each in found} == {("settle", "done", "metering")}
        explained: dict[str, Decimal] = {}
        for place, account in enumerate(accounts):
            for number in range(len(quantities)):
                receipt = await ask(http, driver, f"/api/v1/receipts/demo/use-{100 * place + number}")
                (amount,) = receipt["amounts"]
                exact = sum(Decimal(item["exact"]) for item in receipt["items"])
                assert exact + Decimal(amount["rounding"]) == Decimal(amount["amount"])
                assert [each["kind"] for each in receipt["corrections"]] == ["settle"] * receipt["revision"]
                for item in receipt["items"]:
                    if item["tier"] == "settled":
                        assert (item["quantity"], item["price_id"]) == ("adjustment", "renders")
                        explained[account] = explained.get(account, Decimal(0)) + Decimal(item["exact"])
        said: dict[str, Decimal] = {}
        for each in found:
            of = each["parameters"]
            assert (of["price"], of["period"], of["unit"]) == ("renders", "2026-03-01T00:00:00+00:00", "usd")
            said[of["account"]] = said.get(of["account"], Decimal(0)) + Decimal(each["difference"]["usd"])
            events = (await ask(http, driver, f"/api/v1/corrections/{each['id']}/events"))["events"]
            assert sum(Decimal(event["difference"]["usd"]) for event in events) == Decimal(each["difference"]["usd"])
        assert said == explained
        refused = await http.post(
            f"/api/v1/corrections/{found[0]['id']}/undo", json={"reason": "no"}, headers=driver.headers("operator")
        )
        assert (refused.status_code, refused.json()["code"]) == (409, "settled")


async def test_no_more_is_given_back_than_what_counted_cost(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrying, "EVENTS_MAX", 3)
    free = [{"up_to": "100", "price": "1"}, {"up_to": None, "price": "0"}]
    async with driver.running() as http:
        await begin(http, driver, "acme-1", prices=falling(tiers=free))
        await driver.publish([render(number, 10) for number in range(10)])
        await driver.until_counted(new=10, charged=10)
        await driver.publish([render(11, 5)])
        await driver.until_counted(new=11, charged=11)
        await until_settled(driver)
        # The fees are nobody's to give back.
        assert await agree(http, driver) == {"acme-1": {"usd": Decimal("2.75")}}
        for number in (*range(10), 11):
            receipt = await ask(http, driver, f"/api/v1/receipts/demo/use-{number}")
            assert [each["amount"] for each in receipt["amounts"]] == ["0.25"]
        assert await driver.rows("SELECT quantity, credit FROM price_counters") == [(105, 0)]
        # Three events a transaction, each with a record of its own.
        found = (await ask(http, driver, "/api/v1/corrections"))["corrections"]
        assert [each["counts"]["corrected"] for each in found] == [1, 3, 3, 3]


async def test_use_that_cost_less_than_a_step_does_not_hide_what_can_be_given_back(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrying, "EVENTS_MAX", 1)
    steep = [{"up_to": "100", "price": "1"}, {"up_to": None, "price": "0.2"}]
    tiny = {"data": {"n": "0.000000001"}, "time": "2026-03-30T12:00:00Z"}
    async with driver.running() as http:
        await begin(http, driver, "acme-1", prices=falling(tiers=steep))
        await driver.publish([render(0, 60), render(1, 40)])
        await driver.until_counted(new=2, charged=2)
        # Both cost a fee, and under the price that has fallen a fifth of a step each: nothing to be given back.
        await driver.publish([render(2, 0) | tiny, render(3, 0) | tiny])
        await driver.until_counted(new=4, charged=4)
        await until_settled(driver)
        assert await agree(http, driver) == {"acme-1": {"usd": Decimal(20) + 4 * Decimal("0.25")}}


async def test_who_dies_before_the_commit_has_given_nothing_back(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone_on, deaths = settling.settle, 0

    async def dies(*arguments: Any, **more: Any) -> Any:
        nonlocal deaths
        settled = await gone_on(*arguments, **more)
        deaths += 1
        if deaths < 4:
            raise RuntimeError("killed")
        return settled

    monkeypatch.setattr(settling, "settle", dies)
    monkeypatch.setattr(Settler, "retry_seconds", 0.01)
    async with driver.running() as http, driver.running():
        await begin(http, driver, "acme-1")
        for number, n in enumerate((60, 40, 1)):
            await driver.publish([render(number, n)])
            await driver.until_counted(new=number + 1, charged=number + 1)
        await until_settled(driver)
        assert deaths >= 4
        assert await agree(http, driver) == {"acme-1": {"usd": cost(101, 3)}}
        (only,) = (await ask(http, driver, "/api/v1/corrections"))["corrections"]
        assert only["difference"] == {"usd": "-19.2"}


async def test_what_was_settled_since_is_undone_and_rerated_as_if_it_had_not_been(driver: Driver) -> None:
    async with driver.running() as http:
        await begin(http, driver, "acme-1")
        await add(http, driver, falling("plain", tiers=[{"up_to": None, "price": "0.5"}], days_before=-60))
        await driver.publish([render(number, 50) for number in (0, 1)])
        await driver.until_counted(new=2, charged=2)
        await correct(http, driver, {"id": "a", "kind": "amend", "events": [named(1)[0] | {"data": {"n": 49}}]})
        await driver.publish([render(2, 2)])
        await driver.until_counted(new=3, charged=3)
        await until_settled(driver)
        # It was given back of what had been amended.
        assert (await ask(http, driver, "/api/v1/receipts/demo/use-1"))["revision"] == 2
        assert (await agree(http, driver))["acme-1"]["usd"] == cost(101, 3)
        assert (await undo(http, driver, "a"))["counts"]["left"] == 0
        await until_settled(driver)
        assert (await agree(http, driver))["acme-1"]["usd"] == cost(102, 3)
        # Recounted in order of use it leaves nothing to be given back; twice is once.
        await rerate(http, driver, "r")
        assert await driver.rows("SELECT quantity, credit FROM price_counters") == [(102, 0)]
        assert (await agree(http, driver))["acme-1"]["usd"] == cost(102, 3)
        again = await rerate(http, driver, "again")
        assert (again["difference"], again["counts"]) == ({}, {"events": 3, "corrected": 0, "unchanged": 3})
        await rerate(http, driver, "plain", price_version="plain")
        assert (await agree(http, driver))["acme-1"]["usd"] == Decimal("51.75")
        assert (await undo(http, driver, "plain"))["counts"]["left"] == 0
        await until_settled(driver)
        assert (await agree(http, driver))["acme-1"]["usd"] == cost(102, 3)


async def test_a_correction_undone_after_more_use_leaves_what_all_costs(driver: Driver) -> None:
    async with driver.running() as http:
        await begin(http, driver, "acme-1")
        await driver.publish([render(number, 50) for number in (0, 1, 2)])
        await driver.until_counted(new=3, charged=3)
        await correct(http, driver, {"id": "v", "kind": "void", "events": named(0, 1)})
        await kept(driver)
        await driver.publish([render(3, 60)])
        await driver.until_counted(new=4, charged=2, voided=2)
        await kept(driver)
        await undo(http, driver, "v")
        await kept(driver)
        await until_settled(driver)
        assert await agree(http, driver) == {"acme-1": {"usd": cost(210, 4)}}


@pytest.mark.parametrize(
    ("tiers", "quantities", "whole"),
    [
        # What is left costs the higher price of the lower tier.
        (FALLS, (60, 41), cost(41, 1)),
        # What is left was paid for, and is what is free.
        ([{"up_to": "10", "price": "0"}, {"up_to": None, "price": "1"}], (60, 10), Decimal("0.25")),
    ],
)
async def test_a_void_charges_or_gives_back_what_the_rest_of_its_period_costs_more_or_less_and_undone_it_has_not(
    driver: Driver, tiers: Any, quantities: tuple[int, int], whole: Decimal
) -> None:
    async with driver.running() as http:
        await begin(http, driver, "acme-1", prices=falling(tiers=tiers))
        for number, n in enumerate(quantities):
            await driver.publish([render(number, n)])
            await driver.until_counted(new=number + 1, charged=number + 1)
        await until_settled(driver)
        before = await agree(http, driver)
        versions = [await ask(http, driver, f"/api/v1/receipts/demo/use-{number}") for number in (0, 1)]
        counters = await driver.rows("SELECT quantity, credit FROM price_counters")
        void = {"id": "v", "kind": "void", "events": named(0)}
        dry = await correct(http, driver, void, status=200, dry_run=True)
        done = await correct(http, driver, void)
        # Of what nobody used since, and at once.
        assert await agree(http, driver) == {"acme-1": {"usd": whole}}
        assert await driver.rows("SELECT quantity, credit FROM price_counters") == [(quantities[1], 0)]
        assert Decimal(done["difference"]["usd"]) == whole - before["acme-1"]["usd"]
        for said in ("difference", "counts", "accounts", "events"):
            assert dry[said] == done[said]
        assert done["counts"] == {"events": 1, "corrected": 1, "unchanged": 0, "settled": 1}
        assert [(each["id"], each["to_revision"] is None) for each in done["events"]] == [
            ("use-0", True), ("use-1", False),
        ]  # fmt: skip
        assert await correct(http, driver, void, status=200)
        receipt = await ask(http, driver, "/api/v1/receipts/demo/use-1")
        assert receipt["items"][-1] | {"quantity": "adjustment", "tier": "settled"} == receipt["items"][-1]
        assert receipt["corrections"][-1]["kind"] == "void"
        assert await agree(http, driver) == {"acme-1": {"usd": whole}}
        undone = await undo(http, driver, "v")
        assert undone["counts"] | {"undone": 2, "left": 0} == undone["counts"]
        assert await agree(http, driver) == before
        assert await driver.rows("SELECT quantity, credit FROM price_counters") == counters
        for number, was in enumerate(versions):
            restored = await ask(http, driver, f"/api/v1/receipts/demo/use-{number}")
            assert (restored["items"], restored["amounts"]) == (was["items"], was["amounts"])
        settled = (await ask(http, driver, "/api/v1/corrections"))["corrections"]
        assert [each["id"] for each in settled if each["kind"] != "settle"] == ["v"]


async def test_who_carries_what_a_void_raised_can_be_corrected_and_undone_in_any_order(driver: Driver) -> None:
    for order in ("av", "va"):
        async with driver.running() as http:
            account, first = f"acme-{order}", 10 * "av".index(order[0])
            a, b, c = first, first + 1, first + 2
            if not first:
                await add(http, driver, falling())
            await driver.open(account)
            await driver.until_open([account])
            await driver.publish([render(number, 40, account=account) for number in (a, b, c)])
            await driver.until("SELECT count(*)::int FROM usage_log WHERE revision = 0", 3 if not first else 6)
            await until_settled(driver)
            before = (await agree(http, driver))[account]
            amend = {"id": f"a{order}", "kind": "amend", "events": [named(c)[0] | {"data": {"n": 30}}]}
            await correct(http, driver, amend)
            await until_settled(driver)
            await correct(http, driver, {"id": f"v{order}", "kind": "void", "events": named(a)})
            assert (await agree(http, driver))[account] == {"usd": cost(70, 2)}
            for id in order:
                undone = await undo(http, driver, f"{id}{order}")
                # What carries the difference is not in the way, unless it is something else by now.
                assert undone["counts"]["left"] == (1 if (id, order) == ("v", "av") else 0)
                await kept(driver)
            await until_settled(driver)
            assert (await agree(http, driver))[account] == before


async def test_what_had_waited_for_a_price_is_counted_no_more_once_its_rerating_is_undone_whatever_came_since(
    driver: Driver,
) -> None:
    async with driver.running() as http:
        await add(http, driver, version("none"))
        await begin(http, driver, "acme-1", prices=falling(days_before=5))
        early = "2026-03-05T12:00:00Z"
        await driver.publish([render(number, 30) | {"time": early} for number in (0, 1)])
        await driver.publish([render(number, 30) for number in (2, 3)])
        await driver.until_counted(new=4, charged=2, unpriced=2)
        before = await agree(http, driver)
        await rerate(http, driver, "r", price_version="volume")
        await kept(driver)
        await driver.publish([render(4, 50)])
        await driver.until_counted(new=5, charged=5)
        await kept(driver)
        assert (await undo(http, driver, "r"))["counts"]["left"] == 0
        await kept(driver)
        await until_settled(driver)
        assert await agree(http, driver) == {"acme-1": {"usd": cost(110, 3)}}
        assert before == {"acme-1": {"usd": cost(60, 2)}}


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
async def test_whatever_is_corrected_meanwhile_what_is_charged_and_carried_is_what_all_costs(
    driver: Driver, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undoing, "EVENTS_MAX", seed)
    chance = random.Random(seed)
    accounts = ("acme-1", "acme-2")
    async with driver.running() as http, driver.running() as other:
        await begin(http, driver, *accounts)
        done: list[str] = []
        for turn in range(24):
            reported = 3 * turn
            uses = [
                render(reported + number, chance.randrange(1, 8), account=accounts[number % 2]) for number in range(3)
            ]
            await driver.publish(uses)
            await driver.until("SELECT sum(new)::int FROM ingest_counters", reported + 3)
            client, id = chance.choice((http, other)), f"c{turn}"
            numbers = chance.sample(range(reported + 3), 2)
            match chance.choice(["void", "amend", "undo", "rerate", "wait"]):
                case "void":
                    await correct(client, driver, {"id": id, "kind": "void", "events": named(*numbers)})
                    done.append(id)
                case "amend":
                    receipts = [await ask(client, driver, f"/api/v1/receipts/demo/use-{number}") for number in numbers]
                    events = [
                        each | {"data": {"n": chance.randrange(1, 16)}}
                        for each, receipt in zip(named(*numbers), receipts, strict=True)
                        if receipt["status"] != "void"
                    ]
                    if events:
                        await correct(client, driver, {"id": id, "kind": "amend", "events": events})
                        done.append(id)
                case "undo" if done:
                    await undo(client, driver, done.pop(chance.randrange(len(done))))
                case "rerate":
                    body = {
                        "kind": "rerate",
                        "account": "*",
                        "from": "2026-03-01T00:00:00Z",
                        "to": "2026-04-01T00:00:00Z",
                    }
                    await correct(client, driver, {"id": id, **body}, status=202)
                    await until(client, driver, id, "done")
                    done.append(id)
                case _:
                    await asyncio.sleep(1)
            await kept(driver)
        await until_settled(driver)
        await agree(http, driver)
        await kept(driver)


async def test_what_cannot_be_given_back_stays_and_holds_up_nothing(driver: Driver) -> None:
    async with driver.running() as http:
        await begin(http, driver, "acme-1", "acme-2")
        # As of a month whose use is archived.
        await driver.rows(
            "INSERT INTO price_counters VALUES (%s, 'acme-1', 'renders', '2026-02-01Z', 105, -5) RETURNING credit",
            partition_of("acme-1"),
        )
        await driver.publish([render(0, 100, account="acme-2")])
        await driver.until_counted(new=1, charged=1)
        await driver.publish([render(1, 1, account="acme-2")])
        await driver.until_counted(new=2, charged=2)
        left = "SELECT account, credit FROM price_counters WHERE credit < 0"
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (found := await driver.rows(left)) != [("acme-1", -5)]:
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)
        assert await agree(http, driver) == {"acme-2": {"usd": cost(101, 2)}}
