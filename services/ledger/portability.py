"""The record as a file: everything that was ever decided, to be taken to another ledger, whose balances it makes again.

A gzip of JSON lines: what it is, then the rows of each table in order, then a manifest. Each line carries a sum over
all lines up to it, so that a file that was cut or changed is refused, and the line is named.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

import msgspec
import psycopg
from psycopg import Connection, Copy, sql
from psycopg.rows import TupleRow
from pydantic import SecretStr
from sqlalchemy import Table

from services.ledger import tables
from services.ledger.domain.chain import GENESIS, columns_hash

FORMAT: Final = "scrip journal 1"
RECORD: Final = (
    tables.journal,
    tables.commands,
    tables.bundles,
    tables.charge_lines,
    tables.reversals,
    tables.signatures,
)
FETCH_ROWS: Final = 10_000
# Level 1 is four times as fast as the default, and the files a tenth larger.
COMPRESSION: Final = 1

Progress = Callable[[int, int], None]

_encode: Final = msgspec.json.Encoder(order="sorted").encode
_SUM_BYTES: Final = 8
# ,"sum":"0123456789abcdef"}
_TAIL: Final = len(b',"sum":""}') + 2 * _SUM_BYTES
# Places in a journal's row.
_PARTITION, _BATCH, _POSITION, _HASH = 0, 1, 2, 16
_NUMBERS: Final = frozenset({0, 1, 2, 10, 11, 12})
_TIMES: Final = frozenset({13, 14})


class BadFile(Exception):
    """The file is not one of these, or was cut or changed; the sentence names the line."""


class NotEmpty(Exception):
    """There is something already where the record should go."""


class InUse(Exception):
    """A ledger works there."""


class Head(msgspec.Struct, frozen=True):
    """Where a partition stands."""

    partition: int
    batch: int
    chain_hash: str
    recorded_at: str
    outbox_number: Annotated[int, msgspec.Meta(ge=0)]
    charges_number: Annotated[int, msgspec.Meta(ge=0)]


class Manifest(msgspec.Struct, frozen=True):
    """What a file holds: rows by table, and the heads of its partitions that have any entries."""

    rows: dict[str, int]
    heads: list[Head]


class _Line(msgspec.Struct, frozen=True):
    """A line of the file: exactly one of them, and the sum."""

    sum: str
    format: str | None = None
    partitions: list[int] | None = None
    table: str | None = None
    row: list[str | None] | None = None
    manifest: Manifest | None = None


_decode: Final = msgspec.json.Decoder(_Line).decode


class _Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


def export_journal(
    url: SecretStr,
    path: Path,
    *,
    partition: int | None = None,
    on_progress: Progress = lambda _done, _all: None,
) -> Manifest:
    """Write the record of all partitions, or of one, as it is now. The file appears when it is whole."""
    new = path.with_name(f"{path.name}.new")
    try:
        with _connect(url) as connection, new.open("wb") as raw:
            connection.read_only = True
            # No time and no name in the header: the same record makes the same file.
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=COMPRESSION, mtime=0) as file:
                manifest = _Export(connection, file, partition, on_progress).run()
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return manifest


def import_journal(owner_url: SecretStr, path: Path, *, on_progress: Progress = lambda _done, _all: None) -> Manifest:
    """Read a record into a ledger that has none in those partitions, as the role that owns the schema; all or nothing.

    The projections are to be replayed then. BadFile, NotEmpty, InUse.
    """
    total = _last_line(path)
    with _connect(owner_url) as connection:
        connection.execute("LOCK TABLE heads IN EXCLUSIVE MODE")
        try:
            manifest = _Import(connection, path, lambda done: on_progress(min(done, total - 1), total)).run()
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            # Its sums are right: so it was made like this.
            raise BadFile(f"it says what no ledger records: {' '.join(str(error).split())}") from error
        # What comes now makes it so.
        on_progress(total, total)
    return manifest


def _connect(url: SecretStr) -> Connection[TupleRow]:
    connection = psycopg.connect(
        url.get_secret_value(), application_name="scrip-journal", options="-c timezone=UTC -c search_path=ledger"
    )
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    return connection


class _Sum:
    """What each line carries: a short hash over all lines up to it."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=_SUM_BYTES)

    def add(self, line: bytes) -> str:
        self._hash.update(line)
        return self._hash.hexdigest()


