"""The ledger's statements: heads, loading what a batch needs, writing what it decided. Set-wise; never commits."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection, AsyncCursor, sql
from psycopg.rows import TupleRow
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql

from services.kit import dead_letters
from services.kit.dead_letters import Letter
from services.kit.outbox import OutboxRow
from services.ledger import tables
from services.ledger.domain.draft import Head, Recorded

Connection = AsyncConnection[TupleRow]
Row = tuple[Any, ...]

_HEAD_MOVED: Final = "SC001"
_POSTGRESQL: Final = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped


class HeadMoved(Exception):
    """A commit was refused: a partition's head is not where the batch was decided on."""


@dataclass(slots=True)
class Needs:
    """What a batch has to know, as sets of keys that begin with the partition."""

    heads: set[int] = field(default_factory=set)
    accounts: set[tuple[int, str]] = field(default_factory=set)
    holds: set[tuple[int, str]] = field(default_factory=set)
    # Payment, account, and whether a claim is made on it.
    payments: set[tuple[int, str, str, bool]] = field(default_factory=set)
    commands: set[tuple[int, str, str]] = field(default_factory=set)
    lines: set[tuple[int, str, str, int]] = field(default_factory=set)
    bundles: set[tuple[int, int]] = field(default_factory=set)

    def __bool__(self) -> bool:
        return any((self.heads, self.accounts, self.holds, self.payments, self.commands, self.lines, self.bundles))


