"""Where partitions stand. Whoever holds a head is alone in logging, numbering and counting there."""

from collections.abc import Collection, Mapping

from services.metering.domain.charging import Head
from services.metering.store.executing import Connection


async def lock_heads(connection: Connection, partitions: Collection[int]) -> dict[int, Head]:
    """Lock partitions until the end of the transaction, in order."""
    cursor = await connection.execute(
        """
        SELECT partition, outbox_number, recorded_at FROM heads
        WHERE partition = ANY(%s) ORDER BY partition FOR NO KEY UPDATE
        """,
        [list(partitions)],
    )
    return {
        partition: Head(outbox_number=number, recorded_at=recorded_at)
        for partition, number, recorded_at in await cursor.fetchall()
    }


async def move_heads(connection: Connection, heads: Mapping[int, Head]) -> None:
    """Write where locked partitions stand now."""
    await connection.execute(
        """
        UPDATE heads SET outbox_number = moved.outbox_number, recorded_at = moved.recorded_at
        FROM unnest(%s::smallint[], %s::bigint[], %s::timestamptz[]) AS moved (partition, outbox_number, recorded_at)
        WHERE heads.partition = moved.partition
        """,
        [
            list(heads),
            [head.outbox_number for head in heads.values()],
            [head.recorded_at for head in heads.values()],
        ],
    )
