"""What claims on a payment take of the lots granted for it: a function of all claims, whatever order they came in.

Of what was paid, what is claimed for good, once; of each bonus as much in proportion. Of a lot: what is left unheld at
once, what is held as its holds end, and what was spent is owed (of a cap: counted as overage) in its stead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from services.ledger.domain.commands import Units
from services.ledger.domain.debts import debts_after, repayments
from services.ledger.domain.entries import ClawedBack, Kind, LotKind, Move, contra_move, granted_by, payment_of
from services.ledger.domain.state import PartitionState, Payment, Wallet

InStead = tuple[str, LotKind]


@dataclass(frozen=True, slots=True)
class Source:
    """A lot that was granted for a payment, and where it is."""

    lot: str
    kind: LotKind
    wallet: Wallet


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Such a lot with its amounts, as a decision finds or makes it."""

    source: Source
    granted: int
    available: int
    held: int = 0
    clawed: int = 0
    clawed_spent: int = 0
    pending: int = 0

    @property
    def lot(self) -> str:
        return self.source.lot

    @property
    def wallet(self) -> Wallet:
        return self.source.wallet


@dataclass(frozen=True, slots=True, kw_only=True)
class Clawing:
    """What the moves of a decision about a payment have in common."""

    payment: str
    units: Units
    occurred_at: datetime
    new_lots: Iterator[str]

    def move(
        self,
        kind: Kind,
        source: Source,
        *,
        posted: int,
        in_stead: InStead | None = None,
        pending: int = 0,
        hold: str | None = None,
    ) -> Move:
        """Something of a lot, or of what stands in its stead."""
        lot, lot_kind = in_stead or (source.lot, source.kind)
        return Move(
            kind=kind,
            account=source.wallet.account,
            occurred_at=self.occurred_at,
            unit=source.wallet.unit,
            lot=lot,
            lot_kind=lot_kind,
            hold=hold,
            posted=posted,
            details=ClawedBack(self.payment, source.lot, pending),
        )

    def contra(self, kind: Kind, source: Source, *, posted: int) -> Move:
        """The other side: whence the lot had come."""
        return contra_move(
            kind,
            granted_by(source.kind),
            account=source.wallet.account,
            unit=self.units.by_name[source.wallet.unit],
            posted=posted,
            occurred_at=self.occurred_at,
        )


