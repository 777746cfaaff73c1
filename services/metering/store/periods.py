"""What was counted of a period under own prices, and what is carried of it."""

from collections.abc import Collection, Mapping
from datetime import UTC

from contracts.pricing import Counter
from services.metering.domain.prices import CounterKey
from services.metering.store.executing import Connection


async def find_counters(connection: Connection, keys: Collection[CounterKey]) -> dict[CounterKey, Counter]:
    """What was counted under own prices. The caller holds the partitions' heads: nobody else counts meanwhile."""
    if not keys:
        return {}
    cursor = await connection.execute(
        """
        SELECT partition, account, price_id, period, quantity, credit FROM price_counters
        JOIN unnest(%s::smallint[], %s::text[], %s::text[], %s::timestamptz[])
             AS asked (partition, account, price_id, period) USING (partition, account, price_id, period)
        """,
        [list(column) for column in zip(*keys, strict=True)],
    )
    return {
        (partition, account, price_id, period.astimezone(UTC)): Counter(quantity=quantity, credit=credit)
        for partition, account, price_id, period, quantity, credit in await cursor.fetchall()
    }


async def find_credit(
    connection: Connection, partitions: Collection[int], *, without: Collection[CounterKey]
) -> CounterKey | None:
    """A counter that carries what is to be given back, and is none of those."""
    cursor = await connection.execute(
        """
        SELECT partition, account, price_id, period FROM price_counters
        WHERE credit < 0 AND partition = ANY(%s) ORDER BY partition, account, price_id, period LIMIT %s
        """,
        [list(partitions), len(without) + 1],
    )
    found = [(partition, account, id, at.astimezone(UTC)) for partition, account, id, at in await cursor.fetchall()]
    return next((key for key in found if key not in without), None)


async def write_counters(connection: Connection, counters: Mapping[CounterKey, Counter]) -> None:
    """Write where counters stand now."""
    if not counters:
        return
    keys = sorted(counters)
    await connection.execute(
        """
        INSERT INTO price_counters (partition, account, price_id, period, quantity, credit)
        SELECT unnest(%s::smallint[]), unnest(%s::text[]), unnest(%s::text[]), unnest(%s::timestamptz[]),
               unnest(%s::numeric[]), unnest(%s::bigint[])
        ON CONFLICT (partition, account, price_id, period)
        DO UPDATE SET quantity = excluded.quantity, credit = excluded.credit
        """,
        [
            *(list(column) for column in zip(*keys, strict=True)),
            [counters[key].quantity for key in keys],
            [counters[key].credit for key in keys],
        ],
    )
