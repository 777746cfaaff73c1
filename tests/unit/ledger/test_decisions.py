"""Decisions that the machine of random commands reaches too seldom: burn order, pinned wallets, sums, tombstones."""

from datetime import timedelta

import pytest

from services.ledger.domain.commands import Grant, OpenAccount, PlaceHold, ReleaseHold, WalletTerms
from services.ledger.domain.entries import Charged
from services.ledger.domain.errors import (
    AccountDiffers,
    HoldReleased,
    HoldSettled,
    InvalidAmount,
    InvalidTime,
    UnknownUnit,
    WalletNotOpen,
)
from services.ledger.domain.evolve import BrokenJournal, evolve
from services.ledger.domain.state import PartitionState
from tests.unit.ledger.book import BEGIN, Book, hold_id, leg, line


def book_with(*wallets: tuple[str, str, int]) -> Book:
    """Accounts with a wallet each, and a purchase in it."""
    book = Book()
    for account, unit, amount in wallets:
        book.open(account, unit)
        if amount:
            book.grant(account, unit, amount)
    return book


def test_lots_burn_by_priority_then_kind_then_age() -> None:
    book = book_with(("acme", "usd", 0))
    old_purchase = book.grant("acme", "usd", 1)
    purchase = book.grant("acme", "usd", 1)
    plan = book.grant("acme", "usd", 1, kind="plan")
    promo = book.grant("acme", "usd", 1, kind="promo")
    first = book.do(Grant(account="acme", unit="usd", amount=1, kind="purchase", priority=1))[0].lot
    moves = book.do(line("acme", ("usd", 5)))
    assert [move.lot for move in moves if move.lot] == [first, plan, promo, old_purchase, purchase]


def test_money_is_paid_whole_by_the_nearest_wallet() -> None:
    book = book_with(("acme", "usd", 100), ("acme/ml/ana", "usd", 3))
    book.open("acme/ml/ana/key")
    book.do(line("acme/ml/ana/key", ("usd", 5)))
    assert book.amounts("acme/ml/ana", "usd") == (-2, 0)
    assert book.amounts("acme", "usd") == (100, 0)


def test_a_cap_is_counted_on_every_wallet_on_the_path_and_its_excess_is_never_owed() -> None:
    book = book_with(("acme", "tokens", 100), ("acme/ana", "tokens", 3))
    book.do(line("acme/ana", ("tokens", 5)))
    assert book.amounts("acme", "tokens") == (95, 0)
    assert book.amounts("acme/ana", "tokens") == (0, 0)
    assert book.wallet("acme/ana", "tokens").overage == 2
    book.grant("acme/ana", "tokens", 10)
    assert book.amounts("acme/ana", "tokens") == (10, 0)


def test_a_path_without_a_wallet_is_not_limited() -> None:
    book = book_with(("acme", "usd", 1))
    book.do(PlaceHold(hold=hold_id(), account="acme", legs=(leg("tokens", 10**6),)))
    moves = book.do(line("acme", ("tokens", 5)))
    assert [(move.kind, move.account, move.posted) for move in moves] == [("charged", "acme", 0)]


def test_a_hold_pins_the_wallets_it_was_placed_on() -> None:
    book = book_with(("acme", "usd", 10))
    book.open("acme/ana")
    hold = hold_id()
    book.do(PlaceHold(hold=hold, account="acme/ana", legs=(leg("usd", 4),)))
    book.open("acme/ana", "usd")
    book.do(line("acme/ana", ("usd", 6), hold=hold))
    assert book.amounts("acme", "usd") == (4, 0)
    assert book.amounts("acme/ana", "usd") == (0, 0)
    book.do(line("acme/ana", ("usd", 6)))
    assert book.amounts("acme/ana", "usd") == (-6, 0)


def test_a_hold_ends_with_its_charge_even_if_that_took_nothing_of_it() -> None:
    book = book_with(("acme", "usd", 10))
    hold = hold_id()
    book.do(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 4),)))
    book.do(line("acme", hold=hold))
    assert book.amounts("acme", "usd") == (10, 0)
    assert book.ask(ReleaseHold(hold=hold, account="acme")) == HoldSettled(hold)
    book.do(line("acme", ("usd", 1), hold=hold))
    assert book.amounts("acme", "usd") == (9, 0)


def test_a_hold_released_or_charged_before_it_is_placed_is_never_placed() -> None:
    book = book_with(("acme", "usd", 10))
    released, charged = hold_id(), hold_id()
    book.do(ReleaseHold(hold=released, account="acme"))
    book.do(line("acme", ("usd", 1), hold=charged))
    for hold, refusal in ((released, HoldReleased(released)), (charged, HoldSettled(charged))):
        assert book.ask(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 1),))) == refusal


