"""What time does to wallets: lots expire, recurring grants are renewed, at their own times, however late it is done.

`Clockwork` is a ledger of one account without the commands of others: grants, holds and charges are plain moves.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.money import AMOUNT_MAX, Unit
from services.ledger.domain.alerts import decide_alerts
from services.ledger.domain.chain import GENESIS, details_text
from services.ledger.domain.commands import (
    ChangePlan,
    EndRule,
    OpenAccount,
    Rule,
    SetRule,
    SetWallet,
    Units,
    WalletTerms,
)
from services.ledger.domain.concerned import BALANCE_MAX
from services.ledger.domain.draft import Draft, Head
from services.ledger.domain.due import decide_due, next_due, released_moves
from services.ledger.domain.entries import (
    Details,
    Entry,
    HoldPlaced,
    Kind,
    LotGranted,
    LotVoided,
    Move,
    contra_move,
    granted_by,
    is_contra,
)
from services.ledger.domain.errors import Refusal
from services.ledger.domain.evolve import evolve
from services.ledger.domain.opening import decide_open_account, decide_set_wallet
from services.ledger.domain.periods import boundary
from services.ledger.domain.rules import decide_change_plan, decide_end_rule, decide_set_rule
from services.ledger.domain.state import NEVER, Lot, PartitionState, Wallet

BEGIN: Final = datetime(2026, 1, 10, 12, tzinfo=UTC)
JANUARY: Final = datetime(2026, 1, 1, tzinfo=UTC)
FEBRUARY: Final = datetime(2026, 2, 1, tzinfo=UTC)
MARCH: Final = datetime(2026, 3, 1, tzinfo=UTC)
ACCOUNT: Final = "acme"

UNITS: Final = Units(
    by_name={
        unit.name: unit for unit in (Unit("usd", "money", 9), Unit("points", "money", 0), Unit("tokens", "cap", 0))
    }
)

Known = OpenAccount | SetWallet | SetRule | EndRule | ChangePlan


class Clockwork:
    """A partition whose clock is set by the test. What is due is done before each command, as in the service."""

    def __init__(self, *units: str, now: datetime = BEGIN) -> None:
        self.state = PartitionState()
        self.head = Head(
            partition=7,
            epoch=1,
            batch=0,
            chain_hash=GENESIS,
            recorded_at=now,
            outbox_number=0,
            charges_number=0,
        )
        self.now = now
        self.transactions: list[list[Entry]] = []
        self.do(OpenAccount(account=ACCOUNT, wallets=tuple(WalletTerms(unit) for unit in units)))

    # When

    def ask(self, command: Known) -> list[Move] | Refusal:
        self.catch_up()
        draft = Draft(self.head, self.state, now=self.now)
        place = draft.begin().place
        match command:
            case OpenAccount():
                decided = decide_open_account(self.state, command, units=UNITS, place=place)
            case SetWallet():
                decided = decide_set_wallet(self.state, command, units=UNITS, place=place)
            case SetRule():
                decided = decide_set_rule(self.state, command, units=UNITS, place=place)
            case EndRule():
                decided = decide_end_rule(self.state, command, units=UNITS, place=place)
            case ChangePlan():
                decided = decide_change_plan(self.state, command, units=UNITS, place=place)
        if isinstance(decided, list):
            self.record(decided)
            self.catch_up()
        return decided

    def do(self, command: Known) -> list[Move]:
        decided = self.ask(command)
        assert isinstance(decided, list), decided
        return decided

    def catch_up(self, at: datetime | None = None) -> int:
        """Do what is due: how many things it was."""
        self.now = max(self.now, at or self.now)
        for count in itertools.count():
            place = Draft(self.head, self.state, now=self.now).begin().place
            due = next_due(self.state, [ACCOUNT])
            moves = decide_due(self.state, [ACCOUNT], units=UNITS, place=place)
            assert bool(moves) == (due is not None and due <= place.recorded_at)
            if not moves:
                return count
            self.record(moves)
        raise AssertionError

    def record(self, moves: Sequence[Move]) -> None:
        """Moves, and what their owners are told, as one transaction in a batch of its own."""
        if not moves:
            return
        draft = Draft(self.head, self.state, now=self.now)
        transaction = draft.begin()
        transaction.record(moves)
        touched = {move.unit: self.wallet(move.unit) for move in moves if move.unit and not is_contra(move.account)}
        transaction.record(decide_alerts(touched.values(), place=transaction.place))
        self.head, recorded = draft.finish()
        entries = [each.entry for each in recorded]
        self.state.written(self.head.recorded_at)
        sums: Counter[tuple[str | None, str]] = Counter()
        for entry in entries:
            assert entry.unit is not None or not entry.posted
            if entry.unit is not None:
                of = "" if UNITS.by_name[entry.unit].kind == "money" else entry.account.removeprefix("@").split("/")[-1]
                sums[entry.unit, of] += entry.posted
        assert not any(sums.values()), sums
        self.transactions.append(entries)

    def grant(self, unit: str, amount: int, *, at: datetime | None = None, expires_at: datetime | None = None) -> str:
        """A purchase."""
        self.catch_up(at)
        lot = Draft(self.head, self.state, now=self.now).begin().place.new_lot(0)
        granted = Move(
            kind="lot_granted",
            account=ACCOUNT,
            occurred_at=self.now,
            unit=unit,
            lot=lot,
            lot_kind="purchase",
            posted=amount,
            details=LotGranted(priority=100, expires_at=expires_at),
        )
        self.record([granted, self.contra(unit, -amount)])
        self.catch_up()
        return lot

    def use(self, unit: str, lot: str, amount: int) -> None:
        """A charge of what is available of a lot."""
        self.record([self.of(unit, lot, "charged", posted=-amount), self.contra(unit, amount)])

    def owe(self, unit: str, amount: int) -> None:
        """A charge beyond what is there."""
        lot = Draft(self.head, self.state, now=self.now).begin().place.new_lot(0)
        owed = Move(kind="charged", account=ACCOUNT, occurred_at=self.now, unit=unit, lot=lot, lot_kind="debt")
        self.record([msgspec.structs.replace(owed, posted=-amount), self.contra(unit, amount)])

    def hold(self, unit: str, lot: str, amount: int, *, hold: str) -> None:
        placed = HoldPlaced(account=ACCOUNT, expires_at=self.now + timedelta(days=9), overdue="release", legs=())
        held = self.of(unit, lot, "hold_placed", held=amount)
        self.record([msgspec.structs.replace(held, hold=hold, details=placed)])

    def release(self, unit: str, lot: str, amount: int, *, hold: str) -> list[Move]:
        """What becomes of what a hold gives back, besides."""
        self.catch_up()
        at = Draft(self.head, self.state, now=self.now).recorded_at
        besides = released_moves(self.lot(unit, lot), amount, units=UNITS, occurred_at=at)
        freed = msgspec.structs.replace(self.of(unit, lot, "hold_released", held=-amount), hold=hold)
        self.record([freed, *besides])
        return besides

    def freeze(self, unit: str, lot: str, amount: int) -> None:
        """A freeze, told as what it does to the lot."""
        self.record([msgspec.structs.replace(self.of(unit, lot, "adjusted"), frozen=amount)])

    def of(self, unit: str, lot: str, kind: Kind, *, posted: int = 0, held: int = 0) -> Move:
        found = self.lot(unit, lot)
        return Move(
            kind=kind,
            account=ACCOUNT,
            occurred_at=self.now,
            unit=unit,
            lot=lot,
            lot_kind=found.kind,
            posted=posted,
            held=held,
        )

    def contra(self, unit: str, posted: int) -> Move:
        return contra_move(
            "charged", "@usage", account=ACCOUNT, unit=UNITS.by_name[unit], posted=posted, occurred_at=self.now
        )

    # Then

    def wallet(self, unit: str) -> Wallet:
        found = self.state.wallet(ACCOUNT, unit)
        assert found is not None
        return found

    def lot(self, unit: str, lot: str) -> Lot:
        return self.wallet(unit).lots[lot]

    def available(self, unit: str) -> int:
        return self.wallet(unit).available(self.now)

    @property
    def entries(self) -> list[Entry]:
        return [entry for transaction in self.transactions for entry in transaction]

    def periods(self, rule: str = "r") -> dict[int, tuple[int, int]]:
        """Of each period that was granted: its amount, and what of it was rolled over. Each was granted once."""
        found = [
            (entry.details.period, entry.posted, entry.details.rolled_over)
            for entry in self.entries
            if isinstance(entry.details, LotGranted) and entry.details.rule == rule
        ]
        assert len({period for period, _, _ in found}) == len(found)
        return {period: (posted, rolled_over) for period, posted, rolled_over in found if period is not None}

    def told(self) -> list[tuple[str, str | None, datetime, int]]:
        """What happened in the world's time, without the ids of lots."""
        return [
            (entry.kind, entry.lot_kind, entry.occurred_at, entry.posted)
            for entry in self.entries
            if entry.kind in {"lot_granted", "lot_expired", "debt_repaid", "wallet_set"}
        ]

    def replayed(self) -> PartitionState:
        """The state of the journal alone, through its stored form."""
        state = PartitionState()
        for entry in self.entries:
            text = details_text(entry.details)
            details = None if text is None else msgspec.json.decode(text, type=Details)
            evolve(state, msgspec.structs.replace(entry, details=details))
        return state


