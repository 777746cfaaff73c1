"""A version of the price book, and what of it counts for which account."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from contracts.accounts import path
from contracts.money import Unit
from contracts.pricing.plans import SERVICE_TIER, Plan
from contracts.pricing.terms import STANDARD_TIERS, Override, OwnPrice, Rate, Surcharge
from contracts.usage import MODEL_USED

# Whose terms are those of the version itself.
_BASE: Final[tuple[str | None, str | None]] = (None, None)


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
    _terms: dict[tuple[str | None, str | None], "Terms"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _overrides: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_overrides", bool(self.accounts or self.members))

    def terms(self, account: str | None) -> "Terms":
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
            found = self._terms[key] = Terms(self, layers)
        return found

    def covers(self, provider: str, model: str, quantities: Sequence[str], *, units: Mapping[str, Unit]) -> bool:
        """Whether a model has a price, and one for quantities that `Unpriced` names. No override changes that."""
        tier = next((each.removeprefix(SERVICE_TIER) for each in quantities if each.startswith(SERVICE_TIER)), None)
        plan = self.terms(None).plan(provider, model, tier)
        return plan is not None and not plan.uncovered(quantities, units)

    def has_tier(self, provider: str, model: str, service_tier: str) -> bool:
        """Whether a model has prices of its own for a service tier."""
        return any(each.service_tier == service_tier for each in self.rates.get((provider, model), ()))


class Terms:
    """What counts for some accounts: a version, and what overrides it, the strongest last."""

    def __init__(self, version: PriceVersion, layers: Sequence[Override]) -> None:
        self._version, self._layers = version, layers
        self.price_version = version.id
        self._plans: dict[object, Plan] = {}
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

    def plan(self, provider: str, model: str, service_tier: str | None) -> Plan | None:
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
        plan = Plan(tuple(by_place.values()), service_tier)
        if service_tier is None or self._version.has_tier(provider, model, service_tier):
            self._plans[key] = plan
        return plan

    def own_prices(self, type: str) -> Sequence[OwnPrice]:
        """The own prices for a type of events."""
        return self._prices.get(type, ())
