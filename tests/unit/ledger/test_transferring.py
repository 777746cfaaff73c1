"""Laws of transfers: money moves within a tree, stays what it was, and is neither more nor less."""

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.ledger.domain.commands import Grant, LotScope, PlaceHold, Transfer
from services.ledger.domain.errors import (
    AccountNotOpen,
    InsufficientFunds,
    InvalidAmount,
    InvalidTransfer,
    UnknownUnit,
    WalletNotOpen,
)
from tests.unit.ledger.archive import Archive
from tests.unit.ledger.book import hold_id, leg, line


def move(amount: int, *, account: str = "acme", to: str = "acme/ana", unit: str = "usd") -> Transfer:
    """A transfer."""
    return Transfer(account=account, to_account=to, unit=unit, amount=amount, reason="a test")


def tree() -> Archive:
    """Two accounts of a tree with wallets of money."""
    book = Archive()
    book.open("acme", "usd")
    book.open("acme/ana", "usd")
    return book


def test_a_lot_stays_what_it_was() -> None:
    book = tree()
    scope = LotScope(models=("gpt-4o-mini",))
    ends = book.now + timedelta(days=9)
    granted = book.do(
        Grant(
            account="acme",
            unit="usd",
            amount=10,
            kind="promo",
            priority=3,
            reference="welcome",
            expires_at=ends,
            scope=scope,
            cost_basis="0.8",
        )
    )
    book.do(move(4))
    (lot,) = book.wallet("acme/ana", "usd").lots.values()
    assert (lot.posted, lot.kind, lot.priority, lot.reference) == (4, "promo", 3, "welcome")
    assert (lot.expires_at, lot.scope, lot.cost_basis, lot.origin) == (ends, scope, "0.8", granted[0].lot)
    assert (book.amounts("acme", "usd"), book.amounts("acme/ana", "usd")) == ((6, 0), (4, 0))
    book.check()


def test_lots_move_in_the_order_in_which_they_would_be_used() -> None:
    book = tree()
    book.grant("acme", "usd", 5)
    book.grant("acme", "usd", 5, kind="promo")
    moves = book.do(move(7))
    assert [(each.lot_kind, each.posted) for each in moves] == [
        ("promo", -5),
        ("promo", 5),
        ("purchase", -2),
        ("purchase", 2),
    ]


def test_what_arrives_repays_what_is_owed_there() -> None:
    book = tree()
    book.grant("acme", "usd", 10)
    book.do(line("acme/ana", ("usd", 3)))
    book.do(move(7))
    assert (book.amounts("acme", "usd"), book.amounts("acme/ana", "usd")) == ((3, 0), (4, 0))
    assert book.debt("acme/ana") == 0
    book.check()


def test_only_what_is_available_moves() -> None:
    book = Archive()
    book.open("acme", "usd", overdraft=50)
    book.open("acme/ana", "usd")
    book.grant("acme", "usd", 10)
    book.grant("acme", "usd", 5, days=1)
    later = Grant(account="acme", unit="usd", amount=20, priority=1, effective_at=book.now + timedelta(days=1))
    book.do(later)
    book.do(PlaceHold(hold=hold_id(), account="acme", legs=(leg("usd", 4),)))
    assert book.ask(move(12)) == InsufficientFunds("acme", "usd", 12, 11)
    book.do(move(1))
    assert [lot.kind for lot in book.wallet("acme/ana", "usd").lots.values()] == ["purchase"]
    book.wait(days=2)
    # What is held is of the lot that has ended, and so is the one that moved; another has begun.
    assert book.ask(move(31)) == InsufficientFunds("acme", "usd", 31, 30)
    book.do(move(30))
    assert book.amounts("acme/ana", "usd") == (30, 0)
    book.check()


def test_a_transfer_is_refused_where_it_cannot_be_meant() -> None:
    book = tree()
    book.open("other", "usd")
    book.open("acme", "tokens")
    book.open("acme/bob")
    book.grant("acme", "usd", 10)
    entries = len(book.entries)
    assert isinstance(book.ask(move(1, to="other")), InvalidTransfer)
    assert isinstance(book.ask(move(1, to="acme")), InvalidTransfer)
    assert isinstance(book.ask(move(1, unit="tokens")), InvalidTransfer)
    assert isinstance(book.ask(move(0)), InvalidAmount)
    assert book.ask(move(1, unit="euros")) == UnknownUnit("euros")
    assert book.ask(move(1, to="acme/bob")) == WalletNotOpen("acme/bob", "usd")
    assert book.ask(move(1, to="acme/eve")) == AccountNotOpen("acme/eve")
    assert book.ask(move(1, account="acme/bob", to="acme")) == WalletNotOpen("acme/bob", "usd")
    assert len(book.entries) == entries


places = st.sampled_from(("acme", "acme/ana", "acme/ana/key"))
amounts = st.integers(1, 30)


@given(
    st.lists(st.tuples(places, amounts, st.none() | st.integers(1, 3)), min_size=1, max_size=5),
    st.lists(st.tuples(st.sampled_from(("move", "use", "wait")), places, places, amounts), max_size=12),
)
def test_transfers_make_nothing_and_lose_nothing(
    granted: list[tuple[str, int, int | None]], steps: list[tuple[str, str, str, int]]
) -> None:
    book = Archive()
    for account in ("acme", "acme/ana", "acme/ana/key"):
        book.open(account, "usd")
    for account, amount, days in granted:
        book.grant(account, "usd", amount, days=days)
    for what, account, other, amount in steps:
        match what:
            case "move":
                available = max(book.available(account, "usd"), 0)
                outcome = book.ask(move(amount, account=account, to=other))
                assert isinstance(outcome, list) == (account != other and amount <= available)
            case "use":
                book.do(line(account, ("usd", amount)))
            case _:
                book.wait(days=1)
        book.check()
    moved = [entry for entry in book.entries if entry.kind == "transferred"]
    assert sum(entry.posted for entry in moved) == 0
    by_all = sum(book.amounts(account, "usd")[0] for account in ("acme", "acme/ana", "acme/ana/key"))
    others = {"lot_granted", "lot_expired", "lot_revived", "charged"}
    assert by_all == sum(entry.posted for entry in book.entries if entry.lot and entry.kind in others)
    for lot in book.all.lots():
        came_of = None if lot.origin is None else book.lot(lot.origin)
        assert came_of is None or (came_of.kind, came_of.expires_at) == (lot.kind, lot.expires_at)
