"""What is told of a wallet: its amounts, its lots, what ends and what is renewed."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel

from contracts.money import Unit, format_amount
from services.ledger.domain.commands import LotScope
from services.ledger.domain.entries import ASIDE_KINDS
from services.ledger.domain.state import Lot, RuleState, Wallet
from services.ledger.translate import full_id

# What is told of one wallet at most.
LOTS_SHOWN_MAX: Final = 1_000
ENDS_SHOWN_MAX: Final = 100


class ScopeView(BaseModel):
    """Where a lot is valid: one of each that is named. Nothing named: everywhere."""

    providers: list[str]
    models: list[str]
    features: list[str]


class LotView(BaseModel):
    """A lot of which something is left, or a debt, overage or uncapped use. `available` while it is valid only.

    `rule` and `period`: of the recurring grant it comes from, or whose period an overage is counted in.
    """

    lot: str
    kind: str
    priority: int
    granted: str
    posted: str
    held: str
    frozen: str
    available: str
    expired: str
    effective_at: datetime | None
    expires_at: datetime | None
    scope: ScopeView | None
    reference: str | None
    cost_basis: str | None
    origin: str | None
    rule: str | None
    period: int | None
    occurred_at: datetime
    recorded_at: datetime


class ExpiryView(BaseModel):
    """What expires unless it is used before."""

    lot: str
    at: datetime
    amount: str


class RenewalView(BaseModel):
    """The next grant of a rule: its amount, and what is added of the period before at most."""

    rule: str
    plan: str | None
    period: int
    at: datetime
    amount: str
    rollover_max: str


class HeldLotsView(BaseModel):
    """What an open hold had set aside on the wallet at the time."""

    hold: str
    held: str


class WalletView(BaseModel):
    """What an account has of a unit.

    `available` is what may be held or charged for one use or another: of lots that are valid, less `debt`. A hard
    wallet lets `overdraft` more be used. Aside from `posted`: `overage`, counted beyond what a cap had; `uncapped`,
    counted while the wallet was unlimited. Of the past, `policy`, `overdraft` and what is to come are not told, but the
    holds that were open. Told are at most the first 1,000 lots, 100 expiries, and 500 holds; the amounts are of all.
    """

    unit: str
    kind: str
    policy: str | None
    overdraft: str | None
    posted: str
    held: str
    frozen: str
    available: str
    debt: str
    overage: str
    uncapped: str
    lots: list[LotView]
    expiries: list[ExpiryView]
    renewals: list[RenewalView]
    holds: list[HeldLotsView] | None = None


def wallet_amounts(wallet: Wallet, at: datetime, unit: Unit) -> dict[str, Any]:
    """The terms of a wallet and its amounts at a time, by the names under which they are told."""
    return {
        "unit": unit.name,
        "kind": unit.kind,
        "policy": wallet.policy,
        "overdraft": format_amount(wallet.overdraft, unit),
        "posted": format_amount(wallet.posted, unit),
        "held": format_amount(wallet.held, unit),
        "frozen": format_amount(wallet.frozen, unit),
        "available": format_amount(wallet.available_anywhere(at), unit),
        "debt": format_amount(wallet.owed, unit),
        "overage": format_amount(wallet.overage, unit),
        "uncapped": format_amount(wallet.uncapped, unit),
    }


def wallet_view(wallet: Wallet, at: datetime, partition: int, units: Mapping[str, Unit]) -> WalletView:
    """A wallet at a time, with the lots of which something is left, in the order they are used."""
    unit = units[wallet.unit]
    left = [*wallet.burning(), *(lot for lot in wallet.lots.values() if lot.kind in _PSEUDO)]
    shown = [lot for lot in left if lot.posted or lot.held or lot.frozen]
    ends = sorted((lot for lot in shown if _ends(lot, at)), key=_end)
    renewals = sorted((rule for rule in wallet.rules.values() if not rule.is_over), key=RuleState.next_due)
    return WalletView.model_construct(
        **wallet_amounts(wallet, at, unit),
        lots=[_lot_view(lot, at, partition, unit) for lot in shown[:LOTS_SHOWN_MAX]],
        expiries=[
            ExpiryView.model_construct(
                lot=full_id("lot", partition, lot.id), at=_end(lot), amount=format_amount(lot.available, unit)
            )
            for lot in ends[:ENDS_SHOWN_MAX]
        ],
        renewals=[
            RenewalView.model_construct(
                rule=state.rule.id,
                plan=state.rule.plan,
                period=state.next_period,
                at=state.next_due(),
                amount=format_amount(state.rule.amount, unit),
                rollover_max=format_amount(state.rule.rollover_max, unit),
            )
            for state in renewals
        ],
        holds=None,
    )


_PSEUDO: Final = frozenset({"debt", *ASIDE_KINDS})


def _ends(lot: Lot, at: datetime) -> bool:
    return lot.expires_at is not None and lot.expires_at > at and lot.available > 0


def _end(lot: Lot) -> datetime:
    assert lot.expires_at is not None
    return lot.expires_at


def _lot_view(lot: Lot, at: datetime, partition: int, unit: Unit) -> LotView:
    available = lot.available if lot.is_valid(at) else 0
    return LotView.model_construct(
        lot=full_id("lot", partition, lot.id),
        kind=lot.kind,
        priority=lot.priority,
        granted=format_amount(lot.granted, unit),
        posted=format_amount(lot.posted, unit),
        held=format_amount(lot.held, unit),
        frozen=format_amount(lot.frozen, unit),
        available=format_amount(available, unit),
        expired=format_amount(lot.expired, unit),
        effective_at=lot.effective_at,
        expires_at=lot.expires_at,
        scope=None if lot.scope is None else _scope_view(lot.scope),
        reference=lot.reference,
        cost_basis=lot.cost_basis,
        origin=None if lot.origin is None else full_id("lot", partition, lot.origin),
        rule=lot.rule,
        period=lot.period,
        occurred_at=lot.occurred_at,
        recorded_at=lot.recorded_at,
    )


def _scope_view(scope: LotScope) -> ScopeView:
    return ScopeView.model_construct(
        providers=list(scope.providers), models=list(scope.models), features=list(scope.features)
    )
