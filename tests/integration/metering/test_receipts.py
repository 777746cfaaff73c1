"""Receipts explain what was charged to the last digit; own prices charge events of any type, once, in any order."""

import random
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

import httpx2
import pytest

from contracts.partition import partition_of
from services.kit.clock import now
from tests.integration.metering.driving import Driver, Json
from tests.unit.metering.building import NOON, event

pytestmark = pytest.mark.anyio

SINCE: Final = NOON - timedelta(days=20)
PLAIN: Final = [
    {"quantity": "input_tokens", "unit": "usd", "price": "2.5", "per": 1000000},
    {"quantity": "output_tokens", "unit": "usd", "price": "10", "per": 1000000},
    {"quantity": "cached_input_tokens", "unit": "usd", "price": "1.25", "per": 1000000},
    {"quantity": "calls", "unit": "calls", "price": "1", "per": 1},
]
TIERS: Final = [{"up_to": "10", "price": "1"}, {"up_to": None, "price": "0.3333333333"}]


def version(id: str = "r1", **more: Any) -> Json:
    own = {"type": "render", "unit": "usd", "quantity": "n"}
    return {
        "id": id,
        "effective_at": SINCE.isoformat(),
        "models": [{"provider": "openai", "model": "gpt-4o-mini", "rates": PLAIN}],
        "prices": [
            {"id": "graduated", "kind": "graduated", "tiers": TIERS, "period": "month", **own},
            {"id": "packages", "kind": "package", "price": "0.05", "per": 4, **own, "type": "page"},
            {"id": "volume", "kind": "volume", "tiers": TIERS, "period": "month", **own, "type": "search"},
        ],
        "markup": [{"unit": "usd", "percent": "12.5"}],
        "accounts": [{"account": "acme-2", "markup": []}],
        **more,
    }


def other(number: int, type: str, n: Any, *, account: str = "acme-1") -> Json:
    return event(number, type=type, subject=account) | {"data": {"n": n}}


async def add(http: httpx2.AsyncClient, driver: Driver, body: Json) -> None:
    answer = await http.post("/api/v1/price-book?backdate=true", json=body, headers=driver.headers("operator"))
    assert answer.status_code == 201, answer.text


async def ask(http: httpx2.AsyncClient, driver: Driver, path: str) -> httpx2.Response:
    return await http.get(path, headers=driver.headers("operator"))


async def receipt(http: httpx2.AsyncClient, driver: Driver, path: str) -> Json:
    answer = await ask(http, driver, f"/api/v1/receipts/{path}")
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    for item in found["items"]:
        assert Decimal(item["exact"]) * item["per"] == Decimal(item["count"]) * Decimal(item["price"])
    for amount in found["amounts"]:
        if amount["exact"] is not None:
            exact = sum(Decimal(item["exact"]) for item in found["items"] if item["unit"] == amount["unit"])
            assert Decimal(amount["exact"]) == exact
            assert exact + Decimal(amount["rounding"]) == Decimal(amount["amount"])
    return found


