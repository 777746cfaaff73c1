"""Charges and debits: what a use cost, taken from its hold's lots, then from what is there, then as debt or overage.

Lots that have ended pay what occurred before their end, within the grace, and what their holds are charged.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from typing import Final

from contracts.money import Unit
from services.ledger.domain.attempt import Attempt
from services.ledger.domain.claims import Back
from services.ledger.domain.commands import LATE_GRACE, ChargeLine, Units
from services.ledger.domain.concerned import (
    AHEAD_MAX,
    BALANCE_MAX,
    Place,
    beyond,
    check_amounts,
    counted_in,
    uncapped,
    wallets_of,
)
from services.ledger.domain.debts import unrepay
from services.ledger.domain.entries import PSEUDO_KINDS, STAND_INS, LotKind, Move, contra_move
from services.ledger.domain.errors import (
    AccountDiffers,
    AccountNotOpen,
    InsufficientFunds,
    InvalidAmount,
    InvalidTime,
    Refusal,
)
from services.ledger.domain.holding import ended, freed, pinned
from services.ledger.domain.reversing import restore
from services.ledger.domain.state import Hold, Lot, PartitionState, Wallet

_NONE: Final[Mapping[str, int]] = {}


def decide_charge(state: PartitionState, line: ChargeLine, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Take what a use cost: from its hold's lots, then from what is available, then as debt or overage.

    A final one ends its hold and releases the rest. Refused for want of money only if it is `required`: UnknownUnit,
    InvalidAmount, InvalidTime, AccountNotOpen, AccountDiffers, InsufficientFunds.
    """
    if refusal := check_amounts(units, line.amounts):
        return refusal
    if line.occurred_at > place.recorded_at and line.occurred_at - place.recorded_at > AHEAD_MAX:
        return InvalidTime(line.occurred_at, place.recorded_at)
    if line.account not in state.accounts:
        return AccountNotOpen(line.account)
    hold = None if line.hold is None else state.holds.get(line.hold)
    if hold is not None and hold.account != line.account:
        return AccountDiffers(hold.id, line.account)
    if hold is not None and hold.status == "estimated":
        return _charge_after_estimate(state, line, hold, units=units, place=place)
    moves = _charge(state, line, hold, units=units, place=place)
    return [Move(kind="charged", account=line.account, occurred_at=line.occurred_at)] if moves == [] else moves


def _charge(
    state: PartitionState,
    line: ChargeLine,
    hold: Hold | None,
    *,
    units: Units,
    place: Place,
    new_lots: Iterator[str] | None = None,
    restored: Mapping[str, int] = _NONE,
) -> list[Move] | Refusal:
    moves: list[Move] = []
    now = place.recorded_at
    is_open = hold is not None and hold.status == "placed"
    new_lots = new_lots or map(place.new_lot, count())
    charging = _Charging(line, hold, place, new_lots, restored, moves, is_open) if hold or line.required else None
    for name, amount in line.amounts:
        if not amount:
            continue
        counted = counted_in(units, name)
        if charging is not None and line.required and (lacking := _lacking(state, charging, units, counted, amount)):
            return lacking
        for each in counted:
            unit = units.by_name[each]
            for wallet in (
                wallets_of(state, line.account, unit) if hold is None else pinned(state, line.account, unit, hold)
            ):
                if wallet.posted - wallet.overage - wallet.uncapped - amount < -BALANCE_MAX:
                    return InvalidAmount(each, "the wallet would owe more than it can count")
                if charging is None and (lot := _one_lot(wallet, amount, line, now)) is not None:
                    moves.append(_charged(line, wallet, lot.id, lot.kind, posted=amount))
                    moves.append(_contra(line, wallet, unit, amount))
                else:
                    charging = charging or _Charging(line, hold, place, new_lots, restored, moves, is_open)
                    charging.charge(wallet, unit, amount)
    if line.hold is not None and (hold is None or is_open):
        _settle(state, line, hold, moves, units=units, place=place, new_lots=new_lots)
    return moves