class _Export:
    """Writing."""

    def __init__(
        self, connection: Connection[TupleRow], file: _Writable, partition: int | None, on_progress: Progress
    ) -> None:
        self._connection = connection
        self._file = file
        self._partition = partition
        self._on_progress = on_progress
        self._sum = _Sum()

    def run(self) -> Manifest:
        counts = {str(table.name): self._count(table) for table in RECORD}
        total, done = sum(counts.values()), 0
        heads = self._heads()
        self._write({"format": FORMAT, "partitions": [head.partition for head in heads]})
        for table in RECORD:
            head = b'{"row":'
            tail = b',"table":' + _encode(str(table.name))
            for row in self._rows(table):
                self._write_line(head + _encode(row) + tail)
                done += 1
                if done % FETCH_ROWS == 0:
                    self._on_progress(done, total)
        manifest = Manifest(rows=counts, heads=heads)
        self._write({"manifest": manifest})
        self._on_progress(total, total)
        return manifest

    def _write(self, fields: Mapping[str, object]) -> None:
        self._write_line(_encode(fields)[:-1])

    def _write_line(self, line: bytes) -> None:
        """Write an object that lacks its end."""
        self._file.write(b'%b,"sum":"%b"}\n' % (line, self._sum.add(line).encode()))

    def _rows(self, table: Table) -> Iterator[TupleRow]:
        columns = sql.SQL(", ").join(sql.SQL("t.{}::text").format(sql.Identifier(each.name)) for each in table.columns)
        key = sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(each.name)) for each in table.primary_key)
        source: sql.Composable = sql.SQL("{} t").format(sql.Identifier(table.name))
        if table is tables.signatures and self._partition is not None:
            # The text may be in the row of another partition: here each has its own.
            source = _SIGNATURES
        with self._connection.cursor(name="export") as cursor:
            cursor.itersize = FETCH_ROWS
            cursor.execute(
                sql.SQL(
                    "SELECT {} FROM {} WHERE %(only)s::smallint IS NULL OR t.partition = %(only)s ORDER BY {}"
                ).format(columns, source, key),
                {"only": self._partition},
            )
            yield from cursor

    def _count(self, table: Table) -> int:
        row = self._connection.execute(
            sql.SQL("SELECT count(*) FROM {} WHERE %(only)s::smallint IS NULL OR partition = %(only)s").format(
                sql.Identifier(table.name)
            ),
            {"only": self._partition},
        ).fetchone()
        return 0 if row is None else int(row[0])

    def _heads(self) -> list[Head]:
        rows = self._connection.execute(
            """
            SELECT partition, batch, encode(chain_hash, 'hex'), recorded_at::text, outbox_number, charges_number
            FROM heads
            WHERE (batch > 0 OR charges_number > 0) AND (%(only)s::smallint IS NULL OR partition = %(only)s)
            ORDER BY partition
            """,
            {"only": self._partition},
        ).fetchall()
        return [Head(*row) for row in rows]


_SIGNATURES: Final = sql.SQL(
    """
(
    SELECT s.partition, s.batch, s.chain_hash, s.commit_id, s.signature, s.key_id,
           coalesce(nullif(s.heads, ''), f.heads, '') AS heads
    FROM signatures s LEFT JOIN signatures f
        ON s.heads = '' AND f.commit_id = s.commit_id AND f.heads <> ''
       AND f.partition = CASE WHEN s.commit_id ~ '^[0-9]{2}-[0-9]{1,18}$' THEN left(s.commit_id, 2)::smallint END
       AND f.batch = CASE WHEN s.commit_id ~ '^[0-9]{2}-[0-9]{1,18}$' THEN substr(s.commit_id, 4)::bigint END
) t
"""
)


