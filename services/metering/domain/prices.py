"""The price book: which version holds at the time of a use, and what the use costs under it."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from contracts.money import Unit
from contracts.pricing import PriceVersion, Rated, Unpriced, rate
from services.metering.domain.usage import Usage


@dataclass(frozen=True, slots=True)
class NoPrice:
    """The price book has no price for a use. It is set aside under `model`, never charged 0."""

    model: str


class PriceBook:
    """Price versions in the order of their times. Of two with one time, or one id, there can be none."""

    def __init__(self, versions: Iterable[PriceVersion], *, units: Mapping[str, Unit]) -> None:
        """Raises ValueError if the versions contradict each other, or price in a unit that does not exist."""
        self._versions = sorted(versions, key=lambda version: version.effective_at)
        self._times = [version.effective_at for version in self._versions]
        self._units = dict(units)
        ids = {version.id for version in self._versions}
        if len(ids) != len(self._versions) or len(set(self._times)) != len(self._times):
            raise ValueError(f"two price versions share an id or a time: {[version.id for version in self._versions]}")
        for version in self._versions:
            unknown = {each.unit for rates in version.rates.values() for each in rates} - self._units.keys()
            if unknown:
                raise ValueError(f"price version {version.id} prices in unknown units: {sorted(unknown)}")

    @property
    def units(self) -> Mapping[str, Unit]:
        """The units prices are in."""
        return self._units

    def version_at(self, time: datetime) -> PriceVersion | None:
        """The version with the latest `effective_at` at or before `time`; None before the first."""
        place = bisect_right(self._times, time)
        return self._versions[place - 1] if place else None

    def price(self, usage: Usage) -> Rated | NoPrice:
        """What a use costs under the version of its own time, whenever it is reported."""
        version = self.version_at(usage.occurred_at)
        if version is None:
            return NoPrice(model=_name(usage))
        try:
            return rate(usage.used, price_version=version, units=self._units)
        except Unpriced:
            return NoPrice(model=_name(usage))


def _name(usage: Usage) -> str:
    return f"{usage.used.provider}/{usage.used.model}"
