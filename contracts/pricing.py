"""The price book and the one pure rating function: quotes and charges use it alike, with a pinned version."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal, InvalidOperation, localcontext
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, assert_never

import msgspec
from pydantic import Field

from contracts.accounts import path
from contracts.money import AMOUNT_MAX, Unit
from contracts.usage import FURTHER_COUNTS, MODEL_USED, PART_OF, ModelUsed, QuickCall

# What a model's rate is for. Of a call: its tokens and whatever else `Counts` has, the call itself, calls of a tool.
_TOOL: Final = "tool_calls"
MODEL_QUANTITIES: Final = ("input_tokens", "output_tokens", "calls", *FURTHER_COUNTS, _TOOL)
Quantity = Annotated[
    str,
    Field(
        pattern=rf"^({'|'.join(MODEL_QUANTITIES)}|{_TOOL}\.[a-z][a-z0-9_]{{0,63}})$",
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
# With these bounds the longest cost has 24 digits before the point and 45 behind it: nothing is cut off.
_EXACT: Final = Context(prec=100)
_NOTHING: Final = Decimal(0)
# Whose terms are those of the version itself.
_BASE: Final[tuple[str | None, str | None]] = (None, None)
# How a service tier is named among quantities.
_TIER: Final = "service_tier."
_PLAIN: Final = ("input_tokens", "output_tokens", "calls")

# What a provider calls the tier that is none: it costs what the model costs.
STANDARD_TIERS: Final = frozenset({"auto", "default", "standard"})


# Prices ---------------------------------------------------------------------------------------------------------------


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
    percent: Decimal = _NOTHING
    fixed: Decimal = _NOTHING

    def __post_init__(self) -> None:
        if not self.percent.is_finite() or not -100 <= self.percent <= PERCENT_MAX:
            raise ValueError(f"a percentage is between -100 and {PERCENT_MAX}, not {self.percent}")
        if _decimals(self.percent) > PERCENT_DECIMALS_MAX:
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
    free: Decimal = _NOTHING
    minimum: Decimal = _NOTHING
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
            if not _is_quantity(quantity):
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


@dataclass(frozen=True, slots=True)
class PriceVersion:
    """A state of the price book, never changed: what use costs from `effective_at` on.

    `rates`: what each (provider, model) costs. `prices`: what events of any type cost. `markup` is added to what calls
    of models cost, and `own_key_fees` are taken of what they would cost, if they are made with the account's own key.
    `plans` and `accounts` override that for those on a plan (`members`: account to plan) and for single accounts, each
    with all below them; the nearest counts, and an account's own terms before its plan's.
    """

    id: str
    effective_at: datetime
    rates: Mapping[tuple[str, str], tuple[Rate, ...]]
    prices: tuple[OwnPrice, ...] = ()
    markup: tuple[Surcharge, ...] = ()
    own_key_fees: tuple[Surcharge, ...] = ()
    plans: Mapping[str, Override] = field(default_factory=dict)
    accounts: Mapping[str, Override] = field(default_factory=dict)
    members: Mapping[str, str] = field(default_factory=dict)
    # What is worked out of the rest, once.
    _terms: dict[tuple[str | None, str | None], "_Terms"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _overrides: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_overrides", bool(self.accounts or self.members))

    def terms(self, account: str | None) -> "_Terms":
        """What counts for an account."""
        key = _BASE
        if self._overrides and account is not None:
            # From the account itself to the root of its tree.
            up = path(account)
            own = next((each for each in up if each in self.accounts), None)
            plan = next((self.members[each] for each in up if each in self.members), None)
            key = (own, plan if plan in self.plans else None)
        found = self._terms.get(key)
        if found is None:
            own, plan = key
            layers = [] if plan is None else [self.plans[plan]]
            layers += [] if own is None else [self.accounts[own]]
            found = self._terms[key] = _Terms(self, layers)
        return found

    def covers(self, provider: str, model: str, quantities: Sequence[str], *, units: Mapping[str, Unit]) -> bool:
        """Whether a model has a price, and one for quantities that `Unpriced` names. No override changes that."""
        tier = next((each.removeprefix(_TIER) for each in quantities if each.startswith(_TIER)), None)
        plan = self.terms(None).plan(provider, model, tier)
        return plan is not None and not plan.uncovered(quantities, units)

    def has_tier(self, provider: str, model: str, service_tier: str) -> bool:
        """Whether a model has prices of its own for a service tier."""
        return any(each.service_tier == service_tier for each in self.rates.get((provider, model), ()))


# What use costs -------------------------------------------------------------------------------------------------------


class LineItem(msgspec.Struct, frozen=True, gc=False):
    """One priced quantity, before rounding: what a receipt shows. `exact` is always `count` * `price` / `per`.

    Of a surcharge in percent `count` is what it is taken of and `per` 100. `tier` says which of several prices it is.
    `price_id`: of which own price it is.
    """

    quantity: str
    count: int | Decimal
    unit: str
    price: Decimal
    per: int
    exact: Decimal
    tier: str | None = None
    price_id: str | None = None


class PlainItems(msgspec.Struct, frozen=True, gc=False, eq=False):
    """The items of a call that has tokens alone, made when they are asked for. `of`: its tokens, and the call."""

    plan: "PlainPlan"
    of: tuple[int, int, int]

    def __iter__(self) -> Iterator[LineItem]:
        with localcontext(_EXACT):
            items = [each.item(self.of[each.place]) for each in self.plan.rows]
        return iter(items)

    def __len__(self) -> int:
        return len(self.plan.rows)

    def __getitem__(self, place: int) -> LineItem:
        return tuple(self)[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple | PlainItems) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


class Counter(msgspec.Struct, frozen=True, gc=False):
    """What was counted under an own price, for an account, in a period. `credit`, in steps, is at most 0.

    It is what a volume price has lowered of what was charged already: taken off what is charged next, or given back.
    """

    quantity: Decimal = _NOTHING
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
    with localcontext(_EXACT):
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
                    exact[item.unit] = exact.get(item.unit, _NOTHING) + item.exact
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
        with localcontext(_EXACT):
            dearest = plan.dearest(used.input_tokens, parts)
            totals: dict[str, Decimal] = {}
            for (quantity, unit), price in dearest.items():
                totals[unit] = totals.get(unit, _NOTHING) + price * most[quantity]
            exact = {unit: total for unit, total in totals.items() if not used.own_key or units[unit].own_key_counts}
            if terms.has_more:
                _add_more(call, terms, totals, exact, [], at_most=True)
            for unit in (*rated.amounts, *exact):
                steps = _rounded(exact.get(unit, _NOTHING) * 10 ** units[unit].scale)
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
    prices = [each for each in price_version.terms(account).own_prices(type) if _applies(each, data)]
    if not prices:
        return None
    exact: dict[str, Decimal] = {}
    amounts: dict[str, int] = {}
    items: list[LineItem] = []
    counting: list[Counting] = []
    with localcontext(_EXACT):
        for price in prices:
            quantity = _quantity(price, data)
            if price.period is None:
                exact.setdefault(price.unit, _NOTHING)
                for item in _own_items(price, _NOTHING, quantity):
                    exact[price.unit] += item.exact
                    items.append(item)
                continue
            before = (counted or {}).get(price.id, Counter())
            after = before.quantity + quantity
            step = 10 ** units[price.unit].scale
            items += _own_items(price, before.quantity, after)
            due = (
                before.credit
                + _rounded(total_of(price, after) * step)
                - _rounded(total_of(price, before.quantity) * step)
            )
            credit = min(due, 0)
            for name, steps in (("credit", before.credit), ("carried", -credit)):
                if steps:
                    value = _divided(Decimal(steps), step)
                    items.append(LineItem(name, 1, price.unit, value, 1, value, None, price.id))
            amounts[price.unit] = amounts.get(price.unit, 0) + due - credit
            counting.append(Counting(price.id, period_start(price.period, occurred_at), Counter(after, credit)))
        for unit, total in exact.items():
            amounts[unit] = amounts.get(unit, 0) + _rounded(total * 10 ** units[unit].scale)
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
    with localcontext(_EXACT):
        plain = _plain_total(price, quantity)
        return max(plain, price.minimum) if quantity > price.free else plain


# Models, worked out ---------------------------------------------------------------------------------------------------


class PlainRow(msgspec.Struct, frozen=True, gc=False):
    """What every token, or the call, costs by one rate: `price` of `unit` for every `per`.

    That is `steps` for each, divided by ten to the power of `decimals`, of which `decimals_min` are always written.
    """

    place: int
    quantity: str
    unit: str
    price: Decimal
    per: int
    steps: int
    decimals: int
    decimals_min: int

    def item(self, count: int) -> LineItem:
        """The item of so many, in the exact context."""
        cost = self.price * count
        exact = cost if self.per == 1 else _divided(cost, self.per)
        return LineItem(self.quantity, count, self.unit, self.price, self.per, exact)

    def exact_text(self, count: int) -> str:
        """What so many cost, as `item` says it, as a plain decimal."""
        if not (decimals := self.decimals):
            return str(count * self.steps)
        digits = str(count * self.steps).zfill(decimals + 1)
        least = len(digits) - decimals + self.decimals_min
        behind = digits[-decimals:least] + digits[least:].rstrip("0")
        return f"{digits[:-decimals]}.{behind}" if behind else digits[:-decimals]


class PlainPlan:
    """Rates of calls that have tokens alone, in integers: the same to the last digit as in decimals."""

    def __init__(self, plain: Iterable[tuple[int, str, str, Decimal, int]], units: Mapping[str, Unit]) -> None:
        self.units = units
        self.rows = tuple(_plain_row(*each) for each in plain)
        # By unit what one input token, one output token and the call are in steps, and by what that is to be divided.
        self._by_unit = []
        for unit in dict.fromkeys(row.unit for row in self.rows):
            rows = [row for row in self.rows if row.unit == unit]
            scale = units[unit].scale
            shift = max(0, *(row.decimals - scale for row in rows))
            steps = [0, 0, 0]
            for row in rows:
                steps[row.place] += row.steps * 10 ** (shift - row.decimals + scale)
            self._by_unit.append((unit, *steps, 10**shift))

    def amounts(self, of: tuple[int, int, int]) -> dict[str, int]:
        """What a call costs, rounded once per unit, half-even."""
        input_tokens, output_tokens, _ = of
        amounts = {}
        for unit, of_input, of_output, of_call, by in self._by_unit:
            steps = of_input * input_tokens + of_output * output_tokens + of_call
            if by != 1:
                steps, rest = divmod(steps, by)
                if rest * 2 > by or (rest * 2 == by and steps & 1):
                    steps += 1
            amounts[unit] = steps
        return amounts


def _plain_row(place: int, quantity: str, unit: str, price: Decimal, per: int) -> PlainRow:
    decimals_min = max(_decimals(price), 0)
    decimals = decimals_min + len(str(per)) - 1
    steps = int(price.scaleb(decimals_min, _EXACT))
    return PlainRow(place, quantity, unit, price, per, steps, decimals, decimals_min)


class _Plan:
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
                    if other.unit == rate.unit and rate.quantity in _wholes(other.quantity)
                ),
            )
            for place, rate in sorted(enumerate(self.rates), key=lambda each: -len(_wholes(each[1].quantity)))
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
            return (f"{_TIER}{self._service_tier}",)
        if not self._in_money:
            return ()
        found = []
        for quantity in sorted(quantities):
            if self._is_covered(quantity):
                # Names of tools come from outside: only those are kept that the book has, too.
                if quantity in self._in_money or not quantity.startswith(_TOOL):
                    self._covered[quantity] = True
            elif not quantity.startswith(_TIER):
                found.append(quantity)
        return found

    def _is_covered(self, quantity: str) -> bool:
        return (
            quantity in ("calls", _TOOL)
            or not self._in_money.isdisjoint((quantity, *_wholes(quantity)))
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
                    cost = _divided(cost, per)
                yield LineItem(each.quantity, count, each.unit, price, per, cost, tier)

    def totals(self, counts: Mapping[str, int]) -> dict[str, Decimal]:
        """What the rates come to, per unit."""
        found: dict[str, Decimal] = {}
        for item in self.items(counts):
            found[item.unit] = found.get(item.unit, _NOTHING) + item.exact
        return found

    def dearest(self, input_tokens: int, parts: frozenset[str]) -> dict[tuple[str, str], Decimal]:
        """The dearest that one of each whole can cost, per unit, in a call with at most so many input tokens."""
        found: dict[tuple[str, str], Decimal] = {}
        for each in self.rates:
            whole = _wholes(each.quantity)[-1] if each.quantity in parts else each.quantity
            if whole in _PLAIN:
                prices = (each.price, *(price for above, price in each.above if input_tokens > above))
                found[whole, each.unit] = max(found.get((whole, each.unit), _NOTHING), _divided(max(prices), each.per))
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


class _Terms:
    """What counts for some accounts: a version, and what overrides it, the strongest last."""

    def __init__(self, version: PriceVersion, layers: Sequence[Override]) -> None:
        self._version, self._layers = version, layers
        self.price_version = version.id
        self._plans: dict[object, _Plan] = {}
        self.markup, self.own_key_fees = version.markup, version.own_key_fees
        prices = {each.id: each for each in version.prices}
        for layer in layers:
            self.markup = self.markup if layer.markup is None else layer.markup
            self.own_key_fees = self.own_key_fees if layer.own_key_fees is None else layer.own_key_fees
            prices |= {each.id: each for each in layer.prices}
        self._prices: dict[str, list[OwnPrice]] = {}
        for each in prices.values():
            self._prices.setdefault(each.type, []).append(each)
        self.has_more = bool(self.markup or self.own_key_fees or MODEL_USED in self._prices)

    def plan(self, provider: str, model: str, service_tier: str | None) -> _Plan | None:
        """The rates of a model at a service tier; None if it has none."""
        if service_tier in STANDARD_TIERS:
            service_tier = None
        key = (provider, model) if service_tier is None else (provider, model, service_tier)
        found = self._plans.get(key)
        if found is not None:
            return found
        listed = self._version.rates.get((provider, model))
        if listed is None:
            # Not kept: names come from outside.
            return None
        by_place = {each.place: each for each in listed}
        for layer in self._layers:
            by_place |= {each.place: each for each in layer.rates.get((provider, model), ())}
        plan = _Plan(tuple(by_place.values()), service_tier)
        if service_tier is None or self._version.has_tier(provider, model, service_tier):
            self._plans[key] = plan
        return plan

    def own_prices(self, type: str) -> Sequence[OwnPrice]:
        """The own prices for a type of events."""
        return self._prices.get(type, ())


def _add_more(
    used: ModelUsed | QuickCall,
    terms: _Terms,
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
            base = totals.get(each.unit, _NOTHING)
            more.append(LineItem(name, base, each.unit, each.percent, 100, _divided(base * each.percent, 100)))
        if each.fixed:
            more.append(LineItem(name, 1, each.unit, each.fixed, 1, each.fixed))
    if prices := terms.own_prices(MODEL_USED):
        data = (used.in_full() if isinstance(used, QuickCall) else used).model_dump(mode="json")
        for price in prices:
            if at_most:
                most = _most_of(price, data)
                more.append(LineItem(price.id, 1, price.unit, most, 1, most))
            elif _applies(price, data):
                try:
                    quantity = _quantity(price, data, if_missing=_NOTHING)
                except NotMeasurable:
                    raise Unpriced(
                        provider=used.provider,
                        model=used.model,
                        price_version=terms.price_version,
                        missing=(f"prices.{price.id}",),
                    ) from None
                more += _own_items(price, _NOTHING, quantity)
    for item in more:
        exact[item.unit] = exact.get(item.unit, _NOTHING) + item.exact
    items += more


@lru_cache(maxsize=4096)
def _wholes(quantity: str) -> tuple[str, ...]:
    """All that a quantity is part of, the largest last."""
    if quantity.startswith(f"{_TOOL}."):
        return (_TOOL,)
    nearest = PART_OF.get(quantity, ())
    return tuple(dict.fromkeys((*nearest, *(further for each in nearest for further in _wholes(each)))))


def _is_tokens(quantity: str) -> bool:
    return quantity.endswith("_tokens")


def _counted(used: ModelUsed | QuickCall) -> dict[str, int]:
    """Every quantity of a call that is not 0, and its tokens and the call."""
    found = {"input_tokens": used.input_tokens, "output_tokens": used.output_tokens, "calls": 1}
    if used.counts is not None:
        counts = used.counts
        # By far most calls have a few of them.
        for name in counts.model_fields_set:
            if name != _TOOL and (count := getattr(counts, name)):
                found[name] = count
        if counts.tool_calls:
            found |= {f"{_TOOL}.{name}": count for name, count in counts.tool_calls.items()}
            found[_TOOL] = sum(counts.tool_calls.values())
    return found


def lacking_joins(rates: Sequence[Rate]) -> list[str]:
    """What a model's rates lack: of what is part of two that have a rate, nobody could say to which it belongs."""
    said = []
    for service_tier in dict.fromkeys(each.service_tier for each in rates):
        plan = _Plan(rates, service_tier)
        for unit in dict.fromkeys(each.unit for each in plan.rates):
            has = {each.quantity for each in plan.rates if each.unit == unit}
            for part, wholes in PART_OF.items():
                if len(wholes) > 1 and has.issuperset(wholes) and part not in has:
                    at = "" if service_tier is None else f" at {service_tier}"
                    said.append(f"has rates for {' and '.join(wholes)} in {unit}{at}, and none for {part}")
    return said


