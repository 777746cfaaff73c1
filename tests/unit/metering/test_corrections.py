"""Corrections: the ledger has of every use what its current version costs, whatever was corrected how often."""

from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from contracts.pricing import Counter, OwnPrice, PriceKind, PriceVersion, Rated, Tier
from services.metering.domain.corrections import (
    Amounts,
    History,
    Posting,
    Version,
    moved_back,
    moves,
    post,
    put_in,
    take_out,
)
from services.metering.domain.prices import CounterKey, PriceBook, rate_in_order, steps_of
from services.metering.domain.usage import Usage
from tests.unit.metering.building import NOON, USD, usage

UNITS = ("usd", "tokens", "calls")
amounts = st.dictionaries(st.sampled_from(UNITS), st.integers(0, 50), max_size=3)
# None: the use waits, or is void.
targets = st.lists(st.tuples(st.sampled_from(["version", "waits", "void"]), amounts), max_size=12)


@dataclass
class Ledger:
    """What the ledger does with what it is told: it charges lines once, and gives back what was charged."""

    lines: dict[int, dict[str, int]] = field(default_factory=dict)

    def take(self, posting: Posting, revision: int) -> None:
        for each in posting.given_back:
            line = self.lines[each.revision]
            for unit, steps in each.amounts.items():
                assert 0 < steps <= line[unit], "more is given back than was charged"
                line[unit] -= steps
        if posting.charged:
            assert revision not in self.lines, "a line is charged twice"
            assert all(steps > 0 for steps in posting.charged.values())
            self.lines[revision] = dict(posting.charged)

    def has(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for line in self.lines.values():
            for unit, steps in line.items():
                found[unit] = found.get(unit, 0) + steps
        return above_zero(found)


def above_zero(found: Amounts) -> dict[str, int]:
    return {unit: steps for unit, steps in found.items() if steps}


def corrected(history: History, ledger: Ledger, kind: str, wanted: Amounts) -> History:
    """One correction, as the log keeps it."""
    target = wanted if kind == "version" else {}
    posting = post(history, target)
    ledger.take(posting, len(history.versions))
    before = {unit: history.amounts.get(unit, 0) for unit in UNITS}
    assert {unit: target.get(unit, 0) - before[unit] for unit in UNITS} == {
        unit: posting.difference.get(unit, 0) for unit in UNITS
    }
    if kind == "void":
        return History(history.versions, is_void=True)
    made = Version(
        revision=len(history.versions),
        amounts=wanted if kind == "version" else None,
        charged=posting.charged,
        given_back=posting.noted,
    )
    return History((*history.versions, made))


@given(amounts, targets)
def test_the_ledger_has_of_a_use_what_its_current_version_costs(
    first: Amounts, corrections: list[tuple[str, Amounts]]
) -> None:
    ledger = Ledger({0: dict(first)})
    history = History((Version(0, first, charged=first),))
    for kind, wanted in corrections:
        if kind == "void" and history.is_void:
            continue
        history = corrected(history, ledger, kind, wanted)
        assert ledger.has() == above_zero(history.amounts)
        # Once more it is no difference.
        if not history.is_void:
            again = post(history, history.amounts)
            assert (again.charged, list(again.given_back)) == ({}, [])


@given(amounts, amounts, targets)
def test_what_is_restored_is_what_was_there_before_to_the_step(
    first: Amounts, second: Amounts, corrections: list[tuple[str, Amounts]]
) -> None:
    ledger = Ledger({0: dict(first)})
    history = History((Version(0, first, charged=first),))
    for kind, wanted in corrections:
        if not (kind == "void" and history.is_void):
            history = corrected(history, ledger, kind, wanted)
    before, cost, was_void = ledger.has(), history.amounts, history.is_void
    history = corrected(history, ledger, "version", second)
    history = corrected(history, ledger, "void" if was_void else "version", cost)
    assert ledger.has() == before


_KINDS: tuple[tuple[PriceKind, int, int], ...] = (("graduated", 0, 0), ("volume", 3, 0))
PRICES = tuple(
    OwnPrice(
        id=f"render-{kind}",
        type="render",
        unit="usd",
        kind=kind,
        quantity="n",
        tiers=(Tier(Decimal(10), Decimal(1)), Tier(None, Decimal("0.3333333333"))),
        free=Decimal(free),
        minimum=Decimal(minimum),
        period="month",
    )
    for kind, free, minimum in _KINDS
)


def book(prices: tuple[OwnPrice, ...]) -> PriceBook:
    version = PriceVersion(id="v1", effective_at=NOON - timedelta(days=30), rates={}, prices=prices)
    return PriceBook([version], units={"usd": USD})


def render(number: int, n: int) -> Usage:
    return usage(number, account="acme", type="render", used=None, data=f'{{"n": {n}}}')


def cost(prices: PriceBook, counters: dict[CounterKey, Counter], use: Usage) -> tuple[dict[str, int], Usage]:
    """What a use costs that is counted now."""
    rated, moved = rate_in_order([use], book=prices, counters=counters)
    price = rated[use.key]
    assert isinstance(price, Rated)
    counters.update(moved)
    return dict(price.amounts), use


def kept(
    prices: PriceBook, counters: dict[CounterKey, Counter], charged: dict[int, tuple[dict[str, int], Usage]]
) -> None:
    """Counters count what is charged; what is charged and what is carried are what all of it costs."""
    version = prices.versions[0]
    total = sum(paid["usd"] for paid, _ in charged.values())
    shares = [share for _, use in charged.values() for share in prices.counts(use, version).shares]
    quantities: dict[str, Decimal] = {}
    for share in shares:
        quantities[share.price.id] = quantities.get(share.price.id, Decimal(0)) + share.quantity
    for key, counter in counters.items():
        assert counter.quantity == quantities.get(key[2], 0)
    whole = sum(steps_of(price, quantities.get(price.id, Decimal(0)), unit=USD) for price in version.prices)
    assert total + sum(counter.credit for counter in counters.values()) == whole


uses = st.lists(st.integers(0, 12), min_size=1, max_size=8)
picks = st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, 12)), max_size=10)


