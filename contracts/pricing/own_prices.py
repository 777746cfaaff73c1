"""What events cost by an own price, worked out: what is counted, over what period, and what each part comes to."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from decimal import ROUND_CEILING, Decimal, InvalidOperation, localcontext
from typing import Any, assert_never

from contracts.pricing.arithmetic import EXACT, NOTHING, divided
from contracts.pricing.items import LineItem
from contracts.pricing.rated import NotMeasurable
from contracts.pricing.terms import QUANTITY_MAX, OwnPrice, Period, Tier, is_quantity


def period_start(period: Period, at: datetime) -> datetime:
    """When the period of the calendar began that a time (UTC) is in."""
    start = at.replace(hour=0, minute=0, second=0, microsecond=0)
    match period:
        case "day":
            return start
        case "month":
            return start.replace(day=1)
        case "year":
            return start.replace(month=1, day=1)
        case _:
            assert_never(period)


def total_of(price: OwnPrice, quantity: Decimal) -> Decimal:
    """What a quantity costs in all, exactly."""
    with localcontext(EXACT):
        plain = _plain_total(price, quantity)
        return max(plain, price.minimum) if quantity > price.free else plain


def applies(price: OwnPrice, data: Mapping[str, Any]) -> bool:
    """Whether a price is for an event with these data: whether they have the values that its `where` names."""
    return all((found := _at(data, place)) is not None and _as_text(found) == value for place, value in price.where)


def quantity_in(price: OwnPrice, data: Mapping[str, Any], *, if_missing: Decimal | None = None) -> Decimal:
    """What an event has of the quantity of a price. NotMeasurable."""
    if price.quantity is None:
        return Decimal(1)
    found = _at(data, price.quantity)
    if found is None and if_missing is not None:
        return if_missing
    if isinstance(found, int | Decimal | str) and not isinstance(found, bool):
        try:
            value = Decimal(found)
        except InvalidOperation:
            value = Decimal("NaN")
        if is_quantity(value):
            return value
    raise NotMeasurable(f"at {price.quantity} there is no number from 0 to {QUANTITY_MAX} with at most 9 decimals")


def most_of(price: OwnPrice, data: Mapping[str, Any]) -> Decimal:
    """The most that a call can cost by an own price, with no more of its quantity than there is now."""
    if any((found := _at(data, place)) is not None and _as_text(found) != value for place, value in price.where):
        return NOTHING
    quantity = quantity_in(price, data, if_missing=NOTHING)
    if price.kind == "package":
        return max(total_of(price, quantity), price.minimum)
    return max(divided(quantity * max(tier.price for tier in price.tiers), price.per), price.minimum)


def items_between(price: OwnPrice, before: Decimal, after: Decimal) -> list[LineItem]:
    """The items of what comes between two counts. Their sum is what all costs after it less what all cost before."""
    name, per = price.quantity or "events", price.per
    items: list[LineItem] = []

    def add(quantity: str, count: Decimal, cost: Decimal, per: int, tier: str = "") -> None:
        shown = int(count) if count == int(count) else count
        items.append(
            LineItem(quantity, shown, price.unit, cost, per, divided(cost * count, per), tier or None, price.id)
        )

    free = min(after, price.free) - min(before, price.free)
    if free:
        add(name, free, NOTHING, 1, "free")
    paid, paid_before = (max(count - price.free, NOTHING) for count in (after, before))
    match price.kind:
        case "package":
            started = _packages(paid, per) - _packages(paid_before, per)
            if started or not items:
                add(name, started, price.tiers[0].price, 1, f"packages of {per}")
        case "volume":
            tier_name, tier = _tier_of(price, paid)
            if paid != paid_before or not items:
                add(name, paid - paid_before, tier.price, per, tier_name)
            _, tier_before = _tier_of(price, paid_before)
            if paid_before and tier.price != tier_before.price:
                add("adjustment", paid_before, tier.price - tier_before.price, per, tier_name)
        case "per_unit" | "graduated":
            for tier_name, tier, part in _parts(price, paid_before, paid):
                add(name, part, tier.price, per, tier_name)
        case _:
            assert_never(price.kind)
    if lacking := _lacking(price, after) - _lacking(price, before):
        add("minimum", Decimal(1), lacking, 1)
    return items


def _at(data: Mapping[str, Any], place: str) -> Any:
    """What stands at a place in the data of an event, `a.b`; None if nothing does."""
    found: Any = data
    for name in place.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain_total(price: OwnPrice, quantity: Decimal) -> Decimal:
    """What a quantity costs without the minimum."""
    charged = max(quantity - price.free, NOTHING)
    match price.kind:
        case "package":
            return _packages(charged, price.per) * price.tiers[0].price
        case "volume":
            return divided(charged * _tier_of(price, charged)[1].price, price.per)
        case "per_unit" | "graduated":
            costs = (part * tier.price for _, tier, part in _parts(price, NOTHING, charged))
            return divided(sum(costs, NOTHING), price.per)
        case _:
            assert_never(price.kind)


def _packages(quantity: Decimal, size: int) -> Decimal:
    return divided(quantity, size).to_integral_value(ROUND_CEILING)


def _tier_of(price: OwnPrice, charged: Decimal) -> tuple[str, Tier]:
    start = NOTHING
    for tier in price.tiers:
        if tier.up_to is None or charged <= tier.up_to:
            return _tier_name(price, start, tier), tier
        start = tier.up_to
    raise AssertionError("the last tier has no end")


def _tier_name(price: OwnPrice, start: Decimal, tier: Tier) -> str:
    if len(price.tiers) == 1:
        return ""
    return f"above {start:f}" if tier.up_to is None else f"{start:f} to {tier.up_to:f}"


def _parts(price: OwnPrice, before: Decimal, after: Decimal) -> Iterator[tuple[str, Tier, Decimal]]:
    """What lies in which tier of what comes between two counts."""
    start = NOTHING
    for tier in price.tiers:
        end = after if tier.up_to is None else min(after, tier.up_to)
        part = end - max(before, start)
        if part > 0:
            yield _tier_name(price, start, tier), tier, part
        if tier.up_to is None or after <= tier.up_to:
            return
        start = tier.up_to


def _lacking(price: OwnPrice, quantity: Decimal) -> Decimal:
    """What the minimum adds."""
    return max(price.minimum - _plain_total(price, quantity), NOTHING) if quantity > price.free else NOTHING
