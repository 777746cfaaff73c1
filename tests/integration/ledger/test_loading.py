"""A process that remembers nothing reads what a command needs: it decides as one that has never forgotten anything."""

import random
from collections.abc import AsyncIterator, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from contracts.metering import CHARGES_RATED
from contracts.partition import partition_of
from services.kit.database import Writer
from services.ledger import tables
from services.ledger.domain.commands import (
    Adjust,
    CatchUp,
    ChargeLine,
    ClaimPayment,
    ClaimState,
    Command,
    Grant,
    LotScope,
    OpenAccount,
    Overdue,
    PlaceHold,
    ReleaseHold,
    ResolveHold,
    ReverseCharge,
    Rule,
    SetRule,
    Transfer,
    VoidGrant,
    WalletTerms,
)
from services.ledger.domain.draft import Draft
from services.ledger.domain.due import decide_due
from services.ledger.domain.errors import Refusal
from services.ledger.domain.state import Lot, PartitionState, Wallet
from services.ledger.handlers import BundleItem, CommandItem, Item, Ledger, Replied, SweepItem, Swept, Taken
from services.ledger.projections import lot_of
from services.ledger.replay import replay
from services.ledger.translate import Bundle
from tests.conftest import Database
from tests.unit.ledger.archive import Archive
from tests.unit.ledger.book import UNITS, hold_id, leg, line

pytestmark = pytest.mark.anyio

ROOT = "acme"
TEAM = f"{ROOT}/team"


class Remembering(Archive):
    """The core alone, which has everything at hand."""

    def __init__(self) -> None:
        super().__init__(UNITS)
        # Where lots of one moment are told apart by their ids, they are the service's.
        self._head = replace(self._head, partition=partition_of(ROOT))

    def _read(self, *commands: Command) -> PartitionState:  # noqa: ARG002 - whatever it is asked
        everything = PartitionState(
            accounts=self.all.accounts,
            holds=self.all.holds,
            payments=self.all.payments,
            lines=self._lines,
            deadlines=self.all.deadlines,
        )
        return deepcopy(everything)

    def catch_up(self) -> None:
        """Do what is due, of one account after the other."""
        draft = Draft(self._head, self._read(), now=self.now)
        for account in sorted(draft.state.accounts):
            while True:
                transaction = draft.begin()
                due = decide_due(draft.state, (account,), units=self.units, place=transaction.place)
                if not due:
                    break
                transaction.record(due)
        self._commit(draft)


