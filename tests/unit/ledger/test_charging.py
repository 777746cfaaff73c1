"""Charges and debits: who pays, of which lots, what is owed, and what late ones may still use."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.accounts import path
from services.ledger.domain.commands import (
    LATE_GRACE,
    ChargeLine,
    ClaimPayment,
    Command,
    ExtendHold,
    Grant,
    LotScope,
    Overdue,
    PlaceHold,
    Policy,
    ReleaseHold,
    ResolveHold,
    Rule,
    Scope,
    SetRule,
    SetWallet,
    VoidGrant,
    WalletTerms,
)
from services.ledger.domain.entries import ASIDE_KINDS, PSEUDO_KINDS, Entry, Move
from services.ledger.domain.errors import AccountDiffers, HoldSettled, InsufficientFunds
from services.ledger.domain.state import Lot, Wallet
from tests.unit.ledger.core import SCOPE, Core, leg, new_hold

DAY = timedelta(days=1)
OTHER = Scope("anthropic", "claude")
OPENAI = LotScope(providers=("openai",))


def core_with(*wallets: tuple[str, str, int]) -> Core:
    """Accounts with a wallet each, and a purchase in it."""
    core = Core()
    for account, unit, amount in wallets:
        core.open(account, unit)
        if amount:
            core.grant(account, unit, amount)
    return core


def hold_of(core: Core, unit: str, amount: int, *, overdue: Overdue = "release", account: str = "acme") -> str:
    """Set aside what must be there."""
    hold = new_hold()
    core.do(PlaceHold(hold=hold, account=account, legs=(leg(unit, amount),), overdue=overdue, scope=SCOPE))
    return hold


def monthly(core: Core, unit: str, amount: int, *, rollover_max: int = 0, account: str = "acme") -> None:
    """A plan's grant on the first of each month."""
    anchor = core.now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    rule = Rule(
        id="plan", unit=unit, amount=amount, period="month", anchor=anchor, plan="pro", rollover_max=rollover_max
    )
    core.do(SetRule(account=account, rule=rule))
    core.due()


def moved(moves: list[Move]) -> list[tuple[str, str | None, int, int]]:
    """What was moved of lots."""
    return [(move.kind, move.lot_kind, move.posted, move.held) for move in moves if move.lot is not None]


def test_a_lot_set_aside_for_another_scope_is_released_not_used() -> None:
    core = Core()
    core.open("acme", "usd")
    promo = core.grant("acme", "usd", 5, kind="promo", scope=OPENAI)
    hold = hold_of(core, "usd", 5)
    core.do(core.line("acme", ("usd", 2), hold=hold, scope=OTHER))
    assert core.lot(promo).available == 5
    assert core.of_kind("acme", "usd", "debt") == -2


def test_what_came_in_since_pays_before_what_stood_in_for_it() -> None:
    core = Core()
    core.open("acme", "usd", policy="soft")
    hold = hold_of(core, "usd", 10)
    core.grant("acme", "usd", 6)
    moves = core.do(core.line("acme", ("usd", 4), hold=hold, final=False))
    assert moved(moves) == [("charged", "purchase", -4, 0), ("charged", "debt", 0, -4)]
    assert core.amounts("acme", "usd") == (2, 6)
    core.do(core.line("acme", ("usd", 9), hold=hold))
    assert core.amounts("acme", "usd") == (-7, 0)
    assert core.of_kind("acme", "usd", "debt") == -7


def test_a_hold_placed_while_unlimited_is_counted_as_such() -> None:
    core = Core()
    core.open("acme", "tokens", policy="unlimited")
    hold = hold_of(core, "tokens", 10)
    core.do(SetWallet(account="acme", terms=WalletTerms("tokens", "hard")))
    core.grant("acme", "tokens", 5)
    core.do(core.line("acme", ("tokens", 12), hold=hold))
    wallet = core.wallet("acme", "tokens")
    assert (wallet.posted, wallet.uncapped, wallet.overage) == (3, 10, 0)