def test_another_accounts_hold_is_not_charged_and_not_released() -> None:
    book = book_with(("acme", "usd", 10))
    book.open("acme/ana")
    hold = hold_id()
    book.do(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 4),)))
    assert book.ask(line("acme/ana", ("usd", 1), hold=hold)) == AccountDiffers(hold, "acme/ana")
    assert book.ask(ReleaseHold(hold=hold, account="acme/ana")) == AccountDiffers(hold, "acme/ana")


def test_a_bundle_is_one_entry_per_lot_and_minute_and_one_debt_per_wallet() -> None:
    book = book_with(("acme", "usd", 5))
    before = len(book.entries)
    times = [BEGIN + timedelta(seconds=seconds) for seconds in (0, 10, 59, 60, 61)]
    book.bundle([line("acme", ("usd", 2), at=at) for at in times])
    entries = [(e.account, e.lot_kind, e.posted, e.occurred_at) for e in book.entries[before:] if e.kind == "charged"]
    assert entries == [
        ("acme", "purchase", -5, times[0]),
        ("@usage", None, 10, times[0]),
        ("acme", "debt", -1, times[2]),
        ("acme", "debt", -4, times[3]),
    ]
    assert book.amounts("acme", "usd") == (-5, 0)
    assert isinstance(book.entries[before].details, Charged)
    assert len([lot for lot in book.wallet("acme", "usd").lots.values() if lot.kind == "debt"]) == 1
    assert book.replayed() == book.tables


def test_a_grant_repays_the_oldest_debt_first() -> None:
    book = book_with(("acme", "usd", 0))
    debts = [book.do(line("acme", ("usd", amount)))[0].lot for amount in (3, 4)]
    moves = book.do(Grant(account="acme", unit="usd", amount=5))
    assert [(move.lot, move.posted) for move in moves if move.kind == "debt_repaid" and move.lot in debts] == [
        (debts[0], 3),
        (debts[1], 2),
    ]


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        (Grant(account="acme", unit="sheep", amount=1), UnknownUnit),
        (Grant(account="acme", unit="usd", amount=0), InvalidAmount),
        (Grant(account="acme", unit="usd", amount=-1), InvalidAmount),
        (Grant(account="acme", unit="usd", amount=10**18 + 1), InvalidAmount),
        (Grant(account="acme", unit="tokens", amount=1), WalletNotOpen),
        (Grant(account="acme", unit="usd", amount=1, occurred_at=BEGIN + timedelta(hours=1)), InvalidTime),
        (OpenAccount(account="acme", wallets=(WalletTerms("sheep"),)), UnknownUnit),
        (PlaceHold(hold=hold_id(), account="acme", legs=(leg("usd", 2, 1),)), InvalidAmount),
        (PlaceHold(hold=hold_id(), account="acme", legs=(leg("usd", 1), leg("usd", 1))), InvalidAmount),
        (PlaceHold(hold=hold_id(), account="acme", legs=(leg("usd", 1), leg("usd_cap", 1))), InvalidAmount),
        (line("acme", ("usd", -1)), InvalidAmount),
        (line("acme", ("usd", 10**18 + 1)), InvalidAmount),
        (line("acme", ("usd", 1), at=BEGIN + timedelta(hours=1)), InvalidTime),
    ],
)
def test_what_makes_no_sense_is_refused(command: Grant, refusal: type) -> None:
    book = book_with(("acme", "usd", 10))
    before = {name: dict(rows) for name, rows in book.tables.items()}
    assert isinstance(book.ask(command), refusal)
    assert book.tables == before


def test_a_wallet_never_counts_further_than_a_bigint() -> None:
    book = book_with(("acme", "usd", 0))
    outcomes = [book.ask(Grant(account="acme", unit="usd", amount=10**18)) for _ in range(5)]
    assert isinstance(outcomes[-1], InvalidAmount)
    debts = [book.ask(line("acme", ("usd", 10**18))) for _ in range(9)]
    assert isinstance(debts[-1], InvalidAmount)


@pytest.mark.parametrize("order", [(1,), (0, 2), (0, 0), (0, 1, 1), (0, 1, 2, 2)])
def test_an_entry_out_of_its_place_breaks_the_replay(order: tuple[int, ...]) -> None:
    """Account, wallet, lot: none may be missing, none may come twice."""
    book = book_with(("acme", "usd", 10))
    state = PartitionState()
    *first, last = (book.entries[place] for place in order)
    for entry in first:
        evolve(state, entry)
    with pytest.raises(BrokenJournal):
        evolve(state, last)
