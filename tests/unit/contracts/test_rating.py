"""Laws of rating: exact arithmetic, one rounding per unit, half to even, and never a price by default."""

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal, getcontext, localcontext
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from contracts.money import Unit
from contracts.pricing import PlainItems, PriceVersion, Quantity, Rate, Unpriced, rate
from contracts.usage import TOKENS_MAX, Counts, ModelUsed, QuickCall

UNITS: Mapping[str, Unit] = {
    "usd": Unit(name="usd", kind="money", scale=9),
    "cents": Unit(name="cents", kind="money", scale=0),
    "tokens": Unit(name="tokens", kind="cap", scale=0),
    "calls": Unit(name="calls", kind="cap", scale=0, own_key_counts=True),
}
QUANTITIES: tuple[Quantity, ...] = ("input_tokens", "output_tokens", "calls")

prices = st.one_of(
    st.decimals(0, 10**9, places=18, allow_nan=False, allow_infinity=False),
    st.decimals(0, 100, places=4),
    st.integers(0, 10**9).map(Decimal),
    # Ties at the step of usd: halves of a nano-dollar per unit counted.
    st.integers(0, 99).map(lambda halves: Decimal(5 * halves).scaleb(-10)),
)
rates = st.builds(
    Rate,
    quantity=st.sampled_from(QUANTITIES),
    unit=st.sampled_from(sorted(UNITS)),
    price=prices,
    per=st.integers(0, 9).map(lambda exponent: 10**exponent),
)
counts = st.integers(0, TOKENS_MAX) | st.integers(0, 10)
uses = st.builds(
    ModelUsed,
    provider=st.just("openai"),
    model=st.just("gpt-4o-mini"),
    input_tokens=counts,
    output_tokens=counts,
    own_key=st.booleans(),
)


def version(*listed: Rate) -> PriceVersion:
    return PriceVersion(
        id="2025-07-01",
        effective_at=datetime(2025, 7, 1, tzinfo=UTC),
        rates={("openai", "gpt-4o-mini"): listed},
    )


def use(
    *, input_tokens: int = 0, output_tokens: int = 0, own_key: bool = False, model: str = "gpt-4o-mini"
) -> ModelUsed:
    return ModelUsed(
        provider="openai", model=model, input_tokens=input_tokens, output_tokens=output_tokens, own_key=own_key
    )


def counted(used: ModelUsed, quantity: Quantity) -> int:
    return {"input_tokens": used.input_tokens, "output_tokens": used.output_tokens, "calls": 1}[quantity]


def unpriced(used: ModelUsed, listed: list[Rate]) -> set[str]:
    """What of a call no rate in money is for. A model with none for tokens has a price for the whole call, or none."""
    in_money = {each.quantity for each in listed if UNITS[each.unit].kind == "money"}
    if used.own_key or in_money <= {"calls"}:
        return set()
    return {name for name in ("input_tokens", "output_tokens") if counted(used, name)} - in_money


def half_even(value: Fraction) -> int:
    """The nearest integer, ties to the even one; written out, so that it shares nothing with Decimal."""
    floor = value.numerator // value.denominator
    above = value - floor
    if above == Fraction(1, 2):
        return floor + floor % 2
    return floor + (above > Fraction(1, 2))


@given(uses, st.lists(rates, max_size=6))
@example(use(input_tokens=1), [Rate(quantity="input_tokens", unit="usd", price=Decimal("0.0000000005"), per=1)])
@example(use(input_tokens=3), [Rate(quantity="input_tokens", unit="usd", price=Decimal("0.0000000005"), per=1)])
def test_amounts_are_exact_sums_rounded_once_per_unit(used: ModelUsed, listed: list[Rate]) -> None:
    listed = list({each.place: each for each in listed}.values())
    if missing := unpriced(used, listed):
        with pytest.raises(Unpriced) as refusal:
            rate(used, price_version=version(*listed), units=UNITS)
        assert set(refusal.value.missing) == missing
        return
    rated = rate(used, price_version=version(*listed), units=UNITS)
    priced = [each for each in listed if not used.own_key or UNITS[each.unit].own_key_counts]
    exact: dict[str, Fraction] = {}
    for each in priced:
        cost = Fraction(each.price) * counted(used, each.quantity) / each.per
        exact[each.unit] = exact.get(each.unit, Fraction(0)) + cost
    assert rated.amounts == {unit: half_even(total * 10 ** UNITS[unit].scale) for unit, total in exact.items()}
    assert [Fraction(item.exact) for item in rated.items] == [
        Fraction(each.price) * counted(used, each.quantity) / each.per for each in priced
    ]
    assert [(item.quantity, item.unit, item.price, item.per) for item in rated.items] == [
        (each.quantity, each.unit, each.price, each.per) for each in priced
    ]


