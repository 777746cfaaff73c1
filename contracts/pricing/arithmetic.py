"""Exact decimals: with the bounds of a price book no digit of a cost is cut off, and it is rounded once, half-even."""

from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Final

# The longest cost has 24 digits before the point and 45 behind it.
EXACT: Final = Context(prec=100)
NOTHING: Final = Decimal(0)


def divided(value: Decimal, by: int) -> Decimal:
    """In the exact context: the one place that divides, but for the hot path of rating."""
    return value / by


def rounded(steps: Decimal) -> int:
    """To a whole number of steps, half-even."""
    return int(steps.to_integral_value(ROUND_HALF_EVEN))


def decimals_of(value: Decimal) -> int:
    """How many digits stand behind its point."""
    exponent = value.as_tuple().exponent
    return -exponent if isinstance(exponent, int) else 0
