"""Other contents under a key that is taken."""

from collections.abc import Sequence
from datetime import datetime

from services.metering.domain.ingest import Conflict
from services.metering.domain.usage import Key
from services.metering.store.executing import Connection


async def add_conflicts(
    connection: Connection, conflicts: Sequence[Conflict], *, received_at: datetime
) -> list[Conflict]:
    """Keep conflicting reports apart, each content once, and count how often it came; those that are new."""
    if not conflicts:
        return []
    times: dict[tuple[Key, bytes], int] = {}
    first: dict[tuple[Key, bytes], Conflict] = {}
    for conflict in conflicts:
        key = (conflict.usage.key, conflict.usage.body_hash)
        times[key] = times.get(key, 0) + 1
        first.setdefault(key, conflict)
    rows = [first[key] for key in sorted(first)]
    cursor = await connection.execute(
        """
        INSERT INTO conflicts AS c (partition, source, event_id, body_hash, first_body_hash, account, body,
                                    received_at, times)
        SELECT partition, source, event_id, body_hash, first_body_hash, account, body, %s, times
        FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::bytea[], %s::bytea[], %s::text[], %s::bytea[],
                    %s::bigint[])
             AS found (partition, source, event_id, body_hash, first_body_hash, account, body, times)
        ORDER BY partition, source, event_id, body_hash
        ON CONFLICT (partition, source, event_id, body_hash) DO UPDATE SET times = c.times + excluded.times
        RETURNING c.partition, c.source, c.event_id, c.body_hash, c.times
        """,
        [
            received_at,
            [each.usage.partition for each in rows],
            [each.usage.source for each in rows],
            [each.usage.event_id for each in rows],
            [each.usage.body_hash for each in rows],
            [each.first_body_hash for each in rows],
            [each.usage.account or each.usage.subject for each in rows],
            [each.usage.body for each in rows],
            [times[each.usage.key, each.usage.body_hash] for each in rows],
        ],
    )
    new = {
        ((partition, source, event_id), body_hash)
        for partition, source, event_id, body_hash, count in await cursor.fetchall()
        if count == times[(partition, source, event_id), body_hash]
    }
    return [first[key] for key in sorted(new)]
