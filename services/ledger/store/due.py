"""What is due, or overdue, in the tables: for the sweeper, and for who watches it."""

from collections.abc import Iterable
from datetime import datetime

from services.ledger.store.executing import Connection


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
