"""What events of any type cost by own prices: by hand, and in whatever order they come."""

import random
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.money import Unit
from contracts.pricing import (
    Counter,
    NotMeasurable,
    Override,
    OwnPrice,
    PriceVersion,
    Rated,
    Tier,
    period_start,
    periods,
    rate_event,
    total_of,
)

UNITS: Final = {
    "usd": Unit(name="usd", kind="money", scale=9),
    "credits": Unit(name="credits", kind="money", scale=2),
    "cents": Unit(name="cents", kind="money", scale=0),
}
NOON: Final = datetime(2026, 3, 14, 12, tzinfo=UTC)


def price(
    *tiers: tuple[str | None, str], kind: Any = "per_unit", free: str = "0", minimum: str = "0", **more: Any
) -> OwnPrice:
    made = tuple(Tier(None if up_to is None else Decimal(up_to), Decimal(cost)) for up_to, cost in tiers)
    values: dict[str, Any] = {"id": "p", "type": "render", "unit": "usd", "quantity": "n", **more}
    return OwnPrice(kind=kind, tiers=made, free=Decimal(free), minimum=Decimal(minimum), **values)


def version(*prices: OwnPrice, **more: Any) -> PriceVersion:
    return PriceVersion(id="v1", effective_at=datetime(2026, 1, 1, tzinfo=UTC), rates={}, prices=prices, **more)


def rated(of: PriceVersion, n: Any, **more: Any) -> Rated:
    found = rate_event("render", {"n": n}, occurred_at=NOON, price_version=of, units=UNITS, **more)
    assert found is not None
    assert all(item.exact * item.per == item.count * item.price for item in found.items)
    return found


def follow(of: PriceVersion, quantities: Sequence[Decimal]) -> tuple[list[Rated], Counter]:
    """The charges of events of one period, one after the other, and the counter after them."""
    counter = Counter()
    found = []
    for quantity in quantities:
        each = rated(of, quantity, counted={"p": counter})
        ((counting),) = each.counting
        counter = counting.counter
        found.append(each)
    return found, counter


GRADUATED: Final = (("10", "1"), ("100", "0.5"), (None, "0.1"))


# By hand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "n", "expected"),
    [
        (price((None, "0.02")), 7, "0.14"),
        (price((None, "3"), per=1000), 1, "0.003"),
        (price((None, "0.02")), Decimal("2.5"), "0.05"),
        (price((None, "0.02")), "2.5", "0.05"),
        (price((None, "0.02"), quantity=None), "whatever", "0.02"),
        # Every started package: 0, 1, 1, 2 of a hundred.
        (price((None, "0.3"), kind="package", per=100), 0, "0"),
        (price((None, "0.3"), kind="package", per=100), 1, "0.3"),
        (price((None, "0.3"), kind="package", per=100), 100, "0.3"),
        (price((None, "0.3"), kind="package", per=100), Decimal("100.000000001"), "0.6"),
        (price((None, "0.3"), kind="package", per=7), 15, "0.9"),
        # 10 x 1 + 90 x 0.5 + 50 x 0.1
        (price(*GRADUATED, kind="graduated"), 150, "60"),
        (price(*GRADUATED, kind="graduated"), 10, "10"),
        (price(*GRADUATED, kind="graduated"), 11, "10.5"),
        # All at the price of the tier it reaches.
        (price(*GRADUATED, kind="volume"), 10, "10"),
        (price(*GRADUATED, kind="volume"), 11, "5.5"),
        (price(*GRADUATED, kind="volume"), 150, "15"),
        # The first 5 cost nothing; where something costs, at least a minimum.
        (price((None, "1"), free="5"), 5, "0"),
        (price((None, "1"), free="5"), 8, "3"),
        (price((None, "1"), free="5", minimum="2"), 5, "0"),
        (price((None, "1"), free="5", minimum="2"), 6, "2"),
        (price((None, "1"), free="5", minimum="2"), 9, "4"),
        (price(*GRADUATED, kind="graduated", free="100"), 111, "10.5"),
    ],
)
def test_an_event_costs_what_it_comes_to_by_hand(made: OwnPrice, n: Any, expected: str) -> None:
    found = rated(version(made), n)
    assert found.amounts == {"usd": int(Decimal(expected) * 10**9)}
    assert sum((item.exact for item in found.items), Decimal(0)) == Decimal(expected)
    assert found.counting == ()
    if n not in ("whatever",):
        assert total_of(made, Decimal(n)) == Decimal(expected)


