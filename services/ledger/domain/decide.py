"""Decisions: what a command does to a partition's state, as moves, or why not. Nothing here changes the state.

Money is paid by the nearest open wallet up the path, whole. A cap is counted on every wallet of its unit on the path.
A path without a wallet of a unit is not limited in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from typing import Final, Literal, assert_never

import msgspec

from contracts.accounts import path
from contracts.ids import derived_uuid7
from contracts.money import AMOUNT_MAX, Unit
from services.ledger.domain import claims
from services.ledger.domain.commands import (
    ChargeLine,
    ClaimPayment,
    Command,
    Grant,
    OpenAccount,
    PlaceHold,
    ReleaseHold,
    Units,
)
from services.ledger.domain.debts import debts_after, repayments
from services.ledger.domain.entries import (
    HeldLeg,
    HoldPlaced,
    LotGranted,
    LotKind,
    Move,
    PaymentClaimed,
    WalletOpened,
    contra_move,
    granted_by,
    payment_of,
)
from services.ledger.domain.errors import (
    AccountDiffers,
    AccountNotOpen,
    HoldExists,
    HoldReleased,
    HoldSettled,
    InsufficientFunds,
    InvalidAmount,
    InvalidTime,
    PaymentDiffers,
    Refusal,
    UnknownUnit,
    WalletNotOpen,
    WalletPolicyDiffers,
)
from services.ledger.domain.state import Hold, PartitionState, Payment, Wallet

# Clocks differ a little; what is said to happen later than this is a mistake.
AHEAD_MAX: Final = timedelta(minutes=5)
# What a wallet may come to hold, or to owe: well inside a bigint.
BALANCE_MAX: Final = 4 * AMOUNT_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in the journal a decision will stand: its next new entry's position, and where its transaction began."""

    partition: int
    batch: int
    position: int
    transaction_position: int
    recorded_at: datetime

    def new_lot(self, count: int) -> str:
        """The id of the `count`-th lot, from 0, that a decision makes: each makes at least one new entry, too."""
        return str(
            derived_uuid7(
                recorded_at=self.recorded_at,
                partition=self.partition,
                batch=self.batch,
                position=self.position + count,
            )
        )


def decide(state: PartitionState, command: Command, *, units: Units, place: Place) -> list[Move] | Refusal:
    """What `command` does: moves in order, or a refusal. No moves: it is so already."""
    match command:
        case OpenAccount():
            return decide_open_account(state, command, units=units, place=place)
        case Grant():
            return decide_grant(state, command, units=units, place=place)
        case PlaceHold():
            return decide_place_hold(state, command, units=units, place=place)
        case ReleaseHold():
            return decide_release_hold(state, command, units=units, place=place)
        case ChargeLine():
            return decide_charge(state, command, units=units, place=place)
        case ClaimPayment():
            return decide_claim_payment(state, command, units=units, place=place)
        case _:
            assert_never(command)