def test_a_hold_placed_while_limited_frees_what_stood_in_once_it_is_not() -> None:
    core = Core()
    core.open("acme", "usd", policy="soft")
    hold = hold_of(core, "usd", 10)
    core.do(SetWallet(account="acme", terms=WalletTerms("usd", "unlimited")))
    core.do(core.line("acme", ("usd", 12), hold=hold))
    assert core.amounts("acme", "usd") == (0, 0)
    assert core.wallet("acme", "usd").uncapped == 12


def test_a_caps_excess_is_counted_in_its_period() -> None:
    core = Core(now=datetime(2026, 1, 5, tzinfo=UTC))
    core.open("acme", "tokens")
    monthly(core, "tokens", 10)
    core.do(core.line("acme", ("tokens", 12)))
    core.do(core.line("acme", ("tokens", 1)))
    last = datetime(2026, 1, 31, 23, 59, tzinfo=UTC)
    core.now = datetime(2026, 2, 1, 0, 1, tzinfo=UTC)
    core.do(core.line("acme", ("tokens", 4), at=last))
    core.do(core.line("acme", ("tokens", 13)))
    core.do(core.line("acme", ("tokens", 2), at=datetime(2025, 12, 31, tzinfo=UTC)))
    lots = core.wallet("acme", "tokens").lots.values()
    overages = {(lot.rule, lot.period): lot.posted for lot in lots if lot.kind == "overage"}
    assert overages == {("plan", 0): -7, ("plan", 1): -3, (None, None): -2}
    assert len([lot for lot in lots if lot.kind == "overage"]) == 3


def test_a_period_is_known_when_its_lot_is_no_longer() -> None:
    core = Core(now=datetime(2026, 1, 5, tzinfo=UTC))
    core.open("acme", "tokens")
    monthly(core, "tokens", 10)
    core.do(core.line("acme", ("tokens", 10)))
    core.now = datetime(2026, 3, 1, tzinfo=UTC)
    core.due()
    wallet = core.wallet("acme", "tokens")
    wallet.forget_past(core.now - DAY)
    moves = core.do(core.line("acme", ("tokens", 4), at=datetime(2026, 1, 20, tzinfo=UTC)))
    opened = moves[0]
    assert opened.kind == "lot_opened"
    assert (wallet.lots[str(opened.lot)].rule, wallet.lots[str(opened.lot)].period) == ("plan", 0)


def test_what_was_rolled_over_is_not_revived_too() -> None:
    core = Core(now=datetime(2026, 1, 5, tzinfo=UTC))
    core.open("acme", "tokens")
    monthly(core, "tokens", 10, rollover_max=4)
    core.now = datetime(2026, 2, 1, 0, 1, tzinfo=UTC)
    core.do(core.line("acme", ("tokens", 9), at=datetime(2026, 1, 31, tzinfo=UTC)))
    wallet = core.wallet("acme", "tokens")
    january, february = (lot for lot in wallet.lots.values() if lot.kind == "plan")
    assert (january.posted, january.expired, february.posted) == (0, 4, 14)
    assert wallet.overage == 3


@pytest.mark.parametrize(
    ("occurred", "recorded", "debt"),
    [(-1, 1, 0), (-1, 24 * 60, 0), (-1, 24 * 60 + 1, 5), (0, 1, 5), (1, 2, 5)],
)
def test_money_that_expired_pays_what_occurred_before_within_the_grace(occurred: int, recorded: int, debt: int) -> None:
    core = Core()
    core.open("acme", "usd")
    ends = core.now + timedelta(hours=1)
    lot = core.grant("acme", "usd", 8, ends=ends)
    core.now = ends + timedelta(minutes=recorded)
    core.due()
    core.now = ends + timedelta(minutes=recorded)
    core.do(core.line("acme", ("usd", 5), at=ends + timedelta(minutes=occurred)))
    assert core.of_kind("acme", "usd", "debt") == -debt
    assert core.lot(lot).expired == 3 + debt
    assert [entry.occurred_at for entry in core.entries if entry.kind == "lot_revived"] == ([] if debt else [ends] * 2)


