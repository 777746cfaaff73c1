"""Laws of repeats: what is not looked up beforehand is carried out once all the same, and answered as it ever was."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import msgspec
import psycopg
import pytest

from contracts import ledger as words
from contracts.money import Amount, Unit
from contracts.partition import partition_of
from services.kit.clock import now
from services.kit.database import Writer
from services.kit.ids import new_hold_id
from services.ledger import store
from services.ledger.audit_sql import audit
from services.ledger.domain.commands import (
    ChargeLine,
    Command,
    ExtendHold,
    Grant,
    Leg,
    OpenAccount,
    PlaceHold,
    ReleaseHold,
    Units,
    WalletTerms,
)
from services.ledger.handlers import CommandItem, Item, Ledger, ListItem, NotLookedUp, Replied
from services.ledger.replay import replay
from services.ledger.translate import WHEN_RECORDED
from tests.builders import grant, hold_leg, open_account, place_hold, release_hold
from tests.conftest import Database
from tests.eventually import eventually
from tests.integration.ledger.driving import Driver, processed
from tests.unit.ledger.book import hold_id

pytestmark = pytest.mark.anyio

UNITS = Units({"usd": Unit("usd", "money", 9)})
ROOT, LOOKED_UP = "acme", "other"
DOLLAR = 10**9


def item(command: Command, key: str, *, body: int = 0, dry_run: bool = False, look_up: bool = False) -> CommandItem:
    """A command under a key; `body` says which of those that look alike it is."""
    assert not isinstance(command, ListItem)
    return CommandItem(
        partition=partition_of(command.account),
        principal="tester",
        key=key,
        body_hash=bytes([body]) * 32,
        command=command,
        dry_run=dry_run,
        look_up=look_up,
    )


def hold_of(hold: str, amount: int = DOLLAR, *, account: str = ROOT) -> PlaceHold:
    return PlaceHold(hold=hold, account=account, legs=(Leg("usd", amount, amount),))


def charge_of(event: str, amount: int = DOLLAR, *, hold: str | None = None, account: str = ROOT) -> ChargeLine:
    """A settlement, or a debit."""
    return ChargeLine(
        source="tester",
        event_id=event,
        account=account,
        occurred_at=WHEN_RECORDED,
        hold=hold,
        scope=None,
        price_version="",
        amounts=(("usd", amount),),
        required=hold is None,
    )


@dataclass(slots=True)
class Seen:
    """What was read, and what was refused by the database as being there already; commits wait for `may_commit`."""

    loads: int = 0
    writes: int = 0
    violations: list[str] = field(default_factory=list)
    may_commit: asyncio.Event = field(default_factory=asyncio.Event)
    # Raised after what was written is committed: its answer was lost.
    lost: list[Exception] = field(default_factory=list)

    async def load(self, *arguments: Any) -> store.Loaded:
        self.loads += 1
        return await LOAD(*arguments)

    async def write(self, *arguments: Any) -> None:
        self.writes += 1
        *_, sent = arguments
        sent()
        await self.may_commit.wait()
        try:
            await WRITE(*arguments)
        except psycopg.errors.UniqueViolation as error:
            self.violations.append(str(error.diag.constraint_name))
            raise
        if self.lost:
            raise self.lost.pop(0)


LOAD, WRITE = store.load, store.write


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    seen.may_commit.set()
    monkeypatch.setattr(store, "load", seen.load)
    monkeypatch.setattr(store, "write", seen.write)
    return seen


@dataclass(slots=True)
class Owners:
    """Processes that own the partitions one after the other: each remembers nothing of the one before."""

    database: Database
    epoch: int = 0
    clock: timedelta = timedelta()

    @asynccontextmanager
    async def next(self, *roots: str) -> AsyncIterator[Ledger]:
        self.epoch += 1
        writer = Writer(self.database.url("ledger"), name="test")
        owner = Ledger(writer=writer, units=UNITS, now=lambda: now() + self.clock, on_committed=lambda _: None)
        partitions = {partition_of(root) for root in roots or (ROOT,)}
        assert await owner.take_over(dict.fromkeys(partitions, self.epoch)) == partitions
        try:
            yield owner
        finally:
            await writer.close()


@pytest.fixture
def owners(database: Database, seen: Seen) -> Owners:
    del seen
    return Owners(database)


async def ask(owner: Ledger, *items: Item) -> list[dict[str, Any]]:
    """Ask for commands all at once; their replies."""
    results = await processed(owner, items)
    replies = [msgspec.json.decode(result.body) for result in results if isinstance(result, Replied)]
    assert len(replies) == len(items)
    return replies


async def funded(owner: Ledger, amount: int = 100 * DOLLAR, *, root: str = ROOT) -> None:
    """An account with money, which is in memory."""
    replies = await ask(
        owner,
        item(OpenAccount(account=root, wallets=(WalletTerms("usd"),)), f"{root}:open"),
        item(Grant(account=root, unit="usd", amount=amount), f"{root}:fund"),
    )
    assert [reply["status"] for reply in replies] == ["accepted", "accepted"]


async def warmed(owner: Ledger, key: str) -> None:
    """Have the account in memory."""
    (reply,) = await ask(owner, item(Grant(account=ROOT, unit="usd", amount=DOLLAR), key))
    assert reply["status"] == "accepted"


async def proven(database: Database) -> None:
    assert not any(check.breaches for check in await asyncio.to_thread(audit, database.url("ledger")))
    assert (await asyncio.to_thread(replay, database.url("ledger_owner"))).is_equal


async def test_holds_and_settlements_of_what_is_in_memory_read_nothing_and_are_decided_ahead(
    driver: Driver, database: Database, owners: Owners, seen: Seen
) -> None:
    async with owners.next() as owner:
        await funded(owner)
        loads, hold = seen.loads, hold_id()
        seen.may_commit.clear()
        seen.writes = 0
        placing = asyncio.create_task(owner.process([item(hold_of(hold), "place")]))
        await eventually(lambda: seen.writes == 1)
        went_on: list[bool] = []
        settling = asyncio.create_task(
            owner.process([item(charge_of("1", hold=hold), "settle")], lambda: went_on.append(True))
        )
        # It is decided on a hold that is not stored yet, or it would not be known.
        await asyncio.sleep(0.05)
        assert not placing.done()
        seen.may_commit.set()
        assert all(isinstance(result, Replied) for result in [*(await placing), *(await settling)])
        assert went_on
        assert seen.loads == loads
        assert await driver.rows("SELECT posted, held FROM wallets") == [(99 * DOLLAR, 0)]
    await proven(database)


async def test_a_key_of_long_ago_has_its_first_outcome_and_does_not_harm_those_asked_with_it(
    driver: Driver, database: Database, owners: Owners, seen: Seen
) -> None:
    hold = hold_id()
    async with owners.next() as owner:
        await funded(owner)
        first = await ask(owner, item(hold_of(hold), "place"), item(Grant(account=ROOT, unit="usd", amount=5), "gift"))
    async with owners.next() as owner:
        await warmed(owner, "warm")
        gift = item(Grant(account=ROOT, unit="usd", amount=5), "gift")
        other = item(Grant(account=ROOT, unit="usd", amount=7), "other")
        (again, new) = await ask(owner, gift, other)
        assert seen.violations == ["commands_pkey"]
        assert again == first[1] | {"replayed": True}
        assert (new["status"], new["replayed"]) == ("accepted", False)
        (conflict,) = await ask(owner, item(Grant(account=ROOT, unit="usd", amount=6), "gift", body=1))
        assert (conflict["status"], conflict["code"]) == ("failed", "conflict")
    assert await driver.rows("SELECT posted, held FROM wallets") == [(101 * DOLLAR + 12, DOLLAR)]
    await proven(database)


async def test_a_repeat_that_would_be_refused_by_now_has_its_first_outcome(
    driver: Driver, owners: Owners, seen: Seen
) -> None:
    async with owners.next() as owner:
        await funded(owner, DOLLAR)
        (first,) = await ask(owner, item(charge_of("1"), "debit"))
        assert first["status"] == "accepted"
    async with owners.next() as owner:
        # In memory, and empty.
        (refused,) = await ask(owner, item(charge_of("2"), "more"))
        assert refused["code"] == "insufficient_funds"
        loads = seen.loads
        assert await owner.process([item(charge_of("1"), "debit")]) == [NotLookedUp()]
        assert seen.loads == loads
        before = await driver.dump()
        assert await ask(owner, item(charge_of("1"), "debit")) == [first | {"replayed": True}]
        # Neither is what a key that was refused may be used for later.
        (new,) = await ask(owner, item(charge_of("1"), "another key"))
        assert new["code"] == "already_charged"
        assert await driver.dump() == before


async def test_a_use_that_was_charged_long_ago_under_another_key_is_not_charged_again(
    driver: Driver, owners: Owners, seen: Seen
) -> None:
    async with owners.next() as owner:
        await funded(owner)
        await ask(owner, item(charge_of("1"), "debit"))
    async with owners.next() as owner:
        await warmed(owner, "warm")
        replies = await ask(owner, item(charge_of("1"), "again"), item(charge_of("1", 2 * DOLLAR), "more"))
        assert [reply["code"] for reply in replies] == ["already_charged", "charge_differs"]
        assert seen.violations == ["charge_lines_pkey"]
    assert await driver.rows("SELECT posted FROM wallets") == [(100 * DOLLAR,)]


@pytest.mark.parametrize("account", [ROOT, f"{ROOT}/ana"])
async def test_a_hold_that_ended_long_ago_is_not_placed_again(
    driver: Driver, database: Database, owners: Owners, seen: Seen, account: str
) -> None:
    hold = hold_id()
    async with owners.next() as owner:
        await funded(owner)
        await ask(owner, item(OpenAccount(account=f"{ROOT}/ana", wallets=(WalletTerms("usd"),)), "ana"))
        await ask(owner, item(hold_of(hold), "place"), item(ReleaseHold(hold=hold, account=ROOT), "release"))
    async with owners.next() as owner:
        await ask(owner, item(Grant(account=f"{ROOT}/ana", unit="usd", amount=DOLLAR), "warm"))
        stored = await driver.rows("SELECT * FROM holds")
        (reply,) = await ask(owner, item(hold_of(hold, account=account), "again"))
        assert reply["code"] == "hold_released"
        assert seen.violations == ["holds_pkey"]
        # More than there is: it is still said what it would be if there were enough.
        (reply,) = await ask(owner, item(hold_of(hold, 1_000 * DOLLAR, account=account), "too much"))
        assert reply["code"] == "hold_released"
    assert await driver.rows("SELECT * FROM holds") == stored
    await proven(database)


async def test_a_repeat_right_behind_waits_for_the_first_and_is_not_tried(
    driver: Driver, owners: Owners, seen: Seen
) -> None:
    gift = item(Grant(account=ROOT, unit="usd", amount=5), "gift")
    async with owners.next() as owner:
        await funded(owner)
        seen.may_commit.clear()
        seen.writes = 0
        first = asyncio.create_task(ask(owner, gift))
        await eventually(lambda: seen.writes == 1)
        second, third = asyncio.create_task(ask(owner, gift)), asyncio.create_task(ask(owner, replace(gift, key="3")))
        seen.may_commit.set()
        (done,), (again,), (other,) = await asyncio.gather(first, second, third)
        assert again == done | {"replayed": True}
        assert other["status"] == "accepted"
        assert seen.violations == []
    assert await driver.rows("SELECT posted FROM wallets") == [(100 * DOLLAR + 10,)]


@pytest.mark.parametrize("is_committed", [False, True])
async def test_a_command_whose_answer_was_lost_is_carried_out_once(
    driver: Driver, owners: Owners, seen: Seen, *, is_committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gift = item(Grant(account=ROOT, unit="usd", amount=5), "gift")
    async with owners.next() as owner:
        await funded(owner)
        lost = psycopg.OperationalError("the connection is lost")
        if is_committed:
            seen.lost.append(lost)
        else:

            async def fail(*_: Any) -> None:
                raise lost

            monkeypatch.setattr(store, "write", fail)
        with pytest.raises(psycopg.OperationalError):
            await owner.process([gift])
        monkeypatch.setattr(store, "write", seen.write)
        (reply,) = await ask(owner, gift)
        assert (reply["status"], reply["replayed"]) == ("accepted", is_committed)
        assert seen.violations == []
    assert await driver.rows("SELECT posted FROM wallets") == [(100 * DOLLAR + 5,)]


async def test_a_repeat_of_what_waits_behind_a_batch_that_is_lost_is_carried_out_once(
    driver: Driver, owners: Owners, seen: Seen
) -> None:
    gift, later = (item(Grant(account=ROOT, unit="usd", amount=5), key) for key in ("gift", "later"))
    async with owners.next() as owner:
        await funded(owner)
        seen.may_commit.clear()
        seen.writes = 0
        # Committed, but nobody knows.
        seen.lost.append(psycopg.OperationalError("the connection is lost"))
        first = asyncio.create_task(owner.process([gift]))
        await eventually(lambda: seen.writes == 1)
        behind = asyncio.create_task(ask(owner, later))
        await asyncio.sleep(0.05)
        again = asyncio.create_task(ask(owner, gift, later))
        seen.may_commit.set()
        lost, (done,), (repeated, also) = await asyncio.gather(first, behind, again, return_exceptions=True)
        assert isinstance(lost, psycopg.OperationalError)
        assert repeated["replayed"]
        # Whichever was decided first after that.
        assert sorted([done["replayed"], also["replayed"]]) == [False, True]
        assert done["transaction"] == also["transaction"]
    assert await driver.rows("SELECT posted FROM wallets") == [(100 * DOLLAR + 10,)]


async def test_who_repeats_old_keys_holds_up_the_others_once(driver: Driver, owners: Owners, seen: Seen) -> None:
    old = [item(Grant(account=ROOT, unit="usd", amount=5), f"old-{number}") for number in range(8)]
    async with owners.next() as owner:
        await funded(owner)
        await ask(owner, *old)
    async with owners.next() as owner:
        await warmed(owner, "warm")
        for number, repeated in enumerate(old[:6]):
            owners.clock += timedelta(seconds=4)
            new = item(Grant(account=ROOT, unit="usd", amount=1), f"new-{number}")
            replies = await ask(owner, new, repeated)
            assert [reply["replayed"] for reply in replies] == [False, True]
        assert seen.violations == ["commands_pkey"]
        # When nobody has for a while, nothing is read any more.
        owners.clock += timedelta(seconds=11)
        loads = seen.loads
        await ask(owner, item(Grant(account=ROOT, unit="usd", amount=1), "later"))
        assert seen.loads == loads
        await ask(owner, old[6])
        assert seen.violations == ["commands_pkey"] * 2
    assert await driver.rows("SELECT posted FROM wallets") == [(101 * DOLLAR + 8 * 5 + 7,)]


async def test_what_is_tried_out_and_what_comes_in_a_list_is_looked_up(
    driver: Driver, owners: Owners, seen: Seen
) -> None:
    gift = item(Grant(account=ROOT, unit="usd", amount=5), "gift")
    both = ListItem(partition=gift.partition, principal="tester", commands=(gift, replace(gift, key="gift-2")))
    whole = replace(both, key="both", body_hash=bytes(32))
    async with owners.next() as owner:
        await funded(owner)
        first, listed = await ask(owner, gift, whole)
    async with owners.next() as owner:
        await warmed(owner, "warm")
        before = await driver.dump()
        (tried,) = await ask(owner, replace(gift, dry_run=True))
        assert tried == first | {"replayed": True, "dry_run": True}
        assert await ask(owner, whole) == [listed | {"replayed": True}]
        assert await driver.dump() == before
        (replies,) = await ask(owner, both)
        assert [reply["replayed"] for reply in replies["replies"]] == [True, False]
        assert seen.violations == []


async def test_what_a_list_would_have_told_is_not_told_if_it_is_refused(driver: Driver, owners: Owners) -> None:
    gift, too_much = item(Grant(account=ROOT, unit="usd", amount=5), "gift"), item(hold_of(hold_id(), 10**15), "hold")
    whole = ListItem(
        partition=gift.partition, principal="tester", commands=(gift, too_much), key="both", body_hash=bytes(32)
    )
    async with owners.next() as owner:
        await funded(owner)
        before = await driver.facts()
        refused, _ = await ask(owner, whole, replace(gift, key="gift-2"))
        assert (refused["status"], refused["index"]) == ("refused", 1)
        # What is accepted beside it is, and in its place.
        told = (await driver.facts())[len(before) :]
        assert [type(fact) for fact in told] == [words.LotGranted]


async def test_a_deposed_owner_replays_nothing_wrong(driver: Driver, owners: Owners, seen: Seen) -> None:
    gift = item(Grant(account=ROOT, unit="usd", amount=5), "gift")
    async with owners.next() as first:
        await funded(first)
        async with owners.next() as second:
            (done,) = await ask(second, gift)
            before = await driver.dump()
            # It has never heard of the key, and finds both it and the head taken.
            (result,) = await first.process([gift])
            assert not isinstance(result, Replied)
            assert await driver.dump() == before
            assert await ask(second, gift) == [done | {"replayed": True}]


def _of_dollars(amount: str) -> tuple[Amount, ...]:
    return (Amount(amount=amount, unit="usd"),)


async def test_a_service_answers_repeats_of_its_predecessor(driver: Driver) -> None:
    hold, spent = new_hold_id("acme"), new_hold_id("acme")
    asked: Sequence[words.Command] = (
        place_hold(hold, hold_leg("usd", "4"), key="place"),
        words.SettleHold(idempotency_key="settle", hold=hold, account="acme", settlement="1", amounts=_of_dollars("4")),
        place_hold(spent, hold_leg("usd", "6"), key="place all"),
    )
    async with driver.running():
        await driver.accepted(open_account("acme", "usd", key="open"))
        await driver.accepted(grant("acme", "10", key="fund"))
        first = [await driver.accepted(each) for each in asked]
    debit = words.Debit(idempotency_key="debit", account="acme", debit="2", amounts=_of_dollars("1"))
    async with driver.running():
        # In memory, with nothing left.
        assert (await driver.refused(debit)).code == "insufficient_funds"
        before = await driver.dump()
        again = await asyncio.gather(*(driver.accepted(each) for each in asked))
        assert [*again] == [each.model_copy(update={"replayed": True}) for each in first]
        refused = await driver.refused(place_hold(hold, hold_leg("usd", "4"), key="place again"))
        assert refused.code == "hold_settled"
        assert await driver.dump() == before
        await driver.accepted(release_hold(spent, key="release"))
        await driver.accepted(debit)


# What differs from ledger to ledger of what they say.
_IDS = ("transaction", "recorded_at", "movements", "message")


def _said(reply: dict[str, Any], root: str) -> dict[str, Any]:
    kept = {name: value for name, value in reply.items() if name not in _IDS}
    renamed: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(kept).replace(f'"{root}'.encode(), b'"root'))
    return renamed


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_repeated_is_answered_as_by_one_that_looks_everything_up(
    driver: Driver, database: Database, owners: Owners, seen: Seen, seed: int
) -> None:
    """Two accounts are asked the same; of one everything is looked up. Now and then another owner takes over."""
    chance = random.Random(seed)
    holds = [hold_id() for _ in range(12)]
    asked: list[tuple[Command, str, int]] = []

    def chosen() -> tuple[Command, str, int]:
        if asked and chance.random() < 0.4:
            command, key, body = chance.choice(asked)
            # Another body under the key, or another key for the same.
            return command, chance.choice([key, key, f"{key}+"]), body + (chance.random() < 0.1)
        hold, amount, event = chance.choice(holds), chance.randrange(1, 5) * DOLLAR, f"event-{chance.randrange(20)}"
        commands: list[Command] = [
            hold_of(hold, amount),
            hold_of(hold, amount),
            charge_of(event, amount, hold=hold),
            charge_of(event, amount),
            ReleaseHold(hold=hold, account=ROOT),
            ExtendHold(hold=hold, account=ROOT, lifetime_seconds=60, legs=(Leg("usd", 1, amount),)),
            Grant(account=ROOT, unit="usd", amount=amount),
        ]
        asked.append((chance.choice(commands), f"key-{len(asked)}", 0))
        return asked[-1]

    def of(root: str, batch: Iterable[tuple[Command, str, int]], *, look_up: bool) -> list[Item]:
        return [item(_of_account(command, root), key, body=body, look_up=look_up) for command, key, body in batch]

    is_first = True
    for _ in range(6):
        async with owners.next(ROOT, LOOKED_UP) as owner:
            if is_first:
                await funded(owner, 10 * DOLLAR)
                await funded(owner, 10 * DOLLAR, root=LOOKED_UP)
                is_first = False
            for _ in range(12):
                batch = [chosen() for _ in range(chance.randrange(1, 5))]
                owners.clock += timedelta(seconds=chance.randrange(30))
                results: list[list[dict[str, Any]]] = []
                for root in (ROOT, LOOKED_UP):
                    # One by one what is refused, and so asked again, is decided in the same order.
                    is_looked_up = root == LOOKED_UP
                    sent = of(root, batch, look_up=is_looked_up)
                    replies = [(await ask(owner, each))[0] for each in sent]
                    results.append([_said(reply, root) for reply in replies])
                assert results[0] == results[1], f"seed {seed}"
    columns = "posted, held, frozen, owed"
    balances = await driver.rows(f"SELECT {columns} FROM wallets ORDER BY account")
    assert balances[0] == balances[1]
    assert seen.violations
    await proven(database)


def _of_account(command: Command, account: str) -> Command:
    if isinstance(command, ChargeLine):
        return msgspec.structs.replace(command, account=account)
    return replace(command, account=account)
