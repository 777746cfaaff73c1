"""Holds: how much is set aside, of what, and how it ends."""

from datetime import timedelta

import pytest

from services.ledger.domain.commands import (
    ClaimPayment,
    ExtendHold,
    LotScope,
    Overdue,
    PlaceHold,
    ReleaseHold,
    ResolveHold,
    Scope,
    VoidGrant,
)
from services.ledger.domain.entries import HoldExtended, HoldPlaced
from services.ledger.domain.errors import (
    AccountDiffers,
    AccountNotOpen,
    HoldExists,
    HoldExpired,
    HoldReleased,
    HoldSettled,
    InsufficientFunds,
    InvalidAmount,
    UnknownHold,
    UnknownUnit,
)
from tests.unit.ledger.core import SCOPE, Core, leg, new_hold


def place(core: Core, account: str, *legs: object, overdue: Overdue = "release", scope: Scope | None = SCOPE) -> str:
    """Place what must be placed."""
    hold = new_hold()
    core.do(PlaceHold(hold=hold, account=account, legs=legs, overdue=overdue, scope=scope))  # type: ignore[arg-type]  # plain text in a test
    return hold


def test_the_tightest_wallet_says_what_would_fit_on_all_of_them() -> None:
    core = Core()
    core.open("acme", "usd", "usd_cap")
    core.open("acme/ana", "usd_cap")
    core.grant("acme", "usd", 8)
    core.grant("acme", "usd_cap", 9)
    core.grant("acme/ana", "usd_cap", 2)
    refusal = core.ask(PlaceHold(hold=new_hold(), account="acme/ana", legs=(leg("usd", 10),)))
    assert refusal == InsufficientFunds("acme/ana", "usd_cap", 10, 2)
    place(core, "acme/ana", leg("usd", 0, 10))
    assert [core.wallet(*each).held for each in (("acme", "usd"), ("acme", "usd_cap"), ("acme/ana", "usd_cap"))] == [
        2,
        2,
        2,
    ]


def test_what_remains_is_never_below_zero() -> None:
    core = Core()
    core.open("acme", "usd")
    core.do(core.line("acme", ("usd", 5)))
    refusal = core.ask(PlaceHold(hold=new_hold(), account="acme", legs=(leg("usd", 1),)))
    assert refusal == InsufficientFunds("acme", "usd", 1, 0)


def test_legs_are_set_aside_together_or_not_at_all() -> None:
    core = Core()
    core.open("acme", "usd", "tokens")
    core.grant("acme", "usd", 10)
    core.grant("acme", "tokens", 10)
    refusal = core.ask(PlaceHold(hold=new_hold(), account="acme", legs=(leg("usd", 5), leg("tokens", 11))))
    assert refusal == InsufficientFunds("acme", "tokens", 11, 10)
    assert core.amounts("acme", "usd") == (10, 0)


def test_lots_are_set_aside_in_burn_order_if_they_are_valid_and_in_scope() -> None:
    core = Core()
    core.open("acme", "usd")
    late = core.grant("acme", "usd", 5)
    soon = core.grant("acme", "usd", 5, ends=core.now + timedelta(days=1))
    core.grant("acme", "usd", 5, begins=core.now + timedelta(days=1), ends=core.now + timedelta(days=2))
    scoped = core.grant("acme", "usd", 5, kind="promo", scope=LotScope(providers=("openai",)))
    core.grant("acme", "usd", 5, kind="promo", scope=LotScope(providers=("anthropic",)))
    hold = new_hold()
    moves = core.do(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 12),), scope=SCOPE))
    assert [(move.lot, move.held) for move in moves] == [(soon, 5), (scoped, 5), (late, 2)]
    refusal = core.ask(PlaceHold(hold=new_hold(), account="acme", legs=(leg("usd", 4),), scope=SCOPE))
    assert refusal == InsufficientFunds("acme", "usd", 4, 3)


def test_without_a_scope_only_lots_valid_everywhere_are_set_aside() -> None:
    core = Core()
    core.open("acme", "usd")
    core.grant("acme", "usd", 5, scope=LotScope(providers=("openai",)))
    core.grant("acme", "usd", 3)
    refusal = core.ask(PlaceHold(hold=new_hold(), account="acme", legs=(leg("usd", 4),)))
    assert refusal == InsufficientFunds("acme", "usd", 4, 3)


