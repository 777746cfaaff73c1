"""What rating comes to: amounts and items, with what has to be counted; or the reason why there is no price."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal

import msgspec

from contracts.pricing.arithmetic import NOTHING
from contracts.pricing.items import LineItem, PlainItems


class Counter(msgspec.Struct, frozen=True, gc=False):
    """What was counted under an own price, for an account, in a period. `credit`, in steps, is at most 0.

    It is what a volume price has lowered of what was charged already: taken off what is charged next, or given back.
    """

    quantity: Decimal = NOTHING
    credit: int = 0


class Counting(msgspec.Struct, frozen=True, gc=False):
    """Where the counter of an own price stands once an event is charged."""

    price_id: str
    period: datetime
    counter: Counter


class Rated(msgspec.Struct, frozen=True, gc=False):
    """What a usage event costs: an integer of steps per unit, and the items that add up to it, but for the rounding.

    `counting`: what has to be written together with the charge.
    """

    price_version: str
    amounts: Mapping[str, int]
    items: tuple[LineItem, ...] | PlainItems
    counting: tuple[Counting, ...] = ()


class Unpriced(LookupError):
    """The price book version has no price for a model, or for something of a call. It is set aside, never charged 0.

    `missing`: for which quantities; empty if the model has no price at all.
    """

    def __init__(self, *, provider: str, model: str, price_version: str, missing: Sequence[str] = ()) -> None:
        what = f"{', '.join(missing)} of " if missing else ""
        super().__init__(f"price book version {price_version} has no price for {what}{provider}/{model}")
        self.provider, self.model, self.price_version = provider, model, price_version
        self.missing = tuple(missing)


class NotMeasurable(ValueError):
    """The data of an event have no number where an own price needs one."""
