"""One batch of one partition while it is being decided: entries get their places, and the state follows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from itertools import chain
from typing import Any, Final

import msgspec

from contracts.ids import derived_uuid7
from contracts.money import AMOUNT_MAX
from services.ledger.domain.chain import columns_hash, entry_columns
from services.ledger.domain.concerned import Place
from services.ledger.domain.entries import Details, Entry, LotGranted, Move, placed
from services.ledger.domain.evolve import evolve
from services.ledger.domain.state import PartitionState, Trial

_TICK: Final = timedelta(microseconds=1)
# What one entry may sum up to: well inside a bigint.
SUM_MAX: Final = 4 * AMOUNT_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Where a partition stands: the numbers of its last batch, outbox row and charge bundle."""

    partition: int
    epoch: int
    batch: int
    chain_hash: bytes
    recorded_at: datetime
    outbox_number: int
    charges_number: int


class Recorded(msgspec.Struct, frozen=True, gc=False):
    """An entry as it is stored: in columns, and its hash."""

    entry: Entry
    columns: tuple[Any, ...]
    hash: bytes


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a draft stood when it began to try something out."""

    trial: Trial
    entries: int
    outbox_number: int


class Draft:
    """The entries of a batch, in order. They have been added to `state` already: it is lost if the batch is."""

    def __init__(self, head: Head, state: PartitionState, *, now: datetime) -> None:
        self.head = head
        self.state = state
        self.recorded_at = max(now, head.recorded_at + _TICK)
        self.batch = head.batch + 1
        self.outbox_number = head.outbox_number
        self.charges_number = head.charges_number
        self._entries: list[Entry] = []

    def begin(self) -> "Transaction":
        """The next transaction. One that adds nothing has never been."""
        return Transaction(self, self._entries)

    @property
    def entries(self) -> int:
        """How many there are."""
        return len(self._entries)

    def fork(self) -> Fork:
        """What is done from here on is tried out, until `join` or `drop` of what it returns. May be nested."""
        return Fork(self.state.try_out(), len(self._entries), self.outbox_number)

    def join(self, fork: Fork) -> None:
        """What was tried out holds."""
        self.state.keep(fork.trial)

    def drop(self, fork: Fork) -> None:
        """What was tried out has never been."""
        del self._entries[fork.entries :]
        self.outbox_number = fork.outbox_number
        self.state.undo(fork.trial)

    def next_outbox_number(self) -> int:
        """The number of the next fact."""
        self.outbox_number += 1
        return self.outbox_number

    def finish(self) -> tuple[Head, list[Recorded]]:
        """The head after this batch, and its entries. A batch without entries keeps its number for the next one."""
        chain_hash = self.head.chain_hash
        recorded = []
        for entry in self._entries:
            columns = entry_columns(entry, partition=self.head.partition)
            chain_hash = columns_hash(chain_hash, columns)
            recorded.append(Recorded(entry, columns, chain_hash))
        head = Head(
            partition=self.head.partition,
            epoch=self.head.epoch,
            batch=self.batch if recorded else self.head.batch,
            chain_hash=chain_hash,
            recorded_at=self.recorded_at,
            outbox_number=self.outbox_number,
            charges_number=self.charges_number,
        )
        return head, recorded


class Transaction:
    """Entries that stand or fall together."""

    def __init__(self, draft: Draft, entries: list[Entry]) -> None:
        self._draft = draft
        self._entries = entries
        self._begin = len(entries)
        self._sums: dict[tuple[object, ...], _Sum] = {}
        # Those to which nothing is added any more.
        self._closed: list[_Sum] = []

    @cached_property
    def id(self) -> str:
        """Its id, as bare UUID text."""
        uuid = derived_uuid7(
            recorded_at=self._draft.recorded_at,
            partition=self._draft.head.partition,
            batch=self._draft.batch,
            position=self._begin + 1,
        )
        return str(uuid)

    @property
    def place(self) -> Place:
        """Where its next entry will stand."""
        return Place(
            partition=self._draft.head.partition,
            batch=self._draft.batch,
            position=len(self._entries) + 1,
            transaction_position=self._begin + 1,
            recorded_at=self._draft.recorded_at,
        )

    @property
    def position(self) -> int:
        """That of its first entry."""
        return self._begin + 1

    def wallets(self) -> dict[tuple[str, str], None]:
        """The wallets that its entries are about, by account and unit, each once."""
        found: dict[tuple[str, str], None] = {}
        for place in range(self._begin, len(self._entries)):
            entry = self._entries[place]
            if entry.unit is not None and not entry.account.startswith("@"):
                found[entry.account, entry.unit] = None
        return found

    def record(self, moves: Sequence[Move]) -> None:
        """Add moves, each as an entry of its own."""
        for move in moves:
            entry = self._entry(move, len(self._entries) + 1)
            self._entries.append(entry)
            evolve(self._draft.state, entry)

    def record_summed(self, moves: Sequence[Move]) -> int:
        """Add moves; those that differ in amounts only, and occurred within the same minute, become one entry.

        Or more than one: if they are more than one can hold, or a lot comes in between, for what is there then counts.
        The position of the entry that the first of them is part of.
        """
        first = 0
        for move in moves:
            contra = move.account[0] == "@"
            minute = None if contra else move.occurred_at.replace(second=0, microsecond=0)
            key = (move.kind, move.account, move.unit, move.lot, move.hold, minute, move.details)
            found = self._sums.get(key)
            if found is not None and not found.has_room(move):
                self._closed.append(found)
                found = None
            if found is None:
                if isinstance(move.details, LotGranted):
                    self._closed += self._sums.values()
                    self._sums.clear()
                entry = self._entry(move, len(self._entries) + 1)
                self._sums[key] = _Sum(entry, move.posted, move.held, move.frozen)
                self._entries.append(entry)
            else:
                entry = found.entry if contra else self._entry(move, found.entry.position)
                found.posted += move.posted
                found.held += move.held
                found.frozen += move.frozen
            first = first or entry.position
            if not contra:
                evolve(self._draft.state, entry)
        return first

    def finish(self, details: Details) -> None:
        """Enter the sums, and put what concerns the whole transaction on its first entry that has no details."""
        for found in chain(self._closed, self._sums.values()):
            entry = found.entry
            if (entry.posted, entry.held, entry.frozen) != (found.posted, found.held, found.frozen):
                self._entries[entry.position - 1] = msgspec.structs.replace(
                    entry, posted=found.posted, held=found.held, frozen=found.frozen
                )
        for place in range(self._begin, len(self._entries)):
            if self._entries[place].details is None:
                self._entries[place] = msgspec.structs.replace(self._entries[place], details=details)
                return
        raise ValueError(f"no entry of transaction {self.id} is without details")

    def _entry(self, move: Move, position: int) -> Entry:
        return placed(
            move,
            batch=self._draft.batch,
            position=position,
            transaction=self.id,
            recorded_at=self._draft.recorded_at,
        )


@dataclass(slots=True)
class _Sum:
    entry: Entry
    posted: int
    held: int
    frozen: int

    def has_room(self, move: Move) -> bool:
        return (
            -SUM_MAX <= self.posted + move.posted <= SUM_MAX
            and -SUM_MAX <= self.held + move.held <= SUM_MAX
            and -SUM_MAX <= self.frozen + move.frozen <= SUM_MAX
        )