@dataclass(slots=True)
class _End:
    """How far the journal of a partition has been read."""

    batch: int = 0
    position: int = 0
    chain_hash: bytes = GENESIS


@dataclass(slots=True)
class _Read:
    """What has been read so far."""

    rows: dict[str, int] = field(default_factory=lambda: {str(table.name): 0 for table in RECORD})
    ends: dict[int, _End] = field(default_factory=dict)


class _Import:
    """Reading."""

    def __init__(self, connection: Connection[TupleRow], path: Path, on_progress: Callable[[int], None]) -> None:
        self._connection = connection
        self._lines = _lines(path)
        self._on_progress = on_progress
        self._read = _Read()

    def run(self) -> Manifest:
        number, first = next(self._lines, (1, None))
        if first is None or first.format != FORMAT or first.partitions is None:
            raise BadFile(f"line {number}: the file is not one of a record: it does not begin with {FORMAT!r}")
        self._check_empty(first.partitions)
        partitions = frozenset(first.partitions)
        line: _Line | None = None
        number, line = next(self._lines, (number, None))
        for table in RECORD:
            columns = sql.SQL(", ").join(sql.Identifier(each.name) for each in table.columns)
            statement = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table.name), columns)
            with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
                while line is not None and line.table == table.name:
                    self._copy_row(copy, table, line.row, number, partitions)
                    number, line = next(self._lines, (number, None))
        if line is None:
            raise BadFile(f"line {number}: the file ends here, without its manifest: it was cut")
        if line.manifest is None:
            raise BadFile(f"line {number}: a row of {line.table} is not where it belongs")
        self._check_manifest(line.manifest, number)
        self._set_heads(line.manifest)
        return line.manifest

    def _copy_row(
        self, copy: Copy, table: Table, row: list[str | None] | None, number: int, partitions: frozenset[int]
    ) -> None:
        if row is None or len(row) != len(table.columns):
            raise BadFile(f"line {number}: a row of {table.name} has {len(table.columns)} columns")
        try:
            if int(row[0] or "-1") not in partitions:
                raise BadFile(f"line {number}: the file is not said to hold partition {row[0]}")
            if table is tables.journal:
                self._follow(row, number)
        except (ValueError, TypeError, OverflowError) as error:
            raise BadFile(f"line {number}: {error}") from error
        copy.write_row(row)
        self._read.rows[str(table.name)] += 1
        if number % FETCH_ROWS == 0:
            self._on_progress(number)

    def _follow(self, row: list[str | None], number: int) -> None:
        """The chain is whole, from the first entry to the last."""
        columns = tuple(_value(place, text) for place, text in enumerate(row[:_HASH]))
        end = self._read.ends.setdefault(columns[_PARTITION], _End())
        batch, position = columns[_BATCH], columns[_POSITION]
        if (batch, position) not in {(end.batch, end.position + 1), (end.batch + 1, 1)}:
            raise BadFile(
                f"line {number}: partition {row[0]}, batch {batch}, position {position} does not follow"
                f" batch {end.batch}, position {end.position}"
            )
        chain_hash = columns_hash(end.chain_hash, columns)
        if f"\\x{chain_hash.hex()}" != row[_HASH]:
            raise BadFile(
                f"line {number}: the hash of partition {row[0]}, batch {batch}, position {position} is not that of its"
                " columns after the entry before it"
            )
        end.batch, end.position, end.chain_hash = batch, position, chain_hash

    def _check_empty(self, partitions: list[int]) -> None:
        owned = self._connection.execute(
            "SELECT count(*) FROM leases WHERE owner IS NOT NULL AND expires_at > clock_timestamp()"
        ).fetchone()
        if owned is not None and owned[0]:
            raise InUse(f"a running ledger owns {owned[0]} partitions: stop it first")
        for table in (*RECORD, tables.outbox, *tables.PROJECTIONS):
            found = self._connection.execute(
                sql.SQL("SELECT partition FROM {} WHERE partition = ANY (%s) LIMIT 1").format(
                    sql.Identifier(table.name)
                ),
                [partitions],
            ).fetchone()
            if found is not None:
                raise NotEmpty(f"partition {found[0]} has rows in {table.name} already")
        moved = self._connection.execute(
            "SELECT partition FROM heads WHERE partition = ANY (%s) AND (batch > 0 OR outbox_number > 0) LIMIT 1",
            [partitions],
        ).fetchone()
        if moved is not None:
            raise NotEmpty(f"partition {moved[0]} has a head that has moved")

    def _check_manifest(self, manifest: Manifest, number: int) -> None:
        if manifest.rows != self._read.rows:
            raise BadFile(f"line {number}: the manifest says {manifest.rows}, the file has {self._read.rows}")
        ends = {partition: (end.batch, end.chain_hash.hex()) for partition, end in self._read.ends.items()}
        heads = {head.partition: (head.batch, head.chain_hash) for head in manifest.heads if head.batch}
        if ends != heads:
            raise BadFile(f"line {number}: the heads of the manifest are not the last entries of the file")
        if (extra := next(self._lines, None)) is not None:
            raise BadFile(f"line {extra[0]}: there is something after the manifest")

    def _set_heads(self, manifest: Manifest) -> None:
        """The next batch, fact and bundle follow those of the record. What it said has been published where it was."""
        with self._connection.cursor() as cursor:
            cursor.executemany(
                """
                UPDATE heads SET batch = %s, chain_hash = decode(%s, 'hex'), recorded_at = %s::timestamptz,
                                 outbox_number = %s, charges_number = %s
                WHERE partition = %s
                """,
                [
                    (
                        each.batch,
                        each.chain_hash,
                        each.recorded_at,
                        each.outbox_number,
                        each.charges_number,
                        each.partition,
                    )
                    for each in manifest.heads
                ],
            )
            cursor.executemany(
                "INSERT INTO relayed (partition, number) VALUES (%s, %s)"
                " ON CONFLICT (partition) DO UPDATE SET number = excluded.number",
                [(each.partition, each.outbox_number) for each in manifest.heads],
            )


