"""Laws of claims: what they take follows from all of them, whatever order they and everything else came in."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.domain.commands import (
    Adjust,
    ChargeLine,
    ClaimPayment,
    ClaimState,
    Command,
    Grant,
    GrantedKind,
    PlaceHold,
    ReleaseHold,
    ResolveHold,
    ReverseCharge,
    Transfer,
    VoidGrant,
)
from services.ledger.domain.entries import ClawedBack, PaymentClaimed
from services.ledger.domain.errors import InvalidAmount, PaymentDiffers, WalletNotOpen
from tests.unit.ledger.archive import Archive
from tests.unit.ledger.book import hold_id, leg, line

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


def bought(paid: int = 50, bonus: int = 0, *, unit: str = "usd") -> Archive:
    """A book in which somebody paid, and got a bonus."""
    book = Archive()
    book.open("acme", unit)
    book.grant("acme", unit, paid, reference=PAYMENT)
    if bonus:
        book.grant("acme", unit, bonus, kind="bonus", reference=PAYMENT)
    return book


def hold(book: Archive, amount: int) -> str:
    placed = hold_id()
    book.do(PlaceHold(hold=placed, account="acme", legs=(leg("usd", amount),)))
    return placed


def posted_by_kind(book: Archive) -> Counter[str]:
    """What is left, and owed: which of a wallet's debts is which does not matter."""
    found: Counter[str] = Counter()
    for lot in book.all.lots():
        if lot.posted:
            found[lot.kind] += lot.posted
    return found


def debt(book: Archive) -> int:
    return -sum(lot.posted for lot in book.wallet("acme", "usd").debts())


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
        book.check()
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
    book = Archive()
    book.open("acme", "usd")
    book.do(claim(20))
    assert book.amounts("acme", "usd") == (0, 0)
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
    book = Archive()
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
    book.check()


def test_charges_of_a_bundle_are_summed_and_what_claims_wait_for_is_taken_with_each() -> None:
    book = bought(50)
    holds = [hold(book, 10) for _ in range(3)]
    book.do(claim(50))
    book.bundle([*(line("acme", ("usd", 4), hold=held) for held in holds), line("acme", ("usd", 1))])
    assert book.amounts("acme", "usd") == (-13, 0)
    book.check()
    (lot,) = [lot for lot in book.all.lots() if lot.kind == "purchase"]
    assert (lot.clawed, lot.clawed_spent, lot.pending) == (50, 12, 0)


def test_what_an_estimate_was_too_high_is_taken_and_not_owed() -> None:
    states: tuple[ClaimState, ...] = ("final", "open")
    for state in states:
        book = bought(50)
        held = hold_id()
        book.do(PlaceHold(hold=held, account="acme", legs=(leg("usd", 10),), overdue="charge_estimate"))
        book.do(claim(50, state=state))
        book.wait(hours=1)
        book.do(ResolveHold(hold=held, account="acme"))
        assert (book.amounts("acme", "usd"), debt(book)) == (((-10, 0), 10) if state == "final" else ((40, 0), 0))
        book.do(line("acme", ("usd", 7), hold=held))
        book.check()
        assert debt(book) == (7 if state == "final" else 0)
        assert book.amounts("acme", "usd") == ((-7, 0) if state == "final" else (43, 0))
        assert book.wallet("acme", "usd").frozen == (0 if state == "final" else 43)


steps_of_estimate = st.permutations(("place", "deadline", "claim", "charge", "spend"))


