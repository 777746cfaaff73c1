"""What is due on wallets at a time: lots expire, recurring grants are renewed. Each effective at its own time."""

from collections.abc import Iterable, Iterator
from datetime import datetime

from services.ledger.domain.commands import Rule, Units
from services.ledger.domain.concerned import BALANCE_MAX, Place
from services.ledger.domain.debts import debts_after, repayments
from services.ledger.domain.entries import (
    PSEUDO_KINDS,
    LotGranted,
    LotVoided,
    Move,
    WalletOpened,
    contra_move,
    granted_by,
)
from services.ledger.domain.periods import boundary
from services.ledger.domain.state import NEVER, Lot, PartitionState, RuleState, Wallet


def next_due(state: PartitionState, accounts: Iterable[str]) -> datetime | None:
    """When something is due next on the wallets of accounts, if ever. Looked up, not computed, when nothing changed."""
    due = NEVER
    for name in accounts:
        account = state.accounts.get(name)
        if account is not None:
            for wallet in account.wallets.values():
                due = min(due, wallet.next_due())
    return None if due == NEVER else due


def decide_due(state: PartitionState, accounts: Iterable[str], *, units: Units, place: Place) -> list[Move]:
    """The moves of the earliest thing that is due by `place.recorded_at`; none if nothing is.

    Called again after they were recorded, until it returns none. What is due at the same time has an order, too: by
    account and unit; first what merely expires, then each renewal by itself. So it is all the same how late it is done.
    """
    wallets = [
        wallet
        for name in sorted(set(accounts))
        if name in state.accounts
        for _, wallet in sorted(state.accounts[name].wallets.items())
    ]
    wallet = min(wallets, key=Wallet.next_due, default=None)
    if wallet is None or wallet.next_due() > place.recorded_at:
        return []
    at = wallet.next_due()
    renewals = [rule for _, rule in sorted(wallet.rules.items()) if rule.next_due() == at]
    renewed = [lot for rule in renewals if (lot := _previous_lot(wallet, rule)) is not None]
    ended = [lot for lot in wallet.burning() if lot.available > 0 and lot.expires_at == at and lot not in renewed]
    if ended:
        return [
            move
            for lot in sorted(ended, key=lambda lot: lot.age)
            # One that was granted after its end, or filled again, was there until it was.
            for move in expiry_moves(lot, lot.available, units=units, occurred_at=max(at, lot.occurred_at))
        ]
    return list(_renewal(wallet, renewals[0], at, units=units, place=place))


def _renewal(wallet: Wallet, state: RuleState, at: datetime, *, units: Units, place: Place) -> Iterator[Move]:
    """A period ends: what is unheld of its lot expires, and is rolled over as far as the rule says. The next begins.

    It cannot be refused: more than the wallet can count is not granted.
    """
    rule, period, unit = state.rule, state.next_period, units.by_name[wallet.unit]
    if period == (rule.first_period if rule.terms_from is None else rule.terms_from):
        yield from terms_moves(wallet, rule, at)
    before = _previous_lot(wallet, state)
    remaining = 0 if before is None else max(before.available, 0)
    if before is not None and remaining:
        yield from expiry_moves(before, remaining, units=units, occurred_at=at)
    rolled_over = min(rule.rollover_max, max(remaining, rule.rollover_min)) if period > rule.first_period else 0
    amount = max(0, min(rule.amount + rolled_over, BALANCE_MAX - (wallet.posted - remaining)))
    lot = place.new_lot(0)
    yield Move(
        kind="lot_granted",
        account=wallet.account,
        occurred_at=at,
        unit=wallet.unit,
        lot=lot,
        lot_kind=rule.kind,
        posted=amount,
        details=LotGranted(
            priority=rule.priority,
            effective_at=at,
            expires_at=boundary(rule, period + 1),
            scope=rule.scope,
            rule=rule.id,
            period=period,
            rolled_over=rolled_over,
        ),
    )
    if amount:
        contra = granted_by(rule.kind)
        yield contra_move("lot_granted", contra, account=wallet.account, unit=unit, posted=-amount, occurred_at=at)
        owed = debts_after(wallet, [])
        yield from repayments(wallet, lot=lot, lot_kind=rule.kind, amount=amount, owed=owed, occurred_at=at)


def _previous_lot(wallet: Wallet, state: RuleState) -> Lot | None:
    """The lot of the period before the one that a rule grants next, if anything is left of it."""
    of_rule = (state.rule.id, state.next_period - 1)
    return next(
        (lot for lot in wallet.burning() if (lot.rule, lot.period) == of_rule and lot.origin is None and not lot.void),
        None,
    )


def terms_moves(wallet: Wallet, rule: Rule, at: datetime) -> list[Move]:
    """The wallet has the rule's policy and overdraft from now on, if they are others than it has."""
    policy = rule.policy or wallet.policy
    overdraft = wallet.overdraft if rule.overdraft is None else rule.overdraft
    if policy != "hard":
        overdraft = 0
    if (policy, overdraft) == (wallet.policy, wallet.overdraft):
        return []
    return [
        Move(
            kind="wallet_set",
            account=wallet.account,
            occurred_at=at,
            unit=wallet.unit,
            details=WalletOpened(policy=policy, overdraft=overdraft, thresholds=wallet.thresholds),
        )
    ]


def released_moves(lot: Lot, amount: int, *, units: Units, occurred_at: datetime) -> list[Move]:
    """What else becomes of an amount that is available again of a lot: of a void one it is voided, of one that has
    ended by `occurred_at` it expires, else nothing.

    For what is released, unfrozen or given back, in the same transaction; less what claims take of it first.
    """
    if amount <= 0 or lot.kind in PSEUDO_KINDS:
        return []
    if lot.void:
        return void_moves(lot, amount, units=units, occurred_at=occurred_at)
    if lot.expires_at is not None and lot.expires_at <= occurred_at:
        return expiry_moves(lot, amount, units=units, occurred_at=occurred_at)
    return []


def void_moves(lot: Lot, amount: int, *, units: Units, occurred_at: datetime, reason: str | None = None) -> list[Move]:
    """Void an amount of a lot, and the lot: of nothing, what is held of it will be."""
    voided = Move(
        kind="lot_voided",
        account=lot.account,
        occurred_at=occurred_at,
        unit=lot.unit,
        lot=lot.id,
        lot_kind=lot.kind,
        posted=-amount,
        details=LotVoided(reason),
    )
    if not amount:
        return [voided]
    unit = units.by_name[lot.unit]
    contra = granted_by(lot.kind)
    return [
        voided,
        contra_move("lot_voided", contra, account=lot.account, unit=unit, posted=amount, occurred_at=occurred_at),
    ]


def expiry_moves(lot: Lot, amount: int, *, units: Units, occurred_at: datetime) -> list[Move]:
    """Let an amount of a lot expire."""
    unit = units.by_name[lot.unit]
    return [
        Move(
            kind="lot_expired",
            account=lot.account,
            occurred_at=occurred_at,
            unit=lot.unit,
            lot=lot.id,
            lot_kind=lot.kind,
            posted=-amount,
        ),
        contra_move("lot_expired", "@expired", account=lot.account, unit=unit, posted=amount, occurred_at=occurred_at),
    ]
