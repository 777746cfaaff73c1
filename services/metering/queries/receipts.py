"""What is stored of one event, by its id: what it cost, what it waits for, and whether others have its id."""

from typing import Final

from psycopg import AsyncConnection
from psycopg.rows import TupleRow, class_row

from contracts.partition import PARTITION_COUNT
from services.metering.translate.receipts import ReceiptRow

# Of one id. More than that have it only if somebody gives the same one to every event.
FOUND_MAX: Final = 100


async def find_receipts(
    connection: AsyncConnection[TupleRow], *, event_id: str, source: str | None, account: str | None
) -> list[ReceiptRow]:
    """All events with an id: of a source, of an account, if these are given. At most FOUND_MAX.

    An event is known by its partition and source, too. Those that ever reported are few, so each is looked up.
    """
    async with connection.cursor(row_factory=class_row(ReceiptRow)) as cursor:
        await cursor.execute(
            """
            SELECT s.partition, s.source, s.event_id, s.occurred_at, coalesce(l.account, w.account) AS account,
                   coalesce(l.subject, CASE WHEN w.reason = 'unmapped' THEN w.key END) AS subject,
                   l.type, coalesce(l.recorded_at, w.recorded_at) AS recorded_at, l.price_version,
                   l.line_items::text AS line_items, l.amounts::text AS amounts, l.bundle_number, l.line_number,
                   w.reason, w.key, coalesce(l.revision, w.revision) AS revision,
                   w.reason IS NULL AND coalesce(l.superseded, (
                       SELECT true FROM correction_items AS c
                       WHERE c.partition = s.partition AND c.source = s.source AND c.event_id = s.event_id
                         AND c.to_revision IS NULL AND NOT c.undone LIMIT 1
                   ), false) AS is_void,
                   (SELECT jsonb_agg(jsonb_build_object(
                        'revision', v.revision, 'price_version', v.price_version, 'amounts', v.amounts,
                        'bundle', v.bundle_number, 'line', v.line_number, 'recorded_at', v.recorded_at,
                        'superseded', v.superseded) ORDER BY v.revision)::text
                    FROM usage_log AS v
                    WHERE (v.partition, v.occurred_at, v.source, v.event_id)
                        = (s.partition, s.occurred_at, s.source, s.event_id)) AS versions,
                   (SELECT jsonb_agg(jsonb_build_object(
                        'id', c.correction, 'kind', k.kind, 'reason', k.reason, 'actor', k.actor,
                        'recorded_at', c.recorded_at, 'from_revision', c.from_revision,
                        'to_revision', c.to_revision, 'difference', c.difference, 'undone', c.undone,
                        'undone_revision', c.undone_revision) ORDER BY c.recorded_at)::text
                    FROM correction_items AS c
                    JOIN corrections AS k ON k.id = c.correction AND k.partition = ANY(%(partitions)s)
                    WHERE c.partition = s.partition AND c.source = s.source AND c.event_id = s.event_id
                   ) AS corrections,
                   (SELECT count(*) FROM conflicts AS c
                    WHERE c.partition = s.partition AND c.source = s.source AND c.event_id = s.event_id) AS conflicts
            FROM ingest_counters AS i
            CROSS JOIN LATERAL (
                SELECT partition, source, event_id, occurred_at FROM seen
                WHERE seen.partition = i.partition AND seen.source = i.source AND seen.event_id = %(event_id)s LIMIT 1
            ) AS s
            -- The version that counts is the last one, if any does.
            LEFT JOIN LATERAL (
                SELECT * FROM usage_log AS v
                WHERE (v.partition, v.occurred_at, v.source, v.event_id)
                    = (s.partition, s.occurred_at, s.source, s.event_id)
                ORDER BY v.revision DESC LIMIT 1
            ) AS l ON true
            LEFT JOIN set_aside AS w ON (w.partition, w.source, w.event_id) = (s.partition, s.source, s.event_id)
            WHERE (%(source)s::text IS NULL OR i.source = %(source)s)
              AND (%(account)s::text IS NULL OR coalesce(l.account, w.account) = %(account)s)
            ORDER BY s.source, s.partition LIMIT %(limit)s
            """,
            {
                "event_id": event_id,
                "source": source,
                "account": account,
                "limit": FOUND_MAX,
                # Where the record of a correction is says its id; to ask each is to find it by its key.
                "partitions": list(range(PARTITION_COUNT)),
            },
        )
        found = await cursor.fetchall()
    # What was sent on is where it went to.
    return [row for row in found if row.is_here] or found
