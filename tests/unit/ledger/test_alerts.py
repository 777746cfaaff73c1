"""Levels that owners are told of: each crossing once, and again only after recovery."""

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.ledger.domain.commands import ChangePlan, SetRule, SetWallet, Threshold, WalletTerms
from services.ledger.domain.entries import BalanceCrossed
from tests.unit.ledger.book import Book
from tests.unit.ledger.test_due import ACCOUNT, BEGIN, FEBRUARY, MARCH, Clockwork, ledger, monthly, only_lot

TEN = Threshold(amount=10)
HALF = Threshold(percent=50)


def alarmed(*thresholds: Threshold, unit: str = "usd") -> Clockwork:
    clockwork = Clockwork(unit)
    clockwork.do(SetWallet(account=ACCOUNT, terms=WalletTerms(unit, thresholds=thresholds)))
    return clockwork


def crossings(clockwork: Clockwork) -> list[tuple[Threshold | None, bool, int]]:
    """What was told, in order: the level, whether the wallet is low, and what was available."""
    return [
        (entry.details.threshold, entry.details.is_low, entry.details.available)
        for entry in clockwork.entries
        if isinstance(entry.details, BalanceCrossed)
    ]


def test_each_level_is_told_once_on_the_way_down_and_once_on_the_way_up() -> None:
    clockwork = alarmed(TEN, HALF)
    lot = clockwork.grant("usd", 100)
    for amount in (49, 1, 1, 39, 5, 5):
        clockwork.use("usd", lot, amount)
    assert crossings(clockwork) == [(HALF, True, 50), (TEN, True, 10), (None, True, 0)]
    clockwork.grant("usd", 6)
    assert crossings(clockwork)[3:] == [(None, False, 6), (HALF, False, 6)], "the half is counted of what is there now"
    clockwork.grant("usd", 60)
    assert crossings(clockwork)[5:] == [(TEN, False, 66)]


def test_several_levels_at_once_are_told_from_the_highest() -> None:
    clockwork = alarmed(TEN, HALF)
    clockwork.use("usd", clockwork.grant("usd", 100), 100)
    assert [level for level, _, _ in crossings(clockwork)] == [HALF, TEN, None]
    told = clockwork.transactions[-1]
    assert [entry.kind for entry in told] == ["charged", "charged", *["balance_crossed"] * 3]
    assert all(entry.unit == "usd" and not (entry.posted or entry.held or entry.frozen) for entry in told[2:])


def test_what_is_held_or_frozen_or_owed_is_not_available() -> None:
    clockwork = alarmed()
    lot = clockwork.grant("usd", 100)
    clockwork.hold("usd", lot, 90, hold="h")
    clockwork.freeze("usd", lot, 10)
    assert crossings(clockwork) == [(None, True, 0)]
    clockwork.release("usd", lot, 90, hold="h")
    assert crossings(clockwork)[1:] == [(None, False, 90)]
    clockwork.owe("usd", 95)
    assert crossings(clockwork)[2:] == [(None, True, -5)]


def test_a_wallet_that_never_had_anything_is_not_exhausted() -> None:
    clockwork = alarmed(TEN)
    clockwork.owe("usd", 5)
    assert crossings(clockwork) == []


def test_an_unlimited_wallet_tells_nothing() -> None:
    clockwork = Clockwork("usd")
    clockwork.do(SetWallet(account=ACCOUNT, terms=WalletTerms("usd", policy="unlimited", thresholds=(TEN,))))
    clockwork.use("usd", clockwork.grant("usd", 100), 100)
    assert crossings(clockwork) == []


def test_a_new_level_is_told_when_it_is_set_and_one_that_is_gone_is_forgotten() -> None:
    clockwork = alarmed()
    clockwork.use("usd", clockwork.grant("usd", 100), 95)
    clockwork.do(SetWallet(account=ACCOUNT, terms=WalletTerms("usd", thresholds=(TEN,))))
    assert crossings(clockwork) == [(TEN, True, 5)]
    clockwork.do(SetWallet(account=ACCOUNT, terms=WalletTerms("usd")))
    clockwork.grant("usd", 100)
    assert crossings(clockwork) == [(TEN, True, 5)]


