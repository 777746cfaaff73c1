"""Holds past their deadline: they end as they say themselves before anything that is about them or their wallets."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.domain.commands import (
    Command,
    ExtendHold,
    Overdue,
    PlaceHold,
    ReleaseHold,
    ResolveHold,
    Rule,
    SetRule,
)
from services.ledger.domain.errors import AccountDiffers, HoldExists, HoldExpired, InsufficientFunds
from services.ledger.projections import lot_of
from tests.unit.ledger.book import PARTITION, Book, hold_id, leg, line

MINUTES = timedelta(minutes=1)
POLICIES: tuple[Overdue, ...] = ("release", "charge_estimate")


def book_with_hold(amount: int = 10, *, overdue: Overdue = "release", **grant: Any) -> tuple[Book, str]:
    """Somebody with 15, and some of that held for fifteen minutes."""
    book = Book()
    book.open("acme", "usd")
    book.grant("acme", "usd", 15, **grant)
    return book, place(book, amount, overdue=overdue)


def place(book: Book, amount: int, *, overdue: Overdue = "release", unit: str = "usd") -> str:
    hold = hold_id()
    book.do(PlaceHold(hold=hold, account="acme", legs=(leg(unit, amount),), overdue=overdue))
    return hold


def status(book: Book, hold: str) -> str:
    return str(next(row[3] for key, row in book.tables["holds"].items() if key[1] == hold))


def kinds(book: Book, since: int) -> list[list[str]]:
    """What was entered, by transaction; but for what owners are told."""
    found: dict[str, list[str]] = {}
    for entry in book.entries[since:]:
        if not entry.account.startswith("@") and entry.kind != "balance_crossed":
            found.setdefault(entry.transaction, []).append(entry.kind)
    return list(found.values())


@pytest.mark.parametrize("overdue", POLICIES)
def test_what_would_end_or_prolong_an_overdue_hold_is_refused_without_a_trace(overdue: Overdue) -> None:
    book, hold = book_with_hold(overdue=overdue)
    book.wait(15 * MINUTES)
    before = (len(book.journal), dict(book.tables["lots"]), dict(book.tables["holds"]))
    commands: tuple[Command, ...] = (
        ReleaseHold(hold=hold, account="acme"),
        ExtendHold(hold=hold, account="acme", lifetime_seconds=60),
        PlaceHold(hold=hold, account="acme", legs=(leg("usd", 1),)),
    )
    for command in commands:
        assert book.ask(command) == HoldExpired(hold)
        assert book.listed([command, command])[0] == HoldExpired(hold)
    assert book.ask(ReleaseHold(hold=hold, account="acme/ana")) == AccountDiffers(hold, "acme/ana")
    assert (len(book.journal), dict(book.tables["lots"]), dict(book.tables["holds"])) == before
    assert status(book, hold) == "placed"
    book.do(ResolveHold(hold=hold, account="acme"))
    assert book.amounts("acme", "usd") == ((15, 0) if overdue == "release" else (5, 0))


@pytest.mark.parametrize("account", ["acme/ana", "other"])
@pytest.mark.parametrize("overdue", POLICIES)
def test_another_account_finds_an_overdue_hold_expired_swept_or_not(overdue: Overdue, account: str) -> None:
    book, hold = book_with_hold(overdue=overdue)
    book.open("other", "usd")
    other = PlaceHold(hold=hold, account=account, legs=(leg("usd", 1),))
    assert book.ask(other) == HoldExists(hold)
    book.wait(timedelta(hours=1))
    assert book.ask(other) == HoldExpired(hold)
    assert status(book, hold) == "placed"
    book.do(ResolveHold(hold=hold, account="acme"))
    assert book.ask(other) == HoldExpired(hold)


def test_a_hold_is_open_until_its_deadline_and_not_at_it() -> None:
    for early, is_open in ((timedelta(milliseconds=2), True), (timedelta(), False)):
        book, hold = book_with_hold()
        deadline = book.state.holds[hold].expires_at
        assert deadline is not None
        book.now = deadline - book.tick - early
        assert isinstance(book.ask(ReleaseHold(hold=hold, account="acme")), list) == is_open


@pytest.mark.parametrize("final", [False, True])
def test_a_charge_after_the_deadline_is_a_late_one_of_a_hold_that_ended_then(final: bool) -> None:
    book, hold = book_with_hold(expires_at=datetime(2026, 7, 1, 12, 10, tzinfo=UTC))
    book.wait(20 * MINUTES)
    since = len(book.entries)
    book.do(line("acme", ("usd", 12), hold=hold, at=book.now, final=final))
    # The available 5 ended at 12:10, the held 10 at the hold's deadline; of those it may still use.
    assert kinds(book, since) == [["lot_expired"], ["hold_expired", "lot_expired"], ["lot_revived", "charged"]]
    ended = next(entry for entry in book.entries if entry.kind == "hold_expired")
    assert ended.occurred_at == next(iter(book.tables["holds"].values()))[4]
    assert status(book, hold) == "expired"
    assert book.amounts("acme", "usd") == (0, 0)
    book.do(line("acme", ("usd", 3), hold=hold, at=book.now))
    assert book.amounts("acme", "usd") == (0, 0)
    book.do(line("acme", ("usd", 1), hold=hold, at=book.now))
    assert book.amounts("acme", "usd") == (-1, 0)


def test_an_overdue_estimate_is_charged_then_reversed_by_the_first_late_charge() -> None:
    """Example 6, unswept: 10 reversed and 7 charged; another line of 4: 11 in all."""
    book, hold = book_with_hold(overdue="charge_estimate")
    book.wait(20 * MINUTES)
    since = len(book.entries)
    book.do(line("acme", ("usd", 7), hold=hold, at=book.now))
    assert kinds(book, since) == [["hold_estimated"], ["estimate_reversed", "charged"]]
    assert (book.amounts("acme", "usd"), status(book, hold)) == ((8, 0), "settled")
    book.do(line("acme", ("usd", 4), hold=hold, at=book.now))
    assert book.amounts("acme", "usd") == (4, 0)


@pytest.mark.parametrize("overdue", POLICIES)
def test_a_dry_run_and_a_list_that_is_refused_leave_an_overdue_hold_as_it_is(overdue: Overdue) -> None:
    book, hold = book_with_hold(overdue=overdue)
    book.wait(20 * MINUTES)
    before = (len(book.journal), dict(book.tables["lots"]), dict(book.tables["holds"]))
    late = line("acme", ("usd", 7), hold=hold, at=book.now)
    assert isinstance(book.ask(late, dry_run=True), list)
    outcomes = book.listed([late, ReleaseHold(hold=hold, account="acme")])
    assert [isinstance(outcome, list) for outcome in outcomes] == [True, False]
    assert (len(book.journal), dict(book.tables["lots"]), dict(book.tables["holds"])) == before
    assert book.amounts("acme", "usd") == (15, 10)


@pytest.mark.parametrize("overdue", POLICIES)
def test_a_bundle_finds_its_overdue_holds_ended(overdue: Overdue) -> None:
    book, hold = book_with_hold(4, overdue=overdue)
    other = place(book, 3, overdue=overdue)
    book.wait(20 * MINUTES)
    since = len(book.entries)
    lines = [line("acme", ("usd", 5), hold=hold, at=book.now), line("acme", ("usd", 1), hold=other, at=book.now)]
    book.bundle(lines)
    ended = [each for each in kinds(book, since) if "charged" not in each]
    assert ended == [["hold_expired"] if overdue == "release" else ["hold_estimated"]] * 2
    assert book.amounts("acme", "usd") == (9, 0)


def test_what_an_overdue_hold_releases_is_rolled_over_as_if_it_had_ended_in_time() -> None:
    for swept in (True, False):
        book = Book()
        book.now = datetime(2026, 7, 31, 23, 30, tzinfo=UTC)
        book.open("acme", "tokens")
        anchor = datetime(2026, 7, 1, tzinfo=UTC)
        rule = Rule(id="r", unit="tokens", amount=10, period="month", anchor=anchor, rollover_max=8)
        book.do(SetRule(account="acme", rule=rule))
        hold = place(book, 6, unit="tokens")
        if swept:
            book.now = datetime(2026, 7, 31, 23, 55, tzinfo=UTC)
            book.do(ResolveHold(hold=hold, account="acme"))
        book.now = datetime(2026, 8, 1, 0, 5, tzinfo=UTC)
        book.do(line("acme", ("tokens", 1), hold=hold, at=book.now))
        (august,) = [lot for lot in book.wallet("acme", "tokens").burning() if lot.period == 1]
        assert august.granted == 18


def tree_with_hold(*, whole: bool = False, overdue: Overdue = "release", amount: int = 10) -> tuple[Book, str]:
    """Somebody holds of all that their organization has, and is late."""
    book = Book(whole=whole)
    for account in ("acme", "acme/ana", "acme/bob"):
        book.open(account, *(("usd",) if account == "acme" else ()))
    book.grant("acme", "usd", 10)
    hold = hold_id()
    book.do(PlaceHold(hold=hold, account="acme/ana", legs=(leg("usd", amount),), overdue=overdue))
    book.wait(15 * MINUTES)
    return book, hold


def hold_all(account: str, amount: int = 10) -> PlaceHold:
    return PlaceHold(hold=hold_id(), account=account, legs=(leg("usd", amount),))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("account", ["acme", "acme/ana", "acme/bob"])
def test_what_an_overdue_hold_held_is_there_for_others_at_once(account: str, whole: bool) -> None:
    book, hold = tree_with_hold(whole=whole)
    book.restart()
    since = len(book.entries)
    book.do(hold_all(account))
    assert kinds(book, since) == [["hold_expired"], ["hold_placed"]]
    ended = next(entry for entry in book.entries[since:] if entry.kind == "hold_expired")
    assert (ended.hold, ended.occurred_at) == (hold, book.tables["holds"][PARTITION, hold][4])
    assert (book.amounts("acme", "usd"), status(book, hold)) == ((10, 10), "expired")
    assert book.replayed() == book.tables


def test_what_an_overdue_hold_charges_is_not_there_for_others() -> None:
    book, hold = tree_with_hold(overdue="charge_estimate", amount=4)
    before = (len(book.journal), dict(book.tables["lots"]), dict(book.tables["holds"]))
    for _ in range(2):
        assert book.ask(hold_all("acme/bob", 7)) == InsufficientFunds("acme", "usd", 7, 6)
    assert isinstance(book.ask(hold_all("acme/bob", 6), dry_run=True), list)
    assert (len(book.journal), dict(book.tables["lots"]), dict(book.tables["holds"])) == before
    book.bundle([line("acme/bob", ("usd", 7), at=book.now)])
    assert (book.amounts("acme", "usd"), status(book, hold)) == ((-1, 0), "estimated")


def test_overdue_holds_end_in_the_order_of_their_deadlines_whoever_placed_them() -> None:
    book = Book()
    for account in ("acme", "acme/ana", "acme/bob"):
        book.open(account, *(("usd",) if account == "acme" else ()))
    book.grant("acme", "usd", 10)
    lifetimes = (600, 400, 500)
    holds = [hold_all(("acme/ana", "acme/bob", "acme")[place], 3) for place in range(3)]
    for place, seconds in enumerate(lifetimes):
        book.do(replace(holds[place], lifetime_seconds=seconds))
    book.wait(15 * MINUTES)
    book.do(line("acme", ("usd", 10), at=book.now))
    ended = [entry.hold for entry in book.entries if entry.kind == "hold_expired"]
    assert ended == [holds[1].hold, holds[2].hold, holds[0].hold]


def test_however_many_holds_are_overdue_what_they_held_is_there() -> None:
    book = Book()
    book.open("acme", "usd")
    book.grant("acme", "usd", 1_000)
    for _ in range(1_000):
        book.do(hold_all("acme", 1))
    book.wait(timedelta(hours=1))
    assert book.ask(hold_all("acme", 1_001)) == InsufficientFunds("acme", "usd", 1_001, 1_000)
    book.do(hold_all("acme", 1_000))
    assert book.amounts("acme", "usd")[1] == 1_000


held = st.integers(0, 20)
steps = st.lists(
    st.tuples(st.sampled_from(("charge", "part", "debit", "release", "extend", "list", "bundle")), held), max_size=5
)


@given(steps, held, st.sampled_from(POLICIES), st.sampled_from((None, 10, 25, 35)), st.integers(0, 20))
def test_it_is_all_one_whether_a_hold_was_swept_in_time(
    asked: list[tuple[str, int]], amount: int, overdue: Overdue, ends: int | None, more: int
) -> None:
    """The same answers and amounts, whoever comes first: the sweeper, at the deadline, or a command after it."""
    seen = []
    for swept in (True, False):
        book = Book()
        book.open("acme", "usd", policy="soft")
        begun = book.now
        book.grant("acme", "usd", 15, expires_at=None if ends is None else begun + ends * MINUTES)
        book.grant("acme", "usd", 1 + more, kind="promo")
        hold = place(book, amount, overdue=overdue)
        if swept:
            book.now = begun + 16 * MINUTES
            book.do(ResolveHold(hold=hold, account="acme"))
        book.now = begun + 30 * MINUTES
        answers = [answered(book, *each, hold=hold) for each in asked]
        book.ask(ResolveHold(hold=hold, account="acme"))
        book.catch_up()
        stored = sorted(map(lot_of, book.tables["lots"].values()), key=lambda lot: lot.age)
        lots = [(lot.kind, lot.posted, lot.held, lot.expired) for lot in stored]
        wallet = book.wallet("acme", "usd")
        seen.append((answers, lots, wallet.posted, wallet.held, wallet.owed, status(book, hold)))
        assert book.replayed() == book.tables
    assert seen[0] == seen[1]


def answered(book: Book, how: str, amount: int, *, hold: str) -> list[str]:
    """What became of something asked of a hold."""
    late = line("acme", ("usd", amount), hold=hold, at=book.now, final=how != "part", required=how == "debit")
    match how:
        case "release":
            outcomes = [book.ask(ReleaseHold(hold=hold, account="acme"))]
        case "extend":
            outcomes = [book.ask(ExtendHold(hold=hold, account="acme", lifetime_seconds=60))]
        case "list":
            outcomes = book.listed([late, line("acme", ("usd", 1), at=book.now, required=True)])
        case "bundle":
            outcomes = book.bundle([late, line("acme", ("usd", 1), at=book.now)])
        case _:
            outcomes = [book.ask(late)]
    return ["done" if isinstance(outcome, list) else outcome.code for outcome in outcomes]


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("overdue", POLICIES)
def test_what_comes_of_a_hold_is_the_same_in_whatever_order_it_was_read(overdue: Overdue, is_read: bool) -> None:
    book = Book()
    book.open("acme", "usd")
    book.grant("acme", "usd", 20, kind="purchase")
    book.grant("acme", "usd", 4, kind="plan", priority=50)
    hold = place(book, 24, overdue=overdue)
    book.do(line("acme", ("usd", 1), at=book.now))
    assert [found.kind for _, found in book.state.earmarked(book.state.holds[hold])] == ["plan", "purchase"]
    if is_read:
        earmarks = book.state.holds[hold].earmarks
        for key in reversed(list(earmarks)):
            earmarks[key] = earmarks.pop(key)
    book.wait(15 * MINUTES)
    since = len(book.entries)
    book.do(ResolveHold(hold=hold, account="acme"))
    book.do(line("acme", ("usd", 1), hold=hold, at=book.now))
    ended = [entry.lot_kind for entry in book.entries[since:] if entry.kind in {"hold_expired", "hold_estimated"}]
    assert ended[:2] == ["plan", "purchase"]
    repaid = [entry.lot_kind for entry in book.entries[since:] if entry.kind == "debt_repaid"]
    assert repaid == (["plan", "debt"] if overdue == "charge_estimate" else [])
