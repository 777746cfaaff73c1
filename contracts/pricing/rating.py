"""The one pure rating function: of calls of models, and of any other event, with a pinned price book version."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from typing import Any

from contracts.money import AMOUNT_MAX, Unit
from contracts.pricing.arithmetic import EXACT, NOTHING, divided, rounded
from contracts.pricing.items import LineItem, PlainItems
from contracts.pricing.own_prices import applies, items_between, most_of, period_start, quantity_in, total_of
from contracts.pricing.rated import Counter, Counting, NotMeasurable, Rated, Unpriced
from contracts.pricing.terms import TOOL_CALLS
from contracts.pricing.versions import PriceVersion, Terms
from contracts.usage import MODEL_USED, ModelUsed, QuickCall


def rate(
    used: ModelUsed | QuickCall, *, price_version: PriceVersion, units: Mapping[str, Unit], account: str | None = None
) -> Rated:
    """Price one call of a model: exact per item, rounded once per unit, half-even, to the unit's step. Raises Unpriced.

    A quantity with a rate of its own is not counted in what it is part of; one without is part of that. One that is
    covered by no rate in money is unpriced. A call with the account's own key is priced only in the units that count
    such calls, and by the own-key fees.
    """
    terms = price_version.terms(account)
    plan = terms.plan(used.provider, used.model, used.service_tier)
    if plan is None:
        raise Unpriced(provider=used.provider, model=used.model, price_version=price_version.id)
    own_key = used.own_key
    # By far most calls have tokens alone, and a price for them.
    if used.counts is None and not own_key and not terms.has_more and (quick := plan.quick(units)) is not None:
        of = (used.input_tokens, used.output_tokens, 1)
        return Rated(price_version.id, quick.amounts(of), PlainItems(quick, of))
    plain = plan.plain if used.counts is None else None
    counts: Mapping[str, int] = {}
    if plain is None or own_key or not plan.covers_plain(units):
        counts = _counted(used)
        if (not own_key or terms.own_key_fees) and (missing := plan.missing(counts, units)):
            raise Unpriced(provider=used.provider, model=used.model, price_version=price_version.id, missing=missing)
    # Not the methods of the context: operators within it are four times as fast.
    with localcontext(EXACT):
        exact: dict[str, Decimal] = {}
        items: list[LineItem] = []
        if plain is not None:
            of_plain = (used.input_tokens, used.output_tokens, 1)
            for place, quantity, unit, price, per in plain:
                if own_key and not units[unit].own_key_counts:
                    continue
                count = of_plain[place]
                cost = price * count
                if per != 1:
                    cost /= per
                exact[unit] = exact[unit] + cost if unit in exact else cost
                items.append(LineItem(quantity, count, unit, price, per, cost))
        else:
            for item in plan.items(counts):
                if not own_key or units[item.unit].own_key_counts:
                    exact[item.unit] = exact.get(item.unit, NOTHING) + item.exact
                    items.append(item)
        if terms.has_more:
            totals = plan.totals(counts) if own_key else exact
            _add_more(used, terms, totals, exact, items)
        amounts = {
            unit: int((total * 10 ** units[unit].scale).to_integral_value(ROUND_HALF_EVEN))
            for unit, total in exact.items()
        }
    return Rated(price_version.id, amounts, tuple(items))


def rate_at_most(
    used: ModelUsed,
    *,
    price_version: PriceVersion,
    units: Mapping[str, Unit],
    parts: Iterable[str] = (),
    account: str | None = None,
) -> Mapping[str, int]:
    """The most that a call can cost with no more tokens than `used` has, of which any may be of `parts`: a quote.

    With a service tier it bounds that and the standard one: the provider chooses. Raises Unpriced.
    """
    terms = price_version.terms(account)
    most = {"input_tokens": used.input_tokens, "output_tokens": used.output_tokens, "calls": 1}
    parts = frozenset(parts)
    found: dict[str, int] = {}
    for service_tier in dict.fromkeys((None, used.service_tier)):
        call = used.model_copy(update={"service_tier": service_tier})
        # Refuses what has no price, and says in which units there is one.
        rated = rate(call, price_version=price_version, units=units, account=account)
        plan = terms.plan(used.provider, used.model, service_tier)
        assert plan is not None
        with localcontext(EXACT):
            dearest = plan.dearest(used.input_tokens, parts)
            totals: dict[str, Decimal] = {}
            for (quantity, unit), price in dearest.items():
                totals[unit] = totals.get(unit, NOTHING) + price * most[quantity]
            exact = {unit: total for unit, total in totals.items() if not used.own_key or units[unit].own_key_counts}
            if terms.has_more:
                _add_more(call, terms, totals, exact, [], at_most=True)
            for unit in (*rated.amounts, *exact):
                steps = rounded(exact.get(unit, NOTHING) * 10 ** units[unit].scale)
                found[unit] = max(steps, found.get(unit, 0))
    return found


def rate_event(
    type: str,
    data: Mapping[str, Any],
    *,
    occurred_at: datetime,
    price_version: PriceVersion,
    units: Mapping[str, Unit],
    account: str | None = None,
    counted: Mapping[str, Counter] | None = None,
) -> Rated | None:
    """Price one event that is no call of a model, by the own prices for its type; None if there is none for it.

    `counted` has, by own price, what was counted before in the period of the event (`periods`). What a price with a
    period takes is the difference of what all costs after the event and before it, each rounded once, half-even: so
    that the order of events changes no total. All other prices are added up per unit and rounded once.
    NotMeasurable if a quantity cannot be read, or costs more than any amount can be.
    """
    prices = [each for each in price_version.terms(account).own_prices(type) if applies(each, data)]
    if not prices:
        return None
    exact: dict[str, Decimal] = {}
    amounts: dict[str, int] = {}
    items: list[LineItem] = []
    counting: list[Counting] = []
    with localcontext(EXACT):
        for price in prices:
            quantity = quantity_in(price, data)
            if price.period is None:
                exact.setdefault(price.unit, NOTHING)
                for item in items_between(price, NOTHING, quantity):
                    exact[price.unit] += item.exact
                    items.append(item)
                continue
            before = (counted or {}).get(price.id, Counter())
            after = before.quantity + quantity
            step = 10 ** units[price.unit].scale
            items += items_between(price, before.quantity, after)
            due = (
                before.credit
                + rounded(total_of(price, after) * step)
                - rounded(total_of(price, before.quantity) * step)
            )
            credit = min(due, 0)
            for name, steps in (("credit", before.credit), ("carried", -credit)):
                if steps:
                    value = divided(Decimal(steps), step)
                    items.append(LineItem(name, 1, price.unit, value, 1, value, None, price.id))
            amounts[price.unit] = amounts.get(price.unit, 0) + due - credit
            counting.append(Counting(price.id, period_start(price.period, occurred_at), Counter(after, credit)))
        for unit, total in exact.items():
            amounts[unit] = amounts.get(unit, 0) + rounded(total * 10 ** units[unit].scale)
    if any(amount > AMOUNT_MAX for amount in amounts.values()):
        raise NotMeasurable(f"an event costs more than {AMOUNT_MAX} steps of a unit")
    return Rated(price_version.id, amounts, tuple(items), tuple(counting))


def periods(
    type: str, *, occurred_at: datetime, price_version: PriceVersion, account: str | None = None
) -> Mapping[str, datetime]:
    """The periods in which an event is counted, by own price: whose counters `rate_event` is to be told."""
    return {
        price.id: period_start(price.period, occurred_at)
        for price in price_version.terms(account).own_prices(type)
        if price.period is not None
    }


def _add_more(
    used: ModelUsed | QuickCall,
    terms: Terms,
    totals: Mapping[str, Decimal],
    exact: dict[str, Decimal],
    items: list[LineItem],
    *,
    at_most: bool = False,
) -> None:
    """What a call costs beyond its rates, which come to `totals`: surcharges, and own prices for calls of models."""
    name, surcharges = ("own_key_fee", terms.own_key_fees) if used.own_key else ("markup", terms.markup)
    more = []
    for each in surcharges:
        if each.percent:
            base = totals.get(each.unit, NOTHING)
            more.append(LineItem(name, base, each.unit, each.percent, 100, divided(base * each.percent, 100)))
        if each.fixed:
            more.append(LineItem(name, 1, each.unit, each.fixed, 1, each.fixed))
    if prices := terms.own_prices(MODEL_USED):
        data = (used.in_full() if isinstance(used, QuickCall) else used).model_dump(mode="json")
        for price in prices:
            if at_most:
                most = most_of(price, data)
                more.append(LineItem(price.id, 1, price.unit, most, 1, most))
            elif applies(price, data):
                try:
                    quantity = quantity_in(price, data, if_missing=NOTHING)
                except NotMeasurable:
                    raise Unpriced(
                        provider=used.provider,
                        model=used.model,
                        price_version=terms.price_version,
                        missing=(f"prices.{price.id}",),
                    ) from None
                more += items_between(price, NOTHING, quantity)
    for item in more:
        exact[item.unit] = exact.get(item.unit, NOTHING) + item.exact
    items += more


def _counted(used: ModelUsed | QuickCall) -> dict[str, int]:
    """Every quantity of a call that is not 0, and its tokens and the call."""
    found = {"input_tokens": used.input_tokens, "output_tokens": used.output_tokens, "calls": 1}
    if used.counts is not None:
        counts = used.counts
        # By far most calls have a few of them.
        for name in counts.model_fields_set:
            if name != TOOL_CALLS and (count := getattr(counts, name)):
                found[name] = count
        if counts.tool_calls:
            found |= {f"{TOOL_CALLS}.{name}": count for name, count in counts.tool_calls.items()}
            found[TOOL_CALLS] = sum(counts.tool_calls.values())
    return found
