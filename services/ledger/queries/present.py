"""Accounts as they are now: whatever is due, and the end of holds past their deadline, is done in memory, by the rules
by which it will be journalled.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
from psycopg import sql
from sqlalchemy import TIMESTAMP, Boolean, Table, Text
from sqlalchemy.dialects.postgresql import UUID

from contracts.accounts import path
from services.ledger import tables
from services.ledger.domain.chain import GENESIS
from services.ledger.domain.commands import LATE_GRACE, Units
from services.ledger.domain.draft import Draft, Head
from services.ledger.domain.due import decide_due
from services.ledger.domain.entries import Move
from services.ledger.domain.overdue import decide_overdue, in_order
from services.ledger.domain.state import PartitionState
from services.ledger.projections import add_rows
from services.ledger.queries.selection import Connection, text_array

# What is done of what is due while somebody waits: some tenths of a second.
DUE_STEPS_MAX: Final = 20_000
OVERDUE_HOLDS_MAX: Final = 10_000
# When a batch would be recorded that is decided at `now`, from a row of `heads`: as `Draft` has it.
PRESENT_TIME: Final = "greatest(recorded_at + interval '1 microsecond', %(now)s)"


class TooMuchDue(Exception):
    """More is due on an account than can be done while somebody waits. The sweeper is at it."""


async def present(
    connection: Connection,
    partition: int,
    accounts: Sequence[str],
    *,
    units: Units,
    now: datetime,
    holds: Sequence[str] = (),
) -> tuple[PartitionState, Draft]:
    """Accounts as they are at `now`, whatever is due done in a draft that is never written.

    Of holds there are those past their deadline that had set aside something of the accounts, or that are named: they
    have ended, as they say themselves. The accounts above their own are there as well.
    """
    recorded_at, rows = await _read(connection, partition, accounts, now=now, holds=holds, above=())
    if above := _above(rows, accounts):
        # A hold may have set aside something all the way up: what was due there before its deadline comes first.
        recorded_at, rows = await _read(connection, partition, accounts, now=now, holds=holds, above=above)
    state = PartitionState()
    add_rows({partition: state}, rows)
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
    holds_left = deque(in_order(state.holds.values()))
    for _ in range(DUE_STEPS_MAX):
        moves: list[Move] = []
        # Holds first, as whoever decides and the sweeper do.
        while holds_left and not moves:
            moves = decide_overdue(state, holds_left[0], units=units, place=transaction.place)
            if not moves:
                holds_left.popleft()
        moves = moves or decide_due(state, accounts, units=units, place=transaction.place)
        if not moves:
            return state, draft
        transaction.record(moves)
    raise TooMuchDue(f"more than {DUE_STEPS_MAX} things are due on {', '.join(accounts[:1])}")


async def _read(
    connection: Connection,
    partition: int,
    accounts: Sequence[str],
    *,
    now: datetime,
    holds: Sequence[str],
    above: Sequence[str],
) -> tuple[datetime, Mapping[str, list[Any]]]:
    cursor = await connection.execute(
        _PRESENT,
        {
            "partition": partition,
            "accounts": text_array(accounts),
            "now": now,
            "holds": text_array(holds),
            "loaded": text_array([*accounts, *above]),
        },
    )
    recorded_at, *found = await cursor.fetchone() or (now,)
    rows = {
        table.name: decode(text) if text is not None else []
        for (table, decode), text in zip(_DECODERS.items(), found, strict=True)
    }
    if len(rows[tables.holds.name]) > OVERDUE_HOLDS_MAX:
        raise TooMuchDue(f"more than {OVERDUE_HOLDS_MAX} holds are overdue on {', '.join(accounts[:1])}")
    return recorded_at, rows


def _above(rows: Mapping[str, list[Any]], accounts: Sequence[str]) -> list[str]:
    """The accounts on the paths of the holds that were found, but for those that were asked for."""
    named = {name for row in rows[tables.holds.name] for name in path(row[_HOLD_ACCOUNT])}
    return sorted(named - set(accounts))


_TYPES: Final[Mapping[type[Any], type[Any]]] = {TIMESTAMP: datetime, Boolean: bool, Text: str, UUID: str}
_READ: Final = (tables.accounts, tables.wallets, tables.rules, tables.lots, tables.holds, tables.hold_lots)
_HOLD_ACCOUNT: Final = list(tables.holds.columns.keys()).index("account")


def _row_type(table: Table) -> Any:
    kinds = (_TYPES.get(type(column.type), int) for column in table.columns)
    optional = (kind | None if column.nullable else kind for kind, column in zip(kinds, table.columns, strict=True))
    return list[tuple[tuple(optional)]]  # type: ignore[misc]  # known only when it runs


_DECODERS: Final = {table: msgspec.json.Decoder(_row_type(table)).decode for table in _READ}


def _as_json(table: Table, where: str) -> str:
    columns = ", ".join(f"t.{column.name}" for column in table.columns)
    return f"(SELECT json_agg(json_build_array({columns}))::text FROM {where})"


# In one statement, so that it is of one moment without a transaction; as JSON, which is read in one go. Arrays are
# hidden from the planner: if it knew how short they are it would plan anew each time, and that takes longest of all.
_LOADED: Final = "t.partition = %(partition)s AND t.account = ANY ((SELECT %(loaded)s::text[])::text[])"
_PRESENT: Final = sql.SQL(
    f"""
    WITH head AS MATERIALIZED (
        SELECT recorded_at, {PRESENT_TIME} AS at FROM heads WHERE partition = %(partition)s
    ), overdue AS MATERIALIZED (
        SELECT o.* FROM holds o
        WHERE o.partition = %(partition)s AND o.status = 'placed' AND o.expires_at <= (SELECT at FROM head)
          AND (o.hold_id = ANY ((SELECT %(holds)s::uuid[])::uuid[]) OR (
              SELECT true FROM hold_lots e
              WHERE e.partition = o.partition AND e.hold_id = o.hold_id
                AND e.account = ANY ((SELECT %(accounts)s::text[])::text[]) AND e.held <> 0
              LIMIT 1
          ))
        ORDER BY o.expires_at, o.hold_id LIMIT {OVERDUE_HOLDS_MAX + 1}
    )
    SELECT h.recorded_at, """
    + ", ".join(
        (
            *(_as_json(table, f"{table.name} t WHERE {_LOADED}") for table in _READ[:3]),
            _as_json(
                tables.lots,
                f"""(
                    SELECT t.* FROM lots t WHERE {_LOADED} AND NOT t.spent
                    UNION ALL
                    SELECT t.* FROM lots t
                    WHERE {_LOADED} AND t.spent AND (t.rule_id IS NOT NULL OR t.expired > 0)
                      AND t.expires_at > h.recorded_at - interval '{LATE_GRACE.total_seconds():.0f} seconds'
                ) t""",
            ),
            _as_json(tables.holds, "overdue t"),
            _as_json(
                tables.hold_lots, "overdue o JOIN hold_lots t ON t.partition = o.partition AND t.hold_id = o.hold_id"
            ),
        )
    )
    + " FROM head h"
)
