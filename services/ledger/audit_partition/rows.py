"""What is read of a partition: rows in blocks, and of what stands beside its journal, batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, Final, LiteralString, Protocol

from psycopg import Connection
from psycopg.rows import TupleRow

from services.ledger.domain.entries import Charged, Reversed

# Few enough that they are read while they are in the processor's cache.
FETCH_ROWS: Final = 2_000
# No batch is before it, not even one that somebody made up.
BEFORE_ALL: Final = -(2**63)

# What a transaction says of the charge lines that it took, or of the one that it gave back.
Told = Charged | Reversed | None


class Beside(Protocol):
    """What is recorded beside a journal, and checked as the journal is read. It names what does not belong to it."""

    def begin(self, batch: Sequence[TupleRow]) -> None:
        """The entries of the next batch."""

    def check(self, entries: Sequence[TupleRow], told: Told) -> None:
        """The entries of a transaction of it."""

    def leave(self) -> None:
        """That were all transactions of the batch."""

    def end(self) -> None:
        """That were all batches."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is recorded of a partition after a batch, as a connection sees it."""

    connection: Connection[TupleRow]
    partition: int
    after: int

    def blocks(self, name: str, statement: LiteralString) -> Iterator[Sequence[TupleRow]]:
        """Rows through a cursor of that name."""
        with self.connection.cursor(name=name, binary=True) as cursor:
            cursor.execute(statement, self._parameters)
            while rows := cursor.fetchmany(FETCH_ROWS):
                yield rows
                if len(rows) < FETCH_ROWS:
                    return

    def batches(
        self, name: str, statement: LiteralString, stray: Callable[[TupleRow], None], *, column: int = 0
    ) -> "Batches":
        """Rows in the order of their batches, which stand in a column."""
        return Batches(chain.from_iterable(self.blocks(name, statement)), column, stray)

    def all(self, statement: LiteralString) -> Sequence[TupleRow]:
        """All rows at once."""
        return self.connection.execute(statement, self._parameters).fetchall()

    @property
    def _parameters(self) -> Mapping[str, Any]:
        return {"partition": self.partition, "after": self.after}


class Batches:
    """Rows in the order of their batches, taken batch by batch; those of batches that nobody takes are `stray`."""

    def __init__(self, rows: Iterator[TupleRow], column: int, stray: Callable[[TupleRow], None]) -> None:
        self._batches = groupby(rows, key=itemgetter(column))
        self._next = next(self._batches, None)
        self._stray = stray

    def take(self, batch: int) -> list[TupleRow]:
        """The rows of a batch, which comes after those that were taken before."""
        while self._next is not None and self._next[0] < batch:
            self._pass()
        if self._next is None or self._next[0] > batch:
            return []
        rows = list(self._next[1])
        self._next = next(self._batches, None)
        return rows

    def end(self) -> None:
        """There are no more batches."""
        while self._next is not None:
            self._pass()

    def _pass(self) -> None:
        assert self._next is not None
        for row in self._next[1]:
            self._stray(row)
        self._next = next(self._batches, None)


def by(column: int, rows: Iterable[TupleRow]) -> dict[str, list[TupleRow]]:
    """Rows by what they say in a column; those that say the same follow each other, as a rule."""
    found: dict[str, list[TupleRow]] = {}
    for key, each in groupby(rows, key=itemgetter(column)):
        found.setdefault(key, []).extend(each)
    return found
