"""The price book: which version holds for a use, what the use costs under it, and which versions may be added."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from itertools import pairwise
from typing import Any, Final

import msgspec

from contracts.money import Unit
from contracts.pricing import (
    Counter,
    NotMeasurable,
    Override,
    OwnPrice,
    Period,
    PriceVersion,
    Rate,
    Rated,
    Unpriced,
    period_start,
    periods,
    rate,
    rate_event,
    total_of,
)
from services.metering.domain.usage import Key, Usage

# How far back a version may take effect without being called backdated: it was under way.
LATE_MAX: Final = timedelta(minutes=1)

Model = tuple[str, str]
# From the first moment on, up to the second; None: for ever.
Times = tuple[datetime | None, datetime | None]

ALWAYS: Final[Times] = (None, None)
_VERSION: Final = "version:"
_TYPE: Final = "type:"
_LOOKED_AT: Final = "looked_at:"
# From the shortest to the longest; each lies within one of the next.
_PERIODS: Final[Sequence[Period]] = ("day", "month", "year")
# Wide enough that nothing is cut off: what a quantity costs has at most 69 digits.
_EXACT: Final = Context(prec=100)
_DATA: Final = msgspec.json.Decoder(float_hook=Decimal)


@dataclass(frozen=True, slots=True)
class NoPrice:
    """The price book has no price for a use. It is set aside under `key`, never charged 0.

    `key` is `provider/model`, and behind a space what of the call has no price, if only that is missing; `type:<type>`
    of an event that is no call of a model, or `looked_at:<id>/<type>` if that version has prices for the type, and yet
    none for this one, or none that its data can be measured by; or `version:<id>`, if the use is pinned to a version
    that is not known (yet); or `version:<id>/provider/model`, if that version has no price for it, and never will.
    """

    key: str


# What is counted under an own price: for whom, which price, in which period.
CounterKey = tuple[int, str, str, datetime]


@dataclass(frozen=True, slots=True)
class CountedFirst:
    """A use that costs what the counts of its periods say. They are read, and written, under its partition's head."""

    counters: Sequence[CounterKey]


@dataclass(frozen=True, slots=True)
class Share:
    """What a use was counted as under one price with a period."""

    key: CounterKey
    price: OwnPrice
    unit: Unit
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class Counts:
    """What a use was counted as. `fixed` is what it costs, by unit, whatever was counted before."""

    shares: Sequence[Share] = ()
    fixed: Mapping[str, int] = field(default_factory=dict)


def period_end(period: Period, start: datetime) -> datetime:
    """When the period of the calendar ends that begins at a time (UTC)."""
    longest = {"day": 1, "month": 31, "year": 366}
    return period_start(period, start + timedelta(days=longest[period]))


def steps_of(price: OwnPrice, quantity: Decimal, *, unit: Unit) -> int:
    """What a quantity costs in all, in steps, rounded once, half-even."""
    with localcontext(_EXACT):
        return int((total_of(price, quantity) * 10**unit.scale).to_integral_value(ROUND_HALF_EVEN))


class VersionRefused(ValueError):
    """A version that may not be added to the price book. `code` is stable and for programs."""

    code = "version_refused"


class IdTaken(VersionRefused):
    """A version of that id is stored with other contents."""

    code = "version_exists"

    def __init__(self, version: PriceVersion) -> None:
        super().__init__(
            f"price version {version.id} is stored with other contents, and a stored version is never changed:"
            " give the new prices another id"
        )


class TimeTaken(VersionRefused):
    """Another version takes effect at the same moment."""

    code = "effective_at_taken"

    def __init__(self, version: PriceVersion, other: PriceVersion) -> None:
        super().__init__(
            f"price version {version.id} cannot take effect at {version.effective_at.isoformat()}:"
            f" {other.id} does already"
        )


class InThePast(VersionRefused):
    """A version would take effect in the past without having been called backdated."""

    code = "in_the_past"

    def __init__(self, version: PriceVersion, *, at: datetime) -> None:
        late = int((at - version.effective_at).total_seconds())
        super().__init__(
            f"price version {version.id} takes effect {late} seconds in the past, more than {LATE_MAX.seconds};"
            " only a backdated version may, and what was charged stays as it is"
        )


