"""Bundles and the journal: what was done for a bundle was taken with it, and is no more than it says.

Nothing in the chain says what a bundle's `body_hash` was, nor which of its lines had been charged before, and were
passed over: so `lines` may be found too low, never too high. A number that was taken is not taken again, whatever these
columns say: of the bundle they decide only whether a second delivery is told as a repeat or as a conflict.
"""

from collections.abc import Sequence
from typing import Final, LiteralString

from psycopg.rows import TupleRow

from services.ledger.audit_partition.findings import Result
from services.ledger.audit_partition.rows import Source, Told
from services.ledger.domain.entries import Charged

_BUNDLES: Final[LiteralString] = """
SELECT batch, number, transaction_id::text, lines, lines_dead FROM bundles
WHERE partition = %(partition)s AND batch > %(after)s ORDER BY batch, number
"""


class Bundles:
    """The bundles of each batch."""

    def __init__(self, source: Source, result: Result) -> None:
        self._result = result
        self._batches = source.batches("bundles", _BUNDLES, self._stray)
        self._taken: dict[int, TupleRow] = {}
        self._reversals: dict[int, int] = {}
        self._last = 0

    def begin(self, batch: Sequence[TupleRow]) -> None:
        self._reversals.clear()
        self._taken = {row[1]: row for row in self._batches.take(batch[0][0])}
        for number, row in self._taken.items():
            if number <= self._last:
                self._result.find(row[0], 0, f"the bundle {number} was taken after the bundle {self._last}")
            self._last = number

    def check(self, entries: Sequence[TupleRow], told: Told) -> None:
        """Its charges come last, and are the transaction that it names."""
        if told is None or told.bundle is None:
            return
        first, number = entries[0], told.bundle
        if number not in self._taken:
            self._result.find(first[0], first[1], f"it was done for bundle {number}, which was not taken with it")
        elif isinstance(told, Charged):
            row = self._taken.pop(number)
            self._check_lines(row, told.lines)
            if row[2] != first[2]:
                what = f"it was done for bundle {number}, which names transaction {row[2]}"
                self._result.find(first[0], first[1], what)
        else:
            self._reversals[number] = self._reversals.get(number, 0) + 1

    def leave(self) -> None:
        for row in self._taken.values():
            self._check_lines(row, 0)
            if row[2] is not None:
                self._stray(row)

    def end(self) -> None:
        self._batches.end()

    def _check_lines(self, row: TupleRow, charged: int) -> None:
        batch, number, _, lines, dead = row
        done = charged + self._reversals.get(number, 0)
        if dead < 0 or done + dead > lines:
            what = f"the bundle {number} says that {dead} of its {lines} lines are dead, and {done} were carried out"
            self._result.find(batch, 0, what)

    def _stray(self, row: TupleRow) -> None:
        if row[2] is not None:
            self._result.find(row[0], 0, f"the bundle {row[1]} names transaction {row[2]}, which is not of it")
        elif row[0]:
            # Where nothing was ever decided, one of which nothing could be charged has no batch.
            self._result.find(row[0], 0, f"the bundle {row[1]} was taken with a batch that is not there")
