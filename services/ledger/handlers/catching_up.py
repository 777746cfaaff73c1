"""What is due before a command, or while nobody asks: it is recorded first, effective at its own time."""

from collections.abc import Iterable, Sequence
from typing import assert_never

from contracts.accounts import root
from services.ledger.domain.commands import (
    CatchUp,
    ChargeLine,
    ClaimPayment,
    Command,
    Grant,
    ResolveHold,
    ReverseCharge,
    VoidGrant,
)
from services.ledger.domain.decide import decide
from services.ledger.domain.draft import Transaction
from services.ledger.domain.due import decide_due, next_due
from services.ledger.domain.entries import Move
from services.ledger.domain.overdue import decide_overdue, in_order, overdue, overdue_on
from services.ledger.domain.state import Hold
from services.ledger.handlers.items import SweepItem, Swept
from services.ledger.handlers.needs import accounts_of
from services.ledger.handlers.work import Work


def sweep(work: Work, item: SweepItem) -> Swept:
    """Do what is due. What turns out to be done, or not due, leaves no trace."""
    before = work.draft.entries
    match item.command:
        case CatchUp(account=account):
            catch_up(work, (account,), overdue_before(work, (account,), ()))
            transaction = work.draft.begin()
            told = decide(work.draft.state, item.command, units=work.units, place=transaction.place)
            if isinstance(told, list) and told:
                _record_due(work, told, transaction, account)
        case ResolveHold():
            # Of all that are overdue the sweeper asks in order: what was due after this one waits for the next.
            catch_up(work, (), overdue_before(work, (), (item.command,)))
        case _:
            assert_never(item.command)
    return Swept(work.draft.entries - before)


def concerned(work: Work, command: Command) -> Sequence[str]:
    """The accounts on whose wallets a command may act."""
    accounts = accounts_of(command)
    match command:
        case Grant() | ClaimPayment() | ReverseCharge() | VoidGrant():
            return _with_paid(work, command.account, accounts)
        case ChargeLine() if is_of_estimate(work, command):
            return _with_paid(work, command.account, accounts)
        case _:
            return accounts


def is_due(work: Work, accounts: Sequence[str]) -> bool:
    """Whether something is due on accounts by now."""
    due = next_due(work.draft.state, accounts)
    return due is not None and due <= work.draft.recorded_at


def overdue_before(work: Work, accounts: Iterable[str], commands: Iterable[Command]) -> Sequence[Hold]:
    """The holds that have to end before commands: those they name, and those on wallets of accounts."""
    state, at = work.draft.state, work.draft.recorded_at
    named = [hold for each in commands if (hold := overdue(state, each, at)) is not None]
    found = overdue_on(state, accounts, at)
    if not found:
        return named if len(named) < 2 else in_order(named)
    return in_order((*named, *found))


def catch_up(work: Work, accounts: Sequence[str], overdue_holds: Sequence[Hold] = ()) -> list[Move]:
    """Record what is due, each in a transaction of its own, effective at its own time."""
    done: list[Move] = []
    for hold in overdue_holds:
        transaction = work.draft.begin()
        while moves := decide_overdue(work.draft.state, hold, units=work.units, place=transaction.place):
            done += _record_due(work, moves, transaction, hold.account)
            transaction = work.draft.begin()
    for account in accounts:
        # Of one account after the other: what is due on one is nothing to the others.
        while is_due(work, (account,)):
            transaction = work.draft.begin()
            moves = decide_due(work.draft.state, (account,), units=work.units, place=transaction.place)
            done += _record_due(work, moves, transaction, account)
    return done


def _record_due(work: Work, moves: list[Move], transaction: Transaction, account: str) -> list[Move]:
    transaction.record(moves)
    work.tell(work.facts(moves, transaction, account))
    return moves


def _with_paid(work: Work, account: str, accounts: Sequence[str]) -> Sequence[str]:
    """And those of its tree that claims reach."""
    of_tree = root(account)
    found = sorted(name for name in work.paid_accounts if root(name) == of_tree)
    return tuple(dict.fromkeys((*accounts, *found)))


def is_of_estimate(work: Work, line: ChargeLine) -> bool:
    """Whether a line names a hold whose estimate was charged, or is before it: it will be taken back."""
    hold = None if line.hold is None else work.draft.state.holds.get(line.hold)
    if hold is None or hold.account != line.account or hold.overdue != "charge_estimate":
        return False
    return hold.status == "estimated" or hold.is_overdue(work.draft.recorded_at)
