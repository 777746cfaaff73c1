"""What the entries of one partition add up to: accounts, wallets, lots, holds. Changed by `evolve` alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Final, Literal, TypeVar

from services.ledger.domain.commands import ClaimReason, ClaimState, Overdue, Policy
from services.ledger.domain.entries import HeldLeg, LotKind

Kept = TypeVar("Kept")
Status = Literal["placed", "released", "settled"]

# Within a priority and an expiry, what was given away is used before what was paid for.
_BURN_KINDS: Final[dict[LotKind, int]] = {"plan": 0, "promo": 1, "bonus": 2, "purchase": 3, "adjustment": 4}
_NEVER: Final = datetime.max.replace(tzinfo=UTC)


@dataclass(slots=True, kw_only=True)
class Lot:
    """One grant, or the pseudo-lot of a debt or an overage, whose posted is never above zero.

    Of a payment's lot: `clawed` is what claims take of it in all, as yet; `clawed_spent` is what had been spent of that
    and was taken in its stead, as debt or overage, unless cancelled; `pending` is held, and taken as its holds end.
    """

    id: str
    account: str
    unit: str
    kind: LotKind
    priority: int
    effective_at: datetime | None
    expires_at: datetime | None
    scope: str | None
    reference: str | None
    cost_basis: str | None
    origin: str | None
    granted: int
    occurred_at: datetime
    recorded_at: datetime
    batch: int
    position: int
    posted: int = 0
    held: int = 0
    frozen: int = 0
    clawed: int = 0
    clawed_spent: int = 0
    pending: int = 0

    @property
    def available(self) -> int:
        """What may be held or charged."""
        return self.posted - self.held - self.frozen

    @property
    def is_spent(self) -> bool:
        """Nothing of it is left, or owed."""
        return not (self.posted or self.held or self.frozen)

    @property
    def age(self) -> tuple[int, int]:
        """Orders the lots of a partition from the oldest."""
        return (self.batch, self.position)

    @property
    def burn_order(self) -> tuple[int, datetime, int, int, int]:
        """Priority, soonest expiry, kind, oldest."""
        return (self.priority, self.expires_at or _NEVER, _BURN_KINDS[self.kind], self.batch, self.position)


@dataclass(slots=True, kw_only=True)
class Wallet:
    """One account's holding of one unit. `overage`: what a cap counted beyond what was there; it is not in `posted`."""

    account: str
    unit: str
    policy: Policy
    overdraft: int
    recorded_at: datetime
    batch: int
    position: int
    posted: int = 0
    held: int = 0
    frozen: int = 0
    overage: int = 0
    lots: dict[str, Lot] = field(default_factory=dict)
    _burning: list[Lot] | None = None

    @property
    def available(self) -> int:
        """What a hold may still set aside above zero."""
        return self.posted - self.held - self.frozen

    def add(self, lot: Lot) -> None:
        """Take a lot in."""
        self.lots[lot.id] = lot
        self._burning = None

    def forget(self, lot: Lot) -> None:
        """Leave out a lot of which nothing is left."""
        self.lots.pop(lot.id, None)
        self._burning = None

    def burning(self) -> list[Lot]:
        """Its lots in the order in which they are used up."""
        if self._burning is None:
            granted = (lot for lot in self.lots.values() if lot.kind in _BURN_KINDS)
            self._burning = sorted(granted, key=lambda lot: lot.burn_order)
        return self._burning

    def debts(self) -> list[Lot]:
        """What it owes, from the oldest."""
        owed = (lot for lot in self.lots.values() if lot.kind == "debt" and lot.posted < 0)
        return sorted(owed, key=lambda lot: lot.age)

    def overage_lot(self) -> Lot | None:
        """The pseudo-lot that counts what was beyond the cap."""
        return next((lot for lot in self.lots.values() if lot.kind == "overage"), None)