def _value(place: int, text: str | None) -> Any:
    """A column of the journal as its hash covers it."""
    if text is None:
        return None
    if place in _NUMBERS:
        return int(text)
    return datetime.fromisoformat(text) if place in _TIMES else text


def _lines(path: Path) -> Iterator[tuple[int, _Line]]:
    """The lines of a file with their numbers, each as it was written. BadFile names the first that is not."""
    total = _Sum()
    number = 0
    try:
        with gzip.open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"}\n") or len(line) <= _TAIL:
                    raise BadFile(f"line {number}: the file ends in the middle of it: it was cut")
                said = line[-(_TAIL + 1) : -1]
                if said != b',"sum":"%b"}' % total.add(line[: -(_TAIL + 1)]).encode():
                    raise BadFile(f"line {number}: it, or a line before it, is not what was written")
                yield number, _decode(line)
    except EOFError as error:
        raise BadFile(f"line {number + 1}: the file ends in the middle of it: it was cut") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise BadFile(f"line {number + 1}: it cannot be unpacked ({error})") from error
    except msgspec.MsgspecError as error:
        raise BadFile(f"line {number + 1}: {error}") from error


def _last_line(path: Path) -> int:
    """How many lines a file has: so it is read twice, but nothing is begun with one that was cut or changed."""
    last = 0
    for number, _ in _lines(path):
        last = number
    if not last:
        raise BadFile("line 1: the file is empty")
    return last
