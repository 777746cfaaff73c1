"""The entries of an account's wallets, page by page, newest first, with the balance after each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, LiteralString

import msgspec
from psycopg import sql
from psycopg.rows import TupleRow
from pydantic import BaseModel

from contracts.ids import partition_of_id
from contracts.money import Unit, format_amount
from contracts.partition import partition_of
from services.ledger.queries.selection import OF_ACCOUNT, SUM_OF_POSTED, TICK, UUID_LENGTH, Connection
from services.ledger.translate import full_id

# A page looks at no more of the journal, and a reference stands for no more lots or transactions.
ENTRIES_SCANNED_MAX: Final = 20_000
LOTS_REFERRED_MAX: Final = 1_000


class StatementEntry(BaseModel):
    """One entry of a wallet. `balance` is the wallet's posted after it."""

    batch: int
    position: int
    transaction: str
    kind: str
    unit: str
    lot: str | None
    lot_kind: str | None
    hold: str | None
    posted: str
    held: str
    frozen: str
    balance: str
    occurred_at: datetime
    recorded_at: datetime


class StatementPlace(msgspec.Struct, frozen=True):
    """Where a page of an account ended: the place of the last entry looked at, and each wallet's posted before it."""

    account: str
    batch: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    position: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    posted: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementFilter:
    """Which entries: of a unit, of a kind, recorded in [since, until), and what a reference stands for.

    A reference is the id of a lot, a hold or a transaction, the reference of a lot, or the id of a charged event.
    """

    unit: str | None = None
    kind: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    reference: str | None = None


async def read_statement(
    connection: Connection,
    account: str,
    *,
    wanted: StatementFilter,
    before: StatementPlace | None,
    limit: int,
    units: Mapping[str, Unit],
) -> tuple[list[StatementEntry], StatementPlace | None] | None:
    """A page of an account's entries, newest first, and where it ended if there are more. None: it is not open.

    `before`: where an earlier page of this account ended, whatever that one was asked for. It may be short: with a
    filter it looks at 20,000 entries and no more.
    """
    partition = partition_of(account)
    keys: dict[str, Any] = {"partition": partition, "account": account}
    since, until = (None if time is None else time - TICK for time in (wanted.since, wanted.until))
    cursor = await connection.execute(
        """
        SELECT CASE WHEN %(since)s::timestamptz IS NULL THEN 0 ELSE batch_at(%(partition)s::smallint, %(since)s) END,
               CASE WHEN %(until)s::timestamptz IS NOT NULL THEN batch_at(%(partition)s::smallint, %(until)s) END
        FROM accounts WHERE partition = %(partition)s AND account = %(account)s
        """,
        {**keys, "since": since, "until": until},
    )
    opened = await cursor.fetchone()
    if opened is None:
        return None
    keys["after"], last = opened
    start = before
    # A page of another question may have ended later.
    if start is None or (last is not None and start.batch > last):
        start = await _statement_start(connection, keys, last)
    conditions = await _conditions(connection, keys, wanted)
    keys |= {
        "batch": start.batch,
        "position": start.position,
        "limit": limit + 1,
        "scanned": ENTRIES_SCANNED_MAX if conditions else limit + 1,
        "unit": wanted.unit,
        "kind": wanted.kind,
    }
    cursor = await connection.execute(_statement(conditions), keys)
    rows = await cursor.fetchall()
    entries = [row for row in rows if row[0]]
    last_scanned = next((row for row in rows if not row[0]), None)
    shown = [_statement_entry(row, partition, start.posted, units) for row in entries[:limit]]
    # Beyond this place nothing was looked at, or there is at least one more.
    ended = entries[limit - 1] if len(entries) > limit else last_scanned
    if ended is None:
        return shown, None
    keys |= {"end_batch": ended[1], "end_position": ended[2]}
    cursor = await connection.execute(_STATEMENT_PASSED, keys)
    posted = dict(start.posted)
    for unit, passed in await cursor.fetchall():
        posted[unit] = posted.get(unit, 0) - int(passed)
    return shown, StatementPlace(account, ended[1], ended[2], posted)


async def _statement_start(connection: Connection, keys: Mapping[str, Any], last: int | None) -> StatementPlace:
    """From where the newest page goes back, and what was posted then. `last`: the last batch that is asked for."""
    cursor = await connection.execute(
        "SELECT unit, posted FROM wallets WHERE partition = %(partition)s AND account = %(account)s", keys
    )
    posted = {str(unit): int(amount) for unit, amount in await cursor.fetchall()}
    if last is None:
        return StatementPlace(keys["account"], _BIGINT_MAX, 0, posted)
    cursor = await connection.execute(
        f"SELECT unit, {SUM_OF_POSTED} FROM journal WHERE {OF_ACCOUNT} AND batch > %(last)s GROUP BY unit",
        {**keys, "last": last},
    )
    for unit, later in await cursor.fetchall():
        posted[unit] -= int(later)
    return StatementPlace(keys["account"], last + 1, 0, posted)


