"""What metering answers about its work, straight from the tables: exact at any moment. The models are those of HTTP."""

from typing import Literal

from psycopg import AsyncConnection
from psycopg.rows import TupleRow, class_row
from pydantic import AwareDatetime, BaseModel


class SourceCounters(BaseModel):
    """What became of a source's events. new = charged + unattributed + unpriced + unmapped + voided.

    Those in the middle wait now; what was `voided` by a correction counts for nothing.

    What was `rerouted` came again, on the subject of the partition it belongs to.
    """

    source: str
    new: int = 0
    duplicate: int = 0
    conflicting: int = 0
    dead: int = 0
    unattributed: int = 0
    unpriced: int = 0
    charged: int = 0
    unmapped: int = 0
    rerouted: int = 0
    voided: int = 0


class ConflictingReport(BaseModel):
    """A report under an id that was used before for other content: kept apart, not charged. It came `times` times."""

    partition: int
    source: str
    id: str
    account: str
    received_at: AwareDatetime
    times: int
    body_sha256: str
    first_body_sha256: str
    body: str


class WaitingUse(BaseModel):
    """Use that is not charged yet. `key` is the account, the price, or the subject's alias that it waits for.

    Of use that is unmapped the account is not known.
    """

    partition: int
    source: str
    id: str
    account: str | None
    occurred_at: AwareDatetime
    recorded_at: AwareDatetime
    reason: Literal["unattributed", "unpriced", "unmapped"]
    key: str


class ListedVersion(BaseModel):
    """A price version without its prices. `source` is `catalogue`, or the principal who posted it."""

    id: str
    effective_at: AwareDatetime
    recorded_at: AwareDatetime
    source: str
    models: int


async def listed_versions(connection: AsyncConnection[TupleRow]) -> list[ListedVersion]:
    """All price versions, in the order in which they take effect."""
    async with connection.cursor(row_factory=class_row(ListedVersion)) as cursor:
        await cursor.execute(
            """
            SELECT id, effective_at, recorded_at, source, jsonb_array_length(models) AS models
            FROM price_versions ORDER BY effective_at
            """
        )
        return await cursor.fetchall()


async def ingest_counters(connection: AsyncConnection[TupleRow], *, source: str | None) -> list[SourceCounters]:
    """The counters of all sources that ever reported, or of one."""
    async with connection.cursor(row_factory=class_row(SourceCounters)) as cursor:
        await cursor.execute(
            """
            SELECT source, sum(new)::bigint AS new, sum(duplicate)::bigint AS duplicate,
                   sum(conflicting)::bigint AS conflicting, sum(dead)::bigint AS dead,
                   sum(unattributed)::bigint AS unattributed, sum(unpriced)::bigint AS unpriced,
                   sum(charged)::bigint AS charged, sum(unmapped)::bigint AS unmapped,
                   sum(rerouted)::bigint AS rerouted, sum(voided)::bigint AS voided
            FROM ingest_counters WHERE %(source)s::text IS NULL OR source = %(source)s
            GROUP BY source ORDER BY source
            """,
            {"source": source},
        )
        return await cursor.fetchall()


async def conflicts_after(
    connection: AsyncConnection[TupleRow],
    place: tuple[int, str, str, str],
    *,
    source: str | None,
    limit: int,
) -> list[ConflictingReport]:
    """Conflicts in key order, after a place: partition, source, id, body hash in hexadecimal."""
    async with connection.cursor(row_factory=class_row(ConflictingReport)) as cursor:
        await cursor.execute(
            """
            SELECT partition, source, event_id AS id, account, received_at, times,
                   encode(body_hash, 'hex') AS body_sha256, encode(first_body_hash, 'hex') AS first_body_sha256,
                   convert_from(body, 'UTF8') AS body
            FROM conflicts
            WHERE (partition, source, event_id, body_hash) > (%s::smallint, %s::text, %s::text, decode(%s, 'hex'))
              AND (%s::text IS NULL OR source = %s)
            ORDER BY partition, source, event_id, body_hash LIMIT %s
            """,
            [*place, source, source, limit],
        )
        return await cursor.fetchall()


async def set_aside_after(
    connection: AsyncConnection[TupleRow],
    place: tuple[int, str, str],
    *,
    reason: str | None,
    key: str | None,
    limit: int,
) -> list[WaitingUse]:
    """What is set aside in key order, after a place: partition, source, id."""
    async with connection.cursor(row_factory=class_row(WaitingUse)) as cursor:
        await cursor.execute(
            """
            SELECT partition, source, event_id AS id, account, occurred_at, recorded_at, reason, key
            FROM set_aside
            WHERE (partition, source, event_id) > (%s::smallint, %s::text, %s::text)
              AND (%s::text IS NULL OR reason = %s) AND (%s::text IS NULL OR key = %s)
            ORDER BY partition, source, event_id LIMIT %s
            """,
            [*place, reason, reason, key, key, limit],
        )
        return await cursor.fetchall()
