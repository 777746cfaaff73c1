"""The journal of accounts as it was recorded by now, in one stream: as CSV, or as Parquet."""

import asyncio
import csv
import io
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from psycopg.rows import TupleRow

from contracts.money import SCALE_MAX, Unit, format_amount
from contracts.partition import partition_of
from services.ledger.queries.selection import OF_ACCOUNT, Connection, bounds_below
from services.ledger.translate import full_id

# Rows that are in memory at once: those that are read and told together, and those of a row group of a Parquet file.
PAGE_ROWS: Final = 5_000
GROUP_ROWS: Final = 20_000

_TEXT: Final = pa.string()
# In the unit itself, as CSV has it: exact for every unit, none has more decimals.
_AMOUNT: Final = pa.decimal128(38, SCALE_MAX)
_TIME: Final = pa.timestamp("us", tz="UTC")

EXPORTED: Final = pa.schema(
    [
        pa.field("partition", pa.int16(), nullable=False),
        pa.field("batch", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("transaction", _TEXT, nullable=False),
        pa.field("kind", _TEXT, nullable=False),
        pa.field("account", _TEXT, nullable=False),
        pa.field("unit", _TEXT, nullable=False),
        pa.field("lot", _TEXT),
        pa.field("lot_kind", _TEXT),
        pa.field("hold", _TEXT),
        pa.field("posted", _AMOUNT, nullable=False),
        pa.field("held", _AMOUNT, nullable=False),
        pa.field("frozen", _AMOUNT, nullable=False),
        pa.field("occurred_at", _TIME, nullable=False),
        pa.field("recorded_at", _TIME, nullable=False),
        pa.field("details", _TEXT),
    ]
)
_REPEATED: Final = ("partition", "kind", "account", "unit", "lot", "lot_kind")

# An entry by the columns of `EXPORTED`; its amounts are decimal strings.
Row = Sequence[Any]
Pages = AsyncIterator[Sequence[Row]]


async def exported_accounts(connection: Connection, account: str, *, below: bool) -> tuple[int, list[str]]:
    """The accounts of an export, itself and if `below` those under it, and up to which batch it goes. 0: not open."""
    partition = partition_of(account)
    cursor = await connection.execute(
        """
        SELECT h.batch, a.account FROM accounts a JOIN heads h USING (partition)
        WHERE a.partition = %(partition)s AND (
            a.account = %(account)s
            OR (%(whole)s AND a.account > %(below)s COLLATE "C" AND a.account < %(beside)s COLLATE "C")
        )
        ORDER BY a.account COLLATE "C"
        """,
        {"partition": partition, "account": account, "whole": below, **bounds_below(account)},
    )
    rows = await cursor.fetchall()
    accounts = [str(row[1]) for row in rows]
    return (int(rows[0][0]), accounts) if account in accounts else (0, [])


async def exported_pages(
    connect: Callable[[], AbstractAsyncContextManager[Connection]],
    accounts: Iterable[str],
    *,
    batch: int,
    units: Mapping[str, Unit],
) -> Pages:
    """The entries of accounts up to a batch, account by account and in order.

    Entries are never changed: so no connection is kept between two pages, however slowly they are taken.
    """
    waiting: list[TupleRow] = []
    for account in accounts:
        keys: dict[str, Any] = {"partition": partition_of(account), "account": account, "until": batch}
        place: tuple[int, int] | None = (0, 0)
        while place is not None:
            keys |= {"batch": place[0], "position": place[1], "limit": PAGE_ROWS}
            async with connect() as connection:
                cursor = await connection.execute(_EXPORT, keys)
                rows = await cursor.fetchall()
            waiting += rows
            if len(waiting) >= PAGE_ROWS:
                # What takes longer than a commit is done aside: commands are decided here, too.
                yield await asyncio.to_thread(_page, waiting, units)
                waiting = []
            place = (rows[-1][1], rows[-1][2]) if len(rows) == PAGE_ROWS else None
    if waiting:
        yield await asyncio.to_thread(_page, waiting, units)


async def as_csv(pages: Pages) -> AsyncIterator[bytes]:
    """Pages as CSV with a header. What is null is empty."""
    yield _csv([EXPORTED.names])
    async for page in pages:
        yield await asyncio.to_thread(_csv, page)


async def as_parquet(pages: Pages) -> AsyncIterator[bytes]:
    """Pages as a Parquet file, group of rows by group of rows. Without its end, which comes last, it is none."""
    file = io.BytesIO()
    writer = pq.ParquetWriter(file, EXPORTED, compression="zstd", use_dictionary=list(_REPEATED))

    def written(group: Sequence[pa.RecordBatch]) -> bytes:
        writer.write_table(pa.Table.from_batches(group, schema=EXPORTED))
        return _taken(file)

    group: list[pa.RecordBatch] = []
    async for page in pages:
        group.append(await asyncio.to_thread(_record_batch, page))
        if sum(len(each) for each in group) >= GROUP_ROWS:
            yield await asyncio.to_thread(written, group)
            group = []
    if group:
        yield await asyncio.to_thread(written, group)
    writer.close()
    yield _taken(file)


@dataclass(frozen=True, slots=True)
class Format:
    """What an export may be written as."""

    media_type: str
    written: Callable[[Pages], AsyncIterator[bytes]]


FORMATS: Final[Mapping[str, Format]] = {
    "csv": Format("text/csv", as_csv),
    "parquet": Format("application/vnd.apache.parquet", as_parquet),
}

_EXPORT: Final = f"""
SELECT partition, batch, position, transaction_id::text, kind, account, unit, lot_id::text, lot_kind, hold_id::text,
       posted, held, frozen, occurred_at, recorded_at, details
FROM journal
WHERE {OF_ACCOUNT} AND (batch, position) > (%(batch)s, %(position)s) AND batch <= %(until)s
ORDER BY batch, position LIMIT %(limit)s
"""


def _page(rows: Sequence[TupleRow], units: Mapping[str, Unit]) -> list[Row]:
    return [_exported(row, units) for row in rows]


def _exported(row: TupleRow, units: Mapping[str, Unit]) -> Row:
    partition, batch, position, transaction, kind, account, unit, lot, lot_kind, hold, *more = row
    posted, held, frozen, occurred_at, recorded_at, details = more
    steps = units[unit]
    return (
        partition,
        batch,
        position,
        full_id("txn", partition, transaction),
        kind,
        account,
        unit,
        None if lot is None else full_id("lot", partition, lot),
        lot_kind,
        None if hold is None else full_id("hold", partition, hold),
        format_amount(posted, steps),
        format_amount(held, steps),
        format_amount(frozen, steps),
        occurred_at,
        recorded_at,
        details,
    )


def _csv(rows: Iterable[Row]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(
        [value.isoformat() if isinstance(value, datetime) else value for value in row] for row in rows
    )
    return text.getvalue().encode()


def _record_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    columns: Iterable[Sequence[Any]] = zip(*rows, strict=True)
    arrays = [
        pa.array([Decimal(text) for text in column] if field.type == _AMOUNT else column, type=field.type)
        for field, column in zip(EXPORTED, columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=EXPORTED)


def _taken(file: io.BytesIO) -> bytes:
    """What was written since it was last asked: the writer counts for itself how far it is."""
    part = file.getvalue()
    file.seek(0)
    file.truncate()
    return part
