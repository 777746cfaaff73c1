"""Transfers of available money within a tree. What arrives is what it was: lots keep their kind, scope and end."""

import msgspec

from contracts.accounts import root
from services.ledger.domain.attempt import Attempt
from services.ledger.domain.commands import Transfer, Units
from services.ledger.domain.concerned import BALANCE_MAX, Place, check_amounts, not_open
from services.ledger.domain.debts import repay
from services.ledger.domain.entries import LotGranted, Move, Noted
from services.ledger.domain.errors import InsufficientFunds, InvalidAmount, InvalidTransfer, Refusal
from services.ledger.domain.state import Lot, PartitionState, Wallet


def decide_transfer(state: PartitionState, command: Transfer, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Move available money, lot by lot in burn order, to another account's wallet, where it repays what is owed first.

    UnknownUnit, InvalidAmount, InvalidTransfer, AccountNotOpen, WalletNotOpen, InsufficientFunds.
    """
    refusal = check_amounts(units, [(command.unit, command.amount)]) or _check_transfer(command, units)
    if refusal is not None:
        return refusal
    source = state.wallet(command.account, command.unit)
    if source is None:
        return not_open(state, command.account, command.unit)
    target = state.wallet(command.to_account, command.unit)
    if target is None:
        return not_open(state, command.to_account, command.unit)
    available = source.available_anywhere(place.recorded_at)
    if command.amount > available:
        return InsufficientFunds(command.account, command.unit, command.amount, available)
    if command.amount > BALANCE_MAX - target.posted:
        return InvalidAmount(command.unit, "the wallet would have more than it can count")
    with Attempt(state, units=units, place=place) as attempt:
        return _transfer(attempt, source, target, command)


def _check_transfer(command: Transfer, units: Units) -> InvalidAmount | InvalidTransfer | None:
    if not command.amount:
        return InvalidAmount(command.unit, "a transfer is more than 0")
    if units.by_name[command.unit].kind != "money":
        return InvalidTransfer(command.account, command.to_account, "only money can be moved, a cap cannot")
    if command.account == command.to_account:
        return InvalidTransfer(command.account, command.to_account, "they are one account")
    if root(command.account) != root(command.to_account):
        return InvalidTransfer(command.account, command.to_account, "they are not of one tree")
    return None


def _transfer(attempt: Attempt, source: Wallet, target: Wallet, command: Transfer) -> list[Move]:
    at = attempt.place.recorded_at
    left = command.amount
    for lot in source.burning():
        part = min(left, lot.available) if lot.is_valid(at) else 0
        if part <= 0:
            continue
        left -= part
        new = attempt.new_lot()
        taken = Move(
            kind="transferred",
            account=source.account,
            occurred_at=at,
            unit=source.unit,
            lot=lot.id,
            lot_kind=lot.kind,
            posted=-part,
            details=Noted(command.reason),
        )
        attempt.do(
            taken,
            msgspec.structs.replace(taken, account=target.account, lot=new, posted=part, details=_details(lot)),
        )
        came = attempt.wallet(target.account, target.unit).lots[new]
        repay(attempt, came, part, occurred_at=at)
    return attempt.moves


def _details(lot: Lot) -> LotGranted:
    """What the lot is that it becomes."""
    return LotGranted(
        priority=lot.priority,
        reference=lot.reference,
        effective_at=lot.effective_at,
        expires_at=lot.expires_at,
        scope=lot.scope,
        cost_basis=lot.cost_basis,
        origin=lot.id,
    )