class CountedOtherwise(VersionRefused):
    """An own price would count another quantity than the one of that id does in another version."""

    code = "counted_otherwise"

    def __init__(self, version: PriceVersion, other: PriceVersion, price: str) -> None:
        super().__init__(
            f"the own price {price} counts something else in price version {version.id} than in {other.id}:"
            " give it another id"
        )


class PriceBook:
    """Price versions in the order of their times. Of two with one time, or one id, there can be none."""

    def __init__(self, versions: Iterable[PriceVersion], *, units: Mapping[str, Unit]) -> None:
        """Raises ValueError if the versions contradict each other, or price in a unit that does not exist."""
        self._versions = sorted(versions, key=lambda version: version.effective_at)
        self._times = [version.effective_at for version in self._versions]
        self._units = dict(units)
        self._by_id = {version.id: version for version in self._versions}
        if len(self._by_id) != len(self._versions) or len(set(self._times)) != len(self._times):
            raise ValueError(f"two price versions share an id or a time: {[version.id for version in self._versions]}")
        for version in self._versions:
            unknown = set(_units_of(version)) - self._units.keys()
            if unknown:
                raise ValueError(f"price version {version.id} prices in unknown units: {sorted(unknown)}")

    @property
    def units(self) -> Mapping[str, Unit]:
        """The units prices are in."""
        return self._units

    @property
    def versions(self) -> Sequence[PriceVersion]:
        """All versions, in the order in which they take effect."""
        return self._versions

    def extended(self, versions: Iterable[PriceVersion]) -> "PriceBook":
        """This book and further versions. Raises ValueError like the constructor."""
        return PriceBook([*self._versions, *versions], units=self._units)

    def find(self, id: str) -> PriceVersion | None:
        """The version of an id."""
        return self._by_id.get(id)

    def version_at(self, time: datetime) -> PriceVersion | None:
        """The version with the latest `effective_at` at or before `time`; None before the first."""
        place = bisect_right(self._times, time)
        return self._versions[place - 1] if place else None

    def from_now_on(self, time: datetime) -> Sequence[PriceVersion]:
        """The version in force at `time`, and those that come later."""
        return self._versions[max(bisect_right(self._times, time) - 1, 0) :]

    def price(
        self,
        usage: Usage,
        *,
        counted: Mapping[CounterKey, Counter] | None = None,
        under: PriceVersion | None = None,
    ) -> Rated | NoPrice | CountedFirst:
        """What a use costs under the version it is pinned to, else under that of its own time, whenever reported.

        CountedFirst if that depends on what was used before in a period, unless `counted` says what that was.
        `under`: that version instead, whatever the use is pinned to.
        """
        used = usage.used
        if used is None:
            return self._price_event(usage, counted, under)
        model, pinned = f"{used.provider}/{used.model}", used.price_version
        version: PriceVersion | None
        if under is not None:
            version, missing = under, model
        elif pinned is None:
            version, missing = self.version_at(usage.occurred_at), model
        else:
            version = self._by_id.get(pinned)
            missing = f"{_VERSION}{pinned}" if version is None else f"{_VERSION}{pinned}/{model}"
        if version is None:
            return NoPrice(key=missing)
        try:
            return rate(used, price_version=version, units=self._units, account=usage.account)
        except Unpriced as refusal:
            return NoPrice(key=f"{missing} {','.join(refusal.missing)}" if refusal.missing else missing)

    def counts(self, usage: Usage, version: PriceVersion) -> Counts:
        """What a use that is charged under a version was counted as, and what of its cost no count says."""
        prices = {price.id: price for price in version.terms(usage.account).own_prices(usage.type) if price.period}
        if usage.used is not None or not prices:
            return Counts()
        # As if nothing had been used before: then its counts are those of the counters.
        rated = rate_event(
            usage.type,
            _read_data(usage.data),
            occurred_at=usage.occurred_at,
            price_version=version,
            units=self._units,
            account=usage.account,
        )
        if rated is None:
            return Counts()
        fixed = dict(rated.amounts)
        shares = []
        for each in rated.counting:
            price = prices[each.price_id]
            unit = self._units[price.unit]
            fixed[unit.name] -= steps_of(price, each.counter.quantity, unit=unit)
            key = (usage.partition, usage.account, price.id, each.period)
            shares.append(Share(key=key, price=price, unit=unit, quantity=each.counter.quantity))
        return Counts(tuple(shares), fixed)

    def counted_price(self, id: str) -> OwnPrice | None:
        """An own price with a period, as one of the versions has it: all count the same, in the same unit."""
        return next((each for each in self._counted_prices() if each.id == id), None)

    def counts_types(self) -> Mapping[str, Period]:
        """Types of events that some version counts in a period, with the longest one that any does."""
        found: dict[str, Period] = {}
        for price in self._counted_prices():
            assert price.period is not None
            found[price.type] = max(found.get(price.type, price.period), price.period, key=_PERIODS.index)
        return found

    def _counted_prices(self) -> Iterator[OwnPrice]:
        for version in self._versions:
            layers: Iterable[PriceVersion | Override] = (version, *version.plans.values(), *version.accounts.values())
            yield from (price for each in layers for price in each.prices if price.period is not None)

    def _price_event(
        self, usage: Usage, counted: Mapping[CounterKey, Counter] | None, under: PriceVersion | None
    ) -> Rated | NoPrice | CountedFirst:
        missing = NoPrice(key=f"{_TYPE}{usage.type}")
        version = self.version_at(usage.occurred_at) if under is None else under
        if version is None:
            return missing
        began = periods(usage.type, occurred_at=usage.occurred_at, price_version=version, account=usage.account)
        keys = {price: (usage.partition, usage.account, price, at) for price, at in began.items()}
        if keys and counted is None:
            return CountedFirst(list(keys.values()))
        try:
            rated = rate_event(
                usage.type,
                _read_data(usage.data),
                occurred_at=usage.occurred_at,
                price_version=version,
                units=self._units,
                account=usage.account,
                counted={price: found for price, key in keys.items() if (found := (counted or {}).get(key))},
            )
        except NotMeasurable:
            rated = None
        if rated is None and any(each.type == usage.type for each in version.prices):
            # Not found again under this version, however often somebody looks.
            return NoPrice(key=f"{_LOOKED_AT}{version.id}/{usage.type}")
        return missing if rated is None else rated

    def priced_times(self, key: str) -> Sequence[Times]:
        """When use that is set aside under `key` must have happened to be worth a look; empty if there is no hope."""
        if key.startswith(_VERSION):
            return [ALWAYS] if key.removeprefix(_VERSION) in self._by_id else []
        found: list[Times] = []
        for version, until in pairwise([*self._versions, None]):
            if version is not None and self._may_price(version, key):
                end = None if until is None else until.effective_at
                if found and found[-1][1] == version.effective_at:
                    found[-1] = (found[-1][0], end)
                else:
                    found.append((version.effective_at, end))
        return found

    def _may_price(self, version: PriceVersion, key: str) -> bool:
        """Whether a version has what use waits for under a key."""
        if key.startswith(_TYPE):
            return any(each.type == key.removeprefix(_TYPE) for each in version.prices)
        if key.startswith(_LOOKED_AT):
            id, _, type = key.removeprefix(_LOOKED_AT).partition("/")
            return version.id != id and any(each.type == type for each in version.prices)
        name, _, missing = key.partition(" ")
        provider, _, model = name.partition("/")
        return version.covers(provider, model, missing.split(",") if missing else (), units=self._units)


