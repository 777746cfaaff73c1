"""The laws of the ledger on its pure core: a machine of random commands, and a model beside it that knows no lots."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from contracts.accounts import path
from services.ledger.domain.chain import GENESIS, entry_hash
from services.ledger.domain.commands import (
    ChargeLine,
    ClaimPayment,
    ClaimState,
    Grant,
    GrantedKind,
    Leg,
    OpenAccount,
    PlaceHold,
    ReleaseHold,
)
from services.ledger.domain.entries import is_contra
from services.ledger.tables import lots as lots_table
from tests.unit.ledger.book import BEGIN, PARTITION, UNITS, Book, hold_id, line

ACCOUNTS = ("r", "r/a", "r/a/k", "r/b")
NAMES = tuple(UNITS.by_name)
amounts = st.integers(0, 40)
# Mostly the same payment, account and unit, or a claim would seldom find its grant.
bought = st.sampled_from(
    (*[("pi_1", "r", "usd")] * 5, *[("pi_2", "r/a", "usd")] * 3, ("pi_1", "r", "points"), ("pi_1", "r/a", "usd"))
)


@dataclass
class Purse:
    """A wallet to the model: what it has and what is set aside of it, by hold. A cap's overage is beside it."""

    posted: int = 0
    overage: int = 0
    held: Counter[str] = field(default_factory=Counter)
    clawed: int = 0

    @property
    def free(self) -> int:
        return self.posted - self.clawed - self.held.total()


@dataclass
class Bought:
    """A payment to the model: what was granted for it by kind and unit, and its claims: revision, state, amount."""

    unit: str | None = None
    granted: Counter[tuple[str, str]] = field(default_factory=Counter)
    claims: dict[str, tuple[int, str, int]] = field(default_factory=dict)

    def taken(self) -> Counter[tuple[str, str]]:
        """What claims take, at once or later, by kind and unit."""
        paid = self.granted["purchase", self.unit or ""]
        clawed = min(paid, sum(amount for _, state, amount in self.claims.values() if state == "final"))
        found = Counter({("purchase", self.unit or ""): clawed})
        for (kind, unit), amount in self.granted.items():
            if kind == "bonus" and paid:
                found[kind, unit] = amount * clawed // paid
        return found


