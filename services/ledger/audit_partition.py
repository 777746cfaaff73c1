"""The audit of one partition: a pass through its journal, beside all that is recorded of its batches.

Imports little: each process of an audit begins with this module.
"""

import gc
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain, groupby
from multiprocessing.connection import Connection as Pipe
from operator import itemgetter
from typing import Any, Final, LiteralString

import msgspec
import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from psycopg import Connection
from psycopg.rows import TupleRow

from services.ledger.domain.chain import GENESIS, columns_hash, lines_hash
from services.ledger.domain.commands import LotScope, Scope
from services.ledger.domain.entries import Charged, Reversed
from services.ledger.domain.laws import KnownHold, KnownLot, KnownWallet, Laws, more_than_charged, reversal_row
from services.ledger.signing import is_signed, says_head

FINDINGS_KEPT_MAX: Final = 100
# Few enough that they are read while they are in the processor's cache.
FETCH_ROWS: Final = 2_000
SIGNED_KEPT_MAX: Final = 200_000

_decode_lot_scope: Final = msgspec.json.Decoder(LotScope).decode
_decode_scope: Final = msgspec.json.Decoder(Scope).decode


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """Something that is not as it must be, and where; `what` is a clause."""

    partition: int
    batch: int
    position: int
    what: str

    def __str__(self) -> str:
        place = f", batch {self.batch}" if self.batch else ""
        place += f", position {self.position}" if self.position else ""
        return f"partition {self.partition}{place}: {self.what}"


@dataclass(frozen=True, slots=True)
class Reached:
    """An entry that ends a batch, and the hash of everything up to it."""

    batch: int
    chain_hash: bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """A head that was seen outside the database; `where` says how."""

    reached: Reached
    where: str


@dataclass(frozen=True, slots=True)
class Task:
    """What one process needs to audit one partition."""

    url: str = field(repr=False)
    partition: int
    keys: Mapping[str, bytes]
    caps: frozenset[str]
    since: Reached | None
    seen: tuple[Seen, ...]


@dataclass(slots=True)
class Result:
    """What was found in one partition."""

    partition: int
    reached: Reached = Reached(0, GENESIS)
    entries: int = 0
    lines: int = 0
    signatures: int = 0
    found: int = 0
    findings: list[Finding] = field(default_factory=list)

    def find(self, batch: int, position: int, what: str) -> None:
        self.found += 1
        if len(self.findings) < FINDINGS_KEPT_MAX:
            self.findings.append(Finding(self.partition, batch, position, what))


# What this process has found to be signed, with the key by which it was.
_signed: Final = set[bytes]()


def audit_in_turn(tasks: Sequence[Task], turn: Any, counted: Any, told: Pipe) -> None:
    """Audit partitions, each the next that no other process has begun, and tell what was found: a Result, or an error.

    A process of its own; `turn` and `counted` are shared by all: the next task, and the entries that have been read.
    """
    # Whoever began it ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Rows come and go by the million, and none refers to itself: looking for those that do takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(100_000)

    def count(entries: int) -> None:
        with counted.get_lock():
            counted.value += entries

    def mine() -> Iterator[Task]:
        while True:
            with turn.get_lock():
                number, turn.value = turn.value, turn.value + 1
            if number >= len(tasks):
                return
            yield tasks[number]

    try:
        for result in audit_partitions(mine(), count):
            told.send(result)
    except Exception as error:
        # It is raised where it is told.
        told.send(error)


def audit_partitions(tasks: Iterable[Task], count: Callable[[int], None]) -> Iterator[Result]:
    """What is to be found in each partition of a database. `count` is told how many entries more have been read."""
    connection = None
    try:
        for task in tasks:
            connection = connection or connect(task.url)
            yield _audited(connection, task, count)
            # Each partition is seen at a moment of its own.
            connection.rollback()
    finally:
        if connection is not None:
            connection.close()


def _audited(connection: Connection[TupleRow], task: Task, count: Callable[[int], None]) -> Result:
    result = Result(task.partition)
    since = task.since
    if since is not None and _hash_of(connection, task.partition, since.batch) != since.chain_hash:
        # Said below, with all else that was seen: so everything is looked at again.
        since = None
    _Partition(connection, task, since, result, count).run()
    return result