@pytest.mark.parametrize(("hours", "debt"), [(23, 0), (25, 7)])
def test_a_late_charge_may_use_what_its_hold_had_set_aside(hours: int, debt: int) -> None:
    core = Core()
    core.open("acme", "usd")
    core.grant("acme", "usd", 10, ends=core.now + timedelta(minutes=10))
    hold = hold_of(core, "usd", 10)
    core.later(minutes=15)
    core.do(ResolveHold(hold=hold, account="acme"))
    assert core.amounts("acme", "usd") == (0, 0)
    core.later(hours=hours)
    core.do(core.line("acme", ("usd", 7), hold=hold))
    assert core.of_kind("acme", "usd", "debt") == -debt
    assert core.state.holds[hold].status == "expired"


def test_a_late_charge_is_paid_by_its_holds_wallets_and_leaves_it_ended() -> None:
    core = core_with(("acme", "usd", 10))
    core.open("acme/ana")
    hold = hold_of(core, "usd", 4, account="acme/ana")
    core.do(ReleaseHold(hold=hold, account="acme/ana"))
    core.open("acme/ana", "usd")
    core.do(core.line("acme/ana", ("usd", 3), hold=hold, final=False))
    assert core.amounts("acme", "usd") == (7, 0)
    assert core.amounts("acme/ana", "usd") == (0, 0)
    assert core.state.holds[hold].status == "released"


def test_a_void_lot_is_never_revived() -> None:
    core = Core()
    core.open("acme", "usd")
    lot = core.grant("acme", "usd", 10, ends=core.now + timedelta(minutes=10))
    hold = hold_of(core, "usd", 4)
    core.do(VoidGrant(account="acme", lot=lot))
    begun = core.now
    core.later(minutes=11)
    core.do(core.line("acme", ("usd", 6), hold=hold))
    core.do(core.line("acme", ("usd", 1), at=begun))
    assert core.of_kind("acme", "usd", "debt") == -3


def test_a_final_charge_frees_what_claims_wait_for() -> None:
    """Buy 50, hold 10, refund 50: of the hold 3 are used and owed, 7 are taken."""
    core = Core()
    core.open("acme", "usd")
    core.grant("acme", "usd", 50, reference="pi_1")
    hold = hold_of(core, "usd", 10)
    core.do(
        ClaimPayment(
            account="acme", payment="pi_1", claim="re_1", reason="refund", state="final", unit="usd", claimed=50
        )
    )
    assert core.amounts("acme", "usd") == (10, 10)
    core.do(core.line("acme", ("usd", 1), hold=hold, final=False))
    core.do(core.line("acme", ("usd", 2), hold=hold))
    assert core.amounts("acme", "usd") == (-3, 0)
    assert core.of_kind("acme", "usd", "debt") == -3


# After an estimate


def estimated(core: Core, amount: int, *, unit: str = "usd") -> str:
    """A hold whose estimate has been charged."""
    hold = hold_of(core, unit, amount, overdue="charge_estimate")
    core.later(minutes=15)
    core.do(ResolveHold(hold=hold, account="acme"))
    return hold


def test_what_is_left_of_an_estimate_on_a_lot_that_has_ended_expires() -> None:
    core = Core()
    core.open("acme", "usd")
    lot = core.grant("acme", "usd", 10, ends=core.now + timedelta(minutes=10))
    core.grant("acme", "usd", 10)
    hold = estimated(core, 10)
    core.do(core.line("acme", ("usd", 7), hold=hold))
    assert core.amounts("acme", "usd") == (10, 0)
    assert core.lot(lot).expired == 3


def test_what_is_left_of_an_estimate_on_a_void_lot_is_voided() -> None:
    core = Core()
    core.open("acme", "usd")
    lot = core.grant("acme", "usd", 12)
    hold = hold_of(core, "usd", 10, overdue="charge_estimate")
    core.do(VoidGrant(account="acme", lot=lot))
    core.later(minutes=15)
    core.do(ResolveHold(hold=hold, account="acme"))
    core.do(core.line("acme", ("usd", 7), hold=hold))
    assert core.amounts("acme", "usd") == (0, 0)
    assert core.of_kind("acme", "usd", "debt") == 0


