"""The worked examples of the architecture, with its numbers, on the pure core."""

from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Final

import pytest

from services.ledger.domain.commands import (
    CatchUp,
    ChangePlan,
    ClaimPayment,
    ClaimReason,
    ClaimState,
    Command,
    LotScope,
    PlaceHold,
    ReleaseHold,
    ResolveHold,
    ReverseCharge,
    Rule,
    Scope,
    SetRule,
)
from services.ledger.domain.errors import InsufficientFunds
from tests.unit.ledger.book import Book, hold_id, leg, line

USD: Final = 10**9
A: Final = Scope("openai", "gpt-4o-mini")
B: Final = Scope("anthropic", "claude")


def funded(*amounts: int, unit: str = "usd") -> tuple[Book, list[str]]:
    """acme, with lots."""
    book = Book()
    book.open("acme", unit)
    return book, [book.grant("acme", unit, amount) for amount in amounts]


def held(book: Book, *legs: tuple[str, int], account: str = "acme", **more: object) -> str:
    """A hold, all or nothing."""
    hold = hold_id()
    wanted = tuple(leg(unit, amount) for unit, amount in legs)
    book.do(PlaceHold(hold=hold, account=account, legs=wanted, **more))  # type: ignore[arg-type]  # fields of a hold
    return hold


def charge(book: Book, amount: int, *, hold: str | None = None, final: bool = True, unit: str = "usd") -> str:
    """A charge now; its event."""
    made = line("acme", (unit, amount), hold=hold, at=book.now, final=final)
    book.do(made)
    return made.event_id


def plan(name: str, unit: str, amount: int, *, anchor: datetime, period: str = "month", **more: object) -> Rule:
    """A recurring grant of a plan."""
    return Rule(id=name, unit=unit, amount=amount, period=period, anchor=anchor, plan=name, **more)  # type: ignore[arg-type]  # fields of a rule


def test_example_1_a_tree_is_limited_where_a_wallet_is() -> None:
    book = Book()
    book.open("acme", "usd")
    book.open("acme/ana/key_1", "usd_cap")
    book.grant("acme", "usd", 100 * USD)
    monthly = Rule(id="cap", unit="usd_cap", amount=5 * USD, period="month", anchor=book.now)
    book.do(SetRule(account="acme/ana/key_1", rule=monthly))

    refusal = book.ask(PlaceHold(hold=hold_id(), account="acme/ana/key_1", legs=(leg("usd", 6 * USD),)))
    assert refusal == InsufficientFunds("acme/ana/key_1", "usd_cap", 6 * USD, 5 * USD)

    held(book, ("usd", 4 * USD), account="acme/ana/key_1")
    assert book.amounts("acme", "usd") == (100 * USD, 4 * USD)
    assert book.amounts("acme/ana/key_1", "usd_cap") == (5 * USD, 4 * USD)
    assert book.state.accounts["acme/ana"].wallets == {}


def test_example_2_a_part_is_held_if_that_is_enough() -> None:
    book, _ = funded(3)
    before = {name: dict(rows) for name, rows in book.tables.items()}
    refusal = book.ask(PlaceHold(hold=hold_id(), account="acme", legs=(leg("usd", 4, 10),)))
    assert refusal == InsufficientFunds("acme", "usd", 4, 3)
    assert book.tables == before
    book.do(PlaceHold(hold=hold_id(), account="acme", legs=(leg("usd", 1, 10),)))
    assert book.amounts("acme", "usd") == (3, 3)


def test_example_3_increments_add_up() -> None:
    book, _ = funded(20)
    hold = held(book, ("usd", 10))
    charge(book, 5, hold=hold, final=False)
    charge(book, 5, hold=hold, final=False)
    assert book.amounts("acme", "usd") == (10, 0)
    charge(book, 2, hold=hold)
    assert book.amounts("acme", "usd") == (8, 0)


def test_example_4_what_is_above_the_hold_is_taken_then_owed_then_repaid() -> None:
    book, _ = funded(11)
    hold = held(book, ("usd", 10))
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


def test_example_5_what_was_repaid_goes_back_to_the_lot_that_repaid_it() -> None:
    book, (lot_a, lot_b) = funded(10, 1)
    event = charge(book, 12)
    lot_c = book.grant("acme", "usd", 5)
    assert [book.lot(lot) for lot in (lot_a, lot_b, lot_c)] == [(0, 0), (0, 0), (4, 0)]
    book.do(ReverseCharge(account="acme", source="demo", event_id=event))
    assert [book.lot(lot) for lot in (lot_a, lot_b, lot_c)] == [(10, 0), (1, 0), (5, 0)]
    assert book.amounts("acme", "usd") == (16, 0)
    assert book.wallet("acme", "usd").owed == 0


