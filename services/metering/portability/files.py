"""The files of an archive: Parquet by day and partition, and per month a manifest that says what belongs to it.

    month=2026-01/_manifest.json
    month=2026-01/day=2026-01-05/partition=07-3fa9c1d2e4b58607.parquet

A file is named after its contents and appears when it is whole; what no manifest names is not part of an archive.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Context, Decimal, localcontext
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import TIMESTAMP, BigInteger, Boolean, Integer, LargeBinary, Numeric, SmallInteger, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

from services.metering import tables

FORMAT: Final = "scrip usage 1"
MANIFEST: Final = "_manifest.json"

# Rows that are in memory at once: those that are read and compared together, and those of a row group.
PAGE_ROWS: Final = 5_000
GROUP_ROWS: Final = 20_000
_READ_BYTES: Final = 1 << 20

_TEXT: Final = pa.string()
_TIME: Final = pa.timestamp("us", tz="UTC")

# Numbers of any size and JSON are text, as Postgres writes it: no reader of Parquet can round them.
_TYPES: Final[Mapping[type[TypeEngine[Any]], tuple[Any, str]]] = {
    SmallInteger: (pa.int16(), "smallint"),
    Integer: (pa.int32(), "integer"),
    BigInteger: (pa.int64(), "bigint"),
    Boolean: (pa.bool_(), "boolean"),
    Text: (_TEXT, "text"),
    LargeBinary: (pa.binary(), "bytea"),
    TIMESTAMP: (_TIME, "timestamptz"),
    JSONB: (_TEXT, "jsonb"),
    Numeric: (_TEXT, "numeric"),
}
_AS_TEXT: Final = frozenset({"jsonb", "numeric"})

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class FileColumn:
    """A column of a file. `sql_type` is what it is in Postgres."""

    name: str
    type: Any
    sql_type: str
    nullable: bool

    @property
    def is_text(self) -> bool:
        """Whether it is written as the text of what it is in Postgres."""
        return self.sql_type in _AS_TEXT


def _logged() -> Iterator[FileColumn]:
    for column in tables.usage_log.columns:
        arrow, sql_type = _TYPES[type(column.type)]
        yield FileColumn(str(column.name), arrow, sql_type, bool(column.nullable))


# The columns of the log, whatever they are by now.
LOGGED: Final = tuple(_logged())
# Of each use, by which a metering that has lost everything knows it again: what it was seen with, what it waits for.
SEEN: Final = (
    FileColumn("seen_body_hash", pa.binary(), "bytea", nullable=True),
    FileColumn("seen_occurred_at", _TIME, "timestamptz", nullable=True),
    FileColumn("waits_reason", _TEXT, "text", nullable=True),
    FileColumn("waits_key", _TEXT, "text", nullable=True),
    FileColumn("waits_recorded_at", _TIME, "timestamptz", nullable=True),
)
COLUMNS: Final = (*LOGGED, *SEEN)
NAMES: Final = tuple(column.name for column in COLUMNS)

_SCHEMA: Final = pa.schema([pa.field(each.name, each.type, nullable=each.nullable) for each in COLUMNS])
_REPEATED: Final = [
    name
    for name in ("partition", "source", "account", "type", "price_version", "subject", "waits_reason", "waits_key")
    if name in NAMES
]

_NAME: Final = re.compile(r"day=([0-9]{4}-[0-9]{2}-[0-9]{2})/partition=([0-9]{2})-[0-9a-f]{16}\.parquet")
_MONTH_DIRECTORY: Final = re.compile(r"month=([0-9]{4})-(0[1-9]|1[0-2])")

# Sums of amounts are exact: none has as many digits.
_EXACT: Final = Context(prec=200)
_encode: Final = msgspec.json.Encoder().encode


class BadArchive(Exception):
    """Something is missing from an archive, or is not what was written; the sentence names it."""


class ArchivedFile(msgspec.Struct, frozen=True):
    """A file of a manifest: a day of a partition.

    `sha256` is of the file, `rows_sha256` of what is in it, however it is written. `fingerprint` is what Postgres made
    of the rows in the log: as long as it makes the same, they have not changed. `amounts` are what the use that counts
    was charged, by unit.
    """

    name: str
    day: date
    partition: int
    rows: int
    bytes: int
    sha256: str
    rows_sha256: str
    fingerprint: str
    amounts: dict[str, str]


class Manifest(msgspec.Struct, frozen=True):
    """What belongs to a month. `columns` are those of all its files, `schema_version` was metering's then."""

    format: str
    month: str
    schema_version: str
    columns: list[str]
    rows: int
    amounts: dict[str, str]
    files: list[ArchivedFile]


