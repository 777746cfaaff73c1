"""The one place where state changes: an entry is added to what came before it. Live service and replay use it alike."""

from typing import assert_never

from services.ledger.domain.entries import Entry, HoldPlaced, LotGranted, LotKind, WalletOpened, is_contra
from services.ledger.domain.state import Account, Earmark, Hold, Lot, PartitionState, Wallet


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
    _new_lot(_wallet(state, entry), entry, kind=entry.lot_kind, details=entry.details, granted=entry.posted)


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
    """What is charged beyond what is there makes a debt or an overage; nothing else comes from nowhere."""
    if entry.kind == "charged" and (entry.lot_kind == "debt" or entry.lot_kind == "overage"):  # noqa: PLR1714 - mypy narrows only so
        return _new_lot(wallet, entry, kind=entry.lot_kind, details=_PSEUDO_LOT, granted=0)
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
