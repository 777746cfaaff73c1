"""Opening accounts and wallets, and changing the terms of a wallet."""

from typing import Final

from contracts.accounts import path
from contracts.money import AMOUNT_MAX, Unit
from services.ledger.domain.commands import OpenAccount, Policy, SetWallet, Threshold, Units, WalletTerms
from services.ledger.domain.concerned import Place, not_open
from services.ledger.domain.entries import Move, WalletOpened
from services.ledger.domain.errors import InvalidTerms, Refusal, UnknownUnit, WalletPolicyDiffers
from services.ledger.domain.state import PartitionState

# As many as a command may ask for.
THRESHOLDS_MAX: Final = 16


def decide_open_account(
    state: PartitionState, command: OpenAccount, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """Open what is not open yet: the path from its root, then wallets. Open wallets keep their terms.

    UnknownUnit, InvalidTerms, WalletPolicyDiffers.
    """
    moves = [
        Move(kind="account_opened", account=account, occurred_at=place.recorded_at)
        for account in reversed(path(command.account))
        if account not in state.accounts
    ]
    asked: dict[str, WalletTerms] = {}
    for terms in command.wallets:
        if refusal := _check_terms(units, terms):
            return refusal
        wallet = state.wallet(command.account, terms.unit)
        before = asked.get(terms.unit)
        known = wallet or before
        if known is not None and known.policy != terms.policy:
            return WalletPolicyDiffers(command.account, terms.unit, known.policy, terms.policy)
        if before is not None and before != terms:
            return InvalidTerms(terms.unit, "a wallet is named once, or with the same terms")
        asked[terms.unit] = terms
        if known is None:
            moves.append(
                Move(
                    kind="wallet_opened",
                    account=command.account,
                    occurred_at=place.recorded_at,
                    unit=terms.unit,
                    details=_details(terms),
                )
            )
    return moves


def decide_set_wallet(state: PartitionState, command: SetWallet, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Give an open wallet other terms, all of them. What it holds and owes stays.

    UnknownUnit, InvalidTerms, AccountNotOpen, WalletNotOpen.
    """
    terms = command.terms
    if refusal := _check_terms(units, terms):
        return refusal
    wallet = state.wallet(command.account, terms.unit)
    if wallet is None:
        return not_open(state, command.account, terms.unit)
    if (wallet.policy, wallet.overdraft, wallet.thresholds) == (terms.policy, terms.overdraft, terms.thresholds):
        return []
    return [
        Move(
            kind="wallet_set",
            account=wallet.account,
            occurred_at=place.recorded_at,
            unit=wallet.unit,
            details=_details(terms),
        )
    ]


def overdraft_problem(unit: Unit, policy: Policy, overdraft: int) -> str | None:
    """Why a wallet of a unit cannot have an overdraft, as a clause."""
    if not 0 <= overdraft <= AMOUNT_MAX:
        return "an overdraft is at least 0 and at most the largest amount"
    if overdraft and (policy != "hard" or unit.kind != "money"):
        return "only a hard wallet of money has an overdraft"
    return None


def _check_terms(units: Units, terms: WalletTerms) -> UnknownUnit | InvalidTerms | None:
    unit = units.by_name.get(terms.unit)
    if unit is None:
        return UnknownUnit(terms.unit)
    problem = overdraft_problem(unit, terms.policy, terms.overdraft)
    if problem is None and len(terms.thresholds) > THRESHOLDS_MAX:
        problem = f"a wallet has at most {THRESHOLDS_MAX} thresholds"
    if problem is None and len(set(terms.thresholds)) < len(terms.thresholds):
        problem = "a threshold is named once"
    for threshold in terms.thresholds:
        problem = problem or _threshold_problem(threshold)
    return None if problem is None else InvalidTerms(terms.unit, problem)


def _threshold_problem(threshold: Threshold) -> str | None:
    if (threshold.amount is None) == (threshold.percent is None):
        return "a threshold is either an amount or a percentage"
    if threshold.amount is not None and not 0 <= threshold.amount <= AMOUNT_MAX:
        return "a threshold is at least 0 and at most the largest amount"
    if threshold.percent is not None and not 1 <= threshold.percent <= 100:
        return "a percentage is from 1 to 100"
    return None


def _details(terms: WalletTerms) -> WalletOpened:
    return WalletOpened(policy=terms.policy, overdraft=terms.overdraft, thresholds=terms.thresholds)
