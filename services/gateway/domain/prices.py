"""The gateway's copy of metering's price book: which version holds at a time, and whose a model is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from contracts.money import Unit
from contracts.pricing import PriceVersion
from services.gateway.domain.errors import ModelNotPriced, NoProvider, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedModel:
    """A model that may be called: whose it is, and the price version that a call of it is pinned to.

    `account`: who calls it, for prices that are not those of everybody.
    """

    provider: str
    model: str
    version: PriceVersion
    account: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBook:
    """Units by name, and the versions in order of `effective_at`."""

    units: Mapping[str, Unit]
    versions: Sequence[PriceVersion]

    def version_at(self, at: datetime) -> PriceVersion:
        """The version that holds at a time. Unavailable if none does yet."""
        for version in reversed(self.versions):
            if version.effective_at <= at:
                return version
        raise Unavailable(reason="no version of the price book is in force yet")

    def find(self, model: str, *, at: datetime, providers: Sequence[str]) -> PricedModel:
        """Who serves a model: the first of `providers` that it has a price for. ModelNotPriced, NoProvider."""
        version = self.version_at(at)
        for provider in providers:
            if (provider, model) in version.rates:
                return PricedModel(provider=provider, model=model, version=version)
        others = tuple(sorted(provider for provider, name in version.rates if name == model))
        if others:
            raise NoProvider(model=model, providers=others)
        raise ModelNotPriced(model=model, price_version=version.id)

    def models(self, *, at: datetime, providers: Sequence[str]) -> list[PricedModel]:
        """Every model that can be called, one per name, in order of names."""
        version = self.version_at(at)
        found: dict[str, PricedModel] = {}
        for provider in providers:
            for owner, model in version.rates:
                if owner == provider:
                    found.setdefault(model, PricedModel(provider=provider, model=model, version=version))
        return [found[name] for name in sorted(found)]
