"""Write what was decided, and commit: one statement, in one round trip."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, NamedTuple

import psycopg
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql

from services.kit import dead_letters
from services.kit.arrays import columns
from services.kit.dead_letters import Letter
from services.kit.outbox import OutboxRow
from services.ledger import tables
from services.ledger.domain.draft import Head, Recorded
from services.ledger.store.executing import Connection, Row, execute, numbered
from services.ledger.tables import place

_HEAD_MOVED: Final = "SC001"
_POSTGRESQL: Final = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
_HOLD_BATCH: Final = place(tables.holds, "batch")


class HeadMoved(Exception):
    """A commit was refused: a partition's head is not where the batch was decided on."""


@dataclass(slots=True)
class Written:
    """All that one partition's batch adds. Rows as in the tables, but of `lines` and `reversals` without the last
    column, which is the batch's time.
    """

    before: Head
    after: Head
    entries: list[Recorded]
    commands: list[Row]
    bundles: list[Row]
    lines: list[Row]
    projections: dict[str, list[Row]]
    outbox: list[OutboxRow]
    letters: list[Letter]
    reversals: list[Row] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Signature:
    """What one commit's heads were signed with. `heads` is the text that was signed; it names them all."""

    commit_id: str
    signature: bytes
    key_id: str
    heads: str


async def write(
    connection: Connection,
    batch: Sequence[Written],
    signature: Signature | None = None,
    sent: Callable[[], None] = lambda: None,
) -> None:
    """Write what was decided, and commit, in one round trip. HeadMoved: nothing was, another owner was first.

    Tells `sent` when the server has it all, and there is nothing to do here but to wait.
    """
    rows = {addition: found for addition, found in _rows_of(batch, signature) if found}
    values = [*_head_columns(batch)]
    for found in rows.values():
        values += columns(found)
    try:
        async with connection.pipeline():
            await execute(connection, _write_statement(tuple(rows)), values)
            await dead_letters.record(connection, [letter for one in batch for letter in one.letters])
            # `connection.commit()` would wait for the answers to it all.
            await execute(connection, b"COMMIT", ())
            sent()
    except psycopg.Error as error:
        if error.sqlstate == _HEAD_MOVED:
            raise HeadMoved(f"partitions {error.diag.message_detail}") from error
        raise


class _Addition(NamedTuple):
    """Rows for a table. Those that are `new` are not there yet, or nothing is written: UniqueViolation."""

    table: Table
    new: bool


def _rows_of(batch: Sequence[Written], signature: Signature | None) -> Iterator[tuple[_Addition, list[Row]]]:
    """The rows of a batch, by where they go."""
    for table, rows in _record_of(batch, signature):
        yield _Addition(table, new=True), rows
    placed: list[Row] = []
    for table in tables.PROJECTIONS:
        changed = [row for one in batch for row in one.projections[table.name]]
        if table is tables.holds:
            # Whether they were placed before may not have been looked up.
            begun = {one.after.partition: one.after.batch for one in batch}
            placed = [row for row in changed if row[_HOLD_BATCH] == begun[row[0]]]
            changed = [row for row in changed if row[_HOLD_BATCH] != begun[row[0]]]
        yield _Addition(table, new=False), changed
    yield _Addition(tables.holds, new=True), placed


def _record_of(batch: Sequence[Written], signature: Signature | None) -> Iterator[tuple[Table, list[Row]]]:
    """The rows of a batch that are only ever added, and the outbox's."""
    yield tables.journal, [(*each.columns, each.hash) for one in batch for each in one.entries]
    yield tables.commands, [row for one in batch for row in one.commands]
    yield tables.bundles, [row for one in batch for row in one.bundles]
    yield tables.charge_lines, [(*row, one.after.recorded_at) for one in batch for row in one.lines]
    yield tables.reversals, [(*row, one.after.recorded_at) for one in batch for row in one.reversals]
    if signature is not None:
        yield tables.signatures, _signature_rows(batch, signature)
    yield tables.outbox, [_outbox_row(row) for one in batch for row in one.outbox]


@cache
def _write_statement(written: tuple[_Addition, ...]) -> bytes:
    """Advance the heads, and add rows to tables, as one statement: each costs by itself, whatever it adds.

    The heads come first: what a SELECT needs is done before what a WITH merely adds.
    """
    additions = "".join(f", added_{place} AS ({_addition(*each)})" for place, each in enumerate(written))
    return numbered(f"WITH heads_ AS ({_ADVANCE}){additions} SELECT count(*) FROM heads_")


_ADVANCE: Final = (
    "SELECT advance_heads(%s::smallint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bytea[],"
    " %s::timestamptz[], %s::bigint[], %s::bigint[])"
)


def _addition(table: Table, new: bool) -> str:
    """INSERT of any number of rows, whose columns are arrays; those that are not new replace what is there."""
    names = ", ".join(column.name for column in table.columns)
    # In the list of what is selected they go forth in step; in FROM each would first be copied into a store of its own.
    arrays = ", ".join(f"unnest(%s::{column.type.compile(dialect=_POSTGRESQL)}[])" for column in table.columns)
    statement = f"INSERT INTO {table.name} ({names}) SELECT {arrays}"
    if new:
        return statement
    key = ", ".join(column.name for column in table.primary_key)
    values = ", ".join(f"{column.name} = excluded.{column.name}" for column in table.columns if not column.primary_key)
    return f"{statement} ON CONFLICT ({key}) DO UPDATE SET {values}"


def _signature_rows(batch: Sequence[Written], signature: Signature) -> list[Row]:
    """One for each head that has a new hash. What was signed, all of them, stands in the first alone."""
    moved = [one.after for one in batch if one.after.batch != one.before.batch]
    first = min((head.partition for head in moved), default=None)
    return [
        (
            head.partition,
            head.batch,
            head.chain_hash,
            signature.commit_id,
            signature.signature,
            signature.key_id,
            signature.heads if head.partition == first else "",
        )
        for head in moved
    ]


def _head_columns(batch: Sequence[Written]) -> list[str]:
    return columns(
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
    )


def _outbox_row(row: OutboxRow) -> Row:
    return (row.partition, row.number, row.subject, row.message_id, row.payload, row.recorded_at)
