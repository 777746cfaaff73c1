"""What the entries of one partition add up to: accounts, wallets, lots, holds. Changed by `evolve` alone.

What is tried out changes it, too; who does so tells it what will change, and it is as it was when that is undone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Any, Final, Literal, TypeVar

from services.ledger.domain.commands import (
    LATE_GRACE,
    ClaimReason,
    ClaimState,
    LotScope,
    Overdue,
    Policy,
    Rule,
    Scope,
    Threshold,
)
from services.ledger.domain.deadlines import Deadlines
from services.ledger.domain.entries import ASIDE_KINDS, PSEUDO_KINDS, STAND_INS, HeldLeg, LotKind
from services.ledger.domain.periods import boundary

Kept = TypeVar("Kept")
# expired: released at its deadline. estimated: its estimate was charged at its deadline.
Status = Literal["placed", "released", "expired", "settled", "estimated"]

# Within a priority and an expiry, what was given away is used before what was paid for.
_BURN_KINDS: Final[dict[LotKind, int]] = {"plan": 0, "promo": 1, "bonus": 2, "purchase": 3, "adjustment": 4}
NEVER: Final = datetime.max.replace(tzinfo=UTC)
_EVER: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True, kw_only=True)
class Lot:
    """One grant, or a pseudo-lot, whose posted is never above zero.

    `expired`: what has expired of it, less what late charges took of that. `void`: what is held of it will be voided;
    `voided`: what has been. Claims take of either what they would have taken had they come before.
    Of a payment's lot: `clawed` is what claims take of it in all, as yet; `clawed_spent` is what had been spent of that
    and was taken in its stead, as debt or overage, unless cancelled; `pending` is held, and taken as its holds end, and
    `pending_frozen` is held, and frozen as its holds end. Of a debt: what each lot has repaid of it.
    """

    id: str
    account: str
    unit: str
    kind: LotKind
    priority: int
    effective_at: datetime | None
    expires_at: datetime | None
    scope: LotScope | None
    reference: str | None
    cost_basis: str | None
    origin: str | None
    rule: str | None
    period: int | None
    granted: int
    occurred_at: datetime
    recorded_at: datetime
    batch: int
    position: int
    posted: int = 0
    held: int = 0
    frozen: int = 0
    expired: int = 0
    void: bool = False
    voided: int = 0
    clawed: int = 0
    clawed_spent: int = 0
    pending: int = 0
    pending_frozen: int = 0
    repaid: dict[str, int] = field(default_factory=dict)

    @property
    def available(self) -> int:
        """What may be held or charged while it is valid."""
        return self.posted - self.held - self.frozen

    @property
    def is_spent(self) -> bool:
        """Nothing of it is left, or owed. What counts a period, or all time, is never spent: there is one of it."""
        return not (self.posted or self.held or self.frozen or self.kind in ASIDE_KINDS)

    @property
    def is_remembered(self) -> bool:
        """Though spent, a late charge may ask for it: it says whose period it was, or may be revived."""
        return self.rule is not None or self.expired > 0

    @property
    def age(self) -> tuple[int, int]:
        """Orders the lots of a partition from the oldest."""
        return (self.batch, self.position)

    @property
    def burn_order(self) -> tuple[int, datetime, int, int, int]:
        """Priority, soonest expiry, kind, oldest."""
        return (self.priority, self.expires_at or NEVER, _BURN_KINDS[self.kind], self.batch, self.position)

    @property
    def use_order(self) -> tuple[object, ...]:
        """Burn order; pseudo-lots last, and of those what stands in for what was not there."""
        return (1, self.kind in STAND_INS, self.age) if self.kind in PSEUDO_KINDS else (0, self.burn_order)

    def is_valid(self, at: datetime) -> bool:
        """Whether it has started and not ended. It ends at `expires_at` exactly."""
        return (self.effective_at is None or self.effective_at <= at) and (
            self.expires_at is None or at < self.expires_at
        )

    def is_for(self, used: Scope | None) -> bool:
        """Whether it is for what is used."""
        return self.scope is None or self.scope.includes(used)


@dataclass(slots=True, kw_only=True)
class RuleState:
    """A recurring grant of a wallet, and the number of the period it grants next."""

    rule: Rule
    account: str
    next_period: int
    recorded_at: datetime
    batch: int
    position: int
    ended: bool = False
    # When its next period begins, once it was looked up.
    _due: datetime | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes of it."""
        end = self.rule.end_period
        return self.ended or (end is not None and self.next_period >= end)

    def next_due(self) -> datetime:
        """When its next period begins; at the end of time if there is none."""
        if self._due is None:
            self._due = NEVER if self.is_over else boundary(self.rule, self.next_period)
        return self._due

    def changed(self) -> None:
        """What was looked up is no longer so."""
        self._due = None