# Own prices, worked out -----------------------------------------------------------------------------------------------


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


def _applies(price: OwnPrice, data: Mapping[str, Any]) -> bool:
    return all((found := _at(data, place)) is not None and _as_text(found) == value for place, value in price.where)


def _quantity(price: OwnPrice, data: Mapping[str, Any], *, if_missing: Decimal | None = None) -> Decimal:
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
        if _is_quantity(value):
            return value
    raise NotMeasurable(f"at {price.quantity} there is no number from 0 to {QUANTITY_MAX} with at most 9 decimals")


def _is_quantity(value: Decimal) -> bool:
    return value.is_finite() and 0 <= value <= QUANTITY_MAX and _decimals(value) <= QUANTITY_DECIMALS_MAX


def _most_of(price: OwnPrice, data: Mapping[str, Any]) -> Decimal:
    """The most that a call can cost by an own price, with no more of its quantity than there is now."""
    if any((found := _at(data, place)) is not None and _as_text(found) != value for place, value in price.where):
        return _NOTHING
    quantity = _quantity(price, data, if_missing=_NOTHING)
    if price.kind == "package":
        return max(total_of(price, quantity), price.minimum)
    return max(_divided(quantity * max(tier.price for tier in price.tiers), price.per), price.minimum)


def _plain_total(price: OwnPrice, quantity: Decimal) -> Decimal:
    """What a quantity costs without the minimum."""
    charged = max(quantity - price.free, _NOTHING)
    match price.kind:
        case "package":
            return _packages(charged, price.per) * price.tiers[0].price
        case "volume":
            return _divided(charged * _tier_of(price, charged)[1].price, price.per)
        case "per_unit" | "graduated":
            costs = (part * tier.price for _, tier, part in _parts(price, _NOTHING, charged))
            return _divided(sum(costs, _NOTHING), price.per)
        case _:
            assert_never(price.kind)