def test_a_months_graduated_price_by_hand() -> None:
    found, counter = follow(
        version(price(*GRADUATED, kind="graduated", period="month")), [Decimal(n) for n in (8, 4, 100, 1)]
    )
    # 8 x 1 · 2 x 1 + 2 x 0.5 · 88 x 0.5 + 12 x 0.1 · 1 x 0.1
    assert [each.amounts["usd"] for each in found] == [8 * 10**9, 3 * 10**9, 45_200_000_000, 100_000_000]
    assert [[(item.count, item.tier) for item in each.items] for each in found] == [
        [(8, "0 to 10")],
        [(2, "0 to 10"), (2, "10 to 100")],
        [(88, "10 to 100"), (12, "above 100")],
        [(1, "above 100")],
    ]
    assert counter == Counter(Decimal(113), 0)


def test_a_volume_price_that_falls_gives_back_what_it_can_and_carries_the_rest() -> None:
    found, counter = follow(
        version(price(*GRADUATED, kind="volume", period="month")), [Decimal(n) for n in (10, 1, 5, 20)]
    )
    # 10 at 1; then 11 at 0.5 are 5.5, and 4.5 are carried; 16 are 8, 2 carried; 36 are 18: 10 - 2.
    assert [each.amounts["usd"] for each in found] == [10 * 10**9, 0, 0, 8 * 10**9]
    assert [each.counting[0].counter.credit for each in found] == [0, -4_500_000_000, -2_000_000_000, 0]
    assert [[item.quantity for item in each.items] for each in found] == [
        ["n"],
        ["n", "adjustment", "carried"],
        ["n", "credit", "carried"],
        ["n", "credit"],
    ]
    assert counter == Counter(Decimal(36), 0)
    for each in found:
        assert sum(item.exact for item in each.items) * 10**9 == each.amounts["usd"]


