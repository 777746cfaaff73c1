"""What of the partitions owned has to be read before a batch can be decided."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, assert_never

from contracts.accounts import path
from services.ledger.domain.commands import (
    LATE_GRACE,
    CatchUp,
    ChargeLine,
    ClaimPayment,
    Command,
    Grant,
    PlaceHold,
    ResolveHold,
    ReverseCharge,
    Transfer,
    Units,
    VoidGrant,
)
from services.ledger.domain.draft import Head
from services.ledger.domain.entries import payment_of
from services.ledger.domain.overdue import hold_of, overdue_on
from services.ledger.domain.state import Account, PartitionState
from services.ledger.handlers.items import (
    BundleItem,
    CommandItem,
    Item,
    ListItem,
    SweepItem,
    commands_of,
    lines_of,
    reversals_of,
)
from services.ledger.handlers.keys import Key, Keys
from services.ledger.store import Needs
from services.ledger.translate import Bundle

BATCH_SECONDS_MAX: Final = 10.0
_BATCH_MAX: Final = timedelta(seconds=BATCH_SECONDS_MAX)
# Holds are read before they are overdue, that they are not asked for each time that one is.
_READ_AHEAD: Final = timedelta(minutes=1)


@dataclass(slots=True)
class Owned:
    """A partition owned here. `stale`: what is in memory may differ from what is stored, and is read again first."""

    head: Head
    state: PartitionState = field(default_factory=PartitionState)
    stale: bool = False

    def soon(self, now: datetime) -> datetime:
        """When the next batch is recorded at the latest: it is not known yet."""
        return max(now, self.head.recorded_at) + _BATCH_MAX

    def distrust(self) -> None:
        """Read it again before it is used: what was decided may not be stored."""
        self.stale = True
        self.state = PartitionState()


def needs_of(items: Sequence[Item], owned: Mapping[int, Owned], *, look_up_lines: bool, now: datetime) -> Needs:
    """What is not in memory, but for what commands may repeat."""
    needs = Needs()
    for item in items:
        here = owned.get(item.partition)
        if here is None:
            continue
        _need_partition(needs, item.partition, here, now)
        match item:
            case CommandItem():
                _need(needs, item.partition, here.state, item.command)
            case ListItem(commands=commands):
                for each in commands:
                    _need(needs, item.partition, here.state, each.command)
            case SweepItem():
                _need(needs, item.partition, here.state, item.command)
            case BundleItem(bundle=bundle):
                if here.stale or bundle.number <= here.head.charges_number:
                    needs.bundles.add((item.partition, bundle.number))
                _need_lines(needs, item.partition, here.state, bundle, look_up_lines=look_up_lines)
            case _:
                assert_never(item)
    return needs


def keys_of(item: Item) -> Iterator[Key]:
    """The idempotency keys of what is asked."""
    match item:
        case CommandItem() | ListItem(key=str()):
            assert item.key is not None
            yield item.partition, item.principal, item.key
        case ListItem(commands=commands):
            yield from ((item.partition, item.principal, each.key) for each in commands)
        case _:
            pass


def may_repeat(items: Iterable[Item], keys: Keys, now: datetime) -> bool:
    """Whether what commands may repeat is to be looked up, as it would not show, or probably is a repeat."""
    asked = [item for item in items if isinstance(item, CommandItem | ListItem)]
    return bool(asked) and (
        keys.is_wary(now)
        # What is tried out only is not written.
        or any(isinstance(item, ListItem) or item.look_up or item.dry_run for item in asked)
        or any(keys.is_recent(key) for item in asked for key in keys_of(item))
    )


def need_repeats(needs: Needs, items: Iterable[Item], owned: Mapping[int, Owned]) -> None:
    """Add what commands may repeat: their keys, what they charge, the holds they place."""
    for item in items:
        here = owned.get(item.partition)
        if here is None or not isinstance(item, CommandItem | ListItem):
            continue
        needs.commands.update(keys_of(item))
        for command in commands_of(item):
            match command:
                case ChargeLine():
                    needs.lines.add((item.partition, command.source, command.event_id, command.revision))
                case PlaceHold() if not _is_open(here.state, command.hold):
                    needs.holds.add((item.partition, command.hold, command.account))
                case _:
                    pass


def _need_partition(needs: Needs, partition: int, here: Owned, now: datetime) -> None:
    if here.stale:
        needs.heads.add(partition)
    soon, unread_from = here.soon(now), here.state.deadlines.unread_from
    if unread_from <= soon:
        needs.overdue.add((partition, unread_from, soon + _READ_AHEAD))


def late_needs_of(
    items: Sequence[Item],
    owned: Mapping[int, Owned],
    *,
    units: Units,
    now: datetime,
    reached: Iterable[tuple[int, str]] = (),
) -> Needs:
    """What charges of long ago may have been paid with. Only now it is known on which wallets they count.

    And what `overdue_needs_of` says, and what comes with the lots of a line that is charged and given back at once, or
    of an estimate that is made and taken back at once: which lots those will be is not known, so with all that are
    there.
    """
    late = overdue_needs_of(items, owned, now=now, reached=reached)
    for partition, account in _undone_at_once(items):
        if (here := owned.get(partition)) is not None:
            _need_lots_of(late, partition, here.state, account)
    since = now - LATE_GRACE
    for item in items:
        here = owned.get(item.partition)
        if here is None:
            continue
        soon = here.soon(now)
        for line in lines_of(item):
            if line.hold is None and line.occurred_at >= since:
                continue
            hold = None if line.hold is None else here.state.holds.get(line.hold)
            if hold is not None and hold.overdue == "charge_estimate" and hold.is_overdue(soon):
                # Its estimate is made, and taken back at once.
                _need_lots_of(late, item.partition, here.state, line.account)
            # One that ended before it was placed says nothing of the time.
            at = line.occurred_at if hold is None or hold.expires_at is None else hold.recorded_at
            if at < since:
                late.past_lots.update(
                    (item.partition, account, at)
                    for account in path(line.account)
                    if _counts_there(here.state.accounts.get(account), line, units)
                )
    return late


def overdue_needs_of(
    items: Iterable[Item], owned: Mapping[int, Owned], *, now: datetime, reached: Iterable[tuple[int, str]]
) -> Needs:
    """The accounts of holds that will have ended before, on wallets concerned, and of those `reached` by claims."""
    needs = Needs()
    for partition, accounts in _with_overdue(items, owned, reached, now):
        state = owned[partition].state
        for overdue in overdue_on(state, accounts, owned[partition].soon(now)):
            _need_accounts(needs, partition, state, path(overdue.account))
    return needs


def _need(needs: Needs, partition: int, state: PartitionState, command: Command) -> None:
    _need_accounts(needs, partition, state, accounts_of(command))
    match command:
        case Grant() if (payment := payment_of(command.kind, command.reference)) is not None:
            needs.payments.add((partition, payment, command.account, False))
        case ClaimPayment():
            needs.payments.add((partition, command.payment, command.account, True))
        case VoidGrant():
            needs.lots.add((partition, command.lot, command.account))
        case ReverseCharge():
            line = (partition, command.source, command.event_id, command.revision, command.account)
            needs.past_lines.add(line)
        case _:
            pass
    hold = None if isinstance(command, PlaceHold) else hold_of(command)
    if hold is not None and not _is_open(state, hold):
        needs.holds.add((partition, hold, command.account))


def _is_open(state: PartitionState, hold: str) -> bool:
    """Whether a hold in memory is all that is needed of it. One that has ended is read with what it had earmarked."""
    known = state.holds.get(hold)
    return known is not None and known.status == "placed"


def _need_lines(
    needs: Needs,
    partition: int,
    state: PartitionState,
    bundle: Bundle,
    *,
    look_up_lines: bool,
) -> None:
    for reversal in reversals_of(bundle):
        _need(needs, partition, state, reversal)
    names = set()
    for line in bundle.lines:
        if isinstance(line, ChargeLine):
            names.add(line.account)
            if look_up_lines:
                needs.lines.add((partition, line.source, line.event_id, line.revision))
            if line.hold is not None and not _is_open(state, line.hold):
                needs.holds.add((partition, line.hold, line.account))
    for name in names:
        _need_accounts(needs, partition, state, path(name))


def _need_accounts(needs: Needs, partition: int, state: PartitionState, names: Iterable[str]) -> None:
    needs.accounts.update((partition, name) for name in names if name not in state.accounts)


def _with_overdue(
    items: Iterable[Item], owned: Mapping[int, Owned], reached: Iterable[tuple[int, str]], now: datetime
) -> Iterator[tuple[int, Iterable[str]]]:
    """The partitions in which holds are overdue, or will be soon, and the accounts on whose wallets items may act."""
    partitions = {item.partition for item in items} & owned.keys()
    late = {each for each in partitions if owned[each].state.deadlines.are_passed(owned[each].soon(now))}
    if late:
        found = {
            (item.partition, name)
            for item in items
            if item.partition in late
            for command in commands_of(item)
            for name in accounts_of(command)
        }
        found.update(each for each in reached if each[0] in late)
        for partition in late:
            yield partition, [name for of, name in sorted(found) if of == partition]


def accounts_of(command: Command) -> tuple[str, ...]:
    """The accounts on whose wallets a command may act, but for those that a payment leads to."""
    match command:
        case CatchUp():
            return (command.account,)
        case Transfer():
            return (*path(command.account), *path(command.to_account))
        case _:
            return path(command.account)


def _counts_there(account: Account | None, line: ChargeLine, units: Units) -> bool:
    """Whether an account has a wallet on which a line counts as a cap: money has no periods."""
    if account is None or not account.wallets:
        return False
    counted = (each for unit, _ in line.amounts for each in (unit, *units.mirrors.get(unit, ())))
    return any(
        each in account.wallets and (unit := units.by_name.get(each)) is not None and unit.kind == "cap"
        for each in counted
    )


def _undone_at_once(items: Iterable[Item]) -> set[tuple[int, str]]:
    """The partitions and accounts of lines that a batch both charges and gives back, and of holds likewise."""
    if all(isinstance(item, BundleItem) and not item.bundle.reversals for item in items):
        return set()
    commands = [(item.partition, command) for item in items for command in commands_of(item)]
    reversals = {_line_key(command) for _, command in commands if isinstance(command, ReverseCharge)}
    resolved = {command.hold for _, command in commands if isinstance(command, ResolveHold)}
    if not (reversals or resolved):
        return set()
    return {
        (partition, command.account)
        for partition, command in commands
        if isinstance(command, ChargeLine) and (command.hold in resolved or _line_key(command) in reversals)
    }


def _line_key(command: ChargeLine | ReverseCharge) -> tuple[str, str, int]:
    return command.source, command.event_id, command.revision


def _need_lots_of(needs: Needs, partition: int, state: PartitionState, account: str) -> None:
    """Whatever what is on an account's wallets may lead to, if it is given back."""
    for name in path(account):
        found = state.accounts.get(name)
        for lot in [] if found is None else [lot for wallet in found.wallets.values() for lot in wallet.lots.values()]:
            if (payment := payment_of("purchase", lot.reference)) is not None:
                needs.payments.add((partition, payment, name, False))
            needs.repaying.update((partition, repaid_by, name) for repaid_by in lot.repaid)