def connect(url: str) -> Connection[TupleRow]:
    """A connection that sees one moment, and changes nothing."""
    connection = psycopg.connect(
        url,
        application_name="scrip-audit",
        options="-c timezone=UTC -c search_path=ledger -c jit=off -c work_mem=32MB -c enable_nestloop=off",
    )
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    return connection


class _Partition:
    """One pass through a partition's journal, beside what is recorded of its batches."""

    def __init__(
        self,
        connection: Connection[TupleRow],
        task: Task,
        since: Reached | None,
        result: Result,
        count: Callable[[int], None],
    ) -> None:
        self._connection = connection
        self._partition = task.partition
        self._task = task
        self._keys = {name: Ed25519PublicKey.from_public_bytes(raw) for name, raw in task.keys.items()}
        self._since = since
        self._after = 0 if since is None else since.batch
        self._result = result
        self._count = count
        self._laws = Laws(task.partition, caps=task.caps)
        self._signatures = self._batches("signatures", _SIGNATURES, self._stray_signature)
        self._commands = self._batches("commands", _COMMANDS, self._stray_command)
        self._bundles = self._batches("bundles", _BUNDLES, self._stray_bundle)
        self._reversals = self._batches("reversals", _REVERSALS, self._stray_reversal, column=3)
        lines = _LINES + (_LINES_SINCE if self._after else "") + _LINES_IN_ORDER
        self._lines = self._batches("lines", lines, self._stray_line, column=14)

    def run(self) -> None:
        """Everything about the partition."""
        if self._since is not None:
            _recall(self._connection, self._laws, self._partition, self._after)
        self._read_journal()
        for breach in self._laws.breaches:
            self._result.find(*breach)
        for beside in (self._signatures, self._commands, self._bundles, self._reversals, self._lines):
            beside.end()
        self._check_head()
        self._check_given_back()

    def _blocks(self, name: str, statement: LiteralString) -> Iterator[Sequence[TupleRow]]:
        with self._connection.cursor(name=name, binary=True) as cursor:
            cursor.execute(statement, {"partition": self._partition, "after": self._after})
            while rows := cursor.fetchmany(FETCH_ROWS):
                yield rows

    def _batches(
        self, name: str, statement: LiteralString, stray: Callable[[TupleRow], None], *, column: int = 0
    ) -> "_Batches":
        return _Batches(chain.from_iterable(self._blocks(name, statement)), column, stray)

    def _journal(self) -> Iterator[Sequence[TupleRow]]:
        for rows in self._blocks("journal", _JOURNAL):
            self._count(len(rows))
            yield rows

    def _read_journal(self) -> None:
        """The chain, entry by entry; the laws, transaction by transaction; what is beside it, batch by batch."""
        previous = GENESIS if self._since is None else self._since.chain_hash
        partition, result = self._partition, self._result
        before, recorded_before = self._after, None
        for batch, each in groupby(chain.from_iterable(self._journal()), key=itemgetter(0)):
            rows = list(each)
            first, position, recorded_at = rows[0], 0, rows[0][13]
            if batch != before + 1:
                self._find(first, f"batch {before + 1} should come here: entries have been removed")
            if recorded_before is not None and recorded_at <= recorded_before:
                self._find(first, f"it was recorded at {recorded_at}, not after the batch before it")
            for row in rows:
                if row[13] != recorded_at:
                    self._find(row, "it was recorded at another time than the entry before it in its batch")
                    recorded_at = row[13]
                if row[1] != position + 1:
                    self._find(row, f"position {position + 1} should come here: entries have been removed")
                position = row[1]
                if columns_hash(previous, (partition, *row[:15])) != row[15]:
                    self._find(row, "its hash is not that of its columns after the entry before it")
                previous = row[15]
            self._check_batch(rows)
            before, recorded_before = batch, recorded_at
        result.reached = Reached(before, previous)

    def _check_batch(self, rows: Sequence[TupleRow]) -> None:
        self._result.entries += len(rows)
        batch = rows[0][0]
        self._check_signature(rows[-1])
        lines = self._lines.take(batch)
        self._result.lines += len(lines)
        lines_by_transaction = _by(15, lines)
        reversals = _by(5, self._reversals.take(batch))
        bundles = {row[1]: row for row in self._bundles.take(batch)}
        commands = _by(1, self._commands.take(batch))
        for transaction, each in groupby(rows, key=itemgetter(2)):
            entries = list(each)
            told = self._laws.add(entries)
            commands.pop(transaction, None)
            if told is not None:
                self._check_bundle(entries[0], told, bundles)
            if isinstance(told, Charged) or transaction in lines_by_transaction:
                self._check_lines(entries, told, lines_by_transaction.pop(transaction, []))
            if isinstance(told, Reversed) or transaction in reversals:
                self._check_reversals(entries, told, reversals.pop(transaction, []))
        for bundle in bundles.values():
            self._stray_bundle(bundle)
        for command in chain.from_iterable(commands.values()):
            self._stray_command(command)
        for reversal in chain.from_iterable(reversals.values()):
            self._stray_reversal(reversal)
        for of_transaction in lines_by_transaction.values():
            self._stray_line(of_transaction[0])

    def _check_bundle(self, first: TupleRow, told: Charged | Reversed, bundles: dict[int, TupleRow]) -> None:
        """A bundle was taken with what was done for it. Its charges come last, and are the transaction it names."""
        if told.bundle is None:
            return
        is_charged = isinstance(told, Charged)
        found = bundles.pop(told.bundle, None) if is_charged else bundles.get(told.bundle)
        if found is None:
            self._find(first, f"it was done for bundle {told.bundle}, which was not taken with it")
        elif is_charged and found[2] != first[2]:
            self._find(first, f"it was done for bundle {told.bundle}, which names transaction {found[2]}")

    def _check_lines(
        self, entries: Sequence[TupleRow], told: Charged | Reversed | None, lines: Sequence[TupleRow]
    ) -> None:
        if not isinstance(told, Charged):
            self._find(entries[0], f"{len(lines)} charge lines say they are of its transaction")
            return
        if lines_hash(lines) != told.lines_hash:
            self._find(entries[0], f"the {len(lines)} charge lines of its transaction are not its own")
        else:
            self._laws.check_lines(entries, lines, required=told.required)

    def _check_reversals(
        self, entries: Sequence[TupleRow], told: Charged | Reversed | None, reversals: Sequence[TupleRow]
    ) -> None:
        """What a transaction gives back of a charge line is recorded as it was, and nothing else is."""
        wanted = reversal_row(entries, told) if isinstance(told, Reversed) else None
        if wanted is not None and wanted not in reversals:
            self._find(entries[0], f"it gives back {_line_name(wanted)}, and that is not what is recorded")
        for row in reversals:
            if row != wanted:
                self._stray_reversal(row)

    def _check_signature(self, last: TupleRow) -> None:
        """The batch's last entry has been signed, with whatever else its commit moved."""
        batch, position, chain_hash = last[0], last[1], last[15]
        found = self._signatures.take(batch)
        if not found:
            self._result.find(batch, position, "no signature covers the head that it made")
            return
        _, signed_hash, signature, key_id, text = found[0]
        self._result.signatures += 1
        if signed_hash != chain_hash:
            self._result.find(batch, position, "another hash of it was signed")
        elif not says_head(text or "", partition=self._partition, batch=batch, chain_hash=chain_hash):
            self._result.find(batch, position, "the text that was signed says something else of it")
        elif not self._is_signed(text, signature, key_id):
            self._result.find(batch, position, f"its signature is not one by the key {key_id}, if that is known")

    def _is_signed(self, text: str, signature: bytes, key_id: str) -> bool:
        """Whether a commit's text is signed: found out once, not for each of the partitions whose heads it moved."""
        key = self._task.keys.get(key_id, b"")
        name = sha256(b"%s %s %s" % (key, signature, text.encode())).digest()
        if key and name in _signed:
            return True
        if not is_signed(text, signature, key_id=key_id, keys=self._keys):
            return False
        if len(_signed) < SIGNED_KEPT_MAX:
            _signed.add(name)
        return True

    def _find(self, entry: TupleRow, what: str) -> None:
        self._result.find(entry[0], entry[1], what)

    def _stray_signature(self, row: TupleRow) -> None:
        self._result.find(row[0], 0, "it was signed, and is not there: entries have been removed")

    def _stray_bundle(self, row: TupleRow) -> None:
        # One of which nothing was charged names none.
        if row[2] is not None:
            self._result.find(row[0], 0, f"the bundle {row[1]} names transaction {row[2]}, which is not of it")

    def _stray_command(self, row: TupleRow) -> None:
        self._result.find(row[0], 0, f"the command {row[2]} names transaction {row[1]}, which is not there")

    def _stray_line(self, row: TupleRow) -> None:
        self._result.find(row[14], 0, f"a charge line says it is of transaction {row[15]}, which is not there")

    def _stray_reversal(self, row: TupleRow) -> None:
        what = f"the reversal of {_line_name(row)} names transaction {row[5]}, which does not give that back"
        self._result.find(row[3], row[4], what)

    def _check_head(self) -> None:
        """The head is the last entry; what was seen outside is in the journal."""
        reached = self._result.reached
        row = self._connection.execute(
            "SELECT batch, chain_hash FROM heads WHERE partition = %s", [self._partition], binary=True
        ).fetchone()
        if row is None or (row[0], row[1]) != (reached.batch, reached.chain_hash):
            self._result.find(reached.batch, 0, f"the journal ends here, its head is at batch {row and row[0]}")
        for seen in self._task.seen:
            batch = seen.reached.batch
            if batch > reached.batch:
                self._result.find(
                    reached.batch,
                    0,
                    f"the journal ends here, but batch {batch} has been {seen.where}: entries have been removed",
                )
            elif _hash_of(self._connection, self._partition, batch) != seen.reached.chain_hash:
                self._result.find(batch, 0, f"it is not what has been {seen.where}: entries up to it have been changed")

    def _check_given_back(self) -> None:
        """What was given back of a charge line is not more than it took, lot by lot."""
        parameters = {"partition": self._partition, "after": self._after}
        rows = self._connection.execute(_GIVEN_BACK, parameters).fetchall()
        for _, each in groupby(rows, key=itemgetter(0, 1, 2)):
            reversals = list(each)
            last = reversals[-1]
            name, split = _line_name(last), last[6]
            if split is None:
                self._result.find(last[3], last[4], f"it gives back {name}, which was not charged")
                continue
            for (account, unit, lot), amount in more_than_charged(split, [row[5] for row in reversals]).items():
                self._result.find(
                    last[3], last[4], f"{amount} {unit} more than {name} took of lot {lot} of {account} is given back"
                )


