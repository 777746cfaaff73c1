"""The audit: the journal is whole, unchanged, signed, and keeps every law at every transaction; it names what does not.

Partition by partition, in processes. From the beginning, or from where the last audit got, whose findings are kept in a
file outside the database, as are the heads that were published when they were signed.
"""

import base64
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, LiteralString

import msgspec
import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from psycopg import Connection
from psycopg.rows import TupleRow
from pydantic import SecretStr

from contracts.partition import PARTITION_COUNT
from contracts.streams import LEDGER
from services.ledger.domain.chain import GENESIS, columns_hash
from services.ledger.domain.commands import LotScope, Scope
from services.ledger.domain.entries import Charged, Reversed
from services.ledger.domain.laws import KnownHold, KnownLot, KnownWallet, Laws, Line, more_than_charged, reversal_row
from services.ledger.signing import heads_of, is_signed, says_head
from services.ledger.translate import lines_hash

FINDINGS_KEPT_MAX: Final = 100
FETCH_ROWS: Final = 10_000
PROGRESS_SECONDS: Final = 0.2
SIGNED_KEPT_MAX: Final = 200_000
SIGNED_SUBJECT: Final = "ledger.v1.*.heads.signed"

Progress = Callable[[int, int], None]

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
class Audited:
    """What an audit found: `findings` are the first ones, `found` is how many there are. `reached` by partition."""

    entries: int
    lines: int
    signatures: int
    seconds: float
    found: int
    findings: tuple[Finding, ...]
    reached: Mapping[int, Reached]

    @property
    def is_clean(self) -> bool:
        """Whether everything is as it must be."""
        return not self.found

    @property
    def entries_per_second(self) -> float:
        return self.entries / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known outside the database: where the last audit got, and the highest signed heads that were published.

    `sequence` is the last message of the stream that was read.
    """

    audited: Mapping[int, Reached] = field(default_factory=dict)
    published: Mapping[int, Reached] = field(default_factory=dict)
    sequence: int = 0


class EvidenceUnreadable(Exception):
    """The file of the last audit does not say what it should."""


def audit(
    url: SecretStr,
    *,
    keys: Mapping[str, Ed25519PublicKey],
    caps: Collection[str],
    evidence: Evidence | None = None,
    since_last: bool = False,
    processes: int | None = None,
    on_progress: Progress = lambda _done, _all: None,
) -> Audited:
    """Audit all partitions. Any role that may read the tables will do, and the service may work meanwhile.

    `caps` are the units that count for each wallet by itself. `since_last`: only what came after the last audit; the
    sums up to there are taken from the projections, which a replay proves.
    """
    known = evidence or Evidence()
    started = time.monotonic()
    raw_keys = {name: key.public_bytes(Encoding.Raw, PublicFormat.Raw) for name, key in keys.items()}
    sizes = _sizes(url, known.audited if since_last else {}, {*known.audited, *known.published})
    tasks = [
        _Task(
            url=url.get_secret_value(),
            partition=partition,
            keys=raw_keys,
            caps=frozenset(caps),
            since=known.audited.get(partition) if since_last else None,
            seen=tuple(_seen(known, partition)),
        )
        for partition in sorted(sizes, key=lambda each: -sizes[each])
    ]
    total = sum(sizes.values())
    results = _in_processes(tasks, processes or os.cpu_count() or 1, lambda done: on_progress(min(done, total), total))
    on_progress(total, total)
    findings = sorted(finding for result in results for finding in result.findings)
    return Audited(
        entries=sum(result.entries for result in results),
        lines=sum(result.lines for result in results),
        signatures=sum(result.signatures for result in results),
        seconds=time.monotonic() - started,
        found=sum(result.found for result in results),
        findings=tuple(findings[:FINDINGS_KEPT_MAX]),
        reached={result.partition: result.reached for result in results if result.reached.batch},
    )


# Outside the database -------------------------------------------------------------------------------------------------


def read_evidence(path: Path) -> Evidence:
    """What the last audit left behind; nothing if there was none."""
    try:
        told = json.loads(path.read_bytes())
        return Evidence(_reached_of(told["audited"]), _reached_of(told["published"]), int(told["sequence"]))
    except FileNotFoundError:
        return Evidence()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvidenceUnreadable(f"{path} is not what an audit wrote: {error!r}") from error


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Keep evidence for the next audit, for the owner of the file alone. Replaced in one step."""
    told = {
        "audited": _reached_text(evidence.audited),
        "published": _reached_text(evidence.published),
        "sequence": evidence.sequence,
    }
    new = path.with_name(f"{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(told, indent=1) + "\n")
        file.flush()
        os.fsync(descriptor)
    new.replace(path)


async def read_published(
    jetstream: JetStreamContext, known: Evidence, *, keys: Mapping[str, Ed25519PublicKey]
) -> tuple[Evidence, tuple[str, ...]]:
    """Add what was published about signed heads since the last audit, as the operator. What is not signed by one of the
    keys is said, and does not count.
    """
    info = await jetstream.stream_info(LEDGER)
    first, last = info.state.first_seq, info.state.last_seq
    # A stream that was made anew counts from the beginning.
    start = max(known.sequence + 1 if known.sequence <= last else 1, first)
    published = dict(known.published)
    forged: list[str] = []
    subscription = await jetstream.pull_subscribe(
        SIGNED_SUBJECT,
        stream=LEDGER,
        config=ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=start, ack_policy=AckPolicy.NONE
        ),
    )
    try:
        waiting = (await subscription.consumer_info()).num_pending or 0
        while waiting > 0:
            for message in await subscription.fetch(min(waiting, 500), timeout=10):
                waiting -= 1
                fact = _signed_fact(message.data, keys)
                if fact is None:
                    forged.append(f"message {message.metadata.sequence.stream} of {LEDGER} is not signed by the ledger")
                    continue
                for partition, reached in fact.items():
                    if partition not in published or published[partition].batch < reached.batch:
                        published[partition] = reached
    finally:
        await subscription.unsubscribe()
    return Evidence(known.audited, published, last), tuple(forged)


