"""What a wallet owes, and how money that comes in repays it: oldest first, by entries that name both sides."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

import msgspec

from services.ledger.domain.attempt import Attempt
from services.ledger.domain.entries import DebtRepaid, LotKind, Move
from services.ledger.domain.state import Lot, Wallet


def debts_after(wallet: Wallet, moves: Sequence[Move], *, but_of: str | None = None) -> dict[str, int]:
    """What is owed on each debt of a wallet once `moves` are made, from the oldest; but for claims on one payment."""
    return {
        debt.id: -debt.posted - sum(move.posted for move in moves if move.lot == debt.id)
        for debt in wallet.debts()
        if debt.reference is None or debt.reference != but_of
    }


def repayments(
    wallet: Wallet, *, lot: str, lot_kind: LotKind, amount: int, owed: Mapping[str, int], occurred_at: datetime
) -> Iterator[Move]:
    """Repay with up to `amount` of a lot."""
    left = amount
    for debt, outstanding in owed.items():
        paid = min(left, outstanding)
        if paid <= 0:
            continue
        left -= paid
        from_lot = Move(
            kind="debt_repaid",
            account=wallet.account,
            occurred_at=occurred_at,
            unit=wallet.unit,
            lot=lot,
            lot_kind=lot_kind,
            posted=-paid,
            details=DebtRepaid(lot=lot, debt=debt),
        )
        yield from_lot
        yield msgspec.structs.replace(from_lot, lot=debt, lot_kind="debt", posted=paid)


def repay(attempt: Attempt, lot: Lot, amount: int, *, occurred_at: datetime, but_of: str | None = None) -> None:
    """Repay with up to `amount` of a lot what its wallet owes; but not with one that has not started or has ended."""
    if not lot.is_valid(attempt.place.recorded_at):
        return
    wallet = attempt.wallet_of(lot)
    owed = debts_after(wallet, (), but_of=but_of)
    moves = repayments(wallet, lot=lot.id, lot_kind=lot.kind, amount=amount, owed=owed, occurred_at=occurred_at)
    attempt.do(*moves)


def unrepay(attempt: Attempt, debt: Lot, amount: int, *, occurred_at: datetime) -> list[tuple[Lot, int]]:
    """Give back to lots, the newest first, up to `amount` of what they repaid of a debt: it is owed again.

    What each got back: more may become of it.
    """
    wallet = attempt.wallet_of(debt)
    got: list[tuple[Lot, int]] = []
    left = amount
    for name in sorted(debt.repaid, key=lambda lot: wallet.lots[lot].age, reverse=True):
        part = min(left, debt.repaid[name])
        if part <= 0:
            continue
        left -= part
        lot = wallet.lots[name]
        to_lot = Move(
            kind="debt_repaid",
            account=wallet.account,
            occurred_at=occurred_at,
            unit=wallet.unit,
            lot=lot.id,
            lot_kind=lot.kind,
            posted=part,
            details=DebtRepaid(lot=lot.id, debt=debt.id),
        )
        attempt.do(to_lot, msgspec.structs.replace(to_lot, lot=debt.id, lot_kind="debt", posted=-part))
        got.append((lot, part))
    return got
