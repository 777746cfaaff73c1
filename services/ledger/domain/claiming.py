"""Claims on a payment, as they are made: refunds and disputes."""

from services.ledger.domain import claims
from services.ledger.domain.attempt import Attempt
from services.ledger.domain.commands import ClaimPayment, Units
from services.ledger.domain.concerned import AHEAD_MAX, BALANCE_MAX, Place, check_amounts, not_open
from services.ledger.domain.entries import Move, PaymentClaimed
from services.ledger.domain.errors import InvalidAmount, InvalidTime, PaymentDiffers, Refusal
from services.ledger.domain.reversing import restore
from services.ledger.domain.state import PartitionState, Payment


def decide_claim_payment(
    state: PartitionState, command: ClaimPayment, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """Note what a claim says, then take of the payment's lots what all claims on it come to, freeze, or give back.

    No moves: it says nothing new. UnknownUnit, InvalidAmount, InvalidTime, AccountNotOpen, WalletNotOpen,
    PaymentDiffers.
    """
    payment = state.payments.get((command.payment, command.account))
    if refusal := _check_claim(state, command, payment, units=units, place=place):
        return refusal
    content = (command.reason, command.state, command.claimed)
    if claims.is_unchanged(payment, command.claim, revision=command.revision, content=content):
        return []
    occurred_at = command.occurred_at or place.recorded_at
    said = Move(
        kind="payment_claimed",
        account=command.account,
        occurred_at=occurred_at,
        unit=command.unit,
        details=PaymentClaimed(
            payment=command.payment,
            claim=command.claim,
            reason=command.reason,
            state=command.state,
            claimed=command.claimed,
            revision=command.revision,
        ),
    )
    with Attempt(state, units=units, place=place) as attempt:
        attempt.do(said)
        payment = attempt.payment(command.payment, command.account)
        assert payment is not None
        restore(attempt, claims.settle(attempt, payment, occurred_at=occurred_at))
        for _, wallet in attempt.wallets():
            if not -BALANCE_MAX <= wallet.posted - wallet.overage <= BALANCE_MAX:
                return InvalidAmount(wallet.unit, "the wallet would owe or have more than it can count")
        return attempt.moves


def _check_claim(
    state: PartitionState, command: ClaimPayment, payment: Payment | None, *, units: Units, place: Place
) -> Refusal | None:
    if refusal := check_amounts(units, [(command.unit, command.claimed)]):
        return refusal
    if command.occurred_at is not None and command.occurred_at > place.recorded_at + AHEAD_MAX:
        return InvalidTime(command.occurred_at, place.recorded_at)
    if state.wallet(command.account, command.unit) is None:
        return not_open(state, command.account, command.unit)
    if payment is None:
        elsewhere = any(of == command.payment and other.paid for (of, _), other in state.payments.items())
        return PaymentDiffers(command.payment, command.account) if elsewhere else None
    if payment.unit not in {None, command.unit}:
        return InvalidAmount(command.unit, f"the payment {command.payment} is counted in {payment.unit}")
    return None