def test_example_6_the_truth_replaces_the_estimate() -> None:
    book, (lot,) = funded(20)
    hold = held(book, ("usd", 10), lifetime_seconds=60, overdue="charge_estimate")
    book.wait(timedelta(seconds=61))
    book.do(ResolveHold(hold=hold, account="acme"))
    assert book.lot(lot) == (10, 0)
    charge(book, 7, hold=hold)
    assert book.lot(lot) == (13, 0)
    charge(book, 4, hold=hold)
    assert book.lot(lot) == (9, 0)


@pytest.mark.parametrize("is_swept", [True, False])
def test_example_7_an_earmarked_lot_pays_after_its_end(is_swept: bool) -> None:
    book = Book()
    book.open("acme", "usd")
    lot = book.grant("acme", "usd", 15, expires_at=book.now + timedelta(hours=1))
    hold = held(book, ("usd", 10), lifetime_seconds=86_400)
    book.wait(timedelta(hours=2))
    assert book.available("acme", "usd") == 0
    if is_swept:
        book.do(CatchUp(account="acme"))
        assert book.lot(lot) == (10, 10)
        assert book.available("acme", "usd") == 0
    charge(book, 10, hold=hold)
    assert book.lot(lot) == (0, 0)
    assert book.amounts("acme", "usd") == (0, 0)
    assert book.wallet("acme", "usd").owed == 0


def test_example_8_a_charge_belongs_to_the_period_its_hold_was_placed_in() -> None:
    book = Book()
    book.now = datetime(2027, 1, 1, tzinfo=UTC)
    book.open("acme", "usd_cap")
    monthly = Rule(id="cap", unit="usd_cap", amount=100, period="month", anchor=book.now)
    book.do(SetRule(account="acme", rule=monthly))
    charge(book, 50, unit="usd_cap")
    book.now = datetime(2027, 1, 31, 23, 59, tzinfo=UTC)
    hold = held(book, ("usd_cap", 10), lifetime_seconds=3600)
    book.now = datetime(2027, 2, 1, 0, 5, tzinfo=UTC)
    charge(book, 12, hold=hold, unit="usd_cap")
    january, february = sorted(book.wallet("acme", "usd_cap").burning(), key=lambda lot: lot.period or 0)
    charged = [entry.posted for entry in book.entries if entry.kind == "charged" and entry.lot == january.id]
    assert sum(charged) == -62
    assert (january.posted, january.expired) == (0, 38)
    assert (february.posted, february.held, february.available) == (100, 0, 100)
    assert book.wallet("acme", "usd_cap").overage == 0


def test_example_9_an_upgrade_with_an_open_hold() -> None:
    book = Book()
    book.open("acme", "tokens")
    book.do(ChangePlan(account="acme", plan="free", rules=(plan("free", "tokens", 1_000, anchor=book.now),)))
    (free,) = book.wallet("acme", "tokens").burning()
    hold = held(book, ("tokens", 500))
    book.do(ChangePlan(account="acme", plan="pro", rules=(plan("pro", "tokens", 100_000, anchor=book.now),)))
    voided = [entry.posted for entry in book.entries if entry.kind == "lot_voided" and entry.lot == free.id]
    assert voided == [-500]
    assert book.amounts("acme", "tokens") == (100_500, 500)
    moves = book.do(line("acme", ("tokens", 300), hold=hold, at=book.now))
    assert [move.posted for move in moves if move.kind == "lot_voided" and move.lot == free.id] == [-200]
    assert book.available("acme", "tokens") == 100_000


