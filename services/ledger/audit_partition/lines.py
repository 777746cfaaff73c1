"""Charge lines and the journal: those of a transaction are the ones whose hash it carries, and keep the laws."""

from collections.abc import Sequence
from typing import Final, LiteralString

from psycopg.rows import TupleRow

from services.ledger.audit_partition.findings import Result
from services.ledger.audit_partition.rows import Source, Told, by
from services.ledger.domain.chain import lines_hash
from services.ledger.domain.entries import Charged
from services.ledger.domain.laws import Laws

# As their hash covers them, and when they were recorded. What they are sorted by comes first within: it is found at
# once then.
_LINES: Final[LiteralString] = """
SELECT partition, source, event_id, revision, account, occurred_at, hold_id::text, scope, price_version, own_key,
       amounts, split, bundle_number, line_number, batch, transaction_id::text, recorded_at
FROM (
    SELECT batch, transaction_id, line_number, partition, source, event_id, revision, account, occurred_at, hold_id,
           scope, price_version, own_key, amounts, split, bundle_number, recorded_at
    FROM charge_lines WHERE partition = %(partition)s AND batch > %(after)s
"""
# There is no index on their batches.
_SINCE: Final[LiteralString] = """
    AND recorded_at > coalesce((
        SELECT recorded_at FROM journal WHERE partition = %(partition)s AND batch = %(after)s AND position = 1
    ), '-infinity')
"""
_IN_ORDER: Final[LiteralString] = """
    ORDER BY batch, transaction_id, line_number
) l
"""
_HASHED: Final = 16


class ChargeLines:
    """The charge lines of each batch."""

    def __init__(self, source: Source, laws: Laws, result: Result, *, since: bool) -> None:
        self._laws = laws
        self._result = result
        statement = _LINES + (_SINCE if since else "") + _IN_ORDER
        self._batches = source.batches("lines", statement, self._stray, column=14)
        self._of_transaction: dict[str, list[TupleRow]] = {}

    def begin(self, batch: Sequence[TupleRow]) -> None:
        lines = self._batches.take(batch[0][0])
        recorded_at = batch[0][13]
        self._result.lines += len(lines)
        self._of_transaction = by(15, lines)
        for line in lines:
            if line[16] != recorded_at:
                name = "/".join(map(str, line[1:4]))
                self._result.find(line[14], 0, f"the charge line {name} was recorded at another time than its batch")

    def check(self, entries: Sequence[TupleRow], told: Told) -> None:
        first = entries[0]
        if isinstance(told, Charged):
            lines = self._of_transaction.pop(first[2], [])
            if lines_hash([line[:_HASHED] for line in lines]) == told.lines_hash:
                self._laws.check_lines(entries, lines, required=told.required)
            else:
                what = f"the {len(lines)} charge lines of its transaction are not its own"
                self._result.find(first[0], first[1], what)
        elif first[2] in self._of_transaction:
            lines = self._of_transaction.pop(first[2])
            self._result.find(first[0], first[1], f"{len(lines)} charge lines say they are of its transaction")

    def leave(self) -> None:
        for lines in self._of_transaction.values():
            self._stray(lines[0])

    def end(self) -> None:
        self._batches.end()

    def _stray(self, row: TupleRow) -> None:
        self._result.find(row[14], 0, f"a charge line says it is of transaction {row[15]}, which is not there")
