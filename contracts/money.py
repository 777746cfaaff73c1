"""Units and amounts. An amount is an integer of its unit's steps; in JSON a decimal string and its unit. No float."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# A billion dollars in nano-dollars. Sums of nine such amounts still fit a bigint.
AMOUNT_MAX = 10**18
SCALE_MAX = 9

# With no more digits before the point, and up to 9 behind it, it is less than AMOUNT_MAX.
_SHORT = 9
_AMOUNT_PATTERN = r"^-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,9})?$"
_AMOUNT = re.compile(r"(-?)(0|[1-9][0-9]{0,18})(?:\.([0-9]{1,9}))?")

UnitName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$", examples=["usd", "tokens"])]
AmountText = Annotated[str, Field(pattern=_AMOUNT_PATTERN, max_length=30, examples=["0.000123456", "1000"])]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is counted. `scale` is the number of decimals of its step: `usd` 9 (nano-dollars), `tokens` 0.

    `mirrors`: a cap that counts what is paid in a money unit, as `usd_cap` does for `usd`.
    """

    name: str
    kind: Literal["money", "cap"]
    scale: int
    own_key_counts: bool = False
    mirrors: str | None = None


class Amount(BaseModel):
    """An amount and its unit."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    amount: AmountText
    unit: UnitName


def parse_amount(text: str, unit: Unit) -> int:
    """The number of the unit's steps that a decimal string stands for. ValueError, never rounding, otherwise."""
    # Of a number, or None, this is a TypeError.
    whole, point, fraction = str.partition(text, ".")
    if (
        len(whole) <= _SHORT
        and whole.isdecimal()
        and text.isascii()
        and (whole == "0" or whole[0] != "0")
        and (fraction.isdecimal() and len(fraction) <= unit.scale if point else True)
    ):
        # By far most are: this takes half the time.
        return int(whole + fraction.ljust(unit.scale, "0"))
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a decimal amount")
    sign, whole, fraction = match[1], match[2], (match[3] or "").rstrip("0")
    if len(fraction) > unit.scale:
        raise ValueError(f"{text!r} has more than the {unit.scale} decimals of {unit.name}")
    value = int(whole + fraction.ljust(unit.scale, "0"))
    if value > AMOUNT_MAX:
        raise ValueError(f"{text!r} {unit.name} is more than the largest amount, {format_amount(AMOUNT_MAX, unit)}")
    return -value if sign else value


def format_amount(value: int, unit: Unit) -> str:
    """The decimal string of an integer number of steps: 150 of `usd` is `0.00000015`; whole numbers carry no point."""
    if unit.scale == 0:
        return str(value)
    sign = "-" if value < 0 else ""
    digits = str(abs(value)).rjust(unit.scale + 1, "0")
    fraction = digits[-unit.scale :].rstrip("0")
    return f"{sign}{digits[: -unit.scale]}{'.' if fraction else ''}{fraction}"