@given(uses, picks, st.sampled_from([PRICES[:1], PRICES[1:], PRICES]))
def test_what_is_charged_and_carried_in_a_period_is_what_all_of_it_costs_whatever_is_taken_out(
    counted: list[int], corrections: list[tuple[int, int | None]], chosen: tuple[OwnPrice, ...]
) -> None:
    prices, counters = book(chosen), dict[CounterKey, Counter]()
    version = prices.versions[0]
    charged = {number: cost(prices, counters, render(number, n)) for number, n in enumerate(counted)}
    kept(prices, counters, charged)
    for number, n in corrections:
        if number not in charged:
            continue
        paid, use = charged.pop(number)
        counters.update(take_out(counters, prices.counts(use, version), paid))
        kept(prices, counters, charged)
        if n is not None:
            charged[number] = cost(prices, counters, render(number, n))
            kept(prices, counters, charged)


@given(uses, picks, st.sampled_from([PRICES[:1], PRICES[1:], PRICES]))
def test_counters_that_moved_move_back_to_where_they_were(
    counted: list[int], corrections: list[tuple[int, int | None]], chosen: tuple[OwnPrice, ...]
) -> None:
    prices, counters = book(chosen), dict[CounterKey, Counter]()
    version = prices.versions[0]
    charged = {number: cost(prices, counters, render(number, n)) for number, n in enumerate(counted)}
    start, done = dict(counters), []
    for number, n in corrections:
        if number not in charged:
            continue
        before = dict(counters)
        paid, use = charged.pop(number)
        taken = take_out(counters, prices.counts(use, version), paid)
        assert put_in({**counters, **taken}, prices.counts(use, version), paid) == {key: before[key] for key in taken}
        counters.update(taken)
        if n is not None:
            charged[number] = cost(prices, counters, render(number, n))
        done.append(moves(before, counters))
    for each in done[::-1] if len(corrections) % 2 else done:
        counters.update(moved_back(counters, each))
    assert {key: each for key, each in counters.items() if each != Counter()} == {
        key: each for key, each in start.items() if each != Counter()
    }
