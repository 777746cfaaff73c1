"""What is due, or overdue, in the tables: for the sweeper, and for who watches it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from services.ledger.store.executing import Connection


@dataclass(frozen=True, slots=True)
class Begun:
    """A lot that was granted for later, and has begun."""

    partition: int
    account: str
    effective_at: datetime
    lot: UUID


async def due_accounts(
    connection: Connection, partitions: Iterable[int], at: datetime, limit: int
) -> list[tuple[int, str]]:
    """Accounts on whose wallets something is due by a time, and their partitions: the longest overdue first."""
    cursor = await connection.execute(
        """
        SELECT partition, account FROM accounts
        WHERE partition = ANY (%s) AND due_at <= %s ORDER BY due_at, partition, account LIMIT %s
        """,
        [list(partitions), at, limit],
    )
    return [(int(partition), str(account)) for partition, account in await cursor.fetchall()]


async def overdue_holds(
    connection: Connection, partitions: Iterable[int], at: datetime, limit: int
) -> list[tuple[int, str, str]]:
    """Open holds whose deadline is at a time or before, as (partition, hold, account): the longest overdue first."""
    cursor = await connection.execute(
        """
        SELECT partition, hold_id::text, account FROM holds
        WHERE partition = ANY (%s) AND status = 'placed' AND expires_at <= %s
        ORDER BY expires_at, partition, hold_id LIMIT %s
        """,
        [list(partitions), at, limit],
    )
    return [(int(partition), str(hold), str(account)) for partition, hold, account in await cursor.fetchall()]


async def oldest_due(
    connection: Connection, partitions: Iterable[int], at: datetime
) -> tuple[datetime | None, datetime | None]:
    """Since when something has been due on an account, and since when a hold has been overdue; null: nothing is."""
    cursor = await connection.execute(
        """
        SELECT (SELECT min(due_at) FROM accounts WHERE partition = ANY (%(partitions)s) AND due_at <= %(at)s),
               (SELECT min(expires_at) FROM holds
                WHERE partition = ANY (%(partitions)s) AND status = 'placed' AND expires_at <= %(at)s)
        """,
        {"partitions": list(partitions), "at": at},
    )
    accounts, holds = await cursor.fetchone() or (None, None)
    return accounts, holds


async def begun_lots(
    connection: Connection, since: Mapping[int, tuple[datetime, UUID]], at: datetime, limit: int
) -> list[Begun]:
    """Lots granted for later that began by a time, in wallets whose owners were told that they are low: the first ones.

    `since`: where to begin in each partition, behind which (time, lot).
    """
    cursor = await connection.execute(
        """
        SELECT t.partition, t.account, t.effective_at, t.lot_id
        FROM unnest(%s::smallint[], %s::timestamptz[], %s::uuid[]) AS k (partition, since, lot_id)
        JOIN lots t ON t.partition = k.partition AND (t.effective_at, t.lot_id) > (k.since, k.lot_id)
        JOIN wallets w ON w.partition = t.partition AND w.account = t.account AND w.unit = t.unit AND w.low <> '[]'
        WHERE t.effective_at > t.recorded_at AND t.effective_at <= %s AND NOT t.spent
        ORDER BY t.effective_at, t.lot_id LIMIT %s
        """,
        [
            list(since),
            [begun for begun, _ in since.values()],
            [lot for _, lot in since.values()],
            at,
            limit,
        ],
    )
    return [
        Begun(int(partition), str(account), begun, lot) for partition, account, begun, lot in await cursor.fetchall()
    ]
