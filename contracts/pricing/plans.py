"""The rates of a model, worked out once: which quantity is part of which, what is missing, what each comes to."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Final

from contracts.money import Unit
from contracts.pricing.arithmetic import NOTHING, divided
from contracts.pricing.items import LineItem, PlainPlan
from contracts.pricing.terms import TOOL_CALLS, Rate
from contracts.usage import PART_OF

# How a service tier is named among quantities.
SERVICE_TIER: Final = "service_tier."
_PLAIN: Final = ("input_tokens", "output_tokens", "calls")


class Plan:
    """The rates of a model at a service tier, in the order in which they are listed, as they are computed with."""

    def __init__(self, listed: Sequence[Rate], service_tier: str | None) -> None:
        further = {each.place[:2] for each in listed if service_tier and each.service_tier == service_tier}
        self.rates = tuple(
            each
            for each in listed
            if each.service_tier == service_tier or (each.service_tier is None and each.place[:2] not in further)
        )
        # At a tier that is not known nothing has a price, whatever it costs at others.
        self._unknown_tier = service_tier is not None and not further
        self._service_tier = service_tier
        plain = [each for each in self.rates if each.quantity in _PLAIN]
        self._quick: PlainPlan | None = None
        self.plain = (
            None
            if service_tier is not None or any(each.above for each in plain)
            else tuple((_PLAIN.index(each.quantity), each.quantity, each.unit, each.price, each.per) for each in plain)
        )
        # Of each rate its place, and those of the rates in its unit for its parts: parts come first.
        self._parts_first = [
            (
                place,
                rate.quantity,
                tuple(
                    at
                    for at, other in enumerate(self.rates)
                    if other.unit == rate.unit and rate.quantity in wholes(other.quantity)
                ),
            )
            for place, rate in sorted(enumerate(self.rates), key=lambda each: -len(wholes(each[1].quantity)))
        ]
        self._covered: dict[str, bool] = {}
        self._units: Mapping[str, Unit] | None = None
        self._is_flat = False
        self._in_money: frozenset[str] = frozenset()
        self._covers_plain = True

    def quick(self, units: Mapping[str, Unit]) -> "PlainPlan | None":
        """For calls that have tokens only, if nothing is missing of them."""
        return self._quick if self.covers_plain(units) else None

    def covers_plain(self, units: Mapping[str, Unit]) -> bool:
        """Whether nothing is missing of a call that has tokens only."""
        if units is not self._units:
            self._look_at(units)
        return self._covers_plain

    def missing(self, counts: Mapping[str, int], units: Mapping[str, Unit]) -> Sequence[str]:
        """What of a call is covered by no rate in money. A model that has no rate in money needs none."""
        if units is not self._units:
            self._look_at(units)
        covered = self._covered
        found = [quantity for quantity, count in counts.items() if count and not covered.get(quantity)]
        return self.uncovered(found, units) if found or self._unknown_tier else ()

    def uncovered(self, quantities: Iterable[str], units: Mapping[str, Unit]) -> Sequence[str]:
        """Which quantities are covered by no rate in money; or that nothing is, at this service tier."""
        if units is not self._units:
            self._look_at(units)
        if self._unknown_tier:
            return (f"{SERVICE_TIER}{self._service_tier}",)
        if not self._in_money:
            return ()
        found = []
        for quantity in sorted(quantities):
            if self._is_covered(quantity):
                # Names of tools come from outside: only those are kept that the book has, too.
                if quantity in self._in_money or not quantity.startswith(TOOL_CALLS):
                    self._covered[quantity] = True
            elif not quantity.startswith(SERVICE_TIER):
                found.append(quantity)
        return found

    def _is_covered(self, quantity: str) -> bool:
        return (
            quantity in ("calls", TOOL_CALLS)
            or not self._in_money.isdisjoint((quantity, *wholes(quantity)))
            or (self._is_flat and _is_tokens(quantity))
        )

    def items(self, counts: Mapping[str, int]) -> Iterator[LineItem]:
        """What each rate comes to. A part that has none is left out."""
        left = [0] * len(self.rates)
        for place, quantity, parts in self._parts_first:
            count = counts.get(quantity, 0)
            for part in parts:
                count -= left[part]
            left[place] = count
        for each, count in zip(self.rates, left, strict=True):
            if count or each.quantity in _PLAIN:
                price, tier, per = each.price, each.service_tier, each.per
                over = None
                for threshold, above in each.above:
                    if counts["input_tokens"] > threshold:
                        price, over = above, threshold
                if over is not None:
                    tier = f"above {over}" if tier is None else f"{tier}, above {over}"
                cost = price * count
                if per != 1:
                    cost = divided(cost, per)
                yield LineItem(each.quantity, count, each.unit, price, per, cost, tier)

    def totals(self, counts: Mapping[str, int]) -> dict[str, Decimal]:
        """What the rates come to, per unit."""
        found: dict[str, Decimal] = {}
        for item in self.items(counts):
            found[item.unit] = found.get(item.unit, NOTHING) + item.exact
        return found

    def dearest(self, input_tokens: int, parts: frozenset[str]) -> dict[tuple[str, str], Decimal]:
        """The dearest that one of each whole can cost, per unit, in a call with at most so many input tokens."""
        found: dict[tuple[str, str], Decimal] = {}
        for each in self.rates:
            whole = wholes(each.quantity)[-1] if each.quantity in parts else each.quantity
            if whole in _PLAIN:
                prices = (each.price, *(price for above, price in each.above if input_tokens > above))
                found[whole, each.unit] = max(found.get((whole, each.unit), NOTHING), divided(max(prices), each.per))
        return found

    def _look_at(self, units: Mapping[str, Unit]) -> None:
        self._in_money = frozenset(each.quantity for each in self.rates if units[each.unit].kind == "money")
        # A price for the call, or for its images, says that its tokens are in it.
        self._is_flat = not any(_is_tokens(each) for each in self._in_money)
        plain = {"input_tokens", "output_tokens"}
        self._covers_plain = not self._unknown_tier and (not self._in_money or self._is_flat or plain <= self._in_money)
        self._covered = {}
        self._units = units
        self._quick = None if self.plain is None else PlainPlan(self.plain, units)


@lru_cache(maxsize=4096)
def wholes(quantity: str) -> tuple[str, ...]:
    """All that a quantity is part of, the largest last."""
    if quantity.startswith(f"{TOOL_CALLS}."):
        return (TOOL_CALLS,)
    nearest = PART_OF.get(quantity, ())
    return tuple(dict.fromkeys((*nearest, *(further for each in nearest for further in wholes(each)))))


def lacking_joins(rates: Sequence[Rate]) -> list[str]:
    """What a model's rates lack: of what is part of two that have a rate, nobody could say to which it belongs."""
    said = []
    for service_tier in dict.fromkeys(each.service_tier for each in rates):
        plan = Plan(rates, service_tier)
        for unit in dict.fromkeys(each.unit for each in plan.rates):
            has = {each.quantity for each in plan.rates if each.unit == unit}
            for part, joined in PART_OF.items():
                if len(joined) > 1 and has.issuperset(joined) and part not in has:
                    at = "" if service_tier is None else f" at {service_tier}"
                    said.append(f"has rates for {' and '.join(joined)} in {unit}{at}, and none for {part}")
    return said


def _is_tokens(quantity: str) -> bool:
    return quantity.endswith("_tokens")
