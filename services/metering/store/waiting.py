"""Use that is set aside, and what it waits for: an account, a price, or somebody to say whose it is."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import class_row

from services.metering.domain.charging import Reason, SetAside
from services.metering.store.executing import Connection
from services.metering.store.log import LoggedUsage


@dataclass(frozen=True, slots=True)
class TakenUsage:
    """Use that does not wait for an alias any more. What was logged has `data` and `context`, the rest its `body`."""

    source: str
    event_id: str
    type: str | None
    occurred_at: datetime
    body_hash: bytes
    body: bytes | None
    data: str | None
    context: str | None


async def set_aside(connection: Connection, found: Sequence[SetAside], *, recorded_at: Mapping[int, datetime]) -> None:
    """Note what use waits for; of use that is unmapped, the body."""
    if not found:
        return
    rows = sorted(found, key=lambda each: each.usage.key)
    unmapped = [each.reason == "unmapped" for each in rows]
    await connection.execute(
        """
        INSERT INTO set_aside (partition, source, event_id, account, occurred_at, reason, key, recorded_at, body)
        SELECT * FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::text[], %s::timestamptz[], %s::text[],
                             %s::text[], %s::timestamptz[], %s::bytea[])
        """,
        [
            [each.usage.partition for each in rows],
            [each.usage.source for each in rows],
            [each.usage.event_id for each in rows],
            [None if is_unmapped else each.usage.account for each, is_unmapped in zip(rows, unmapped, strict=True)],
            [each.usage.occurred_at for each in rows],
            [each.reason for each in rows],
            [each.key for each in rows],
            [recorded_at[each.usage.partition] for each in rows],
            [each.usage.body if is_unmapped else None for each, is_unmapped in zip(rows, unmapped, strict=True)],
        ],
    )


async def find_unattributed(
    connection: Connection, *, partition: int, account: str, is_alias: bool, limit: int
) -> list[LoggedUsage]:
    """Use that waits for an account to be opened. The caller holds the partition's head.

    `is_alias`: only what other names of the account brought here.
    """
    brought = "JOIN usage_log AS l USING (partition, occurred_at, source, event_id)" if is_alias else ""
    other = "AND l.subject IS NOT NULL AND NOT l.superseded" if is_alias else ""
    async with connection.cursor(row_factory=class_row(LoggedUsage)) as cursor:
        await cursor.execute(
            f"""
            SELECT l.partition, l.source, l.event_id, l.account, l.type, l.occurred_at, l.data::text AS data, l.subject,
                   l.revision
            FROM (SELECT partition, source, event_id, occurred_at FROM set_aside AS s {brought}
                  WHERE partition = %(partition)s AND s.reason = 'unattributed' AND s.key = %(account)s
                    {other} LIMIT %(limit)s) AS waiting
            JOIN usage_log AS l USING (partition, occurred_at, source, event_id)
            WHERE NOT l.superseded
            """,
            {"partition": partition, "account": account, "limit": limit},
        )
        return await cursor.fetchall()


async def find_missing_prices(connection: Connection, partitions: Collection[int]) -> list[tuple[int, str]]:
    """Under which keys use waits for a price, with their partitions. Costs a look per key, however much waits."""
    cursor = await connection.execute(
        """
        SELECT asked.partition, missing.key FROM unnest(%s::smallint[]) AS asked (partition) CROSS JOIN LATERAL (
            WITH RECURSIVE keys (key) AS (
                SELECT min(key) FROM set_aside WHERE partition = asked.partition AND reason = 'unpriced'
                UNION ALL
                SELECT (SELECT min(key) FROM set_aside
                        WHERE partition = asked.partition AND reason = 'unpriced' AND key > keys.key)
                FROM keys WHERE keys.key IS NOT NULL
            )
            SELECT key FROM keys WHERE key IS NOT NULL
        ) AS missing
        ORDER BY asked.partition, missing.key
        """,
        [sorted(partitions)],
    )
    return [(partition, key) for partition, key in await cursor.fetchall()]


async def find_unpriced(
    connection: Connection,
    *,
    partition: int,
    key: str,
    times: Sequence[tuple[datetime | None, datetime | None]],
    limit: int,
) -> list[LoggedUsage]:
    """Use that waits for the price `key` and happened within one of `times`. The caller holds the partition's head."""
    async with connection.cursor(row_factory=class_row(LoggedUsage)) as cursor:
        await cursor.execute(
            """
            SELECT l.partition, l.source, l.event_id, l.account, l.type, l.occurred_at, l.data::text AS data, l.subject,
                   l.revision
            FROM (SELECT s.partition, s.source, s.event_id, s.occurred_at
                  FROM unnest(%(since)s::timestamptz[], %(until)s::timestamptz[]) AS priced (since, until)
                  JOIN set_aside AS s ON s.partition = %(partition)s AND s.reason = 'unpriced' AND s.key = %(key)s
                       AND s.occurred_at >= coalesce(since, '-infinity') AND s.occurred_at < coalesce(until, 'infinity')
                  LIMIT %(limit)s) AS waiting
            JOIN usage_log AS l USING (partition, occurred_at, source, event_id)
            WHERE NOT l.superseded
            """,
            {
                "partition": partition,
                "key": key,
                "since": [since for since, _ in times],
                "until": [until for _, until in times],
                "limit": limit,
            },
        )
        return await cursor.fetchall()