def _signed_fact(body: bytes, keys: Mapping[str, Ed25519PublicKey]) -> dict[int, Reached] | None:
    try:
        told = json.loads(body)
        text, key = told["heads"], told["key_id"]
        signature = base64.b64decode(told["signature"], validate=True)
        if not is_signed(text, signature, key_id=key, keys=keys):
            return None
        return {partition: Reached(*head) for partition, head in heads_of(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _seen(known: Evidence, partition: int) -> Iterator[Seen]:
    if partition in known.audited:
        yield Seen(known.audited[partition], "audited")
    if partition in known.published:
        yield Seen(known.published[partition], "published as signed")


def _reached_of(told: Mapping[str, Mapping[str, Any]]) -> dict[int, Reached]:
    return {int(key): Reached(int(each["batch"]), bytes.fromhex(each["hash"])) for key, each in told.items()}


def _reached_text(reached: Mapping[int, Reached]) -> dict[str, dict[str, Any]]:
    return {f"{key:02d}": {"batch": each.batch, "hash": each.chain_hash.hex()} for key, each in sorted(reached.items())}


# Processes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """What one process needs to audit one partition."""

    url: str = field(repr=False)
    partition: int
    keys: Mapping[str, bytes]
    caps: frozenset[str]
    since: Reached | None
    seen: tuple[Seen, ...]


@dataclass(slots=True)
class _Result:
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


_counter: Any = None
# What this process has found to be signed, with the key by which it was.
_signed: Final = set[bytes]()


def _begin_process(counter: Any) -> None:
    global _counter  # noqa: PLW0603 - how a pool's process is told of what it shares
    _counter = counter


def _in_processes(tasks: Sequence[_Task], processes: int, on_progress: Callable[[int], None]) -> list[_Result]:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("Q", 0)
    workers = min(processes, len(tasks))
    if workers <= 1:
        _begin_process(counter)
        return [_audited(task) for task in tasks]
    with context.Pool(workers, initializer=_begin_process, initargs=(counter,)) as pool:
        waiting = pool.map_async(_audited, tasks, chunksize=1)
        while not waiting.ready():
            waiting.wait(PROGRESS_SECONDS)
            on_progress(counter.value)
        return waiting.get()


def _count(entries: int) -> None:
    with _counter.get_lock():
        _counter.value += entries


def _sizes(url: SecretStr, since: Mapping[int, Reached], seen: Collection[int]) -> dict[int, int]:
    """How many entries there are to audit, by partition: of each that has any, or of which a head was seen."""
    after = [since[each].batch if each in since else 0 for each in range(PARTITION_COUNT)]
    with _connect(url.get_secret_value()) as connection:
        rows = connection.execute(_SIZES, [list(range(PARTITION_COUNT)), after, list(seen)]).fetchall()
    return {int(partition): int(count) for partition, count in rows}


_SIZES: Final[LiteralString] = """
SELECT p.partition, (SELECT count(*) FROM journal j WHERE j.partition = p.partition AND j.batch > p.batch)
FROM unnest(%s::smallint[], %s::bigint[]) AS p (partition, batch)
WHERE p.partition = ANY (%s) OR EXISTS (SELECT FROM heads t WHERE t.partition = p.partition AND t.batch > 0)
   OR EXISTS (SELECT FROM journal t WHERE t.partition = p.partition)
   OR EXISTS (SELECT FROM signatures t WHERE t.partition = p.partition)
   OR EXISTS (SELECT FROM charge_lines t WHERE t.partition = p.partition)
   OR EXISTS (SELECT FROM commands t WHERE t.partition = p.partition)
   OR EXISTS (SELECT FROM bundles t WHERE t.partition = p.partition AND t.transaction_id IS NOT NULL)
   OR EXISTS (SELECT FROM reversals t WHERE t.partition = p.partition)
"""


def _connect(url: str) -> Connection[TupleRow]:
    connection = psycopg.connect(
        url,
        application_name="scrip-audit",
        options="-c timezone=UTC -c search_path=ledger -c jit=off -c work_mem=32MB -c enable_nestloop=off",
    )
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    return connection


# One partition --------------------------------------------------------------------------------------------------------


def _audited(task: _Task) -> _Result:
    with _connect(task.url) as connection:
        result = _Result(task.partition)
        since = task.since
        if since is not None and _hash_of(connection, task.partition, since.batch) != since.chain_hash:
            # Said below, with all else that was seen: so everything is looked at again.
            since = None
        _Partition(connection, task, since, result).run()
        return result


class _Partition:
    """One pass through a partition's journal, beside what is recorded of its batches: signatures, bundles, lines."""

    def __init__(self, connection: Connection[TupleRow], task: _Task, since: Reached | None, result: _Result) -> None:
        self._connection = connection
        self._partition = task.partition
        self._task = task
        self._keys = {name: Ed25519PublicKey.from_public_bytes(raw) for name, raw in task.keys.items()}
        self._since = since
        self._after = 0 if since is None else since.batch
        self._result = result
        self._laws = Laws(task.partition, caps=task.caps)
        self._signatures = _Batches(self._rows("signatures", _SIGNATURES), 0, self._stray_signature)
        self._bundles = _Batches(self._rows("bundles", _BUNDLES), 1, self._stray_bundle)
        self._lines = _Batches(self._rows("lines", _LINES), 13, self._stray_line)
        self._reversals = _Batches(self._rows("reversals", _REVERSALS), 3, self._stray_reversal)

    def run(self) -> None:
        """Everything about the partition."""
        if self._since is not None:
            _recall(self._connection, self._laws, self._partition, self._after)
        self._read_journal()
        for breach in self._laws.breaches:
            self._result.find(*breach)
        for beside in (self._signatures, self._bundles, self._lines, self._reversals):
            beside.end()
        self._check_head()
        self._check_commands()
        self._check_given_back()

    def _rows(self, name: str, statement: LiteralString) -> Iterator[TupleRow]:
        with self._connection.cursor(name=name, binary=True) as cursor:
            cursor.execute(statement, {"partition": self._partition, "after": self._after})
            while rows := cursor.fetchmany(FETCH_ROWS):
                yield from rows

    def _read_journal(self) -> None:
        """The chain, entry by entry; the laws, transaction by transaction; signatures and lines batch by batch."""
        previous = GENESIS if self._since is None else self._since.chain_hash
        partition, result = self._partition, self._result
        batch, position, recorded_at, counted = self._after, 0, None, 0
        batch_rows: list[TupleRow] = []
        for row in self._rows("journal", _JOURNAL):
            counted += 1
            if counted == FETCH_ROWS:
                _count(counted)
                counted = 0
            if row[0] != batch:
                if batch_rows:
                    self._end_batch(batch_rows)
                    recorded_at = batch_rows[-1][13]
                    batch_rows = []
                if row[0] != batch + 1:
                    result.find(row[0], row[1], f"batch {batch + 1} should come here: entries have been removed")
                if recorded_at is not None and row[13] <= recorded_at:
                    result.find(row[0], row[1], f"it was recorded at {row[13]}, not after the batch before it")
                batch, position = row[0], 0
            elif row[13] != batch_rows[-1][13]:
                result.find(row[0], row[1], "it was recorded at another time than the entry before it in its batch")
            if row[1] != position + 1:
                result.find(batch, row[1], f"position {position + 1} should come here: entries have been removed")
            position = row[1]
            if columns_hash(previous, (partition, *row[:15])) != row[15]:
                result.find(batch, position, "its hash is not that of its columns after the entry before it")
            previous = row[15]
            batch_rows.append(row)
        if batch_rows:
            self._end_batch(batch_rows)
        _count(counted)
        result.reached = Reached(batch, previous)

    def _end_batch(self, rows: Sequence[TupleRow]) -> None:
        self._result.entries += len(rows)
        batch = rows[0][0]
        self._check_signature(rows[-1])
        bundles = {row[0]: row for row in self._bundles.take(batch)}
        lines_taken = self._lines.take(batch)
        self._result.lines += len(lines_taken)
        lines = _by_transaction(lines_taken, column=14)
        reversals = _by_transaction(self._reversals.take(batch), column=5)
        for transaction, each in groupby(rows, key=itemgetter(2)):
            entries = list(each)
            told = self._laws.add(entries)
            if told is not None:
                self._check_bundle(entries[0], told, bundles)
            if isinstance(told, Charged) or transaction in lines:
                self._check_lines(entries, told, lines.pop(transaction, []))
            if isinstance(told, Reversed) or transaction in reversals:
                self._check_reversals(entries, told, reversals.pop(transaction, []))
        for bundle in bundles.values():
            self._stray_bundle(bundle)
        for of_transaction in lines.values():
            self._stray_line(of_transaction[0])
        for of_transaction in reversals.values():
            self._stray_reversal(of_transaction[0])

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
        if lines_hash([(self._partition, *line) for line in lines]) != told.lines_hash:
            self._find(entries[0], f"the {len(lines)} charge lines of its transaction are not its own")
        else:
            self._laws.check_lines(entries, map(Line._make, map(_line, lines)), required=told.required)

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
            self._result.find(row[1], 0, f"the bundle {row[0]} names transaction {row[2]}, which is not of it")

    def _stray_line(self, row: TupleRow) -> None:
        self._result.find(row[13], 0, f"a charge line says it is of transaction {row[14]}, which is not there")

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

    def _check_commands(self) -> None:
        """Commands name transactions that are in the journal."""
        parameters = {"partition": self._partition, "after": self._after}
        for name, batch, transaction in self._connection.execute(_COMMANDS_ASTRAY, parameters).fetchall():
            self._result.find(batch, 0, f"the command {name} names transaction {transaction}, which is not there")

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
        self._rows = rows
        self._column = column
        self._stray = stray
        self._next = next(rows, None)

    def take(self, batch: int) -> list[TupleRow]:
        """The rows of a batch, which comes after those that were taken before."""
        column, rows, taken = self._column, self._rows, []
        while (row := self._next) is not None and row[column] <= batch:
            if row[column] == batch:
                taken.append(row)
            else:
                self._stray(row)
            self._next = next(rows, None)
        return taken

    def end(self) -> None:
        """There are no more batches."""
        while self._next is not None:
            self._stray(self._next)
            self._next = next(self._rows, None)


def _by_transaction(rows: Iterable[TupleRow], *, column: int) -> dict[str, list[TupleRow]]:
    found: dict[str, list[TupleRow]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return found


def _line_name(reversal: Sequence[Any]) -> str:
    """Of which charge line a row of reversals is."""
    return "/".join(map(str, reversal[:3]))


# Of the columns of a charge line, in the order of Line.
_line: Final = itemgetter(0, 1, 3, 4, 5, 6, 10)


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

# As their hash covers them, without the partition.
_LINES: Final[LiteralString] = """
SELECT source, event_id, revision, account, occurred_at, hold_id::text, scope, price_version, own_key, amounts, split,
       bundle_number, line_number, batch, transaction_id::text
FROM charge_lines WHERE partition = %(partition)s AND batch > %(after)s
  AND recorded_at > coalesce((
      SELECT recorded_at FROM journal WHERE partition = %(partition)s AND batch = %(after)s AND position = 1
  ), '-infinity')
ORDER BY batch, transaction_id, line_number
"""

_SIGNATURES: Final[LiteralString] = """
SELECT s.batch, s.chain_hash, s.signature, s.key_id, coalesce(nullif(s.heads, ''), f.heads)
FROM signatures s LEFT JOIN signatures f
    ON s.heads = '' AND f.commit_id = s.commit_id AND f.heads <> ''
   AND f.partition = CASE WHEN s.commit_id ~ '^[0-9]{2}-[0-9]{1,18}$' THEN left(s.commit_id, 2)::smallint END
   AND f.batch = CASE WHEN s.commit_id ~ '^[0-9]{2}-[0-9]{1,18}$' THEN substr(s.commit_id, 4)::bigint END
WHERE s.partition = %(partition)s AND s.batch > %(after)s ORDER BY s.batch
"""

_BUNDLES: Final[LiteralString] = """
SELECT number, batch, transaction_id::text FROM bundles
WHERE partition = %(partition)s AND batch > %(after)s ORDER BY batch, number
"""

_REVERSALS: Final[LiteralString] = """
SELECT source, event_id, revision, batch, position, transaction_id::text, split, reason, recorded_at FROM reversals
WHERE partition = %(partition)s AND batch > %(after)s ORDER BY batch, position
"""

_COMMANDS_ASTRAY: Final[LiteralString] = """
SELECT c.principal || ' ' || c.idempotency_key, c.batch, c.transaction_id::text
FROM commands c LEFT JOIN (
    SELECT DISTINCT batch, transaction_id FROM journal WHERE partition = %(partition)s AND batch > %(after)s
) j USING (batch, transaction_id)
WHERE c.partition = %(partition)s AND c.batch > %(after)s AND j.batch IS NULL ORDER BY 2, 1
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