def test_an_estimate_that_was_owed_and_repaid_goes_back_to_what_repaid_it() -> None:
    core = Core()
    core.open("acme", "usd", policy="soft")
    core.grant("acme", "usd", 4)
    hold = estimated(core, 10)
    assert core.of_kind("acme", "usd", "debt") == -6
    lot = core.grant("acme", "usd", 5)
    assert core.lot(lot).posted == 0
    core.do(core.line("acme", ("usd", 7), hold=hold))
    assert core.of_kind("acme", "usd", "debt") == 0
    assert core.lot(lot).posted == 2
    assert core.amounts("acme", "usd") == (2, 0)


def test_what_is_left_of_an_estimate_repays_what_was_owed_since() -> None:
    core = core_with(("acme", "usd", 10))
    hold = estimated(core, 10)
    core.do(core.line("acme", ("usd", 5)))
    core.do(core.line("acme", ("usd", 7), hold=hold))
    assert core.amounts("acme", "usd") == (-2, 0)
    assert core.of_kind("acme", "usd", "debt") == -2


def test_claims_take_what_is_left_of_an_estimate_rather_than_debt() -> None:
    core = Core()
    core.open("acme", "usd")
    core.grant("acme", "usd", 10, reference="pi_1")
    hold = estimated(core, 10)
    core.do(
        ClaimPayment(
            account="acme", payment="pi_1", claim="re_1", reason="refund", state="final", unit="usd", claimed=10
        )
    )
    assert core.of_kind("acme", "usd", "debt") == -10
    core.do(core.line("acme", ("usd", 7), hold=hold))
    assert core.amounts("acme", "usd") == (-7, 0)
    assert core.of_kind("acme", "usd", "debt") == -7


def test_an_estimate_on_pseudo_lots_is_replaced_too() -> None:
    core = Core()
    core.open("acme", "tokens", policy="unlimited")
    hold = estimated(core, 10, unit="tokens")
    core.do(SetWallet(account="acme", terms=WalletTerms("tokens", "hard")))
    core.do(core.line("acme", ("tokens", 7), hold=hold))
    wallet = core.wallet("acme", "tokens")
    assert (wallet.uncapped, wallet.overage) == (7, 0)

    core.do(SetWallet(account="acme", terms=WalletTerms("tokens", "soft")))
    hold = estimated(core, 10, unit="tokens")
    assert wallet.overage == 10
    core.do(core.line("acme", ("tokens", 4), hold=hold))
    assert (wallet.uncapped, wallet.overage) == (7, 4)


def test_a_charge_of_nothing_takes_the_estimate_back() -> None:
    core = core_with(("acme", "usd", 10))
    hold = estimated(core, 10)
    core.do(core.line("acme", hold=hold))
    assert core.amounts("acme", "usd") == (10, 0)
    empty = new_hold()
    core.do(PlaceHold(hold=empty, account="acme", legs=(leg("usd", 0, 0),), overdue="charge_estimate"))
    core.later(minutes=15)
    core.do(ResolveHold(hold=empty, account="acme"))
    core.do(core.line("acme", ("usd", 1), hold=empty))
    assert core.amounts("acme", "usd") == (9, 0)
    assert core.state.holds[empty].status == "settled"


# Debits


def test_a_debit_is_refused_by_the_wallet_that_has_least() -> None:
    core = Core()
    core.open("acme", "usd", "usd_cap")
    core.open("acme/ana", "usd_cap")
    core.grant("acme", "usd", 8)
    core.grant("acme", "usd_cap", 4)
    core.grant("acme/ana", "usd_cap", 6)
    before = len(core.entries)
    asked = core.ask(core.line("acme/ana", ("usd", 9), required=True))
    assert asked == InsufficientFunds("acme", "usd_cap", 9, 4)
    assert len(core.entries) == before
    core.do(core.line("acme/ana", ("usd", 4), required=True))
    assert core.amounts("acme", "usd") == (4, 0)
    core.do(core.line("acme/ana", ("usd", 9)))
    assert core.amounts("acme", "usd") == (-5, 0)
    asked = core.ask(core.line("acme/ana", ("usd", 1), required=True))
    assert asked == InsufficientFunds("acme", "usd", 1, 0)