async def wait_for_price(connection: Connection, found: Sequence[SetAside]) -> None:
    """Let use that waited for something else wait for a price."""
    if not found:
        return
    await connection.execute(
        """
        UPDATE set_aside SET reason = 'unpriced', key = c.key
        FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::text[]) AS c (partition, source, event_id, key)
        WHERE (set_aside.partition, set_aside.source, set_aside.event_id) = (c.partition, c.source, c.event_id)
        """,
        [
            [each.usage.partition for each in found],
            [each.usage.source for each in found],
            [each.usage.event_id for each in found],
            [each.key for each in found],
        ],
    )


async def take_waiting(
    connection: Connection, *, partition: int, subject: str, reason: Reason, limit: int
) -> list[TakenUsage]:
    """Let use wait no longer that waits under a subject, and take it out of the log if it is logged.

    The caller holds the partition's head, and logs it anew or sends it on in the same transaction.
    """
    if reason == "unmapped":
        statement = """
            WITH waiting AS (
                DELETE FROM set_aside WHERE (partition, source, event_id) IN (
                    SELECT partition, source, event_id FROM set_aside
                    WHERE partition = %(partition)s AND reason = 'unmapped' AND key = %(subject)s LIMIT %(limit)s
                ) RETURNING source, event_id, occurred_at, body
            )
            SELECT w.source, w.event_id, NULL AS type, w.occurred_at, s.body_hash, w.body, NULL AS data, NULL AS context
            FROM waiting AS w
            JOIN seen AS s ON s.partition = %(partition)s AND (s.source, s.event_id) = (w.source, w.event_id)
            """
    else:
        # What other names brought to this account stays its own.
        statement = """
            WITH waiting AS (
                DELETE FROM set_aside WHERE (partition, source, event_id) IN (
                    SELECT partition, source, event_id
                    FROM set_aside AS s JOIN usage_log AS l USING (partition, occurred_at, source, event_id)
                    WHERE partition = %(partition)s AND s.reason = %(reason)s AND s.key = %(subject)s
                      AND l.subject IS NULL AND NOT l.superseded LIMIT %(limit)s
                ) RETURNING source, event_id, occurred_at
            )
            SELECT l.source, l.event_id, l.type, l.occurred_at, s.body_hash, NULL AS body, l.data::text AS data,
                   l.context::text AS context
            FROM (SELECT array_agg(occurred_at ORDER BY source, event_id) AS times,
                         array_agg(source ORDER BY source, event_id) AS sources,
                         array_agg(event_id ORDER BY source, event_id) AS event_ids FROM waiting) AS w
            CROSS JOIN LATERAL take_from_log(%(partition)s::smallint, w.times, w.sources, w.event_ids) AS l
            JOIN seen AS s ON s.partition = %(partition)s AND (s.source, s.event_id) = (l.source, l.event_id)
            """
    async with connection.cursor(row_factory=class_row(TakenUsage)) as cursor:
        await cursor.execute(statement, {"partition": partition, "subject": subject, "reason": reason, "limit": limit})
        return await cursor.fetchall()