class _Batches:
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


def _by(column: int, rows: Iterable[TupleRow]) -> dict[str, list[TupleRow]]:
    """Rows by what they say in a column; those that say the same follow each other, as a rule."""
    found: dict[str, list[TupleRow]] = {}
    for key, each in groupby(rows, key=itemgetter(column)):
        found.setdefault(key, []).extend(each)
    return found


def _line_name(reversal: Sequence[Any]) -> str:
    """Of which charge line a row of reversals is."""
    return "/".join(map(str, reversal[:3]))


def _hash_of(connection: Connection[TupleRow], partition: int, batch: int) -> bytes | None:
    """The hash of the last entry of a batch."""
    row = connection.execute(
        "SELECT hash FROM journal WHERE partition = %s AND batch = %s ORDER BY position DESC LIMIT 1",
        [partition, batch],
        binary=True,
    ).fetchone()
    return None if row is None else bytes(row[0])


_JOURNAL: Final[LiteralString] = """
SELECT batch, position, transaction_id::text, kind, account, unit, lot_id::text, lot_kind, hold_id::text, posted, held,
       frozen, occurred_at, recorded_at, details, hash
FROM journal WHERE partition = %(partition)s AND batch > %(after)s ORDER BY batch, position
"""

# As their hash covers them. What they are sorted by comes first within: it is found at once then.
_LINES: Final[LiteralString] = """
SELECT partition, source, event_id, revision, account, occurred_at, hold_id::text, scope, price_version, own_key,
       amounts, split, bundle_number, line_number, batch, transaction_id::text
FROM (
    SELECT batch, transaction_id, line_number, partition, source, event_id, revision, account, occurred_at, hold_id,
           scope, price_version, own_key, amounts, split, bundle_number
    FROM charge_lines WHERE partition = %(partition)s AND batch > %(after)s
"""
# There is no index on their batches.
_LINES_SINCE: Final[LiteralString] = """
    AND recorded_at > coalesce((
        SELECT recorded_at FROM journal WHERE partition = %(partition)s AND batch = %(after)s AND position = 1
    ), '-infinity')
"""
_LINES_IN_ORDER: Final[LiteralString] = """
    ORDER BY batch, transaction_id, line_number
) l
"""