@dataclass(slots=True)
class Loaded:
    """What was found: heads, rows of the projections by table, and what had been accepted and charged before."""

    heads: dict[int, Head] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    commands: dict[tuple[int, str, str], tuple[bytes, str]] = field(default_factory=dict)
    lines: dict[tuple[int, str, str, int], tuple[object, ...]] = field(default_factory=dict)
    bundles: dict[tuple[int, int], bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Written:
    """All that one partition's batch adds."""

    before: Head
    after: Head
    entries: list[Recorded]
    commands: list[Row]
    bundles: list[Row]
    lines: list[Row]
    projections: dict[str, list[Row]]
    outbox: list[OutboxRow]
    letters: list[Letter]


async def take_heads(connection: Connection, epochs: Mapping[int, int]) -> dict[int, Head]:
    """Raise heads to the epochs of leases just won, and read them. One that has a higher epoch already is left out."""
    await connection.execute(
        """
        WITH mine AS (
            SELECT h.partition, m.epoch FROM heads h
            JOIN unnest(%s::smallint[], %s::bigint[]) AS m (partition, epoch) USING (partition)
            WHERE h.epoch < m.epoch ORDER BY h.partition FOR NO KEY UPDATE OF h
        )
        UPDATE heads h SET epoch = mine.epoch FROM mine WHERE h.partition = mine.partition
        """,
        _columns(epochs.items()),
    )
    heads = await read_heads(connection, epochs)
    return {partition: head for partition, head in heads.items() if head.epoch == epochs[partition]}


async def read_heads(connection: Connection, partitions: Iterable[int]) -> dict[int, Head]:
    """Where partitions stand."""
    cursor = await connection.execute(_HEADS, [list(partitions)])
    return _heads(await cursor.fetchall())


_HEADS: Final = """
SELECT partition, epoch, batch, chain_hash, recorded_at, outbox_number, charges_number
FROM heads WHERE partition = ANY (%s)
"""


def _heads(rows: Iterable[TupleRow]) -> dict[int, Head]:
    return {
        row[0]: Head(
            partition=row[0],
            epoch=row[1],
            batch=row[2],
            chain_hash=row[3],
            recorded_at=row[4],
            outbox_number=row[5],
            charges_number=row[6],
        )
        for row in rows
    }


async def load(connection: Connection, needs: Needs) -> Loaded:
    """Read what a batch needs, in one round trip."""
    if not needs:
        return Loaded()
    cursors: dict[str, AsyncCursor[TupleRow]] = {}
    async with connection.pipeline():
        if needs.heads:
            cursors["heads"] = await connection.execute(_HEADS, [list(needs.heads)])
        if needs.accounts:
            keys = _columns(needs.accounts)
            for name in ("accounts", "wallets", "lots"):
                cursors[name] = await connection.execute(_LOAD[name], keys)
        if needs.holds:
            keys = _columns(needs.holds)
            for name in ("holds", "hold_lots"):
                cursors[name] = await connection.execute(_LOAD[name], keys)
        if needs.payments:
            keys = _columns(needs.payments)
            for name in ("payments", "claims", "payment_lots"):
                cursors[name] = await connection.execute(_LOAD[name], keys)
        for name, wanted in (("commands", needs.commands), ("lines", needs.lines), ("bundles", needs.bundles)):
            if wanted:
                cursors[name] = await connection.execute(_LOAD[name], _columns(wanted))
    found = {name: await cursor.fetchall() for name, cursor in cursors.items()}
    rows: dict[str, list[Row]] = {table.name: found[table.name] for table in tables.PROJECTIONS if table.name in found}
    # Spent lots, too: they may be given something back.
    rows["lots"] = [*rows.get("lots", ()), *found.get("payment_lots", ())]
    return Loaded(
        heads=_heads(found.get("heads", ())),
        rows=rows,
        commands={(row[0], row[1], row[2]): (row[3], row[4]) for row in found.get("commands", ())},
        lines={(row[0], row[1], row[2], row[3]): tuple(row[4:]) for row in found.get("lines", ())},
        bundles={(row[0], row[1]): row[2] for row in found.get("bundles", ())},
    )


async def write(connection: Connection, batch: Sequence[Written]) -> None:
    """Write what was decided, and commit, in one round trip. HeadMoved: nothing was, another owner was first."""
    try:
        async with connection.pipeline():
            await _advance_heads(connection, batch)
            await _insert(connection, tables.journal, [_entry_row(one, each) for one in batch for each in one.entries])
            await _insert(connection, tables.commands, [row for one in batch for row in one.commands])
            await _insert(connection, tables.bundles, [row for one in batch for row in one.bundles])
            await _insert(connection, tables.charge_lines, [row for one in batch for row in one.lines])
            for table in tables.PROJECTIONS:
                await _upsert(connection, table, [row for one in batch for row in one.projections[table.name]])
            await _insert(connection, tables.outbox, [_outbox_row(row) for one in batch for row in one.outbox])
            await dead_letters.record(connection, [letter for one in batch for letter in one.letters])
            await connection.commit()
    except psycopg.Error as error:
        if error.sqlstate == _HEAD_MOVED:
            raise HeadMoved(f"partitions {error.diag.message_detail}") from error
        raise


async def _advance_heads(connection: Connection, batch: Sequence[Written]) -> None:
    await connection.execute(
        "SELECT advance_heads(%s::smallint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bytea[],"
        " %s::timestamptz[], %s::bigint[], %s::bigint[])",
        _columns(
            (
                one.after.partition,
                one.before.epoch,
                one.before.batch,
                one.after.batch,
                one.after.chain_hash,
                one.after.recorded_at,
                one.after.outbox_number,
                one.after.charges_number,
            )
            for one in batch
        ),
    )


def _entry_row(written: Written, recorded: Recorded) -> Row:
    entry = recorded.entry
    return (
        written.after.partition,
        entry.batch,
        entry.position,
        entry.transaction,
        entry.kind,
        entry.account,
        entry.unit,
        entry.lot,
        entry.lot_kind,
        entry.hold,
        entry.posted,
        entry.held,
        entry.frozen,
        entry.occurred_at,
        entry.recorded_at,
        recorded.details,
        recorded.hash,
    )


def _outbox_row(row: OutboxRow) -> Row:
    return (row.partition, row.number, row.subject, row.message_id, row.payload, row.recorded_at)


async def _insert(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    if rows:
        await connection.execute(_insert_statement(table), _columns(rows))


async def _upsert(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    if rows:
        await connection.execute(_insert_statement(table) + _replacing(table), _columns(rows))


def _columns(rows: Iterable[Sequence[Any]]) -> list[str]:
    """Rows as one array literal per column. psycopg's own array dumper took more time than deciding and the server."""
    return [_array(column) for column in zip(*rows, strict=True)]


def _array(values: Sequence[Any]) -> str:
    """An array literal of integers, booleans, texts, times or bytes, and nulls."""
    if None in values:
        return "{" + ",".join(["NULL" if value is None else f'"{_quoted(_text(value))}"' for value in values]) + "}"
    match values[0]:
        case bool():
            return "{" + ",".join(["t" if value else "f" for value in values]) + "}"
        case int():
            return "{" + ",".join(map(str, values)) + "}"
        case str():
            texts = values
        case _:
            texts = [_text(value) for value in values]
    joined = _SEPARATOR.join(texts)
    if joined.count(_SEPARATOR) != len(values) - 1:
        return "{" + ",".join([f'"{_quoted(text)}"' for text in texts]) + "}"
    return '{"' + _quoted(joined).replace(_SEPARATOR, '","') + '"}'


# Seldom part of a text; looked for before it is relied on.
_SEPARATOR: Final = "\x1f"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _text(value: Any) -> str:
    match value:
        case str():
            return value
        case bool():
            return "t" if value else "f"
        case bytes():
            return f"\\x{value.hex()}"
        case datetime():
            return value.isoformat()
        case _:
            return str(value)


@cache
def _insert_statement(table: Table) -> sql.SQL:
    """INSERT of any number of rows, whose columns are handed over as arrays."""
    names = ", ".join(column.name for column in table.columns)
    arrays = ", ".join(f"%s::{column.type.compile(dialect=_POSTGRESQL)}[]" for column in table.columns)
    statement = f"INSERT INTO {table.name} ({names}) SELECT * FROM unnest({arrays})"
    return sql.SQL(statement)


@cache
def _replacing(table: Table) -> sql.SQL:
    key = ", ".join(column.name for column in table.primary_key)
    values = ", ".join(f"{column.name} = excluded.{column.name}" for column in table.columns if not column.primary_key)
    return sql.SQL(f" ON CONFLICT ({key}) DO UPDATE SET {values}")


def _select(table: Table, *, keys: Mapping[str, str], on: str | None = None, also: str = "") -> sql.SQL:
    """SELECT of all columns of the rows with the keys, which are handed over as arrays of the named types.

    `on` says which rows `t` belong to a key `k`, if not those with its columns.
    """
    columns = ", ".join(f"t.{column.name}" for column in table.columns)
    arrays = ", ".join(f"%s::{kind}[]" for kind in keys.values())
    names = ", ".join(keys)
    join = f"USING ({names})" if on is None else f"ON {on}"
    statement = f"SELECT {columns} FROM unnest({arrays}) AS k ({names}) JOIN {table.name} t {join} {also}"
    return sql.SQL(statement)


_ACCOUNT_KEYS: Final = {"partition": "smallint", "account": "text"}
_HOLD_KEYS: Final = {"partition": "smallint", "hold_id": "uuid"}

_PAYMENT_KEYS: Final = {"partition": "smallint", "payment": "text", "account": "text", "claiming": "boolean"}
_OF_PAYMENT: Final = "t.partition = k.partition AND t.payment = k.payment AND t.account = k.account"
# A claim has to know if the payment is another account's.
_PAYMENT: Final = (
    "t.partition = k.partition AND t.payment = k.payment AND (t.account = k.account OR (k.claiming AND t.paid > 0))"
)
# A grant changes its payment's other lots only if something has been claimed.
_PAYMENT_LOTS: Final = """
t.partition = k.partition AND t.reference = k.payment AND t.account = k.account AND t.kind IN ('purchase', 'bonus')
AND (k.claiming OR EXISTS (
    SELECT FROM payments p
    WHERE p.partition = k.partition AND p.payment = k.payment AND p.account = k.account AND p.claimed > 0
))
"""

_LOAD: Final[Mapping[str, sql.SQL]] = {
    "accounts": _select(tables.accounts, keys=_ACCOUNT_KEYS),
    "wallets": _select(tables.wallets, keys=_ACCOUNT_KEYS),
    "lots": _select(tables.lots, keys=_ACCOUNT_KEYS, also="WHERE NOT t.spent"),
    "holds": _select(tables.holds, keys=_HOLD_KEYS),
    "hold_lots": _select(tables.hold_lots, keys=_HOLD_KEYS),
    "payments": _select(tables.payments, keys=_PAYMENT_KEYS, on=_PAYMENT),
    "claims": _select(tables.claims, keys=_PAYMENT_KEYS, on=_OF_PAYMENT),
    "payment_lots": _select(tables.lots, keys=_PAYMENT_KEYS, on=_PAYMENT_LOTS),
    "commands": sql.SQL(
        """
        SELECT t.partition, t.principal, t.idempotency_key, t.body_hash, t.outcome
        FROM unnest(%s::smallint[], %s::text[], %s::text[]) AS k (partition, principal, idempotency_key)
        JOIN commands t USING (partition, principal, idempotency_key)
        """
    ),
    "lines": sql.SQL(
        """
        SELECT t.partition, t.source, t.event_id, t.revision,
               t.account, t.occurred_at, t.hold_id::text, t.scope, t.price_version, t.own_key, t.amounts
        FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::integer[]) AS k (partition, source, event_id, revision)
        JOIN charge_lines t USING (partition, source, event_id, revision)
        """
    ),
    "bundles": sql.SQL(
        """
        SELECT t.partition, t.number, t.body_hash
        FROM unnest(%s::smallint[], %s::bigint[]) AS k (partition, number) JOIN bundles t USING (partition, number)
        """
    ),
}