@given(uses, st.lists(rates, max_size=6))
def test_rating_does_not_depend_on_the_callers_decimal_context(used: ModelUsed, listed: list[Rate]) -> None:
    if unpriced(used, listed):
        return
    rated = rate(used, price_version=version(*listed), units=UNITS)
    with localcontext() as context:
        context.prec = 3
        assert rate(used, price_version=version(*listed), units=UNITS) == rated
        assert getcontext().prec == 3


def test_halves_are_rounded_once_and_to_even() -> None:
    half = [Rate(quantity=quantity, unit="cents", price=Decimal("0.5"), per=1) for quantity in QUANTITIES]
    # 0.5 alone is 0; 0.5 + 0.5 is 1 and not 0 + 0; 1.5 is 2; 2.5 is 2.
    assert rate(use(), price_version=version(half[2]), units=UNITS).amounts == {"cents": 0}
    assert rate(use(input_tokens=1), price_version=version(half[0], half[2]), units=UNITS).amounts == {"cents": 1}
    assert rate(use(input_tokens=3), price_version=version(half[0]), units=UNITS).amounts == {"cents": 2}
    assert rate(use(input_tokens=5), price_version=version(half[0]), units=UNITS).amounts == {"cents": 2}


def test_a_call_with_an_own_key_costs_only_what_counts_such_calls() -> None:
    book = version(
        Rate(quantity="input_tokens", unit="usd", price=Decimal("0.15"), per=10**6),
        Rate(quantity="input_tokens", unit="tokens", price=Decimal(1), per=1),
        Rate(quantity="calls", unit="calls", price=Decimal(1), per=1),
    )
    credits_used = rate(use(input_tokens=1000), price_version=book, units=UNITS)
    own = rate(use(input_tokens=1000, own_key=True), price_version=book, units=UNITS)
    assert credits_used.amounts == {"usd": 150_000, "tokens": 1000, "calls": 1}
    assert own.amounts == {"calls": 1}
    assert [item.unit for item in own.items] == ["calls"]


def test_a_model_without_a_price_is_refused_and_never_free() -> None:
    book = version(Rate(quantity="calls", unit="calls", price=Decimal(1), per=1))
    for own_key in (False, True):
        with pytest.raises(Unpriced) as refusal:
            rate(use(model="gpt-5", own_key=own_key), price_version=book, units=UNITS)
        assert (refusal.value.provider, refusal.value.model) == ("openai", "gpt-5")
        assert refusal.value.price_version == "2025-07-01"


def test_a_model_that_is_priced_at_nothing_is_free() -> None:
    free = Rate(quantity="input_tokens", unit="usd", price=Decimal(0), per=10**6)
    assert rate(use(input_tokens=10), price_version=version(free), units=UNITS).amounts == {"usd": 0}


@pytest.mark.parametrize("price", ["NaN", "sNaN", "Infinity", "-0.01", "1000000001", "1E-19", "1E-400"])
def test_a_price_that_cannot_be_computed_with_is_refused(price: str) -> None:
    with pytest.raises(ValueError, match="price"):
        Rate(quantity="calls", unit="usd", price=Decimal(price), per=1)


@pytest.mark.parametrize("per", [0, -1, -10, 3, 20, 11, 10**10])
def test_a_price_is_per_a_power_of_ten(per: int) -> None:
    with pytest.raises(ValueError, match="per"):
        Rate(quantity="calls", unit="usd", price=Decimal(1), per=per)


@given(uses, st.lists(rates, max_size=6))
@example(use(input_tokens=1), [Rate(quantity="input_tokens", unit="usd", price=Decimal("1E+3"), per=10)])
@example(use(), [Rate(quantity="input_tokens", unit="usd", price=Decimal("0.150"), per=1_000_000)])
@example(use(), [Rate(quantity="calls", unit="usd", price=Decimal("0E-7"), per=1)])
def test_a_call_of_tokens_alone_is_priced_in_integers_as_in_decimals(used: ModelUsed, listed: list[Rate]) -> None:
    listed = list({each.place: each for each in listed}.values())
    # With counts, though none, everything is computed in decimals, item by item.
    slow = used.model_copy(update={"counts": Counts()})
    quick = QuickCall(**used.model_dump(include={"provider", "model", "input_tokens", "output_tokens", "own_key"}))
    prices = version(*listed)
    if unpriced(used, listed):
        for call in (used, slow, quick):
            with pytest.raises(Unpriced):
                rate(call, price_version=prices, units=UNITS)
        return
    wanted = rate(slow, price_version=prices, units=UNITS)
    for call in (used, quick):
        rated = rate(call, price_version=prices, units=UNITS)
        assert rated == wanted
        assert list(rated.amounts) == list(wanted.amounts)
        assert [f"{item.exact}" for item in rated.items] == [f"{item.exact}" for item in wanted.items]
        if isinstance(rated.items, PlainItems):
            of = rated.items.of
            assert [row.exact_text(of[row.place]) for row in rated.items.plan.rows] == [
                f"{item.exact:f}" for item in wanted.items
            ]