@pytest.mark.parametrize(("policy", "overdraft", "fits"), [("hard", 0, 5), ("hard", 3, 8), ("soft", 0, 99)])
def test_a_debit_stops_at_the_floor_of_a_hard_wallet(policy: Policy, overdraft: int, fits: int) -> None:
    core = Core()
    core.open("acme", "usd", policy=policy, overdraft=overdraft)
    core.grant("acme", "usd", 5)
    core.grant("acme", "usd", 50, scope=LotScope(providers=("anthropic",)))
    core.grant("acme", "usd", 50, begins=core.now + DAY)
    if policy == "hard":
        asked = core.ask(core.line("acme", ("usd", fits + 1), required=True))
        assert asked == InsufficientFunds("acme", "usd", fits + 1, fits)
    core.do(core.line("acme", ("usd", fits), required=True))
    assert core.of_kind("acme", "usd", "debt") == 5 - fits


def test_a_debit_may_use_what_its_own_hold_has_set_aside_and_no_other() -> None:
    core = core_with(("acme", "usd", 10))
    mine, other = hold_of(core, "usd", 6), hold_of(core, "usd", 3)
    asked = core.ask(core.line("acme", ("usd", 8), hold=mine, required=True))
    assert asked == InsufficientFunds("acme", "usd", 8, 7)
    assert core.state.holds[mine].status == "placed"
    core.do(core.line("acme", ("usd", 7), hold=mine, required=True))
    assert core.amounts("acme", "usd") == (3, 3)
    assert core.state.holds[other].status == "placed"


def test_a_debit_on_an_overdraft_held_may_use_it() -> None:
    core = Core()
    core.open("acme", "usd", overdraft=5)
    hold = hold_of(core, "usd", 5)
    assert core.ask(core.line("acme", ("usd", 1), required=True)) == InsufficientFunds("acme", "usd", 1, 0)
    core.do(core.line("acme", ("usd", 5), hold=hold, required=True))
    assert core.amounts("acme", "usd") == (-5, 0)


def test_a_debit_on_an_unlimited_wallet_is_counted() -> None:
    core = Core()
    core.open("acme", "usd", policy="unlimited")
    core.grant("acme", "usd", 5)
    core.do(core.line("acme", ("usd", 50), required=True))
    assert core.amounts("acme", "usd") == (5, 0)
    assert core.wallet("acme", "usd").uncapped == 50


# Own keys, tombstones, accounts


def test_what_metering_left_on_an_own_keys_line_is_charged() -> None:
    """Which units count for an own key is decided where it is priced: here every amount is a fact."""
    core = core_with(("acme", "usd", 10), ("acme", "tokens", 10))
    line = core.line("acme", ("tokens", 4))
    own = type(line)(
        source="demo",
        event_id="own",
        account="acme",
        occurred_at=core.now,
        scope=SCOPE,
        price_version="v1",
        own_key=True,
        amounts=(("tokens", 4),),
    )
    core.do(own)
    assert (core.amounts("acme", "usd"), core.amounts("acme", "tokens")) == ((10, 0), (6, 0))


@pytest.mark.parametrize("final", [True, False])
def test_a_hold_that_is_charged_before_it_is_placed_is_never_placed(final: bool) -> None:
    core = core_with(("acme", "usd", 10))
    core.do(core.line("acme", ("usd", 1), hold="early", final=final))
    assert core.ask(PlaceHold(hold="early", account="acme", legs=())) == HoldSettled("early")
    core.do(core.line("acme", ("usd", 1), hold="early"))
    assert core.amounts("acme", "usd") == (8, 0)


def test_a_charge_that_names_anothers_hold_is_not_taken() -> None:
    core = core_with(("acme", "usd", 10))
    core.open("acme/ana")
    hold = hold_of(core, "usd", 4)
    assert core.ask(core.line("acme/ana", ("usd", 1), hold=hold)) == AccountDiffers(hold, "acme/ana")