def monthly(unit: str, amount: int, **more: object) -> Rule:
    """A grant for every calendar month from January 2026 on."""
    terms = {"id": "r", "unit": unit, "amount": amount, "period": "month", "anchor": JANUARY, **more}
    return msgspec.convert(terms, Rule)


def ledger(rule: Rule, *units: str) -> Clockwork:
    """A ledger on the 10th of January with a rule; its first period has been granted."""
    clockwork = Clockwork(*(units or (rule.unit,)))
    clockwork.do(SetRule(account=ACCOUNT, rule=rule))
    return clockwork


def only_lot(clockwork: Clockwork, unit: str) -> Lot:
    (lot,) = clockwork.wallet(unit).burning()
    return lot


# Expiry


def test_what_is_available_of_a_lot_expires_at_its_end_and_what_is_held_stays() -> None:
    """Worked example 7."""
    clockwork = Clockwork("usd")
    ends = BEGIN + timedelta(hours=1)
    lot = clockwork.grant("usd", 15, expires_at=ends)
    clockwork.hold("usd", lot, 10, hold="h")
    clockwork.now = ends
    assert clockwork.available("usd") == 0, "swept or not"
    assert clockwork.catch_up() == 1
    wallet = clockwork.wallet("usd")
    assert (wallet.posted, wallet.held, clockwork.available("usd")) == (10, 10, 0)
    assert clockwork.lot("usd", lot).expired == 5
    expired = clockwork.transactions[-1][0]
    assert (expired.kind, expired.occurred_at, expired.posted) == ("lot_expired", ends, -5)
    assert next_due(clockwork.state, [ACCOUNT]) is None, "what is held waits for its hold, not for the time"
    clockwork.release("usd", lot, 10, hold="h")
    assert (wallet.posted, wallet.held) == (0, 0), "what is given back has ended, too"
    assert clockwork.transactions[-1][1].occurred_at > ends