def _settle(
    state: PartitionState,
    line: ChargeLine,
    hold: Hold | None,
    moves: list[Move],
    *,
    units: Units,
    place: Place,
    new_lots: Iterator[str],
) -> None:
    """End the hold if the line is final, or if nobody knows it: then it will not be placed."""
    assert line.hold is not None
    at = line.occurred_at
    if hold is None or line.final:
        taken: dict[str | None, int] = {}
        for move in moves:
            if move.held:
                taken[move.lot] = taken.get(move.lot, 0) - move.held
        moves += ended("hold_settled", line.hold, line.account, hold=hold, state=state, occurred_at=at, taken=taken)
    if hold is not None:
        moves += freed(state, moves, hold=hold.id, units=units, place=place, occurred_at=at, new_lots=new_lots)


def _one_lot(wallet: Wallet, amount: int, line: ChargeLine, now: datetime) -> Lot | None:
    """The lot that pays all that a line without a hold costs: by far most are paid so. None: look closer."""
    if wallet.policy == "unlimited":
        return None
    for lot in wallet.burning():
        there = lot.posted - lot.held - lot.frozen
        ends = lot.expires_at
        if ends is not None and ends <= now and ends <= line.occurred_at:
            continue
        if there <= 0 and not lot.expired:
            continue
        begins = lot.effective_at
        is_plain = (
            there >= amount
            and lot.scope is None
            and (ends is None or now < ends)
            and (begins is None or (begins <= now and begins <= line.occurred_at))
        )
        return lot if is_plain else None
    return None


def _charged(line: ChargeLine, wallet: Wallet, lot: str, kind: LotKind, *, posted: int, held: int = 0) -> Move:
    return Move(
        kind="charged",
        account=wallet.account,
        occurred_at=line.occurred_at,
        unit=wallet.unit,
        lot=lot,
        lot_kind=kind,
        hold=line.hold if held else None,
        posted=-posted,
        held=-held,
    )


def _contra(line: ChargeLine, wallet: Wallet, unit: Unit, posted: int) -> Move:
    return contra_move(
        "charged", "@usage", account=wallet.account, unit=unit, posted=posted, occurred_at=line.occurred_at
    )