def test_what_an_extension_set_aside_in_the_next_period_pays_too() -> None:
    core = Core(now=datetime(2026, 1, 31, 23, 55, tzinfo=UTC))
    core.open("acme", "tokens")
    monthly(core, "tokens", 10)
    hold = hold_of(core, "tokens", 10)
    core.now = datetime(2026, 2, 1, 0, 5, tzinfo=UTC)
    core.do(ExtendHold(hold=hold, account="acme", lifetime_seconds=900, legs=(leg("tokens", 4),)))
    core.do(core.line("acme", ("tokens", 16), hold=hold))
    wallet = core.wallet("acme", "tokens")
    assert (wallet.posted, wallet.held) == (6, 0)
    overages = [(lot.period, lot.posted) for lot in wallet.lots.values() if lot.kind == "overage"]
    assert overages == [(0, -2)]


# Laws, over any sequence of commands

ACCOUNTS = ("acme", "acme/ana")
ENDINGS = frozenset({"hold_released", "hold_expired", "hold_settled", "hold_estimated"})

accounts = st.sampled_from(ACCOUNTS)
units = st.sampled_from(("usd", "tokens"))
amounts = st.integers(0, 15)
some = st.integers(0, 9)
ends = st.sampled_from((None, None, 5, 20, 40, 90))
policies = st.sampled_from(("hard", "hard", "soft", "unlimited"))
grants = st.tuples(
    st.just("grant"),
    accounts,
    units,
    st.integers(1, 30),
    st.sampled_from((None, None, 0, 10)),
    ends,
    st.booleans(),
)
places = st.tuples(
    st.just("place"),
    accounts,
    units,
    amounts,
    amounts,
    st.sampled_from(("release", "charge_estimate")),
    st.sampled_from((SCOPE, SCOPE, OTHER, None)),
)
charges = st.tuples(
    st.just("charge"),
    accounts,
    units,
    amounts,
    st.none() | some,
    st.sampled_from((0, 0, -1, -20, -90)),
    st.sampled_from((SCOPE, SCOPE, OTHER)),
    st.booleans(),
    st.booleans(),
)
# A hold that is charged after its deadline, perhaps after more has happened.
late = st.tuples(st.just("late"), places, st.sampled_from((30, 40)), st.lists(grants | charges, max_size=2), charges)
commands = st.one_of(
    late,
    late,
    grants,
    places,
    places,
    charges,
    charges,
    charges,
    st.tuples(st.just("extend"), some, units, amounts),
    st.tuples(st.sampled_from(("release", "resolve", "resolve")), some),
    st.tuples(st.just("wait"), st.sampled_from((1, 10, 20, 40, 24 * 60))),
    st.tuples(st.just("void"), some),
    st.tuples(st.just("set"), accounts, units, policies, st.sampled_from((0, 7))),
)


