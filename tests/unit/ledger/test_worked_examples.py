"""The worked examples of the architecture, with its numbers, on the pure core."""

from services.ledger.domain.commands import PlaceHold, ReleaseHold
from services.ledger.domain.errors import InsufficientFunds
from tests.unit.ledger.book import Book, hold_id, leg, line

USD = 10**9


def test_example_1_a_tree_is_limited_where_a_wallet_is() -> None:
    book = Book()
    book.open("acme", "usd")
    book.open("acme/ana/key_1", "usd_cap")
    book.grant("acme", "usd", 100 * USD)
    book.grant("acme/ana/key_1", "usd_cap", 5 * USD, kind="plan")

    refusal = book.ask(PlaceHold(hold=hold_id(), account="acme/ana/key_1", legs=(leg("usd", 6 * USD),)))
    assert refusal == InsufficientFunds("acme/ana/key_1", "usd_cap", 6 * USD, 5 * USD)

    book.do(PlaceHold(hold=hold_id(), account="acme/ana/key_1", legs=(leg("usd", 4 * USD),)))
    assert book.amounts("acme", "usd") == (100 * USD, 4 * USD)
    assert book.amounts("acme/ana/key_1", "usd_cap") == (5 * USD, 4 * USD)
    assert book.state.accounts["acme/ana"].wallets == {}


def test_example_2_a_part_is_held_if_that_is_enough() -> None:
    book = Book()
    book.open("acme", "usd")
    book.grant("acme", "usd", 3)
    before = book.tables["wallets"].copy()
    assert book.ask(PlaceHold(hold=hold_id(), account="acme", legs=(leg("usd", 4, 10),))) == InsufficientFunds(
        "acme", "usd", 4, 3
    )
    assert book.tables["wallets"] == before
    book.do(PlaceHold(hold=hold_id(), account="acme", legs=(leg("usd", 1, 10),)))
    assert book.amounts("acme", "usd") == (3, 3)


def test_example_3_the_final_charge_settles_the_hold_whole() -> None:
    """Its increments belong to a later issue: here one line of 12 settles the hold of 10."""
    book = Book()
    book.open("acme", "usd")
    book.grant("acme", "usd", 20)
    hold = hold_id()
    book.do(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 10),)))
    book.do(line("acme", ("usd", 12), hold=hold))
    assert book.amounts("acme", "usd") == (8, 0)


def test_example_4_what_is_above_the_hold_is_taken_then_owed_then_repaid() -> None:
    book = Book()
    book.open("acme", "usd")
    book.grant("acme", "usd", 11)
    hold = hold_id()
    book.do(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 10),)))
    moves = book.do(line("acme", ("usd", 12), hold=hold))
    assert [(move.lot_kind, move.posted, move.held) for move in moves if move.lot] == [
        ("purchase", -10, -10),
        ("purchase", -1, 0),
        ("debt", -1, 0),
    ]
    assert book.amounts("acme", "usd") == (-1, 0)
    lot = book.grant("acme", "usd", 5)
    assert book.lot(lot) == (4, 0)
    assert book.amounts("acme", "usd") == (4, 0)


def test_example_5_debt_and_what_repaid_it_name_each_other() -> None:
    """The reversal itself belongs to a later issue: here is what it will need."""
    book = Book()
    book.open("acme", "usd")
    lot_a, lot_b = book.grant("acme", "usd", 10), book.grant("acme", "usd", 1)
    moves = book.do(line("acme", ("usd", 12)))
    taken = [(move.lot, move.posted) for move in moves if move.lot]
    debt = taken[2][0]
    assert taken == [(lot_a, -10), (lot_b, -1), (debt, -1)]
    lot_c = book.grant("acme", "usd", 5)
    repaid = [entry for entry in book.entries if entry.kind == "debt_repaid"]
    assert [(entry.lot, entry.posted) for entry in repaid] == [(lot_c, -1), (debt, 1)]
    assert book.lot(lot_c) == (4, 0)


def test_a_release_gives_everything_back() -> None:
    book = Book()
    book.open("acme", "usd")
    lot = book.grant("acme", "usd", 10)
    hold = hold_id()
    book.do(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 7),)))
    book.do(ReleaseHold(hold=hold, account="acme"))
    assert book.lot(lot) == (10, 0)