def test_a_soft_wallet_lets_through_what_it_has_not_and_the_moves_say_how_much() -> None:
    core = Core()
    core.open("acme", "usd", "tokens", policy="soft")
    core.grant("acme", "usd", 3)
    hold = new_hold()
    moves = core.do(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 10), leg("tokens", 7))))
    assert [(move.unit, move.lot_kind, move.held) for move in moves] == [
        ("usd", "purchase", 3),
        ("usd", "debt", 7),
        ("tokens", "overage", 7),
    ]
    assert core.amounts("acme", "usd") == (3, 10)
    assert core.wallet("acme", "usd").spendable(core.now) == -7
    assert core.amounts("acme", "tokens") == (0, 0)
    core.do(ReleaseHold(hold=hold, account="acme"))
    assert core.amounts("acme", "usd") == (3, 0)
    assert not core.wallet("acme", "usd").debts()


def test_an_overdraft_is_held_of_a_debt_and_no_further() -> None:
    core = Core()
    core.open("acme", "usd", overdraft=5)
    core.grant("acme", "usd", 3)
    refusal = core.ask(PlaceHold(hold=new_hold(), account="acme", legs=(leg("usd", 9),)))
    assert refusal == InsufficientFunds("acme", "usd", 9, 8)
    hold = new_hold()
    moves = core.do(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 1, 9),)))
    assert [(move.lot_kind, move.held) for move in moves] == [("purchase", 3), ("debt", 5)]
    refusal = core.ask(PlaceHold(hold=new_hold(), account="acme", legs=(leg("usd", 1),)))
    assert refusal == InsufficientFunds("acme", "usd", 1, 0)
    core.do(core.line("acme", ("usd", 7), hold=hold))
    assert core.amounts("acme", "usd") == (-4, 0)
    assert core.wallet("acme", "usd").spendable(core.now) == 1


def test_an_unlimited_wallet_counts_and_leaves_lots_alone() -> None:
    core = Core()
    core.open("acme", "usd", "tokens", policy="unlimited")
    core.grant("acme", "usd", 3)
    hold = place(core, "acme", leg("usd", 10), leg("tokens", 10**6))
    assert core.amounts("acme", "usd") == (3, 0)
    core.do(core.line("acme", ("usd", 4), ("tokens", 10**6), hold=hold))
    assert core.amounts("acme", "usd") == (3, 0)
    assert core.wallet("acme", "usd").uncapped == 4
    assert core.wallet("acme", "tokens").uncapped == 10**6


def test_a_hold_says_what_it_is() -> None:
    core = Core()
    core.open("acme", "tokens", policy="soft")
    hold = new_hold()
    command = PlaceHold(
        hold=hold,
        account="acme",
        legs=(leg("tokens", 1, 5), leg("usd", 2)),
        lifetime_seconds=60,
        overdue="charge_estimate",
        scope=SCOPE,
    )
    details = core.do(command)[0].details
    assert isinstance(details, HoldPlaced)
    assert [(each.unit, each.amount, each.wallets) for each in details.legs] == [
        ("tokens", 5, ("acme",)),
        ("usd", 2, ()),
        ("usd_cap", 2, ()),
    ]
    found = core.state.holds[hold]
    assert (found.scope, found.overdue) == (SCOPE, "charge_estimate")
    assert found.expires_at == found.recorded_at + timedelta(seconds=60)


def test_a_hold_begins_once_and_ends_once() -> None:
    core = Core()
    core.open("acme", "usd")
    core.grant("acme", "usd", 10)
    holds = {end: place(core, "acme", leg("usd", 1)) for end in ("released", "settled", "open")}
    overdue: dict[Overdue, str] = {
        "release": place(core, "acme", leg("usd", 1), overdue="release"),
        "charge_estimate": place(core, "acme", leg("usd", 1), overdue="charge_estimate"),
    }
    core.do(ReleaseHold(hold=holds["released"], account="acme"))
    core.do(core.line("acme", ("usd", 1), hold=holds["settled"]))
    core.later(minutes=15)
    for hold in overdue.values():
        core.do(ResolveHold(hold=hold, account="acme"))
    core.later(minutes=1)
    ends = [
        (holds["released"], HoldReleased),
        (holds["settled"], HoldSettled),
        (overdue["release"], HoldExpired),
        (overdue["charge_estimate"], HoldExpired),
    ]
    for hold, refusal in ends:
        assert core.ask(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 1),))) == refusal(hold)
        assert core.ask(ReleaseHold(hold=hold, account="acme")) == refusal(hold)
        assert core.ask(ResolveHold(hold=hold, account="acme")) == refusal(hold)
        assert core.ask(ExtendHold(hold=hold, account="acme", lifetime_seconds=60)) == refusal(hold)
    assert core.ask(ReleaseHold(hold=holds["open"], account="acme")) == HoldExpired(holds["open"])
    open_hold = place(core, "acme", leg("usd", 1))
    assert core.ask(PlaceHold(hold=open_hold, account="acme", legs=())) == HoldExists(open_hold)
    assert core.ask(ReleaseHold(hold=open_hold, account="acme/x")) == AccountDiffers(open_hold, "acme/x")
    assert core.ask(ResolveHold(hold=open_hold, account="acme/x")) == AccountDiffers(open_hold, "acme/x")
    assert core.ask(ResolveHold(hold="none", account="acme")) == UnknownHold("none")


