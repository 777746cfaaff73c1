"""One batch of one partition while it is being decided: entries get their places, and the state follows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Final

import msgspec

from contracts.ids import derived_uuid7
from services.ledger.domain.chain import details_text, entry_hash
from services.ledger.domain.decide import Place
from services.ledger.domain.entries import Details, Entry, Move
from services.ledger.domain.evolve import evolve
from services.ledger.domain.state import PartitionState

_TICK: Final = timedelta(microseconds=1)


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


@dataclass(frozen=True, slots=True)
class Recorded:
    """An entry as it is stored: with its details as text, and its hash."""

    entry: Entry
    details: str | None
    hash: bytes


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

    def next_outbox_number(self) -> int:
        """The number of the next fact."""
        self.outbox_number += 1
        return self.outbox_number

    def finish(self) -> tuple[Head, list[Recorded]]:
        """The head after this batch, and its entries. A batch without entries keeps its number for the next one."""
        chain_hash = self.head.chain_hash
        recorded = []
        for entry in self._entries:
            details = details_text(entry.details)
            chain_hash = entry_hash(chain_hash, partition=self.head.partition, entry=entry, details=details)
            recorded.append(Recorded(entry, details, chain_hash))
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

    def record(self, moves: Sequence[Move]) -> None:
        """Add moves, each as an entry of its own."""
        for move in moves:
            entry = self._entry(move, len(self._entries) + 1)
            self._entries.append(entry)
            evolve(self._draft.state, entry)

    def record_summed(self, moves: Sequence[Move]) -> int:
        """Add moves; those that differ in amounts only, and occurred within the same minute, become one entry.

        The position of the entry that the first of them is part of.
        """
        first = 0
        for move in moves:
            contra = move.account.startswith("@")
            minute = None if contra else move.occurred_at.replace(second=0, microsecond=0)
            key = (move.kind, move.account, move.unit, move.lot, move.hold, minute, move.details)
            found = self._sums.get(key)
            if found is None:
                entry = self._entry(move, len(self._entries) + 1)
                self._sums[key] = _Sum(entry, move.posted, move.held, move.frozen)
                self._entries.append(entry)
            else:
                entry = self._entry(move, found.entry.position)
                found.posted += move.posted
                found.held += move.held
                found.frozen += move.frozen
            first = first or entry.position
            evolve(self._draft.state, entry)
        return first

    def finish(self, details: Details) -> None:
        """Enter the sums, and put what concerns the whole transaction on its first entry."""
        for found in self._sums.values():
            entry = found.entry
            if (entry.posted, entry.held, entry.frozen) != (found.posted, found.held, found.frozen):
                self._entries[entry.position - 1] = msgspec.structs.replace(
                    entry, posted=found.posted, held=found.held, frozen=found.frozen
                )
        self._entries[self._begin] = msgspec.structs.replace(self._entries[self._begin], details=details)

    def _entry(self, move: Move, position: int) -> Entry:
        return Entry(
            batch=self._draft.batch,
            position=position,
            transaction=self.id,
            recorded_at=self._draft.recorded_at,
            kind=move.kind,
            account=move.account,
            occurred_at=move.occurred_at,
            unit=move.unit,
            lot=move.lot,
            lot_kind=move.lot_kind,
            hold=move.hold,
            posted=move.posted,
            held=move.held,
            frozen=move.frozen,
            details=move.details,
        )


@dataclass(slots=True)
class _Sum:
    entry: Entry
    posted: int
    held: int
    frozen: int