_decode_manifest: Final = msgspec.json.Decoder(Manifest).decode


def month_name(month: date) -> str:
    """As people say it: 2026-01."""
    return f"{month:%Y-%m}"


def next_month(month: date) -> date:
    """The first day of the month after."""
    return (month + timedelta(days=31)).replace(day=1)


def month_directory(directory: Path, month: date) -> Path:
    """Where a month's files are."""
    return directory / f"month={month_name(month)}"


def find_months(directory: Path) -> list[date]:
    """The months that an archive has, in order."""
    if not directory.is_dir():
        raise BadArchive(f"{directory} is no directory")
    found = (_MONTH_DIRECTORY.fullmatch(each.name) for each in directory.iterdir() if (each / MANIFEST).is_file())
    return sorted(date(int(match[1]), int(match[2]), 1) for match in found if match)


# Manifests ------------------------------------------------------------------------------------------------------------


def make_manifest(month: date, files: Iterable[ArchivedFile], *, schema_version: str) -> Manifest:
    """The manifest of a month with these files."""
    ordered = sorted(files, key=lambda each: (each.day, each.partition))
    return Manifest(
        format=FORMAT,
        month=month_name(month),
        schema_version=schema_version,
        columns=list(NAMES),
        rows=sum(each.rows for each in ordered),
        amounts=_sum_amounts(each.amounts.items() for each in ordered),
        files=ordered,
    )


def write_manifest(directory: Path, manifest: Manifest) -> str:
    """Write a month's manifest, at once or not at all; its SHA-256."""
    content = msgspec.json.format(_encode(manifest), indent=1)
    directory.mkdir(parents=True, exist_ok=True)
    new = directory / f".{MANIFEST}.new"
    with new.open("wb") as file:
        file.write(content)
        _sync(file.fileno())
    new.replace(directory / MANIFEST)
    _sync_directory(directory)
    return sha256(content).hexdigest()


def read_manifest(directory: Path) -> tuple[Manifest, str] | None:
    """A month's manifest and its SHA-256, if there is one. BadArchive."""
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        manifest = _decode_manifest(content)
    except msgspec.DecodeError as error:
        raise BadArchive(f"{path} is no manifest: {error}") from error
    if manifest.format != FORMAT or f"month={manifest.month}" != directory.name:
        raise BadArchive(f"{path} is no manifest of {FORMAT!r} for this month")
    for each in manifest.files:
        match = _NAME.fullmatch(each.name)
        if match is None or (match[1], int(match[2])) != (each.day.isoformat(), each.partition):
            raise BadArchive(f"{path} names {each.name!r}, which is no file of an archive")
    return manifest, sha256(content).hexdigest()


def remove_strays(directory: Path, manifest: Manifest) -> None:
    """Remove what a run that died left, and files that others have taken the place of."""
    named = {directory / each.name for each in manifest.files}
    for path in [*directory.glob("day=*/partition=*.parquet"), *directory.rglob(".*.new")]:
        if path not in named:
            path.unlink()


# Files ----------------------------------------------------------------------------------------------------------------


def write_file(directory: Path, rows: Iterable[Row], *, day: date, partition: int, fingerprint: str) -> ArchivedFile:
    """Write a day of a partition, and read it back: what is on the disk is what came in. BadArchive if it is not."""
    place = directory / f"day={day.isoformat()}"
    place.mkdir(parents=True, exist_ok=True)
    new = place / f".partition={partition:02d}.new"
    try:
        written = _Digest()
        _write_parquet(new, written.each(rows))
        file_hash = hash_file(new)
        read = _Digest()
        for _ in read.each(chain.from_iterable(_read_pages(new))):
            pass
        if (read.rows, read.hexdigest()) != (written.rows, written.hexdigest()):
            raise BadArchive(f"{new} does not hold what was written to it")
        name = f"{place.name}/partition={partition:02d}-{file_hash[:16]}.parquet"
        size = new.stat().st_size
        new.replace(directory / name)
    finally:
        new.unlink(missing_ok=True)
    # That of the month is synced with its manifest.
    _sync_directory(place)
    return ArchivedFile(
        name=name,
        day=day,
        partition=partition,
        rows=written.rows,
        bytes=size,
        sha256=file_hash,
        rows_sha256=written.hexdigest(),
        fingerprint=fingerprint,
        amounts=_sum_amounts([written.amounts.items()]),
    )