# A row without a text refers to the one of its commit's first head.
_SIGNATURES: Final[LiteralString] = """
SELECT s.batch, s.chain_hash, s.signature, s.key_id, CASE WHEN s.heads <> '' THEN s.heads ELSE (
    SELECT f.heads FROM signatures f
    WHERE f.partition = CASE WHEN s.commit_id ~ '^[0-9]{2}-[0-9]{1,18}$' THEN left(s.commit_id, 2)::smallint END
      AND f.batch = CASE WHEN s.commit_id ~ '^[0-9]{2}-[0-9]{1,18}$' THEN substr(s.commit_id, 4)::bigint END
      AND f.commit_id = s.commit_id
) END
FROM signatures s WHERE s.partition = %(partition)s AND s.batch > %(after)s ORDER BY s.batch
"""

_COMMANDS: Final[LiteralString] = """
SELECT batch, transaction_id::text, principal || ' ' || idempotency_key FROM commands
WHERE partition = %(partition)s AND batch > %(after)s ORDER BY 1, 2, 3
"""

_BUNDLES: Final[LiteralString] = """
SELECT batch, number, transaction_id::text FROM bundles
WHERE partition = %(partition)s AND batch > %(after)s ORDER BY batch, number
"""

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


# Where the last audit got ---------------------------------------------------------------------------------------------