@dataclass(slots=True, kw_only=True)
class Wallet:
    """One account's holding of one unit.

    `posted`, `held`, `frozen` sum its lots and debts. Aside from them: `overage`, what a cap counted beyond what was
    there; `uncapped`, what was counted while it was unlimited. `owed`: of `posted`, the debts; `owing`: of `held`, what
    holds set aside that no lot had. `full`: its posted after what last came in. `low`: the levels its owner was told
    that it is at or below; None stands for exhausted.
    """

    account: str
    unit: str
    policy: Policy
    overdraft: int
    recorded_at: datetime
    batch: int
    position: int
    thresholds: tuple[Threshold, ...] = ()
    posted: int = 0
    held: int = 0
    frozen: int = 0
    overage: int = 0
    uncapped: int = 0
    owed: int = 0
    owing: int = 0
    full: int = 0
    low: frozenset[Threshold | None] = frozenset()
    lots: dict[str, Lot] = field(default_factory=dict)
    rules: dict[str, RuleState] = field(default_factory=dict)
    _burning: list[Lot] | None = None
    # The lots valid at any time in [since, until) and everywhere are all lots: sums need not look at each.
    _plain: tuple[datetime, datetime] | None = None
    # When something is due next, once it was looked up: asked before every decision.
    _due: datetime | None = None

    def add(self, lot: Lot) -> None:
        """Take a lot in."""
        self.lots[lot.id] = lot
        self._burning = None
        self._plain = None
        self._due = None

    def forget(self, lot: Lot) -> None:
        """Leave out a lot of which nothing is left."""
        self.lots.pop(lot.id, None)
        self._burning = None
        self._plain = None

    def forget_past(self, at: datetime) -> None:
        """Leave out spent lots that ended by a time."""
        for lot in list(self.lots.values()):
            if lot.expires_at is not None and lot.expires_at <= at and lot.is_spent:
                self.forget(lot)

    def next_due(self) -> datetime:
        """When a lot of which something is available ends, or a recurring grant is renewed; else the end of time."""
        if self._due is None:
            ends = (lot.expires_at or NEVER for lot in self.burning() if lot.available > 0)
            renewals = (rule.next_due() for rule in self.rules.values())
            self._due = min(chain(ends, renewals), default=NEVER)
        return self._due

    def moved(self, lot: Lot) -> None:
        """What is available of a lot that ends has changed. What is held or frozen of it does not expire."""
        if self._due is None or lot.expires_at is None:
            return
        if lot.available > 0:
            self._due = min(self._due, lot.expires_at)
        elif lot.expires_at == self._due:
            self._due = None

    def rule_changed(self, rule: RuleState) -> None:
        """A recurring grant was set, renewed or ended."""
        rule.changed()
        self._due = None

    def burning(self) -> list[Lot]:
        """Its lots in the order in which they are used up, whether valid or not."""
        if self._burning is None:
            granted = (lot for lot in self.lots.values() if lot.kind in _BURN_KINDS)
            self._burning = sorted(granted, key=lambda lot: lot.burn_order)
        return self._burning

    @property
    def counted(self) -> int:
        """All that is there, less all that was not."""
        return self.posted - self.overage - self.uncapped

    def available(self, at: datetime, used: Scope | None = None) -> int:
        """What may be set aside at a time for a use, above zero: of valid lots in scope, less what is owed."""
        since, until = self._plain or self._plain_between()
        if since <= at < until:
            return self.posted - self.held - self.frozen
        there = sum(lot.available for lot in self.burning() if lot.is_valid(at) and lot.is_for(used))
        return there - self.owed - self.owing

    def available_anywhere(self, at: datetime) -> int:
        """What may be set aside at a time for one use or another: of valid lots, less what is owed."""
        return sum(lot.available for lot in self.burning() if lot.is_valid(at)) - self.owed - self.owing

    def spendable(self, at: datetime, used: Scope | None = None) -> int:
        """How much a hold or debit may set aside before a hard wallet is at its floor."""
        return self.available(at, used) + self.overdraft

    def debts(self) -> list[Lot]:
        """What it owes, from the oldest."""
        if not self.owed:
            return []
        owed = (lot for lot in self.lots.values() if lot.kind == "debt" and lot.posted < 0)
        return sorted(owed, key=lambda lot: lot.age)

    def overage_lot(self, *, rule: str | None = None, period: int | None = None) -> Lot | None:
        """The pseudo-lot that counts what was beyond the cap in a period; without a rule, in all time."""
        return next(
            (lot for lot in self.lots.values() if lot.kind == "overage" and (lot.rule, lot.period) == (rule, period)),
            None,
        )

    def uncapped_lot(self) -> Lot | None:
        """The pseudo-lot that counts while the wallet is unlimited."""
        return next((lot for lot in self.lots.values() if lot.kind == "uncapped"), None)

    def _plain_between(self) -> tuple[datetime, datetime]:
        since, until = _EVER, NEVER
        for lot in self.burning():
            if lot.scope is not None:
                since = until = NEVER
                break
            since = max(since, lot.effective_at or _EVER)
            if lot.expires_at is not None:
                until = min(until, lot.expires_at)
        self._plain = (since, until)
        return self._plain