@given(
    steps_of_estimate.filter(lambda each: each.index("place") < each.index("deadline") < each.index("charge")),
    st.sampled_from(("final", "open")),
    st.integers(0, 60),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_what_an_estimate_gives_back_meets_claims_in_whatever_order_they_come(
    order: list[str], state: ClaimState, claimed: int, estimate: int, cost: int
) -> None:
    """Of 30 + 12 paid on one payment, 10 are spent besides: what is taken and frozen is as if all had been charged."""
    book = bought(30)
    book.grant("acme", "usd", 12, reference=PAYMENT)
    held = hold_id()
    placed = PlaceHold(hold=held, account="acme", legs=(leg("usd", 0, estimate),), overdue="charge_estimate")
    facts: list[ClaimPayment] = []
    for step in order:
        match step:
            case "place":
                book.do(placed)
            case "deadline":
                book.wait(hours=1)
                book.ask(ResolveHold(hold=held, account="acme"))
            case "claim":
                facts.append(claim(claimed, state=state))
                book.do(facts[-1])
            case "charge":
                book.do(line("acme", ("usd", cost), hold=held))
            case _:
                book.do(line("acme", ("usd", 10)))
        book.check()
        check_claims(book, facts)
    wallet = book.wallet("acme", "usd")
    taken = min(42, claimed) if state == "final" else 0
    assert wallet.posted == 42 - 10 - cost - taken
    assert wallet.available_anywhere(book.now) + wallet.frozen == wallet.posted
    if state == "open":
        # Nothing of what is left is free that a claim is about.
        there = sum(lot.available for lot in wallet.burning())
        assert wallet.frozen == min(42, claimed) or not there


@pytest.mark.parametrize("state", ["final", "open"])
def test_several_purchases_on_one_payment_are_claimed_as_one(state: ClaimState) -> None:
    """Paid 18 + 24, of which 18 are spent: of a claim over 23 all is taken, or frozen, of what is left."""
    book = bought(18)
    book.grant("acme", "usd", 24, reference=PAYMENT)
    book.do(line("acme", ("usd", 18)))
    book.do(claim(23, state=state))
    wallet = book.wallet("acme", "usd")
    assert (wallet.posted, wallet.frozen, wallet.owed) == ((1, 0, 0) if state == "final" else (24, 23, 0))
    book.do(claim(41, state=state, revision=1))
    wallet = book.wallet("acme", "usd")
    assert (wallet.posted, wallet.frozen, wallet.owed) == ((-17, 0, 17) if state == "final" else (24, 24, 0))
    book.do(claim(41, state="void", revision=2))
    assert (book.amounts("acme", "usd"), book.wallet("acme", "usd").frozen, debt(book)) == ((24, 0), 0, 0)
    book.check()


@pytest.mark.parametrize("state", ["final", "open"])
@pytest.mark.parametrize("first", ["charged", "released"])
def test_claims_wait_for_what_is_held_of_another_purchase_of_the_payment(first: str, state: ClaimState) -> None:
    """Paid 18 + 24, all held, claimed 20: whichever hold ends first, and how, no more than 22 are free."""
    book = bought(18)
    book.grant("acme", "usd", 24, reference=PAYMENT)
    one, other = hold(book, 18), hold(book, 24)
    book.do(claim(20, state=state))
    assert book.amounts("acme", "usd") == (42, 42)
    if first == "charged":
        book.do(line("acme", ("usd", 18), hold=one))
        assert book.amounts("acme", "usd") == (24, 24)
        book.do(ReleaseHold(hold=other, account="acme"))
        free, left = 4, 24
    else:
        book.do(ReleaseHold(hold=other, account="acme"))
        assert book.available("acme", "usd") == 4
        book.check()
        book.do(ReleaseHold(hold=one, account="acme"))
        free, left = 22, 42
    wallet = book.wallet("acme", "usd")
    assert (wallet.available_anywhere(book.now), wallet.owed) == (free, 0)
    assert (wallet.posted, wallet.frozen) == ((left - 20, 0) if state == "final" else (left, 20))
    book.check()
    check_claims(book, [claim(20, state=state)])


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
    before = book.lots()
    book.do(claim(50, claim="dp_1", revision=1))
    book.do(claim(50, claim="dp_1", state="void", revision=2))
    assert book.amounts("acme", "usd") == (30, 10)
    assert debt(book) == 0
    assert book.lots() == before
    assert not any(lot.clawed or lot.clawed_spent or lot.pending for lot in book.all.lots())
    # What was said before comes late, and changes nothing.
    assert book.do(claim(50, claim="dp_1", revision=1)) == []
    book.do(ReleaseHold(hold=held, account="acme"))
    assert book.amounts("acme", "usd") == (30, 0)
    book.check()


def test_what_is_given_back_repays_what_is_owed() -> None:
    book = bought(50)
    book.do(claim(50, revision=1))
    book.do(line("acme", ("usd", 30)))
    assert debt(book) == 30
    book.do(claim(50, state="void", revision=2))
    assert book.amounts("acme", "usd") == (20, 0)
    assert debt(book) == 0


def test_what_was_repaid_in_a_lots_stead_goes_back_to_whom_it_was_repaid_by() -> None:
    book = bought(50)
    book.do(line("acme", ("usd", 50)))
    book.do(claim(50, revision=1))
    other = book.grant("acme", "usd", 80)
    assert (book.amounts("acme", "usd"), debt(book)) == ((30, 0), 0)
    book.do(claim(50, state="void", revision=2))
    # As if it had never been claimed.
    assert book.amounts("acme", "usd") == (80, 0)
    assert book.lot(other).posted == 80
    book.do(claim(50, revision=3))
    assert (book.available("acme", "usd"), debt(book)) == (30, 50)
    book.check()


def test_a_cap_that_was_bought_is_never_owed() -> None:
    book = bought(50, 10, unit="tokens")
    book.do(line("acme", ("tokens", 45)))
    book.do(claim(50, unit="tokens", revision=1))
    assert book.amounts("acme", "tokens") == (0, 0)
    assert book.wallet("acme", "tokens").overage == 45
    book.do(claim(50, unit="tokens", state="void", revision=2))
    assert book.amounts("acme", "tokens") == (15, 0)
    assert book.wallet("acme", "tokens").overage == 0
    book.check()


def test_a_claim_is_refused_where_it_cannot_be_meant() -> None:
    book = bought(50)
    book.open("acme/ana", "usd", "points")
    book.open("acme", "points")
    before = len(book.entries)
    assert book.ask(claim(1, account="acme/ana")) == PaymentDiffers(PAYMENT, "acme/ana")
    assert book.ask(claim(1, unit="tokens")) == WalletNotOpen("acme", "tokens")
    assert isinstance(book.ask(claim(1, unit="points")), InvalidAmount)
    assert isinstance(book.ask(claim(-1)), InvalidAmount)
    assert len(book.entries) == before


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


# Open claims


def test_an_open_claim_freezes_what_is_there_and_then_what_is_released() -> None:
    book = bought(50, 5)
    book.do(line("acme", ("usd", 25)))
    held = hold(book, 10)
    moves = book.do(claim(50, claim="dp_1", state="open"))
    assert [(move.kind, move.lot_kind, move.frozen) for move in moves] == [
        ("payment_claimed", None, 0),
        ("claim_frozen", "purchase", 20),
    ]
    assert (book.amounts("acme", "usd"), book.available("acme", "usd")) == ((30, 10), 0)
    # Holds still settle; what is released of them is frozen.
    book.do(line("acme", ("usd", 4), hold=held))
    wallet = book.wallet("acme", "usd")
    assert (wallet.posted, wallet.held, wallet.frozen) == (26, 0, 26)
    assert debt(book) == 0
    book.check()


@pytest.mark.parametrize("order", list(permutations(("paid", "bonus", "spend", "dispute"))), ids="-".join)
@pytest.mark.parametrize("end", ["final", "void"])
def test_example_11_ends_the_same_if_the_claim_is_open_first(order: tuple[str, ...], end: ClaimState) -> None:
    """The dispute takes what a refund would have taken, or nothing, whatever came before it, and after."""
    book = Archive()
    book.open("acme", "usd")
    steps: dict[str, Callable[[], object]] = {
        "paid": lambda: book.grant("acme", "usd", 50, reference=PAYMENT),
        "bonus": lambda: book.grant("acme", "usd", 5, kind="bonus", reference=PAYMENT),
        "spend": lambda: book.do(line("acme", ("usd", 25))),
        "dispute": lambda: book.do(claim(50, claim="dp_1", state="open")),
    }
    for step in order:
        steps[step]()
        book.check()
    book.do(claim(50, claim="dp_1", state=end, revision=1))
    assert book.amounts("acme", "usd") == ((-25, 0) if end == "final" else (30, 0))
    assert debt(book) == (25 if end == "final" else 0)
    assert book.wallet("acme", "usd").frozen == 0
    book.check()


def test_what_is_frozen_is_what_was_paid_and_is_not_taken_and_no_bonus() -> None:
    book = bought(50, 10)
    book.do(claim(30, claim="dp_1", state="open"))
    book.do(claim(30))
    wallet = book.wallet("acme", "usd")
    # min(50, 30) are taken, floor(10 * 30 / 50) of the bonus, and min(50 - 30, 30) frozen.
    assert (wallet.posted, wallet.frozen) == (60 - 30 - 6, 20)
    assert book.available("acme", "usd") == 4


def test_a_claim_may_be_undone_after_it_was_final() -> None:
    book = bought(50)
    before = book.lots()
    states: tuple[ClaimState, ...] = ("final", "void", "final", "open", "void")
    for revision, state in enumerate(states):
        book.do(claim(50, state=state, revision=revision))
        book.check()
    assert book.lots() == before


def test_what_is_released_of_one_hold_after_another_is_frozen() -> None:
    book = bought(50)
    first, second = hold(book, 30), hold(book, 20)
    book.do(claim(50, state="open"))
    for placed, frozen in ((first, 30), (second, 50)):
        book.do(ReleaseHold(hold=placed, account="acme"))
        assert (book.wallet("acme", "usd").frozen, book.available("acme", "usd")) == (frozen, 0)
        book.check()


# What became of the lots


def test_claims_take_what_was_transferred_before_what_stayed() -> None:
    book = bought(50)
    book.open("acme/ana", "usd")
    book.open("acme/bob", "usd")
    book.do(Transfer(account="acme", to_account="acme/ana", unit="usd", amount=30))
    book.do(Transfer(account="acme/ana", to_account="acme/bob", unit="usd", amount=10))
    book.do(claim(35))
    assert [book.amounts(account, "usd")[0] for account in ("acme", "acme/ana", "acme/bob")] == [15, 0, 0]
    book.do(claim(35, state="void", revision=1))
    assert [book.amounts(account, "usd")[0] for account in ("acme", "acme/ana", "acme/bob")] == [20, 20, 10]
    book.check()


def test_what_was_spent_of_a_transferred_lot_is_owed_where_it_was_spent() -> None:
    book = bought(50)
    book.open("acme/ana", "usd")
    book.do(Transfer(account="acme", to_account="acme/ana", unit="usd", amount=30))
    book.do(line("acme/ana", ("usd", 25)))
    book.do(claim(50))
    assert (book.amounts("acme", "usd"), book.amounts("acme/ana", "usd")) == ((0, 0), (-25, 0))
    assert book.debt("acme/ana") == 25
    book.check()


def test_what_was_moved_on_was_not_spent_there() -> None:
    book = bought(50)
    book.open("acme/ana", "usd")
    book.open("acme/bob", "usd")
    book.do(Transfer(account="acme", to_account="acme/ana", unit="usd", amount=30))
    book.do(Transfer(account="acme/ana", to_account="acme/bob", unit="usd", amount=10))
    book.do(line("acme/bob", ("usd", 5)))
    book.do(line("acme", ("usd", 15)))
    book.do(claim(50))
    assert [book.debt(account) for account in ("acme", "acme/ana", "acme/bob")] == [15, 0, 5]
    book.check()


def test_who_repaid_in_a_lots_stead_gets_it_back_though_its_own_has_ended() -> None:
    """By a claim that is void, by what is given back of the charge, or as more is paid and less of a bonus taken."""
    for way in ("void", "reversed", "granted"):
        book = Archive()
        book.open("acme", "usd")
        lot = book.grant("acme", "usd", 10, kind="bonus", reference=PAYMENT)
        use = line("acme", ("usd", 10))
        book.do(use)
        book.grant("acme", "usd", 50, reference=PAYMENT)
        book.do(claim(50))
        assert book.debt("acme") == 10
        ended = book.grant("acme", "usd", 12, kind="promo", days=1)
        assert book.debt("acme") == 0
        book.wait(days=2)
        match way:
            case "void":
                book.do(claim(50, state="void", revision=1))
            case "reversed":
                book.do(ReverseCharge(account="acme", source=use.source, event_id=use.event_id))
            case _:
                # Of the bonus floor(10 * 50 / 500) is taken.
                book.grant("acme", "usd", 450, reference=PAYMENT)
        (back,) = [each for each in book.all.lots() if each.origin == ended]
        assert back.posted == (9 if way == "granted" else 10)
        assert (book.lot(lot).posted, book.lot(ended).posted, book.debt("acme")) == (0, 0, 0)
        book.check()


def test_what_is_given_back_to_one_lot_of_a_payment_does_not_repay_what_is_owed_for_another() -> None:
    book = Archive()
    book.open("acme", "usd")
    book.grant("acme", "usd", 10, kind="bonus", reference=PAYMENT)
    bonus_use, paid_use = line("acme", ("usd", 10)), line("acme", ("usd", 20))
    book.do(bonus_use)
    paid = book.grant("acme", "usd", 50, reference=PAYMENT)
    book.do(paid_use)
    book.do(claim(10))
    assert (book.lot(paid).posted, book.debt("acme")) == (20, 2)
    book.do(ReverseCharge(account="acme", source=paid_use.source, event_id=paid_use.event_id))
    assert (book.lot(paid).posted, book.debt("acme")) == (40, 2)


def test_what_a_claim_gives_back_does_not_repay_what_it_made_owed() -> None:
    book = Archive()
    book.open("acme", "usd")
    book.grant("acme", "usd", 10, kind="bonus", reference=PAYMENT)
    book.do(line("acme", ("usd", 10)))
    paid = book.grant("acme", "usd", 50, reference=PAYMENT)
    book.do(claim(50, revision=1))
    assert (book.lot(paid).posted, book.debt("acme")) == (0, 10)
    book.do(claim(40, revision=2))
    # As if it had been 40 from the beginning.
    assert (book.lot(paid).posted, book.debt("acme")) == (10, 8)
    book.check()


def test_what_has_expired_is_not_owed() -> None:
    orders: tuple[tuple[ClaimState, ...], ...] = (("final",), ("open", "final"), ("final", "open"), ("open",))
    for states in orders:
        book = Archive()
        book.open("acme", "usd")
        book.grant("acme", "usd", 50, reference=PAYMENT, days=1)
        book.do(line("acme", ("usd", 10)))
        book.wait(days=2)
        for revision, state in enumerate(states):
            book.do(claim(50, state=state, revision=revision))
            book.check()
        if states[-1] == "final":
            assert (book.amounts("acme", "usd"), debt(book)) == ((-10, 0), 10)
        book.do(claim(50, state="void", revision=9))
        assert (book.amounts("acme", "usd"), debt(book)) == ((0, 0), 0)
        book.check()


def test_what_was_voided_is_not_owed() -> None:
    book = bought(50)
    (lot,) = book.lots()
    book.do(line("acme", ("usd", 10)))
    book.do(VoidGrant(account="acme", lot=lot))
    book.do(claim(50))
    assert (book.amounts("acme", "usd"), debt(book)) == ((-10, 0), 10)
    book.do(claim(50, state="void", revision=1))
    assert (book.amounts("acme", "usd"), debt(book)) == ((0, 0), 0)
    book.check()


def test_what_is_given_back_to_a_charged_lot_is_owed_no_longer() -> None:
    book = bought(50)
    use = line("acme", ("usd", 30))
    book.do(use)
    book.do(claim(50))
    assert (book.amounts("acme", "usd"), debt(book)) == ((-30, 0), 30)
    moves = book.do(ReverseCharge(account="acme", source=use.source, event_id=use.event_id))
    assert ("given_back", "debt", 30) in [(move.kind, move.lot_kind, move.posted) for move in moves]
    assert (book.amounts("acme", "usd"), debt(book)) == ((0, 0), 0)
    book.check()


def test_what_is_given_back_to_a_frozen_lot_is_frozen() -> None:
    book = bought(50)
    use = line("acme", ("usd", 30))
    book.do(use)
    book.do(claim(50, state="open"))
    book.do(ReverseCharge(account="acme", source=use.source, event_id=use.event_id, amounts=(("usd", 20),)))
    assert (book.amounts("acme", "usd"), book.available("acme", "usd")) == ((40, 0), 0)


# Laws

names = st.sampled_from(("re_1", "re_2", "dp_1"))
states: st.SearchStrategy[ClaimState] = st.sampled_from(("open", "final", "void"))
said = st.lists(st.tuples(names, states, st.integers(0, 60)), min_size=1, max_size=6)


def facts_of(said: list[tuple[str, ClaimState, int]]) -> list[ClaimPayment]:
    return [
        claim(claimed, claim=name, state=state, revision=number) for number, (name, state, claimed) in enumerate(said)
    ]


def claimed_of(facts: list[ClaimPayment], paid: int) -> tuple[int, int]:
    """What is taken and frozen of what was paid, by the letter."""
    last = {fact.claim: fact for fact in facts}.values()
    clawed = min(paid, sum(fact.claimed for fact in last if fact.state == "final"))
    return clawed, min(paid - clawed, sum(fact.claimed for fact in last if fact.state == "open"))


def by_kind(book: Archive) -> Counter[tuple[str, ...]]:
    """Sums of the lots, by account and kind: which of them is which does not matter."""
    found: Counter[tuple[str, ...]] = Counter()
    for lot in book.all.lots():
        for what in ("posted", "held", "frozen", "clawed", "pending", "pending_frozen"):
            found[lot.account, lot.unit, lot.kind, what] += getattr(lot, what)
    return Counter({key: value for key, value in found.items() if value})


def check_claims(book: Archive, facts: list[ClaimPayment]) -> None:
    """Claims have of the payment's lots, or as its holds end, what they come to, and freeze no more than that."""
    lots = [lot for lot in book.all.lots() if lot.reference == PAYMENT and lot.kind in {"purchase", "bonus"}]
    granted: Counter[str] = Counter()
    for lot in lots:
        granted[lot.kind] += lot.granted if lot.origin is None else 0
    clawed, frozen = claimed_of(facts, granted["purchase"])
    taken = {"purchase": clawed, "bonus": granted["bonus"] * clawed // (granted["purchase"] or 1)}
    for kind, amount in taken.items():
        of_kind = [lot for lot in lots if lot.kind == kind]
        assert sum(lot.clawed + lot.pending for lot in of_kind) == amount
        assert sum(lot.frozen + lot.pending_frozen for lot in of_kind) <= (frozen if kind == "purchase" else 0)
    for lot in lots:
        in_stead = [debt for debt in book.all.lots() if debt.kind == "debt" and debt.origin == lot.id]
        assert sum(sum(debt.repaid.values()) - debt.posted for debt in in_stead) == lot.clawed_spent


@dataclass(frozen=True)
class History:
    """What came before the claims: what was bought, moved, spent, given back and set aside."""

    paid: int
    bonus: int
    spent: int
    moved: int
    spent_there: int
    held: int
    given_back: int
    # What ends sooner is used first.
    bonus_days: float | None

    def book(self) -> tuple[Archive, str]:
        """A book in which it happened, and the hold."""
        book = Archive()
        book.open("acme", "usd")
        book.open("acme/ana", "usd")
        book.grant("acme", "usd", self.paid, reference=PAYMENT, days=1)
        if self.bonus:
            book.grant("acme", "usd", self.bonus, kind="bonus", reference=PAYMENT, days=self.bonus_days)
        book.ask(Transfer(account="acme", to_account="acme/ana", unit="usd", amount=self.moved))
        use = line("acme", ("usd", self.spent))
        book.do(use)
        book.do(line("acme/ana", ("usd", self.spent_there)))
        placed = hold_id()
        book.do(PlaceHold(hold=placed, account="acme", legs=(leg("usd", 0, self.held),)))
        back = (("usd", min(self.spent, self.given_back)),)
        book.do(ReverseCharge(account="acme", source=use.source, event_id=use.event_id, amounts=back))
        return book, placed


small = st.integers(0, 40)
coin: st.SearchStrategy[bool] = st.booleans()
histories = st.builds(
    History,
    paid=st.integers(1, 50),
    bonus=st.integers(0, 9),
    spent=small,
    moved=small,
    spent_there=small,
    held=small,
    given_back=small,
    bonus_days=st.sampled_from((None, 0.5, 1)),
)


@given(said, histories, st.integers(0, 12), st.data())
def test_claims_come_to_the_same_in_whatever_order_on_whatever_came_before(
    said: list[tuple[str, ClaimState, int]], history: History, expires: int, data: st.DataObject
) -> None:
    """By account and kind of lot: what was moved, what expires meanwhile, what is charged of a hold after."""
    facts = facts_of(said)
    delivered = data.draw(st.permutations(facts + data.draw(st.lists(st.sampled_from(facts), max_size=4))))
    charged = data.draw(small)
    found = []
    for order, expires_before in ((facts, 0), (delivered, min(expires, len(delivered)))):
        book, placed = history.book()
        for number, each in enumerate([*order, None]):
            if number == expires_before:
                book.wait(days=2)
            if each is not None:
                book.do(each)
        # What is due is done before.
        book.grant("acme", "usd", 1, kind="promo")
        book.grant("acme/ana", "usd", 1, kind="promo")
        check_claims(book, facts)
        book.do(line("acme", ("usd", charged), hold=placed))
        check_claims(book, facts)
        book.check()
        found.append(by_kind(book))
    assert found[0] == found[1]


@given(
    said,
    st.lists(st.tuples(st.sampled_from(("purchase", "bonus", "promo")), st.integers(1, 40)), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4),
    st.data(),
)
def test_facts_come_to_the_same_in_whatever_order(
    said: list[tuple[str, ClaimState, int]],
    granted: list[tuple[GrantedKind, int]],
    used: list[tuple[int, int]],
    data: st.DataObject,
) -> None:
    """Grants, charges, what is given back of these, and claims: of what nobody refuses, the order does not matter."""
    facts = facts_of(said)
    grants: list[Command] = [
        Grant(account="acme", unit="usd", amount=amount, kind=kind, reference=PAYMENT) for kind, amount in granted
    ]
    uses = [(line("acme", ("usd", amount)), back) for amount, back in used]
    reversals = {
        use.event_id: ReverseCharge(
            account="acme", source=use.source, event_id=use.event_id, amounts=(("usd", min(back, use.amounts[0][1])),)
        )
        for use, back in uses
    }
    everything: list[Command] = [*facts, *grants, *(use for use, _ in uses)]
    found = []
    orders = st.permutations(everything)
    for order in (everything, data.draw(orders), data.draw(orders)):
        book = Archive()
        book.open("acme", "usd")
        waiting: list[Command] = []
        for each in order:
            if data.draw(coin) and waiting:
                book.do(waiting.pop())
            book.do(each)
            book.check()
            if isinstance(each, ChargeLine):
                waiting.append(reversals[each.event_id])
        for each in waiting:
            book.do(each)
        check_claims(book, facts)
        wallet = book.wallet("acme", "usd")
        # What is frozen, rather than owed, depends on what was there.
        is_open = any(fact.state == "open" for fact in {fact.claim: fact for fact in facts}.values())
        found.append((wallet.posted, wallet.held, None if is_open else book.available("acme", "usd")))
    assert found[0] == found[1] == found[2]


amounts = st.integers(1, 30)
places = st.sampled_from(("acme", "acme/ana"))
steps = st.one_of(
    st.tuples(st.just("buy"), amounts, st.booleans()),
    st.tuples(st.just("bonus"), amounts),
    st.tuples(st.just("promo"), places, amounts),
    st.tuples(st.just("use"), places, amounts),
    st.tuples(st.just("hold"), places, amounts),
    st.tuples(st.just("settle"), amounts),
    st.tuples(st.just("release")),
    st.tuples(st.just("move"), places, amounts),
    st.tuples(st.just("give back"), st.integers(0, 9), amounts),
    st.tuples(st.just("void"), st.integers(0, 9)),
    st.tuples(st.just("adjust"), places, st.integers(-20, 20)),
    st.tuples(st.just("wait")),
    st.tuples(st.just("claim"), names, states, st.integers(0, 60)),
    st.tuples(st.just("claim"), names, states, st.integers(0, 60)),
)


@given(st.lists(steps, min_size=12, max_size=25))
def test_claims_that_are_void_in_the_end_have_never_been(steps: list[tuple[Any, ...]]) -> None:
    """Whatever came between: holds, transfers, what was given back, voided, corrected, or expired. And at each step
    they have what they come to.
    """
    book = Archive()
    book.open("acme", "usd")
    book.open("acme/ana", "usd")
    uses: list[ChargeLine] = []
    holds: list[tuple[str, str]] = []
    facts: list[ClaimPayment] = []
    for step in steps:
        carry_out(book, step, uses, holds, facts)
        book.check()
        check_claims(book, facts)
    for account, placed in holds:
        end(book, placed, account)
    for name in {fact.claim for fact in facts}:
        facts.append(claim(0, claim=name, state="void", revision=len(facts)))
        book.do(facts[-1])
        book.check()
        check_claims(book, facts)
    for lot in book.all.lots():
        assert (lot.clawed, lot.clawed_spent, lot.pending, lot.pending_frozen, lot.frozen, lot.held) == (0,) * 6
        if lot.kind == "debt" and lot.origin is not None:
            assert (lot.posted, lot.repaid) == (0, {})
    given_and_used = {"lot_granted", "lot_expired", "lot_revived", "lot_voided", "charged", "reversed", "adjusted"}
    moved = sum(entry.posted for entry in book.entries if entry.lot and entry.kind in given_and_used)
    assert sum(book.amounts(account, "usd")[0] for account in ("acme", "acme/ana")) == moved


def end(book: Archive, placed: str, account: str) -> None:
    """Release a hold, or resolve it if it is past its deadline."""
    if not isinstance(book.ask(ReleaseHold(hold=placed, account=account)), list):
        book.ask(ResolveHold(hold=placed, account=account))


def carry_out(  # noqa: PLR0912 - one case for each step
    book: Archive,
    step: tuple[Any, ...],
    uses: list[ChargeLine],
    holds: list[tuple[str, str]],
    facts: list[ClaimPayment],
) -> None:
    """Do a step; it may be refused."""
    match step:
        case "buy", amount, ends:
            book.grant("acme", "usd", amount, reference=PAYMENT, days=1 if ends else None)
        case "bonus", amount:
            book.grant("acme", "usd", amount, kind="bonus", reference=PAYMENT)
        case "promo", account, amount:
            book.grant(account, "usd", amount, kind="promo", days=3)
        case "use", account, amount:
            uses.append(line(account, ("usd", amount)))
            book.do(uses[-1])
        case "hold", account, amount:
            holds.append((account, hold_id()))
            book.do(PlaceHold(hold=holds[-1][1], account=account, legs=(leg("usd", 0, amount),)))
        case "settle", amount if holds:
            account, placed = holds.pop()
            uses.append(line(account, ("usd", amount), hold=placed))
            book.do(uses[-1])
        case ("release",) if holds:
            account, placed = holds.pop(0)
            end(book, placed, account)
        case "move", account, amount:
            other = "acme" if account == "acme/ana" else "acme/ana"
            book.ask(Transfer(account=account, to_account=other, unit="usd", amount=amount))
        case "give back", number, amount if uses:
            use = uses[number % len(uses)]
            book.ask(
                ReverseCharge(account=use.account, source=use.source, event_id=use.event_id, amounts=(("usd", amount),))
            )
        case "void", number:
            lots = [lot for lot in book.all.lots() if lot.kind in {"purchase", "bonus"}]
            if lots:
                lot = lots[number % len(lots)]
                book.ask(VoidGrant(account=lot.account, lot=lot.id))
        case "adjust", account, amount:
            book.ask(Adjust(account=account, unit="usd", amount=amount, reason="a test", force=amount % 2 == 0))
        case ("wait",):
            book.wait(days=2)
        case "claim", name, state, amount:
            facts.append(claim(amount, claim=name, state=state, revision=len(facts)))
            book.do(facts[-1])
