"""Carry out a command on which nothing waits any more: decide it, and note what follows from it."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from services.ledger.domain.commands import (
    ChargeLine,
    ClaimPayment,
    Command,
    ExtendHold,
    PlaceHold,
    ReleaseHold,
    ResolveHold,
    ReverseCharge,
    Transfer,
)
from services.ledger.domain.decide import decide
from services.ledger.domain.draft import Transaction
from services.ledger.domain.entries import HoldExtended, HoldPlaced, LotGranted, Move
from services.ledger.domain.errors import Refusal
from services.ledger.domain.state import Account, Claim, PartitionState, Wallet
from services.ledger.handlers.catching_up import catch_up, is_due
from services.ledger.handlers.charging import add_to, charge_line, finish_charge, used_scope
from services.ledger.handlers.work import Work
from services.ledger.projections import Row, reversed_text
from services.ledger.translate import ChargedSum, Fact, accepted, reversed_fact, transferred_fact

# What adds nothing that could be due, and what says for which use it is.
_OF_USE: Final = (PlaceHold, ExtendHold, ReleaseHold, ResolveHold, ChargeLine)
_WITH_SCOPE: Final = (PlaceHold, ExtendHold, ChargeLine)
_HELD: Final = (HoldPlaced, HoldExtended)


class Done(NamedTuple):
    """What came of an accepted command: its outcome, and what made it so."""

    outcome: dict[str, Any]
    transaction: str
    recorded_at: datetime
    batch: int


def carry_out(work: Work, command: Command, accounts: Sequence[str]) -> Done | Refusal:
    """Decide a command, on whose accounts nothing is due any more, and let the state follow."""
    transaction = work.draft.begin()
    if isinstance(command, ChargeLine):
        rows: list[Row] = []
        moves = charge_line(work, command, transaction, rows, bundle=None, number=1)
        if not isinstance(moves, list):
            return moves
        work.tell(work.facts(moves, transaction, command.account))
        charged = dict[str, ChargedSum]()
        add_to(charged, command)
        finish_charge(work, transaction, rows, charged, None, required=command.required)
    else:
        moves = decide(work.draft.state, command, units=work.units, place=transaction.place)
        if not isinstance(moves, list):
            return moves
        if moves:
            transaction.record(moves)
            facts = work.facts(moves, transaction, command.account)
            work.tell([*facts, *_facts_of_command(work, command, moves, transaction)])
        if isinstance(command, ReverseCharge) and moves:
            _note_reversal(work, command, moves, transaction)
    return _done(work, command, moves, transaction, accounts)


def _done(work: Work, command: Command, moves: list[Move], transaction: Transaction, accounts: Sequence[str]) -> Done:
    transaction_id, recorded_at, batch = transaction.id, work.draft.recorded_at, work.draft.batch
    if not moves:
        since = _since(work.draft.state, command)
        transaction_id, recorded_at, batch = since.transaction, since.recorded_at, since.batch
    if not isinstance(command, _OF_USE) and is_due(work, accounts):
        # A period may have begun, or what was granted have ended, before now.
        caught_up = catch_up(work, accounts)
        work.renewals += sum(isinstance(move.details, LotGranted) for move in caught_up)
        moves = [*moves, *caught_up]
    outcome = accepted(
        partition=work.partition,
        transaction=transaction_id,
        recorded_at=recorded_at,
        moves=moves,
        remaining=_remaining(work, command, moves),
        units=work.units,
    )
    return Done(outcome, transaction_id, recorded_at, batch)


def _remaining(work: Work, command: Command, moves: Sequence[Move]) -> list[tuple[Wallet, int]]:
    """What the wallets concerned have available now; of a hold, also those on which nothing was set aside."""
    state, at = work.draft.state, work.draft.recorded_at
    keys: dict[tuple[str, str], None] = {}
    for move in moves:
        if isinstance(move.details, _HELD):
            for leg in move.details.legs:
                for account in leg.wallets:
                    keys[account, leg.unit] = None
        if move.unit is not None and move.account[0] != "@":
            keys[move.account, move.unit] = None
    wallets = [wallet for key in keys if (wallet := state.wallet(*key)) is not None]
    if isinstance(command, _WITH_SCOPE):
        used = used_scope(work, command)
        return [(wallet, wallet.available(at, used)) for wallet in wallets]
    return [(wallet, wallet.available_anywhere(at)) for wallet in wallets]


def _facts_of_command(work: Work, command: Command, moves: Sequence[Move], transaction: Transaction) -> list[Fact]:
    match command:
        case ReverseCharge():
            return [reversed_fact(command, moves, transaction=transaction.id, units=work.units)]
        case Transfer():
            work.paid_accounts.update((command.account, command.to_account))
            return [transferred_fact(command, transaction=transaction.id, units=work.units)]
        case _:
            return []


def _note_reversal(work: Work, command: ReverseCharge, moves: Sequence[Move], transaction: Transaction) -> None:
    key = (command.source, command.event_id, command.revision)
    given_back = _given_back(moves)
    line = work.draft.state.lines[key]
    for part, amount in given_back.items():
        work.draft.state.setting(line.reversed, part)
        line.reversed[part] = line.reversed.get(part, 0) + amount
    work.reversals.append(
        (
            work.partition,
            *key,
            work.draft.batch,
            transaction.position,
            transaction.id,
            reversed_text(given_back),
            command.reason,
        )
    )


def _since(state: PartitionState, command: Command) -> Account | Claim:
    """Since when it is as a command without moves would have it: a claim was made, or else an account opened."""
    if isinstance(command, ClaimPayment):
        return state.payments[command.payment, command.account].claims[command.claim]
    return state.accounts[command.account]


def _given_back(moves: Sequence[Move]) -> dict[tuple[str, str, str], int]:
    """What a reversal gave back of what its line took, by (account, unit, lot) of the line."""
    found: dict[tuple[str, str, str], int] = {}
    for move in moves:
        if move.kind == "reversed" and move.unit is not None and move.lot is not None:
            key = (move.account, move.unit, move.lot)
            found[key] = found.get(key, 0) + move.posted
    return found
