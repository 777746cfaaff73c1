"""What the ledger is asked, in its own words: amounts are integers of a unit's steps, ids are bare UUID text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from contracts.money import Unit

# hard: never below its floor, which is 0 or minus its overdraft. soft: lets it through and says so. unlimited: counts.
Policy = Literal["hard", "soft", "unlimited"]
GrantedKind = Literal["plan", "promo", "bonus", "purchase", "adjustment"]
Overdue = Literal["release", "charge_estimate"]
Period = Literal["day", "week", "month", "year"]
ClaimReason = Literal["refund", "dispute"]
ClaimState = Literal["open", "final", "void"]

# A charge that occurred before a lot expired may still use it so long after.
LATE_GRACE: Final = timedelta(hours=24)
# Money given back to a lot that has expired is valid so long.
RETURN_GRACE: Final = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Units:
    """The units of the catalogue. `mirrors`: per money unit the cap units that count what is paid in it."""

    by_name: Mapping[str, Unit]
    mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, units: Mapping[str, Unit]) -> "Units":
        """The units, with what mirrors what read off them."""
        mirrors: dict[str, tuple[str, ...]] = {}
        for unit in units.values():
            if unit.mirrors is not None:
                mirrors[unit.mirrors] = (*mirrors.get(unit.mirrors, ()), unit.name)
        return cls(units, mirrors)


class Scope(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is used."""

    provider: str
    model: str
    feature: str | None = None


class LotScope(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a lot is valid: one of each that is named. Nothing named: everywhere."""

    providers: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    def includes(self, used: Scope | None) -> bool:
        """Whether something used is inside. What is not known is outside."""
        if used is None:
            return False
        return (
            (not self.providers or used.provider in self.providers)
            and (not self.models or used.model in self.models)
            and (not self.features or used.feature in self.features)
        )


class Threshold(msgspec.Struct, frozen=True, omit_defaults=True):
    """A level of a wallet at or below which its owner is told: an amount, or a share of what its last grant made of it.

    Exactly one of the two is set. `percent` is from 1 to 100.
    """

    amount: int | None = None
    percent: int | None = None


class Rule(msgspec.Struct, frozen=True, omit_defaults=True):
    """A grant that renews itself: period `n` of it lasts from its n-th boundary to the next, and has one lot.

    Boundaries are `anchor` plus n times `every` periods, by the clock of `zone`; a month that has no such day ends on
    its last. Of the lot that ends, min(rollover_max, max(unheld remaining, rollover_min)) is added to the next one.
    `first_period` is the first that is granted, `end_period` the first that is not. From its first period on, the
    wallet has `policy`, `overdraft`, if they are given: set by the ledger, `terms_from` is the first in this form.
    """

    id: str
    unit: str
    amount: int
    period: Period
    anchor: datetime
    zone: str = "UTC"
    every: int = 1
    kind: GrantedKind = "plan"
    priority: int = 100
    rollover_min: int = 0
    rollover_max: int = 0
    scope: LotScope | None = None
    plan: str | None = None
    policy: Policy | None = None
    overdraft: int | None = None
    first_period: int = 0
    end_period: int | None = None
    terms_from: int | None = None


class WalletTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a wallet treats what it has not got, and of which levels its owner is told."""

    unit: str
    policy: Policy = "hard"
    overdraft: int = 0
    thresholds: tuple[Threshold, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAccount:
    """Open an account, those above it, and wallets of its own."""

    account: str
    wallets: tuple[WalletTerms, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SetWallet:
    """Change the terms of an open wallet."""

    account: str
    terms: WalletTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Add a lot to an open wallet. Without `occurred_at` it happened when it is recorded."""

    account: str
    unit: str
    amount: int
    kind: GrantedKind = "adjustment"
    priority: int = 100
    occurred_at: datetime | None = None
    reference: str | None = None
    effective_at: datetime | None = None
    expires_at: datetime | None = None
    scope: LotScope | None = None
    cost_basis: str | None = None
    origin: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VoidGrant:
    """Take back what is unheld of a lot now, and what is held as its holds end. What was spent stays spent."""

    account: str
    lot: str
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjust:
    """Correct a wallet by an amount, above or below zero. Below its floor it is refused, unless `force`: then owed."""

    account: str
    unit: str
    amount: int
    reason: str
    force: bool = False


class Leg(msgspec.Struct, frozen=True):
    """Between how much and how much of a unit a hold sets aside."""

    unit: str
    at_least: int
    at_most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceHold:
    """Set amounts aside on every wallet concerned, together or not at all."""

    hold: str
    account: str
    legs: tuple[Leg, ...]
    lifetime_seconds: int = 900
    overdue: Overdue = "release"
    scope: Scope | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendHold:
    """Give an open hold a later deadline, so many seconds from now, and set more aside: legs are what is added."""

    hold: str
    account: str
    lifetime_seconds: int
    legs: tuple[Leg, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseHold:
    """End a hold without a charge."""

    hold: str
    account: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveHold:
    """End a hold that is past its deadline, as it says itself. Asked by the sweeper alone."""

    hold: str
    account: str


class ChargeLine(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one use cost: pairs of unit and amount. (source, event_id, revision) is charged once.

    `final`: it ends the hold it names. `required`: it is a debit, and refused rather than owed. Without a scope it has
    its hold's.
    """

    source: str
    event_id: str
    revision: int = 0
    account: str
    occurred_at: datetime
    hold: str | None = None
    scope: Scope | None
    price_version: str
    own_key: bool = False
    amounts: tuple[tuple[str, int], ...]
    final: bool = True
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseCharge:
    """Give back what a charge line took, or the named amounts of it, to the very lots it took it from.

    `correction`: of metering, which wants it; `bundle`: the number of the one that says so.
    """

    account: str
    source: str
    event_id: str
    revision: int = 0
    amounts: tuple[tuple[str, int], ...] | None = None
    reason: str | None = None
    correction: str | None = None
    bundle: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Move available money to another account of the tree. The lots keep what they are."""

    account: str
    to_account: str
    unit: str
    amount: int
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimPayment:
    """A refund of a payment, or a dispute over it. Of one claim's states that of the highest revision counts."""

    account: str
    payment: str
    claim: str
    reason: ClaimReason
    state: ClaimState
    unit: str
    claimed: int
    revision: int = 0
    occurred_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRule:
    """Add a recurring grant to an open wallet, or replace the one of the same id from its next period on."""

    account: str
    rule: Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRule:
    """Let a recurring grant end with its current period."""

    account: str
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangePlan:
    """Replace all rules that belong to a plan by those of another. `at_period_end`: each when its period ends.

    At once, the unheld remaining of the old plan's lots is voided now, and what is held of them as it is released.
    """

    account: str
    plan: str
    rules: tuple[Rule, ...]
    at_period_end: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CatchUp:
    """Do what is due on an account's wallets and no more. Asked by the sweeper alone."""

    account: str


Command = (
    OpenAccount
    | SetWallet
    | Grant
    | VoidGrant
    | Adjust
    | PlaceHold
    | ExtendHold
    | ReleaseHold
    | ResolveHold
    | ChargeLine
    | ReverseCharge
    | Transfer
    | ClaimPayment
    | SetRule
    | EndRule
    | ChangePlan
    | CatchUp
)