def test_an_expiry_may_exhaust() -> None:
    clockwork = alarmed()
    clockwork.grant("usd", 5, expires_at=BEGIN + timedelta(hours=1))
    clockwork.catch_up(BEGIN + timedelta(hours=2))
    assert crossings(clockwork) == [(None, True, 0)]


def test_a_renewal_is_no_crossing_however_many_periods_were_missed() -> None:
    clockwork = ledger(monthly("tokens", 100))
    clockwork.catch_up(MARCH + timedelta(days=100))
    assert crossings(clockwork) == []


def test_a_renewal_recovers() -> None:
    clockwork = ledger(monthly("tokens", 100))
    clockwork.use("tokens", only_lot(clockwork, "tokens").id, 100)
    clockwork.catch_up(FEBRUARY)
    assert crossings(clockwork) == [(None, True, 0), (None, False, 100)]


def test_a_lot_granted_for_later_recovers_when_it_begins_and_once() -> None:
    book = Book()
    book.open("acme", "usd")
    book.grant("acme", "usd", 5, expires_at=book.now + timedelta(hours=1))
    book.wait(timedelta(hours=1))
    book.catch_up()
    book.grant("acme", "usd", 20, effective_at=book.now + timedelta(hours=1))
    book.catch_up()
    assert _told(book) == [(True, 0)]
    book.wait(timedelta(hours=1))
    for _ in range(2):
        book.catch_up()
        assert _told(book) == [(True, 0), (False, 20)]
    book.restart()
    book.catch_up()
    assert _told(book) == [(True, 0), (False, 20)]
    assert book.replayed() == book.tables
    assert not book.breaches()


def _told(book: Book) -> list[tuple[bool, int]]:
    found = (entry.details for entry in book.entries)
    return [(each.is_low, each.available) for each in found if isinstance(each, BalanceCrossed)]


def test_a_change_of_plan_is_no_crossing() -> None:
    clockwork = Clockwork("tokens")
    for plan, amount in (("free", 1_000), ("pro", 100_000)):
        rule = monthly("tokens", amount, id=plan)
        clockwork.do(ChangePlan(account=ACCOUNT, plan=plan, rules=(rule,)))
    assert clockwork.available("tokens") == 100_000
    assert crossings(clockwork) == []


_LEVELS = st.builds(lambda amount: Threshold(amount=amount), st.integers(0, 60)) | st.builds(
    lambda percent: Threshold(percent=percent), st.integers(1, 100)
)


@given(
    st.lists(_LEVELS, max_size=4, unique=True),
    st.lists(st.tuples(st.sampled_from(["grant", "use", "owe", "wait"]), st.integers(1, 80)), max_size=25),
)
def test_of_each_level_low_and_recovered_alternate_and_the_last_word_is_true(
    levels: list[Threshold], steps: list[tuple[str, int]]
) -> None:
    clockwork = alarmed(*levels)
    clockwork.do(SetRule(account=ACCOUNT, rule=monthly("usd", 50, period="week")))
    for what, amount in steps:
        lots = [lot for lot in clockwork.wallet("usd").burning() if lot.available and lot.is_valid(clockwork.now)]
        if what == "grant":
            clockwork.grant("usd", amount)
        elif what == "use" and lots:
            clockwork.use("usd", lots[0].id, min(amount, lots[0].available))
        elif what == "owe":
            clockwork.owe("usd", amount)
        elif what == "wait":
            clockwork.catch_up(clockwork.now + timedelta(hours=amount * 6))
        wallet = clockwork.wallet("usd")
        for level in (None, *levels):
            told = [is_low for each, is_low, _ in crossings(clockwork) if each == level]
            assert told == [number % 2 == 0 for number in range(len(told))]
            floor = 0 if level is None else level.amount
            if floor is None and level is not None and level.percent is not None:
                floor = level.percent * max(wallet.full, 0) // 100
            assert floor is not None
            is_low = wallet.available_anywhere(clockwork.now) <= floor
            was_told = bool(told) and told[-1]
            assert was_told == is_low or (is_low and wallet.full <= 0)
            assert (level in wallet.low) == was_told
