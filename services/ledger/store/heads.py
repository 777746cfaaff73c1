"""Heads: where partitions stand, and who may move them."""

from collections.abc import Iterable, Mapping
from typing import Final

from psycopg.rows import TupleRow

from services.kit.arrays import array, columns
from services.ledger.domain.draft import Head
from services.ledger.store.executing import Connection, execute


async def take_heads(connection: Connection, epochs: Mapping[int, int]) -> dict[int, Head]:
    """Raise heads to the epochs of leases just won, and read them. One that has a higher epoch already is left out."""
    await connection.execute(
        """
        WITH mine AS (
            SELECT h.partition, m.epoch FROM heads h
            JOIN unnest(%s::smallint[], %s::bigint[]) AS m (partition, epoch) USING (partition)
            WHERE h.epoch < m.epoch ORDER BY h.partition FOR NO KEY UPDATE OF h
        )
        UPDATE heads h SET epoch = mine.epoch FROM mine WHERE h.partition = mine.partition
        """,
        columns(epochs.items()),
    )
    heads = await read_heads(connection, epochs)
    return {partition: head for partition, head in heads.items() if head.epoch == epochs[partition]}


async def read_heads(connection: Connection, partitions: Iterable[int]) -> dict[int, Head]:
    """Where partitions stand."""
    cursor = await execute(connection, HEADS, [array(list(partitions))])
    return heads_of(await cursor.fetchall())


HEADS: Final = b"""
SELECT partition, epoch, batch, chain_hash, recorded_at, outbox_number, charges_number
FROM heads WHERE partition = ANY ($1::smallint[])
"""


def heads_of(rows: Iterable[TupleRow]) -> dict[int, Head]:
    return {
        row[0]: Head(
            partition=row[0],
            epoch=row[1],
            batch=row[2],
            chain_hash=row[3],
            recorded_at=row[4],
            outbox_number=row[5],
            charges_number=row[6],
        )
        for row in rows
    }
