"""Corrections and the ledger itself: what was given back is back, and both have the same of everybody, always."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import httpx2
import pytest

from services.kit.settings import ServiceSettings
from services.ledger.app import build
from services.ledger.settings import LedgerSettings
from tests.integration.metering.correcting import add, agree, correct, metered, named, undo, until, version
from tests.integration.metering.driving import WAIT_SECONDS_MAX, Driver, Json
from tests.integration.metering.test_backfilling import stage
from tests.unit.metering.building import event

pytestmark = pytest.mark.anyio

ACCOUNTS: Final = ("acme-1", "acme-2", "acme-2/ana")
GRANTED: Final = Decimal(10)
PERIOD: Final = {"from": "2026-03-01T00:00:00Z", "to": "2026-04-01T00:00:00Z"}


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger's HTTP API."""

    http: httpx2.AsyncClient
    keys: "itertools.count[int]"

    async def command(self, path: str, body: Json) -> None:
        headers = {"Idempotency-Key": f"key-{next(self.keys)}"}
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        # Until it owns its partitions.
        while (answer := await self.http.post(path, json=body, headers=headers)).status_code == 503:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert answer.is_success, answer.text

    async def left(self) -> dict[str, Decimal]:
        """What is left of what was granted."""
        found = {}
        for account in ("acme-1", "acme-2"):
            wallets = (await self.http.get(f"/v1/balances/{account}")).json()["wallets"]
            found[account] = next(Decimal(each["posted"]) for each in wallets if each["unit"] == "usd")
        return found

    async def settled(self, wanted: dict[str, Decimal]) -> None:
        """Wait until so much is left."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (found := await self.left()) != wanted:
            assert time.monotonic() < deadline, f"{found}, not {wanted}"
            await asyncio.sleep(0.05)


@pytest.fixture
async def ledger(driver: Driver, service_settings: Callable[[str], ServiceSettings]) -> AsyncIterator[Ledger]:
    app = build(LedgerSettings(**service_settings("ledger").model_dump()))
    headers = {"Authorization": f"Bearer {driver.tokens['operator']}"}
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=app), base_url="http://ledger", headers=headers, timeout=20
        ) as http,
    ):
        made = Ledger(http, itertools.count())
        for account in ACCOUNTS:
            wallets = [{"unit": "usd"}] if "/" not in account else []
            await made.command("/v1/accounts", {"account": account, "wallets": wallets})
        for account in ("acme-1", "acme-2"):
            grant = {"account": account, "unit": "usd", "amount": str(GRANTED), "kind": "purchase"}
            await made.command("/v1/grants", grant)
        yield made


async def both(http: httpx2.AsyncClient, driver: Driver, ledger: Ledger) -> dict[str, Decimal]:
    """What is left, when the ledger has done all; it is what metering's queries say, and the outbox."""
    await agree(http, driver)
    charged = await metered(http, driver)
    used = {
        root: sum(
            (of.get("usd", Decimal(0)) for account, of in charged.items() if account.split("/")[0] == root), Decimal(0)
        )
        for root in ("acme-1", "acme-2")
    }
    await ledger.settled({root: GRANTED - usd for root, usd in used.items()})
    dead = await driver.rows("SELECT count(*) FROM outbox")
    assert dead
    letters = (await ledger.http.get("/dead-letters")).json()
    assert letters["dead_letters"] == [], letters
    for root, usd in used.items():
        totals = (await ledger.http.get(f"/v1/totals/{root}")).json()["units"]
        (money,) = [each for each in totals if each["unit"] == "usd"]
        assert Decimal(money["charged"]) - Decimal(money["reversed"]) == usd, money
    return await ledger.left()


def data(input_tokens: int) -> Json:
    return {"provider": "openai", "model": "gpt-4o-mini", "input_tokens": input_tokens, "output_tokens": 1}