class Model:
    """What the ledger promises, in the plainest terms."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.purses: dict[tuple[str, str], Purse] = {}
        self.holds: dict[str, str] = {}
        self.hold_of: dict[str, tuple[str, dict[str, list[str]]]] = {}
        self.bought: defaultdict[tuple[str, str], Bought] = defaultdict(Bought)

    def concerned(self, account: str, unit: str) -> list[str]:
        found = [each for each in path(account) if (each, unit) in self.purses]
        return found[:1] if UNITS.by_name[unit].kind == "money" else found

    def place(self, command: PlaceHold) -> str | None:
        """Null, or why not."""
        if command.hold in self.holds:
            return {"placed": "hold_exists", "released": "hold_released", "settled": "hold_settled"}[
                self.holds[command.hold]
            ]
        if command.account not in self.open:
            return "account_not_open"
        pinned: dict[str, list[str]] = {}
        plan: list[tuple[str, str, int]] = []
        for leg in command.legs:
            for unit in (leg.unit, *UNITS.mirrors.get(leg.unit, ())):
                wallets = self.concerned(command.account, unit)
                pinned[unit] = wallets
                amount = min([leg.at_most, *(max(self.purses[each, unit].free, 0) for each in wallets)])
                if amount < leg.at_least:
                    return "insufficient_funds"
                plan += [(each, unit, amount) for each in wallets]
        for each, unit, amount in plan:
            self.purses[each, unit].held[command.hold] += amount
        self.holds[command.hold] = "placed"
        self.hold_of[command.hold] = (command.account, pinned)
        return None

    def claim(self, command: ClaimPayment) -> str | None:
        """Null, or why not."""
        if (command.account, command.unit) not in self.purses:
            return "wallet_not_open" if command.account in self.open else "account_not_open"
        key = (command.payment, command.account)
        others = (each for (payment, _), each in self.bought.items() if payment == command.payment)
        if key not in self.bought and any(each.granted["purchase", each.unit or ""] for each in others):
            return "account_differs"
        bought = self.bought[key]
        if bought.unit not in {None, command.unit}:
            return "invalid_amount"
        bought.unit = command.unit
        if command.revision >= bought.claims.get(command.claim, (0, "", 0))[0]:
            bought.claims[command.claim] = (command.revision, command.state, command.claimed)
        return None

    def end(self, hold: str, status: str, account: str) -> None:
        self.holds[hold] = status
        self.hold_of.setdefault(hold, (account, {}))
        for purse in self.purses.values():
            del purse.held[hold]

    def charge(self, charged: ChargeLine) -> str | None:
        """Null, or why not."""
        if charged.account not in self.open:
            return "account_not_open"
        hold = charged.hold
        if hold in self.holds and self.hold_of[hold][0] != charged.account:
            return "account_differs"
        placed = self.holds.get(hold) == "placed" if hold else False
        for name, amount in charged.amounts:
            for unit in (name, *UNITS.mirrors.get(name, ())):
                pinned = self.hold_of[hold][1] if hold and placed else {}
                for each in pinned.get(unit, self.concerned(charged.account, unit)):
                    purse = self.purses[each, unit]
                    own = purse.held[hold] if hold and placed else 0
                    there = min(amount, own + max(min(amount - own, purse.free), 0) if amount > own else amount)
                    if UNITS.by_name[unit].kind == "money":
                        purse.posted -= amount
                    else:
                        purse.posted -= there
                        purse.overage += amount - there
        if hold is not None and (placed or hold not in self.holds):
            self.end(hold, "settled", charged.account)
        return None


class Ledger(RuleBasedStateMachine):
    """Random commands, to the book and to the model."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.book = Book()
        self.model = Model()
        self.minutes = 0

    def tables(self) -> dict[str, dict[tuple[object, ...], tuple[object, ...]]]:
        return {name: dict(rows) for name, rows in self.book.tables.items()}

    @initialize(
        wallets=st.sets(
            st.tuples(st.sampled_from(ACCOUNTS[:3]), st.sampled_from(NAMES)), min_size=2, max_size=len(ACCOUNTS) * 2
        ),
        amount=st.sampled_from((10, 100)),
    )
    def begin_with_some_wallets(self, wallets: set[tuple[str, str]], amount: int) -> None:
        for account, unit in sorted(wallets):
            self.open_account(account, [unit])
            self.grant(account, unit, amount, "purchase", 100)
        for account in ("r", "r/a"):
            self.open_account(account, ["usd"])
        self.grant_for_a_payment(("pi_1", "r", "usd"), amount, "purchase")

    @rule(account=st.sampled_from(ACCOUNTS), units=st.lists(st.sampled_from(NAMES), max_size=3))
    def open_account(self, account: str, units: list[str]) -> None:
        self.book.do(OpenAccount(account=account, wallets=tuple((unit, "hard") for unit in units)))
        self.model.open.update(path(account))
        for unit in units:
            self.model.purses.setdefault((account, unit), Purse())

    @rule(
        account=st.sampled_from(ACCOUNTS),
        unit=st.sampled_from(NAMES),
        amount=amounts,
        kind=st.sampled_from(("plan", "promo", "bonus", "purchase", "adjustment")),
        priority=st.sampled_from((50, 100)),
    )
    def grant(self, account: str, unit: str, amount: int, kind: str, priority: int) -> None:
        before = self.tables()
        decided = self.book.ask(
            Grant(account=account, unit=unit, amount=amount, kind=kind, priority=priority)  # type: ignore[arg-type]  # drawn from its kinds
        )
        purse = self.model.purses.get((account, unit))
        if purse is None or amount == 0:
            assert not isinstance(decided, list)
            assert self.tables() == before
        else:
            assert isinstance(decided, list)
            purse.posted += amount

    @rule(
        of=bought,
        amount=st.integers(1, 40),
        kind=st.sampled_from(("purchase", "purchase", "bonus")),
    )
    def grant_for_a_payment(self, of: tuple[str, str, str], amount: int, kind: GrantedKind) -> None:
        payment, account, unit = of
        decided = self.book.ask(Grant(account=account, unit=unit, amount=amount, kind=kind, reference=payment))
        assert isinstance(decided, list) == ((account, unit) in self.model.purses)
        if isinstance(decided, list):
            self.model.purses[account, unit].posted += amount
            bought = self.model.bought[payment, account]
            bought.granted[kind, unit] += amount
            if kind == "purchase":
                bought.unit = bought.unit or unit

    @rule(
        of=bought,
        claim=st.sampled_from(("re_1", "re_2", "dp_1")),
        state=st.sampled_from(("final", "final", "void")),
        claimed=st.integers(0, 60),
        revision=st.integers(0, 3),
    )
    def claim(self, of: tuple[str, str, str], claim: str, state: ClaimState, claimed: int, revision: int) -> None:
        payment, account, unit = of
        before = self.tables()
        command = ClaimPayment(
            account=account,
            payment=payment,
            claim=claim,
            reason="refund",
            state=state,
            unit=unit,
            claimed=claimed,
            revision=revision,
        )
        expected = self.model.claim(command)
        decided = self.book.ask(command)
        assert (None if isinstance(decided, list) else decided.code) == expected
        if decided == [] or not isinstance(decided, list):
            assert self.tables() == before
        assert self.book.ask(command) == (decided if expected else [])

    @rule(
        target=holds,
        account=st.sampled_from(ACCOUNTS),
        units=st.lists(st.sampled_from(("usd", "points", "tokens")), min_size=1, max_size=2, unique=True),
        at_least=st.sampled_from((0, 0, 1, 1, 2, 15)),
        more=st.integers(0, 12),
    )
    def place_new_hold(self, account: str, units: list[str], at_least: int, more: int) -> str:
        legs = tuple(Leg(unit, at_least, at_least + more) for unit in units)
        command = PlaceHold(hold=hold_id(), account=account, legs=legs)
        self.place(command)
        return command.hold

    @rule(
        target=holds,
        of=bought,
        held=st.integers(1, 60),
        claimed=st.integers(1, 60),
        charged=st.none() | st.integers(0, 60),
        ends=st.booleans(),
    )
    def claim_what_is_held(
        self, of: tuple[str, str, str], held: int, claimed: int, charged: int | None, ends: bool
    ) -> str:
        """And end the hold, perhaps: by itself that seldom happens."""
        hold, (_, account, unit) = hold_id(), of
        self.place(PlaceHold(hold=hold, account=account, legs=(Leg(unit, 0, held),)))
        self.claim(of, "re_1", "final", claimed, 3)
        if ends and charged is None:
            self.release(hold, account)
        elif ends:
            self.charge([(account, {unit: charged or 0}, 0), (account, {unit: 1}, 0)], hold, alone=False)
        return hold

    @rule(hold=holds, account=st.sampled_from(ACCOUNTS))
    def place_hold_again(self, hold: str, account: str) -> None:
        self.place(PlaceHold(hold=hold, account=account, legs=(Leg("usd", 0, 5),)))

    def place(self, command: PlaceHold) -> None:
        before = self.tables()
        self.learn_what_was_clawed()
        expected = self.model.place(command)
        decided = self.book.ask(command)
        if isinstance(decided, list):
            assert expected is None
            for move in decided:
                assert not move.held or self.book.wallet(move.account, move.unit or "").available >= 0
        else:
            assert decided.code == expected
            assert self.tables() == before

    @rule(hold=holds, account=st.sampled_from(ACCOUNTS))
    def release(self, hold: str, account: str) -> None:
        before = self.tables()
        decided = self.book.ask(ReleaseHold(hold=hold, account=account))
        if hold in self.model.holds and self.model.hold_of[hold][0] != account:
            assert not isinstance(decided, list)
            assert decided.code == "account_differs"
        elif self.model.holds.get(hold) in {"released", "settled"}:
            assert not isinstance(decided, list)
            assert decided.code == f"hold_{self.model.holds[hold]}"
        else:
            assert isinstance(decided, list)
            self.model.end(hold, "released", account)
            return
        assert self.tables() == before

    @rule(target=holds)
    def name_a_hold_that_is_not_placed(self) -> str:
        return hold_id()

    @rule(
        drawn=st.lists(
            st.tuples(
                st.sampled_from(ACCOUNTS),
                st.dictionaries(st.sampled_from(("usd", "points", "tokens")), amounts, max_size=2),
                st.integers(0, 90),
            ),
            min_size=1,
            max_size=6,
        ),
        hold=holds | st.none(),
        alone=st.booleans(),
    )
    def charge(self, drawn: list[tuple[str, dict[str, int], int]], hold: str | None, alone: bool) -> None:
        lines = [
            line(
                account,
                *costs.items(),
                hold=hold if place == 0 else None,
                at=BEGIN - timedelta(seconds=seconds),
            )
            for place, (account, costs, seconds) in enumerate(drawn)
        ]
        outcomes = [self.book.ask(each) for each in lines] if alone else self.book.bundle(lines)
        for each, outcome in zip(lines, outcomes, strict=True):
            expected = self.model.charge(each)
            assert (None if isinstance(outcome, list) else outcome.code) == expected

    @rule()
    def restart(self) -> None:
        self.book.restart()

    def lots(self) -> list[dict[str, Any]]:
        names = lots_table.columns.keys()
        return [dict(zip(names, row, strict=True)) for row in self.book.tables["lots"].values()]

    def learn_what_was_clawed(self) -> None:
        """When claims take what they take is left to the book; how much is a law of its own."""
        for purse in self.model.purses.values():
            purse.clawed = 0
        for lot in self.lots():
            self.model.purses[lot["account"], lot["unit"]].clawed += lot["clawed"]

    @invariant()
    def claims_take_what_was_paid_once_and_of_a_bonus_as_much_in_proportion(self) -> None:
        taken: defaultdict[tuple[str, str], Counter[tuple[str, str]]] = defaultdict(Counter)
        for lot in self.lots():
            if lot["clawed"] or lot["pending"]:
                taken[lot["reference"], lot["account"]][lot["kind"], lot["unit"]] += lot["clawed"] + lot["pending"]
        for key, bought in self.model.bought.items():
            assert +taken.pop(key, Counter()) == +bought.taken()
        assert not taken

    @invariant()
    def what_is_pending_is_held_and_nothing_is_owed_that_could_be_taken(self) -> None:
        owed = Counter({lot["origin"]: -lot["posted"] for lot in self.lots() if lot["kind"] == "debt"})
        spent: Counter[str] = Counter()
        for entry in self.book.entries:
            if entry.lot is not None and entry.kind in {"charged", "debt_repaid"}:
                spent[entry.lot] -= entry.posted
        for lot in self.lots():
            available = lot["posted"] - lot["held"]
            assert 0 <= lot["pending"] <= lot["held"]
            assert not (lot["pending"] and available)
            assert lot["clawed_spent"] <= max(spent[lot["lot_id"]], 0)
            if owed[lot["lot_id"]]:
                assert lot["pending"] == lot["held"]
                assert not available

    @invariant()
    def wallets_are_as_the_model_has_them(self) -> None:
        self.learn_what_was_clawed()
        live = {
            (account, wallet.unit): (wallet.posted, wallet.held, wallet.overage)
            for account, found in self.book.state.accounts.items()
            for wallet in found.wallets.values()
        }
        assert live == {
            key: (purse.posted - purse.clawed, purse.held.total(), purse.overage)
            for key, purse in self.model.purses.items()
        }

    @invariant()
    def wallets_are_the_sums_of_their_lots_and_no_lot_is_negative(self) -> None:
        for account in self.book.state.accounts.values():
            for wallet in account.wallets.values():
                counting = [lot for lot in wallet.lots.values() if lot.kind != "overage"]
                assert wallet.posted == sum(lot.posted for lot in counting)
                assert wallet.held == sum(lot.held for lot in counting)
                assert all(0 <= lot.held <= lot.posted for lot in counting if lot.kind != "debt")
                assert all(
                    lot.posted <= 0 == lot.held for lot in wallet.lots.values() if lot.kind in {"debt", "overage"}
                )

    @invariant()
    def the_posted_of_every_transaction_sum_to_zero(self) -> None:
        sums: defaultdict[tuple[str, str | None, str], int] = defaultdict(int)
        for entry in self.book.entries:
            # Caps count for themselves on every wallet.
            of_wallet = entry.account.partition("/")[2] if is_contra(entry.account) else entry.account
            unit = UNITS.by_name.get(entry.unit or "")
            owner = of_wallet if unit is not None and unit.kind == "cap" else ""
            sums[entry.transaction, entry.unit, owner] += entry.posted
        assert not any(sums.values())

    @invariant()
    def positions_and_batches_have_no_gaps(self) -> None:
        place = (0, 0)
        for entry in self.book.entries:
            assert (entry.batch, entry.position) in {(place[0], place[1] + 1), (place[0] + 1, 1)}
            place = (entry.batch, entry.position)

    @invariant()
    def a_hold_ends_once(self) -> None:
        ends = {(e.hold, e.transaction) for e in self.book.entries if e.kind in {"hold_released", "hold_settled"}}
        assert len(ends) == len({hold for hold, _ in ends})

    def teardown(self) -> None:
        assert self.book.replayed() == self.book.tables
        previous = GENESIS
        for recorded in self.book.journal:
            previous = entry_hash(previous, partition=PARTITION, entry=recorded.entry, details=recorded.details)
            assert previous == recorded.hash
        assert self.book.head.chain_hash == previous


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=100, stateful_step_count=40, report_multiple_bugs=False)
