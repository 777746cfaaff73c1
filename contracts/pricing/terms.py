"""What a price book says: rates of models, surcharges, own prices for events of any type, and who pays otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Final, Literal

from pydantic import Field

from contracts.pricing.arithmetic import NOTHING, decimals_of
from contracts.usage import FURTHER_COUNTS

# What a model's rate is for. Of a call: its tokens and whatever else `Counts` has, the call itself, calls of a tool.
TOOL_CALLS: Final = "tool_calls"
MODEL_QUANTITIES: Final = ("input_tokens", "output_tokens", "calls", *FURTHER_COUNTS, TOOL_CALLS)
Quantity = Annotated[
    str,
    Field(
        pattern=rf"^({'|'.join(MODEL_QUANTITIES)}|{TOOL_CALLS}\.[a-z][a-z0-9_]{{0,63}})$",
        examples=["input_tokens", "cached_input_tokens", "tool_calls.web_search"],
    ),
]

PRICE_MAX = 10**9
PRICE_DECIMALS_MAX = 18
PER_MAX = 10**9
PERCENT_MAX = 10**5
PERCENT_DECIMALS_MAX = 6
# Of an event, and of a period: what is counted under an own price.
QUANTITY_MAX = 10**15
QUANTITY_DECIMALS_MAX = 9

# What a provider calls the tier that is none: it costs what the model costs.
STANDARD_TIERS: Final = frozenset({"auto", "default", "standard"})


@dataclass(frozen=True, slots=True)
class Rate:
    """`price` of `unit` for every `per` of a quantity: 0.15 usd per 1,000,000 input tokens.

    `above`: with more input tokens than that the whole call costs another price. With a `service_tier` it holds for
    calls served at that tier, in place of the rate for the same quantity and unit that has none.
    ValueError for a price that could not be computed with exactly: `per` is a power of ten.
    """

    quantity: str
    unit: str
    price: Decimal
    per: int
    above: tuple[tuple[int, Decimal], ...] = ()
    service_tier: str | None = None

    def __post_init__(self) -> None:
        for price in (self.price, *(price for _, price in self.above)):
            _check_price(price, self.unit)
        _check_per(self.per)
        thresholds = [threshold for threshold, _ in self.above]
        if thresholds != sorted(set(thresholds)) or any(threshold < 0 for threshold in thresholds):
            raise ValueError(f"prices by the length of the input come in rising order, not {thresholds}")

    @property
    def place(self) -> tuple[str, str, str | None]:
        """What the rate is for: of two rates with one place there can be none."""
        return (self.quantity, self.unit, self.service_tier)


@dataclass(frozen=True, slots=True)
class Surcharge:
    """What is added to the cost of a call of a model, in a unit: `percent` of it, and a `fixed` amount.

    A percentage below 0, down to -100, is a discount.
    """

    unit: str
    percent: Decimal = NOTHING
    fixed: Decimal = NOTHING

    def __post_init__(self) -> None:
        if not self.percent.is_finite() or not -100 <= self.percent <= PERCENT_MAX:
            raise ValueError(f"a percentage is between -100 and {PERCENT_MAX}, not {self.percent}")
        if decimals_of(self.percent) > PERCENT_DECIMALS_MAX:
            raise ValueError(f"a percentage has at most {PERCENT_DECIMALS_MAX} decimals, {self.percent} has more")
        _check_price(self.fixed, self.unit)


@dataclass(frozen=True, slots=True)
class Tier:
    """What a quantity costs up to `up_to`, included; None: however much it is."""

    up_to: Decimal | None
    price: Decimal


PriceKind = Literal["per_unit", "package", "graduated", "volume"]
Period = Literal["day", "month", "year"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPrice:
    """What events of a type cost, in a unit: for what stands at `quantity` in their data (None: for each event, 1).

    `per_unit`: the price for every `per` (a power of ten). `package`: the price for every started `per`.
    `graduated`: what lies in a tier costs that tier's price. `volume`: all costs the price of the tier it reaches.
    The first `free` of a quantity cost nothing; where something costs, it costs at least `minimum`. All this is of each
    event alone, or, with a `period` (of the calendar, in UTC), of all that an account uses in it. `where`: only events
    whose data have these values at these places.
    """

    id: str
    type: str
    unit: str
    kind: PriceKind
    tiers: tuple[Tier, ...]
    quantity: str | None = None
    per: int = 1
    free: Decimal = NOTHING
    minimum: Decimal = NOTHING
    period: Period | None = None
    where: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for tier in self.tiers:
            _check_price(tier.price, self.unit)
        _check_price(self.minimum, self.unit)
        if self.kind != "package":
            _check_per(self.per)
        elif not 1 <= self.per <= PER_MAX:
            raise ValueError(f"a package is of 1 to {PER_MAX}, not of {self.per}")
        ends = [tier.up_to for tier in self.tiers]
        bounded = [end for end in ends if end is not None]
        for quantity in (self.free, *bounded):
            if not is_quantity(quantity):
                raise ValueError(f"{quantity} is no quantity")
        if not ends or ends[-1] is not None or None in ends[:-1] or bounded != sorted(set(bounded)):
            raise ValueError("tiers come in rising order, and the last one, and it alone, has no end")
        if self.kind in ("per_unit", "package") and len(self.tiers) != 1:
            raise ValueError(f"a price of the kind {self.kind} has one tier")

    @property
    def counted_as(self) -> tuple[object, ...]:
        """What is counted, and over what: an override has the same, so that no count changes its meaning."""
        return (self.id, self.type, self.quantity, self.unit, self.period, self.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """What some accounts pay otherwise: rates and own prices that the version has, with other prices.

    None in place of the markup or the own-key fees: those of the version.
    """

    rates: Mapping[tuple[str, str], tuple[Rate, ...]] = field(default_factory=dict)
    prices: tuple[OwnPrice, ...] = ()
    markup: tuple[Surcharge, ...] | None = None
    own_key_fees: tuple[Surcharge, ...] | None = None


def is_quantity(value: Decimal) -> bool:
    """Whether it is within the bounds of what can be counted."""
    return value.is_finite() and 0 <= value <= QUANTITY_MAX and decimals_of(value) <= QUANTITY_DECIMALS_MAX


def _check_price(price: Decimal, unit: str) -> None:
    if not price.is_finite() or not 0 <= price <= PRICE_MAX:
        raise ValueError(f"a price is between 0 and {PRICE_MAX} {unit}, not {price}")
    if decimals_of(price) > PRICE_DECIMALS_MAX:
        raise ValueError(f"a price has at most {PRICE_DECIMALS_MAX} decimals, {price} has more")


def _check_per(per: int) -> None:
    if not 1 <= per <= PER_MAX or str(per).strip("0") != "1":
        raise ValueError(f"a price is per 1, 10, 100 … up to {PER_MAX}, not per {per}")