def test_nothing_expires_before_its_time() -> None:
    clockwork = Clockwork("usd")
    ends = BEGIN + timedelta(hours=1)
    clockwork.grant("usd", 15, expires_at=ends)
    assert next_due(clockwork.state, [ACCOUNT]) == ends
    assert clockwork.catch_up(ends - timedelta(microseconds=1)) == 0
    assert clockwork.catch_up(ends) == 1


def test_what_is_frozen_does_not_expire() -> None:
    clockwork = Clockwork("usd")
    lot = clockwork.grant("usd", 15, expires_at=BEGIN + timedelta(hours=1))
    clockwork.freeze("usd", lot, 6)
    clockwork.catch_up(BEGIN + timedelta(hours=2))
    assert (clockwork.lot("usd", lot).posted, clockwork.lot("usd", lot).frozen) == (6, 6)
    assert next_due(clockwork.state, [ACCOUNT]) is None
    clockwork.freeze("usd", lot, -6)
    clockwork.catch_up()
    assert clockwork.wallet("usd").posted == 0, "and is not forgotten when it is no longer frozen"


def test_what_is_pending_for_a_claim_is_held_and_does_not_expire() -> None:
    clockwork = Clockwork("usd")
    lot = clockwork.grant("usd", 15, expires_at=BEGIN + timedelta(hours=1))
    clockwork.hold("usd", lot, 10, hold="h")
    clockwork.lot("usd", lot).pending = 10
    clockwork.catch_up(BEGIN + timedelta(hours=2))
    found = clockwork.lot("usd", lot)
    assert (found.posted, found.held, found.pending) == (10, 10, 10)


