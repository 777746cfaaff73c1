"""What claims on a payment take of the lots granted for it: a function of all claims, whatever order they came in.

Of what was paid, what is claimed for good, once; of each bonus as much in proportion. Of a lot: what is unheld; what is
held, as holds end; what was spent is owed (of a cap: overage) in its stead. Open claims freeze of what is left. What
became of a lot by transfers counts as the lot, and goes first.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import assert_never

from services.ledger.domain.attempt import Attempt
from services.ledger.domain.commands import Units
from services.ledger.domain.debts import repay, unrepay
from services.ledger.domain.due import released_moves
from services.ledger.domain.entries import (
    PSEUDO_KINDS,
    ClaimFrozen,
    ClawedBack,
    Kind,
    LotKind,
    LotVoided,
    Move,
    contra_move,
    granted_by,
    payment_of,
)
from services.ledger.domain.state import Lot, PartitionState, Payment, Wallet

InStead = tuple[str, LotKind]
# A kind and a unit.
Of = tuple[LotKind, str]
# What has come back to a lot, of which more may become.
Back = tuple[Lot, int]


def settle(attempt: Attempt, payment: Payment, *, occurred_at: datetime) -> list[Back]:
    """Take, freeze and give back until claims have of each lot of a payment what they come to.

    All lots that refer to the payment, spent or not, have been read, and those that repaid debts among them. What was
    taken in a lot's stead and repaid since goes back to whom it was repaid by when it is cancelled: to these lots.
    """
    families = _families(attempt, payment)
    wanted = _wanted(families, payment)
    shares = [share for of, family in families.items() for share in _shares(family, *wanted[of])]
    settling = _Settling(attempt, payment.id, occurred_at)
    backs = [share.back for share in shares]
    for share in shares:
        settling.unfreeze(share)
    got = [each for share in shares for each in settling.give_back(share)]
    for share in shares:
        settling.take(share)
    for share, back in zip(shares, backs, strict=True):
        settling.leave(share.lot, min(back, share.lot.available))
    return got


def claimed_payment(attempt: Attempt, lot: Lot) -> Payment | None:
    """The payment that a lot was granted for, itself or the lot it came of, if there are claims on it."""
    reference = payment_of(lot.kind, lot.reference)
    if reference is None or not attempt.is_claimed(reference):
        return None
    lots = {each.id: each for each in attempt.referring(reference, lot.account) if each.kind == lot.kind}
    first = lot
    while first.origin is not None and first.origin in lots:
        first = lots[first.origin]
    payment = None if first.origin is not None else attempt.payment(reference, first.account)
    return payment if payment is not None and payment.claims else None


def claw_released(
    state: PartitionState,
    moves: Sequence[Move],
    *,
    hold: str,
    units: Units,
    occurred_at: datetime,
    new_lots: Iterator[str],
) -> list[Move]:
    """What claims wait for on lots that `moves` have freed of a hold: released it is taken, or frozen.

    If it was charged they wait for what is held of other lots of the wallet for the same payment; if nothing is, what
    they were to take is owed. So too they wait for others no longer, if what was released is enough.
    """
    freed: dict[str, Lot] = {}
    for move in moves:
        if move.held < 0 and move.unit is not None and move.lot is not None:
            lot = state.accounts[move.account].wallets[move.unit].lots.get(move.lot)
            if lot is not None and lot.reference is not None and lot.kind not in PSEUDO_KINDS:
                freed[lot.id] = lot
    # Looked up once for each wallet: one hold may hold of thousands of lots.
    wallets = {(lot.account, lot.unit): state.accounts[lot.account].wallets[lot.unit] for lot in freed.values()}
    waited_for = {of: _waited_for(wallet) for of, wallet in wallets.items()}
    if not any(waited_for.values()):
        return []
    moved = _moved(moves)
    found: list[Move] = []
    # A cap's wallet counts all that was spent of it in one place.
    of_caps: dict[tuple[str, str], InStead] = {}
    for lot in freed.values():
        assert lot.reference is not None
        of = lot.account, lot.unit
        alike = waited_for[of].pop((lot.reference, lot.kind), None)
        for awaited in () if alike is None else _awaited(alike, moved):
            of_hold = hold if awaited.lot.id in freed else None
            in_stead = of_caps.get(of)
            if awaited.spent and in_stead is None:
                in_stead = _in_stead(wallets[of], units, chain(moves, found), new_lots)
                if units.by_name[lot.unit].kind == "cap":
                    of_caps[of] = in_stead
            found += awaited.moves(_Clawing(awaited.lot, units, lot.reference, occurred_at), in_stead, of_hold)
    return found


def is_unchanged(payment: Payment | None, claim: str, *, revision: int, content: tuple[object, ...]) -> bool:
    """Whether a claim says nothing new: it is known so, or a later word on it is known."""
    known = None if payment is None else payment.claims.get(claim)
    if known is None or revision > known.revision:
        return False
    return revision < known.revision or content == (known.reason, known.state, known.claimed)


@dataclass(frozen=True, slots=True)
class _Family:
    """What was granted for a payment of one kind and unit: how much; the lots, those that came of others first, the
    newest first, then those that were granted, the oldest first; and what of each was spent.
    """

    granted: int
    members: tuple[Lot, ...]
    spent: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """What claims are to have of a lot: of what was there, in its stead, as its holds end, and frozen."""

    lot: Lot
    taken: int
    spent: int
    pending: int
    frozen: int
    pending_frozen: int

    @property
    def back(self) -> int:
        """How much of what they have of the lot itself is too much."""
        return max(0, _taken(self.lot) - self.taken) + max(0, self.lot.frozen - self.frozen)


def _families(attempt: Attempt, payment: Payment) -> dict[Of, _Family]:
    """The lots granted for a payment, with those that came of them in the tree, by kind and unit."""
    lots = [lot for lot in attempt.referring(payment.id, payment.account) if lot.kind in {"purchase", "bonus"}]
    came_of: defaultdict[str, list[Lot]] = defaultdict(list)
    granted: defaultdict[Of, list[Lot]] = defaultdict(list)
    for lot in sorted(lots, key=_age):
        if lot.origin is not None:
            came_of[lot.origin].append(lot)
        elif lot.account == payment.account:
            granted[lot.kind, lot.unit].append(lot)
    found = {}
    for of, first in granted.items():
        later = [lot for each in first for lot in came_of[each.id]]
        for lot in later:
            later += came_of[lot.id]
        members = (*sorted(later, key=_age, reverse=True), *first)
        spent = tuple(
            member.granted
            - sum(lot.granted for lot in came_of[member.id])
            - member.posted
            - _taken(member)
            - _gone(member)
            for member in members
        )
        found[of] = _Family(sum(lot.granted for lot in first), members, spent)
    return found


def _wanted(families: Mapping[Of, _Family], payment: Payment) -> dict[Of, tuple[int, int]]:
    """What claims take and freeze in all of each: min(paid, final) and min(paid - that, open) of what was paid;
    floor(bonus * what is taken / paid) of a bonus.
    """
    of_paid = next((of for of in families if of == ("purchase", payment.unit)), None)
    paid = 0 if of_paid is None else families[of_paid].granted
    clawed = min(paid, payment.claimed)
    found = {
        of: (family.granted * clawed // paid if of[0] == "bonus" and paid else 0, 0) for of, family in families.items()
    }
    if of_paid is not None:
        found[of_paid] = (clawed, min(paid - clawed, payment.disputed))
    return found


def _shares(family: _Family, clawed: int, frozen: int) -> list[_Share]:
    """Share out among lots.

    As if nothing had been taken yet: of what is left, then of what expired or was voided and would not have if it had
    been taken in time, then of what is held; the rest was spent.
    """
    there = [member.posted - member.held + _taken(member) for member in family.members]
    gone = [_gone(member) for member in family.members]
    held = [member.held for member in family.members]
    of_there, left = _fill(there, clawed)
    of_gone, left = _fill(gone, left)
    pending, left = _fill(held, left)
    spent, left = _fill(family.spent, left)
    spent[-1] += left
    frozen_there, left = _fill(_less(there, of_there), frozen)
    frozen_gone, left = _fill(_less(gone, of_gone), left)
    pending_frozen, _ = _fill(_less(held, pending), left)
    return [
        _Share(
            lot=member,
            taken=of_there[number] + of_gone[number],
            spent=spent[number],
            pending=pending[number],
            frozen=frozen_there[number] + frozen_gone[number],
            pending_frozen=pending_frozen[number],
        )
        for number, member in enumerate(family.members)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Awaited:
    """What becomes of what claims wait for of a lot: what is taken, owed and frozen, and what they still wait for."""

    lot: Lot
    taken: int
    spent: int
    frozen: int
    pending: int
    pending_frozen: int

    def moves(self, clawing: "_Clawing", in_stead: InStead | None, hold: str | None) -> Iterator[Move]:
        """An entry that names the hold takes what was pending; what is pending otherwise it says by itself."""
        by_hold = self.taken + self.spent if hold is not None else 0
        pending = self.pending - self.lot.pending + by_hold
        yield from clawing.clawed_back(
            at_once=self.taken, pending=pending, spent=self.spent, in_stead=in_stead, hold=hold
        )
        pending_frozen = self.pending_frozen - self.lot.pending_frozen + (self.frozen if hold is not None else 0)
        if self.frozen or pending_frozen:
            yield clawing.frozen(self.frozen, pending=pending_frozen, hold=hold)


def _waited_for(wallet: Wallet) -> dict[tuple[str, LotKind], list[Lot]]:
    """A wallet's lots of the payments and kinds of those of whose lots claims wait for what holds hold."""
    waiting = {(lot.reference, lot.kind) for lot in wallet.lots.values() if lot.pending or lot.pending_frozen}
    found: defaultdict[tuple[str, LotKind], list[Lot]] = defaultdict(list)
    for lot in wallet.lots.values() if waiting else ():
        if lot.reference is not None and (lot.reference, lot.kind) in waiting:
            found[lot.reference, lot.kind].append(lot)
    return found