@dataclass
class Both:
    """The core, and the ledger on its tables, begun anew for each batch, which must come to the same."""

    core: Remembering
    writer: Writer
    database: Database
    epoch: int = 0
    keys: int = 0
    bundles: int = 0

    async def do(self, command: Command) -> None:
        """Carry out on both sides what must be accepted."""
        assert not isinstance(await self.ask(command), Refusal)

    async def ask(self, command: Command) -> Any:
        """Ask both sides: they agree."""
        decided = self.core.ask(command)
        if isinstance(command, SetRule):
            # Its first period may have begun.
            self.core.catch_up()
        (result,) = await self.process(self.item(command))
        if isinstance(result, Replied):
            reply = msgspec.json.decode(result.body)
            assert reply["status"] == ("accepted" if isinstance(decided, list) else "refused"), (reply, decided)
        else:
            assert isinstance(result, Swept)
        await self.compare()
        return decided

    async def together(self, *commands: Command) -> None:
        """Carry out commands on both sides; on the service's in one batch."""
        items = []
        for command in commands:
            self.core.do(command)
            items.append(self.item(command))
        for result in await self.process(*items):
            if isinstance(result, Replied):
                assert msgspec.json.decode(result.body)["status"] == "accepted", result
        await self.compare()

    async def catch_up(self) -> None:
        """Do on both sides what is due."""
        self.core.catch_up()
        await self.process(
            *(SweepItem(partition_of(ROOT), CatchUp(account=name)) for name in sorted(self.core.all.accounts))
        )

    async def bundle(self, *lines: ChargeLine, reversals: Sequence[ReverseCharge] = ()) -> None:
        """Give back lines, then charge lines, on both sides; on the service's in a bundle."""
        await self.bundles_together((reversals, lines))

    async def bundles_together(self, *told: tuple[Sequence[ReverseCharge], Sequence[ChargeLine]]) -> None:
        """Likewise, and on the service's several bundles in one batch."""
        items = []
        for reversals, lines in told:
            self.core.catch_up()
            for each in reversals:
                # One that is refused is put aside on the service's.
                self.core.ask(each)
            if lines:
                self.core.bundle(lines)
            self.bundles += 1
            texts = {"lines": [str(each) for each in lines], "reversals": [str(each) for each in reversals]}
            body = msgspec.json.encode(
                {"type": CHARGES_RATED, "partition": partition_of(ROOT), "number": self.bundles, **texts}
            )
            bundle = Bundle(partition_of(ROOT), self.bundles, sha256(body).digest(), body, lines, reversals)
            items.append(BundleItem(bundle, "CHARGES", self.bundles, "metering.v1.00.charges.rated"))
        results = await self.process(*items)
        assert results == [Taken(repeated=False, traced=[])] * len(told)
        await self.compare()

    async def process(self, *items: Item) -> list[Any]:
        """By a process that has just begun."""
        self.epoch += 1
        ledger = Ledger(writer=self.writer, units=UNITS, now=lambda: self.core.now, on_committed=lambda _: None)
        await ledger.take_over({partition_of(ROOT): self.epoch})
        return list(await ledger.process(items))

    async def compare(self) -> None:
        """Wallet by wallet and lot by lot."""
        wallets, lots = await self.stored()
        assert lots == pictures(self.core.all.lots())
        assert wallets == {
            (wallet.account, wallet.unit): amounts(wallet)
            for account in self.core.all.accounts.values()
            for wallet in account.wallets.values()
        }
        self.core.check()

    async def stored(self) -> tuple[dict[tuple[str, str], tuple[int, ...]], list[dict[str, Any]]]:
        """What the tables say."""
        columns = ", ".join(column.name for column in tables.lots.columns)
        async with self.writer.transaction() as connection:
            cursor = await connection.execute(f"SELECT {columns} FROM lots".encode())
            lots = pictures(map(lot_of, await cursor.fetchall()))
            cursor = await connection.execute(
                "SELECT account, unit, posted, held, frozen, overage, uncapped, owed, owing FROM wallets"
            )
            wallets = {(row[0], row[1]): tuple(row[2:]) for row in await cursor.fetchall()}
        return wallets, lots

    async def lot(self, core_lot: str) -> str:
        """The service's id of a lot of the core's."""
        wanted = [lot.id for lot in sorted(self.core.all.lots(), key=lambda each: each.age)].index(core_lot)
        async with self.writer.transaction() as connection:
            cursor = await connection.execute("SELECT lot_id::text FROM lots ORDER BY batch, position")
            return str((await cursor.fetchall())[wanted][0])

    def item(self, command: Command) -> Item:
        self.keys += 1
        if isinstance(command, ResolveHold):
            return SweepItem(partition_of(ROOT), command)
        return CommandItem(
            partition=partition_of(ROOT),
            principal="tester",
            key=f"key-{self.keys}",
            body_hash=sha256(str(command).encode()).digest(),
            command=command,
        )

    def check_replay(self) -> None:
        """What is stored follows from the journal, summed and entry by entry."""
        for by_evolve in (False, True):
            found = replay(self.database.url("ledger_owner"), by_evolve=by_evolve)
            assert found.is_equal, found


def amounts(wallet: Wallet) -> tuple[int, ...]:
    return (
        *(wallet.posted, wallet.held, wallet.frozen, wallet.overage),
        *(wallet.uncapped, wallet.owed, wallet.owing),
    )


def pictures(lots: Iterable[Lot]) -> list[dict[str, Any]]:
    """Lots in the order in which they were made, which stands for their ids and places."""
    ordered = sorted(lots, key=lambda lot: lot.age)
    places = {lot.id: place for place, lot in enumerate(ordered)}
    left_out = {"id", "batch", "position", "occurred_at", "recorded_at", "origin", "repaid"}
    names = [each.name for each in fields(Lot) if each.name not in left_out]
    return [
        {name: getattr(lot, name) for name in names}
        | {
            "origin": None if lot.origin is None else places[lot.origin],
            "repaid": {places[name]: amount for name, amount in lot.repaid.items()},
        }
        for lot in ordered
    ]


@pytest.fixture
async def both(database: Database) -> AsyncIterator[Both]:
    url = make_conninfo(database.url("ledger").get_secret_value(), options="-c timezone=UTC")
    writer = Writer(SecretStr(url), name="loading")
    yield Both(Remembering(), writer, database)
    await writer.close()