def _recall(connection: Connection[TupleRow], laws: Laws, partition: int, after: int) -> None:
    """What the entries after a batch are about, as it was then: what it is now, less what they add."""
    parameters = {"partition": partition, "after": after}
    for account, unit, policy, overdraft in connection.execute(_WALLETS_THEN, parameters).fetchall():
        laws.wallets[account, unit] = KnownWallet(policy, overdraft)
    for row in connection.execute(_LOTS_THEN, parameters).fetchall():
        lot_id, account, unit, kind, effective_at, expires_at, scope, posted, held, frozen, expired = row
        lot = KnownLot(lot_id, account, unit, kind, effective_at, expires_at, posted=posted, held=held, frozen=frozen)
        lot.scope = None if scope is None else _decode_lot_scope(scope)
        lot.expired = expired
        laws.lots[lot_id] = lot
        if (posted or held or frozen) and (account, unit) in laws.wallets:
            laws.wallets[account, unit].lots[lot_id] = lot
        if expired and (account, unit) in laws.wallets:
            laws.wallets[account, unit].expired[lot_id] = lot
    for hold_id, status, scope, has_deadline, recorded_at, ended_at in connection.execute(_HOLDS_THEN, parameters):
        laws.holds[hold_id] = KnownHold(
            status,
            recorded_at,
            scope=None if scope is None else _decode_scope(scope),
            has_deadline=has_deadline,
            ended_at=ended_at,
        )
    for hold_id, lot_id, held in connection.execute(_EARMARKS_THEN, parameters):
        laws.holds[hold_id].earmarks[lot_id] = held