async def test_a_receipt_explains_a_call_to_the_last_digit(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1", "acme-2")
        await driver.until_open(["acme-1", "acme-2"])
        counts = {"cached_input_tokens": 33}
        for number in (1, 2):
            tokens = {"data_input_tokens": 101, "data_output_tokens": 1}
            await driver.publish([event(number, subject=f"acme-{number}", **tokens, data_counts=counts)])
        await driver.until_counted(new=2, charged=2)
        # 68 x 2.5 + 33 x 1.25 + 1 x 10 are 221.25 micro-dollars; and an eighth of it.
        found = await receipt(http, driver, "demo/use-1")
        assert found == await receipt(http, driver, "use-1")
        assert found == (await ask(http, driver, "/receipts/use-1")).json()
        assert found == (await ask(http, driver, "/api/v1/receipts?id=use-1&source=demo&account=acme-1")).json()
        assert (found["status"], found["account"], found["type"]) == ("charged", "acme-1", "scrip.model.used.v1")
        assert (found["price_version"], found["waits_for"], found["conflicts"]) == ("r1", None, 0)
        assert [(each["quantity"], each["count"], each["price"], each["exact"]) for each in found["items"]] == [
            ("input_tokens", 68, "2.5", "0.00017"),
            ("output_tokens", 1, "10", "0.00001"),
            ("cached_input_tokens", 33, "1.25", "0.00004125"),
            ("markup", "0.00022125", "12.5", "0.00002765625"),
        ]
        assert found["amounts"] == [
            {"unit": "usd", "amount": "0.000248906", "exact": "0.00024890625", "rounding": "-0.00000000025"},
            {"unit": "calls", "amount": "1", "exact": None, "rounding": None},
        ]
        line = (await driver.charged())["use-1"]
        assert found["bundle"] == {"partition": partition_of("acme-1"), "number": 1, "line": 1}
        assert [each.model_dump() for each in line.amounts] == [
            {"amount": "0.000248906", "unit": "usd"},
            {"amount": "1", "unit": "calls"},
        ]
        # Whose account has terms of its own pays no markup.
        assert (await receipt(http, driver, "demo/use-2"))["amounts"][0]["amount"] == "0.00022125"


async def test_a_receipt_says_what_waits_or_conflicts_and_nothing_of_what_never_came(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish([event(1, subject="acme-1", data_counts={"images": 2})])
        await driver.publish([event(2, subject="acme-9"), other(3, "unheard of", 1)])
        await driver.until_counted(new=3, unpriced=2, unattributed=1)
        image = await receipt(http, driver, "demo/use-1")
        assert (image["status"], image["waits_for"]) == ("unpriced", "openai/gpt-4o-mini images")
        assert (image["items"], image["amounts"], image["bundle"], image["price_version"]) == ([], [], None, None)
        waiting = await receipt(http, driver, "use-2")
        assert (waiting["status"], waiting["waits_for"]) == ("unattributed", "acme-9")
        assert (await receipt(http, driver, "use-3"))["waits_for"] == "type:unheard of"
        # Other contents under its id are kept apart.
        await driver.publish([event(1, subject="acme-1", data_output_tokens=7)])
        await driver.until_counted(new=3, unpriced=2, unattributed=1, conflicting=1)
        assert (await receipt(http, driver, "use-1"))["conflicts"] == 1
        # The same id for another account is another event, if it lives in another partition.
        await driver.publish([event(1, subject="other")])
        await driver.until_counted(new=4, unpriced=2, unattributed=2, conflicting=1)
        for path in ("/api/v1/receipts/use-1", "/api/v1/receipts/demo/use-1", "/api/v1/receipts?id=use-1"):
            answer = await ask(http, driver, path)
            assert (answer.status_code, answer.json()["code"]) == (409, "ambiguous")
            assert {each["account"] for each in answer.json()["errors"]} == {"acme-1", "other"}
            assert {each["source"] for each in answer.json()["errors"]} == {"demo"}
        assert (await receipt(http, driver, "demo/use-1?account=other"))["account"] == "other"
        for path in ("use-99", "demo/use-99", "nobody/use-1", "demo/a/b", "%00", "demo/%00"):
            answer = await ask(http, driver, f"/api/v1/receipts/{path}")
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_event")
        assert (await http.get("/api/v1/receipts/use-1")).status_code == 401
        # Once it has a price it is charged, once.
        soon = version("r2", models=[{"provider": "openai", "model": "gpt-4o-mini", "rates": [
            *PLAIN, {"quantity": "images", "unit": "usd", "price": "0.04", "per": 1}
        ]}])  # fmt: skip
        await add(http, driver, soon | {"effective_at": (SINCE + timedelta(days=1)).isoformat()})
        await driver.until_counted(new=4, unpriced=1, unattributed=2, conflicting=1, charged=1)
        charged = await receipt(http, driver, "demo/use-1?account=acme-1")
        assert (charged["status"], charged["price_version"]) == ("charged", "r2")
        assert [each["quantity"] for each in charged["items"]] == ["input_tokens", "output_tokens", "images", "markup"]


async def test_events_of_any_type_are_charged_by_their_period_whatever_the_order(driver: Driver) -> None:
    numbers = list(range(40))
    used = {number: random.Random(7).choices(range(5), k=40)[number] for number in numbers}
    events = [other(number, "render", used[number]) for number in numbers]
    random.Random(8).shuffle(events)
    async with driver.running() as http:
        await add(http, driver, version())
        # Some come before their account is open: they are counted as they are charged.
        await driver.publish(events[:15])
        await driver.until_counted(new=15, unattributed=15)
        await driver.open("acme-1")
        await driver.until_counted(new=15, charged=15)
        await driver.publish([*events[15:], *events[:20]])
        await driver.until_counted(new=40, charged=40, duplicate=20)
        total = sum(used.values())
        exact = 10 + (total - 10) * Decimal("0.3333333333")
        lines = await driver.charged()
        charged = sum(Decimal(line.amounts[0].amount) for line in lines.values())
        assert charged == round(exact, 9)
        assert await driver.rows("SELECT account, price_id, quantity, credit FROM price_counters") == [
            ("acme-1", "graduated", Decimal(total), 0)
        ]
        for number in numbers:
            found = await receipt(http, driver, f"demo/use-{number}")
            assert sum(Decimal(item["count"]) for item in found["items"]) == used[number]
            assert {item["price_id"] for item in found["items"]} <= {"graduated"}


async def test_packages_and_falling_volume_prices_are_charged_as_their_receipts_say(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        for each in (other(1, "page", 9), other(2, "search", 10), other(3, "search", 1), other(4, "search", 100)):
            await driver.publish([each])
            await driver.until(
                "SELECT count(*) FROM usage_log WHERE bundle_number IS NOT NULL", int(each["id"].removeprefix("use-"))
            )
        pages = await receipt(http, driver, "use-1")
        assert [(each["quantity"], each["count"], each["tier"], each["exact"]) for each in pages["items"]] == [
            ("n", 3, "packages of 4", "0.15")
        ]
        amounts = {
            number: (await receipt(http, driver, f"use-{number}"))["amounts"][0]["amount"] for number in (2, 3, 4)
        }
        # 10 at 1; 11 at a third would be 3.67, so nothing and a credit; 111 at a third are 37, less the 10 there are.
        assert amounts == {2: "10", 3: "0", 4: "26.999999996"}
        credited = await receipt(http, driver, "use-3")
        assert [each["quantity"] for each in credited["items"]] == ["n", "adjustment", "carried"]
        assert await driver.rows("SELECT quantity, credit FROM price_counters WHERE price_id = 'volume'") == [
            (Decimal(111), 0)
        ]


async def test_what_a_version_says_besides_is_stored_shown_and_compared(driver: Driver) -> None:
    soon = now() + timedelta(hours=1)
    body = version() | {"effective_at": soon.isoformat()}
    async with driver.running() as http:
        dry = await http.post("/api/v1/price-book?dry_run=true", json=body, headers=driver.headers("operator"))
        others = ["accounts/acme-2", "markup", "prices/graduated", "prices/packages", "prices/volume"]
        assert dry.json()["others"] == others
        await add(http, driver, body)
        again = await http.post("/api/v1/price-book", json=body, headers=driver.headers("operator"))
        assert (again.status_code, again.json()["unchanged"], again.json()["others"]) == (200, True, [])
        changed = await http.post("/api/v1/price-book", json=body | {"markup": []}, headers=driver.headers("operator"))
        assert (changed.status_code, changed.json()["code"]) == (409, "version_exists")
    # Another process reads what was stored.
    async with driver.running() as http:
        (shown,) = (await ask(http, driver, "/api/v1/price-book?version=r1")).json()["versions"]
        assert (shown["markup"], shown["accounts"]) == (body["markup"], body["accounts"])
        assert [each["id"] for each in shown["prices"]] == ["graduated", "packages", "volume"]
        assert shown["models"][0]["rates"] == PLAIN
        other_count = body | {"id": "r9", "effective_at": (soon + timedelta(hours=1)).isoformat()}
        other_count["prices"] = [other_count["prices"][0] | {"quantity": "m"}]
        refused = await http.post("/api/v1/price-book", json=other_count, headers=driver.headers("operator"))
        assert (refused.status_code, refused.json()["code"]) == (409, "counted_otherwise")


async def test_a_receipt_follows_an_event_to_the_account_its_subject_stands_for(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish([event(1, subject="Acme GmbH"), event(2, subject="acme-1")])
        await driver.until_counted(new=2, unmapped=1, charged=1)
        waiting = await receipt(http, driver, "use-1")
        assert (waiting["status"], waiting["waits_for"], waiting["subject"]) == ("unmapped", "Acme GmbH", "Acme GmbH")
        assert (waiting["account"], waiting["items"]) == (None, [])
        alias = await http.put(
            "/api/v1/aliases/Acme%20GmbH", json={"account": "acme-1"}, headers=driver.headers("operator")
        )
        assert alias.status_code == 201, alias.text
        assert partition_of("Acme GmbH") != partition_of("acme-1")
        await driver.until("SELECT count(*) FROM usage_log WHERE bundle_number IS NOT NULL", 2)
        charged = await receipt(http, driver, "demo/use-1")
        assert (charged["status"], charged["subject"], charged["account"]) == ("charged", "Acme GmbH", "acme-1")
        assert charged["bundle"]["partition"] == partition_of("acme-1")
