"""Laws of claims: what they take follows from all of them, whatever order they and everything else came in."""

from collections import Counter
from collections.abc import Callable
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.domain.commands import ClaimPayment, ClaimState, Grant, PlaceHold, ReleaseHold
from services.ledger.domain.entries import ClawedBack, PaymentClaimed
from services.ledger.domain.errors import InsufficientFunds, InvalidAmount, PaymentDiffers, WalletNotOpen
from tests.unit.ledger.book import Book, hold_id, leg, line

PAYMENT = "pi_1"


def claim(
    claimed: int,
    *,
    claim: str = "re_1",
    state: ClaimState = "final",
    unit: str = "usd",
    account: str = "acme",
    revision: int = 0,
) -> ClaimPayment:
    return ClaimPayment(
        account=account,
        payment=PAYMENT,
        claim=claim,
        reason="dispute" if claim.startswith("dp") else "refund",
        state=state,
        unit=unit,
        claimed=claimed,
        revision=revision,
    )


def bought(paid: int = 50, bonus: int = 0, *, unit: str = "usd") -> Book:
    """A book in which somebody paid, and got a bonus."""
    book = Book()
    book.open("acme", unit)
    book.grant("acme", unit, paid, reference=PAYMENT)
    if bonus:
        book.grant("acme", unit, bonus, kind="bonus", reference=PAYMENT)
    return book


def hold(book: Book, amount: int) -> str:
    placed = hold_id()
    book.do(PlaceHold(hold=placed, account="acme", legs=(leg("usd", amount),)))
    return placed


def posted_by_kind(book: Book) -> Counter[str]:
    """What is left, and owed: which of a wallet's debts is which does not matter."""
    found: Counter[str] = Counter()
    for lot in book.state.lots():
        if lot.posted:
            found[lot.kind] += lot.posted
    return found


def debt(book: Book) -> int:
    return -sum(lot.posted for lot in book.wallet("acme", "usd").debts())


def test_example_11_claims_take_what_is_there_then_what_is_released_and_the_rest_is_owed() -> None:
    book = bought(50, 5)
    book.do(line("acme", ("usd", 25)))
    held = hold(book, 10)
    assert book.amounts("acme", "usd") == (30, 10)
    moves = book.do(claim(50))
    assert sum(move.posted for move in moves if move.lot and move.lot_kind == "purchase") == -20
    assert debt(book) == 25
    assert book.amounts("acme", "usd") == (-15, 10)
    moves = book.do(ReleaseHold(hold=held, account="acme"))
    assert [(move.lot_kind, move.posted) for move in moves if move.kind == "clawed_back" and move.lot] == [
        ("purchase", -10)
    ]
    assert book.amounts("acme", "usd") == (-25, 0)
    assert debt(book) == 25
    assert book.replayed() == book.tables