def opened(account: str, *units: str, **terms: Any) -> OpenAccount:
    return OpenAccount(account=account, wallets=tuple(WalletTerms(unit=unit, **terms) for unit in units))


def paid(amount: int, payment: str, *, account: str = ROOT, kind: Any = "purchase", unit: str = "usd") -> Grant:
    return Grant(account=account, unit=unit, amount=amount, kind=kind, reference=payment)


def claim(
    claimed: int,
    payment: str,
    *,
    state: ClaimState = "final",
    revision: int = 0,
    account: str = ROOT,
    claim: str = "re_1",
) -> ClaimPayment:
    return ClaimPayment(
        account=account,
        payment=payment,
        claim=claim,
        reason="refund",
        state=state,
        unit="usd",
        claimed=claimed,
        revision=revision,
    )


def use(amount: int, **more: Any) -> ChargeLine:
    return line(more.pop("account", ROOT), ("usd", amount), **more)


def reversal(of: ChargeLine, *amounts: tuple[str, int]) -> ReverseCharge:
    return ReverseCharge(
        account=of.account, source=of.source, event_id=of.event_id, revision=of.revision, amounts=amounts or None
    )


async def test_claims_reversals_and_grants_reach_all_that_was_spent_and_repaid(both: Both) -> None:
    """The first payment is spent and claimed: what is owed in its stead is repaid by the second, and that is claimed.

    Nothing is left of any of these lots when the use is given back, and when the claims turn out void.
    """
    await both.do(opened(ROOT, "usd", policy="soft"))
    await both.do(paid(50, "pi_1"))
    await both.do(paid(5, "pi_1", kind="bonus"))
    first, second = use(55, at=both.core.now), use(7, at=both.core.now)
    await both.do(first)
    await both.do(claim(50, "pi_1"))
    await both.do(paid(60, "pi_2"))
    await both.do(second)
    await both.do(claim(60, "pi_2"))
    await both.do(paid(70, "pi_3"))
    await both.do(use(100, at=both.core.now))
    await both.do(reversal(first, ("usd", 20)))
    await both.do(claim(50, "pi_1", state="void", revision=1))
    await both.do(paid(30, "pi_1"))
    await both.do(reversal(first))
    await both.do(claim(40, "pi_2", revision=2))
    await both.do(paid(8, "pi_2"))
    await both.do(paid(20, "pi_4"))
    await both.do(claim(0, "pi_2", state="void", revision=3))
    await both.do(reversal(second))
    both.check_replay()


async def test_a_chain_of_payments_of_which_each_repaid_the_claim_on_the_one_before_is_read_whole(both: Both) -> None:
    await both.do(opened(ROOT, "usd", policy="soft"))
    uses = []
    for number in range(6):
        await both.do(paid(10, f"pi_{number}"))
        uses.append(use(10, at=both.core.now))
        await both.do(uses[-1])
        await both.do(claim(10, f"pi_{number}"))
    # What claims made owed is repaid by other money alone.
    await both.do(paid(15, "pi_6"))
    await both.do(claim(10, "pi_0", state="void", revision=1))
    await both.do(reversal(uses[1]))
    await both.do(claim(3, "pi_2", revision=1))
    await both.do(paid(4, "pi_3"))
    await both.do(reversal(uses[0]))
    both.check_replay()


@pytest.mark.parametrize("way", ["bundle", "alone"])
async def test_an_estimate_that_is_made_and_taken_back_at_once_finds_what_it_leads_to(both: Both, way: str) -> None:
    """Nobody resolved the hold: its late charge does. Some of its lot's payment was moved on, spent and claimed."""
    await both.do(opened(ROOT, "usd", policy="soft"))
    await both.do(opened(TEAM, "usd", policy="soft"))
    await both.do(paid(30, "pi_1"))
    await both.do(paid(12, "pi_1"))
    await both.do(Transfer(account=ROOT, to_account=TEAM, unit="usd", amount=12))
    held = hold_id()
    await both.do(PlaceHold(hold=held, account=ROOT, legs=(leg("usd", 0, 25),), overdue="charge_estimate"))
    await both.do(use(12, account=TEAM, at=both.core.now))
    await both.do(claim(40, "pi_1", state="open"))
    assert both.core.wallet(ROOT, "usd").frozen == 5
    both.core.wait(hours=1)
    late = use(2, hold=held, at=both.core.now)
    if way == "bundle":
        await both.bundle(late)
    else:
        await both.do(late)
    wallet = both.core.wallet(ROOT, "usd")
    assert (wallet.posted, wallet.held, wallet.frozen) == (28, 0, 28)
    await both.do(claim(40, "pi_1", state="final", revision=1))
    assert (both.core.wallet(ROOT, "usd").posted, both.core.debt(TEAM)) == (0, 12)
    both.check_replay()