def _moved(moves: Iterable[Move]) -> Mapping[str | None, tuple[int, int]]:
    """How much moves change of each lot: posted and held."""
    found: defaultdict[str | None, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for move in moves:
        posted, held = found[move.lot]
        found[move.lot] = posted + move.posted, held + move.held
    return found


def _awaited(alike: Iterable[Lot], moved: Mapping[str | None, tuple[int, int]]) -> list[_Awaited]:
    """Share out what claims wait for among a wallet's lots for one payment: each waits for its own first."""
    lots = sorted(alike, key=_age)
    posted = [lot.posted + moved[lot.id][0] for lot in lots]
    held = [lot.held + moved[lot.id][1] for lot in lots]
    there = [posted[number] - held[number] - lot.frozen for number, lot in enumerate(lots)]
    taken, left = _fill(there, sum(lot.pending for lot in lots))
    pending, left = _refill([lot.pending for lot in lots], held, left)
    spent, _ = _fill((lot.pending - taken[number] - pending[number] for number, lot in enumerate(lots)), left)
    frozen, left = _fill(_less(there, taken), sum(lot.pending_frozen for lot in lots))
    pending_frozen, _ = _refill([lot.pending_frozen for lot in lots], _less(held, pending), left)
    return [
        _Awaited(
            lot=lot,
            taken=taken[number],
            spent=spent[number],
            frozen=frozen[number],
            pending=pending[number],
            pending_frozen=pending_frozen[number],
        )
        for number, lot in enumerate(lots)
    ]


class _Settling:
    """The moves from what claims have of lots to what they are to have."""

    def __init__(self, attempt: Attempt, payment: str, occurred_at: datetime) -> None:
        self._attempt = attempt
        self._payment = payment
        self._occurred_at = occurred_at

    def unfreeze(self, share: _Share) -> None:
        """Freeze no longer what is too much."""
        frozen = min(0, share.frozen - share.lot.frozen)
        pending = min(0, share.pending_frozen - share.lot.pending_frozen)
        if frozen or pending:
            self._attempt.do(self._clawing(share.lot).frozen(frozen, pending=pending))

    def give_back(self, share: _Share) -> list[Back]:
        """Owe no longer in the lot's stead, and give back to the lot, what is too much. Who had repaid it gets it."""
        lot, clawing = share.lot, self._clawing(share.lot)
        got = []
        for (in_stead, cancelled), backs in self._cancelled(lot, max(0, lot.clawed_spent - share.spent)):
            got += backs
            self._attempt.do(*clawing.given_back([(in_stead, cancelled)]))
        posted = max(0, _taken(lot) - share.taken)
        pending = min(0, share.pending - lot.pending)
        if posted or pending:
            self._attempt.do(*clawing.given_back([((lot.id, lot.kind), posted)], pending=pending))
        return got

    def take(self, share: _Share) -> None:
        """Take and freeze what is missing."""
        lot, clawing = share.lot, self._clawing(share.lot)
        at_once = max(0, share.taken - _taken(lot))
        spent = max(0, share.spent - lot.clawed_spent)
        pending = max(0, share.pending - lot.pending)
        frozen = max(0, share.frozen - lot.frozen)
        pending_frozen = max(0, share.pending_frozen - lot.pending_frozen)
        self._revive(lot, at_once + frozen - lot.available)
        wallet = self._attempt.wallet_of(lot)
        new_lots = iter(self._attempt.new_lot, "")
        in_stead = _in_stead(wallet, self._attempt.units, (), new_lots) if spent else None
        self._attempt.do(*clawing.clawed_back(at_once=at_once, pending=pending, spent=spent, in_stead=in_stead))
        if frozen or pending_frozen:
            self._attempt.do(clawing.frozen(frozen, pending=pending_frozen))

    def leave(self, lot: Lot, amount: int) -> None:
        """What is the lot's again expires if it would have, or is voided; else it repays, as any money that comes in.

        But what claims on this payment made owed stays what they come to.
        """
        if amount <= 0:
            return
        at = self._attempt.place.recorded_at
        gone = released_moves(lot, amount, units=self._attempt.units, occurred_at=at)
        self._attempt.do(*gone)
        if not gone:
            repay(self._attempt, lot, amount, occurred_at=self._occurred_at, but_of=self._payment)

    def _clawing(self, lot: Lot) -> "_Clawing":
        return _Clawing(lot, self._attempt.units, self._payment, self._occurred_at)

    def _cancelled(self, lot: Lot, amount: int) -> Iterator[tuple[tuple[InStead, int], list[Back]]]:
        """What is owed or counted in a lot's stead, up to an amount: first what still is, then what was repaid."""
        if not amount:
            return
        wallet = self._attempt.wallet_of(lot)
        left = amount
        for in_stead, part in _put_back(wallet, lot, self._attempt.units, amount):
            left -= part
            yield (in_stead, part), []
        for debt in _debts_in_stead(wallet, lot):
            part = min(left, sum(debt.repaid.values()))
            if part > 0:
                left -= part
                backs = unrepay(self._attempt, debt, part, occurred_at=self._occurred_at)
                yield ((debt.id, debt.kind), part), backs

    def _revive(self, lot: Lot, amount: int) -> None:
        """Undo that so much expired, or was voided: it is taken or frozen instead."""
        unit = self._attempt.units.by_name[lot.unit]
        at = self._attempt.place.recorded_at
        expired = min(amount, lot.expired)
        voided = min(amount - expired, lot.voided)
        amounts: tuple[tuple[Kind, int], ...] = (("lot_revived", expired), ("lot_voided", voided))
        for kind, posted in amounts:
            if posted <= 0:
                continue
            self._attempt.do(
                Move(
                    kind=kind,
                    account=lot.account,
                    occurred_at=at,
                    unit=lot.unit,
                    lot=lot.id,
                    lot_kind=lot.kind,
                    posted=posted,
                    details=LotVoided() if kind == "lot_voided" else None,
                ),
                contra_move(
                    kind,
                    "@expired" if kind == "lot_revived" else granted_by(lot.kind),
                    account=lot.account,
                    unit=unit,
                    posted=-posted,
                    occurred_at=at,
                ),
            )


@dataclass(frozen=True, slots=True)
class _Clawing:
    """The moves of claims on a lot of a payment."""

    lot: Lot
    units: Units
    payment: str
    occurred_at: datetime

    def clawed_back(
        self,
        *,
        at_once: int = 0,
        pending: int = 0,
        spent: int = 0,
        in_stead: InStead | None = None,
        hold: str | None = None,
    ) -> Iterator[Move]:
        """Take of the lot, note what is pending on it, take what was spent in its stead."""
        if at_once or pending:
            yield self._move("clawed_back", posted=-at_once, pending=pending, hold=hold)
        if spent:
            yield self._move("clawed_back", posted=-spent, in_stead=in_stead, hold=hold)
        if at_once or spent:
            yield self._contra("clawed_back", posted=at_once + spent)

    def given_back(self, amounts: Iterable[tuple[InStead, int]], *, pending: int = 0) -> Iterator[Move]:
        """Give back to the lot, or to what stands in its stead."""
        total = 0
        for to, posted in amounts:
            total += posted
            yield self._move("given_back", posted=posted, in_stead=to, pending=pending)
        if total:
            yield self._contra("given_back", posted=-total)

    def frozen(self, frozen: int, *, pending: int = 0, hold: str | None = None) -> Move:
        """Freeze of the lot, or no longer, and note what is to be frozen of it as holds of it end."""
        return Move(
            kind="claim_frozen",
            account=self.lot.account,
            occurred_at=self.occurred_at,
            unit=self.lot.unit,
            lot=self.lot.id,
            lot_kind=self.lot.kind,
            hold=hold,
            frozen=frozen,
            details=ClaimFrozen(self.payment, pending),
        )

    def _move(
        self, kind: Kind, *, posted: int, in_stead: InStead | None = None, pending: int = 0, hold: str | None = None
    ) -> Move:
        lot, lot_kind = in_stead or (self.lot.id, self.lot.kind)
        return Move(
            kind=kind,
            account=self.lot.account,
            occurred_at=self.occurred_at,
            unit=self.lot.unit,
            lot=lot,
            lot_kind=lot_kind,
            hold=hold,
            posted=posted,
            details=ClawedBack(self.payment, self.lot.id, pending),
        )

    def _contra(self, kind: Kind, *, posted: int) -> Move:
        """The other side: whence the lot had come."""
        return contra_move(
            kind,
            granted_by(self.lot.kind),
            account=self.lot.account,
            unit=self.units.by_name[self.lot.unit],
            posted=posted,
            occurred_at=self.occurred_at,
        )


def _in_stead(wallet: Wallet, units: Units, before: Iterable[Move], new_lots: Iterator[str]) -> InStead:
    """Where what was spent is taken instead: a new debt; of a cap the wallet's overage."""
    unit = units.by_name[wallet.unit]
    match unit.kind:
        case "money":
            return next(new_lots), "debt"
        case "cap":
            overage = wallet.overage_lot()
            if overage is not None:
                return overage.id, "overage"
            of_wallet = [move for move in before if (move.account, move.unit) == (wallet.account, wallet.unit)]
            of_periods = {move.lot for move in of_wallet if move.kind == "lot_opened"} | wallet.lots.keys()
            made = (move.lot for move in of_wallet if move.lot_kind == "overage" and move.lot not in of_periods)
            return next(made, None) or next(new_lots), "overage"
        case _:
            assert_never(unit.kind)


def _put_back(wallet: Wallet, lot: Lot, units: Units, amount: int) -> list[tuple[InStead, int]]:
    """What is still owed, or counted as overage, in a lot's stead, up to an amount, the newest first."""
    unit = units.by_name[wallet.unit]
    match unit.kind:
        case "money":
            in_stead = _debts_in_stead(wallet, lot)
        case "cap":
            overage = wallet.overage_lot()
            in_stead = [] if overage is None else [overage]
        case _:
            assert_never(unit.kind)
    parts, _ = _fill([-each.posted for each in in_stead], amount)
    return [((each.id, each.kind), part) for each, part in zip(in_stead, parts, strict=True) if part]


def _debts_in_stead(wallet: Wallet, lot: Lot) -> list[Lot]:
    """The debts that were made in a lot's stead, the newest first."""
    debts = (each for each in wallet.lots.values() if each.kind == "debt" and each.origin == lot.id)
    return sorted(debts, key=_age, reverse=True)


def _fill(rooms: Iterable[int], amount: int) -> tuple[list[int], int]:
    """An amount shared out, the first filled first; and what is left of it."""
    parts = []
    for room in rooms:
        part = max(0, min(room, amount))
        amount -= part
        parts.append(part)
    return parts, amount


def _refill(before: Sequence[int], rooms: Sequence[int], amount: int) -> tuple[list[int], int]:
    """An amount shared out, each as much as it had before if there is room, then the first filled first."""
    kept, left = _fill(map(min, before, rooms), amount)
    more, left = _fill(_less(rooms, kept), left)
    return list(map(sum, zip(kept, more, strict=True))), left


def _less(amounts: Iterable[int], others: Iterable[int]) -> list[int]:
    return [amount - other for amount, other in zip(amounts, others, strict=True)]


def _taken(lot: Lot) -> int:
    """What claims took of the lot itself."""
    return lot.clawed - lot.clawed_spent


def _gone(lot: Lot) -> int:
    """What of a lot is neither there nor was used by anybody."""
    return lot.expired + lot.voided


def _age(lot: Lot) -> tuple[int, int]:
    return lot.age
