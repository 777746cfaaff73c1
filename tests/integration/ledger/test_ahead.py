"""Laws of deciding ahead: while a batch commits the next is decided on it, and is nothing if that is not committed."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from contracts.metering import ChargeLine
from contracts.money import Unit
from contracts.streams import charges_rated_subject
from services.ledger import store
from services.ledger.audit_sql import audit
from services.ledger.domain.commands import Grant, OpenAccount, Units, WalletTerms
from services.ledger.handlers import BundleItem, Ledger, NotOwner, OutOfOrder, Replied, Result, Taken
from services.ledger.replay import replay
from services.ledger.translate import read_bundle
from tests.builders import charge_line, charges_rated
from tests.conftest import Database
from tests.eventually import eventually
from tests.integration.ledger.driving import Driver
from tests.integration.ledger.test_owners import PARTITION, item, ledger

pytestmark = pytest.mark.anyio

UNITS = Units({"usd": Unit("usd", "money", 9)})
FUNDED = 1_000 * 10**9
TAKEN = Taken(repeated=False, traced=[])


@dataclass(slots=True)
class Gate:
    """Commits wait here, or fail here. `arrived` counts those that have come so far."""

    may_commit: asyncio.Event = field(default_factory=asyncio.Event)
    failures: list[Exception] = field(default_factory=list)
    arrived: int = 0

    async def write(self, *arguments: Any) -> None:
        self.arrived += 1
        *_, sent = arguments
        # As when the server has it all, and nothing has come back.
        sent()
        await self.may_commit.wait()
        if self.failures:
            raise self.failures.pop(0)
        await WRITE(*arguments)


WRITE = store.write


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(store, "write", gate.write)
    return gate


@pytest.fixture
async def owner(database: Database, gate: Gate) -> AsyncIterator[Ledger]:
    """Owns the partition, has an account with money in memory, and from here on commits wait."""
    gate.may_commit.set()
    async with ledger(database) as (owner, _):
        assert await owner.take_over({PARTITION: 1}) == {PARTITION}
        opening = OpenAccount(account="acme", wallets=(WalletTerms("usd"),))
        replies = await owner.process([item(opening, "1"), item(Grant(account="acme", unit="usd", amount=FUNDED), "2")])
        assert all(isinstance(reply, Replied) for reply in replies)
        gate.may_commit.clear()
        gate.arrived = 0
        yield owner


def bundle(number: int, *lines: ChargeLine) -> BundleItem:
    """The bundle with that number, of one line of a dollar if none are given."""
    chosen = lines or (charge_line(f"event-{number}"),)
    subject = charges_rated_subject(PARTITION)
    body = charges_rated(*chosen, number=number).model_dump_json().encode()
    return BundleItem(read_bundle(subject, body, UNITS), "CHARGES", number, subject)


def begin(owner: Ledger, *batches: Sequence[BundleItem]) -> tuple[list[asyncio.Task[list[Result]]], list[int]]:
    """Process batches at once, and which of them had others decided while they committed, in that order."""
    went_on: list[int] = []

    def process(number: int, batch: Sequence[BundleItem]) -> asyncio.Task[list[Result]]:
        return asyncio.create_task(owner.process(batch, lambda: went_on.append(number)))

    return [process(number, batch) for number, batch in enumerate(batches)], went_on


async def test_a_batch_is_decided_on_one_that_commits_and_neither_is_answered_before(
    driver: Driver, database: Database, owner: Ledger, gate: Gate
) -> None:
    before = await driver.dump()
    tasks, went_on = begin(owner, [bundle(1)], [bundle(2), bundle(3)], [bundle(4)])
    await eventually(lambda: gate.arrived == 1 and went_on == [0])
    await asyncio.sleep(0.05)
    # The others have been decided, or they would not be in order below; but only one commits at a time.
    assert gate.arrived == 1
    assert not any(task.done() for task in tasks)
    assert await driver.dump() == before
    gate.may_commit.set()
    assert await asyncio.gather(*tasks) == [[TAKEN], [TAKEN, TAKEN], [TAKEN]]
    assert gate.arrived == 3
    assert await driver.rows("SELECT posted FROM wallets") == [(FUNDED - 4 * 10**9,)]
    assert await driver.rows("SELECT number, batch FROM bundles ORDER BY number") == [(1, 2), (2, 3), (3, 3), (4, 4)]
    assert not any(check.breaches for check in await asyncio.to_thread(audit, database.url("ledger")))
    assert (await asyncio.to_thread(replay, database.url("ledger_owner"))).is_equal


async def test_what_was_decided_on_a_batch_that_is_not_committed_is_decided_again(
    driver: Driver, database: Database, owner: Ledger, gate: Gate
) -> None:
    before = await driver.dump()
    gate.failures.append(psycopg.OperationalError("the connection is lost"))
    tasks, _ = begin(owner, [bundle(1)], [bundle(2)])
    await eventually(lambda: gate.arrived == 1)
    gate.may_commit.set()
    lost, waiting = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(lost, psycopg.OperationalError)
    # On what is stored it is too early; had it been written, its number would be the last that was taken.
    assert waiting == [OutOfOrder(1)]
    assert await driver.dump() == before
    assert await owner.process([bundle(1), bundle(2)]) == [TAKEN, TAKEN]
    assert await driver.rows("SELECT posted FROM wallets") == [(FUNDED - 2 * 10**9,)]
    assert not any(check.breaches for check in await asyncio.to_thread(audit, database.url("ledger")))
    assert (await asyncio.to_thread(replay, database.url("ledger_owner"))).is_equal


async def test_one_that_is_given_up_while_it_waits_takes_with_it_what_was_decided_on_it(
    driver: Driver, owner: Ledger, gate: Gate
) -> None:
    tasks, _ = begin(owner, [bundle(1)], [bundle(2)], [bundle(3)])
    await eventually(lambda: gate.arrived == 1)
    await asyncio.sleep(0.05)
    tasks[1].cancel()
    gate.may_commit.set()
    first, gone, third = await asyncio.gather(*tasks, return_exceptions=True)
    assert first == [TAKEN]
    assert isinstance(gone, asyncio.CancelledError)
    assert third == [OutOfOrder(2)]
    assert await driver.rows("SELECT posted FROM wallets") == [(FUNDED - 10**9,)]
    assert await owner.process([bundle(2), bundle(3)]) == [TAKEN, TAKEN]
    assert await driver.rows("SELECT posted FROM wallets") == [(FUNDED - 3 * 10**9,)]


async def test_a_line_that_commits_in_the_batch_before_is_charged_once(
    driver: Driver, owner: Ledger, gate: Gate
) -> None:
    again = charge_line("event-1")
    tasks, _ = begin(owner, [bundle(1)], [bundle(2, again, charge_line("other"))], [bundle(3)])
    await eventually(lambda: gate.arrived == 1)
    gate.may_commit.set()
    assert await asyncio.gather(*tasks) == [[TAKEN], [TAKEN], [TAKEN]]
    assert await driver.rows("SELECT posted FROM wallets") == [(FUNDED - 3 * 10**9,)]
    assert await driver.rows("SELECT number, lines, lines_dead FROM bundles ORDER BY number") == [
        (1, 1, 0),
        (2, 2, 0),
        (3, 1, 0),
    ]


async def test_nothing_of_either_is_committed_once_another_owns_the_partition(
    driver: Driver, database: Database, owner: Ledger, gate: Gate
) -> None:
    tasks, _ = begin(owner, [bundle(1)], [bundle(2)])
    await eventually(lambda: gate.arrived == 1)
    async with ledger(database) as (second, _):
        assert await second.take_over({PARTITION: 2}) == {PARTITION}
        before = await driver.dump()
        gate.may_commit.set()
        assert await asyncio.gather(*tasks) == [[NotOwner()], [NotOwner()]]
        assert await driver.dump() == before
        assert await second.process([bundle(1)]) == [TAKEN]


async def test_ownership_is_taken_only_when_nothing_is_on_its_way(driver: Driver, owner: Ledger, gate: Gate) -> None:
    tasks, _ = begin(owner, [bundle(1)], [bundle(2)])
    await eventually(lambda: gate.arrived == 1)
    taking = asyncio.create_task(owner.take_over({PARTITION: 2}))
    await asyncio.sleep(0.05)
    assert not taking.done()
    gate.may_commit.set()
    assert await asyncio.gather(*tasks) == [[TAKEN], [TAKEN]]
    assert await taking == {PARTITION}
    assert await owner.process([bundle(3)]) == [TAKEN]
    assert await driver.rows("SELECT posted FROM wallets") == [(FUNDED - 3 * 10**9,)]