def test_an_extension_is_a_later_deadline_and_more_of_the_same_wallets() -> None:
    core = Core()
    core.open("acme", "usd", "tokens")
    core.grant("acme", "usd", 10)
    core.grant("acme", "tokens", 10)
    core.open("acme/ana")
    hold = place(core, "acme/ana", leg("usd", 4))
    core.open("acme/ana", "usd")
    core.later(minutes=5)
    begun = core.now
    extended = ExtendHold(
        hold=hold, account="acme/ana", lifetime_seconds=900, legs=(leg("usd", 1, 3), leg("tokens", 2))
    )
    moves = core.do(extended)
    assert {move.kind for move in moves} == {"hold_extended"}
    details = moves[0].details
    assert isinstance(details, HoldExtended)
    assert [(each.unit, each.at_least, each.at_most, each.amount, each.wallets) for each in details.legs] == [
        ("usd", 5, 7, 7, ("acme",)),
        ("usd_cap", 5, 7, 7, ()),
        ("tokens", 2, 2, 2, ("acme",)),
    ]
    assert core.amounts("acme", "usd") == (10, 7)
    assert core.amounts("acme", "tokens") == (10, 2)
    assert core.state.holds[hold].expires_at == begun + timedelta(minutes=15)
    core.do(core.line("acme/ana", ("usd", 9), hold=hold))
    assert core.amounts("acme", "usd") == (1, 0)
    assert core.amounts("acme/ana", "usd") == (0, 0)


def test_an_extension_that_does_not_fit_changes_nothing() -> None:
    core = Core()
    core.open("acme", "usd")
    core.grant("acme", "usd", 10)
    hold = place(core, "acme", leg("usd", 4))
    before = core.state.holds[hold].expires_at
    refusal = core.ask(ExtendHold(hold=hold, account="acme", lifetime_seconds=10**6, legs=(leg("usd", 7),)))
    assert refusal == InsufficientFunds("acme", "usd", 7, 6)
    assert core.state.holds[hold].expires_at == before
    core.do(ExtendHold(hold=hold, account="acme", lifetime_seconds=1))
    assert core.state.holds[hold].expires_at == before
    core.later(minutes=15)
    assert core.ask(ExtendHold(hold=hold, account="acme", lifetime_seconds=60)) == HoldExpired(hold)
    assert core.ask(ExtendHold(hold="none", account="acme", lifetime_seconds=60)) == UnknownHold("none")
    assert core.ask(ExtendHold(hold=hold, account="acme/x", lifetime_seconds=60)) == AccountDiffers(hold, "acme/x")


def test_a_hold_before_its_deadline_is_not_resolved() -> None:
    core = Core()
    core.open("acme", "usd")
    core.grant("acme", "usd", 10)
    hold = place(core, "acme", leg("usd", 4))
    core.later(minutes=14)
    assert core.do(ResolveHold(hold=hold, account="acme")) == []
    core.later(minutes=1)
    moves = core.do(ResolveHold(hold=hold, account="acme"))
    assert [(move.kind, move.posted, move.held) for move in moves] == [("hold_expired", 0, -4)]
    assert core.amounts("acme", "usd") == (10, 0)
    assert core.state.holds[hold].status == "expired"


def test_an_overdue_hold_that_says_so_is_charged_what_it_holds() -> None:
    core = Core()
    core.open("acme", "usd", "usd_cap")
    core.grant("acme", "usd", 10)
    core.grant("acme", "usd_cap", 10)
    hold = place(core, "acme", leg("usd", 4), overdue="charge_estimate")
    core.do(core.line("acme", ("usd", 1), hold=hold, final=False))
    core.later(minutes=15)
    core.do(ResolveHold(hold=hold, account="acme"))
    assert core.amounts("acme", "usd") == (6, 0)
    assert core.amounts("acme", "usd_cap") == (6, 0)
    assert core.state.holds[hold].status == "estimated"


@pytest.mark.parametrize("overdue", ["release", "charge_estimate"])
def test_a_hold_of_nothing_ends_at_its_deadline_too(overdue: Overdue) -> None:
    core = Core()
    core.open("acme", "usd")
    hold = place(core, "acme", leg("usd", 0, 5), leg("tokens", 5), overdue=overdue)
    core.later(minutes=15)
    moves = core.do(ResolveHold(hold=hold, account="acme"))
    assert len(moves) == 1
    assert core.state.holds[hold].status != "placed"


