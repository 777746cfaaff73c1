"""The one place where state changes: an entry is added to what came before it. Live service and replay use it alike."""

from typing import Final, assert_never

import msgspec

from services.ledger.domain.commands import Threshold
from services.ledger.domain.entries import (
    ASIDE_KINDS,
    PSEUDO_KINDS,
    BalanceCrossed,
    ClaimFrozen,
    ClawedBack,
    DebtRepaid,
    Entry,
    HoldExtended,
    HoldPlaced,
    LotGranted,
    LotKind,
    PaymentClaimed,
    RuleEnded,
    RuleSet,
    WalletOpened,
    is_contra,
    payment_of,
)
from services.ledger.domain.state import (
    Account,
    Claim,
    Earmark,
    Hold,
    Lot,
    PartitionState,
    Payment,
    RuleState,
    Status,
    Wallet,
)


class BrokenJournal(Exception):
    """An entry does not fit the state before it: the journal or the state is not what it should be."""


def evolve(state: PartitionState, entry: Entry) -> None:  # noqa: PLR0912, PLR0915 - one case for each kind of entry
    """Add `entry` to `state`. Raises BrokenJournal if it cannot follow."""
    if is_contra(entry.account):
        return
    match entry.kind:
        # First, as most are.
        case "charged" | "reversed" | "adjusted":
            if entry.lot is not None:
                _add(state, entry)
        case "account_opened":
            _open_account(state, entry)
        case "wallet_opened":
            _open_wallet(state, entry)
        case "wallet_set":
            _set_wallet(state, entry)
        case "rule_set":
            _set_rule(state, entry)
        case "rule_ended":
            _end_rule(state, entry)
        case "lot_granted":
            _grant_lot(state, entry)
            _add(state, entry)
            _came_in(state, entry)
        case "lot_opened":
            _open_pseudo_lot(state, entry)
        case "lot_expired" | "lot_revived":
            _add(state, entry).expired -= entry.posted
        case "lot_voided":
            lot = _add(state, entry)
            lot.void = True
            lot.voided -= entry.posted
        case "debt_repaid":
            _repay(state, entry)
        case "transferred":
            if isinstance(entry.details, LotGranted):
                _grant_lot(state, entry)
                _add(state, entry)
                _came_in(state, entry)
            else:
                _add(state, entry)
        case "hold_placed":
            if isinstance(entry.details, HoldPlaced):
                _place_hold(state, entry, entry.details)
            if entry.lot is not None:
                _add(state, entry)
        case "hold_extended":
            if isinstance(entry.details, HoldExtended):
                _extend_hold(state, entry, entry.details)
            if entry.lot is not None:
                _add(state, entry)
        case "hold_released" | "hold_expired" | "hold_settled" | "hold_estimated" | "estimate_reversed":
            if entry.lot is not None:
                _add(state, entry)
            _end_hold(state, entry, _ENDED[entry.kind])
        case "payment_claimed":
            _claim(state, entry)
        case "clawed_back" | "given_back":
            _claw(state, entry)
        case "claim_frozen":
            _freeze(state, entry)
        case "balance_crossed":
            _cross(state, entry)
        case _:
            assert_never(entry.kind)


_ENDED: Final[dict[str, Status]] = {
    "hold_released": "released",
    "hold_expired": "expired",
    "hold_settled": "settled",
    "hold_estimated": "estimated",
    # What it really cost is charged in the same transaction.
    "estimate_reversed": "settled",
}


def _open_account(state: PartitionState, entry: Entry) -> None:
    if entry.account in state.accounts:
        raise BrokenJournal(f"account {entry.account} is opened twice, at {_place(entry)}")
    account = Account(
        id=entry.account,
        opened_at=entry.occurred_at,
        recorded_at=entry.recorded_at,
        batch=entry.batch,
        position=entry.position,
        transaction=entry.transaction,
    )
    state.setting(state.accounts, account.id)
    state.accounts[account.id] = account
    state.changes.accounts[account.id] = account


def _open_wallet(state: PartitionState, entry: Entry) -> None:
    account = state.accounts.get(entry.account)
    if account is None or entry.unit is None or not isinstance(entry.details, WalletOpened):
        raise BrokenJournal(f"a wallet is opened on no account, at {_place(entry)}")
    if entry.unit in account.wallets:
        raise BrokenJournal(f"wallet {entry.account} {entry.unit} is opened twice, at {_place(entry)}")
    wallet = Wallet(
        account=entry.account,
        unit=entry.unit,
        policy=entry.details.policy,
        overdraft=entry.details.overdraft,
        thresholds=entry.details.thresholds,
        recorded_at=entry.recorded_at,
        batch=entry.batch,
        position=entry.position,
    )
    state.setting(account.wallets, wallet.unit)
    account.wallets[wallet.unit] = wallet
    state.changes.wallets[wallet.account, wallet.unit] = wallet