def test_a_lot_that_was_granted_after_its_end_expires_at_once_and_was_never_less_than_nothing() -> None:
    clockwork = Clockwork("usd")
    lot = clockwork.grant("usd", 15, expires_at=BEGIN - timedelta(days=1))
    assert clockwork.wallet("usd").posted == 0
    expired = next(entry for entry in clockwork.entries if entry.kind == "lot_expired")
    granted = next(entry for entry in clockwork.entries if entry.kind == "lot_granted")
    assert expired.lot == lot
    assert expired.occurred_at == granted.occurred_at


def test_a_lot_that_has_not_begun_is_due_at_its_end_only() -> None:
    clockwork = Clockwork("usd")
    begins, ends = BEGIN + timedelta(days=1), BEGIN + timedelta(days=2)
    lot = Draft(clockwork.head, clockwork.state, now=BEGIN).begin().place.new_lot(0)
    details = LotGranted(priority=1, effective_at=begins, expires_at=ends)
    granted = Move(
        kind="lot_granted", account=ACCOUNT, occurred_at=BEGIN, unit="usd", lot=lot, lot_kind="promo", details=details
    )
    clockwork.record([msgspec.structs.replace(granted, posted=5), clockwork.contra("usd", -5)])
    assert next_due(clockwork.state, [ACCOUNT]) == ends
    assert clockwork.available("usd") == 0
    assert clockwork.catch_up(begins) == 0
    assert clockwork.available("usd") == 5
    assert clockwork.catch_up(ends) == 1


def test_lots_that_end_together_expire_together_and_others_by_themselves() -> None:
    clockwork = Clockwork("usd", "points")
    soon, late = BEGIN + timedelta(hours=1), BEGIN + timedelta(hours=2)
    for unit, ends in (("usd", late), ("usd", soon), ("points", soon), ("usd", soon)):
        clockwork.grant(unit, 1, expires_at=ends)
    assert clockwork.catch_up(late) == 3
    expired = [[entry.lot for entry in each if entry.lot] for each in clockwork.transactions[-3:]]
    assert [len(each) for each in expired] == [1, 2, 1]
    assert [each[0].occurred_at for each in clockwork.transactions[-3:]] == [soon, soon, late]


@pytest.mark.parametrize(
    ("void", "ended", "kind", "contra"),
    [
        (False, True, "lot_expired", "@expired"),
        (True, False, "lot_voided", "@stripe"),
        (True, True, "lot_voided", "@stripe"),
    ],
)
def test_what_is_released_of_a_lot_that_is_no_more_goes_where_the_lot_went(
    void: bool, ended: bool, kind: str, contra: str
) -> None:
    clockwork = Clockwork("usd")
    lot = clockwork.grant("usd", 15, expires_at=BEGIN + timedelta(hours=1))
    clockwork.lot("usd", lot).void = void
    at = BEGIN + timedelta(hours=2) if ended else BEGIN
    moves = released_moves(clockwork.lot("usd", lot), 4, units=UNITS, occurred_at=at)
    assert [(move.kind, move.account, move.posted, move.occurred_at) for move in moves] == [
        (kind, ACCOUNT, -4, at),
        (kind, contra, 4, at),
    ]
    assert released_moves(clockwork.lot("usd", lot), 0, units=UNITS, occurred_at=at) == []