@dataclass(slots=True)
class _Charging:
    """One line on one wallet after another. `restored`: what it may first take of lots, as if it were set aside."""

    line: ChargeLine
    hold: Hold | None
    place: Place
    new_lots: Iterator[str]
    restored: Mapping[str, int]
    moves: list[Move]
    is_open: bool
    # Of what was restored.
    taken: dict[str, int] = field(default_factory=dict)

    def charge(self, wallet: Wallet, unit: Unit, amount: int) -> None:
        """What was set aside, then what is available, then what is not there; and the contra of it all."""
        left = amount
        stand_ins: list[tuple[Lot, int]] = []
        if self.is_open or self.restored:
            left, stand_ins = self._charge_set_aside(wallet, amount)
        if wallet.policy == "unlimited":
            for lot, covered in stand_ins:
                self._charged(wallet, lot.id, lot.kind, 0, covered)
            if left:
                pseudo = uncapped(wallet, self.new_lots)
                self._charged(wallet, pseudo.lot, pseudo.kind, left)
        else:
            if left:
                left = self._charge_available(wallet, unit, left)
            for lot, covered in stand_ins:
                # The first takes all that is still not there.
                self._charged(wallet, lot.id, lot.kind, left, covered)
                left = 0
            if left:
                self._charge_beyond(wallet, unit, left)
        self.moves.append(_contra(self.line, wallet, unit, amount))

    def room(self, wallet: Wallet, unit: Unit) -> int:
        """How much of a hard wallet it may take before the wallet is at its floor."""
        at = self._at(unit)
        set_aside = {lot.id: amount for lot, amount in self._set_aside(wallet)}
        there = wallet.overdraft - wallet.owed - wallet.owing
        for lot in wallet.burning():
            usable = self._usable(wallet, lot, unit, at)
            # What is held is not available beside, what was restored is.
            there += usable if self.is_open else max(usable, set_aside.pop(lot.id, 0))
        return there + sum(set_aside.values())

    def _charge_set_aside(self, wallet: Wallet, amount: int) -> tuple[int, list[tuple[Lot, int]]]:
        """What is left, and how much of that the hold's pseudo-lots stand in for, as it was not there."""
        left = uncovered = amount
        stand_ins: list[tuple[Lot, int]] = []
        for lot, there in self._set_aside(wallet):
            part = min(uncovered, there)
            if not part:
                break
            uncovered -= part
            if lot.kind in STAND_INS:
                stand_ins.append((lot, part))
                continue
            left -= part
            if self.is_open:
                self._charged(wallet, lot.id, lot.kind, part, part)
            else:
                self.taken[lot.id] = part
                self._charged(wallet, lot.id, lot.kind, part)
        return left, stand_ins

    def _charge_available(self, wallet: Wallet, unit: Unit, amount: int) -> int:
        """Take of its lots in burn order; what is left."""
        left = amount
        at = self._at(unit)
        for lot in wallet.burning():
            there = lot.posted - lot.held - lot.frozen
            if there <= 0 and not lot.expired:
                continue
            usable = self._usable(wallet, lot, unit, at)
            if self.taken and (taken := self.taken.get(lot.id)):
                there -= taken
                usable -= taken
            part = min(left, usable)
            if part > 0:
                left -= part
                if part > there:
                    self._revived(wallet, lot, unit, part - max(there, 0))
                self._charged(wallet, lot.id, lot.kind, part)
                if not left:
                    break
        return left

    def _charge_beyond(self, wallet: Wallet, unit: Unit, amount: int) -> None:
        if unit.kind == "money" and (debt := self._debt_of(wallet)) is not None:
            self._charged(wallet, debt, "debt", amount)
            return
        occurred_at = self.line.occurred_at
        pseudo = beyond(wallet, unit, at=self._at(unit), occurred_at=occurred_at, new_lots=self.new_lots)
        self.moves += pseudo.opened
        self._charged(wallet, pseudo.lot, pseudo.kind, amount)

    def _charged(self, wallet: Wallet, lot: str, kind: LotKind, posted: int, held: int = 0) -> None:
        self.moves.append(_charged(self.line, wallet, lot, kind, posted=posted, held=held))

    def _revived(self, wallet: Wallet, lot: Lot, unit: Unit, amount: int) -> None:
        """It has not expired after all, as of its end."""
        assert lot.expires_at is not None
        at = max(lot.expires_at, lot.occurred_at)
        self.moves.append(
            Move(
                kind="lot_revived",
                account=wallet.account,
                occurred_at=at,
                unit=wallet.unit,
                lot=lot.id,
                lot_kind=lot.kind,
                posted=amount,
            )
        )
        self.moves.append(
            contra_move("lot_revived", "@expired", account=wallet.account, unit=unit, posted=-amount, occurred_at=at)
        )

    def _set_aside(self, wallet: Wallet) -> list[tuple[Lot, int]]:
        """What its hold holds of a wallet's lots, or what was restored of them, in burn order; pseudo-lots last."""
        found: list[tuple[Lot, int]] = []
        if self.hold is None or not (self.is_open or self.restored):
            return found
        for earmark in self.hold.earmarks.values():
            if earmark.account == wallet.account and earmark.unit == wallet.unit:
                amount = earmark.held if self.is_open else self.restored.get(earmark.lot, 0)
                if amount > 0 and (lot := wallet.lots[earmark.lot]).is_for(self.line.scope):
                    found.append((lot, amount))
        if len(found) > 1:
            found.sort(key=lambda each: each[0].use_order)
        return found

    def _usable(self, wallet: Wallet, lot: Lot, unit: Unit, at: datetime) -> int:
        """How much of a lot it may take beyond what its hold set aside, with what has expired of it."""
        if lot.scope is not None and not lot.scope.includes(self.line.scope):
            return 0
        ends = lot.expires_at
        if ends is None or self.place.recorded_at < ends:
            if lot.effective_at is not None and lot.effective_at > at and (self.is_open or not self._is_earmarked(lot)):
                return 0
            return lot.posted - lot.held - lot.frozen
        if lot.void or not self._is_in_grace(lot, ends, unit, at):
            return 0
        return lot.posted - lot.held - lot.frozen + _revivable(wallet, lot)

    def _is_in_grace(self, lot: Lot, ends: datetime, unit: Unit, at: datetime) -> bool:
        """Whether a lot that has ended may still be taken of."""
        if unit.kind == "cap" and lot.is_valid(at):
            return True
        if self._is_earmarked(lot):
            assert self.hold is not None
            return self.place.recorded_at <= max(ends, self.hold.ended_at or ends) + LATE_GRACE
        return unit.kind == "money" and self.line.occurred_at < ends and self.place.recorded_at <= ends + LATE_GRACE

    def _is_earmarked(self, lot: Lot) -> bool:
        return self.hold is not None and (lot.account, lot.unit, lot.id) in self.hold.earmarks

    def _at(self, unit: Unit) -> datetime:
        """Which time's lots pay: for money now's; for a cap those of its hold's placement, or of the use itself."""
        if unit.kind == "money":
            return self.place.recorded_at
        if self.hold is not None and self.hold.expires_at is not None:
            return self.hold.recorded_at
        return min(self.line.occurred_at, self.place.recorded_at)

    def _debt_of(self, wallet: Wallet) -> str | None:
        """The debt that charges of this very transaction have made in the wallet so far: one transaction makes one."""
        began = (self.place.batch, self.place.transaction_position)
        for lot in reversed(wallet.lots.values()):
            if lot.age < began:
                break
            if lot.kind == "debt" and lot.origin is None and lot.posted < 0:
                return lot.id
        return None