@pytest.mark.parametrize("order", list(permutations(("paid", "bonus", "spend", "hold", "refund"))), ids="-".join)
def test_example_11_ends_the_same_in_every_order_of_arrival(order: tuple[str, ...]) -> None:
    """A hold that nothing covers is refused, and there is nothing to release."""
    book = Book()
    book.open("acme", "usd")
    held = hold_id()
    steps: dict[str, Callable[[], object]] = {
        "paid": lambda: book.grant("acme", "usd", 50, reference=PAYMENT),
        "bonus": lambda: book.grant("acme", "usd", 5, kind="bonus", reference=PAYMENT),
        "spend": lambda: book.do(line("acme", ("usd", 25))),
        "hold": lambda: book.ask(PlaceHold(hold=held, account="acme", legs=(leg("usd", 10),))),
        "refund": lambda: book.do(claim(50)),
    }
    for step in order:
        outcome = steps[step]()
        assert isinstance(outcome, (str, list, InsufficientFunds))
        # It may come again, and another process may have taken over.
        book.restart()
        assert "refund" not in order[: order.index(step) + 1] or book.ask(claim(50)) == []
    if (7, held) in book.tables["holds"]:
        posted, set_aside = book.amounts("acme", "usd")
        assert (posted, set_aside) == (-15, 10)
        book.do(ReleaseHold(hold=held, account="acme"))
    assert book.amounts("acme", "usd") == (-25, 0)
    assert debt(book) == 25
    assert all(lot.posted <= 0 for lot in book.state.lots())
    assert book.replayed() == book.tables


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("re_1", "re_2", "dp_1")),
            st.sampled_from(("final", "void")),
            st.integers(0, 60),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 50),
    st.integers(0, 9),
    st.integers(0, 60),
    st.data(),
)
def test_claims_take_the_same_in_whatever_order_and_however_often_they_come(
    said: list[tuple[str, ClaimState, int]], paid: int, bonus: int, spent: int, data: st.DataObject
) -> None:
    """Beside the amounts, the lots and the debts are the same, if what was spent had been spent before any claim."""
    facts = [
        claim(claimed, claim=name, state=state, revision=number) for number, (name, state, claimed) in enumerate(said)
    ]
    delivered = data.draw(st.permutations(facts + data.draw(st.lists(st.sampled_from(facts), max_size=4))))
    ends = []
    for order in (facts, delivered):
        book = bought(paid, bonus)
        book.do(line("acme", ("usd", spent)))
        for each in order:
            book.do(each)
        assert book.replayed() == book.tables
        ends.append(posted_by_kind(book))
    last = {fact.claim: fact for fact in facts}
    clawed = min(paid, sum(fact.claimed for fact in last.values() if fact.state == "final"))
    assert book.amounts("acme", "usd") == (paid + bonus - spent - clawed - bonus * clawed // paid, 0)
    assert ends[0] == ends[1]


def test_partial_refunds_and_a_dispute_take_no_more_than_was_paid() -> None:
    book = bought(50, 5)
    book.do(claim(20))
    assert book.amounts("acme", "usd") == (55 - 20 - 2, 0)
    book.do(claim(50, claim="dp_1"))
    assert book.amounts("acme", "usd") == (0, 0)
    assert debt(book) == 0


def test_the_bonus_is_taken_in_proportion_and_rounded_down() -> None:
    book = bought(50, 7)
    book.do(claim(20))
    book.do(claim(20, claim="re_2"))
    # floor(7 * 40 / 50), and not floor(7 * 20 / 50) twice.
    assert book.amounts("acme", "usd") == (57 - 40 - 5, 0)


def test_a_claim_that_comes_before_its_grant_waits_for_it() -> None:
    book = Book()
    book.open("acme", "usd")
    book.do(claim(20))
    assert book.amounts("acme", "usd") == (0, 0)
    book.restart()
    moves = book.do(Grant(account="acme", unit="usd", amount=50, kind="purchase", reference=PAYMENT))
    assert [(move.kind, move.account, move.posted) for move in moves] == [
        ("lot_granted", "acme", 50),
        ("lot_granted", "@stripe", -50),
        ("clawed_back", "acme", -20),
        ("clawed_back", "@stripe", 20),
    ]
    # Nothing is paid for another reference, nor of another kind.
    book.grant("acme", "usd", 5, reference="pi_2")
    book.grant("acme", "usd", 5, kind="adjustment", reference=PAYMENT)
    assert book.amounts("acme", "usd") == (40, 0)


def test_what_a_claim_takes_is_not_repaid_first() -> None:
    book = Book()
    book.open("acme", "usd")
    book.do(line("acme", ("usd", 25)))
    book.do(claim(30))
    moves = book.do(Grant(account="acme", unit="usd", amount=50, kind="purchase", reference=PAYMENT))
    assert sum(move.posted for move in moves if move.kind == "debt_repaid" and move.lot_kind == "debt") == 20
    assert book.amounts("acme", "usd") == (-5, 0)
    assert debt(book) == 5


def test_what_is_charged_of_what_a_claim_waits_for_is_owed() -> None:
    book = bought(50)
    held = hold(book, 10)
    book.do(claim(50))
    assert book.amounts("acme", "usd") == (10, 10)
    moves = book.do(line("acme", ("usd", 7), hold=held))
    assert [(move.kind, move.lot_kind, move.posted, move.held) for move in moves if move.lot] == [
        ("charged", "purchase", -7, -7),
        ("hold_settled", "purchase", 0, -3),
        ("clawed_back", "purchase", -3, 0),
        ("clawed_back", "debt", -7, 0),
    ]
    assert book.amounts("acme", "usd") == (-7, 0)
    assert book.replayed() == book.tables


def test_charges_of_a_bundle_are_summed_and_what_claims_wait_for_is_taken_with_each() -> None:
    book = bought(50)
    holds = [hold(book, 10) for _ in range(3)]
    book.do(claim(50))
    book.bundle([*(line("acme", ("usd", 4), hold=held) for held in holds), line("acme", ("usd", 1))])
    assert book.amounts("acme", "usd") == (-13, 0)
    assert book.replayed() == book.tables
    (lot,) = [row for row in book.tables["lots"].values() if row[4] == "purchase"]
    assert lot[-3:] == (50, 12, 0)


def test_two_holds_are_waited_for_one_by_one() -> None:
    book = bought(50)
    first, second = hold(book, 30), hold(book, 20)
    book.do(claim(45))
    assert book.amounts("acme", "usd") == (50, 50)
    book.do(ReleaseHold(hold=second, account="acme"))
    assert book.amounts("acme", "usd") == (30, 30)
    book.do(ReleaseHold(hold=first, account="acme"))
    assert book.amounts("acme", "usd") == (5, 0)


def test_a_void_claim_gives_back_what_it_took() -> None:
    book = bought(50, 5)
    book.do(line("acme", ("usd", 25)))
    held = hold(book, 10)
    before = {key: row for key, row in book.tables["lots"].items() if row[-1] == 0}
    book.do(claim(50, claim="dp_1", revision=1))
    book.do(claim(50, claim="dp_1", state="void", revision=2))
    assert book.amounts("acme", "usd") == (30, 10)
    assert debt(book) == 0
    assert {key: row for key, row in book.tables["lots"].items() if row[4] != "debt"} == before
    # What was said before comes late, and changes nothing.
    assert book.do(claim(50, claim="dp_1", revision=1)) == []
    book.do(ReleaseHold(hold=held, account="acme"))
    assert book.amounts("acme", "usd") == (30, 0)
    assert book.replayed() == book.tables


def test_what_is_given_back_repays_what_is_owed() -> None:
    book = bought(50)
    book.do(claim(50, revision=1))
    book.do(line("acme", ("usd", 30)))
    assert debt(book) == 30
    book.do(claim(50, state="void", revision=2))
    assert book.amounts("acme", "usd") == (20, 0)
    assert debt(book) == 0


def test_a_debt_that_was_repaid_meanwhile_is_given_back_to_the_lot_it_was_taken_for() -> None:
    book = bought(50)
    book.do(line("acme", ("usd", 50)))
    book.do(claim(50, revision=1))
    book.grant("acme", "usd", 80)
    assert (book.amounts("acme", "usd"), debt(book)) == ((30, 0), 0)
    book.do(claim(50, state="void", revision=2))
    assert book.amounts("acme", "usd") == (80, 0)
    book.do(claim(50, revision=3))
    assert (book.amounts("acme", "usd"), debt(book)) == ((30, 0), 0)
    assert book.replayed() == book.tables


def test_a_cap_that_was_bought_is_never_owed() -> None:
    book = bought(50, 10, unit="tokens")
    book.do(line("acme", ("tokens", 45)))
    book.do(claim(50, unit="tokens", revision=1))
    assert book.amounts("acme", "tokens") == (0, 0)
    assert book.wallet("acme", "tokens").overage == 45
    book.do(claim(50, unit="tokens", state="void", revision=2))
    assert book.amounts("acme", "tokens") == (15, 0)
    assert book.wallet("acme", "tokens").overage == 0
    assert book.replayed() == book.tables


def test_a_claim_is_refused_where_it_cannot_be_meant() -> None:
    book = bought(50)
    book.open("acme/ana", "usd", "points")
    book.open("acme", "points")
    before = {name: dict(rows) for name, rows in book.tables.items()}
    assert book.ask(claim(1, account="acme/ana")) == PaymentDiffers(PAYMENT, "acme/ana")
    assert book.ask(claim(1, unit="tokens")) == WalletNotOpen("acme", "tokens")
    assert isinstance(book.ask(claim(1, unit="points")), InvalidAmount)
    assert isinstance(book.ask(claim(-1)), InvalidAmount)
    assert book.tables == before


def test_every_entry_of_a_claim_says_what_it_is_about() -> None:
    book = bought(50)
    before = len(book.entries)
    book.do(line("acme", ("usd", 20)))
    book.do(claim(50))
    entries = [entry for entry in book.entries[before:] if entry.kind != "charged"]
    assert [(entry.kind, entry.account, entry.lot_kind, entry.posted) for entry in entries] == [
        ("payment_claimed", "acme", None, 0),
        ("clawed_back", "acme", "purchase", -30),
        ("clawed_back", "acme", "debt", -20),
        ("clawed_back", "@stripe", None, 50),
    ]
    assert isinstance(entries[0].details, PaymentClaimed)
    assert all(isinstance(entry.details, ClawedBack) for entry in entries[1:3])