def test_a_months_packages_allowance_and_minimum_by_hand() -> None:
    packages, _ = follow(
        version(price((None, "2"), kind="package", per=10, free="5", period="month")),
        [Decimal(n) for n in (3, 3, 9, 1, 1)],
    )
    assert [each.amounts["usd"] // 10**9 for each in packages] == [0, 2, 0, 2, 0]
    least, _ = follow(version(price((None, "1"), minimum="5", period="month")), [Decimal(n) for n in (2, 2, 2, 2)])
    # What the minimum has taken is used up first.
    assert [each.amounts["usd"] // 10**9 for each in least] == [5, 0, 1, 2]


def test_prices_in_several_units_and_several_in_one() -> None:
    book = version(
        price((None, "0.5"), unit="cents", id="a"),
        price((None, "0.5"), unit="cents", id="b", quantity=None),
        price((None, "0.125"), unit="credits", id="c"),
    )
    # Rounded once per unit: 0.5 + 0.5 is 1; 0.125 of steps of 0.01 is 12, half to even.
    assert rated(book, 1).amounts == {"cents": 1, "credits": 12}


def test_only_what_a_price_is_for_is_priced() -> None:
    large = price((None, "2"), id="large", where=(("gpu", "true"), ("size", "large")))
    small = price((None, "1"), id="small", where=(("size", "small"),))
    book = version(large, small)

    def cost(type: str, **data: Any) -> Any:
        found = rate_event(type, {"n": 1, **data}, occurred_at=NOON, price_version=book, units=UNITS)
        return None if found is None else found.amounts["usd"] // 10**9

    assert cost("render", size="large", gpu=True) == 2
    assert cost("render", size="small") == 1
    assert cost("render", size="large", gpu=False) is None
    assert cost("render") is None
    assert cost("other", size="small") is None


@pytest.mark.parametrize(
    "n", [None, -1, "x", "", True, [1], {"a": 1}, Decimal("NaN"), "Infinity", "1e400", 10**15 + 1, "0.0000000001"]
)
def test_what_cannot_be_measured_is_not_priced(n: Any) -> None:
    with pytest.raises(NotMeasurable):
        rated(version(price((None, "1"))), n)


def test_what_no_amount_can_be_is_not_priced() -> None:
    with pytest.raises(NotMeasurable):
        rated(version(price((None, "1000000000"))), 10**15)


def test_an_override_has_its_own_price_and_the_same_count() -> None:
    base = price(*GRADUATED, kind="graduated", period="month")
    cheaper = price((None, "0.01"), period="month")
    assert base.counted_as == cheaper.counted_as
    book = version(base, accounts={"acme": Override(prices=(cheaper,))})
    assert rated(book, 5, account="acme/ana").amounts == {"usd": 50_000_000}
    assert rated(book, 5, account="other").amounts == {"usd": 5 * 10**9}


def test_periods_are_those_of_the_calendar() -> None:
    assert period_start("day", NOON) == datetime(2026, 3, 14, tzinfo=UTC)
    assert period_start("month", NOON) == datetime(2026, 3, 1, tzinfo=UTC)
    assert period_start("year", NOON) == datetime(2026, 1, 1, tzinfo=UTC)
    book = version(price((None, "1"), period="day"), price((None, "1"), id="q"))
    assert periods("render", occurred_at=NOON, price_version=book) == {"p": datetime(2026, 3, 14, tzinfo=UTC)}
    assert periods("other", occurred_at=NOON, price_version=book) == {}


@pytest.mark.parametrize(
    "made",
    [
        price,
        lambda: price(("5", "1")),
        lambda: price((None, "1"), ("5", "1"), kind="graduated"),
        lambda: price(("5", "1"), ("5", "2"), (None, "3"), kind="graduated"),
        lambda: price(("5", "1"), (None, "3")),
        lambda: price(("5", "1"), (None, "3"), kind="package"),
        lambda: price((None, "1"), per=3),
        lambda: price((None, "1"), kind="package", per=0),
        lambda: price((None, "-1")),
        lambda: price((None, "1"), free="-1"),
        lambda: price((None, "1"), minimum="-1"),
    ],
)
def test_a_price_that_could_not_be_computed_with_is_refused(made: Any) -> None:
    with pytest.raises(ValueError):
        made()


# Laws -----------------------------------------------------------------------------------------------------------------

amounts = st.decimals(0, 20, places=4)
quantities = st.one_of(st.integers(0, 60).map(Decimal), st.decimals(0, 60, places=3))


@st.composite
def own_prices(draw: st.DrawFn) -> OwnPrice:
    kind = draw(st.sampled_from(["per_unit", "package", "graduated", "volume"]))
    ends = sorted(draw(st.sets(st.integers(1, 100), max_size=3))) if kind in ("graduated", "volume") else []
    tiers = [(str(end), str(draw(amounts))) for end in ends] + [(None, str(draw(amounts)))]
    return price(
        *tiers,
        kind=kind,
        per=draw(st.integers(1, 20)) if kind == "package" else draw(st.sampled_from([1, 10, 1000])),
        free=str(draw(st.integers(0, 40))),
        minimum=str(draw(st.sampled_from(["0", "0.5", "30"]))),
        unit=draw(st.sampled_from(["usd", "credits", "cents"])),
        period="month",
    )


@given(own_prices(), st.lists(quantities, min_size=1, max_size=12), st.integers(0, 2**32))
def test_the_order_of_events_changes_no_total(made: OwnPrice, used: list[Decimal], seed: int) -> None:
    shuffled = list(used)
    random.Random(seed).shuffle(shuffled)
    totals = []
    for order in (used, shuffled):
        found, counter = follow(version(made), order)
        charged = sum(each.amounts[made.unit] for each in found)
        assert counter.quantity == sum(used)
        assert all(each.amounts[made.unit] >= 0 for each in found)
        totals.append(charged + counter.credit)
    step = 10 ** UNITS[made.unit].scale
    exact = Fraction(total_of(made, sum(used, Decimal(0)))) * step
    assert totals[0] == totals[1]
    # Rounded once in all, however many events there are.
    assert abs(totals[0] - exact) <= Fraction(1, 2)
    if made.kind != "volume":
        assert counter.credit == 0


@given(own_prices(), st.lists(quantities, min_size=1, max_size=8))
def test_the_items_of_a_period_add_up_to_what_it_costs(made: OwnPrice, used: list[Decimal]) -> None:
    found, counter = follow(version(made), used)
    lines = sum((Fraction(item.exact) for each in found for item in each.items), Fraction(0))
    step = 10 ** UNITS[made.unit].scale
    carried = Fraction(-counter.credit, step)
    assert lines == Fraction(total_of(made, sum(used, Decimal(0)))) + carried
    for each in found:
        exact = sum((Fraction(item.exact) for item in each.items), Fraction(0)) * step
        assert abs(each.amounts[made.unit] - exact) <= 1


@given(own_prices(), quantities)
def test_an_event_alone_costs_what_a_period_with_it_alone_costs(made: OwnPrice, quantity: Decimal) -> None:
    alone = OwnPrice(
        id="p", type="render", unit=made.unit, kind=made.kind, tiers=made.tiers, quantity="n", per=made.per,
        free=made.free, minimum=made.minimum,
    )  # fmt: skip
    assert rated(version(alone), quantity).amounts == rated(version(made), quantity).amounts
    assert rated(version(alone), quantity).items == rated(version(made), quantity).items