def test_example_10_what_was_counted_while_unlimited_is_never_owed() -> None:
    book = Book()
    book.open("acme", "tokens")
    begin = book.now
    unlimited = plan("max", "tokens", 0, anchor=begin, policy="unlimited")
    book.do(ChangePlan(account="acme", plan="max", rules=(unlimited,)))
    charge(book, 5_000_000, unit="tokens")
    wallet = book.wallet("acme", "tokens")
    assert (wallet.uncapped, wallet.overage, wallet.owed) == (5_000_000, 0, 0)
    limited = plan("free", "tokens", 1_000, anchor=begin, policy="hard")
    book.do(ChangePlan(account="acme", plan="free", rules=(limited,), at_period_end=True))
    assert book.wallet("acme", "tokens").policy == "unlimited"
    book.now = datetime(2026, 8, 1, 12, 1, tzinfo=UTC)
    book.do(CatchUp(account="acme"))
    wallet = book.wallet("acme", "tokens")
    assert (wallet.policy, wallet.posted, wallet.overage, wallet.owed) == ("hard", 1_000, 0, 0)
    assert book.available("acme", "tokens") == 1_000
    assert isinstance(
        book.ask(PlaceHold(hold=hold_id(), account="acme", legs=(leg("tokens", 1_001),))), InsufficientFunds
    )


def refunded(
    amount: int, state: ClaimState = "final", *, claim: str = "re_1", reason: ClaimReason = "refund"
) -> ClaimPayment:
    """A claim on the payment."""
    return ClaimPayment(
        account="acme", payment="pi_1", claim=claim, reason=reason, state=state, unit="usd", claimed=amount
    )


def bought(book: Book) -> None:
    """50 were paid for, 5 came with them."""
    book.grant("acme", "usd", 50, reference="pi_1")
    book.grant("acme", "usd", 5, kind="bonus", reference="pi_1")


def test_example_11_a_refund_takes_what_is_there_what_is_released_and_the_rest_is_owed() -> None:
    book = Book()
    book.open("acme", "usd")
    bought(book)
    charge(book, 25)
    hold = held(book, ("usd", 10))
    book.do(refunded(50))
    assert book.amounts("acme", "usd") == (-15, 10)
    assert book.wallet("acme", "usd").owed == 25
    book.do(ReleaseHold(hold=hold, account="acme"))
    assert book.amounts("acme", "usd") == (-25, 0)
    assert book.wallet("acme", "usd").owed == 25


# A hold is placed after there is something to hold, and ends after it was placed.
ORDERS: Final = [
    order
    for order in permutations(("buy", "spend", "hold", "release", "refund"))
    if order.index("buy") < order.index("hold") < order.index("release")
]


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_example_11_ends_the_same_in_every_order_of_arrival(order: tuple[str, ...]) -> None:
    book = Book()
    book.open("acme", "usd")
    hold = hold_id()
    for what in order:
        match what:
            case "buy":
                bought(book)
            case "spend":
                charge(book, 25)
            case "hold":
                book.ask(PlaceHold(hold=hold, account="acme", legs=(leg("usd", 10),)))
            case "release":
                book.ask(ReleaseHold(hold=hold, account="acme"))
            case _:
                book.do(refunded(50))
    assert book.amounts("acme", "usd") == (-25, 0)
    assert book.wallet("acme", "usd").owed == 25


@pytest.mark.parametrize("first", ["refund", "dispute"])
def test_example_11_a_partial_refund_and_a_lost_dispute_take_what_was_paid_and_no_more(first: str) -> None:
    book = Book()
    book.open("acme", "usd")
    bought(book)
    claims: list[Command] = [refunded(20), refunded(50, claim="dp_1", reason="dispute")]
    for each in claims if first == "refund" else reversed(claims):
        book.do(each)
    taken = [row for row in book.state.lots() if row.reference == "pi_1"]
    assert book.amounts("acme", "usd") == (0, 0)
    assert sum(lot.clawed for lot in taken) <= 55
    clawed = [entry.posted for entry in book.entries if entry.kind == "clawed_back" and entry.lot_kind == "purchase"]
    assert sum(clawed) == -50


def test_example_12_a_lot_pays_within_its_scope_and_gets_back_what_it_paid() -> None:
    book = Book()
    book.open("acme", "usd")
    promo = book.grant("acme", "usd", 5, kind="promo", scope=LotScope(providers=("openai",)))
    purchase = book.grant("acme", "usd", 20)
    lines = [line("acme", ("usd", amount), scope=scope) for amount, scope in ((3, A), (4, B), (4, A))]
    outcomes = book.bundle(lines)
    taken = [
        {move.lot: -move.posted for move in outcome if move.lot} for outcome in outcomes if isinstance(outcome, list)
    ]
    assert taken == [{promo: 3}, {purchase: 4}, {promo: 2, purchase: 2}]
    book.do(ReverseCharge(account="acme", source="demo", event_id=lines[0].event_id))
    assert book.lot(promo) == (3, 0)
    assert book.lot(purchase) == (14, 0)
