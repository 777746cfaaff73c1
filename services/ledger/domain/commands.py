"""What the ledger is asked, in its own words: amounts are integers of a unit's steps, ids are bare UUID text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import msgspec

from contracts.money import Unit

Policy = Literal["hard"]
GrantedKind = Literal["plan", "promo", "bonus", "purchase", "adjustment"]
Overdue = Literal["release"]
ClaimReason = Literal["refund", "dispute"]
ClaimState = Literal["final", "void"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAccount:
    """Open an account, those above it, and wallets of its own: pairs of unit and policy."""

    account: str
    wallets: tuple[tuple[str, Policy], ...] = ()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseHold:
    """End a hold without a charge."""

    hold: str
    account: str


class Scope(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was used."""

    provider: str
    model: str
    feature: str | None = None


class ChargeLine(msgspec.Struct, frozen=True, kw_only=True):
    """What one use cost: pairs of unit and amount. (source, event_id, revision) is charged once."""

    source: str
    event_id: str
    revision: int = 0
    account: str
    occurred_at: datetime
    hold: str | None = None
    scope: Scope
    price_version: str
    own_key: bool = False
    amounts: tuple[tuple[str, int], ...]


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


Command = OpenAccount | Grant | PlaceHold | ReleaseHold | ChargeLine | ClaimPayment
