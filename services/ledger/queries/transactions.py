"""A transaction: its entries, both sides, and its cause."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

from psycopg.rows import TupleRow
from pydantic import BaseModel

from contracts.ids import partition_of_id
from contracts.money import Unit, format_amount
from contracts.times import TIME_MAX, TIME_MIN
from services.ledger.domain.commands import Units
from services.ledger.queries.charges import (
    ENTRIES_SHOWN_MAX,
    LINE_COLUMNS,
    LINES_SHOWN_MAX,
    REVERSAL_COLUMNS,
    REVERSAL_ENTRY,
    LineView,
    ReversalView,
    line_view,
    reversal_view,
    reversals_of,
)
from services.ledger.queries.selection import TICK, UUID_LENGTH, Connection
from services.ledger.translate import full_id


class EntryView(BaseModel):
    """One entry of the journal. An account that begins with `@` is a contra: the other side of what is posted.

    `details` is the JSON that is journalled, and covered by the hash; amounts in it are in the unit's steps.
    """

    batch: int
    position: int
    kind: str
    account: str
    unit: str | None
    lot: str | None
    lot_kind: str | None
    hold: str | None
    posted: str | None
    held: str | None
    frozen: str | None
    occurred_at: datetime
    details: str | None


class CommandView(BaseModel):
    """Who asked, and under which idempotency key."""

    principal: str
    idempotency_key: str


class TransactionView(BaseModel):
    """A transaction and its cause: commands, or a bundle's charge lines, or one of its reversals; neither: it was due.

    Of more than 10,000 entries the first are told, and how many there are.
    """

    transaction: str
    batch: int
    recorded_at: datetime
    commands: list[CommandView]
    bundle: int | None
    lines: list[LineView]
    reversals: list[ReversalView]
    entries: list[EntryView]
    entries_total: int


async def read_transaction(connection: Connection, transaction: str, *, units: Units) -> TransactionView | None:
    """A transaction with its cause, or None if there is none of the id. Its time is in the id."""
    partition, uuid = partition_of_id(transaction), transaction[-UUID_LENGTH:]
    elapsed = timedelta(milliseconds=int(uuid[:8] + uuid[9:13], 16))
    if elapsed >= TIME_MAX - TIME_MIN:
        return None
    begin = TIME_MIN + elapsed
    keys = {
        "partition": partition,
        "transaction": uuid,
        "begin": begin - TICK,
        "end": begin + timedelta(milliseconds=1) - TICK,
        "limit": ENTRIES_SHOWN_MAX,
    }
    cursor = await connection.execute(_ENTRIES, keys)
    rows = await cursor.fetchall()
    if not rows:
        return None
    keys["recorded_at"] = recorded_at = rows[0][13]
    async with connection.pipeline():
        commands = await connection.execute(
            """
            SELECT principal, idempotency_key FROM commands
            WHERE recorded_at = %(recorded_at)s AND partition = %(partition)s AND transaction_id = %(transaction)s
            ORDER BY 1, 2 LIMIT %(limit)s
            """,
            keys,
        )
        lines = await connection.execute(
            f"""
            SELECT {LINE_COLUMNS} FROM charge_lines
            WHERE recorded_at = %(recorded_at)s AND partition = %(partition)s AND transaction_id = %(transaction)s
            ORDER BY line_number LIMIT {LINES_SHOWN_MAX}
            """,
            keys,
        )
        reversals = await connection.execute(
            f"""
            SELECT {REVERSAL_COLUMNS} FROM reversals r {REVERSAL_ENTRY}
            WHERE r.recorded_at = %(recorded_at)s AND r.partition = %(partition)s
              AND r.transaction_id = %(transaction)s
            ORDER BY r.position LIMIT {LINES_SHOWN_MAX}
            """,
            keys,
        )
    found_lines = await lines.fetchall()
    found_reversals = [reversal_view(row, units.by_name) for row in await reversals.fetchall()]
    given_back = await reversals_of(connection, found_lines, units.by_name)
    return TransactionView(
        transaction=transaction,
        batch=rows[0][0],
        recorded_at=recorded_at,
        commands=[CommandView(principal=row[0], idempotency_key=row[1]) for row in await commands.fetchall()],
        bundle=found_lines[0][12] if found_lines else found_reversals[0].bundle if found_reversals else None,
        lines=[line_view(row, given_back, units.by_name) for row in found_lines],
        reversals=found_reversals,
        entries=[_entry_view(row, partition, units.by_name) for row in rows],
        entries_total=rows[0][14],
    )


_ENTRIES: Final = """
SELECT batch, position, kind, account, unit, lot_id::text, lot_kind, hold_id::text, posted, held, frozen,
       occurred_at, details, recorded_at, count(*) OVER ()
FROM journal
WHERE partition = %(partition)s AND transaction_id = %(transaction)s
  AND batch > batch_at(%(partition)s::smallint, %(begin)s) AND batch <= batch_at(%(partition)s::smallint, %(end)s)
ORDER BY batch, position LIMIT %(limit)s
"""


def _entry_view(row: TupleRow, partition: int, units: Mapping[str, Unit]) -> EntryView:
    batch, position, kind, account, name, lot, lot_kind, hold, *amounts, occurred_at, details, _recorded_at, _ = row
    unit = None if name is None else units[name]
    posted, held, frozen = (None if unit is None else format_amount(amount, unit) for amount in amounts)
    return EntryView(
        batch=batch,
        position=position,
        kind=kind,
        account=account,
        unit=name,
        lot=None if lot is None else full_id("lot", partition, lot),
        lot_kind=lot_kind,
        hold=None if hold is None else full_id("hold", partition, hold),
        posted=posted,
        held=held,
        frozen=frozen,
        occurred_at=occurred_at,
        details=details,
    )
