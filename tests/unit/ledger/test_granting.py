"""Laws of grants: what is added, voided and corrected by hand."""

from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.ledger.domain.commands import Adjust, Grant, LotScope, PlaceHold, ReleaseHold, VoidGrant
from services.ledger.domain.concerned import BALANCE_MAX
from services.ledger.domain.entries import LotVoided, Noted
from services.ledger.domain.errors import (
    AccountNotOpen,
    InsufficientFunds,
    InvalidAmount,
    InvalidTime,
    UnknownLot,
    UnknownUnit,
    WalletNotOpen,
)
from tests.unit.ledger.archive import Archive
from tests.unit.ledger.book import hold_id, leg, line

DAY = timedelta(days=1)


def adjust(amount: int, *, unit: str = "usd", force: bool = False) -> Adjust:
    """A correction."""
    return Adjust(account="acme", unit=unit, amount=amount, reason="a test", force=force)


def purse(amount: int = 0, *units: str) -> Archive:
    """An account with wallets, and so much of dollars."""
    book = Archive()
    book.open("acme", *(units or ("usd",)))
    if amount:
        book.grant("acme", "usd", amount)
    return book


def test_a_lot_is_what_was_said() -> None:
    book = purse()
    now = book.now
    granted = Grant(
        account="acme",
        unit="usd",
        amount=5,
        kind="promo",
        priority=9,
        occurred_at=now - DAY,
        reference="welcome",
        effective_at=now + DAY,
        expires_at=now + 2 * DAY,
        scope=LotScope(providers=("openai",)),
        cost_basis="0",
        origin="import-7",
    )
    (lot_id,) = {move.lot for move in book.do(granted) if move.lot is not None}
    assert lot_id is not None
    lot = book.lot(lot_id)
    assert (lot.kind, lot.priority, lot.occurred_at, lot.reference) == ("promo", 9, now - DAY, "welcome")
    assert (lot.effective_at, lot.expires_at) == (now + DAY, now + 2 * DAY)
    assert (lot.scope, lot.cost_basis, lot.origin) == (granted.scope, "0", "import-7")
    assert book.available("acme", "usd") == 0
    book.wait(days=1.5)
    assert book.available("acme", "usd") == 5


def test_a_grant_ends_after_it_begins_and_after_now() -> None:
    book = purse()
    now = book.now
    times: tuple[tuple[datetime | None, datetime | None, datetime | None], ...] = (
        (None, None, now - DAY),
        (now + DAY, None, None),
        (None, now + 2 * DAY, now + DAY),
        (None, now + DAY, now + DAY),
        (now + timedelta(minutes=4), None, now + timedelta(minutes=3)),
    )
    for occurred_at, effective_at, expires_at in times:
        grant = Grant(
            account="acme",
            unit="usd",
            amount=5,
            occurred_at=occurred_at,
            effective_at=effective_at,
            expires_at=expires_at,
        )
        assert isinstance(book.ask(grant), InvalidTime)
    book.do(Grant(account="acme", unit="usd", amount=5, effective_at=now - 2 * DAY, expires_at=now + DAY))


def test_what_has_not_started_repays_nothing() -> None:
    book = purse()
    book.do(line("acme", ("usd", 5)))
    book.do(Grant(account="acme", unit="usd", amount=9, effective_at=book.now + DAY))
    assert book.debt("acme") == 5
    book.grant("acme", "usd", 7)
    assert book.debt("acme") == 0
    book.check()


def test_a_void_lot_is_no_longer_there_and_its_holds_still_settle() -> None:
    book = purse()
    lot = book.grant("acme", "usd", 20)
    placed, other = hold_id(), hold_id()
    book.do(PlaceHold(hold=placed, account="acme", legs=(leg("usd", 10),)))
    book.do(PlaceHold(hold=other, account="acme", legs=(leg("usd", 4),)))
    moves = book.do(VoidGrant(account="acme", lot=lot, reason="a mistake"))
    assert [(move.account, move.posted) for move in moves] == [("acme", -6), ("@stripe", 6)]
    assert moves[0].details == LotVoided("a mistake")
    assert (book.amounts("acme", "usd"), book.available("acme", "usd")) == ((14, 14), 0)
    assert book.do(VoidGrant(account="acme", lot=lot)) == []
    book.do(line("acme", ("usd", 7), hold=placed))
    assert book.amounts("acme", "usd") == (4, 4)
    book.do(ReleaseHold(hold=other, account="acme"))
    assert (book.amounts("acme", "usd"), book.lot(lot).voided) == ((0, 0), 13)
    book.check()


def test_a_lot_is_voided_whose_it_is_and_of_which_something_is_left() -> None:
    book = purse()
    lot = book.grant("acme", "usd", 5)
    book.open("acme/ana", "usd")
    assert book.ask(VoidGrant(account="acme/ana", lot=lot)) == UnknownLot(lot, "acme/ana")
    assert book.ask(VoidGrant(account="acme/eve", lot=lot)) == AccountNotOpen("acme/eve")
    book.do(line("acme", ("usd", 7)))
    assert book.ask(VoidGrant(account="acme", lot=lot)) == UnknownLot(lot, "acme")
    (debt,) = book.wallet("acme", "usd").debts()
    assert book.ask(VoidGrant(account="acme", lot=debt.id)) == UnknownLot(debt.id, "acme")