@dataclass(slots=True, kw_only=True)
class Account:
    """Who pays or is limited. `due_at`: when something was due next on its wallets when it was last stored."""

    id: str
    opened_at: datetime
    recorded_at: datetime
    batch: int
    position: int
    transaction: str
    due_at: datetime | None = None
    wallets: dict[str, Wallet] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Earmark:
    """What a hold set aside of one lot, what of that it still holds, and what was charged of it as an estimate."""

    account: str
    unit: str
    lot: str
    placed: int = 0
    held: int = 0
    estimated: int = 0


@dataclass(slots=True, kw_only=True)
class Hold:
    """Amounts set aside before work is done. One that ended before it was placed has no legs and no deadline."""

    id: str
    account: str
    status: Status
    expires_at: datetime | None
    overdue: Overdue
    legs: tuple[HeldLeg, ...]
    scope: Scope | None
    recorded_at: datetime
    transaction: str
    batch: int
    position: int
    ended_at: datetime | None = None
    earmarks: dict[tuple[str, str, str], Earmark] = field(default_factory=dict)

    def is_overdue(self, at: datetime) -> bool:
        """Whether it is open at its deadline or later: it ends as it says itself before it is asked for."""
        return self.status == "placed" and self.expires_at is not None and self.expires_at <= at

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

    @property
    def disputed(self) -> int:
        """What open claims are about, all of them: it may be more than was paid."""
        return sum(claim.claimed for claim in self.claims.values() if claim.state == "open")


@dataclass(slots=True, kw_only=True)
class PastLine:
    """A charge line that was taken before, what it moved of each lot, and what of that has been given back since.

    `split` and `reversed` are by (account, unit, lot): what the line took of each, and what has been given back.
    """

    source: str
    event_id: str
    revision: int
    account: str
    occurred_at: datetime
    hold: str | None
    amounts: tuple[tuple[str, int], ...]
    split: dict[tuple[str, str, str], int]
    reversed: dict[tuple[str, str, str], int] = field(default_factory=dict)


@dataclass(slots=True)
class Changes:
    """What has been touched since the projections were last written."""

    accounts: dict[str, Account] = field(default_factory=dict)
    wallets: dict[tuple[str, str], Wallet] = field(default_factory=dict)
    rules: dict[tuple[str, str, str], RuleState] = field(default_factory=dict)
    lots: dict[str, Lot] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    earmarks: dict[tuple[str, str, str, str], Earmark] = field(default_factory=dict)
    payments: dict[tuple[str, str], Payment] = field(default_factory=dict)
    claims: dict[tuple[str, str, str], Claim] = field(default_factory=dict)


CHANGED: Final = tuple(each.name for each in fields(Changes))


@dataclass(slots=True)
class Trial:
    """Something that is tried out: the changes before it, and what was before it, in the order in which that changed.

    Of an object whose fields changed their values, of a dict a key and its value. `noted`: the objects, by identity.
    """

    changes: Changes
    before: list[tuple[Any, object, Any]] = field(default_factory=list)
    noted: set[int] = field(default_factory=set)