def rate_in_order(
    usages: Iterable[Usage], *, book: PriceBook, counters: Mapping[CounterKey, Counter]
) -> tuple[dict[Key, Rated | NoPrice], dict[CounterKey, Counter]]:
    """What uses cost that are counted, one after the other in the order of their times; and the counters that moved."""
    now = dict(counters)
    found: dict[Key, Rated | NoPrice] = {}
    moved: dict[CounterKey, Counter] = {}
    for usage in sorted(usages, key=lambda usage: (usage.occurred_at, usage.source, usage.event_id)):
        price = book.price(usage, counted=now)
        assert not isinstance(price, CountedFirst)
        found[usage.key] = price
        if isinstance(price, Rated):
            for each in price.counting:
                key = (usage.partition, usage.account, each.price_id, each.period)
                now[key] = moved[key] = each.counter
    return found, moved


def _read_data(data: str) -> Mapping[str, Any]:
    """The data of an event. Numbers are what was written, to the last digit."""
    found = _DATA.decode(data)
    return found if isinstance(found, dict) else {}


def _units_of(version: PriceVersion) -> Iterator[str]:
    layers: Iterable[PriceVersion | Override] = (version, *version.plans.values(), *version.accounts.values())
    for each in layers:
        yield from (rate.unit for rates in each.rates.values() for rate in rates)
        yield from (price.unit for price in each.prices)
        yield from (surcharge.unit for surcharge in (*(each.markup or ()), *(each.own_key_fees or ())))


