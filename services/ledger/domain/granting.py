"""Adding lots, taking them back, and correcting a wallet by hand."""

from collections.abc import Iterator
from datetime import datetime
from itertools import count

import msgspec

from services.ledger.domain import claims
from services.ledger.domain.attempt import Attempt
from services.ledger.domain.commands import Adjust, Grant, Units, VoidGrant
from services.ledger.domain.concerned import AHEAD_MAX, BALANCE_MAX, Place, beyond, check_amounts, not_open, uncapped
from services.ledger.domain.debts import debts_after, repay, repayments
from services.ledger.domain.due import void_moves
from services.ledger.domain.entries import (
    PSEUDO_KINDS,
    LotGranted,
    LotKind,
    Move,
    Noted,
    contra_move,
    granted_by,
    payment_of,
)
from services.ledger.domain.errors import (
    AccountNotOpen,
    InsufficientFunds,
    InvalidAmount,
    InvalidTime,
    Refusal,
    UnknownLot,
)
from services.ledger.domain.reversing import restore
from services.ledger.domain.state import PartitionState, Wallet


def decide_grant(state: PartitionState, command: Grant, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Add a lot; claims on its payment that came before take their part, then what is owed is repaid, oldest first.

    One that has not started yet repays nothing. UnknownUnit, InvalidAmount, InvalidTime, AccountNotOpen, WalletNotOpen.
    """
    occurred_at = command.occurred_at or place.recorded_at
    refusal = check_amounts(units, [(command.unit, command.amount)]) or _check_times(
        command, occurred_at, place.recorded_at
    )
    if refusal is not None:
        return refusal
    wallet = state.wallet(command.account, command.unit)
    if wallet is None:
        return not_open(state, command.account, command.unit)
    if not 0 < command.amount <= BALANCE_MAX - wallet.posted:
        return InvalidAmount(command.unit, "a grant is more than 0, and no more than its wallet can still count")
    lot = place.new_lot(0)
    granted = Move(
        kind="lot_granted",
        account=wallet.account,
        occurred_at=occurred_at,
        unit=wallet.unit,
        lot=lot,
        lot_kind=command.kind,
        posted=command.amount,
        details=LotGranted(
            priority=command.priority,
            reference=command.reference,
            effective_at=command.effective_at,
            expires_at=command.expires_at,
            scope=command.scope,
            cost_basis=command.cost_basis,
            origin=command.origin,
        ),
    )
    contra = contra_move(
        "lot_granted",
        granted_by(command.kind),
        account=wallet.account,
        unit=units.by_name[command.unit],
        posted=-command.amount,
        occurred_at=occurred_at,
    )
    if _is_claimed(state, command):
        return _granted_after_claims(state, granted, contra, command, units=units, place=place)
    moves = [granted, contra]
    if command.effective_at is None or command.effective_at <= place.recorded_at:
        owed = debts_after(wallet, moves)
        moves += repayments(
            wallet, lot=lot, lot_kind=command.kind, amount=command.amount, owed=owed, occurred_at=occurred_at
        )
    return moves


def decide_void_grant(state: PartitionState, command: VoidGrant, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Void what is available of a lot; what is held or frozen of it will be, as that ends. No moves: it is void.

    AccountNotOpen, UnknownLot.
    """
    account = state.accounts.get(command.account)
    if account is None:
        return AccountNotOpen(command.account)
    lot = next((wallet.lots[command.lot] for wallet in account.wallets.values() if command.lot in wallet.lots), None)
    if lot is None or lot.kind in PSEUDO_KINDS or not (lot.posted or lot.held or lot.frozen):
        return UnknownLot(command.lot, command.account)
    if lot.void:
        return []
    return void_moves(lot, lot.available, units=units, occurred_at=place.recorded_at, reason=command.reason)


def decide_adjust(state: PartitionState, command: Adjust, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Add a lot of what is above zero, which repays what is owed; take what is below zero of what is available.

    What is not there is refused of a hard wallet, unless it is forced: then it is owed, or a cap's overage.
    UnknownUnit, InvalidAmount, AccountNotOpen, WalletNotOpen, InsufficientFunds.
    """
    if refusal := check_amounts(units, [(command.unit, abs(command.amount))]):
        return refusal
    wallet = state.wallet(command.account, command.unit)
    if wallet is None:
        return not_open(state, command.account, command.unit)
    if not command.amount:
        return InvalidAmount(command.unit, "an adjustment is above or below 0")
    if command.amount > 0:
        return _added(state, command, units=units, place=place)
    return _taken(wallet, command, units=units, place=place)


def _added(state: PartitionState, command: Adjust, *, units: Units, place: Place) -> list[Move] | Refusal:
    added = Grant(account=command.account, unit=command.unit, amount=command.amount)
    granted = decide_grant(state, added, units=units, place=place)
    if isinstance(granted, list):
        # The lot's own entry says what the lot is; the other side says why.
        granted[1] = msgspec.structs.replace(granted[1], details=Noted(command.reason))
    return granted


def _taken(wallet: Wallet, command: Adjust, *, units: Units, place: Place) -> list[Move] | Refusal:
    amount = -command.amount
    available = wallet.available_anywhere(place.recorded_at) + wallet.overdraft
    if wallet.policy == "hard" and amount > available and not command.force:
        return InsufficientFunds(command.account, command.unit, amount, available)
    if wallet.posted - wallet.overage - wallet.uncapped - amount < -BALANCE_MAX:
        return InvalidAmount(command.unit, "the wallet would owe more than it can count")
    noted = Noted(command.reason, forced=command.force)
    return list(_adjusted(wallet, amount, noted, units=units, place=place))


def _check_times(command: Grant, occurred_at: datetime, recorded_at: datetime) -> InvalidTime | None:
    if occurred_at > recorded_at + AHEAD_MAX:
        return InvalidTime(occurred_at, recorded_at)
    if command.expires_at is None:
        return None
    if command.expires_at <= recorded_at:
        return InvalidTime(command.expires_at, recorded_at, "has passed, it is")
    begins = max(occurred_at, command.effective_at or occurred_at)
    if command.expires_at <= begins:
        return InvalidTime(command.expires_at, begins, "is no end of what begins later or then")
    return None


def _is_claimed(state: PartitionState, command: Grant) -> bool:
    """Whether claims on the payment that a lot is granted for came before it."""
    of_payment = None if command.origin is not None else payment_of(command.kind, command.reference)
    payment = None if of_payment is None else state.payments.get((of_payment, command.account))
    return payment is not None and bool(payment.claims)


def _granted_after_claims(
    state: PartitionState, granted: Move, contra: Move, command: Grant, *, units: Units, place: Place
) -> list[Move]:
    """Claims take their part of the lot as it is granted, and, as more is paid, of those granted before."""
    with Attempt(state, units=units, place=place) as attempt:
        lot_id = attempt.new_lot()
        attempt.do(granted, contra)
        assert command.reference is not None
        payment = attempt.payment(command.reference, command.account)
        assert payment is not None
        restore(attempt, claims.settle(attempt, payment, occurred_at=granted.occurred_at))
        lot = attempt.wallet(command.account, command.unit).lots[lot_id]
        repay(attempt, lot, lot.available, occurred_at=granted.occurred_at)
        return attempt.moves


def _adjusted(wallet: Wallet, amount: int, noted: Noted, *, units: Units, place: Place) -> Iterator[Move]:
    unit = units.by_name[wallet.unit]
    at = place.recorded_at

    def taken(lot: str, kind: LotKind, posted: int) -> Move:
        return Move(
            kind="adjusted",
            account=wallet.account,
            occurred_at=at,
            unit=wallet.unit,
            lot=lot,
            lot_kind=kind,
            posted=posted,
            details=noted,
        )

    left = amount
    for lot in wallet.burning():
        part = min(left, lot.available) if lot.is_valid(at) else 0
        if part > 0:
            left -= part
            yield taken(lot.id, lot.kind, -part)
    if left:
        new_lots = map(place.new_lot, count())
        if wallet.policy == "unlimited":
            pseudo = uncapped(wallet, new_lots)
        else:
            pseudo = beyond(wallet, unit, at=at, occurred_at=at, new_lots=new_lots)
        yield from pseudo.opened
        yield taken(pseudo.lot, pseudo.kind, -left)
    yield contra_move("adjusted", "@adjustment", account=wallet.account, unit=unit, posted=amount, occurred_at=at)
