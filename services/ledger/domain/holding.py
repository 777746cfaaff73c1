"""Holds: placed, extended, released, and resolved at their deadline."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from typing import Literal, assert_never

import msgspec

from contracts.money import AMOUNT_MAX, Unit
from services.ledger.domain import claims
from services.ledger.domain.commands import ExtendHold, Leg, PlaceHold, ReleaseHold, ResolveHold, Scope, Units
from services.ledger.domain.concerned import (
    BALANCE_MAX,
    Place,
    beyond,
    check_amounts,
    counted_in,
    uncapped,
    wallets_of,
)
from services.ledger.domain.due import released_moves
from services.ledger.domain.entries import HeldLeg, HoldExtended, HoldPlaced, LotKind, Move, contra_move
from services.ledger.domain.errors import (
    AccountDiffers,
    AccountNotOpen,
    HoldExists,
    HoldExpired,
    HoldReleased,
    HoldSettled,
    InsufficientFunds,
    InvalidAmount,
    Refusal,
    UnknownHold,
    UnknownUnit,
)
from services.ledger.domain.state import Hold, Lot, PartitionState, Wallet


def decide_place_hold(state: PartitionState, command: PlaceHold, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Set aside what is there between at_least and at_most, on every wallet concerned, or nothing at all.

    UnknownUnit, InvalidAmount, AccountNotOpen, HoldExists, HoldReleased, HoldSettled, HoldExpired, InsufficientFunds.
    """
    if refusal := _check_legs(units, command.legs):
        return refusal
    known = state.holds.get(command.hold)
    if known is not None:
        # Another account's does not end before this is decided, swept or not.
        return HoldExpired(known.id) if known.is_overdue(place.recorded_at) else hold_is(known)
    if command.account not in state.accounts:
        return AccountNotOpen(command.account)
    setting = _Setting("hold_placed", command.hold, command.account, command.scope, units, place)
    decided = setting.aside(state, command.legs, None)
    if not isinstance(decided, tuple):
        return decided
    legs, moves = decided
    placed = HoldPlaced(
        account=command.account,
        expires_at=place.recorded_at + timedelta(seconds=command.lifetime_seconds),
        overdue=command.overdue,
        legs=tuple(legs),
        scope=command.scope,
    )
    return setting.with_details(moves, placed)


