"""What belongs to another partition and is to be sent on."""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime

from psycopg.rows import class_row

from services.metering.domain.usage import Reroute
from services.metering.store.executing import Connection


async def add_reroutes(connection: Connection, found: Iterable[Reroute], *, recorded_at: datetime) -> None:
    """Note what is to be sent on. Once more changes nothing."""
    rows = sorted(found, key=lambda each: (each.partition, each.source, each.event_id, each.body_hash))
    if not rows:
        return
    await connection.execute(
        """
        INSERT INTO reroutes (partition, source, event_id, body_hash, to_partition, account, occurred_at, body,
                              recorded_at)
        SELECT partition, source, event_id, body_hash, to_partition, account, occurred_at, body, %s
        FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::bytea[], %s::smallint[], %s::text[], %s::timestamptz[],
                    %s::bytea[])
             AS found (partition, source, event_id, body_hash, to_partition, account, occurred_at, body)
        ON CONFLICT DO NOTHING
        """,
        [
            recorded_at,
            [each.partition for each in rows],
            [each.source for each in rows],
            [each.event_id for each in rows],
            [each.body_hash for each in rows],
            [each.to for each in rows],
            [each.account for each in rows],
            [each.occurred_at for each in rows],
            [each.body for each in rows],
        ],
    )


async def find_reroutes(connection: Connection, partitions: Collection[int], *, limit: int) -> list[Reroute]:
    """What is to be sent on from partitions."""
    async with connection.cursor(row_factory=class_row(Reroute)) as cursor:
        await cursor.execute(
            """
            SELECT partition, source, event_id, body_hash, to_partition AS "to", account, occurred_at, body
            FROM reroutes WHERE partition = ANY(%s) ORDER BY partition, source, event_id, body_hash LIMIT %s
            """,
            [sorted(partitions), limit],
        )
        return await cursor.fetchall()


async def delete_reroutes(connection: Connection, sent: Sequence[Reroute]) -> None:
    """Forget what the stream has by now."""
    await connection.execute(
        """
        DELETE FROM reroutes USING unnest(%s::smallint[], %s::text[], %s::text[], %s::bytea[])
            AS sent (partition, source, event_id, body_hash)
        WHERE (reroutes.partition, reroutes.source, reroutes.event_id, reroutes.body_hash)
            = (sent.partition, sent.source, sent.event_id, sent.body_hash)
        """,
        [
            [each.partition for each in sent],
            [each.source for each in sent],
            [each.event_id for each in sent],
            [each.body_hash for each in sent],
        ],
    )
