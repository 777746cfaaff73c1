"""The one place where state changes: an entry is added to what came before it. Live service and replay use it alike."""

from typing import assert_never

from services.ledger.domain.entries import (
    ClawedBack,
    Entry,
    HoldPlaced,
    LotGranted,
    LotKind,
    PaymentClaimed,
    WalletOpened,
    is_contra,
    payment_of,
)
from services.ledger.domain.state import Account, Claim, Earmark, Hold, Lot, PartitionState, Payment, Wallet


class BrokenJournal(Exception):
    """An entry does not fit the state before it: the journal or the state is not what it should be."""


def evolve(state: PartitionState, entry: Entry) -> None:
    """Add `entry` to `state`. Raises BrokenJournal if it cannot follow."""
    if is_contra(entry.account):
        return
    match entry.kind:
        case "account_opened":
            _open_account(state, entry)
        case "wallet_opened":
            _open_wallet(state, entry)
        case "lot_granted":
            _grant_lot(state, entry)
            _add(state, entry)
        case "debt_repaid" | "charged":
            _add(state, entry)
        case "hold_placed":
            if isinstance(entry.details, HoldPlaced):
                _place_hold(state, entry, entry.details)
            _add(state, entry)
        case "hold_released" | "hold_settled":
            _add(state, entry)
            _end_hold(state, entry)
        case "payment_claimed":
            _claim(state, entry)
        case "clawed_back" | "given_back":
            _add(state, entry)
            _claw(state, entry)
        case _:
            assert_never(entry.kind)


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
        recorded_at=entry.recorded_at,
        batch=entry.batch,
        position=entry.position,
    )
    account.wallets[wallet.unit] = wallet
    state.changes.wallets[wallet.account, wallet.unit] = wallet


def _grant_lot(state: PartitionState, entry: Entry) -> None:
    if entry.lot_kind is None or not isinstance(entry.details, LotGranted):
        raise BrokenJournal(f"a grant does not say what lot it adds, at {_place(entry)}")
    lot = _new_lot(_wallet(state, entry), entry, kind=entry.lot_kind, details=entry.details, granted=entry.posted)
    if (of_payment := payment_of(lot.kind, lot.reference)) is not None:
        payment = _payment(state, entry, of_payment)
        if lot.kind == "purchase" and payment.unit in {None, lot.unit}:
            payment.unit = lot.unit
            payment.paid += lot.granted


def _new_lot(wallet: Wallet, entry: Entry, *, kind: LotKind, details: LotGranted, granted: int) -> Lot:
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
        granted=granted,
        occurred_at=entry.occurred_at,
        recorded_at=entry.recorded_at,
        batch=entry.batch,
        position=entry.position,
    )
    wallet.add(lot)
    return lot


def _new_pseudo_lot(wallet: Wallet, entry: Entry) -> Lot:
    """What is charged or clawed back beyond what is there makes a debt or an overage; nothing else is from nowhere."""
    if entry.kind in {"charged", "clawed_back"} and (entry.lot_kind == "debt" or entry.lot_kind == "overage"):  # noqa: PLR1714 - mypy narrows only so
        details = _PSEUDO_LOT
        if entry.lot_kind == "debt" and isinstance(entry.details, ClawedBack):
            # It says in whose stead it is owed: it is cancelled if the claim is.
            details = LotGranted(priority=0, reference=entry.details.payment, origin=entry.details.lot)
        return _new_lot(wallet, entry, kind=entry.lot_kind, details=details, granted=0)
    raise BrokenJournal(f"lot {entry.lot} is moved before it is there, at {_place(entry)}")


_PSEUDO_LOT = LotGranted(priority=0)