async def _conditions(connection: Connection, keys: dict[str, Any], wanted: StatementFilter) -> list[LiteralString]:
    """What an entry has to be, as SQL over `scanned`. What a reference stands for is put into `keys`."""
    conditions: list[LiteralString] = []
    if wanted.unit is not None:
        conditions.append("unit = %(unit)s")
    if wanted.kind is not None:
        conditions.append("kind = %(kind)s")
    match wanted.reference and wanted.reference.partition("_")[0]:
        case None | "":
            pass
        case "lot" | "hold" | "txn" as kind if _is_id(wanted.reference or ""):
            keys["id"] = (wanted.reference or "")[-UUID_LENGTH:]
            column: LiteralString = {"lot": "lot_id", "hold": "hold_id", "txn": "transaction_id"}[kind]
            conditions.append(f"{column} = %(id)s::uuid")
        case _:
            keys["reference"], keys["most"] = wanted.reference, LOTS_REFERRED_MAX
            cursor = await connection.execute(_REFERRED, keys)
            found = await cursor.fetchall()
            keys["lots"] = [row[1] for row in found if row[0]]
            keys["transactions"] = [row[1] for row in found if not row[0]]
            conditions.append("(lot_id = ANY (%(lots)s::uuid[]) OR transaction_id = ANY (%(transactions)s::uuid[]))")
    return conditions


def _is_id(text: str) -> bool:
    try:
        partition_of_id(text)
    except ValueError:
        return False
    return True


def _statement(conditions: Sequence[LiteralString]) -> sql.Composed:
    where = sql.SQL(" AND ").join([sql.SQL("true"), *map(sql.SQL, conditions)])
    return sql.SQL(_STATEMENT).format(of_account=sql.SQL(OF_ACCOUNT), where=where)


def _statement_entry(
    row: TupleRow, partition: int, posted: Mapping[str, int], units: Mapping[str, Unit]
) -> StatementEntry:
    _, batch, position, transaction, kind, name, lot, lot_kind, hold, *amounts, newer, occurred_at, recorded_at = row
    unit = units[name]
    own, held, frozen = (format_amount(amount, unit) for amount in amounts)
    return StatementEntry.model_construct(
        batch=batch,
        position=position,
        transaction=full_id("txn", partition, transaction),
        kind=kind,
        unit=name,
        lot=None if lot is None else full_id("lot", partition, lot),
        lot_kind=lot_kind,
        hold=None if hold is None else full_id("hold", partition, hold),
        posted=own,
        held=held,
        frozen=frozen,
        balance=format_amount(posted.get(name, 0) - int(newer), unit),
        occurred_at=occurred_at,
        recorded_at=recorded_at,
    )


_BIGINT_MAX: Final = 2**63 - 1


# A page, and after it the last entry looked at if there may be more. `newer`: what came after it, in its unit.
_STATEMENT: Final = """
WITH scanned AS MATERIALIZED (
    SELECT j.*, row_number() OVER (ORDER BY batch DESC, position DESC) AS number,
           coalesce(sum(CASE WHEN lot_kind IN ('overage', 'uncapped') THEN 0 ELSE posted END) OVER newer, 0) AS newer
    FROM (
        SELECT batch, position, transaction_id, kind, unit, lot_id, lot_kind, hold_id, posted, held, frozen,
               occurred_at, recorded_at
        FROM journal
        WHERE {of_account} AND (batch, position) < (%(batch)s, %(position)s) AND batch > %(after)s
        ORDER BY batch DESC, position DESC LIMIT %(scanned)s
    ) j
    WINDOW newer AS (
        PARTITION BY unit ORDER BY batch DESC, position DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    )
), page AS (
    SELECT true AS shown, * FROM scanned WHERE {where} ORDER BY number LIMIT %(limit)s
), last AS (
    SELECT false AS shown, * FROM scanned WHERE number = %(scanned)s
)
SELECT shown, batch, position, transaction_id::text, kind, unit, lot_id::text, lot_kind, hold_id::text,
       posted, held, frozen, newer, occurred_at, recorded_at
FROM (SELECT * FROM page UNION ALL SELECT * FROM last) found ORDER BY shown DESC, number
"""


_STATEMENT_PASSED: Final = f"""
SELECT unit, {SUM_OF_POSTED} FROM journal
WHERE {OF_ACCOUNT} AND (batch, position) < (%(batch)s, %(position)s)
  AND (batch, position) >= (%(end_batch)s, %(end_position)s)
GROUP BY unit
"""


_REFERRED: Final = """
(SELECT true, lot_id FROM lots
 WHERE partition = %(partition)s AND reference = %(reference)s AND account = %(account)s LIMIT %(most)s)
UNION ALL
(SELECT false, transaction_id FROM charge_lines
 WHERE partition = %(partition)s AND event_id = %(reference)s LIMIT %(most)s)
UNION ALL
(SELECT false, transaction_id FROM reversals
 WHERE partition = %(partition)s AND event_id = %(reference)s LIMIT %(most)s)
"""