class Lawful:
    """Carries out commands, and holds each to the laws."""

    def __init__(self) -> None:
        self.core = Core()
        for account in ACCOUNTS:
            self.core.open(account, "usd", "tokens", "usd_cap")
            self.core.grant(account, "usd", 20, kind="promo")
            self.core.grant(account, "tokens", 20, kind="promo")
            self.core.grant(account, "usd_cap", 90)
        self.holds: list[tuple[str, str]] = []
        self.ended: set[str] = set()
        self.reversed: set[str] = set()
        self.used: Counter[tuple[str, str]] = Counter()
        self.entries = 0

    def step(self, name: str, *given: Any) -> None:
        core = self.core
        match name:
            case "wait":
                core.later(minutes=given[0])
            case "late":
                self.step(*given[0])
                core.later(minutes=given[1])
                self.step("resolve", 0)
                for between in given[2]:
                    self.step(*between)
                self.step(*given[3][:4], 0, *given[3][5:])
            case "grant":
                account, unit, amount, begins, ends, is_scoped = given
                at = [None if each is None else core.now + timedelta(minutes=each) for each in (begins, ends)]
                core.ask(
                    Grant(
                        account=account,
                        unit=unit,
                        amount=amount,
                        kind="promo",
                        effective_at=at[0],
                        expires_at=at[1],
                        scope=OPENAI if is_scoped else None,
                    )
                )
            case "set":
                account, unit, policy, overdraft = given
                allowed = overdraft if (policy, unit) == ("hard", "usd") else 0
                core.do(SetWallet(account=account, terms=WalletTerms(unit, policy, allowed)))
            case "void":
                lots = [lot for lot in core.state.lots() if lot.kind == "promo"]
                if given[0] < len(lots):
                    core.ask(VoidGrant(account=lots[given[0]].account, lot=lots[given[0]].id))
            case _:
                self._use(name, *given)
        # Holds may have ended before it, whatever it is.
        self._ends_once(core.entries[self.entries :])
        self._holds_add_up()
        self._each_use_is_charged_once()

    def _use(self, name: str, *given: Any) -> None:  # noqa: PLR0912 - one case for each command
        core = self.core
        command: Command
        match name:
            case "place":
                account, unit, one, other, overdue, scope = given
                asked = leg(unit, min(one, other), max(one, other))
                command = PlaceHold(
                    hold=new_hold(), account=account, legs=(asked,), overdue=overdue, lifetime_seconds=1800, scope=scope
                )
                self.holds.append((command.hold, account))
            case "extend":
                hold, account = self._hold(given[0])
                command = ExtendHold(
                    hold=hold, account=account, lifetime_seconds=2400, legs=(leg(given[1], 0, given[2]),)
                )
                scope = core.state.holds[hold].scope if hold in core.state.holds else None
            case "release" | "resolve":
                hold, account = self._hold(given[0])
                scope = None
                command = (ReleaseHold if name == "release" else ResolveHold)(hold=hold, account=account)
            case _:
                account, unit, amount, number, ago, scope, final, required = given
                of_hold = None
                if number is not None:
                    of_hold, account = self._hold(number)
                at = core.now + timedelta(minutes=ago)
                command = core.line(
                    account, (unit, amount), hold=of_hold, at=at, scope=scope, final=final, required=required
                )
        core.due()
        at = core.now
        before = {key: wallet.spendable(at, scope) for key, wallet in self._wallets().items()}
        decided = core.ask(command)
        if not isinstance(decided, list):
            return
        if isinstance(command, PlaceHold | ExtendHold) or (isinstance(command, ChargeLine) and command.required):
            for key, wallet in self._wallets().items():
                if wallet.policy == "hard":
                    assert wallet.spendable(at, scope) >= min(0, before[key])
        for move in decided:
            if move.lot is not None and move.lot_kind not in PSEUDO_KINDS:
                lot = core.lot(move.lot)
                if move.held > 0:
                    assert lot.is_valid(at)
                    assert lot.is_for(scope)
                if move.kind == "charged" and isinstance(command, ChargeLine):
                    self._may_pay(command, lot, move, at)
        if isinstance(command, ChargeLine):
            self._owes_no_sooner(command, decided, at)
            for unit, amount in command.amounts:
                self.used["@usage", unit] -= amount
                for each in path(command.account):
                    self.used[f"@usage/{each}", "usd_cap" if unit == "usd" else unit] -= amount

    def _may_pay(self, line: ChargeLine, lot: Lot, move: Move, at: datetime) -> None:
        assert lot.is_for(line.scope)
        assert lot.effective_at is None or lot.effective_at <= at
        hold = None if line.hold is None else self.core.state.holds.get(line.hold)
        is_earmarked = hold is not None and (lot.account, lot.unit, lot.id) in hold.earmarks
        if lot.is_valid(at) or is_earmarked:
            return
        assert lot.expires_at is not None
        if move.unit == "usd":
            assert line.occurred_at < lot.expires_at
            assert at <= lot.expires_at + LATE_GRACE
        else:
            assert lot.is_valid(hold.recorded_at if hold is not None and hold.expires_at else line.occurred_at)

    def _owes_no_sooner(self, line: ChargeLine, moves: list[Move], at: datetime) -> None:
        """Nothing is owed, or counted beyond a cap, that the wallet has."""
        for move in moves:
            if move.kind == "charged" and move.lot_kind == "debt" and move.posted:
                lots = self._wallets()[move.account, "usd"].burning()
                assert not any(lot.available for lot in lots if lot.is_valid(at) and lot.is_for(line.scope))

    def _ends_once(self, entries: list[Entry]) -> None:
        for hold in {entry.hold for entry in entries if entry.kind in ENDINGS and entry.hold}:
            assert hold not in self.ended
            self.ended.add(hold)
        for hold in {entry.hold for entry in entries if entry.kind == "estimate_reversed" and entry.hold}:
            assert hold in self.ended
            assert hold not in self.reversed
            self.reversed.add(hold)

    def _holds_add_up(self) -> None:
        held: Counter[str] = Counter()
        for hold in self.core.state.holds.values():
            assert hold.status == "placed" or not any(earmark.held for earmark in hold.earmarks.values())
            held.update({earmark.lot: earmark.held for earmark in hold.earmarks.values()})
        assert all(lot.held == held[lot.id] for lot in self.core.state.lots())
        for wallet in self._wallets().values():
            there = [lot for lot in wallet.lots.values() if lot.kind not in ASIDE_KINDS]
            assert (wallet.posted, wallet.held) == (sum(lot.posted for lot in there), sum(lot.held for lot in there))

    def _each_use_is_charged_once(self) -> None:
        """At every level what was used, and in its place what is charged as an estimate of what is not known yet."""
        for entry in self.core.entries[self.entries :]:
            if entry.account.startswith("@usage") and entry.unit is not None:
                self.used[entry.account, entry.unit] += entry.posted
        self.entries = len(self.core.entries)
        left = Counter({key: amount for key, amount in self.used.items() if key[0] != "@usage" or key[1] == "usd"})
        for hold in self.core.state.holds.values():
            for earmark in hold.earmarks.values():
                contra = "@usage" if earmark.unit == "usd" else f"@usage/{earmark.account}"
                left[contra, earmark.unit] -= earmark.estimated
        assert not any(left.values()), left

    def _hold(self, number: int) -> tuple[str, str]:
        """One that was to be placed, or one that nobody placed."""
        if number == 9 or not self.holds:
            return f"early-{number}", "acme"
        return self.holds[-1 - number % len(self.holds)]

    def _wallets(self) -> dict[tuple[str, str], Wallet]:
        found = self.core.state.accounts.values()
        return {(account.id, unit): wallet for account in found for unit, wallet in account.wallets.items()}