def decide_extend_hold(
    state: PartitionState, command: ExtendHold, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """Give an open hold a later deadline, and set more aside on its wallets, as it was placed.

    UnknownUnit, InvalidAmount, UnknownHold, AccountDiffers, HoldReleased, HoldSettled, HoldExpired, InsufficientFunds.
    """
    if refusal := _check_legs(units, command.legs):
        return refusal
    hold = _open_hold(state, command.hold, command.account)
    if not isinstance(hold, Hold):
        return hold
    expires_at = hold.expires_at
    if expires_at is None or expires_at <= place.recorded_at:
        return HoldExpired(command.hold)
    setting = _Setting("hold_extended", hold.id, hold.account, hold.scope, units, place)
    decided = setting.aside(state, command.legs, hold)
    if not isinstance(decided, tuple):
        return decided
    added, moves = decided
    legs = {leg.unit: leg for leg in hold.legs}
    for leg in added:
        before = legs.get(leg.unit)
        legs[leg.unit] = leg if before is None else _sum(before, leg)
        if legs[leg.unit].at_most > AMOUNT_MAX:
            return InvalidAmount(leg.unit, "a hold is at most the largest amount in all")
    later = place.recorded_at + timedelta(seconds=command.lifetime_seconds)
    extended = HoldExtended(expires_at=max(expires_at, later), legs=tuple(legs.values()))
    return setting.with_details(moves, extended)


def decide_release_hold(
    state: PartitionState, command: ReleaseHold, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """Give back what a hold holds. An unknown hold is ended before it can be placed.

    AccountDiffers, HoldReleased, HoldSettled, HoldExpired.
    """
    hold = state.holds.get(command.hold)
    if hold is not None and hold.account != command.account:
        return AccountDiffers(command.hold, command.account)
    if hold is not None and hold.status != "placed":
        return hold_is(hold)
    now = place.recorded_at
    moves = ended("hold_released", command.hold, command.account, hold=hold, state=state, occurred_at=now, taken={})
    moves += freed(state, moves, hold=command.hold, units=units, place=place, occurred_at=now, new_lots=_new(place))
    return moves


def decide_resolve_hold(
    state: PartitionState, command: ResolveHold, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """End a hold that is past its deadline as it says itself: release it, or charge what it holds as an estimate.

    It ends at its deadline: what is released of lots that ended after that is due from then on, as if it had been
    released in time. One that is not past it stays.
    UnknownHold, AccountDiffers, HoldReleased, HoldSettled, HoldExpired.
    """
    hold = _open_hold(state, command.hold, command.account)
    if not isinstance(hold, Hold):
        return hold
    at = hold.expires_at
    if at is None or place.recorded_at < at:
        return []
    match hold.overdue:
        case "release":
            moves = ended("hold_expired", hold.id, hold.account, hold=hold, state=state, occurred_at=at, taken={})
        case "charge_estimate":
            moves = _estimated(state, hold, units=units, occurred_at=at)
        case _:
            assert_never(hold.overdue)
    moves += freed(
        state, moves, hold=hold.id, units=units, place=place, occurred_at=place.recorded_at, new_lots=_new(place), at=at
    )
    return moves


def ended(
    kind: Literal["hold_released", "hold_expired", "hold_settled"],
    hold_id: str,
    account: str,
    *,
    hold: Hold | None,
    state: PartitionState,
    occurred_at: datetime,
    taken: Mapping[str | None, int],
) -> list[Move]:
    """Release what a hold holds but for what was `taken` of it, and end it: at least one entry says so."""
    moves = []
    for earmark, lot in () if hold is None else state.earmarked(hold):
        left = earmark.held - taken.get(earmark.lot, 0)
        if left:
            moves.append(
                Move(
                    kind=kind,
                    account=lot.account,
                    occurred_at=occurred_at,
                    unit=lot.unit,
                    lot=lot.id,
                    lot_kind=lot.kind,
                    hold=hold_id,
                    held=-left,
                )
            )
    return moves or [Move(kind=kind, account=account, occurred_at=occurred_at, hold=hold_id)]


def freed(
    state: PartitionState,
    moves: Sequence[Move],
    *,
    hold: str,
    units: Units,
    place: Place,
    occurred_at: datetime,
    new_lots: Iterator[str],
    at: datetime | None = None,
) -> list[Move]:
    """What becomes of what `moves` have freed of lots: claims take what they wait for, then freezes; what is left of a
    void lot is voided, and of one that has ended by now, or by `at`, it expires.
    """
    now = place.recorded_at
    at = at or now
    lots: dict[str | None, Lot] = {}
    for move in moves:
        if move.held < 0 and move.unit is not None and move.lot is not None:
            lot = state.accounts[move.account].wallets[move.unit].lots[move.lot]
            if lot.void or (lot.expires_at is not None and lot.expires_at <= at):
                lots[lot.id] = lot
    found = claims.claw_released(state, moves, hold=hold, units=units, occurred_at=occurred_at, new_lots=new_lots)
    left = dict.fromkeys(lots, 0)
    for move in (*moves, *found) if lots else ():
        if move.lot in left:
            left[move.lot] += move.posted - move.held - move.frozen
    for lot in lots.values():
        found += released_moves(lot, left[lot.id], units=units, occurred_at=now if lot.void else at)
    return found


def hold_is(hold: Hold) -> Refusal:
    """Why a hold cannot be placed or ended: there is one of this id already."""
    match hold.status:
        case "placed":
            return HoldExists(hold.id)
        case "released":
            return HoldReleased(hold.id)
        case "expired" | "estimated":
            return HoldExpired(hold.id)
        case "settled":
            return HoldSettled(hold.id)
        case _:
            assert_never(hold.status)


def pinned(state: PartitionState, account: str, unit: Unit, hold: Hold | None) -> Sequence[Wallet]:
    """A hold pins its wallets; without one, or for a unit that it does not name, they are those of the moment."""
    leg = None if hold is None else hold.leg(unit.name)
    if leg is None:
        return wallets_of(state, account, unit)
    return [wallet for each in leg.wallets if (wallet := state.wallet(each, unit.name)) is not None]


@dataclass(frozen=True, slots=True)
class _Setting:
    """Setting amounts aside for one hold."""

    kind: Literal["hold_placed", "hold_extended"]
    hold: str
    account: str
    scope: Scope | None
    units: Units
    place: Place

    def aside(
        self, state: PartitionState, legs: Sequence[Leg], hold: Hold | None
    ) -> tuple[list[HeldLeg], list[Move]] | InsufficientFunds | InvalidAmount:
        """Each leg on all its wallets, as much as its tightest allows."""
        held: list[HeldLeg] = []
        moves: list[Move] = []
        new_lots = _new(self.place)
        for leg in legs:
            counted = [self.units.by_name[name] for name in counted_in(self.units, leg.unit)]
            wallets = {unit.name: pinned(state, self.account, unit, hold) for unit in counted}
            amount = leg.at_most
            tightest = _tightest((wallet for each in wallets.values() for wallet in each), self.place, self.scope)
            if tightest is not None:
                remaining, wallet = tightest
                amount = min(amount, remaining)
                if amount < leg.at_least:
                    return InsufficientFunds(wallet.account, wallet.unit, leg.at_least, remaining)
            for unit in counted:
                accounts = tuple(wallet.account for wallet in wallets[unit.name])
                held.append(HeldLeg(unit.name, leg.at_least, leg.at_most, amount, accounts))
                for wallet in wallets[unit.name] if amount else ():
                    set_aside = self._of_wallet(wallet, unit, amount, new_lots)
                    if isinstance(set_aside, InvalidAmount):
                        return set_aside
                    moves += set_aside
        return held, moves

    def with_details(self, moves: list[Move], details: HoldPlaced | HoldExtended) -> list[Move]:
        """The first entry of the hold says what it is."""
        for place, move in enumerate(moves):
            if move.kind == self.kind:
                moves[place] = msgspec.structs.replace(move, details=details)
                return moves
        occurred_at = self.place.recorded_at
        return [Move(kind=self.kind, account=self.account, occurred_at=occurred_at, hold=self.hold, details=details)]

    def _of_wallet(
        self, wallet: Wallet, unit: Unit, amount: int, new_lots: Iterator[str]
    ) -> list[Move] | InvalidAmount:
        """Of its lots in burn order; what they have not, or all if it is unlimited, of a pseudo-lot."""
        now = self.place.recorded_at
        moves: list[Move] = []
        left = amount
        if wallet.policy != "unlimited":
            for lot in wallet.burning():
                part = min(left, lot.posted - lot.held - lot.frozen)
                if part > 0 and lot.is_valid(now) and lot.is_for(self.scope):
                    left -= part
                    moves.append(self._held(wallet, lot.id, lot.kind, part))
                    if not left:
                        return moves
            pseudo = beyond(wallet, unit, at=now, occurred_at=now, new_lots=new_lots)
        else:
            pseudo = uncapped(wallet, new_lots)
        if max(pseudo.held, wallet.held) + amount > BALANCE_MAX:
            return InvalidAmount(wallet.unit, "more would be set aside than the wallet can count")
        moves += pseudo.opened
        moves.append(self._held(wallet, pseudo.lot, pseudo.kind, left))
        return moves

    def _held(self, wallet: Wallet, lot: str, kind: LotKind, amount: int) -> Move:
        return Move(
            kind=self.kind,
            account=wallet.account,
            occurred_at=self.place.recorded_at,
            unit=wallet.unit,
            lot=lot,
            lot_kind=kind,
            hold=self.hold,
            held=amount,
        )


def _open_hold(state: PartitionState, hold: str, account: str) -> Hold | Refusal:
    found = state.holds.get(hold)
    if found is None:
        return UnknownHold(hold)
    if found.account != account:
        return AccountDiffers(hold, account)
    return found if found.status == "placed" else hold_is(found)


def _check_legs(units: Units, legs: Sequence[Leg]) -> UnknownUnit | InvalidAmount | None:
    if refusal := check_amounts(units, [(leg.unit, leg.at_most) for leg in legs]):
        return refusal
    for leg in legs:
        if not 0 <= leg.at_least <= leg.at_most:
            return InvalidAmount(leg.unit, "at_least is between 0 and at_most")
    return None


def _tightest(wallets: Iterator[Wallet], place: Place, scope: Scope | None) -> tuple[int, Wallet] | None:
    """The wallet that allows least, and how much, of those that refuse at all."""
    found: tuple[int, Wallet] | None = None
    for wallet in wallets:
        if wallet.policy == "hard":
            remaining = max(wallet.spendable(place.recorded_at, scope), 0)
            if found is None or remaining < found[0]:
                found = remaining, wallet
    return found


def _sum(before: HeldLeg, added: HeldLeg) -> HeldLeg:
    return HeldLeg(
        unit=before.unit,
        at_least=before.at_least + added.at_least,
        at_most=before.at_most + added.at_most,
        amount=before.amount + added.amount,
        wallets=before.wallets,
    )


def _estimated(state: PartitionState, hold: Hold, *, units: Units, occurred_at: datetime) -> list[Move]:
    """Charge all that a hold holds, and end it."""
    moves: list[Move] = []
    per_wallet: dict[tuple[str, str], int] = {}
    for earmark, lot in state.earmarked(hold):
        if earmark.held:
            per_wallet[lot.account, lot.unit] = per_wallet.get((lot.account, lot.unit), 0) + earmark.held
            moves.append(
                Move(
                    kind="hold_estimated",
                    account=lot.account,
                    occurred_at=occurred_at,
                    unit=lot.unit,
                    lot=lot.id,
                    lot_kind=lot.kind,
                    hold=hold.id,
                    posted=-earmark.held,
                    held=-earmark.held,
                )
            )
    for (account, unit), amount in per_wallet.items():
        moves.append(
            contra_move(
                "hold_estimated",
                "@usage",
                account=account,
                unit=units.by_name[unit],
                posted=amount,
                occurred_at=occurred_at,
            )
        )
    return moves or [Move(kind="hold_estimated", account=hold.account, occurred_at=occurred_at, hold=hold.id)]


def _new(place: Place) -> Iterator[str]:
    return map(place.new_lot, count())