_WALLETS_THEN: Final[LiteralString] = """
WITH touched AS (
    SELECT DISTINCT account, unit FROM journal
    WHERE partition = %(partition)s AND batch > %(after)s AND unit IS NOT NULL AND left(account, 1) <> '@'
), terms AS (
    SELECT DISTINCT ON (account, unit) account, unit, details::json ->> 'policy' AS policy,
           coalesce((details::json ->> 'overdraft')::bigint, 0) AS overdraft
    FROM journal
    WHERE partition = %(partition)s AND batch <= %(after)s AND kind IN ('wallet_opened', 'wallet_set')
      AND account IN (
          SELECT account FROM journal WHERE partition = %(partition)s AND batch > %(after)s AND kind = 'wallet_set'
      )
    ORDER BY account, unit, batch DESC, position DESC
)
SELECT w.account, w.unit, coalesce(t.policy, w.policy), coalesce(t.overdraft, w.overdraft)
FROM wallets w JOIN touched USING (account, unit) LEFT JOIN terms t USING (account, unit)
WHERE w.partition = %(partition)s AND w.batch <= %(after)s
"""

_LOTS_THEN: Final[LiteralString] = """
WITH touched AS (
    SELECT DISTINCT account, unit FROM journal
    WHERE partition = %(partition)s AND batch > %(after)s AND unit IS NOT NULL AND left(account, 1) <> '@'
), added AS (
    SELECT lot_id, sum(posted)::bigint AS posted, sum(held)::bigint AS held, sum(frozen)::bigint AS frozen,
           sum(posted) FILTER (WHERE kind IN ('lot_expired', 'lot_revived'))::bigint AS not_expired
    FROM journal WHERE partition = %(partition)s AND batch > %(after)s AND lot_id IS NOT NULL GROUP BY 1
)
SELECT l.lot_id::text, l.account, l.unit, l.kind, l.effective_at, l.expires_at, l.scope,
       l.posted - coalesce(a.posted, 0), l.held - coalesce(a.held, 0), l.frozen - coalesce(a.frozen, 0),
       l.expired + coalesce(a.not_expired, 0)
FROM lots l JOIN touched USING (account, unit) LEFT JOIN added a USING (lot_id)
WHERE l.partition = %(partition)s AND l.batch <= %(after)s AND (NOT l.spent OR a.lot_id IS NOT NULL OR l.expired > 0)
"""

_TOUCHED_HOLDS: Final[LiteralString] = """
WITH touched AS (
    SELECT hold_id,
           bool_or(kind IN ('hold_released', 'hold_expired', 'hold_settled', 'hold_estimated')) AS ended,
           bool_or(kind = 'estimate_reversed') AS reversed
    FROM journal WHERE partition = %(partition)s AND batch > %(after)s AND hold_id IS NOT NULL GROUP BY 1
    UNION
    SELECT hold_id, false, false FROM charge_lines
    WHERE partition = %(partition)s AND batch > %(after)s AND hold_id IS NOT NULL
), held AS (
    SELECT hold_id, bool_or(ended) AS ended, bool_or(reversed) AS reversed FROM touched GROUP BY 1
)
"""

_HOLDS_THEN: Final[LiteralString] = (
    _TOUCHED_HOLDS
    + """
SELECT h.hold_id::text,
       CASE WHEN held.ended THEN 'placed' WHEN held.reversed THEN 'estimated' ELSE h.status END,
       h.scope, h.expires_at IS NOT NULL, h.recorded_at,
       CASE WHEN held.ended OR held.reversed THEN NULL ELSE h.ended_at END
FROM holds h JOIN held USING (hold_id) WHERE h.partition = %(partition)s AND h.batch <= %(after)s
"""
)

_EARMARKS_THEN: Final[LiteralString] = (
    _TOUCHED_HOLDS
    + """
, added AS (
    SELECT hold_id, lot_id, sum(held)::bigint AS held FROM journal
    WHERE partition = %(partition)s AND batch > %(after)s AND hold_id IS NOT NULL AND lot_id IS NOT NULL GROUP BY 1, 2
)
SELECT e.hold_id::text, e.lot_id::text, e.held - coalesce(a.held, 0)
FROM hold_lots e JOIN held USING (hold_id) JOIN holds h USING (partition, hold_id)
LEFT JOIN added a USING (hold_id, lot_id)
WHERE e.partition = %(partition)s AND h.batch <= %(after)s
"""
)