def is_new(version: PriceVersion, *, book: PriceBook, at: datetime, backdate: bool) -> bool:
    """Whether a version may be added to the book; False if it is there already.

    IdTaken, TimeTaken, InThePast, CountedOtherwise.
    """
    stored = book.find(version.id)
    if stored is not None:
        if stored.effective_at != version.effective_at or not difference(stored, version).is_empty:
            raise IdTaken(version)
        return False
    other = book.version_at(version.effective_at)
    if other is not None and other.effective_at == version.effective_at:
        raise TimeTaken(version, other)
    if not backdate and at - version.effective_at > LATE_MAX:
        raise InThePast(version, at=at)
    counted_as = {price.id: price.counted_as for price in version.prices}
    for each in book.versions:
        for price in each.prices:
            if counted_as.get(price.id, price.counted_as) != price.counted_as:
                raise CountedOtherwise(version, each, price.id)
    return True


@dataclass(frozen=True, slots=True)
class ChangedRate:
    """A rate of a model in two versions; None where a version has none for the quantity, unit and service tier."""

    quantity: str
    unit: str
    old: Rate | None
    new: Rate | None
    service_tier: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """What one version says other than another one, in the order of providers and models.

    `others`: what else is not the same, as places: `prices/renders`, `markup`, `plans/pro`, `accounts/acme`.
    """

    added: Mapping[Model, Sequence[Rate]]
    removed: Mapping[Model, Sequence[Rate]]
    changed: Mapping[Model, Sequence[ChangedRate]]
    others: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        """Whether both say the same."""
        return not (self.added or self.removed or self.changed or self.others)


def difference(old: PriceVersion | None, new: PriceVersion) -> Difference:
    """What `new` changes for use that `old` would price."""
    before: Mapping[Model, tuple[Rate, ...]] = old.rates if old is not None else {}
    return Difference(
        added={model: new.rates[model] for model in sorted(new.rates.keys() - before.keys())},
        removed={model: before[model] for model in sorted(before.keys() - new.rates.keys())},
        changed={
            model: changed
            for model in sorted(new.rates.keys() & before.keys())
            if (changed := _changed(before[model], new.rates[model]))
        },
        others=_others(old, new),
    )


def _changed(old: Iterable[Rate], new: Iterable[Rate]) -> list[ChangedRate]:
    before = {each.place: each for each in old}
    after = {each.place: each for each in new}
    return [
        ChangedRate(
            quantity=place[0], unit=place[1], old=before.get(place), new=after.get(place), service_tier=place[2]
        )
        for place in dict.fromkeys((*before, *after))
        if before.get(place) != after.get(place)
    ]


def _others(old: PriceVersion | None, new: PriceVersion) -> Sequence[str]:
    before, after = ({} if old is None else _places(old)), _places(new)
    return sorted(place for place in before.keys() | after.keys() if before.get(place) != after.get(place))


def _places(version: PriceVersion) -> dict[str, object]:
    """Everything in a version but the rates of models, by its place. What says nothing has none."""
    found: dict[str, object] = {f"prices/{price.id}": price for price in version.prices}
    found |= {"markup": version.markup} if version.markup else {}
    found |= {"own_key_fees": version.own_key_fees} if version.own_key_fees else {}
    for kind, overrides in (("plans", version.plans), ("accounts", version.accounts)):
        for name, override in overrides.items():
            members = sorted(account for account, plan in version.members.items() if kind == "plans" and plan == name)
            found[f"{kind}/{name}"] = (_comparable(override), members)
    return found


def _comparable(override: Override) -> object:
    """What an override says, in whatever order."""
    rates = {model: {each.place: each for each in rates} for model, rates in override.rates.items()}
    return rates, {price.id: price for price in override.prices}, override.markup, override.own_key_fees
