"""Accounts as they were recorded at a time: sums over the journal, counted from whichever end is nearer."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import sql

from contracts.partition import partition_of
from services.ledger import tables
from services.ledger.domain.state import Lot, Wallet
from services.ledger.projections import lot_of
from services.ledger.queries.selection import OF_ACCOUNT, Connection, bounds_below


@dataclass(frozen=True, slots=True)
class Past:
    """An account, the last batch of the time in question, and from where its sums are counted."""

    partition: int
    account: str
    opened_at: datetime
    batch: int
    head: int
    backwards: bool

    @property
    def keys(self) -> dict[str, Any]:
        """What the statements about it are given."""
        low, high = (self.batch, self.head) if self.backwards else (0, self.batch)
        return {
            "partition": self.partition,
            "account": self.account,
            "batch": self.batch,
            "low": low,
            "high": high,
            **bounds_below(self.account),
        }


async def find_past(connection: Connection, account: str, as_of: datetime) -> Past | None:
    """The past of an account at a time, or None if it was not open then."""
    partition = partition_of(account)
    cursor = await connection.execute(
        """
        SELECT a.opened_at, a.batch, batch_at(%(partition)s::smallint, %(as_of)s), h.batch
        FROM accounts a JOIN heads h USING (partition) WHERE a.partition = %(partition)s AND a.account = %(account)s
        """,
        {"partition": partition, "account": account, "as_of": as_of},
    )
    row = await cursor.fetchone()
    if row is None or row[1] > row[2]:
        return None
    opened_at, opening, batch, head = row
    return Past(partition, account, opened_at, batch, head, backwards=head - batch < batch - opening)


async def past_lots(connection: Connection, past: Past) -> list[Lot]:
    """The lots of which something was left, as they were."""
    cursor = await connection.execute(
        f"""
        SELECT lot_id::text, sum(posted)::bigint, sum(held)::bigint, sum(frozen)::bigint,
               -coalesce(sum(posted) FILTER (WHERE kind IN ('lot_expired', 'lot_revived')), 0)::bigint
        FROM journal
        WHERE {OF_ACCOUNT} AND lot_id IS NOT NULL AND batch > %(low)s AND batch <= %(high)s GROUP BY lot_id
        """,
        past.keys,
    )
    sums = {str(row[0]): [int(amount) for amount in row[1:]] for row in await cursor.fetchall()}
    columns = sql.SQL(", ".join(f"t.{column.name}" for column in tables.lots.columns))
    cursor = await connection.execute(
        sql.SQL(
            """
            SELECT {columns} FROM lots t
            WHERE partition = %(partition)s AND account = %(account)s AND NOT spent AND %(backwards)s
              AND batch <= %(batch)s
            UNION
            SELECT {columns} FROM lots t
            WHERE partition = %(partition)s AND lot_id = ANY (%(lots)s::uuid[]) AND batch <= %(batch)s
            """
        ).format(columns=columns),
        {**past.keys, "lots": list(sums), "backwards": past.backwards},
    )
    lots = [lot_of(row) for row in await cursor.fetchall()]
    for lot in lots:
        amounts = sums.get(lot.id, [0, 0, 0, 0])
        if past.backwards:
            now = (lot.posted, lot.held, lot.frozen, lot.expired)
            amounts = [amount - later for amount, later in zip(now, amounts, strict=True)]
        lot.posted, lot.held, lot.frozen, lot.expired = amounts
    return lots


async def past_holds(connection: Connection, past: Past) -> dict[tuple[str, str], int]:
    """What was held on the account's wallets, by hold and unit."""
    cursor = await connection.execute(
        f"""
        SELECT hold_id::text, unit, sum(held)::bigint FROM journal
        WHERE {OF_ACCOUNT} AND hold_id IS NOT NULL AND batch > %(low)s AND batch <= %(high)s
        GROUP BY hold_id, unit HAVING sum(held) <> 0
        """,
        past.keys,
    )
    sums = {(str(hold), str(unit)): int(held) for hold, unit, held in await cursor.fetchall()}
    if not past.backwards:
        return sums
    cursor = await connection.execute(
        """
        SELECT h.hold_id::text, e.unit, sum(e.held)::bigint FROM holds h JOIN hold_lots e USING (partition, hold_id)
        WHERE h.partition = %(partition)s AND h.status = 'placed' AND e.account = %(account)s AND e.held <> 0
          AND (h.account = %(account)s COLLATE "C"
               OR (h.account > %(below)s COLLATE "C" AND h.account < %(beside)s COLLATE "C"))
        GROUP BY 1, 2
        """,
        past.keys,
    )
    held = {(str(hold), str(unit)): int(amount) for hold, unit, amount in await cursor.fetchall()}
    then = {key: held.get(key, 0) - sums.get(key, 0) for key in held.keys() | sums.keys()}
    return {key: amount for key, amount in then.items() if amount}


def past_wallet(past: Past, unit: str, lots: Sequence[Lot]) -> Wallet:
    """A wallet of these lots. What it was told to be is not known, nor needed."""
    wallet = Wallet(
        account=past.account,
        unit=unit,
        policy="hard",
        overdraft=0,
        recorded_at=past.opened_at,
        batch=past.batch,
        position=0,
    )
    for lot in lots:
        wallet.add(lot)
        if lot.kind == "overage":
            wallet.overage -= lot.posted
        elif lot.kind == "uncapped":
            wallet.uncapped -= lot.posted
        else:
            wallet.posted += lot.posted
            wallet.held += lot.held
            wallet.frozen += lot.frozen
        if lot.kind == "debt":
            wallet.owed -= lot.posted
            wallet.owing += lot.held
    return wallet
