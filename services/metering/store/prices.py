"""The price versions. None is ever changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import class_row

from services.metering.store.executing import Connection


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A price version; `models` and `further` are JSON."""

    id: str
    effective_at: datetime
    models: str
    further: str | None


async def find_price_versions(connection: Connection, *, known: Sequence[str]) -> list[StoredVersion]:
    """All price versions but those known already: they never change."""
    async with connection.cursor(row_factory=class_row(StoredVersion)) as cursor:
        await cursor.execute(
            """
            SELECT id, effective_at, models::text AS models, further::text AS further
            FROM price_versions WHERE id <> ALL(%s)
            """,
            [list(known)],
        )
        return await cursor.fetchall()


async def add_price_version(
    connection: Connection,
    *,
    id: str,
    effective_at: datetime,
    recorded_at: datetime,
    source: str,
    models: str,
    further: str | None = None,
) -> bool:
    """Store a version; False if its id or its time is taken. Waits for another transaction that is taking one."""
    cursor = await connection.execute(
        """
        INSERT INTO price_versions (id, effective_at, recorded_at, source, models, further)
        VALUES (%s, %s, %s, %s, %s::jsonb, %s::jsonb) ON CONFLICT DO NOTHING
        """,
        [id, effective_at, recorded_at, source, models, further],
    )
    return cursor.rowcount == 1