def wanted(parts: Sequence[Part], *, unit: str | None, claimed: int) -> dict[str, int]:
    """What claims of `claimed` in all take of each lot: min(paid, claimed), and floor(bonus * that / paid) per unit."""
    bonuses = dict.fromkeys(part.wallet.unit for part in parts if part.source.kind == "bonus")
    paid_parts = [part for part in parts if part.source.kind == "purchase" and part.wallet.unit == unit]
    paid = sum(part.granted for part in paid_parts)
    clawed = min(paid, claimed)
    found = _filled(paid_parts, clawed)
    for bonus_unit in bonuses:
        bonus_parts = [part for part in parts if part.source.kind == "bonus" and part.wallet.unit == bonus_unit]
        bonus = sum(part.granted for part in bonus_parts)
        found |= _filled(bonus_parts, bonus * clawed // paid if paid else 0)
    return found


def parts_of(state: PartitionState, payment: str, account: str) -> list[Part]:
    """The lots granted for a payment, oldest first. All of them were read when the payment was."""
    found = state.accounts.get(account)
    wallets = {} if found is None else found.wallets
    lots = [
        (lot, wallet)
        for wallet in wallets.values()
        for lot in wallet.lots.values()
        if lot.reference == payment and payment_of(lot.kind, lot.reference) is not None
    ]
    return [
        Part(
            source=Source(lot.id, lot.kind, wallet),
            granted=lot.granted,
            available=lot.available,
            held=lot.held,
            clawed=lot.clawed,
            clawed_spent=lot.clawed_spent,
            pending=lot.pending,
        )
        for lot, wallet in sorted(lots, key=lambda each: each[0].age)
    ]


def claim(parts: Sequence[Part], clawing: Clawing, *, unit: str | None, claimed: int) -> list[Move]:
    """Take what is missing of each lot, give back what is too much."""
    target = wanted(parts, unit=unit, claimed=claimed)
    due = {part.lot: target.get(part.lot, 0) - part.clawed - part.pending for part in parts}
    moves: list[Move] = []
    restored: list[tuple[Part, int]] = []
    for part in parts:
        if due[part.lot] > 0:
            moves += _take(part, clawing, due[part.lot], list(moves))
        elif due[part.lot] < 0:
            # In the reverse order of taking, so that nothing tells afterwards that it was ever taken.
            back = -due[part.lot]
            cancelled = _cancel(part, clawing, back)
            moves += cancelled
            back -= sum(move.posted for move in cancelled if move.lot is not None)
            not_taken = min(back, part.pending)
            restored.append((part, back - not_taken))
            moves += _restore(part, clawing, back - not_taken, not_taken)
    for part, amount in restored:
        # As any money that comes in; but what claims on this payment made owed stays what they come to.
        moves += repayments(
            part.wallet,
            lot=part.lot,
            lot_kind=part.source.kind,
            amount=amount,
            owed=debts_after(part.wallet, moves, but_of=clawing.payment),
            occurred_at=clawing.occurred_at,
        )
    return moves


def claw_released(
    state: PartitionState,
    moves: Sequence[Move],
    *,
    hold: str,
    units: Units,
    occurred_at: datetime,
    new_lots: Iterator[str],
) -> list[Move]:
    """What is pending on lots that `moves` have freed of a hold: released it is taken, charged it is owed."""
    freed = dict.fromkeys(
        (move.account, move.unit, move.lot) for move in moves if move.held < 0 and move.unit and move.lot
    )
    found: list[Move] = []
    for account, unit, lot_id in freed:
        wallet = state.accounts[account].wallets[unit]
        lot = wallet.lots[lot_id]
        if not lot.pending or lot.reference is None:
            continue
        held = lot.held + sum(move.held for move in moves if move.lot == lot.id)
        available = lot.posted + sum(move.posted for move in moves if move.lot == lot.id) - held - lot.frozen
        at_once = min(lot.pending, available)
        spent = max(0, lot.pending - at_once - held)
        clawing = Clawing(payment=lot.reference, units=units, occurred_at=occurred_at, new_lots=new_lots)
        found += _clawed_back(
            Source(lot.id, lot.kind, wallet), clawing, at_once=at_once, spent=spent, hold=hold, before=[*moves, *found]
        )
    return found


def is_unchanged(payment: Payment | None, claim: str, *, revision: int, content: tuple[object, ...]) -> bool:
    """Whether a claim says nothing new: it is known so, or a later word on it is known."""
    known = None if payment is None else payment.claims.get(claim)
    if known is None or revision > known.revision:
        return False
    return revision < known.revision or content == (known.reason, known.state, known.claimed)


def _filled(parts: Sequence[Part], amount: int) -> dict[str, int]:
    """An amount on lots, the first filled first."""
    found = {}
    for part in parts:
        found[part.lot] = min(part.granted, amount)
        amount -= found[part.lot]
    return found


def _take(part: Part, clawing: Clawing, due: int, before: Sequence[Move]) -> Iterator[Move]:
    at_once = min(due, part.available)
    pending = min(due - at_once, part.held - part.pending)
    spent = due - at_once - pending
    return _clawed_back(part.source, clawing, at_once=at_once, pending=pending, spent=spent, before=before)


def _clawed_back(
    source: Source,
    clawing: Clawing,
    *,
    at_once: int,
    spent: int,
    before: Sequence[Move],
    pending: int = 0,
    hold: str | None = None,
) -> Iterator[Move]:
    """Take of a lot, note what is pending on it, take what was spent in its stead."""
    if at_once or pending:
        yield clawing.move("clawed_back", source, posted=-at_once, pending=pending, hold=hold)
    if spent:
        in_stead = _in_stead(source.wallet, clawing, before)
        yield clawing.move("clawed_back", source, posted=-spent, in_stead=in_stead, hold=hold)
    if at_once or spent:
        yield clawing.contra("clawed_back", source, posted=at_once + spent)


def _cancel(part: Part, clawing: Clawing, back: int) -> list[Move]:
    """Owe or count no longer what was taken in the lot's stead, the latest first. What was repaid meanwhile is not."""
    left = min(back, part.clawed_spent)
    moves: list[Move] = []
    for in_stead, outstanding in _taken_in_stead(part, clawing):
        cancelled = min(left, outstanding)
        if cancelled > 0:
            left -= cancelled
            moves.append(clawing.move("given_back", part.source, posted=cancelled, in_stead=in_stead))
    total = sum(move.posted for move in moves)
    if total:
        moves.append(clawing.contra("given_back", part.source, posted=-total))
    return moves


def _taken_in_stead(part: Part, clawing: Clawing) -> list[tuple[InStead, int]]:
    """What is still owed, or counted as overage, in a lot's stead."""
    unit = clawing.units.by_name[part.wallet.unit]
    match unit.kind:
        case "money":
            debts = [debt for debt in part.wallet.debts() if debt.origin == part.lot]
            return [((debt.id, debt.kind), -debt.posted) for debt in reversed(debts)]
        case "cap":
            overage = part.wallet.overage_lot()
            return [] if overage is None else [((overage.id, overage.kind), -overage.posted)]
        case _:
            assert_never(unit.kind)


def _restore(part: Part, clawing: Clawing, amount: int, not_taken: int) -> Iterator[Move]:
    """Give back to the lot; what was repaid of its debt, too: whoever repaid it has paid this lot's use."""
    if amount or not_taken:
        yield clawing.move("given_back", part.source, posted=amount, pending=-not_taken)
    if amount:
        yield clawing.contra("given_back", part.source, posted=-amount)


def _in_stead(wallet: Wallet, clawing: Clawing, before: Sequence[Move]) -> InStead:
    """Where what was spent is taken instead: a new debt; of a cap the wallet's overage."""
    unit = clawing.units.by_name[wallet.unit]
    match unit.kind:
        case "money":
            return next(clawing.new_lots), "debt"
        case "cap":
            overage = wallet.overage_lot()
            if overage is not None:
                return overage.id, "overage"
            of_wallet = (move for move in before if (move.account, move.unit) == (wallet.account, wallet.unit))
            made = (move.lot for move in of_wallet if move.lot_kind == "overage")
            return next(made, None) or next(clawing.new_lots), "overage"
        case _:
            assert_never(unit.kind)
