"""Reversal of a charge line: what it took goes back to the very lots, and from there where it would be by now."""

from collections import deque
from collections.abc import Iterable, Mapping

import msgspec

from services.ledger.domain import claims
from services.ledger.domain.attempt import Attempt
from services.ledger.domain.commands import RETURN_GRACE, ReverseCharge, Units
from services.ledger.domain.concerned import BALANCE_MAX, Place, check_amounts, counted_in
from services.ledger.domain.debts import repay, unrepay
from services.ledger.domain.due import released_moves
from services.ledger.domain.entries import PSEUDO_KINDS, LotGranted, Move, Reversed, contra_move, payment_of
from services.ledger.domain.errors import InvalidAmount, MoreThanCharged, Refusal, UnknownCharge
from services.ledger.domain.state import Lot, PartitionState, PastLine

# What goes back of a line to one lot: its account, unit and id, and how much.
Part = tuple[str, str, str, int]


def decide_reverse_charge(
    state: PartitionState, command: ReverseCharge, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """Give back what a line took and has not been given back, or amounts of that, last taken first.

    Of a debt, what is still owed is owed no longer; what was repaid goes back to the lots that repaid it. No moves:
    all of it has been given back. UnknownUnit, InvalidAmount, UnknownCharge, MoreThanCharged.
    """
    if refusal := check_amounts(units, command.amounts or ()):
        return refusal
    line = state.lines.get((command.source, command.event_id, command.revision))
    if line is None or line.account != command.account:
        return UnknownCharge(command.source, command.event_id, command.revision)
    asked = None if command.amounts is None else _asked(line, command.amounts, units)
    if isinstance(asked, MoreThanCharged):
        return asked
    with Attempt(state, units=units, place=place) as attempt:
        return _reverse(attempt, line, asked, command)


def _reverse(
    attempt: Attempt, line: PastLine, asked: Mapping[str, int] | None, command: ReverseCharge
) -> list[Move] | InvalidAmount:
    details: Reversed | None = Reversed(
        command.source, command.event_id, command.revision, command.reason, command.correction, command.bundle
    )
    backs = []
    for part in _parts(line, asked):
        backs += _give_back(attempt, part, details)
        # It is said once.
        details = None
    restore(attempt, backs)
    for before, wallet in attempt.wallets():
        if wallet.counted > BALANCE_MAX and wallet.counted > before:
            return InvalidAmount(wallet.unit, "the wallet would have more than it can count")
    return attempt.moves


def restore(attempt: Attempt, backs: Iterable[claims.Back], *, with_grace: bool = True) -> None:
    """What becomes of amounts that have come back to lots.

    Claims on a lot's payment have their part first. Of a void lot the rest is voided. Of one that has ended a cap's
    expires, and money becomes a lot of the same kind for some days, `with_grace`. It repays what is owed, as any money
    that comes in.
    """
    at = attempt.place.recorded_at
    waiting = deque(backs)
    # Each round cancels for good some of what was owed and repaid: it ends.
    while waiting:
        lot, amount = waiting.popleft()
        payment = claims.claimed_payment(attempt, lot)
        if payment is not None:
            waiting.extend(claims.settle(attempt, payment, occurred_at=at))
        left = min(amount, lot.available)
        if left <= 0:
            continue
        is_over = lot.expires_at is not None and lot.expires_at <= at
        if with_grace and is_over and not lot.void and attempt.units.by_name[lot.unit].kind == "money":
            lot = _return_lot(attempt, lot, left)
        gone = released_moves(lot, left, units=attempt.units, occurred_at=at)
        attempt.do(*gone)
        if not gone:
            # What claims on its own payment made owed stays what they come to.
            repay(attempt, lot, left, occurred_at=at, but_of=payment_of(lot.kind, lot.reference))


def _asked(line: PastLine, amounts: Iterable[tuple[str, int]], units: Units) -> dict[str, int] | MoreThanCharged:
    """What is asked back, by unit: with that of a money unit goes what counted it."""
    left = _left(line)
    charged = dict(line.amounts)
    asked: dict[str, int] = {}
    for unit, amount in amounts:
        counted = counted_in(units, unit) if unit in charged else ()
        of_wallets = [sum(parts.values()) for (_, of), parts in left.items() if of in counted]
        # What no wallet was charged is not given back to any.
        remaining = min(of_wallets, default=charged.get(unit, 0))
        if amount > remaining:
            return MoreThanCharged(unit, amount, remaining)
        asked |= dict.fromkeys(counted, amount)
    return asked


def _parts(line: PastLine, asked: Mapping[str, int] | None) -> list[Part]:
    """Share out what is asked back, or all that is left, on the lots of each wallet, last taken first."""
    parts = []
    for (account, unit), lots in _left(line).items():
        wanted = sum(lots.values()) if asked is None else asked.get(unit, 0)
        for lot, left in reversed(lots.items()):
            part = min(wanted, left)
            if part > 0:
                wanted -= part
                parts.append((account, unit, lot, part))
    return parts


def _left(line: PastLine) -> dict[tuple[str, str], dict[str, int]]:
    """What has not been given back of a line, by wallet and lot, in the order in which it was taken."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for (account, unit, lot), taken in line.split.items():
        found.setdefault((account, unit), {})[lot] = taken - line.reversed.get((account, unit, lot), 0)
    return found


def _give_back(attempt: Attempt, part: Part, details: Reversed | None) -> list[claims.Back]:
    """Give back to one lot. To what lots something came back by that, this one or those that repaid it."""
    at = attempt.place.recorded_at
    account, unit, lot_id, amount = part
    lot = attempt.wallet(account, unit).lots[lot_id]
    backs = []
    if lot.kind == "debt":
        backs = unrepay(attempt, lot, amount + lot.posted, occurred_at=at)
    to_lot = Move(
        kind="reversed",
        account=account,
        occurred_at=at,
        unit=unit,
        lot=lot.id,
        lot_kind=lot.kind,
        posted=amount,
        details=details,
    )
    contra = contra_move(
        "reversed", "@usage", account=account, unit=attempt.units.by_name[unit], posted=-amount, occurred_at=at
    )
    attempt.do(to_lot, contra)
    return backs if lot.kind in PSEUDO_KINDS else [(lot, amount)]


def _return_lot(attempt: Attempt, lot: Lot, amount: int) -> Lot:
    """Move what came back to a lot that has ended to a new one like it, valid for some days."""
    at = attempt.place.recorded_at
    new = attempt.new_lot()
    taken = Move(
        kind="transferred",
        account=lot.account,
        occurred_at=at,
        unit=lot.unit,
        lot=lot.id,
        lot_kind=lot.kind,
        posted=-amount,
    )
    details = LotGranted(
        priority=lot.priority,
        reference=lot.reference,
        expires_at=at + RETURN_GRACE,
        scope=lot.scope,
        cost_basis=lot.cost_basis,
        origin=lot.id,
    )
    attempt.do(taken, msgspec.structs.replace(taken, lot=new, posted=amount, details=details))
    return attempt.wallet_of(lot).lots[new]
