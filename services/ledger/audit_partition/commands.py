"""Commands and the journal: what somebody asked for has the command that did, and a command what it asked for.

Nothing in the chain says who asked, under which key, with which body, or what else an outcome told: a change of
`principal`, `idempotency_key`, `body_hash`, or of an outcome's movements cannot be noticed, nor can a removed command
that found all as it wanted it. Under another key a repeat of the command is carried out once more.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Final, LiteralString

import msgspec
from psycopg.rows import TupleRow

from services.ledger.audit_partition.findings import Result
from services.ledger.audit_partition.rows import Source, Told
from services.ledger.domain.entries import Details, LotGranted

_COMMANDS: Final[LiteralString] = """
SELECT batch, transaction_id::text, principal || ' ' || idempotency_key, recorded_at, outcome FROM commands
WHERE partition = %(partition)s AND batch > %(after)s ORDER BY batch
"""

_LISTS: Final[LiteralString] = """
SELECT recorded_at, outcome FROM commands WHERE partition = %(partition)s AND outcome LIKE '{"status":"listed"%%'
"""

# What a transaction that nobody asked for begins with: the end of a lot, or what is told of a wallet, and nothing else,
# as a lot of it begins that was granted for later.
_DUE_FIRST: Final = frozenset({"lot_expired", "balance_crossed"})
# Nobody asks for the end of a hold past its deadline.
_OVERDUE: Final = frozenset({"hold_expired", "hold_estimated"})
# What a command that changes nothing names: since when it is as it wants it.
_NAMED_AGAIN: Final = frozenset({"account_opened", "payment_claimed"})


class _Outcome(msgspec.Struct):
    """What an outcome says of its place; of a list, what each of its replies does."""

    transaction: str = ""
    recorded_at: datetime | None = None
    replies: tuple["_Outcome", ...] = ()

    @property
    def last(self) -> "_Outcome":
        """A list names the transaction that it did last."""
        return self.replies[-1] if self.replies else self


_decode_outcome: Final = msgspec.json.Decoder(_Outcome).decode
_decode_details: Final = msgspec.json.Decoder(Details).decode


class Commands:
    """The commands of each batch."""

    def __init__(self, source: Source, result: Result) -> None:
        self._source = source
        self._result = result
        self._prefix = f"txn_{source.partition:02d}_"
        self._batches = source.batches("commands", _COMMANDS, self._stray)
        self._naming: dict[str, list[TupleRow]] = {}
        self._listed: set[str] = set()

    def begin(self, batch: Sequence[TupleRow]) -> None:
        first = batch[0]
        self._naming.clear()
        self._listed.clear()
        for row in self._batches.take(first[0]):
            self._naming.setdefault(row[1], []).append(row)
            self._check_outcome(row, first[13])

    def check(self, entries: Sequence[TupleRow], told: Told) -> None:
        transaction = entries[0][2]
        rows = self._naming.pop(transaction, ())
        if not rows:
            if (told is None or told.bundle is None) and transaction not in self._listed and not _is_due(entries):
                self._check_listed_elsewhere(entries[0])
        elif (told is not None and told.bundle is not None) or _is_due(entries):
            self._find(entries[0], f"the command {rows[0][2]} names it, and nobody asked for it")
        elif len(rows) > 1 and not any(entry[3] in _NAMED_AGAIN for entry in entries):
            self._find(entries[0], f"the commands {' and '.join(row[2] for row in rows)} say that they asked for it")

    def leave(self) -> None:
        for rows in self._naming.values():
            for row in rows:
                self._stray(row)

    def end(self) -> None:
        self._batches.end()

    def _check_outcome(self, row: TupleRow, recorded_at: datetime) -> None:
        """A command was recorded with its transaction, and its outcome says so."""
        batch, transaction, name, command_recorded_at, text = row
        try:
            outcome = _decode_outcome(text)
        except msgspec.MsgspecError as error:
            self._result.find(batch, 0, f"the outcome of the command {name} cannot be read: {error}")
            return
        self._listed.update(each.transaction.removeprefix(self._prefix) for each in outcome.replies)
        if command_recorded_at != recorded_at:
            self._result.find(
                batch, 0, f"the command {name} was recorded at another time than transaction {transaction}"
            )
        if (outcome.last.transaction, outcome.last.recorded_at) != (self._prefix + transaction, recorded_at):
            self._result.find(batch, 0, f"the outcome of the command {name} is not one of transaction {transaction}")

    def _check_listed_elsewhere(self, first: TupleRow) -> None:
        if first[2] not in self._listed_later:
            self._find(first, "no command asked for it: one has been removed")

    @cached_property
    def _listed_later(self) -> frozenset[str]:
        """What lists did whose last command found all as it wanted it: they are recorded where that was done."""
        found = set[str]()
        for recorded_at, text in (row for rows in self._source.blocks("lists", _LISTS) for row in rows):
            try:
                replies = _decode_outcome(text).replies
            except msgspec.MsgspecError:
                continue
            found.update(
                reply.transaction.removeprefix(self._prefix) for reply in replies if reply.recorded_at != recorded_at
            )
        return frozenset(found)

    def _find(self, entry: TupleRow, what: str) -> None:
        self._result.find(entry[0], entry[1], what)

    def _stray(self, row: TupleRow) -> None:
        self._result.find(row[0], 0, f"the command {row[2]} names transaction {row[1]}, which is not there")


def _is_due(entries: Sequence[TupleRow]) -> bool:
    """Whether a transaction is what became due: it is recorded before something is decided, or by the sweeper."""
    if entries[0][3] in _DUE_FIRST:
        return True
    for entry in entries:
        if entry[3] in _OVERDUE:
            return True
        if entry[3] == "lot_granted" and entry[14] is not None:
            details = _decode_details(entry[14])
            return isinstance(details, LotGranted) and details.rule is not None
    return False
