"""What callers are answered: outcomes and refusals, in the words of the contracts."""

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

from contracts import ledger as words
from contracts.ids import Kind as IdKind
from contracts.ids import make_id
from contracts.money import format_amount
from contracts.partition import PARTITION_COUNT
from services.ledger.domain.commands import Units
from services.ledger.domain.entries import PSEUDO_KINDS, Move, is_contra
from services.ledger.domain.errors import (
    AccountDiffers,
    HoldExists,
    HoldExpired,
    HoldReleased,
    HoldSettled,
    InsufficientFunds,
    MoreThanCharged,
    Refusal,
    UnknownHold,
    UnknownLot,
)
from services.ledger.domain.state import Wallet
from services.ledger.translate.problems import Invalid

# A problem's pointer to a command of a list.
_IN_LIST: Final = re.compile(r"/commands/(\d+)(?:/|$)")


def accepted(
    *,
    partition: int,
    transaction: str,
    recorded_at: datetime,
    moves: Sequence[Move],
    remaining: Sequence[tuple[Wallet, int]],
    units: Units,
) -> dict[str, Any]:
    """The outcome of an accepted command, for contracts.ledger.Accepted. `remaining`: what wallets have available."""
    sums: dict[tuple[str, str, str | None, str | None], list[int]] = {}
    exceeded: dict[tuple[str, str], int] = {}
    for move in moves:
        if move.unit is None or move.lot is None or is_contra(move.account):
            continue
        is_pseudo = move.lot_kind in PSEUDO_KINDS
        key = (move.account, move.unit, None if is_pseudo else move.lot, move.lot_kind)
        total = sums.setdefault(key, [0, 0, 0])
        total[0] += move.posted
        total[1] += move.held
        total[2] += move.frozen
        if is_pseudo and move.lot_kind != "uncapped" and move.kind in _BEYOND:
            beyond = max(-move.posted, move.held)
            if beyond > 0:
                exceeded[move.account, move.unit] = exceeded.get((move.account, move.unit), 0) + beyond

    def text(amount: int, unit: str) -> str:
        return format_amount(amount, units.by_name[unit]) if amount else "0"

    outcome: dict[str, Any] = {
        "status": "accepted",
        "transaction": full_id("txn", partition, transaction),
        "recorded_at": recorded_at,
        "movements": [
            {
                "account": account,
                "unit": unit,
                "lot": None if lot is None else full_id("lot", partition, lot),
                "lot_kind": lot_kind,
                "posted": text(posted, unit),
                "held": text(held, unit),
                "frozen": text(frozen, unit),
            }
            for (account, unit, lot, lot_kind), (posted, held, frozen) in sums.items()
        ],
        "remaining": [
            {"account": wallet.account, "unit": wallet.unit, "available": text(available, wallet.unit)}
            for wallet, available in remaining
        ],
        "replayed": False,
    }
    if exceeded:
        outcome["exceeded"] = [
            {"account": account, "unit": unit, "amount": text(amount, unit)}
            for (account, unit), amount in exceeded.items()
        ]
    return outcome


# What takes, or sets aside, more than there is.
_BEYOND: Final = frozenset({"charged", "adjusted", "hold_placed", "hold_extended"})


def refused(refusal: Refusal, *, partition: int, units: Units) -> dict[str, Any]:
    """A refusal as it is told, with its numbers, for contracts.ledger.Refused."""
    told = {"status": "refused", "code": refusal.code, "message": refusal_text(refusal, partition=partition)}
    if not isinstance(refusal, InsufficientFunds | MoreThanCharged):
        return told
    unit = units.by_name[refusal.unit]
    required, remaining = format_amount(refusal.required, unit), format_amount(refusal.remaining, unit)
    numbers = {
        "required": {"amount": required, "unit": unit.name},
        "remaining": {"amount": remaining, "unit": unit.name},
    }
    if isinstance(refusal, MoreThanCharged):
        return {**told, **numbers, "message": f"{told['message']}: {remaining}, not {required}"}
    message = f"the {unit.name} wallet of {refusal.account} has {remaining} available; {required} is required"
    return {**told, **numbers, "message": message, "limit_source": refusal.account}


def refusal_text(refusal: Refusal, *, partition: int) -> str:
    """A refusal as a sentence, in which holds and lots have the ids that others know."""
    match refusal:
        case (
            AccountDiffers(hold=hold)
            | HoldExists(hold=hold)
            | HoldReleased(hold=hold)
            | HoldSettled(hold=hold)
            | HoldExpired(hold=hold)
            | UnknownHold(hold=hold)
        ):
            return str(replace(refusal, hold=full_id("hold", partition, hold)))
        case UnknownLot(lot=lot):
            return str(replace(refusal, lot=full_id("lot", partition, lot)))
        case _:
            return str(refusal)


def refused_as(error: Invalid) -> words.Refused | words.Failed:
    """What could not be read, as an answer over request/reply: all problems in the message."""
    first = error.problems[0]
    if first.code == "invalid":
        return words.Failed(code="invalid", message=str(error))
    in_list = _IN_LIST.match(first.pointer)
    return words.Refused(code=first.code, message=str(error), index=None if in_list is None else int(in_list[1]))


@lru_cache(maxsize=PARTITION_COUNT * 4)
def _id_prefix(kind: IdKind, partition: int) -> str:
    return make_id(kind, partition=partition, uuid=UUID(int=0)).removesuffix(str(UUID(int=0)))


def full_id(kind: IdKind, partition: int, uuid: str) -> str:
    """The id that others know, of a bare UUID text."""
    return _id_prefix(kind, partition) + uuid