def test_what_is_released_of_a_lot_that_lives_stays() -> None:
    clockwork = Clockwork("usd")
    lot = clockwork.grant("usd", 15, expires_at=BEGIN + timedelta(hours=1))
    ends = BEGIN + timedelta(hours=1)
    for at in (BEGIN, ends - timedelta(microseconds=1)):
        assert released_moves(clockwork.lot("usd", lot), 4, units=UNITS, occurred_at=at) == []
    assert released_moves(clockwork.lot("usd", lot), 4, units=UNITS, occurred_at=ends) != []


# Renewal


def test_a_period_has_one_lot_from_its_boundary_to_the_next() -> None:
    clockwork = ledger(monthly("tokens", 100))
    lot = only_lot(clockwork, "tokens")
    assert (lot.kind, lot.rule, lot.period, lot.granted) == ("plan", "r", 0, 100)
    assert (lot.effective_at, lot.expires_at, lot.occurred_at) == (JANUARY, FEBRUARY, JANUARY)
    clockwork.use("tokens", lot.id, 30)
    assert clockwork.catch_up(FEBRUARY - timedelta(microseconds=1)) == 0
    assert clockwork.catch_up(FEBRUARY) == 1
    assert clockwork.available("tokens") == 100
    assert [(entry.kind, entry.posted, entry.occurred_at) for entry in clockwork.transactions[-1]] == [
        ("lot_expired", -70, FEBRUARY),
        ("lot_expired", 70, FEBRUARY),
        ("lot_granted", 100, FEBRUARY),
        ("lot_granted", -100, FEBRUARY),
    ]


def test_january_keeps_what_is_held_of_it_and_february_is_whole() -> None:
    """Worked example 8, but for the charge."""
    clockwork = ledger(monthly("tokens", 100))
    january = only_lot(clockwork, "tokens")
    clockwork.use("tokens", january.id, 50)
    clockwork.catch_up(FEBRUARY - timedelta(minutes=1))
    clockwork.hold("tokens", january.id, 10, hold="h")
    clockwork.catch_up(FEBRUARY + timedelta(minutes=5))
    assert (january.posted, january.held, january.expired) == (10, 10, 40)
    assert clockwork.available("tokens") == 100


@pytest.mark.parametrize(
    ("used", "held", "rolled_over"), [(0, 0, 40), (70, 0, 30), (70, 5, 25), (95, 0, 10), (100, 0, 10), (60, 40, 10)]
)
def test_the_unheld_remaining_is_rolled_over_between_a_least_and_a_most(used: int, held: int, rolled_over: int) -> None:
    clockwork = ledger(monthly("usd", 100, rollover_min=10, rollover_max=40))
    january = only_lot(clockwork, "usd")
    clockwork.use("usd", january.id, used)
    if held:
        clockwork.hold("usd", january.id, held, hold="h")
    clockwork.catch_up(FEBRUARY)
    assert clockwork.periods() == {0: (100, 0), 1: (100 + rolled_over, rolled_over)}
    assert clockwork.available("usd") == 100 + rolled_over
    if held:
        clockwork.release("usd", january.id, held, hold="h")
        assert clockwork.wallet("usd").posted == 100 + rolled_over, "what is released later expires"


def test_what_was_rolled_over_is_rolled_over_again_within_the_most() -> None:
    clockwork = ledger(monthly("usd", 100, rollover_max=150))
    clockwork.catch_up(datetime(2026, 5, 1, tzinfo=UTC))
    assert clockwork.periods() == {0: (100, 0), 1: (200, 100), 2: (250, 150), 3: (250, 150), 4: (250, 150)}


def test_a_renewal_of_money_repays_what_is_owed_first_and_of_a_cap_nothing() -> None:
    clockwork = ledger(monthly("usd", 100))
    clockwork.use("usd", only_lot(clockwork, "usd").id, 100)
    clockwork.owe("usd", 30)
    clockwork.owe("usd", 5)
    clockwork.catch_up(FEBRUARY)
    assert clockwork.wallet("usd").posted == clockwork.available("usd") == 65
    assert clockwork.wallet("usd").owed == 0
    assert [each.posted for each in clockwork.entries if each.kind == "debt_repaid"] == [-30, 30, -5, 5]
    clockwork.catch_up(MARCH)
    assert clockwork.available("usd") == 100