def check_file(directory: Path, file: ArchivedFile) -> None:
    """Whether a file is, byte by byte, what the manifest says. BadArchive."""
    path = directory / file.name
    try:
        found = hash_file(path)
    except OSError as error:
        raise BadArchive(f"{path} cannot be read: {error.strerror}") from error
    if found != file.sha256:
        raise BadArchive(f"{path} is not what was written: its SHA-256 is {found}, not {file.sha256}")


def read_file(directory: Path, file: ArchivedFile, *, columns: Sequence[str]) -> Iterator[list[Row]]:
    """The rows of a file, page by page. BadArchive at its end, if they are not those that the manifest says."""
    path = directory / file.name
    read = _Digest(columns)
    partition = columns.index("partition")
    for page in _read_pages(path, columns):
        for row in page:
            read.add(row)
            if row[partition] != file.partition:
                raise BadArchive(f"{path} holds use of partition {row[partition]}")
        yield page
    if (read.rows, read.hexdigest()) != (file.rows, file.rows_sha256):
        raise BadArchive(f"{path} does not hold the rows that the manifest says")


def hash_file(path: Path) -> str:
    """The SHA-256 of a file."""
    found = sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            found.update(part)
    return found.hexdigest()


class _Digest:
    """Counts rows and hashes them, as they are and not as a file has them; and sums the amounts of those that count."""

    def __init__(self, columns: Sequence[str] = NAMES) -> None:
        self.rows = 0
        self.amounts: dict[str, Decimal] = {}
        self._hash = sha256()
        self._amounts = columns.index("amounts") if "amounts" in columns else None
        self._superseded = columns.index("superseded") if "superseded" in columns else None

    def add(self, row: Row) -> None:
        self.rows += 1
        self._hash.update(_encode(row))
        self._hash.update(b"\n")

    def each(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.add(row)
            self._sum(row)
            yield row

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def _sum(self, row: Row) -> None:
        if self._amounts is None or row[self._amounts] is None:
            return
        if self._superseded is not None and row[self._superseded]:
            return
        with localcontext(_EXACT):
            for each in msgspec.json.decode(row[self._amounts]):
                self.amounts[each["unit"]] = self.amounts.get(each["unit"], Decimal(0)) + Decimal(each["amount"])


def _write_parquet(path: Path, rows: Iterable[Row]) -> None:
    with path.open("wb") as file:
        with pq.ParquetWriter(
            file, _SCHEMA.with_metadata({"scrip": FORMAT}), compression="zstd", use_dictionary=_REPEATED
        ) as writer:
            pages = _pages(iter(rows))
            while batches := [_record_batch(page) for page in islice(pages, GROUP_ROWS // PAGE_ROWS)]:
                writer.write_table(pa.Table.from_batches(batches, schema=_SCHEMA))
        file.flush()
        _sync(file.fileno())


def _pages(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while page := list(islice(rows, PAGE_ROWS)):
        yield page


def _record_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(column, type=field.type) for field, column in zip(_SCHEMA, columns, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _read_pages(path: Path, columns: Sequence[str] = NAMES) -> Iterator[list[Row]]:
    try:
        with pq.ParquetFile(path) as file:
            if missing := set(columns) - set(file.schema_arrow.names):
                raise BadArchive(f"{path} lacks the columns {', '.join(sorted(missing))}")
            for batch in file.iter_batches(batch_size=PAGE_ROWS, columns=list(columns)):
                # In the order that was asked for, whatever the file's is.
                read = [batch.column(name).to_pylist() for name in columns]
                yield list(zip(*read, strict=True))
    except (OSError, pa.ArrowException) as error:
        raise BadArchive(f"{path} cannot be read: {error}") from error


def _sum_amounts(found: Iterable[Iterable[tuple[str, str | Decimal]]]) -> dict[str, str]:
    sums: dict[str, Decimal] = {}
    with localcontext(_EXACT):
        for unit, amount in chain.from_iterable(found):
            sums[unit] = sums.get(unit, Decimal(0)) + Decimal(amount)
        return {unit: f"{sums[unit]:f}" for unit in sorted(sums)}


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)
