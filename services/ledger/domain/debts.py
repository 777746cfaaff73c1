"""What a wallet owes, and how money that comes in repays it: oldest first, by entries that name both sides."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

import msgspec

from services.ledger.domain.entries import DebtRepaid, LotKind, Move
from services.ledger.domain.state import Wallet


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
