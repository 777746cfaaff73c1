"""Laws of deciding: what overdue holds held is there for others at once, whether anybody swept or remembers them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from psycopg import AsyncConnection

from contracts import ledger as words
from contracts.money import Unit
from contracts.partition import partition_of
from services.kit.clock import now
from services.kit.database import Writer
from services.kit.ids import new_hold_id
from services.ledger import store
from services.ledger.domain.commands import (
    CatchUp,
    Command,
    Grant,
    Leg,
    OpenAccount,
    PlaceHold,
    ResolveHold,
    Units,
    WalletTerms,
)
from services.ledger.domain.state import NEVER
from services.ledger.handlers import CommandItem, Ledger, Replied, SweepItem
from services.ledger.replay import replay
from services.ledger.store import Needs, loading
from tests.builders import hold_leg, place_hold
from tests.conftest import Database
from tests.integration.ledger.driving import Driver, processed
from tests.unit.ledger.book import hold_id, line

pytestmark = pytest.mark.anyio

PARTITION = partition_of("acme")


@asynccontextmanager
async def unswept(driver: Driver) -> AsyncIterator[None]:
    settings = driver.settings.model_copy(update={"sweep_seconds": 600.0})
    async with replace(driver, settings=settings).running():
        yield


def hold_of(amount: str, account: str, *, key: str, seconds: int = 900) -> words.PlaceHold:
    placed = place_hold(new_hold_id("acme"), hold_leg("usd", amount), account=account, key=key)
    return placed.model_copy(update={"lifetime_seconds": seconds})


@pytest.mark.parametrize("is_remembered", [True, False])
async def test_a_hold_of_all_there_is_is_admitted_once_another_is_past_its_deadline(
    driver: Driver, database: Database, is_remembered: bool
) -> None:
    async with unswept(driver):
        await driver.funded("acme", "10")
        for account in ("acme/ana", "acme/bob"):
            await driver.accepted(words.OpenAccount(idempotency_key=account, account=account))
        await driver.accepted(hold_of("10", "acme/ana", key="first", seconds=2))
        refused = await driver.refused(hold_of("10", "acme/bob", key="second"))
        assert refused.code == "insufficient_funds"
        if is_remembered:
            await asyncio.sleep(2.1)
            await admitted(driver)
    if not is_remembered:
        await asyncio.sleep(2.1)
        async with unswept(driver):
            await admitted(driver)
    assert replay(database.url("ledger_owner")).is_equal


async def admitted(driver: Driver) -> None:
    stored = await written(driver)
    assert (await driver.refused(hold_of("11", "acme/bob", key="second"))).code == "insufficient_funds"
    assert await written(driver) == stored
    await driver.accepted(hold_of("10", "acme/bob", key="second"))
    assert await driver.rows("SELECT status FROM holds ORDER BY recorded_at") == [("expired",), ("placed",)]
    assert await driver.rows("SELECT posted, held FROM wallets") == [(10 * 10**9, 10 * 10**9)]


async def written(driver: Driver) -> dict[str, list[str]]:
    """All but who owns which partition: on a slow machine leases are lost and taken again."""
    return {table: rows for table, rows in (await driver.dump()).items() if table != "heads"}


@pytest.mark.parametrize("is_remembered", [True, False])
async def test_what_a_thousand_overdue_holds_held_is_there_at_once(
    driver: Driver, database: Database, is_remembered: bool
) -> None:
    async with owning(database) as owner:
        await owner.fund(holds=1_000)
        if is_remembered:
            await owner.hold_all(1_000)
    if not is_remembered:
        async with owning(database, epoch=2, hours=1) as owner:
            await owner.hold_all(1_000)
    assert await driver.rows("SELECT status, count(*) FROM holds GROUP BY 1 ORDER BY 1") == [
        ("expired", 1_000),
        ("placed", 1),
    ]
    assert replay(database.url("ledger_owner")).is_equal


async def test_many_who_are_refused_do_not_each_wait_for_the_end_of_the_same_overdue_holds(
    driver: Driver, database: Database
) -> None:
    async with owning(database) as owner:
        await owner.fund(holds=200)
        owner.clock += timedelta(hours=1)
        # Each by itself: they would take longer than a batch may.
        refused = await owner.ask(
            *(PlaceHold(hold=hold_id(), account="acme", legs=(Leg("usd", 201, 201),)) for _ in range(500))
        )
    assert {(each["status"], each["remaining"]["amount"]) for each in refused} == {("refused", "200")}
    assert await driver.rows("SELECT status, count(*) FROM holds GROUP BY 1") == [("expired", 200)]


async def test_holds_that_come_to_their_deadline_while_others_are_looked_for_are_not_missed(
    driver: Driver, database: Database
) -> None:
    async with owning(database) as owner:
        await owner.fund(holds=800)
    async with owning(database, epoch=2, hours=1) as owner:
        owner.earlier = [BEGIN]
        # What is refused is asked again; what is charged is not.
        (charged,) = await owner.ask(line("acme", ("usd", 800), at=owner.clock))
    assert charged["status"] == "accepted"
    assert await driver.rows("SELECT posted, held FROM lots") == [(0, 0)]


async def test_whose_clock_is_behind_the_record_misses_no_overdue_hold(driver: Driver, database: Database) -> None:
    async with owning(database) as owner:
        await owner.fund(holds=800)
        # Whoever owned it before had a clock that is ahead, and ended none of them.
        await driver.superuser.execute(
            "UPDATE heads SET recorded_at = %s WHERE partition = %s", [BEGIN + timedelta(hours=1), PARTITION]
        )
    async with owning(database, epoch=2) as owner:
        (charged,) = await owner.ask(line("acme", ("usd", 800), at=owner.clock))
    assert charged["status"] == "accepted"
    assert await driver.rows("SELECT posted, held FROM lots") == [(0, 0)]


BEGIN = datetime(2026, 7, 1, 12, tzinfo=UTC)


@dataclass
class Owner:
    """Who owns the partition, and its clock. `earlier`: what it shows before."""

    ledger: Ledger
    clock: datetime
    earlier: list[datetime] = field(default_factory=list)

    async def ask(self, *commands: Command) -> list[dict[str, Any]]:
        """Ask for commands in one batch."""
        items = [
            CommandItem(partition=PARTITION, principal="tester", key=str(uuid4()), body_hash=bytes(32), command=each)
            for each in commands
        ]
        replied = await processed(self.ledger, items)
        return [json.loads(each.body) for each in replied if isinstance(each, Replied)]

    async def fund(self, *, holds: int) -> None:
        """As many steps as there are holds of one each, by an account below: some hundreds."""
        await self.ask(
            OpenAccount(account="acme", wallets=(WalletTerms("usd"),)),
            OpenAccount(account="acme/ana"),
            Grant(account="acme", unit="usd", amount=holds),
        )
        for _ in range(0, holds, 200):
            # Those that end at the same time are read together.
            self.clock += timedelta(seconds=1)
            await self.ask(
                *(PlaceHold(hold=hold_id(), account="acme/ana", legs=(Leg("usd", 1, 1),)) for _ in range(200))
            )

    async def hold_all(self, amount: int) -> None:
        """An hour later that much is there, and not more."""
        self.clock += timedelta(hours=1)
        (refused,) = await self.ask(
            PlaceHold(hold=hold_id(), account="acme", legs=(Leg("usd", amount + 1, amount + 1),))
        )
        assert (refused["status"], refused["remaining"]["amount"]) == ("refused", str(amount))
        (accepted,) = await self.ask(PlaceHold(hold=hold_id(), account="acme", legs=(Leg("usd", amount, amount),)))
        assert accepted["status"] == "accepted"


@asynccontextmanager
async def owning(database: Database, *, epoch: int = 1, hours: int = 0) -> AsyncIterator[Owner]:
    writer = Writer(database.url("ledger"), name="test")
    units = Units({"usd": Unit("usd", "money", 0)})
    ledger = Ledger(
        writer=writer,
        units=units,
        now=lambda: owner.earlier.pop() if owner.earlier else owner.clock,
        on_committed=lambda _: None,
    )
    owner = Owner(ledger, BEGIN + timedelta(hours=hours))
    await ledger.take_over({PARTITION: epoch})
    try:
        yield owner
    finally:
        await writer.close()


async def test_open_holds_are_read_by_their_deadlines_some_at_a_time(
    driver: Driver, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with unswept(driver):
        await driver.funded("acme", "10")
        for place, seconds in enumerate((100, 200, 300, 4_000)):
            await driver.accepted(hold_of("1", "acme", key=f"h{place}", seconds=seconds))
    ((partition,),) = await driver.rows("SELECT DISTINCT partition FROM holds")
    found = await driver.rows("SELECT expires_at FROM holds ORDER BY expires_at")
    deadlines = [at for (at,) in found]
    ever, before = datetime.min.replace(tzinfo=UTC), deadlines[0] - timedelta(seconds=100)

    async def read(since: datetime, until: datetime) -> tuple[list[datetime], datetime]:
        needs = Needs(overdue={(partition, since, until)})
        async with await AsyncConnection.connect(database.url("ledger").get_secret_value()) as connection:
            loaded = await store.load(connection, needs)
        held = {row[1] for row in loaded.rows["hold_lots"]}
        assert held == {row[1] for row in loaded.rows["holds"]}
        return sorted(row[4] for row in loaded.rows["holds"]), loaded.unread_from[partition]

    assert await read(ever, before) == ([], deadlines[0])
    assert await read(ever, deadlines[1]) == (deadlines[:2], deadlines[2])
    assert await read(deadlines[2], deadlines[3]) == (deadlines[2:], NEVER)
    monkeypatch.setattr(loading, "OVERDUE_READ_MAX", 4)
    assert await read(ever, NEVER) == (deadlines, deadlines[3] + timedelta(microseconds=1))


async def test_what_is_swept_is_done_in_the_order_in_which_it_was_due(driver: Driver, database: Database) -> None:
    begin, hour = now().replace(microsecond=0), timedelta(hours=1)
    clock = [begin]
    units = Units({"usd": Unit("usd", "money", 0)})
    writer = Writer(database.url("ledger"), name="test")
    owner = Ledger(writer=writer, units=units, now=lambda: clock[0], on_committed=lambda _: None)
    await owner.take_over({PARTITION: 1})
    first, second = hold_id(), hold_id()
    for command in (
        OpenAccount(account="acme", wallets=(WalletTerms("usd"),)),
        Grant(account="acme", unit="usd", amount=10, expires_at=begin + 3 * hour),
        PlaceHold(hold=first, account="acme", legs=(Leg("usd", 4, 4),), lifetime_seconds=3_600),
        PlaceHold(hold=second, account="acme", legs=(Leg("usd", 3, 3),), lifetime_seconds=7_200),
    ):
        key = f"{type(command).__name__} {clock[0]}"
        asked = CommandItem(partition=PARTITION, principal="tester", key=key, body_hash=bytes(32), command=command)
        await processed(owner, [asked])
        clock[0] += timedelta(seconds=1)
    clock[0] = begin + 4 * hour
    for due in (
        ResolveHold(hold=first, account="acme"),
        ResolveHold(hold=second, account="acme"),
        CatchUp(account="acme"),
    ):
        await processed(owner, [SweepItem(PARTITION, due)])
    await writer.close()
    assert await driver.rows(
        "SELECT kind, posted, held FROM journal WHERE recorded_at > %s AND account = 'acme' AND unit IS NOT NULL"
        " AND (posted, held) <> (0, 0) ORDER BY batch, position",
        begin + 3 * hour,
    ) == [("hold_expired", 0, -4), ("hold_expired", 0, -3), ("lot_expired", -10, 0)]
    assert replay(database.url("ledger_owner")).is_equal
