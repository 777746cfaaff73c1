"""Laws of amounts: text and steps are one to one, nothing is rounded, nothing but decimal text is read."""

import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from contracts.money import AMOUNT_MAX, Amount, AmountText, Unit, format_amount, parse_amount
from tests.unit.contracts.strategies import units

USD = Unit(name="usd", kind="money", scale=9)
TOKENS = Unit(name="tokens", kind="cap", scale=0)
AMOUNT_TEXTS: TypeAdapter[str] = TypeAdapter(AmountText)
steps = st.integers(-AMOUNT_MAX, AMOUNT_MAX)


@given(steps, units)
def test_what_was_formatted_is_parsed_back(value: int, unit: Unit) -> None:
    text = format_amount(value, unit)
    assert parse_amount(text, unit) == value
    assert AMOUNT_TEXTS.validate_python(text) == text
    assert Decimal(text) == Decimal(value).scaleb(-unit.scale)


@given(steps, units)
def test_the_written_form_is_the_shortest(value: int, unit: Unit) -> None:
    text = format_amount(value, unit)
    assert "." not in text or not text.endswith(("0", "."))
    assert text != "-0"
    assert not re.match(r"-?0\d", text)


amount_like = st.one_of(
    st.text(),
    st.text("0123456789.-+eE_ ,", max_size=30),
    st.decimals().map(str),
    st.floats().map(str),
    st.from_regex(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,9})?\n?", fullmatch=True),
)


@given(amount_like, units)
@example("1e3", USD)
@example("1_000", USD)
@example("+1", USD)
@example(" 1", USD)
@example("01", USD)
@example("1.", USD)
@example(".5", USD)
@example("١", USD)
@example("1\n", USD)
@example("NaN", USD)
@example("-Infinity", USD)
@example("0.0000000001", USD)
@example("9" * 5000, USD)
@example("\ud800", USD)
def test_any_text_is_an_exact_amount_or_a_value_error(text: str, unit: Unit) -> None:
    try:
        value = parse_amount(text, unit)
    except ValueError:
        return
    assert Decimal(value).scaleb(-unit.scale) == Decimal(text)
    assert abs(value) <= AMOUNT_MAX
    assert AMOUNT_TEXTS.validate_python(text) == text


@given(steps.filter(lambda value: value % 10 != 0), st.integers(0, 8))
def test_a_decimal_too_many_is_refused_and_never_rounded(value: int, scale: int) -> None:
    finer = format_amount(value, Unit(name="unit", kind="money", scale=scale + 1))
    with pytest.raises(ValueError, match="decimals"):
        parse_amount(finer, Unit(name="unit", kind="money", scale=scale))


def test_zeros_behind_the_last_decimal_are_no_decimals() -> None:
    assert parse_amount("3.000000000", TOKENS) == 3
    with pytest.raises(ValueError, match="decimals"):
        parse_amount("3.000000001", TOKENS)


@pytest.mark.parametrize("unit", [USD, TOKENS])
def test_the_largest_amount_is_allowed_and_one_step_more_is_not(unit: Unit) -> None:
    for sign in (1, -1):
        assert parse_amount(format_amount(sign * AMOUNT_MAX, unit), unit) == sign * AMOUNT_MAX
        with pytest.raises(ValueError, match="largest"):
            parse_amount(format_amount(sign * (AMOUNT_MAX + 1), unit), unit)


@pytest.mark.parametrize("value", [1.0, float("nan"), 1, True, None, Decimal(1), b"1"])
def test_nothing_but_text_is_an_amount(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        parse_amount(value, USD)
    with pytest.raises(ValidationError):
        Amount(amount=value, unit="usd")


def test_amounts_as_they_are_written() -> None:
    assert format_amount(150, USD) == "0.00000015"
    assert format_amount(-1_500_000_000, USD) == "-1.5"
    assert format_amount(100_000_000_000, USD) == "100"
    assert format_amount(0, USD) == "0"
    assert format_amount(4096, TOKENS) == "4096"
    assert parse_amount("-0.0", USD) == 0