def decide_open_account(
    state: PartitionState, command: OpenAccount, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """Open what is not open yet: the path from its root, then wallets. UnknownUnit, WalletPolicyDiffers."""
    moves = [
        Move(kind="account_opened", account=account, occurred_at=place.recorded_at)
        for account in reversed(path(command.account))
        if account not in state.accounts
    ]
    asked: dict[str, str] = {}
    for unit, policy in command.wallets:
        if unit not in units.by_name:
            return UnknownUnit(unit)
        wallet = state.wallet(command.account, unit)
        known = asked.get(unit) if wallet is None else wallet.policy
        if known is None:
            asked[unit] = policy
            moves.append(
                Move(
                    kind="wallet_opened",
                    account=command.account,
                    occurred_at=place.recorded_at,
                    unit=unit,
                    details=WalletOpened(policy=policy),
                )
            )
        elif known != policy:
            return WalletPolicyDiffers(command.account, unit, known, policy)
    return moves


def decide_grant(state: PartitionState, command: Grant, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Add a lot; claims on its payment that came before take their part, then what is owed is repaid, oldest first.

    UnknownUnit, InvalidAmount, InvalidTime, AccountNotOpen, WalletNotOpen.
    """
    if refusal := _check_amounts(units, [(command.unit, command.amount)]):
        return refusal
    occurred_at = command.occurred_at or place.recorded_at
    if occurred_at > place.recorded_at + AHEAD_MAX:
        return InvalidTime(occurred_at, place.recorded_at)
    wallet = state.wallet(command.account, command.unit)
    if wallet is None:
        return _not_open(state, command.account, command.unit)
    if not 0 < command.amount <= BALANCE_MAX - wallet.posted:
        return InvalidAmount(command.unit, "a grant is more than 0, and no more than its wallet can still count")
    lot = place.new_lot(0)
    granted = Move(
        kind="lot_granted",
        account=wallet.account,
        occurred_at=occurred_at,
        unit=wallet.unit,
        lot=lot,
        lot_kind=command.kind,
        posted=command.amount,
        details=LotGranted(priority=command.priority, reference=command.reference),
    )
    moves = [
        granted,
        contra_move(
            "lot_granted",
            granted_by(command.kind),
            account=wallet.account,
            unit=units.by_name[command.unit],
            posted=-command.amount,
            occurred_at=occurred_at,
        ),
    ]
    moves += _claimed_before(state, command, wallet, granted, units=units, place=place)
    left = sum(move.posted for move in moves if move.lot == lot)
    owed = debts_after(wallet, moves)
    moves += repayments(wallet, lot=lot, lot_kind=command.kind, amount=left, owed=owed, occurred_at=occurred_at)
    return moves


def _claimed_before(
    state: PartitionState, command: Grant, wallet: Wallet, granted: Move, *, units: Units, place: Place
) -> list[Move]:
    """What claims that came before take of a lot as it is granted, and, as more is paid, of those granted before."""
    of_payment = payment_of(command.kind, command.reference)
    payment = None if of_payment is None else state.payments.get((of_payment, command.account))
    if payment is None or granted.lot is None or not payment.claimed:
        return []
    source = claims.Source(granted.lot, command.kind, wallet)
    new = claims.Part(source=source, granted=granted.posted, available=granted.posted)
    parts = [*claims.parts_of(state, payment.id, payment.account), new]
    clawing = claims.Clawing(
        payment=payment.id, units=units, occurred_at=granted.occurred_at, new_lots=map(place.new_lot, count(1))
    )
    return claims.claim(parts, clawing, unit=payment.unit, claimed=payment.claimed)


def decide_place_hold(state: PartitionState, command: PlaceHold, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Set aside what is there between at_least and at_most, on every wallet concerned, or nothing at all.

    UnknownUnit, InvalidAmount, AccountNotOpen, HoldExists, HoldReleased, HoldSettled, InsufficientFunds.
    """
    if refusal := _check_amounts(units, [(leg.unit, leg.at_most) for leg in command.legs]):
        return refusal
    for leg in command.legs:
        if not 0 <= leg.at_least <= leg.at_most:
            return InvalidAmount(leg.unit, "at_least is between 0 and at_most")
    hold = state.holds.get(command.hold)
    if hold is not None:
        return _hold_is(hold)
    if command.account not in state.accounts:
        return AccountNotOpen(command.account)
    legs: list[HeldLeg] = []
    moves: list[Move] = []
    for leg in command.legs:
        for unit in (leg.unit, *units.mirrors.get(leg.unit, ())):
            wallets = _wallets(state, command.account, units.by_name[unit])
            tightest = min(wallets, key=_spendable, default=None)
            amount = leg.at_most
            if tightest is not None:
                amount = min(leg.at_most, max(_spendable(tightest), 0))
                if amount < leg.at_least:
                    return InsufficientFunds(tightest.account, unit, leg.at_least, _spendable(tightest))
            legs.append(HeldLeg(unit, leg.at_least, leg.at_most, amount, tuple(wallet.account for wallet in wallets)))
            for wallet in wallets:
                moves.extend(_earmark(wallet, amount, command.hold, place.recorded_at))
    placed = HoldPlaced(
        account=command.account,
        expires_at=place.recorded_at + timedelta(seconds=command.lifetime_seconds),
        overdue="release",
        legs=tuple(legs),
    )
    if not moves:
        moves = [Move(kind="hold_placed", account=command.account, occurred_at=place.recorded_at, hold=command.hold)]
    moves[0] = msgspec.structs.replace(moves[0], details=placed)
    return moves


def decide_release_hold(
    state: PartitionState, command: ReleaseHold, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """Give back what a hold holds; claims take what they wait for. An unknown hold is ended before it can be placed.

    AccountDiffers, HoldReleased, HoldSettled.
    """
    hold = state.holds.get(command.hold)
    if hold is not None and hold.account != command.account:
        return AccountDiffers(command.hold, command.account)
    if hold is not None and hold.status != "placed":
        return _hold_is(hold)
    moves = _end(
        "hold_released",
        command.hold,
        command.account,
        hold=hold,
        state=state,
        occurred_at=place.recorded_at,
        taken={},
    )
    return moves + claims.claw_released(
        state,
        moves,
        hold=command.hold,
        units=units,
        occurred_at=place.recorded_at,
        new_lots=map(place.new_lot, count()),
    )


def decide_charge(state: PartitionState, line: ChargeLine, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Take what a use cost: from its hold's lots, then from what is available, then as debt or overage.

    It settles its hold finally. Never refused for want of money: UnknownUnit, InvalidAmount, InvalidTime,
    AccountNotOpen, AccountDiffers.
    """
    if refusal := _check_amounts(units, line.amounts):
        return refusal
    if line.occurred_at > place.recorded_at + AHEAD_MAX:
        return InvalidTime(line.occurred_at, place.recorded_at)
    if line.account not in state.accounts:
        return AccountNotOpen(line.account)
    known = None if line.hold is None else state.holds.get(line.hold)
    if line.hold is not None and known is not None and known.account != line.account:
        return AccountDiffers(line.hold, line.account)
    hold = known if known is not None and known.status == "placed" else None
    moves: list[Move] = []
    new_lots = map(place.new_lot, count())
    for asked, amount in line.amounts:
        for unit in (asked, *units.mirrors.get(asked, ())) if amount else ():
            for wallet in _charged_wallets(state, line.account, units.by_name[unit], hold):
                if wallet.posted - wallet.overage - amount < -BALANCE_MAX:
                    return InvalidAmount(unit, "the wallet would owe more than it can count")
                paid = _charge_wallet(
                    wallet, line, amount=amount, hold=hold, unit=units.by_name[unit], place=place, new_lots=new_lots
                )
                moves.extend(paid)
    if line.hold is not None and (known is None or hold is not None):
        taken = {move.lot: -move.held for move in moves if move.held}
        moves.extend(
            _end(
                "hold_settled",
                line.hold,
                line.account,
                hold=hold,
                state=state,
                occurred_at=line.occurred_at,
                taken=taken,
            )
        )
        moves += claims.claw_released(
            state, moves, hold=line.hold, units=units, occurred_at=line.occurred_at, new_lots=new_lots
        )
    if not moves:
        moves.append(Move(kind="charged", account=line.account, occurred_at=line.occurred_at))
    return moves


def decide_claim_payment(
    state: PartitionState, command: ClaimPayment, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """Note what a claim says, then take of the payment's lots what all claims on it come to, or give back.

    UnknownUnit, InvalidAmount, InvalidTime, AccountNotOpen, WalletNotOpen, PaymentDiffers.
    """
    payment = state.payments.get((command.payment, command.account))
    if refusal := _check_claim(state, command, payment, units=units, place=place):
        return refusal
    content = (command.reason, command.state, command.claimed)
    if claims.is_unchanged(payment, command.claim, revision=command.revision, content=content):
        return []
    others = () if payment is None else (claim for claim in payment.claims.values() if claim.id != command.claim)
    claimed = sum(claim.claimed for claim in others if claim.state == "final")
    if command.state == "final":
        claimed += command.claimed
    said = Move(
        kind="payment_claimed",
        account=command.account,
        occurred_at=command.occurred_at or place.recorded_at,
        unit=command.unit,
        details=PaymentClaimed(
            payment=command.payment,
            claim=command.claim,
            reason=command.reason,
            state=command.state,
            claimed=command.claimed,
            revision=command.revision,
        ),
    )
    clawing = claims.Clawing(
        payment=command.payment, units=units, occurred_at=said.occurred_at, new_lots=map(place.new_lot, count())
    )
    parts = claims.parts_of(state, command.payment, command.account)
    moves = claims.claim(parts, clawing, unit=command.unit, claimed=claimed)
    for wallet in {part.wallet.unit: part.wallet for part in parts}.values():
        posted = sum(move.posted for move in moves if (move.account, move.unit) == (wallet.account, wallet.unit))
        if not -BALANCE_MAX <= wallet.posted - wallet.overage + posted <= BALANCE_MAX:
            return InvalidAmount(wallet.unit, "the wallet would owe or have more than it can count")
    return [said, *moves]


def _check_claim(
    state: PartitionState, command: ClaimPayment, payment: Payment | None, *, units: Units, place: Place
) -> Refusal | None:
    if refusal := _check_amounts(units, [(command.unit, command.claimed)]):
        return refusal
    if command.occurred_at is not None and command.occurred_at > place.recorded_at + AHEAD_MAX:
        return InvalidTime(command.occurred_at, place.recorded_at)
    if state.wallet(command.account, command.unit) is None:
        return _not_open(state, command.account, command.unit)
    if payment is None:
        elsewhere = any(of == command.payment and other.paid for (of, _), other in state.payments.items())
        return PaymentDiffers(command.payment, command.account) if elsewhere else None
    if payment.unit not in {None, command.unit}:
        return InvalidAmount(command.unit, f"the payment {command.payment} is counted in {payment.unit}")
    return None


def _not_open(state: PartitionState, account: str, unit: str) -> AccountNotOpen | WalletNotOpen:
    return WalletNotOpen(account, unit) if account in state.accounts else AccountNotOpen(account)


def _charge_wallet(
    wallet: Wallet,
    line: ChargeLine,
    *,
    amount: int,
    hold: Hold | None,
    unit: Unit,
    place: Place,
    new_lots: Iterator[str],
) -> Iterator[Move]:
    """What the hold set aside, then what is available, then what is not there; and the contra of it all."""

    def charged(lot: str, kind: LotKind, posted: int, held: int = 0) -> Move:
        return Move(
            kind="charged",
            account=wallet.account,
            occurred_at=line.occurred_at,
            unit=wallet.unit,
            lot=lot,
            lot_kind=kind,
            hold=line.hold if held else None,
            posted=posted,
            held=held,
        )

    left = amount
    if hold is not None and hold.earmarks:
        for lot in wallet.burning():
            earmark = hold.earmarks.get((wallet.account, wallet.unit, lot.id))
            if left and earmark is not None and earmark.held:
                part = min(left, earmark.held)
                left -= part
                yield charged(lot.id, lot.kind, -part, -part)
    for lot in wallet.burning():
        if not left:
            break
        part = min(left, lot.available)
        if part > 0:
            left -= part
            yield charged(lot.id, lot.kind, -part)
    if left:
        match unit.kind:
            case "money":
                yield charged(_debt_of(wallet, place) or next(new_lots), "debt", -left)
            case "cap":
                overage = wallet.overage_lot()
                yield charged(next(new_lots) if overage is None else overage.id, "overage", -left)
            case _:
                assert_never(unit.kind)
    yield contra_move(
        "charged", "@usage", account=wallet.account, unit=unit, posted=amount, occurred_at=line.occurred_at
    )


def _debt_of(wallet: Wallet, place: Place) -> str | None:
    """The debt that charges of this very transaction have made in the wallet so far: one transaction makes one."""
    began = (place.batch, place.transaction_position)
    made = (debt.id for debt in reversed(wallet.debts()) if debt.age >= began and debt.origin is None)
    return next(made, None)


def _end(
    kind: Literal["hold_released", "hold_settled"],
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
    for earmark in () if hold is None else hold.earmarks.values():
        left = earmark.held - taken.get(earmark.lot, 0)
        if left:
            lot = state.accounts[earmark.account].wallets[earmark.unit].lots[earmark.lot]
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


def _earmark(wallet: Wallet, amount: int, hold: str, occurred_at: datetime) -> Iterator[Move]:
    """Set `amount` of a wallet aside, lot by lot in burn order. So much is there: it was looked at before."""
    left = amount
    for lot in wallet.burning():
        part = min(left, lot.available)
        if part > 0:
            left -= part
            yield Move(
                kind="hold_placed",
                account=wallet.account,
                occurred_at=occurred_at,
                unit=wallet.unit,
                lot=lot.id,
                lot_kind=lot.kind,
                hold=hold,
                held=part,
            )


def _charged_wallets(state: PartitionState, account: str, unit: Unit, hold: Hold | None) -> list[Wallet]:
    """A hold pins its wallets; a charge without one, or of a unit its hold does not name, takes those of the moment."""
    leg = None if hold is None else hold.leg(unit.name)
    if leg is None:
        return _wallets(state, account, unit)
    return [wallet for pinned in leg.wallets if (wallet := state.wallet(pinned, unit.name)) is not None]


def _wallets(state: PartitionState, account: str, unit: Unit) -> list[Wallet]:
    """Who pays: for money the nearest open wallet up the path; for a cap every one on the path."""
    found = [wallet for each in path(account) if (wallet := state.wallet(each, unit.name)) is not None]
    match unit.kind:
        case "money":
            return found[:1]
        case "cap":
            return found
        case _:
            assert_never(unit.kind)


def _spendable(wallet: Wallet) -> int:
    """How much a hold may set aside before the wallet is at its floor."""
    match wallet.policy:
        case "hard":
            return wallet.available + wallet.overdraft
        case _:
            assert_never(wallet.policy)


def _hold_is(hold: Hold) -> Refusal:
    match hold.status:
        case "placed":
            return HoldExists(hold.id)
        case "released":
            return HoldReleased(hold.id)
        case "settled":
            return HoldSettled(hold.id)
        case _:
            assert_never(hold.status)


def _check_amounts(units: Units, amounts: Sequence[tuple[str, int]]) -> UnknownUnit | InvalidAmount | None:
    """Known units, each once, none that follows another, amounts from 0 to the largest."""
    seen: set[str] = set()
    for unit, amount in amounts:
        if unit not in units.by_name:
            return UnknownUnit(unit)
        if not 0 <= amount <= AMOUNT_MAX:
            return InvalidAmount(unit, "an amount is at least 0 and at most the largest amount")
        if unit in seen:
            return InvalidAmount(unit, "a unit is named once")
        seen.update((unit, *units.mirrors.get(unit, ())))
    return None