def _set_wallet(state: PartitionState, entry: Entry) -> None:
    wallet = _wallet(state, entry)
    if not isinstance(entry.details, WalletOpened):
        raise BrokenJournal(f"a wallet is given no terms, at {_place(entry)}")
    state.changing(wallet)
    wallet.policy = entry.details.policy
    wallet.overdraft = entry.details.overdraft
    wallet.thresholds = entry.details.thresholds
    wallet.low &= {None, *entry.details.thresholds}
    state.changes.wallets[wallet.account, wallet.unit] = wallet


def _set_rule(state: PartitionState, entry: Entry) -> None:
    wallet = _wallet(state, entry)
    if not isinstance(entry.details, RuleSet):
        raise BrokenJournal(f"a rule is set without saying which, at {_place(entry)}")
    state.setting(wallet.rules, entry.details.rule.id)
    rule = wallet.rules[entry.details.rule.id] = RuleState(
        rule=entry.details.rule,
        account=wallet.account,
        next_period=entry.details.next_period,
        recorded_at=entry.recorded_at,
        batch=entry.batch,
        position=entry.position,
    )
    _rule_changed(state, wallet, rule)


def _end_rule(state: PartitionState, entry: Entry) -> None:
    wallet = _wallet(state, entry)
    rule = wallet.rules.get(entry.details.rule) if isinstance(entry.details, RuleEnded) else None
    if rule is None or not isinstance(entry.details, RuleEnded):
        raise BrokenJournal(f"a rule ends that there is not, at {_place(entry)}")
    state.changing(rule)
    if entry.details.end_period is None:
        rule.ended = True
    else:
        rule.rule = msgspec.structs.replace(rule.rule, end_period=entry.details.end_period)
    _rule_changed(state, wallet, rule)


def _rule_changed(state: PartitionState, wallet: Wallet, rule: RuleState) -> None:
    state.changing(wallet)
    wallet.rule_changed(rule)
    state.changes.rules[wallet.account, wallet.unit, rule.rule.id] = rule
    state.changes.wallets[wallet.account, wallet.unit] = wallet


def _grant_lot(state: PartitionState, entry: Entry) -> None:
    details = entry.details
    if entry.lot_kind is None or not isinstance(details, LotGranted):
        raise BrokenJournal(f"a grant does not say what lot it adds, at {_place(entry)}")
    wallet = _wallet(state, entry)
    lot = _new_lot(state, wallet, entry, kind=entry.lot_kind, details=details, granted=entry.posted)
    if details.rule is not None and details.period is not None and entry.kind == "lot_granted":
        rule = wallet.rules.get(details.rule)
        if rule is None or rule.next_period != details.period:
            raise BrokenJournal(f"a period is granted out of its turn, at {_place(entry)}")
        state.changing(rule)
        rule.next_period = details.period + 1
        _rule_changed(state, wallet, rule)
    of_payment = None if details.origin is not None else payment_of(lot.kind, lot.reference)
    if of_payment is not None:
        payment = _payment(state, entry, of_payment)
        if lot.kind == "purchase" and payment.unit in {None, lot.unit}:
            state.changing(payment)
            payment.unit = lot.unit
            payment.paid += lot.granted


def _came_in(state: PartitionState, entry: Entry) -> None:
    """What levels in percent are counted of."""
    wallet = _wallet(state, entry)
    state.changing(wallet)
    wallet.full = wallet.posted


def _new_lot(
    state: PartitionState, wallet: Wallet, entry: Entry, *, kind: LotKind, details: LotGranted, granted: int
) -> Lot:
    if entry.lot is None or entry.lot in wallet.lots:
        raise BrokenJournal(f"a lot is added twice or has no id, at {_place(entry)}")
    lot = Lot(
        id=entry.lot,
        account=wallet.account,
        unit=wallet.unit,
        kind=kind,
        priority=details.priority,
        effective_at=details.effective_at,
        expires_at=details.expires_at,
        scope=details.scope,
        reference=details.reference,
        cost_basis=details.cost_basis,
        origin=details.origin,
        rule=details.rule,
        period=details.period,
        granted=granted,
        occurred_at=entry.occurred_at,
        recorded_at=entry.recorded_at,
        batch=entry.batch,
        position=entry.position,
    )
    state.changing(wallet)
    state.setting(wallet.lots, lot.id)
    wallet.add(lot)
    return lot


def _open_pseudo_lot(state: PartitionState, entry: Entry) -> None:
    if entry.lot_kind is None or not isinstance(entry.details, LotGranted):
        raise BrokenJournal(f"a lot is opened without saying which, at {_place(entry)}")
    lot = _new_lot(state, _wallet(state, entry), entry, kind=entry.lot_kind, details=entry.details, granted=0)
    state.changes.lots[lot.id] = lot


