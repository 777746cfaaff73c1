"""Holds past their deadline, which end as they say themselves before anything that names them is decided, or that is
about wallets of which they hold something.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final

from contracts.accounts import path
from services.ledger.domain.commands import (
    ChargeLine,
    Command,
    ExtendHold,
    PlaceHold,
    ReleaseHold,
    ResolveHold,
    Units,
)
from services.ledger.domain.concerned import Place
from services.ledger.domain.due import decide_due, next_due
from services.ledger.domain.entries import Move
from services.ledger.domain.holding import decide_resolve_hold
from services.ledger.domain.state import NEVER, Hold, PartitionState

_NAMING: Final = (ChargeLine, PlaceHold, ExtendHold, ReleaseHold, ResolveHold)


def hold_of(command: Command) -> str | None:
    """The hold that a command names."""
    return command.hold if isinstance(command, _NAMING) else None


def overdue(state: PartitionState, command: Command, at: datetime) -> Hold | None:
    """The hold that a command names, if it is of its account, open, and past its deadline at a time."""
    name = hold_of(command)
    hold = None if name is None else state.holds.get(name)
    return hold if hold is not None and hold.account == command.account and hold.is_overdue(at) else None


def overdue_on(state: PartitionState, accounts: Iterable[str], at: datetime) -> list[Hold]:
    """The open holds past their deadline that hold something of the wallets of accounts, the longest overdue first.

    With those of the paths of such holds, that all of them end in order.
    """
    if not state.deadlines.are_passed(at):
        return []
    return in_order(_overdue_on(state, accounts, at))


def _overdue_on(state: PartitionState, accounts: Iterable[str], at: datetime) -> Iterator[Hold]:
    waiting = list(accounts)
    names, found = set(waiting), set[str]()
    while waiting:
        for hold in state.deadlines.passed(waiting.pop(), at, state.holds):
            if hold.id not in found:
                found.add(hold.id)
                yield hold
                more = set(path(hold.account)) - names
                names |= more
                waiting += sorted(more)


def in_order(holds: Iterable[Hold]) -> list[Hold]:
    """Each once, the longest overdue first."""
    return sorted({hold.id: hold for hold in holds}.values(), key=lambda hold: (hold.expires_at or NEVER, hold.id))


def decide_overdue(state: PartitionState, hold: Hold, *, units: Units, place: Place) -> list[Move]:
    """The moves of the next thing that is due until an overdue hold has ended: what was due on its wallets by its
    deadline, each called for by itself as by `decide_due`; then its end, effective then. None: it has ended.

    What was due on its wallets later is due after it: so all is as if it had ended in time.
    """
    found = state.holds[hold.id]
    if not found.is_overdue(place.recorded_at):
        return []
    assert found.expires_at is not None
    accounts = path(found.account)
    due = next_due(state, accounts)
    if due is not None and due <= found.expires_at:
        return decide_due(state, accounts, units=units, place=place)
    command = ResolveHold(hold=found.id, account=found.account)
    resolved = decide_resolve_hold(state, command, units=units, place=place)
    assert isinstance(resolved, list)
    return resolved