@dataclass(slots=True)
class PartitionState:
    """The accounts and holds of a partition: all of them in a replay, those that are in use in a running service.

    An account that is here is here whole, but for lots of which nothing is left. Payments, by their id and account, are
    read whenever a command names one: with them all lots granted for them, spent or not. `lines` are the charge lines
    that a command names, by (source, event id, revision), with the lots they took from, spent or not.
    """

    accounts: dict[str, Account] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    payments: dict[tuple[str, str], Payment] = field(default_factory=dict)
    lines: dict[tuple[str, str, int], PastLine] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)
    deadlines: Deadlines = field(default_factory=Deadlines)
    # What is being tried out, the innermost last.
    trials: list[Trial] = field(default_factory=list)

    def wallet(self, account: str, unit: str) -> Wallet | None:
        """The open wallet of an account, if it has one of the unit."""
        found = self.accounts.get(account)
        return None if found is None else found.wallets.get(unit)

    def earmarked(self, hold: Hold) -> list[tuple[Earmark, Lot]]:
        """What a hold still holds, or was charged as its estimate, and the lots: by wallet, as they are used up.

        In one order, whether it was read or has stayed in memory: what comes back first repays first.
        """
        found = [
            (each, self.accounts[each.account].wallets[each.unit].lots[each.lot])
            for each in hold.earmarks.values()
            if each.held or each.estimated
        ]
        if len(found) > 1:
            found.sort(key=lambda each: (each[1].account, each[1].unit, each[1].use_order))
        return found

    def lots(self) -> Iterator[Lot]:
        """Every lot."""
        for account in self.accounts.values():
            for wallet in account.wallets.values():
                yield from wallet.lots.values()

    def written(self, recorded_at: datetime | None = None) -> None:
        """The changes are in the projections. What has ended need not stay in memory.

        What a late charge may ask for stays until the grace before `recorded_at`, as it is when an account is read.
        """
        for lot in self.changes.lots.values():
            wallet = self.wallet(lot.account, lot.unit)
            if lot.is_spent and wallet is not None and not lot.is_remembered:
                wallet.forget(lot)
        if recorded_at is not None:
            for wallet in self.changes.wallets.values():
                wallet.forget_past(recorded_at - LATE_GRACE)
        for hold in self.changes.holds.values():
            if hold.status != "placed":
                self.holds.pop(hold.id, None)
                self.deadlines.forget(hold)
        self.deadlines.compact(self.holds)
        self.payments.clear()
        self.lines.clear()
        self.changes = Changes()

    def shrink(self, *, accounts_max: int, holds_max: int) -> None:
        """Forget the older half of what is more than the bound. It is read again when it is needed."""
        _halve(self.accounts, accounts_max)
        for hold in _halve(self.holds, holds_max):
            self.deadlines.lose(hold)

    def try_out(self) -> Trial:
        """What is changed from here on is kept or undone by `keep` or `undo` of what it returns. May be nested."""
        trial = Trial(self.changes)
        self.changes = Changes()
        self.trials.append(trial)
        return trial

    def keep(self, trial: Trial) -> None:
        """What was tried out, the last that was begun, holds; unless what it is part of is undone."""
        self._end(trial)
        for name in CHANGED:
            getattr(trial.changes, name).update(getattr(self.changes, name))
        self.changes = trial.changes
        if self.trials:
            self.trials[-1].before += trial.before

    def undo(self, trial: Trial) -> None:
        """What was tried out, the last that was begun, has never been."""
        self._end(trial)
        for thing, key, before in reversed(trial.before):
            if not isinstance(thing, dict):
                for name, value in zip(thing.__slots__, before, strict=True):
                    setattr(thing, name, value)
            elif before is _ABSENT:
                thing.pop(key, None)
            else:
                thing[key] = before
        self.changes = trial.changes

    def changing(self, thing: Any) -> None:
        """To be told before the fields of an object that is part of it change."""
        if self.trials and id(thing) not in (trial := self.trials[-1]).noted:
            # Nothing else has its identity meanwhile: it is kept.
            trial.noted.add(id(thing))
            trial.before.append((thing, None, [getattr(thing, name) for name in thing.__slots__]))

    def setting(self, things: dict[Any, Any], key: object) -> None:
        """To be told before a key is set in a dict that is part of it, or taken out."""
        if self.trials:
            self.trials[-1].before.append((things, key, things.get(key, _ABSENT)))

    def _end(self, trial: Trial) -> None:
        last = self.trials.pop()
        assert last is trial


# In the place of what was not in a dict.
_ABSENT: Final = object()


def _halve(kept: dict[str, Kept], bound: int) -> list[Kept]:
    if len(kept) <= bound:
        return []
    return [kept.pop(key) for key in list(islice(kept, len(kept) - bound // 2))]