async def test_a_late_charge_of_an_estimate_that_was_spent_and_repaid_finds_its_lots(both: Both) -> None:
    await both.do(opened(ROOT, "usd", policy="soft"))
    await both.do(paid(10, "pi_1"))
    held = hold_id()
    await both.do(PlaceHold(hold=held, account=ROOT, legs=(leg("usd", 0, 25),), overdue="charge_estimate"))
    both.core.wait(hours=1)
    await both.do(ResolveHold(hold=held, account=ROOT))
    # It is repaid, by lots of which nothing is left then, and one of those was claimed.
    await both.do(paid(6, "pi_2"))
    await both.do(paid(9, "pi_3"))
    await both.do(claim(6, "pi_2"))
    await both.do(paid(6, "pi_4"))
    wallet = both.core.wallet(ROOT, "usd")
    assert [lot.posted for lot in wallet.lots.values()] == [0] * len(wallet.lots)
    await both.do(use(4, hold=held, at=both.core.now))
    await both.do(use(40, hold=held, at=both.core.now))
    both.check_replay()


@pytest.mark.parametrize("way", ["bundle", "alone"])
async def test_a_late_charge_of_an_estimate_does_the_same_to_what_was_claimed_since(both: Both, way: str) -> None:
    """What repaid the estimate was claimed where it had been transferred to."""
    await both.do(opened(ROOT, "usd", policy="soft"))
    await both.do(opened(TEAM, "usd", policy="soft"))
    held = hold_id()
    await both.do(PlaceHold(hold=held, account=ROOT, legs=(leg("usd", 0, 25),), overdue="charge_estimate"))
    both.core.wait(hours=1)
    await both.do(ResolveHold(hold=held, account=ROOT))
    await both.do(paid(40, "pi_2"))
    await both.do(Transfer(account=ROOT, to_account=TEAM, unit="usd", amount=15))
    await both.do(use(15, account=TEAM, at=both.core.now))
    await both.do(claim(30, "pi_2"))
    assert both.core.debt(TEAM) == 15
    late = use(2, hold=held, at=both.core.now)
    if way == "bundle":
        await both.bundle(late)
    else:
        await both.do(late)
    both.check_replay()


async def test_a_claim_reaches_what_was_transferred_and_spent(both: Both) -> None:
    ana = f"{TEAM}/ana"
    await both.do(opened(ROOT, "usd"))
    await both.do(opened(TEAM, "usd", policy="soft"))
    await both.do(opened(ana, "usd", policy="soft"))
    await both.do(paid(50, "pi_1"))
    await both.do(Transfer(account=ROOT, to_account=TEAM, unit="usd", amount=30))
    await both.do(Transfer(account=TEAM, to_account=ana, unit="usd", amount=20))
    spent = use(20, account=ana, at=both.core.now)
    await both.do(spent)
    await both.do(use(20, at=both.core.now))
    # What is due before a claim is tried out with it, on copies of the accounts concerned.
    ends, scope = both.core.now + timedelta(hours=1), LotScope(providers=("another",))
    await both.do(Grant(account=ROOT, unit="usd", amount=3, kind="promo", expires_at=ends, scope=scope))
    both.core.wait(hours=2)
    await both.do(claim(50, "pi_1", state="open"))
    await both.do(claim(50, "pi_1", revision=1))
    await both.do(paid(12, "pi_2", account=ana))
    await both.do(reversal(spent))
    await both.do(claim(15, "pi_1", revision=2))
    await both.do(claim(0, "pi_1", state="void", revision=3))
    both.check_replay()


async def test_a_claim_takes_of_what_was_voided_or_has_expired_what_it_would_have_taken(both: Both) -> None:
    await both.do(opened(ROOT, "usd", policy="soft"))
    await both.do(paid(50, "pi_1"))
    (lot,) = both.core.lots()
    stored = await both.lot(lot)
    held = hold_id()
    await both.do(PlaceHold(hold=held, account=ROOT, legs=(leg("usd", 10),)))
    both.core.do(VoidGrant(account=ROOT, lot=lot, reason="mistake"))
    await both.process(both.item(VoidGrant(account=ROOT, lot=stored, reason="mistake")))
    await both.compare()
    assert both.core.lot(lot).voided == 40
    await both.do(ReleaseHold(hold=held, account=ROOT))
    await both.do(claim(30, "pi_1"))
    await both.do(claim(30, "pi_1", state="void", revision=1))
    assert both.core.lot(lot).voided == 50
    both.check_replay()