def test_months_without_a_service_are_granted_once_each_and_their_ends_have_been() -> None:
    clockwork = ledger(monthly("tokens", 100))
    assert clockwork.catch_up(datetime(2027, 1, 5, tzinfo=UTC)) == 12
    assert list(clockwork.periods()) == list(range(13))
    assert clockwork.available("tokens") == 100
    assert sum(entry.posted for entry in clockwork.entries if entry.lot) == 100
    assert clockwork.catch_up() == 0


def test_a_rule_from_long_ago_grants_all_its_periods_once() -> None:
    clockwork = ledger(monthly("usd", 100, anchor=datetime(2025, 10, 31, tzinfo=UTC), rollover_max=50))
    assert clockwork.periods() == {0: (100, 0), 1: (150, 50), 2: (150, 50)}
    assert clockwork.available("usd") == 150


def test_a_rule_from_later_on_grants_nothing_before() -> None:
    clockwork = ledger(monthly("usd", 100, first_period=2))
    assert clockwork.available("usd") == 0
    assert next_due(clockwork.state, [ACCOUNT]) == MARCH
    clockwork.catch_up(MARCH)
    assert clockwork.periods() == {2: (100, 0)}


def test_a_rule_that_ends_lets_its_last_period_expire() -> None:
    clockwork = ledger(monthly("usd", 100, end_period=2))
    clockwork.catch_up(datetime(2026, 12, 1, tzinfo=UTC))
    assert list(clockwork.periods()) == [0, 1]
    assert clockwork.wallet("usd").posted == 0
    assert clockwork.transactions[-1][0].occurred_at == MARCH
    assert next_due(clockwork.state, [ACCOUNT]) is None


def test_a_period_of_nothing_is_a_period() -> None:
    clockwork = ledger(monthly("usd", 0, rollover_min=3, rollover_max=3))
    clockwork.catch_up(MARCH)
    assert clockwork.periods() == {0: (0, 0), 1: (3, 3), 2: (3, 3)}


def test_a_wallet_is_limited_from_the_first_period_of_the_rule_on_and_owes_nothing_of_what_it_counted_before() -> None:
    """Worked example 10, but for the charge."""
    clockwork = Clockwork("tokens")
    unlimited = monthly("tokens", 0, id="pro", policy="unlimited")
    clockwork.do(ChangePlan(account=ACCOUNT, plan="pro", rules=(unlimited,)))
    wallet = clockwork.wallet("tokens")
    assert wallet.policy == "unlimited"
    counted = Move(
        kind="charged",
        account=ACCOUNT,
        occurred_at=BEGIN,
        unit="tokens",
        lot=Draft(clockwork.head, clockwork.state, now=BEGIN).begin().place.new_lot(0),
        lot_kind="uncapped",
        posted=-5_000_000,
    )
    clockwork.record([counted, clockwork.contra("tokens", 5_000_000)])
    free = monthly("tokens", 1_000, id="free", policy="hard")
    clockwork.do(ChangePlan(account=ACCOUNT, plan="free", rules=(free,), at_period_end=True))
    clockwork.catch_up(FEBRUARY - timedelta(seconds=1))
    assert wallet.policy == "unlimited"
    clockwork.catch_up(FEBRUARY)
    assert (wallet.policy, clockwork.available("tokens"), wallet.uncapped) == ("hard", 1_000, 5_000_000)


