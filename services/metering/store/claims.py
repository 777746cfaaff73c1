"""`seen`: every key that was ever claimed, with the hash of what was said under it. It is never emptied."""

from collections.abc import Collection, Sequence

from psycopg.errors import UniqueViolation

from services.kit.database import copy_value
from services.metering.domain.usage import Key, Usage
from services.metering.store.executing import Connection, time_text


async def claim(connection: Connection, firsts: Sequence[Usage]) -> dict[Key, bytes]:
    """Claim the keys of usages that are sorted by key; of those claimed before, the body hash.

    The caller holds their partitions' heads: nobody else claims keys there meanwhile.
    """
    await connection.execute("SAVEPOINT claims")
    try:
        await _copy_claims(connection, firsts)
    except UniqueViolation:
        await connection.execute("ROLLBACK TO SAVEPOINT claims")
    else:
        # Mostly all are new.
        return {}
    cursor = await connection.execute(
        """
        SELECT partition, source, event_id, body_hash FROM seen
        JOIN unnest(%s::smallint[], %s::text[], %s::text[]) AS asked (partition, source, event_id)
             USING (partition, source, event_id)
        """,
        [list(column) for column in zip(*(usage.key for usage in firsts), strict=True)],
    )
    known = {
        (partition, source, event_id): body_hash for partition, source, event_id, body_hash in await cursor.fetchall()
    }
    if new := [usage for usage in firsts if usage.key not in known]:
        await _copy_claims(connection, new)
    return known


async def _copy_claims(connection: Connection, firsts: Sequence[Usage]) -> None:
    rows = [
        f"{usage.partition}\t{copy_value(usage.source)}\t{copy_value(usage.event_id)}"
        f"\t\\\\x{usage.body_hash.hex()}\t{time_text(usage.occurred_at)}\n"
        for usage in firsts
    ]
    async with (
        connection.cursor() as cursor,
        cursor.copy("COPY seen (partition, source, event_id, body_hash, occurred_at) FROM STDIN") as copy,
    ):
        await copy.write("".join(rows))


async def find_seen(connection: Connection, keys: Collection[Key]) -> set[Key]:
    """Which of the keys were ever claimed."""
    cursor = await connection.execute(
        """
        SELECT partition, source, event_id FROM seen
        JOIN unnest(%s::smallint[], %s::text[], %s::text[]) AS asked (partition, source, event_id)
             USING (partition, source, event_id)
        """,
        [list(column) for column in zip(*keys, strict=True)] or [[], [], []],
    )
    return {(partition, source, event_id) for partition, source, event_id in await cursor.fetchall()}