def _new_pseudo_lot(state: PartitionState, wallet: Wallet, entry: Entry) -> Lot:
    """What is taken or set aside beyond what is there makes a pseudo-lot; nothing else is from nowhere."""
    if entry.kind not in _FROM_NOWHERE or entry.lot_kind not in PSEUDO_KINDS:
        raise BrokenJournal(f"lot {entry.lot} is moved before it is there, at {_place(entry)}")
    assert entry.lot_kind is not None
    details = _PSEUDO_LOT
    if entry.lot_kind == "debt" and isinstance(entry.details, ClawedBack):
        # It says in whose stead it is owed: it is cancelled if the claim is.
        details = LotGranted(priority=0, reference=entry.details.payment, origin=entry.details.lot)
    return _new_lot(state, wallet, entry, kind=entry.lot_kind, details=details, granted=0)


_PSEUDO_LOT: Final = LotGranted(priority=0)
_FROM_NOWHERE: Final = frozenset({"charged", "adjusted", "clawed_back", "hold_placed", "hold_extended"})


def _repay(state: PartitionState, entry: Entry) -> None:
    lot = _add(state, entry)
    details = entry.details
    if not isinstance(details, DebtRepaid):
        raise BrokenJournal(f"a debt is repaid without saying which, at {_place(entry)}")
    if lot.id == details.debt:
        state.setting(lot.repaid, details.lot)
        repaid = lot.repaid.get(details.lot, 0) + entry.posted
        if repaid:
            lot.repaid[details.lot] = repaid
        else:
            lot.repaid.pop(details.lot, None)


def _place_hold(state: PartitionState, entry: Entry, details: HoldPlaced) -> None:
    if entry.hold is None or entry.hold in state.holds:
        raise BrokenJournal(f"hold {entry.hold} is placed twice, at {_place(entry)}")
    state.setting(state.holds, entry.hold)
    state.holds[entry.hold] = Hold(
        id=entry.hold,
        account=details.account,
        status="placed",
        expires_at=details.expires_at,
        overdue=details.overdue,
        legs=details.legs,
        scope=details.scope,
        recorded_at=entry.recorded_at,
        transaction=entry.transaction,
        batch=entry.batch,
        position=entry.position,
    )
    state.changes.holds[entry.hold] = state.holds[entry.hold]
    state.deadlines.note(state.holds[entry.hold])


def _extend_hold(state: PartitionState, entry: Entry, details: HoldExtended) -> None:
    hold = None if entry.hold is None else state.holds.get(entry.hold)
    if hold is None:
        raise BrokenJournal(f"hold {entry.hold} is extended before it is placed, at {_place(entry)}")
    state.changing(hold)
    hold.expires_at = details.expires_at
    hold.legs = details.legs
    state.changes.holds[hold.id] = hold
    state.deadlines.note(hold)


def _end_hold(state: PartitionState, entry: Entry, status: Status) -> None:
    if entry.hold is None:
        raise BrokenJournal(f"no hold is named where one ends, at {_place(entry)}")
    hold = state.holds.get(entry.hold)
    if hold is None:
        # It ends before it was placed: from now on it cannot be.
        state.setting(state.holds, entry.hold)
        hold = state.holds[entry.hold] = Hold(
            id=entry.hold,
            account=entry.account,
            status="placed",
            expires_at=None,
            overdue="release",
            legs=(),
            scope=None,
            recorded_at=entry.recorded_at,
            transaction=entry.transaction,
            batch=entry.batch,
            position=entry.position,
        )
    state.changing(hold)
    hold.status = status
    hold.ended_at = entry.recorded_at
    state.changes.holds[hold.id] = hold


def _payment(state: PartitionState, entry: Entry, of_payment: str) -> Payment:
    key = (of_payment, entry.account)
    payment = state.payments.get(key)
    if payment is None:
        state.setting(state.payments, key)
        payment = state.payments[key] = Payment(
            id=of_payment,
            account=entry.account,
            recorded_at=entry.recorded_at,
            batch=entry.batch,
            position=entry.position,
        )
    state.changes.payments[key] = payment
    return payment


def _claim(state: PartitionState, entry: Entry) -> None:
    details = entry.details
    if not isinstance(details, PaymentClaimed):
        raise BrokenJournal(f"a claim does not say what it claims, at {_place(entry)}")
    payment = _payment(state, entry, details.payment)
    state.changing(payment)
    payment.unit = entry.unit
    state.setting(payment.claims, details.claim)
    claim = payment.claims[details.claim] = Claim(
        id=details.claim,
        reason=details.reason,
        state=details.state,
        claimed=details.claimed,
        revision=details.revision,
        occurred_at=entry.occurred_at,
        recorded_at=entry.recorded_at,
        transaction=entry.transaction,
        batch=entry.batch,
        position=entry.position,
    )
    state.changes.claims[payment.id, payment.account, claim.id] = claim


