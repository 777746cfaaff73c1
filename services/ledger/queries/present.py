"""Accounts as they are now: whatever is due is done in memory, by the rules by which it will be journalled."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
from psycopg import sql
from sqlalchemy import TIMESTAMP, Boolean, Table, Text
from sqlalchemy.dialects.postgresql import UUID

from services.ledger import tables
from services.ledger.domain.chain import GENESIS
from services.ledger.domain.commands import LATE_GRACE, Units
from services.ledger.domain.draft import Draft, Head
from services.ledger.domain.due import decide_due
from services.ledger.domain.state import PartitionState
from services.ledger.projections import add_rows
from services.ledger.queries.selection import Connection

# What is done of what is due while somebody waits.
DUE_STEPS_MAX: Final = 20_000


class TooMuchDue(Exception):
    """More is due on an account than can be done while somebody waits. The sweeper is at it."""


async def present(
    connection: Connection, partition: int, accounts: Sequence[str], *, units: Units, now: datetime
) -> tuple[PartitionState, Draft]:
    """Accounts as they are at `now`, whatever is due done in a draft that is never written."""
    cursor = await connection.execute(_PRESENT, {"partition": partition, "accounts": list(accounts)})
    recorded_at, *found = await cursor.fetchone() or (now,)
    state = PartitionState()
    rows = zip(_DECODERS.items(), found, strict=True)
    add_rows({partition: state}, {table.name: decode(text) for (table, decode), text in rows})
    # Only its time matters to what is due: nothing of the draft is written.
    head = Head(
        partition=partition,
        epoch=0,
        batch=0,
        chain_hash=GENESIS,
        recorded_at=recorded_at,
        outbox_number=0,
        charges_number=0,
    )
    draft = Draft(head, state, now=now)
    transaction = draft.begin()
    for _ in range(DUE_STEPS_MAX):
        moves = decide_due(state, accounts, units=units, place=transaction.place)
        if not moves:
            return state, draft
        transaction.record(moves)
    raise TooMuchDue(f"more than {DUE_STEPS_MAX} things are due on {accounts[0]}")


_TYPES: Final[Mapping[type[Any], type[Any]]] = {TIMESTAMP: datetime, Boolean: bool, Text: str, UUID: str}
_READ: Final = (tables.accounts, tables.wallets, tables.rules, tables.lots)


def _row_type(table: Table) -> Any:
    kinds = (_TYPES.get(type(column.type), int) for column in table.columns)
    optional = (kind | None if column.nullable else kind for kind, column in zip(kinds, table.columns, strict=True))
    return list[tuple[tuple(optional)]]  # type: ignore[misc]  # known only when it runs


_DECODERS: Final = {table: msgspec.json.Decoder(_row_type(table)).decode for table in _READ}


def _as_json(table: Table, where: str) -> str:
    columns = ", ".join(f"t.{column.name}" for column in table.columns)
    return f"(SELECT coalesce(json_agg(json_build_array({columns})), '[]')::text FROM {where})"


# In one statement, so that it is of one moment without a transaction; as JSON, which is read in one go.
_OF_ACCOUNTS: Final = "t.partition = %(partition)s AND t.account = ANY (%(accounts)s)"
_PRESENT: Final = sql.SQL(
    "SELECT h.recorded_at, "
    + ", ".join(_as_json(table, f"{table.name} t WHERE {_OF_ACCOUNTS}") for table in _READ[:-1])
    + ", "
    + _as_json(
        tables.lots,
        f"""(
            SELECT t.* FROM lots t WHERE {_OF_ACCOUNTS} AND NOT t.spent
            UNION ALL
            SELECT t.* FROM lots t
            WHERE {_OF_ACCOUNTS} AND t.spent AND (t.rule_id IS NOT NULL OR t.expired > 0)
              AND t.expires_at > h.recorded_at - interval '{LATE_GRACE.total_seconds():.0f} seconds'
        ) t""",
    )
    + " FROM heads h WHERE h.partition = %(partition)s"
)
