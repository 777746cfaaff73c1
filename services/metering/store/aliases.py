"""What publishers call accounts."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import class_row

from services.metering.domain.ingest import Subject
from services.metering.store.executing import Connection


@dataclass(frozen=True, slots=True)
class Alias:
    """What publishers call an account."""

    subject: str
    account: str
    recorded_at: datetime
    recorded_by: str


async def find_aliases(connection: Connection, subjects: Collection[Subject]) -> dict[Subject, str]:
    """Which of the subjects are aliases, and of which accounts. The caller holds the heads of their partitions."""
    cursor = await connection.execute(
        """
        SELECT partition, subject, account FROM aliases
        JOIN unnest(%s::smallint[], %s::text[]) AS asked (partition, subject) USING (partition, subject)
        """,
        [[partition for partition, _ in subjects], [subject for _, subject in subjects]],
    )
    return {(partition, subject): account for partition, subject, account in await cursor.fetchall()}


async def find_alias(connection: Connection, *, partition: int, subject: str) -> Alias | None:
    """The alias of a subject."""
    async with connection.cursor(row_factory=class_row(Alias)) as cursor:
        await cursor.execute(
            "SELECT subject, account, recorded_at, recorded_by FROM aliases WHERE partition = %s AND subject = %s",
            [partition, subject],
        )
        return await cursor.fetchone()


async def list_aliases(connection: Connection, *, after: Subject, limit: int) -> list[Alias]:
    """Aliases after a place, in the order of partitions and subjects."""
    async with connection.cursor(row_factory=class_row(Alias)) as cursor:
        await cursor.execute(
            """
            SELECT subject, account, recorded_at, recorded_by FROM aliases
            WHERE (partition, subject) > (%s::smallint, %s::text) ORDER BY partition, subject LIMIT %s
            """,
            [*after, limit],
        )
        return await cursor.fetchall()


async def add_alias(connection: Connection, alias: Alias, *, partition: int) -> None:
    """Store an alias that is not there. The caller holds the partition's head."""
    await connection.execute(
        """
        INSERT INTO aliases (partition, subject, account, recorded_at, recorded_by, pending)
        VALUES (%s, %s, %s, %s, %s, true)
        """,
        [partition, alias.subject, alias.account, alias.recorded_at, alias.recorded_by],
    )


async def delete_alias(connection: Connection, *, partition: int, subject: str) -> bool:
    """Forget an alias; whether there was one. The caller holds the partition's head."""
    cursor = await connection.execute("DELETE FROM aliases WHERE partition = %s AND subject = %s", [partition, subject])
    return cursor.rowcount == 1


async def find_pending_aliases(connection: Connection, partitions: Collection[int]) -> list[Subject]:
    """Aliases that use may have waited for that is not on its way yet."""
    cursor = await connection.execute(
        "SELECT partition, subject FROM aliases WHERE pending AND partition = ANY(%s) ORDER BY partition, subject",
        [sorted(partitions)],
    )
    return [(partition, subject) for partition, subject in await cursor.fetchall()]


async def settle_alias(connection: Connection, *, partition: int, subject: str) -> None:
    """Note that nothing waits for an alias any more, and nothing ever will. The caller holds the partition's head."""
    await connection.execute(
        "UPDATE aliases SET pending = false WHERE partition = %s AND subject = %s", [partition, subject]
    )
