"""Reversals and the journal: what a transaction gives back is recorded as it was, and is no more than was charged."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, LiteralString

from psycopg.rows import TupleRow

from services.ledger.audit_partition.findings import Result
from services.ledger.audit_partition.rows import Source, Told, by
from services.ledger.domain.entries import Reversed
from services.ledger.domain.laws import more_than_charged, reversal_row

_REVERSALS: Final[LiteralString] = """
SELECT source, event_id, revision, batch, position, transaction_id::text, split, reason, recorded_at FROM reversals
WHERE partition = %(partition)s AND batch > %(after)s ORDER BY batch, position
"""

# All reversals of the lines of which something was given back since.
_GIVEN_BACK: Final[LiteralString] = """
SELECT source, event_id, revision, r.batch, r.position, r.split, c.split
FROM reversals r LEFT JOIN charge_lines c USING (partition, source, event_id, revision)
WHERE r.partition = %(partition)s AND (source, event_id, revision) IN (
    SELECT source, event_id, revision FROM reversals WHERE partition = %(partition)s AND batch > %(after)s
)
ORDER BY 1, 2, 3, 4, 5
"""


class Reversals:
    """The reversals of each batch."""

    def __init__(self, source: Source, result: Result) -> None:
        self._source = source
        self._result = result
        self._batches = source.batches("reversals", _REVERSALS, self._stray, column=3)
        self._of_transaction: dict[str, list[TupleRow]] = {}

    def begin(self, batch: Sequence[TupleRow]) -> None:
        self._of_transaction = by(5, self._batches.take(batch[0][0]))

    def check(self, entries: Sequence[TupleRow], told: Told) -> None:
        first = entries[0]
        if not isinstance(told, Reversed) and first[2] not in self._of_transaction:
            return
        found = self._of_transaction.pop(first[2], [])
        wanted = reversal_row(entries, told) if isinstance(told, Reversed) else None
        if wanted is not None and wanted not in found:
            what = f"it gives back {_line_name(wanted)}, and that is not what is recorded"
            self._result.find(first[0], first[1], what)
        for row in found:
            if row != wanted:
                self._stray(row)

    def leave(self) -> None:
        for rows in self._of_transaction.values():
            for row in rows:
                self._stray(row)

    def end(self) -> None:
        self._batches.end()
        self._check_sums()

    def _check_sums(self) -> None:
        """What was given back of a charge line is not more than it took, lot by lot."""
        for _, each in groupby(self._source.all(_GIVEN_BACK), key=itemgetter(0, 1, 2)):
            reversals = list(each)
            last = reversals[-1]
            name, split = _line_name(last), last[6]
            if split is None:
                self._result.find(last[3], last[4], f"it gives back {name}, which was not charged")
                continue
            for (account, unit, lot), amount in more_than_charged(split, [row[5] for row in reversals]).items():
                what = f"{amount} {unit} more than {name} took of lot {lot} of {account} is given back"
                self._result.find(last[3], last[4], what)

    def _stray(self, row: TupleRow) -> None:
        what = f"the reversal of {_line_name(row)} names transaction {row[5]}, which does not give that back"
        self._result.find(row[3], row[4], what)


def _line_name(reversal: Sequence[Any]) -> str:
    """Of which charge line a row of reversals is."""
    return "/".join(map(str, reversal[:3]))