def _place_hold(state: PartitionState, entry: Entry, details: HoldPlaced) -> None:
    if entry.hold is None or entry.hold in state.holds:
        raise BrokenJournal(f"hold {entry.hold} is placed twice, at {_place(entry)}")
    state.holds[entry.hold] = Hold(
        id=entry.hold,
        account=details.account,
        status="placed",
        expires_at=details.expires_at,
        overdue=details.overdue,
        legs=details.legs,
        recorded_at=entry.recorded_at,
        transaction=entry.transaction,
        batch=entry.batch,
        position=entry.position,
    )
    state.changes.holds[entry.hold] = state.holds[entry.hold]


def _end_hold(state: PartitionState, entry: Entry) -> None:
    if entry.hold is None:
        raise BrokenJournal(f"no hold is named where one ends, at {_place(entry)}")
    hold = state.holds.get(entry.hold)
    if hold is None:
        # It ends before it was placed: from now on it cannot be.
        hold = state.holds[entry.hold] = Hold(
            id=entry.hold,
            account=entry.account,
            status="placed",
            expires_at=None,
            overdue="release",
            legs=(),
            recorded_at=entry.recorded_at,
            transaction=entry.transaction,
            batch=entry.batch,
            position=entry.position,
        )
    hold.status = "released" if entry.kind == "hold_released" else "settled"
    hold.ended_at = entry.recorded_at
    state.changes.holds[hold.id] = hold


def _payment(state: PartitionState, entry: Entry, of_payment: str) -> Payment:
    key = (of_payment, entry.account)
    payment = state.payments.get(key)
    if payment is None:
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
    payment.unit = entry.unit
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
    """Note on the payment's lot what was taken of it, or in its stead, and what is still to be taken."""
    details = entry.details
    lot = _wallet(state, entry).lots.get(details.lot) if isinstance(details, ClawedBack) else None
    if lot is None or not isinstance(details, ClawedBack):
        raise BrokenJournal(f"what is clawed back, or given, is of no payment's lot, at {_place(entry)}")
    lot.clawed -= entry.posted
    if entry.lot != lot.id:
        lot.clawed_spent -= entry.posted
    lot.pending += details.pending
    if entry.hold is not None:
        lot.pending += entry.posted
    state.changes.lots[lot.id] = lot


def _add(state: PartitionState, entry: Entry) -> None:
    """Add the amounts of an entry to its wallet, its lot, and its hold's earmark of that lot."""
    if entry.lot is None:
        return
    wallet = _wallet(state, entry)
    lot = wallet.lots.get(entry.lot)
    if lot is None:
        lot = _new_pseudo_lot(wallet, entry)
    if lot.kind == "overage":
        wallet.overage -= entry.posted
    else:
        wallet.posted += entry.posted
    wallet.held += entry.held
    wallet.frozen += entry.frozen
    lot.posted += entry.posted
    lot.held += entry.held
    lot.frozen += entry.frozen
    state.changes.wallets[wallet.account, wallet.unit] = wallet
    state.changes.lots[lot.id] = lot
    if entry.hold is not None and entry.held:
        _add_earmark(state, entry, lot, entry.hold)


def _add_earmark(state: PartitionState, entry: Entry, lot: Lot, hold_id: str) -> None:
    hold = state.holds.get(hold_id)
    if hold is None:
        raise BrokenJournal(f"hold {hold_id} is moved before it is placed, at {_place(entry)}")
    key = (lot.account, lot.unit, lot.id)
    earmark = hold.earmarks.get(key)
    if earmark is None:
        earmark = hold.earmarks[key] = Earmark(account=lot.account, unit=lot.unit, lot=lot.id)
    if entry.kind == "hold_placed":
        earmark.placed += entry.held
    earmark.held += entry.held
    state.changes.earmarks[hold_id, *key] = earmark


def _wallet(state: PartitionState, entry: Entry) -> Wallet:
    wallet = None if entry.unit is None else state.wallet(entry.account, entry.unit)
    if wallet is None:
        raise BrokenJournal(f"wallet {entry.account} {entry.unit} is moved before it is open, at {_place(entry)}")
    return wallet


def _place(entry: Entry) -> str:
    return f"batch {entry.batch}, position {entry.position}"