def _claw(state: PartitionState, entry: Entry) -> None:
    """Add, and note on the payment's lot what was taken of it, or in its stead, and what is still to be taken."""
    _add(state, entry)
    details = entry.details
    lot = _wallet(state, entry).lots.get(details.lot) if isinstance(details, ClawedBack) else None
    if lot is None or not isinstance(details, ClawedBack):
        raise BrokenJournal(f"what is clawed back, or given, is of no payment's lot, at {_place(entry)}")
    state.changing(lot)
    lot.clawed -= entry.posted
    if entry.lot != lot.id:
        lot.clawed_spent -= entry.posted
    lot.pending += details.pending
    if entry.hold is not None:
        lot.pending += entry.posted
    state.changes.lots[lot.id] = lot


def _freeze(state: PartitionState, entry: Entry) -> None:
    """Add, and note on the lot what is still to be frozen."""
    lot = _add(state, entry)
    if not isinstance(entry.details, ClaimFrozen):
        raise BrokenJournal(f"a freeze does not say for which payment, at {_place(entry)}")
    lot.pending_frozen += entry.details.pending
    if entry.hold is not None:
        lot.pending_frozen -= entry.frozen


def _cross(state: PartitionState, entry: Entry) -> None:
    wallet = _wallet(state, entry)
    if not isinstance(entry.details, BalanceCrossed):
        raise BrokenJournal(f"a level is crossed that is not named, at {_place(entry)}")
    state.changing(wallet)
    level: frozenset[Threshold | None] = frozenset({entry.details.threshold})
    wallet.low = wallet.low | level if entry.details.is_low else wallet.low - level
    state.changes.wallets[wallet.account, wallet.unit] = wallet


def _add(state: PartitionState, entry: Entry) -> Lot:
    """Add the amounts of an entry to its wallet, its lot, and its hold's earmark of that lot."""
    wallet = _wallet(state, entry)
    if entry.lot is None:
        raise BrokenJournal(f"an amount is moved of no lot, at {_place(entry)}")
    lot = wallet.lots.get(entry.lot)
    if lot is None:
        lot = _new_pseudo_lot(state, wallet, entry)
    if state.trials:
        state.changing(wallet)
        state.changing(lot)
    if lot.kind not in ASIDE_KINDS:
        wallet.posted += entry.posted
        wallet.held += entry.held
        wallet.frozen += entry.frozen
        if lot.kind == "debt":
            wallet.owed -= entry.posted
            wallet.owing += entry.held
    elif lot.kind == "overage":
        wallet.overage -= entry.posted
    else:
        wallet.uncapped -= entry.posted
    lot.posted += entry.posted
    lot.held += entry.held
    lot.frozen += entry.frozen
    if lot.expires_at is not None:
        wallet.moved(lot)
    state.changes.wallets[wallet.account, wallet.unit] = wallet
    state.changes.lots[lot.id] = lot
    if entry.hold is not None and (entry.held or entry.kind == "estimate_reversed"):
        _add_earmark(state, entry, lot, entry.hold)
    return lot


def _add_earmark(state: PartitionState, entry: Entry, lot: Lot, hold_id: str) -> None:
    hold = state.holds.get(hold_id)
    if hold is None:
        raise BrokenJournal(f"hold {hold_id} is moved before it is placed, at {_place(entry)}")
    key = (lot.account, lot.unit, lot.id)
    earmark = hold.earmarks.get(key)
    if earmark is None:
        state.setting(hold.earmarks, key)
        earmark = hold.earmarks[key] = Earmark(account=lot.account, unit=lot.unit, lot=lot.id)
    state.changing(earmark)
    earmark.held += entry.held
    if entry.kind == "hold_placed" or entry.kind == "hold_extended":  # noqa: PLR1714 - faster than a set
        earmark.placed += entry.held
    elif entry.kind == "hold_estimated" or entry.kind == "estimate_reversed":  # noqa: PLR1714 - see above
        earmark.estimated -= entry.posted
    state.changes.earmarks[hold_id, *key] = earmark


def _wallet(state: PartitionState, entry: Entry) -> Wallet:
    account = state.accounts.get(entry.account)
    wallet = None if account is None or entry.unit is None else account.wallets.get(entry.unit)
    if wallet is None:
        raise BrokenJournal(f"wallet {entry.account} {entry.unit} is moved before it is open, at {_place(entry)}")
    return wallet


def _place(entry: Entry) -> str:
    return f"batch {entry.batch}, position {entry.position}"