def test_what_is_added_by_hand_forgives_what_is_owed() -> None:
    book = purse()
    book.do(line("acme", ("usd", 5)))
    moves = book.do(adjust(8))
    assert [(move.kind, move.account, move.lot_kind, move.posted) for move in moves] == [
        ("lot_granted", "acme", "adjustment", 8),
        ("lot_granted", "@adjustment", None, -8),
        ("debt_repaid", "acme", "adjustment", -5),
        ("debt_repaid", "acme", "debt", 5),
    ]
    assert Noted("a test") in [move.details for move in moves]
    assert (book.amounts("acme", "usd"), book.debt("acme")) == ((3, 0), 0)


def test_what_is_taken_by_hand_is_taken_in_burn_order_of_what_is_available() -> None:
    book = purse()
    book.grant("acme", "usd", 5)
    book.grant("acme", "usd", 5, kind="promo", scope=LotScope(providers=("openai",)))
    book.do(Grant(account="acme", unit="usd", amount=50, effective_at=book.now + DAY))
    moves = book.do(adjust(-7))
    assert [(move.kind, move.account, move.lot_kind, move.posted) for move in moves] == [
        ("adjusted", "acme", "promo", -5),
        ("adjusted", "acme", "purchase", -2),
        ("adjusted", "@adjustment", None, 7),
    ]
    assert all(move.details == Noted("a test") for move in moves[:2])
    assert book.ask(adjust(-4)) == InsufficientFunds("acme", "usd", 4, 3)
    book.do(adjust(-4, force=True))
    assert book.debt("acme") == 1
    book.check()


def test_what_is_taken_by_hand_is_within_the_overdraft_unless_it_is_forced() -> None:
    book = Archive()
    book.open("acme", "usd", overdraft=5)
    assert book.ask(adjust(-6)) == InsufficientFunds("acme", "usd", 6, 5)
    book.do(adjust(-5))
    assert book.debt("acme") == 5
    assert book.ask(adjust(-1)) == InsufficientFunds("acme", "usd", 1, 0)


def test_what_a_cap_has_not_is_its_overage() -> None:
    book = purse(0, "tokens")
    book.grant("acme", "tokens", 5, kind="plan")
    assert book.ask(adjust(-7, unit="tokens")) == InsufficientFunds("acme", "tokens", 7, 5)
    book.do(adjust(-7, unit="tokens", force=True))
    assert (book.amounts("acme", "tokens"), book.wallet("acme", "tokens").overage) == ((0, 0), 2)
    book.check()


def test_a_wallet_that_is_not_hard_does_not_refuse() -> None:
    book = Archive()
    book.open("acme", "usd", policy="soft")
    book.open("acme", "tokens", policy="unlimited")
    book.do(adjust(-2))
    book.do(adjust(-3, unit="tokens"))
    assert (book.debt("acme"), book.wallet("acme", "tokens").uncapped) == (2, 3)


def test_a_correction_is_refused_where_it_cannot_be_meant() -> None:
    book = purse(5)
    entries = len(book.entries)
    assert isinstance(book.ask(adjust(0)), InvalidAmount)
    assert isinstance(book.ask(adjust(BALANCE_MAX)), InvalidAmount)
    assert book.ask(adjust(1, unit="euros")) == UnknownUnit("euros")
    assert book.ask(adjust(1, unit="points")) == WalletNotOpen("acme", "points")
    assert len(book.entries) == entries


amounts = st.integers(1, 30)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("grant"), amounts, st.sampled_from((None, 1, 3)), st.sampled_from((None, 1, 2))),
        st.tuples(st.just("adjust"), st.integers(-40, 40), st.booleans()),
        st.tuples(st.just("void"), st.integers(0, 9)),
        st.tuples(st.just("use"), amounts),
        st.tuples(st.just("wait"), st.integers(1, 30)),
    ),
    max_size=15,
)


@given(steps, st.sampled_from((0, 10)))
def test_a_correction_is_refused_if_and_only_if_it_takes_a_hard_wallet_below_its_floor(
    steps: list[tuple[object, ...]], overdraft: int
) -> None:
    book = Archive()
    book.open("acme", "usd", overdraft=overdraft)
    for step in steps:
        match step:
            case ("grant", int(amount), int() | None as starts, int() | None as lasts):
                begins = None if starts is None else book.now + starts * DAY
                ends = None if lasts is None else (begins or book.now) + lasts * DAY
                book.do(Grant(account="acme", unit="usd", amount=amount, effective_at=begins, expires_at=ends))
            case ("adjust", int(amount), bool(force)) if amount:
                available = book.available("acme", "usd")
                debts = book.debt("acme")
                outcome = book.ask(adjust(amount, force=force))
                assert isinstance(outcome, list) == (force or available + overdraft >= -amount or amount > 0)
                if isinstance(outcome, list):
                    assert book.available("acme", "usd") == available + amount
                    assert amount < 0 or book.debt("acme") == max(0, debts - amount)
            case ("void", int(number)) if lots := [lot for lot in book.all.lots() if lot.kind == "adjustment"]:
                book.ask(VoidGrant(account="acme", lot=lots[number % len(lots)].id))
            case ("use", int(amount)):
                book.do(line("acme", ("usd", amount)))
            case ("wait", int(hours)):
                book.wait(hours=hours)
            case _:
                pass
        book.check()
