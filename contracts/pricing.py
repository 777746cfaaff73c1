"""The price book and the one pure rating function: quotes and charges use it alike, with a pinned version."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from typing import Final, Literal, assert_never

import msgspec

from contracts.money import Unit
from contracts.usage import ModelUsed

Quantity = Literal["input_tokens", "output_tokens", "calls"]

PRICE_MAX = 10**9
PRICE_DECIMALS_MAX = 18
PER_MAX = 10**9
# With these bounds a billion tokens cost at most 18 digits before the point and 27 behind it: nothing is cut off.
_EXACT: Final = Context(prec=50)


@dataclass(frozen=True, slots=True)
class Rate:
    """`price` of `unit` for every `per` of a quantity: 0.15 usd per 1,000,000 input tokens.

    ValueError for a price that could not be computed with exactly: `per` is a power of ten.
    """

    quantity: Quantity
    unit: str
    price: Decimal
    per: int

    def __post_init__(self) -> None:
        if not self.price.is_finite() or not 0 <= self.price <= PRICE_MAX:
            raise ValueError(f"a price is between 0 and {PRICE_MAX} {self.unit}, not {self.price}")
        exponent = self.price.as_tuple().exponent
        if isinstance(exponent, int) and exponent < -PRICE_DECIMALS_MAX:
            raise ValueError(f"a price has at most {PRICE_DECIMALS_MAX} decimals, {self.price} has more")
        if not 1 <= self.per <= PER_MAX or str(self.per).strip("0") != "1":
            raise ValueError(f"a price is per 1, 10, 100 … up to {PER_MAX}, not per {self.per}")


@dataclass(frozen=True, slots=True)
class PriceVersion:
    """A state of the price book, never changed: what each (provider, model) costs for use from `effective_at` on."""

    id: str
    effective_at: datetime
    rates: Mapping[tuple[str, str], tuple[Rate, ...]]


class LineItem(msgspec.Struct, frozen=True, gc=False):
    """One priced quantity, before rounding: what a receipt shows."""

    quantity: Quantity
    count: int
    unit: str
    price: Decimal
    per: int
    exact: Decimal


class Rated(msgspec.Struct, frozen=True, gc=False):
    """What a usage event costs: an integer of steps per unit, and the items that add up to it."""

    price_version: str
    amounts: Mapping[str, int]
    items: tuple[LineItem, ...]


class Unpriced(LookupError):
    """The price book version has no price for a model. Such use is set aside, never charged 0."""

    def __init__(self, *, provider: str, model: str, price_version: str) -> None:
        super().__init__(f"price book version {price_version} has no price for {provider}/{model}")
        self.provider, self.model, self.price_version = provider, model, price_version


def rate(used: ModelUsed, *, price_version: PriceVersion, units: Mapping[str, Unit]) -> Rated:
    """Price one usage event: exact per item, rounded once per unit, half-even, to the unit's step. Raises Unpriced.

    A call with the account's own key is priced only in the units that count such calls.
    """
    rates = price_version.rates.get((used.provider, used.model))
    if rates is None:
        raise Unpriced(provider=used.provider, model=used.model, price_version=price_version.id)
    exact: dict[str, Decimal] = {}
    items = []
    # Not the methods of the context: operators within it are four times as fast.
    with localcontext(_EXACT):
        for each in rates:
            unit, per = each.unit, each.per
            if used.own_key and not units[unit].own_key_counts:
                continue
            count = _count(used, each.quantity)
            cost = each.price * count
            if per != 1:
                cost /= per
            exact[unit] = exact[unit] + cost if unit in exact else cost
            items.append(LineItem(each.quantity, count, unit, each.price, per, cost))
        amounts = {
            unit: int((total * 10 ** units[unit].scale).to_integral_value(ROUND_HALF_EVEN))
            for unit, total in exact.items()
        }
    return Rated(price_version=price_version.id, amounts=amounts, items=tuple(items))


def _count(used: ModelUsed, quantity: Quantity) -> int:
    match quantity:
        case "input_tokens":
            return used.input_tokens
        case "output_tokens":
            return used.output_tokens
        case "calls":
            return 1
        case _:
            assert_never(quantity)
