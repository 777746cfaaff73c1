"""Laws of reading: a hold past its deadline has ended, as it says itself, whether that has been recorded yet or not."""

import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from psycopg import AsyncConnection

from contracts import ledger as words
from contracts.money import Unit
from services.kit.ids import new_hold_id
from services.ledger.domain.commands import Units
from services.ledger.queries.balances import read_balance, read_posted_at
from services.ledger.queries.holds import read_hold, read_open_holds
from services.ledger.replay import replay
from services.ledger.translate import full_id
from tests.builders import hold_leg, place_hold
from tests.conftest import Database
from tests.eventually import eventually
from tests.integration.ledger.by_hand import BEGIN, HOUR, PARTITION, ROOT, Hand, granted, opened, placed, uuid
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio

UNITS = Units.of({"usd": Unit("usd", "money", 2)})
KEY = f"{ROOT}/key"
A, HOLD = uuid(1), uuid(20)


@pytest.fixture
async def hand(database: Database) -> AsyncIterator[Hand]:
    async with await AsyncConnection.connect(database.url("ledger").get_secret_value()) as connection:
        yield await Hand.take(connection)


async def told(client: httpx2.AsyncClient, holds: list[str]) -> dict[str, Any]:
    """All that is read of acme, but for the time of reading."""
    paths = ["/v1/balances/acme", "/v1/balances/acme/ana", "/v1/trees/acme", "/v1/holds?account=acme"]
    found = {}
    for path in (*paths, *(f"/v1/holds/{hold}" for hold in holds)):
        answer = await client.get(path)
        assert answer.status_code == 200, answer.text
        found[path] = answer.json()
        found[path].pop("as_of", None)
    return found


async def test_what_is_read_of_an_overdue_hold_is_the_same_before_and_after_the_sweep(
    driver: Driver, database: Database
) -> None:
    def sweeping(seconds: float) -> Driver:
        return replace(driver, settings=driver.settings.model_copy(update={"sweep_seconds": seconds}))

    open_hold, released, estimated = (new_hold_id("acme") for _ in range(3))
    async with sweeping(600.0).running() as client:
        began = time.monotonic()
        await driver.funded("acme", "10")
        cap_wallet = (words.WalletSpec(unit="usd_cap"),)
        await driver.accepted(words.OpenAccount(idempotency_key="ana", account="acme/ana", wallets=cap_wallet))
        cap = words.Grant(idempotency_key="cap", account="acme/ana", unit="usd_cap", amount="8")
        await driver.accepted(cap)
        await driver.accepted(place_hold(open_hold, hold_leg("usd", "1"), account="acme/ana", key="h0"))
        # What is told before they end is read before that, on a slow machine, too.
        await told(client, [open_hold])
        lifetime = math.ceil(4 * (time.monotonic() - began))
        passing = place_hold(released, hold_leg("usd", "2"), account="acme/ana", key="h1").model_copy(
            update={"lifetime_seconds": lifetime}
        )
        await driver.accepted(passing)
        done = await driver.accepted(
            passing.model_copy(
                update={
                    "hold": estimated,
                    "idempotency_key": "h2",
                    "overdue": "charge_estimate",
                    "legs": (hold_leg("usd", "3"),),
                }
            )
        )
        before = await told(client, [released, estimated])
        (held,) = before["/v1/balances/acme"]["wallets"]
        assert (held["posted"], held["held"], held["available"]) == ("10", "6", "4")
        ended = done.recorded_at + timedelta(seconds=lifetime)
        await eventually(lambda: datetime.now(tz=UTC) > ended, seconds=2 * lifetime)
        stored = await driver.dump()
        unswept = await told(client, [released, estimated])
        assert await driver.dump() == stored
        (money,) = unswept["/v1/balances/acme"]["wallets"]
        assert (money["posted"], money["held"], money["available"]) == ("7", "1", "6")
        (counted,) = unswept["/v1/balances/acme/ana"]["wallets"]
        assert (counted["posted"], counted["held"], counted["available"]) == ("5", "1", "4")
        for account in unswept["/v1/trees/acme"]["accounts"]:
            (of_tree,) = account["wallets"]
            (alone,) = unswept[f"/v1/balances/{account['account']}"]["wallets"]
            assert of_tree == {name: alone[name] for name in of_tree}
        assert [each["hold"] for each in unswept["/v1/holds?account=acme"]["holds"]] == [open_hold]
        for hold, status, estimate in ((released, "expired", "0"), (estimated, "estimated", "3")):
            view = unswept[f"/v1/holds/{hold}"]
            assert (view["status"], view["ended_at"]) == (status, view["expires_at"])
            assert {(each["held"], each["estimated"]) for each in view["wallets"]} == {("0", estimate)}
        # In the world the estimate was used up at the deadline, and not before.
        world = [
            (await client.get("/v1/balances/acme", params={"world_at": at.isoformat()})).json()["wallets"]
            for at in (done.recorded_at, datetime.now(tz=UTC))
        ]
        assert [each["posted"] for (each,) in world] == ["10", "7"]
    async with sweeping(0.05).running() as client:
        await driver.until("SELECT count(*) FROM holds WHERE status = 'placed'", 1)
        assert await told(client, [released, estimated]) == unswept
    assert replay(database.url("ledger_owner")).is_equal


@pytest.mark.parametrize(
    ("deadline", "read_at", "seen"),
    [
        (12, 11.9, ("15", "10", "5")),
        (12, 12, ("15", "0", "15")),
        # What it gave back was there until the lot ended.
        (12, 16, ("0", "0", "0")),
        (17, 16, ("10", "10", "0")),
        # What it gives back of a lot that has ended expires.
        (17, 17, ("0", "0", "0")),
    ],
)
async def test_what_an_overdue_hold_gives_back_lives_no_longer_than_its_lot(
    hand: Hand, deadline: float, read_at: float, seen: tuple[str, str, str]
) -> None:
    ends = BEGIN + 15 * HOUR
    expires_at = BEGIN + deadline * HOUR
    await hand.write(opened(ROOT, "usd"), opened(KEY), granted(ROOT, "usd", A, 1500, expires_at=ends))
    await hand.write(placed(HOLD, KEY, "usd", A, 1000, expires_at=expires_at))
    at = BEGIN + read_at * HOUR
    view = await read_balance(hand.connection, ROOT, units=UNITS, now=at)
    assert view is not None
    (wallet,) = view.wallets
    assert (wallet.posted, wallet.held, wallet.available) == seen
    is_open = at < expires_at
    found = await read_open_holds(hand.connection, ROOT, after=None, limit=9, units=UNITS, now=at)
    assert found is not None
    assert [each.account for each in found] == [KEY] * is_open
    hold = await read_hold(hand.connection, full_id("hold", PARTITION, HOLD), units=UNITS, now=at)
    assert hold is not None
    assert hold.status == ("placed" if is_open else "expired")
    # That of another account is none of its business.
    posted = await read_posted_at(hand.connection, KEY, world_at=at, units=UNITS, now=at)
    assert posted is not None
    assert posted.wallets == []