@pytest.mark.parametrize("overdue", ["release", "settle"])
async def test_a_late_charge_of_a_hold_that_ended_finds_what_it_had_earmarked(both: Both, overdue: str) -> None:
    await both.do(opened(ROOT, "usd", policy="soft"))
    both.core.wait(hours=1)
    await both.do(
        Grant(account=ROOT, unit="usd", amount=10, kind="promo", expires_at=both.core.now.replace(hour=23, minute=0))
    )
    held = hold_id()
    at = both.core.now
    await both.do(PlaceHold(hold=held, account=ROOT, legs=(leg("usd", 10),), lifetime_seconds=40 * 3600))
    both.core.wait(hours=39)
    if overdue == "settle":
        await both.do(use(4, hold=held, at=at))
    else:
        await both.do(ReleaseHold(hold=held, account=ROOT))
    both.core.wait(hours=20)
    # Its end was 44 hours ago, that of its hold 20.
    await both.do(use(5, hold=held, at=at))
    assert both.core.debt(ROOT) == 0
    both.check_replay()


async def test_a_cap_of_long_ago_finds_what_was_valid_then(both: Both) -> None:
    await both.do(opened(ROOT, "tokens"))
    began = both.core.now
    rule = Rule("daily", "tokens", 100, "day", began)
    await both.do(SetRule(account=ROOT, rule=rule))
    await both.do(Grant(account=ROOT, unit="tokens", amount=7, kind="promo", expires_at=began.replace(hour=20)))
    both.core.wait(days=4)
    await both.do(line(ROOT, ("tokens", 103), at=began.replace(hour=14)))
    both.core.wait(days=1)
    await both.bundle(line(ROOT, ("tokens", 9), at=began.replace(hour=15)))
    await both.bundle(line(ROOT, ("tokens", 9), at=began.replace(hour=15, day=began.day + 1)))
    assert both.core.wallet(ROOT, "tokens").overage == 5
    both.check_replay()


async def test_what_is_given_back_goes_to_what_was_taken_last(both: Both) -> None:
    await both.do(opened(ROOT, "usd"))
    for amount, priority in ((10, 3), (10, 1), (10, 2)):
        await both.do(Grant(account=ROOT, unit="usd", amount=amount, kind="promo", priority=priority))
    used = use(25, at=both.core.now)
    await both.do(used)
    await both.do(reversal(used, ("usd", 7)))
    assert [lot.posted for lot in both.core.wallet(ROOT, "usd").lots.values()] == [10, 0, 2]
    await both.do(reversal(used, ("usd", 10)))
    both.check_replay()


async def test_what_is_charged_and_given_back_in_one_batch_reaches_the_claims_on_its_lots(both: Both) -> None:
    """What a hold held was claimed: charged it is owed in its stead, and given back it is owed no longer."""
    await both.do(opened(ROOT, "usd", policy="soft"))
    await both.do(paid(10, "pi_1"))
    held = hold_id()
    await both.do(PlaceHold(hold=held, account=ROOT, legs=(leg("usd", 10),)))
    await both.do(claim(10, "pi_1"))
    used = use(10, hold=held, at=both.core.now)
    await both.together(used, Adjust(account=ROOT, unit="usd", amount=4, reason="gift"), reversal(used))
    assert both.core.debt(ROOT) == 0
    both.check_replay()