def _revivable(wallet: Wallet, lot: Lot) -> int:
    """What has expired of a lot; but for what may have been rolled over to the next period: that is there already."""
    rule = None if lot.rule is None else wallet.rules.get(lot.rule)
    if rule is None or lot.period is None or rule.next_period <= lot.period + 1:
        return lot.expired
    return max(0, lot.expired - rule.rule.rollover_max)


def _lacking(
    state: PartitionState, charging: _Charging, units: Units, counted: Iterable[str], amount: int
) -> InsufficientFunds | None:
    """Why a debit is refused: the wallet that has least for it."""
    found: InsufficientFunds | None = None
    for unit in map(units.by_name.__getitem__, counted):
        for wallet in pinned(state, charging.line.account, unit, charging.hold):
            if wallet.policy == "hard":
                room = max(charging.room(wallet, unit), 0)
                if room < amount and (found is None or room < found.remaining):
                    found = InsufficientFunds(wallet.account, wallet.unit, amount, room)
    return found


def _charge_after_estimate(
    state: PartitionState, line: ChargeLine, hold: Hold, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """Take back all that was charged as an estimate, then charge what it really cost, of the same lots first.

    Of what is left claims on its payments have their part: they, and what else is granted for them, have been read.
    """
    with Attempt(state, units=units, place=place) as attempt:
        restored, repaid = _restore_estimate(attempt, hold, line)
        decided = _charge(
            state,
            line,
            hold,
            units=units,
            place=place,
            new_lots=iter(attempt.new_lot, None),
            restored={
                lot.id: amount if lot.kind in PSEUDO_KINDS else min(amount, lot.available)
                for lot, amount in restored
                if lot.kind not in STAND_INS
            },
        )
        if not isinstance(decided, list):
            return decided
        attempt.do(*decided)
        # As if it had been held until now.
        restore(attempt, [each for each in restored if each[0].kind not in PSEUDO_KINDS], with_grace=False)
        restore(attempt, repaid)
        return attempt.moves


def _restore_estimate(attempt: Attempt, hold: Hold, line: ChargeLine) -> tuple[list[Back], list[Back]]:
    """Undo a hold's estimate and settle it. What its lots got back, and what the lots that had repaid its debts."""
    restored: list[Back] = []
    repaid: list[Back] = []
    now = attempt.place.recorded_at
    per_wallet: dict[tuple[str, str], int] = {}
    for earmark, lot in attempt.state.earmarked(hold):
        # The earmark follows the moves.
        amount = earmark.estimated
        if not amount:
            continue
        if lot.kind == "debt" and lot.posted + amount > 0:
            repaid += unrepay(attempt, lot, lot.posted + amount, occurred_at=now)
        attempt.do(
            Move(
                kind="estimate_reversed",
                account=lot.account,
                occurred_at=now,
                unit=lot.unit,
                lot=lot.id,
                lot_kind=lot.kind,
                hold=hold.id,
                posted=amount,
            )
        )
        restored.append((lot, amount))
        per_wallet[lot.account, lot.unit] = per_wallet.get((lot.account, lot.unit), 0) + amount
    for (account, name), amount in per_wallet.items():
        unit = attempt.units.by_name[name]
        attempt.do(
            contra_move("estimate_reversed", "@usage", account=account, unit=unit, posted=-amount, occurred_at=now)
        )
    if not per_wallet:
        attempt.do(Move(kind="estimate_reversed", account=line.account, occurred_at=now, hold=hold.id))
    return restored, repaid