def test_the_terms_of_a_rule_count_once_and_not_against_those_that_were_set_since() -> None:
    clockwork = ledger(monthly("usd", 10, policy="hard", overdraft=7))
    assert clockwork.wallet("usd").overdraft == 7
    clockwork.do(SetWallet(account=ACCOUNT, terms=WalletTerms("usd", policy="soft")))
    clockwork.catch_up(FEBRUARY)
    assert clockwork.wallet("usd").policy == "soft"
    clockwork.do(SetRule(account=ACCOUNT, rule=monthly("usd", 20, policy="hard", overdraft=3)))
    assert clockwork.wallet("usd").policy == "soft"
    clockwork.catch_up(MARCH)
    assert (clockwork.wallet("usd").policy, clockwork.wallet("usd").overdraft) == ("hard", 3)


def test_an_overdraft_goes_with_the_hardness_of_its_wallet() -> None:
    clockwork = ledger(monthly("usd", 10, policy="hard", overdraft=7, end_period=1))
    clockwork.do(SetRule(account=ACCOUNT, rule=monthly("usd", 10, id="soft", policy="soft", first_period=1)))
    clockwork.catch_up(FEBRUARY)
    assert (clockwork.wallet("usd").policy, clockwork.wallet("usd").overdraft) == ("soft", 0)


def test_a_renewal_grants_no_more_than_its_wallet_can_count() -> None:
    clockwork = ledger(monthly("usd", AMOUNT_MAX, rollover_max=AMOUNT_MAX))
    for _ in range(3):
        clockwork.grant("usd", AMOUNT_MAX)
    clockwork.catch_up(MARCH)
    assert clockwork.wallet("usd").posted == BALANCE_MAX
    assert clockwork.periods()[2] == (AMOUNT_MAX, AMOUNT_MAX)


def test_two_rules_of_a_wallet_do_not_touch_each_others_lots() -> None:
    clockwork = ledger(monthly("usd", 100, rollover_max=1_000))
    daily = monthly("usd", 3, id="daily", period="day", first_period=9, priority=1)
    clockwork.do(SetRule(account=ACCOUNT, rule=daily))
    clockwork.catch_up(FEBRUARY + timedelta(hours=1))
    assert clockwork.periods("daily") == dict.fromkeys(range(9, 32), (3, 0))
    assert clockwork.periods() == {0: (100, 0), 1: (200, 100)}
    assert clockwork.available("usd") == 203


def test_nothing_due_is_found_without_looking_at_lots_again() -> None:
    clockwork = ledger(monthly("usd", 100))
    wallet = clockwork.wallet("usd")
    assert next_due(clockwork.state, [ACCOUNT]) == FEBRUARY
    clockwork.use("usd", only_lot(clockwork, "usd").id, 10)
    assert wallet._due == FEBRUARY
    assert next_due(clockwork.state, ["nobody", ACCOUNT]) == FEBRUARY


# Laws

_TIMES = st.lists(st.integers(1, 60 * 24 * 120), min_size=1, max_size=12).map(
    lambda minutes: [BEGIN + timedelta(minutes=each) for each in sorted(minutes)]
)


