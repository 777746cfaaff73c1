"""The price book: which version holds for a use, what the use costs under it, and which versions may be added."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Final

from contracts.money import Unit
from contracts.pricing import PriceVersion, Quantity, Rate, Rated, Unpriced, rate
from services.metering.domain.usage import Usage

# How far back a version may take effect without being called backdated: it was under way.
LATE_MAX: Final = timedelta(minutes=1)

Model = tuple[str, str]
# From the first moment on, up to the second; None: for ever.
Times = tuple[datetime | None, datetime | None]

ALWAYS: Final[Times] = (None, None)
_VERSION: Final = "version:"


@dataclass(frozen=True, slots=True)
class NoPrice:
    """The price book has no price for a use. It is set aside under `key`, never charged 0.

    `key` is `provider/model`; or `version:<id>`, if the use is pinned to a version that is not known (yet); or
    `version:<id>/provider/model`, if that version is known and has no price for the model, and thus never will.
    """

    key: str


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
            unknown = {each.unit for rates in version.rates.values() for each in rates} - self._units.keys()
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

    def price(self, usage: Usage) -> Rated | NoPrice:
        """What a use costs under the version it is pinned to, else under that of its own time, whenever reported."""
        model, pinned = f"{usage.used.provider}/{usage.used.model}", usage.used.price_version
        if pinned is None:
            version, missing = self.version_at(usage.occurred_at), model
        else:
            version = self._by_id.get(pinned)
            missing = f"{_VERSION}{pinned}" if version is None else f"{_VERSION}{pinned}/{model}"
        if version is None:
            return NoPrice(key=missing)
        try:
            return rate(usage.used, price_version=version, units=self._units)
        except Unpriced:
            return NoPrice(key=missing)

    def priced_times(self, key: str) -> Sequence[Times]:
        """When use that is set aside under `key` must have happened to be worth a look; empty if there is no hope."""
        if key.startswith(_VERSION):
            return [ALWAYS] if key.removeprefix(_VERSION) in self._by_id else []
        provider, _, model = key.partition("/")
        found: list[Times] = []
        for version, until in pairwise([*self._versions, None]):
            if version is not None and (provider, model) in version.rates:
                end = None if until is None else until.effective_at
                if found and found[-1][1] == version.effective_at:
                    found[-1] = (found[-1][0], end)
                else:
                    found.append((version.effective_at, end))
        return found


def is_new(version: PriceVersion, *, book: PriceBook, at: datetime, backdate: bool) -> bool:
    """Whether a version may be added to the book; False if it is there already. IdTaken, TimeTaken, InThePast."""
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
    return True


@dataclass(frozen=True, slots=True)
class ChangedRate:
    """A rate of a model in two versions; None where a version has none for the quantity and unit."""

    quantity: Quantity
    unit: str
    old: Rate | None
    new: Rate | None


@dataclass(frozen=True, slots=True)
class Difference:
    """What one version says other than another one, in the order of providers and models."""

    added: Mapping[Model, Sequence[Rate]]
    removed: Mapping[Model, Sequence[Rate]]
    changed: Mapping[Model, Sequence[ChangedRate]]

    @property
    def is_empty(self) -> bool:
        """Whether both say the same."""
        return not (self.added or self.removed or self.changed)


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
    )


def _changed(old: Iterable[Rate], new: Iterable[Rate]) -> list[ChangedRate]:
    before = {(each.quantity, each.unit): each for each in old}
    after = {(each.quantity, each.unit): each for each in new}
    return [
        ChangedRate(quantity=place[0], unit=place[1], old=before.get(place), new=after.get(place))
        for place in dict.fromkeys((*before, *after))
        if before.get(place) != after.get(place)
    ]
