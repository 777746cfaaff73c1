"""Which accounts are open."""

from collections.abc import Collection
from datetime import datetime

from services.metering.store.executing import Connection


async def add_to_directory(connection: Connection, *, partition: int, account: str, opened_at: datetime) -> None:
    """Note that an account is open."""
    await connection.execute(
        "INSERT INTO directory (partition, account, opened_at) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
        [partition, account, opened_at],
    )


async def find_open(connection: Connection, accounts: Collection[tuple[int, str]]) -> set[str]:
    """Which of the accounts (with their partitions) are open. For good: an account is never closed."""
    cursor = await connection.execute(
        """
        SELECT account FROM directory
        JOIN unnest(%s::smallint[], %s::text[]) AS asked (partition, account) USING (partition, account)
        """,
        [[partition for partition, _ in accounts], [account for _, account in accounts]],
    )
    return {account for (account,) in await cursor.fetchall()}
