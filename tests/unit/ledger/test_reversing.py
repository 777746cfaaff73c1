"""Laws of reversal: what a charge took goes back to the very lots, never more, and never twice."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.domain.commands import (
    RETURN_GRACE,
    ChargeLine,
    LotScope,
    PlaceHold,
    ReverseCharge,
    VoidGrant,
)
from services.ledger.domain.entries import Move
from services.ledger.domain.errors import InvalidAmount, MoreThanCharged, UnknownCharge, UnknownUnit
from services.ledger.domain.state import PartitionState, Trial
from tests.unit.ledger.archive import Archive
from tests.unit.ledger.book import hold_id, leg, line


def reverse(use: ChargeLine, *amounts: tuple[str, int]) -> ReverseCharge:
    """Give back amounts of a line, or all that is left."""
    return ReverseCharge(
        account=use.account, source=use.source, event_id=use.event_id, amounts=amounts or None, reason="a test"
    )


def of_lots(moves: list[Move]) -> list[tuple[str, str | None, int]]:
    """The moves of lots, by kind."""
    return [(move.kind, move.lot_kind, move.posted) for move in moves if move.lot is not None]


def test_what_was_taken_last_is_given_back_first() -> None:
    book = Archive()
    book.open("acme", "usd")
    first = book.grant("acme", "usd", 10, kind="promo")
    second = book.grant("acme", "usd", 10)
    use = line("acme", ("usd", 25))
    book.do(use)
    assert of_lots(book.do(reverse(use, ("usd", 8)))) == [("reversed", "debt", 5), ("reversed", "purchase", 3)]
    assert of_lots(book.do(reverse(use, ("usd", 9)))) == [("reversed", "purchase", 7), ("reversed", "promo", 2)]
    assert book.lots() == {first: (2, 0, 0), second: (10, 0, 0)}


def test_what_is_still_owed_is_owed_no_longer_before_what_was_repaid_goes_back() -> None:
    book = Archive()
    book.open("acme", "usd")
    use = line("acme", ("usd", 5))
    book.do(use)
    lot = book.grant("acme", "usd", 2)
    assert of_lots(book.do(reverse(use, ("usd", 3)))) == [("reversed", "debt", 3)]
    assert (book.lots(), book.debt("acme")) == ({}, 0)
    book.do(reverse(use, ("usd", 1)))
    assert (book.lots(), book.debt("acme")) == ({lot: (1, 0, 0)}, 0)
    book.check()


def test_what_repaid_a_debt_last_comes_back_first() -> None:
    book = Archive()
    book.open("acme", "usd")
    use = line("acme", ("usd", 10))
    book.do(use)
    first, second = book.grant("acme", "usd", 4), book.grant("acme", "usd", 6)
    assert (book.lots(), book.debt("acme")) == ({}, 0)
    book.do(reverse(use, ("usd", 5)))
    assert book.lots() == {second: (5, 0, 0)}
    book.do(reverse(use, ("usd", 4)))
    assert book.lots() == {first: (3, 0, 0), second: (6, 0, 0)}
    book.check()


def test_what_is_noted_to_undo_a_decision_does_not_grow_with_the_lots_there(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[int] = []
    undo = PartitionState.undo

    def noting(state: PartitionState, trial: Trial) -> None:
        noted.append(len(trial.before))
        undo(state, trial)

    monkeypatch.setattr(PartitionState, "undo", noting)
    for lots in (1, 60):
        book = Archive()
        book.open("acme", "usd")
        for _ in range(lots):
            book.grant("acme", "usd", 10)
        use = line("acme", ("usd", 5))
        book.do(use)
        book.do(reverse(use))
    assert noted[0] == noted[1] > 0


def test_money_is_given_back_with_what_counted_it() -> None:
    book = Archive()
    book.open("acme", "usd", "usd_cap")
    book.open("acme/ana", "usd_cap")
    book.grant("acme", "usd", 20)
    book.grant("acme", "usd_cap", 15, kind="plan")
    book.grant("acme/ana", "usd_cap", 5, kind="plan")
    before = book.lots()
    use = line("acme/ana", ("usd", 12))
    book.do(use)
    assert book.wallet("acme/ana", "usd_cap").overage == 7
    book.do(reverse(use, ("usd", 9)))
    assert book.wallet("acme/ana", "usd_cap").overage == 0
    assert [book.amounts(*each)[0] for each in (("acme", "usd"), ("acme", "usd_cap"), ("acme/ana", "usd_cap"))] == [
        17,
        12,
        2,
    ]
    book.do(reverse(use))
    assert book.lots() == before
    book.check()


def test_money_for_a_lot_that_has_ended_is_a_lot_like_it_for_some_days() -> None:
    book = Archive()
    book.open("acme", "usd")
    scope = LotScope(providers=("openai",))
    ended = book.grant("acme", "usd", 10, kind="promo", days=1, scope=scope, priority=7)
    use = line("acme", ("usd", 6))
    book.do(use)
    book.wait(days=2)
    book.do(reverse(use, ("usd", 4)))
    assert book.lot(ended).posted == 0
    (back,) = [lot for lot in book.all.lots() if lot.origin == ended]
    assert (back.kind, back.posted, back.scope, back.priority) == ("promo", 4, scope, 7)
    assert back.expires_at == book.now + RETURN_GRACE
    assert book.lot(ended).expired == 4
    book.wait(days=8)
    book.grant("acme", "usd", 1)
    assert book.amounts("acme", "usd") == (1, 0)
    book.check()


def test_a_cap_is_given_back_to_its_period_only() -> None:
    book = Archive()
    book.open("acme", "tokens")
    book.grant("acme", "tokens", 10, kind="plan", days=1)
    use = line("acme", ("tokens", 6))
    book.do(use)
    book.wait(days=2)
    assert of_lots(book.do(reverse(use))) == [("reversed", "plan", 6), ("lot_expired", "plan", -6)]
    assert book.amounts("acme", "tokens") == (0, 0)
    assert len(list(book.all.lots())) == 1


def test_what_goes_back_to_a_void_lot_is_voided() -> None:
    book = Archive()
    book.open("acme", "usd")
    lot = book.grant("acme", "usd", 10)
    use = line("acme", ("usd", 6))
    book.do(use)
    book.do(VoidGrant(account="acme", lot=lot))
    assert of_lots(book.do(reverse(use))) == [("reversed", "purchase", 6), ("lot_voided", "purchase", -6)]
    assert (book.amounts("acme", "usd"), book.lot(lot).voided) == ((0, 0), 10)


def test_what_is_given_back_repays_what_else_is_owed() -> None:
    book = Archive()
    book.open("acme", "usd")
    lot = book.grant("acme", "usd", 10)
    first, second = line("acme", ("usd", 10)), line("acme", ("usd", 4))
    book.do(first)
    book.do(second)
    assert book.debt("acme") == 4
    book.do(reverse(first))
    assert (book.lot(lot).posted, book.debt("acme")) == (6, 0)
    book.do(reverse(second))
    assert book.lots() == {lot: (10, 0, 0)}


def test_what_an_unlimited_wallet_counted_is_counted_no_longer() -> None:
    book = Archive()
    book.open("acme", "tokens", policy="unlimited")
    use = line("acme", ("tokens", 6))
    book.do(use)
    assert book.wallet("acme", "tokens").uncapped == 6
    book.do(reverse(use, ("tokens", 4)))
    assert book.wallet("acme", "tokens").uncapped == 2
    book.check()


def test_no_more_is_given_back_than_was_taken() -> None:
    book = Archive()
    book.open("acme", "usd", "usd_cap")
    book.grant("acme", "usd", 10)
    use = line("acme", ("usd", 6))
    book.do(use)
    book.do(reverse(use, ("usd", 4)))
    entries = len(book.entries)
    assert book.ask(reverse(use, ("usd", 3))) == MoreThanCharged("usd", 3, 2)
    assert book.ask(reverse(use, ("points", 1))) == MoreThanCharged("points", 1, 0)
    assert book.ask(reverse(use, ("usd_cap", 3))) == MoreThanCharged("usd_cap", 3, 0)
    assert book.ask(reverse(use, ("euros", 1))) == UnknownUnit("euros")
    assert isinstance(book.ask(reverse(use, ("usd", -1))), InvalidAmount)
    assert book.ask(reverse(line("acme", ("usd", 6)))) == UnknownCharge("demo", f"event-{int(use.event_id[6:]) + 1}", 0)
    other = ReverseCharge(account="acme/ana", source=use.source, event_id=use.event_id)
    assert book.ask(other) == UnknownCharge(use.source, use.event_id, 0)
    assert len(book.entries) == entries


def test_a_line_that_took_nothing_gives_nothing_back() -> None:
    book = Archive()
    book.open("acme", "usd")
    use = line("acme", ("usd", 0), ("tokens", 7))
    book.do(use)
    assert book.do(reverse(use)) == []


amounts = st.integers(1, 30)
kept = st.lists(amounts, min_size=1, max_size=4)


@given(
    kept, st.lists(st.tuples(amounts, st.booleans()), min_size=1, max_size=5), st.lists(amounts, max_size=2), st.data()
)
def test_all_that_is_given_back_leaves_the_lots_as_they_were_granted(
    granted: list[int], used: list[tuple[int, bool]], later: list[int], data: st.DataObject
) -> None:
    """Whole or in parts, in whatever order, also of what was held, owed and repaid."""
    book = Archive()
    book.open("acme", "usd", "usd_cap")
    lots = {book.grant("acme", "usd", amount): amount for amount in granted}
    lots[book.grant("acme", "usd_cap", 40, kind="plan")] = 40
    uses: list[tuple[ChargeLine, int]] = []
    for amount, is_held in used:
        placed = hold_id() if is_held else None
        if placed is not None:
            book.do(PlaceHold(hold=placed, account="acme", legs=(leg("usd", 0, amount),)))
        uses.append((line("acme", ("usd", amount), hold=placed), amount))
        book.do(uses[-1][0])
    lots |= {book.grant("acme", "usd", amount): amount for amount in later}
    while uses:
        use, left = uses.pop(data.draw(st.integers(0, len(uses) - 1)))
        part = data.draw(st.integers(1, left))
        assert isinstance(book.ask(reverse(use, ("usd", left + 1))), MoreThanCharged)
        book.do(reverse(use, ("usd", part)) if part < left else reverse(use))
        if part < left:
            uses.append((use, left - part))
        book.check()
    assert book.lots() == {lot: (amount, 0, 0) for lot, amount in lots.items()}


@given(kept, kept, st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_what_is_given_back_is_what_was_taken_also_of_what_ends_meanwhile(
    granted: list[int], used: list[int], days: list[int]
) -> None:
    book = Archive()
    book.open("acme", "usd", "tokens")
    for number, amount in enumerate(granted):
        book.grant("acme", "usd", amount, days=1 + number)
        book.grant("acme", "tokens", amount, kind="plan", days=1 + number)
    uses = [line("acme", ("usd", amount), ("tokens", amount)) for amount in used]
    for use in uses:
        book.do(use)
    for use, wait in zip(uses, days * len(uses), strict=False):
        book.now += timedelta(days=wait)
        book.do(reverse(use))
        book.check()
    for unit in ("usd", "tokens"):
        of_unit = [entry for entry in book.entries if entry.unit == unit and entry.lot is not None]
        back = sum(entry.posted for entry in of_unit if entry.kind == "reversed")
        assert back == -sum(entry.posted for entry in of_unit if entry.kind == "charged") == sum(used)
        expired = -sum(entry.posted for entry in of_unit if entry.kind in {"lot_expired", "lot_revived"})
        assert book.amounts("acme", unit)[0] == sum(granted) - expired
    assert book.debt("acme") == book.wallet("acme", "tokens").overage == 0