async def test_a_line_and_its_reversal_may_be_in_two_bundles_of_one_batch(both: Both) -> None:
    """And what it took may be claimed: it is given back from what is in memory, with all that follows."""
    await both.do(opened(ROOT, "usd", policy="soft"))
    await both.do(paid(10, "pi_1"))
    held = hold_id()
    await both.do(PlaceHold(hold=held, account=ROOT, legs=(leg("usd", 10),)))
    await both.do(claim(10, "pi_1"))
    used, again = use(10, hold=held, at=both.core.now), use(3, at=both.core.now)
    await both.bundles_together(
        ((), (used, again)), ((reversal(used, ("usd", 4)),), ()), ((reversal(used, ("usd", 6)), reversal(again)), ())
    )
    assert both.core.debt(ROOT) == 0
    both.check_replay()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happened_is_read_as_far_as_it_matters(both: Both, seed: int) -> None:
    await both.do(opened(ROOT, "usd", "tokens", policy="soft"))
    await both.do(opened(TEAM, "usd", policy="soft"))
    happening = Happening(random.Random(seed), both.core)
    for _ in range(80):
        both.core.wait(hours=happening.chance.choice((0, 0, 0, 1, 30)))
        await both.catch_up()
        command = happening.next()
        if isinstance(command, ChargeLine) and happening.chance.random() < 0.3:
            await both.bundle(command)
            happening.note(command)
        elif isinstance(command, ReverseCharge) and happening.chance.random() < 0.5:
            used = happening.use()
            await both.bundle(used, reversals=[command])
            happening.note(used)
        elif isinstance(await both.ask(command), list):
            happening.note(command)
    both.check_replay()


@dataclass
class Happening:
    """Commands by chance, on few payments, holds and uses: they concern each other."""

    chance: random.Random
    core: Remembering
    holds: list[tuple[str, str]] = field(default_factory=list)
    lines: list[ChargeLine] = field(default_factory=list)
    claims: dict[tuple[str, str], int] = field(default_factory=dict)

    def note(self, command: Command) -> None:
        """It was accepted."""
        match command:
            case PlaceHold(account=account, hold=hold):
                self.holds.append((account, hold))
            case ChargeLine():
                self.lines.append(command)

    def next(self) -> Command:
        makers = (self.paid, self.paid, self.use, self.use, self.use, self.hold, self.end, self.end)
        more = (self.claim, self.claim, self.claim, self.give_back, self.give_back, self.transfer, self.promo)
        made: Command = self.chance.choice((*makers, *more))()
        return made

    def account(self) -> str:
        return self.chance.choice((ROOT, ROOT, TEAM))

    def amount(self) -> int:
        return self.chance.choice((1, 3, 10, 10, 25, 40))

    def paid(self) -> Command:
        payment = f"pi_{self.chance.randint(1, 4)}"
        kind = self.chance.choice(("purchase", "purchase", "bonus"))
        return paid(self.amount(), payment, account=ROOT if payment < "pi_4" else TEAM, kind=kind)

    def promo(self) -> Command:
        ends = self.core.now + timedelta(hours=self.chance.choice((1, 20, 50)), minutes=17)
        unit = self.chance.choice(("usd", "tokens"))
        return Grant(account=ROOT, unit=unit, amount=self.amount(), kind="promo", expires_at=ends)

    def use(self) -> ChargeLine:
        account, hold = self.chance.choice(self.holds[-5:]) if self.holds else (self.account(), None)
        if self.chance.random() < 0.5:
            account, hold = self.account(), None
        at = self.core.now - timedelta(hours=self.chance.choice((0, 0, 2, 40)))
        amounts = (("usd", self.amount()), ("tokens", self.amount()))
        return line(account, *amounts, hold=hold, at=at, final=self.chance.random() < 0.6)

    def hold(self) -> Command:
        legs = (leg("usd", 0, self.amount()), leg("tokens", 0, self.amount()))
        overdue: Overdue = self.chance.choice(("release", "charge_estimate", "charge_estimate"))
        return PlaceHold(hold=hold_id(), account=self.account(), legs=legs, overdue=overdue, lifetime_seconds=600)

    def end(self) -> Command:
        if not self.holds:
            return self.hold()
        account, hold = self.chance.choice(self.holds[-5:])
        if self.chance.random() < 0.4:
            return ReleaseHold(hold=hold, account=account)
        return ResolveHold(hold=hold, account=account)

    def claim(self) -> Command:
        payment = f"pi_{self.chance.randint(1, 4)}"
        name = self.chance.choice(("re_1", "dp_1"))
        revision = self.claims[payment, name] = self.claims.get((payment, name), 0) + 1
        state: ClaimState = self.chance.choice(("final", "final", "open", "void"))
        account = ROOT if payment < "pi_4" else TEAM
        return claim(self.amount(), payment, claim=name, state=state, revision=revision, account=account)

    def give_back(self) -> Command:
        if not self.lines:
            return self.use()
        of = self.chance.choice(self.lines[-8:])
        return reversal(of, *self.chance.choice(((), (), (("usd", 2),))))

    def transfer(self) -> Command:
        source, target = self.chance.sample((ROOT, TEAM), 2)
        return Transfer(account=source, to_account=target, unit="usd", amount=self.amount())