def test_what_is_released_of_a_lot_that_has_ended_expires() -> None:
    core = Core()
    core.open("acme", "usd")
    lot = core.grant("acme", "usd", 15, ends=core.now + timedelta(minutes=10))
    hold = place(core, "acme", leg("usd", 10))
    core.later(minutes=11)
    moves = core.do(ReleaseHold(hold=hold, account="acme"))
    assert [(move.kind, move.posted, move.held) for move in moves] == [
        ("hold_released", 0, -10),
        ("lot_expired", -10, 0),
        ("lot_expired", 10, 0),
    ]
    assert core.amounts("acme", "usd") == (0, 0)
    assert core.lot(lot).expired == 15


def test_what_is_released_of_a_void_lot_is_voided() -> None:
    core = Core()
    core.open("acme", "usd")
    lot = core.grant("acme", "usd", 15)
    hold = place(core, "acme", leg("usd", 10))
    core.do(VoidGrant(account="acme", lot=lot))
    assert core.amounts("acme", "usd") == (10, 10)
    core.do(core.line("acme", ("usd", 3), hold=hold, final=False))
    core.do(ReleaseHold(hold=hold, account="acme"))
    assert core.amounts("acme", "usd") == (0, 0)
    assert core.lot(lot).expired == 0


@pytest.mark.parametrize("ends", [False, True])
def test_claims_take_what_is_released_before_it_expires(ends: bool) -> None:
    core = Core()
    core.open("acme", "usd")
    core.grant("acme", "usd", 15, reference="pi_1", ends=core.now + timedelta(minutes=10) if ends else None)
    hold = place(core, "acme", leg("usd", 10))
    core.do(
        ClaimPayment(
            account="acme", payment="pi_1", claim="re_1", reason="refund", state="final", unit="usd", claimed=9
        )
    )
    assert core.amounts("acme", "usd") == (10, 10)
    core.later(minutes=11)
    moves = core.do(ReleaseHold(hold=hold, account="acme"))
    taken = {(move.kind, move.posted) for move in moves if move.lot and move.posted}
    assert taken == ({("clawed_back", -4), ("lot_expired", -6)} if ends else {("clawed_back", -4)})
    assert core.amounts("acme", "usd") == ((0, 0) if ends else (6, 0))


def test_an_unknown_hold_is_released_before_it_is_placed() -> None:
    core = Core()
    core.open("acme", "usd")
    core.do(ReleaseHold(hold="early", account="acme"))
    assert core.ask(PlaceHold(hold="early", account="acme", legs=())) == HoldReleased("early")


@pytest.mark.parametrize(
    ("legs", "refusal"),
    [
        ((leg("sheep", 1),), UnknownUnit),
        ((leg("usd", 2, 1),), InvalidAmount),
        ((leg("usd", -1, 1),), InvalidAmount),
        ((leg("usd", 1), leg("usd", 1)), InvalidAmount),
        ((leg("usd", 1), leg("usd_cap", 1)), InvalidAmount),
        ((leg("usd", 10**18 + 1),), InvalidAmount),
    ],
)
def test_what_makes_no_sense_is_not_set_aside(legs: tuple[object, ...], refusal: type) -> None:
    core = Core()
    core.open("acme", "usd", policy="soft")
    hold = place(core, "acme", leg("usd", 10**18))
    before = len(core.entries)
    asked = core.ask(PlaceHold(hold="new", account="acme", legs=legs))  # type: ignore[arg-type]  # plain text in a test
    assert isinstance(asked, refusal)
    more = core.ask(ExtendHold(hold=hold, account="acme", lifetime_seconds=60, legs=legs))  # type: ignore[arg-type]  # plain text in a test
    assert isinstance(more, refusal)
    assert isinstance(core.ask(PlaceHold(hold="new", account="else", legs=())), AccountNotOpen)
    assert len(core.entries) == before


def test_a_wallet_never_sets_more_aside_than_a_bigint_counts() -> None:
    for policy, unit in (("soft", "usd"), ("soft", "tokens"), ("unlimited", "tokens")):
        core = Core()
        core.open("acme", unit, policy=policy)  # type: ignore[arg-type]  # plain text in a test
        asked = [PlaceHold(hold=new_hold(), account="acme", legs=(leg(unit, 10**18),)) for _ in range(5)]
        assert [isinstance(core.ask(each), list) for each in asked] == [True] * 4 + [False]
        assert isinstance(core.ask(asked[-1]), InvalidAmount)
    extended = ExtendHold(hold=asked[0].hold, account="acme", lifetime_seconds=60, legs=(leg(unit, 1),))
    assert isinstance(core.ask(extended), InvalidAmount)
