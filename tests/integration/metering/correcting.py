"""What tests of corrections do beyond driving metering: ask for corrections, and keep the books the ledger would."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

import httpx2

from services.metering.store import COUNTERS
from tests.integration.metering.driving import WAIT_SECONDS_MAX, Driver, Json
from tests.unit.metering.building import NOON

PER_MILLION: Final = {"input_tokens": "1", "output_tokens": "2"}


def version(id: str = "v1", *, days_before: int = 20, usd: Mapping[str, str] | None = None, **more: Any) -> Json:
    """A price version: usd per million tokens, and a count of calls."""
    rates = [
        {"quantity": quantity, "unit": "usd", "price": price, "per": 1_000_000}
        for quantity, price in (PER_MILLION if usd is None else usd).items()
    ]
    return {
        "id": id,
        "effective_at": (NOON - timedelta(days=days_before)).isoformat(),
        "models": [
            {
                "provider": "openai",
                "model": "gpt-4o-mini",
                "rates": [*rates, {"quantity": "calls", "unit": "calls", "price": "1", "per": 1}],
            }
        ],
        **more,
    }


async def add(http: httpx2.AsyncClient, driver: Driver, body: Json) -> None:
    """Store a price version."""
    answer = await http.post("/api/v1/price-book?backdate=true", json=body, headers=driver.headers("operator"))
    assert answer.status_code == 201, answer.text


async def ask(http: httpx2.AsyncClient, driver: Driver, path: str) -> Json:
    """What stands at a path."""
    answer = await http.get(path, headers=driver.headers("operator"))
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


async def correct(
    http: httpx2.AsyncClient, driver: Driver, body: Json, *, status: int = 201, dry_run: bool = False
) -> Json:
    """Ask for a correction."""
    answer = await http.post(
        f"/api/v1/corrections?dry_run={str(dry_run).lower()}",
        json={"reason": "a test", **body},
        headers=driver.headers("operator"),
    )
    assert answer.status_code == status, answer.text
    found: Json = answer.json()
    return found


async def until(http: httpx2.AsyncClient, driver: Driver, id: str, state: str) -> Json:
    """Wait until a correction has that state."""
    deadline = asyncio.get_running_loop().time() + WAIT_SECONDS_MAX
    while (found := await ask(http, driver, f"/api/v1/corrections/{id}"))["state"] != state:
        assert asyncio.get_running_loop().time() < deadline, found
        await asyncio.sleep(0.05)
    return found


async def undo(http: httpx2.AsyncClient, driver: Driver, id: str) -> Json:
    """Undo a correction."""
    path, body = f"/api/v1/corrections/{id}/undo", {"reason": "a mistake"}
    dry = await http.post(f"{path}?dry_run=true", json=body, headers=driver.headers("operator"))
    assert dry.status_code == 200, dry.text
    answer = await http.post(path, json=body, headers=driver.headers("operator"))
    assert answer.status_code == 202, answer.text
    again = await http.post(path, json=body, headers=driver.headers("operator"))
    assert again.status_code == 200, again.text
    return await until(http, driver, id, "undone")


def named(*numbers: int, **more: Any) -> list[Json]:
    """Events of the builder, by number."""
    return [{"source": "demo", "id": f"use-{number}", **more} for number in numbers]


async def books(driver: Driver) -> dict[str, dict[str, Decimal]]:
    """What a ledger has of each account that takes the outbox as the contract says; it refuses what it must."""
    lines: dict[tuple[int, str, str, int], tuple[str, dict[str, Decimal]]] = {}
    last: dict[int, int] = {}
    for bundle in await driver.bundles():
        assert bundle.number == last.get(bundle.partition, 0) + 1
        last[bundle.partition] = bundle.number
        for back in bundle.reversals:
            account, left = lines[bundle.partition, back.source, back.event_id, back.revision]
            assert account == back.account
            for each in back.amounts:
                assert 0 < Decimal(each.amount) <= left[each.unit], "more is given back than was charged"
                left[each.unit] -= Decimal(each.amount)
        for line in bundle.lines:
            key = (bundle.partition, line.source, line.event_id, line.revision)
            assert key not in lines, "a line is charged twice"
            assert line.revision == 0 or line.hold is None
            lines[key] = (line.account, {each.unit: Decimal(each.amount) for each in line.amounts})
    found: dict[str, dict[str, Decimal]] = {}
    for account, amounts in lines.values():
        of = found.setdefault(account, {})
        for unit, amount in amounts.items():
            of[unit] = of.get(unit, Decimal(0)) + amount
    return {account: {unit: n for unit, n in of.items() if n} for account, of in found.items() if any(of.values())}


async def metered(http: httpx2.AsyncClient, driver: Driver) -> dict[str, dict[str, Decimal]]:
    """What metering's own queries say that each account was charged."""
    found: dict[str, dict[str, Decimal]] = {}
    after = ""
    while True:
        page = await ask(
            http,
            driver,
            f"/api/v1/usage?account=*&from=2026-02-15T00:00:00Z&to=2026-04-30T00:00:00Z&group_by=account{after}",
        )
        for row in page["usage"]:
            amounts = {unit: Decimal(amount) for unit, amount in row["amounts"].items() if Decimal(amount)}
            if amounts:
                found[row["account"]] = amounts
        if page["next_after"] is None:
            return found
        after = f"&after={page['next_after']}"


async def agree(http: httpx2.AsyncClient, driver: Driver) -> dict[str, dict[str, Decimal]]:
    """What the ledger has is what metering's queries say, to the step; and the counters add up."""
    found = await books(driver)
    assert found == await metered(http, driver)
    counters = await driver.counters()
    assert counters["new"] == sum(
        counters[name] for name in ("charged", "unattributed", "unpriced", "unmapped", "voided")
    )
    assert set(COUNTERS) == set(counters)
    return found