@settings(max_examples=150, deadline=None)
@given(st.lists(commands, min_size=10, max_size=40))
def test_no_sequence_of_commands_breaks_a_law(steps: list[tuple[Any, ...]]) -> None:
    lawful = Lawful()
    for step in steps:
        lawful.step(*step)


@settings(max_examples=150, deadline=None)
@given(
    policy=st.sampled_from(("hard", "soft", "unlimited")),
    unit=units,
    grants=st.lists(st.tuples(st.integers(1, 20), st.booleans(), st.booleans()), max_size=4),
    held=st.integers(0, 40),
    later=st.integers(0, 30),
    increments=st.lists(st.integers(0, 20), max_size=4),
    last=st.integers(0, 20),
)
def test_increments_and_a_final_charge_are_as_one_charge(
    *,
    policy: Policy,
    unit: str,
    grants: list[tuple[int, bool, bool]],
    held: int,
    later: int,
    increments: list[int],
    last: int,
) -> None:
    def outcome(charges: list[int]) -> Any:
        core = Core()
        core.open("acme", unit, policy=policy)
        for amount, is_scoped, is_ending in grants:
            ends = core.now + timedelta(minutes=10) if is_ending else None
            core.grant("acme", unit, amount, kind="promo", scope=OPENAI if is_scoped else None, ends=ends)
        hold = new_hold()
        core.do(PlaceHold(hold=hold, account="acme", legs=(leg(unit, 0, held),), scope=SCOPE))
        begun = core.now
        if later:
            core.grant("acme", unit, later)
        core.later(minutes=11)
        for place, amount in enumerate(charges, 1):
            core.do(core.line("acme", (unit, amount), hold=hold, at=begun, final=place == len(charges)))
        wallet = core.wallet("acme", unit)
        lots = [(lot.kind, lot.posted, lot.held, lot.expired) for lot in wallet.burning()]
        return lots, wallet.posted, wallet.held, wallet.owed, wallet.overage, wallet.uncapped

    assert outcome([*increments, last]) == outcome([sum(increments) + last])