def _packages(quantity: Decimal, size: int) -> Decimal:
    return _divided(quantity, size).to_integral_value(ROUND_CEILING)


def _tier_of(price: OwnPrice, charged: Decimal) -> tuple[str, Tier]:
    start = _NOTHING
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
    start = _NOTHING
    for tier in price.tiers:
        end = after if tier.up_to is None else min(after, tier.up_to)
        part = end - max(before, start)
        if part > 0:
            yield _tier_name(price, start, tier), tier, part
        if tier.up_to is None or after <= tier.up_to:
            return
        start = tier.up_to


def _own_items(price: OwnPrice, before: Decimal, after: Decimal) -> list[LineItem]:
    """The items of what comes between two counts. Their sum is what all costs after it less what all cost before."""
    name, per = price.quantity or "events", price.per
    items: list[LineItem] = []

    def add(quantity: str, count: Decimal, cost: Decimal, per: int, tier: str = "") -> None:
        shown = int(count) if count == int(count) else count
        items.append(
            LineItem(quantity, shown, price.unit, cost, per, _divided(cost * count, per), tier or None, price.id)
        )

    free = min(after, price.free) - min(before, price.free)
    if free:
        add(name, free, _NOTHING, 1, "free")
    paid, paid_before = (max(count - price.free, _NOTHING) for count in (after, before))
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


def _lacking(price: OwnPrice, quantity: Decimal) -> Decimal:
    """What the minimum adds."""
    return max(price.minimum - _plain_total(price, quantity), _NOTHING) if quantity > price.free else _NOTHING


def _divided(value: Decimal, by: int) -> Decimal:
    return value / by


def _rounded(steps: Decimal) -> int:
    return int(steps.to_integral_value(ROUND_HALF_EVEN))


def _decimals(value: Decimal) -> int:
    exponent = value.as_tuple().exponent
    return -exponent if isinstance(exponent, int) else 0


def _check_price(price: Decimal, unit: str) -> None:
    if not price.is_finite() or not 0 <= price <= PRICE_MAX:
        raise ValueError(f"a price is between 0 and {PRICE_MAX} {unit}, not {price}")
    if _decimals(price) > PRICE_DECIMALS_MAX:
        raise ValueError(f"a price has at most {PRICE_DECIMALS_MAX} decimals, {price} has more")


def _check_per(per: int) -> None:
    if not 1 <= per <= PER_MAX or str(per).strip("0") != "1":
        raise ValueError(f"a price is per 1, 10, 100 … up to {PER_MAX}, not per {per}")