@dataclass(slots=True, kw_only=True)
class Account:
    """Who pays or is limited."""

    id: str
    opened_at: datetime
    recorded_at: datetime
    batch: int
    position: int
    transaction: str
    wallets: dict[str, Wallet] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Earmark:
    """What a hold set aside of one lot, and what of that it still holds."""

    account: str
    unit: str
    lot: str
    placed: int = 0
    held: int = 0


@dataclass(slots=True, kw_only=True)
class Hold:
    """Amounts set aside before work is done. One that ended before it was placed has no legs and no deadline."""

    id: str
    account: str
    status: Status
    expires_at: datetime | None
    overdue: Overdue
    legs: tuple[HeldLeg, ...]
    recorded_at: datetime
    transaction: str
    batch: int
    position: int
    ended_at: datetime | None = None
    earmarks: dict[tuple[str, str, str], Earmark] = field(default_factory=dict)

    def leg(self, unit: str) -> HeldLeg | None:
        """What it says about a unit, if anything."""
        return next((leg for leg in self.legs if leg.unit == unit), None)


@dataclass(slots=True, kw_only=True)
class Claim:
    """A refund or a dispute as it stands."""

    id: str
    reason: ClaimReason
    state: ClaimState
    claimed: int
    revision: int
    occurred_at: datetime
    recorded_at: datetime
    transaction: str
    batch: int
    position: int


@dataclass(slots=True, kw_only=True)
class Payment:
    """What was granted to an account for a payment, and the claims on it. Either may come first.

    `unit` is that of its first purchase or claim; until then it is null. `paid` sums its purchases in that unit.
    """

    id: str
    account: str
    recorded_at: datetime
    batch: int
    position: int
    unit: str | None = None
    paid: int = 0
    claims: dict[str, Claim] = field(default_factory=dict)

    @property
    def claimed(self) -> int:
        """What has gone back for good, by all claims: it may be more than was paid."""
        return sum(claim.claimed for claim in self.claims.values() if claim.state == "final")


@dataclass(slots=True)
class Changes:
    """What has been touched since the projections were last written."""

    accounts: dict[str, Account] = field(default_factory=dict)
    wallets: dict[tuple[str, str], Wallet] = field(default_factory=dict)
    lots: dict[str, Lot] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    earmarks: dict[tuple[str, str, str, str], Earmark] = field(default_factory=dict)
    payments: dict[tuple[str, str], Payment] = field(default_factory=dict)
    claims: dict[tuple[str, str, str], Claim] = field(default_factory=dict)


@dataclass(slots=True)
class PartitionState:
    """The accounts and holds of a partition: all of them in a replay, those that are in use in a running service.

    An account that is here is here whole, but for lots of which nothing is left. Payments, by their id and account, are
    read whenever a command names one: with them all lots granted for them, spent or not.
    """

    accounts: dict[str, Account] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    payments: dict[tuple[str, str], Payment] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)

    def wallet(self, account: str, unit: str) -> Wallet | None:
        """The open wallet of an account, if it has one of the unit."""
        found = self.accounts.get(account)
        return None if found is None else found.wallets.get(unit)

    def lots(self) -> Iterator[Lot]:
        """Every lot."""
        for account in self.accounts.values():
            for wallet in account.wallets.values():
                yield from wallet.lots.values()

    def written(self) -> None:
        """The changes are in the projections. What has ended need not stay in memory."""
        for lot in self.changes.lots.values():
            wallet = self.wallet(lot.account, lot.unit)
            if lot.is_spent and wallet is not None:
                wallet.forget(lot)
        for hold in self.changes.holds.values():
            if hold.status != "placed":
                self.holds.pop(hold.id, None)
        self.payments.clear()
        self.changes = Changes()

    def shrink(self, *, accounts_max: int, holds_max: int) -> None:
        """Forget the older half of what is more than the bound. It is read again when it is needed."""
        _halve(self.accounts, accounts_max)
        _halve(self.holds, holds_max)


def _halve(kept: dict[str, Kept], bound: int) -> None:
    if len(kept) > bound:
        for key in list(islice(kept, len(kept) - bound // 2)):
            del kept[key]