@st.composite
def _rules(draw: st.DrawFn, name: str) -> Rule:
    least = draw(st.integers(0, 30))
    zone = draw(st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"]))
    anchor = BEGIN + timedelta(minutes=draw(st.integers(-60 * 24 * 90, 60 * 24 * 40)))
    return Rule(
        id=name,
        unit="usd",
        amount=draw(st.integers(0, 100)),
        period=draw(st.sampled_from(["day", "week", "month"])),
        every=draw(st.integers(1, 5)),
        anchor=anchor.astimezone(ZoneInfo(zone)),
        zone=zone,
        rollover_min=least,
        rollover_max=least + draw(st.integers(0, 100)),
        policy=draw(st.sampled_from([None, "hard", "soft"])),
        end_period=draw(st.none() | st.integers(3, 30)),
    )


@given(_rules("r"), _rules("s"), _TIMES, st.lists(st.integers(1, 60 * 24 * 90), max_size=4), st.integers(0, 400))
def test_it_is_all_the_same_when_and_how_often_what_is_due_is_done(
    one: Rule, other: Rule, times: list[datetime], lives: list[int], owed: int
) -> None:
    def begun() -> Clockwork:
        clockwork = Clockwork("usd")
        if owed:
            clockwork.owe("usd", owed)
        for minutes in lives:
            clockwork.grant("usd", 50, expires_at=BEGIN + timedelta(minutes=minutes))
        for rule in (one, other):
            clockwork.do(SetRule(account=ACCOUNT, rule=rule))
        return clockwork

    at_once, by_steps = begun(), begun()
    for time in times:
        by_steps.catch_up(time)
    at_once.catch_up(times[-1])
    assert at_once.told() == by_steps.told()
    for clockwork in (at_once, by_steps):
        for rule in (one, other):
            granted = clockwork.periods(rule.id)
            ends = 10**9 if rule.end_period is None else rule.end_period
            assert list(granted) == [n for n in range(600) if n < ends and boundary(rule, n) <= times[-1]]
        wallet = clockwork.wallet("usd")
        live = [lot for lot in wallet.burning() if lot.available]
        assert all(lot.is_valid(clockwork.now) for lot in live)
        assert wallet.available(clockwork.now) == wallet.posted
        assert wallet.posted == sum(entry.posted for entry in clockwork.entries if entry.lot)
    assert {(lot.kind, lot.period, lot.available) for lot in at_once.wallet("usd").burning() if lot.available} == {
        (lot.kind, lot.period, lot.available) for lot in by_steps.wallet("usd").burning() if lot.available
    }


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["grant", "use", "hold", "release", "freeze", "wait", "wait"]),
        st.integers(1, 60),
        st.integers(0, 10),
    ),
    max_size=25,
)


@given(_rules("r"), _STEPS)
def test_what_is_due_next_is_known_after_every_entry_as_if_it_were_looked_up_anew(
    rule: Rule, steps: list[tuple[str, int, int]]
) -> None:
    clockwork = ledger(rule, "usd")
    holds: list[tuple[str, str, int]] = []
    for number, (what, amount, which) in enumerate(steps):
        wallet = clockwork.wallet("usd")
        lots = [lot for lot in wallet.burning() if lot.available >= amount and lot.is_valid(clockwork.now)]
        if what == "wait":
            clockwork.catch_up(clockwork.now + timedelta(hours=amount * 6))
        elif what == "grant":
            ends = None if which == 0 else clockwork.now + timedelta(hours=(which - 2) * 12)
            clockwork.grant("usd", amount, expires_at=ends)
        elif what == "release" and holds:
            lot, hold, held = holds.pop(which % len(holds))
            clockwork.release("usd", lot, held, hold=hold)
        elif lots and what == "use":
            clockwork.use("usd", lots[which % len(lots)].id, amount)
        elif lots and what == "freeze":
            clockwork.freeze("usd", lots[which % len(lots)].id, amount)
        elif lots and what == "hold":
            lot = lots[which % len(lots)].id
            clockwork.hold("usd", lot, amount, hold=f"hold-{number}")
            holds.append((lot, f"hold-{number}", amount))
        wallet = clockwork.wallet("usd")
        ends_at = [lot.expires_at for lot in wallet.burning() if lot.available > 0 and lot.expires_at]
        renewals = [boundary(each.rule, each.next_period) for each in wallet.rules.values() if not each.is_over]
        assert wallet.next_due() == min([*ends_at, *renewals], default=NEVER)
        assert wallet.next_due() > clockwork.now
        assert all(lot.posted >= lot.held + lot.frozen for lot in wallet.burning())
    replayed = clockwork.replayed().wallet(ACCOUNT, "usd")
    assert replayed is not None
    live = clockwork.wallet("usd")
    assert (replayed.posted, replayed.held, replayed.frozen) == (live.posted, live.held, live.frozen)
    assert replayed.next_due() == live.next_due()
    assert replayed.rules["r"].next_period == live.rules["r"].next_period


def test_a_void_is_said_on_each_entry_that_voids() -> None:
    clockwork = Clockwork("usd")
    lot = clockwork.grant("usd", 15)
    clockwork.lot("usd", lot).void = True
    (voided, contra) = released_moves(clockwork.lot("usd", lot), 4, units=UNITS, occurred_at=BEGIN)
    assert voided.details == LotVoided()
    assert contra.account == granted_by("purchase")