async def test_balances_follow_every_correction_and_its_undoing(driver: Driver, ledger: Ledger) -> None:
    async with driver.running() as http:
        await add(http, driver, version(usd={"input_tokens": "1000", "output_tokens": "2000"}))
        await add(http, driver, version("dear", days_before=-5, usd={"input_tokens": "3000", "output_tokens": "1"}))
        await driver.until_open(ACCOUNTS)
        await driver.publish([event(number, subject=ACCOUNTS[number % 3]) for number in range(30)])
        await driver.until_counted(new=30, charged=30)
        start = await both(http, driver, ledger)
        # Void: all of it is back.
        await correct(http, driver, {"id": "v", "kind": "void", "events": named(*range(0, 30, 3))})
        assert await both(http, driver, ledger) == start | {"acme-1": GRANTED}
        await undo(http, driver, "v")
        assert await both(http, driver, ledger) == start
        # Amend up, and down, and the same use again and again.
        for step, tokens in enumerate((900, 10, 400)):
            body = [named(1)[0] | {"data": data(tokens)}]
            await correct(http, driver, {"id": f"a{step}", "kind": "amend", "events": body})
            expected = start["acme-2"] + (Decimal(103) - tokens - 2) / 1000
            assert (await both(http, driver, ledger))["acme-2"] == expected
        amended = await both(http, driver, ledger)
        # Re-rated twice is once; undone it is as before.
        for id in ("r1", "r2"):
            rerated = {"id": id, "kind": "rerate", "account": "*", **PERIOD, "price_version": "dear"}
            await correct(http, driver, rerated, status=202)
            await until(http, driver, id, "done")
            dear = await both(http, driver, ledger)
            assert dear["acme-1"] < amended["acme-1"]
        assert (await until(http, driver, "r2", "done"))["difference"] == {}
        await undo(http, driver, "r1")
        assert await both(http, driver, ledger) == amended
        # A backfill that replaces what the period holds of a tree.
        backfill: dict[str, Any] = {"kind": "backfill", "account": "acme-2", "tree": True, "replace": True, **PERIOD}
        await correct(http, driver, {"id": "b", **backfill})
        staged = [event(number, subject="acme-2/ana") for number in (2, 100, 101)] + [event(1, subject="acme-2")]
        await stage(http, driver, "b", staged)
        answer = await http.post("/api/v1/corrections/b/apply", headers=driver.headers("operator"))
        assert answer.status_code == 202
        await until(http, driver, "b", "done")
        cost = Decimal(sum(100 + 3 * number for number in (1, 2, 100, 101))) / 1000
        assert await both(http, driver, ledger) == amended | {"acme-2": GRANTED - cost}
        await undo(http, driver, "b")
        assert await both(http, driver, ledger) == amended
        for step in (2, 1, 0):
            await undo(http, driver, f"a{step}")
        assert await both(http, driver, ledger) == start


async def test_what_a_price_has_lowered_is_back_in_the_wallet(driver: Driver, ledger: Ledger) -> None:
    tiers = [{"up_to": "10", "price": "0.1"}, {"up_to": None, "price": "0.05"}]
    price = {"id": "renders", "type": "render", "unit": "usd", "kind": "volume", "tiers": tiers, "period": "month"}
    async with driver.running() as http:
        await add(http, driver, version() | {"prices": [price]})
        await driver.until_open(ACCOUNTS)
        for number in range(11):
            await driver.publish([event(number, type="render", subject="acme-1") | {"data": {}}])
            await driver.until_counted(new=number + 1, charged=number + 1)
        # Eleven at 0.05, and not ten at 0.1.
        await ledger.settled({"acme-1": GRANTED - Decimal("0.55"), "acme-2": GRANTED})
        assert (await both(http, driver, ledger))["acme-1"] == GRANTED - Decimal("0.55")


async def test_whatever_is_corrected_at_once_both_have_the_same(driver: Driver, ledger: Ledger) -> None:
    chance = random.Random(5)
    async with driver.running() as http, driver.running() as other:
        await add(http, driver, version(usd={"input_tokens": "1000", "output_tokens": "2000"}))
        await add(http, driver, version("dear", days_before=-5, usd={"input_tokens": "3000", "output_tokens": "1"}))
        await driver.until_open(ACCOUNTS)
        await driver.publish([event(number, subject=ACCOUNTS[number % 3]) for number in range(40)])
        await driver.until_counted(new=40, charged=40)

        async def ask_for(client: httpx2.AsyncClient, path: str, body: Json) -> None:
            answer = await client.post(
                f"/api/v1/corrections{path}", json={"reason": "a test", **body}, headers=driver.headers("operator")
            )
            assert answer.status_code < 500, answer.text

        for turn in range(6):
            numbers = chance.sample(range(40), 5)
            amended = [each | {"data": data(chance.randrange(900))} for each in named(*chance.sample(range(40), 5))]
            more = [event(40 + 10 * turn + number, subject=ACCOUNTS[number % 3]) for number in range(10)]
            rerated = {"kind": "rerate", "account": "*", **PERIOD, "price_version": chance.choice(["dear", "v1"])}
            await asyncio.gather(
                ask_for(http, "", {"id": f"v{turn}", "kind": "void", "events": named(*numbers)}),
                ask_for(other, "", {"id": f"a{turn}", "kind": "amend", "events": amended}),
                ask_for(chance.choice([http, other]), "", {"id": f"r{turn}", **rerated}),
                driver.publish(more),
            )
            await asyncio.gather(
                *(ask_for(other, f"/{chance.choice('var')}{chance.randrange(turn + 1)}/undo", {}) for _ in range(2))
            )
        deadline = time.monotonic() + 3 * WAIT_SECONDS_MAX
        while await driver.rows("SELECT FROM corrections WHERE state IN ('running', 'undoing')"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await driver.until("SELECT sum(new)::int FROM ingest_counters", 100)
        await both(http, driver, ledger)
