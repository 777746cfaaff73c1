"""The statements of metering, each on a whole batch. Takes a connection, and never commits.

Locks are taken in one order by everybody, so that nobody deadlocks: heads in the order of partitions, then keys of
`seen`, then the rest, each in key order.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Final

import msgspec
from psycopg import AsyncConnection
from psycopg.errors import UniqueViolation
from psycopg.rows import TupleRow, class_row

from contracts.pricing import Counter
from services.kit.database import copy_text, copy_value
from services.metering.domain.charging import Head, Reason, SetAside
from services.metering.domain.ingest import Conflict, Subject
from services.metering.domain.prices import CounterKey
from services.metering.domain.usage import Key, Reroute, Usage

Connection = AsyncConnection[TupleRow]

# Use before this is logged in the table of what no month takes.
FIRST_MONTH: Final = date(2020, 1, 1)


@dataclass(slots=True)
class Counts:
    """What became of a source's events in one partition. As a change, what waits may be negative.

    So may `new`, for what was logged or waited here and turned out to belong elsewhere.
    """

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


class ChargedLine(msgspec.Struct, frozen=True, gc=False):
    """What the log keeps of a charge. `line_items` and `amounts` are JSON."""

    usage: Usage
    price_version: str
    line_items: str
    amounts: str
    bundle_number: int
    line_number: int


@dataclass(frozen=True, slots=True)
class LoggedUsage:
    """The columns of a log row that pricing needs; `data` is JSON."""

    partition: int
    source: str
    event_id: str
    account: str
    type: str
    occurred_at: datetime
    data: str
    subject: str | None
    revision: int


COUNTERS: Final = tuple(field.name for field in fields(Counts))


# Ingest ---------------------------------------------------------------------------------------------------------------


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
        f"\t\\\\x{usage.body_hash.hex()}\t{_text(usage.occurred_at)}\n"
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


async def find_open(connection: Connection, accounts: Collection[tuple[int, str]]) -> set[str]:
    """Which of the accounts (with their partitions) are open. For good: an account is never closed."""
    cursor = await connection.execute(
        """
        SELECT account FROM directory
        JOIN unnest(%s::smallint[], %s::text[]) AS asked (partition, account) USING (partition, account)
        """,
        [[partition for partition, _ in accounts], [account for _, account in accounts]],
    )
    return {account for (account,) in await cursor.fetchall()}


async def log_usage(
    connection: Connection,
    usages: Sequence[Usage],
    *,
    recorded_at: Mapping[int, datetime],
    charged: Sequence[ChargedLine],
) -> None:
    """Add usages to the log, with their charge where they have one."""
    times = {partition: str(time) for partition, time in recorded_at.items()}
    rows = [
        (
            *_said(line.usage, times),
            line.price_version,
            line.line_items,
            line.amounts,
            str(line.bundle_number),
            str(line.line_number),
        )
        for line in charged
    ]
    if len(charged) < len(usages):
        keys = {line.usage.key for line in charged}
        rows += [(*_said(usage, times), "", "", "", "", "") for usage in usages if usage.key not in keys]
    async with (
        connection.cursor() as cursor,
        cursor.copy(
            """
            COPY usage_log (partition, occurred_at, source, event_id, account, type, recorded_at, data, context,
                            subject, price_version, line_items, amounts, bundle_number, line_number)
            FROM STDIN (NULL '')
            """
        ) as copy,
    ):
        await copy.write(copy_text(rows))


@lru_cache(maxsize=16_384)
def _text(time: datetime) -> str:
    """A time as it is copied: of a use, twice in a batch."""
    return str(time)


def _said(usage: Usage, recorded_at: Mapping[int, str]) -> tuple[str, ...]:
    return (
        str(usage.partition),
        _text(usage.occurred_at),
        usage.source,
        usage.event_id,
        usage.account,
        usage.type,
        recorded_at[usage.partition],
        usage.data,
        usage.context or "",
        "" if usage.subject == usage.account else usage.subject,
    )


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


async def count(connection: Connection, changes: Mapping[tuple[int, str], Counts]) -> None:
    """Add to the counters of (partition, source)."""
    if not changes:
        return
    keys = sorted(changes)
    columns = [[getattr(changes[key], name) for key in keys] for name in COUNTERS]
    additions = ", ".join(f"{name} = c.{name} + excluded.{name}" for name in COUNTERS)
    await connection.execute(
        f"""
        INSERT INTO ingest_counters AS c (partition, source, {", ".join(COUNTERS)})
        SELECT unnest(%s::smallint[]), unnest(%s::text[]){", unnest(%s::bigint[])" * len(COUNTERS)}
        ON CONFLICT (partition, source) DO UPDATE SET {additions}
        """,
        [[partition for partition, _ in keys], [source for _, source in keys], *columns],
    )


async def ensure_months(connection: Connection, months: Iterable[date]) -> None:
    """Make the log's tables for months, from FIRST_MONTH on. In a transaction of its own: it locks the log briefly."""
    for month in sorted(months):
        await connection.execute("SELECT ensure_usage_month(%s)", [month])


# Prices ---------------------------------------------------------------------------------------------------------------


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


# Accounts -------------------------------------------------------------------------------------------------------------


async def add_to_directory(connection: Connection, *, partition: int, account: str, opened_at: datetime) -> None:
    """Note that an account is open."""
    await connection.execute(
        "INSERT INTO directory (partition, account, opened_at) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
        [partition, account, opened_at],
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


async def log_charges(connection: Connection, lines: Sequence[ChargedLine]) -> None:
    """Enter charges into the log and let their use wait no longer."""
    if not lines:
        return
    usages = [line.usage for line in lines]
    keys = [
        [usage.partition for usage in usages],
        [usage.source for usage in usages],
        [usage.event_id for usage in usages],
    ]
    await connection.execute(
        """
        UPDATE usage_log AS l
        SET price_version = c.price_version, line_items = c.line_items::jsonb, amounts = c.amounts::jsonb,
            bundle_number = c.bundle_number, line_number = c.line_number
        FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::timestamptz[], %s::text[], %s::text[], %s::text[],
                    %s::bigint[], %s::integer[])
             AS c (partition, source, event_id, occurred_at, price_version, line_items, amounts,
                   bundle_number, line_number)
        WHERE (l.partition, l.occurred_at, l.source, l.event_id) = (c.partition, c.occurred_at, c.source, c.event_id)
          AND NOT l.superseded
        """,
        [
            *keys,
            [usage.occurred_at for usage in usages],
            [line.price_version for line in lines],
            [line.line_items for line in lines],
            [line.amounts for line in lines],
            [line.bundle_number for line in lines],
            [line.line_number for line in lines],
        ],
    )
    await connection.execute(
        """
        DELETE FROM set_aside USING unnest(%s::smallint[], %s::text[], %s::text[]) AS c (partition, source, event_id)
        WHERE (set_aside.partition, set_aside.source, set_aside.event_id) = (c.partition, c.source, c.event_id)
        """,
        keys,
    )


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


# Aliases --------------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Alias:
    """What publishers call an account."""

    subject: str
    account: str
    recorded_at: datetime
    recorded_by: str


async def find_aliases(connection: Connection, subjects: Collection[Subject]) -> dict[Subject, str]:
    """Which of the subjects are aliases, and of which accounts. The caller holds the heads of their partitions."""
    cursor = await connection.execute(
        """
        SELECT partition, subject, account FROM aliases
        JOIN unnest(%s::smallint[], %s::text[]) AS asked (partition, subject) USING (partition, subject)
        """,
        [[partition for partition, _ in subjects], [subject for _, subject in subjects]],
    )
    return {(partition, subject): account for partition, subject, account in await cursor.fetchall()}


async def find_alias(connection: Connection, *, partition: int, subject: str) -> Alias | None:
    """The alias of a subject."""
    async with connection.cursor(row_factory=class_row(Alias)) as cursor:
        await cursor.execute(
            "SELECT subject, account, recorded_at, recorded_by FROM aliases WHERE partition = %s AND subject = %s",
            [partition, subject],
        )
        return await cursor.fetchone()


async def list_aliases(connection: Connection, *, after: Subject, limit: int) -> list[Alias]:
    """Aliases after a place, in the order of partitions and subjects."""
    async with connection.cursor(row_factory=class_row(Alias)) as cursor:
        await cursor.execute(
            """
            SELECT subject, account, recorded_at, recorded_by FROM aliases
            WHERE (partition, subject) > (%s::smallint, %s::text) ORDER BY partition, subject LIMIT %s
            """,
            [*after, limit],
        )
        return await cursor.fetchall()


async def add_alias(connection: Connection, alias: Alias, *, partition: int) -> None:
    """Store an alias that is not there. The caller holds the partition's head."""
    await connection.execute(
        """
        INSERT INTO aliases (partition, subject, account, recorded_at, recorded_by, pending)
        VALUES (%s, %s, %s, %s, %s, true)
        """,
        [partition, alias.subject, alias.account, alias.recorded_at, alias.recorded_by],
    )


async def delete_alias(connection: Connection, *, partition: int, subject: str) -> bool:
    """Forget an alias; whether there was one. The caller holds the partition's head."""
    cursor = await connection.execute("DELETE FROM aliases WHERE partition = %s AND subject = %s", [partition, subject])
    return cursor.rowcount == 1


async def find_pending_aliases(connection: Connection, partitions: Collection[int]) -> list[Subject]:
    """Aliases that use may have waited for that is not on its way yet."""
    cursor = await connection.execute(
        "SELECT partition, subject FROM aliases WHERE pending AND partition = ANY(%s) ORDER BY partition, subject",
        [sorted(partitions)],
    )
    return [(partition, subject) for partition, subject in await cursor.fetchall()]


async def settle_alias(connection: Connection, *, partition: int, subject: str) -> None:
    """Note that nothing waits for an alias any more, and nothing ever will. The caller holds the partition's head."""
    await connection.execute(
        "UPDATE aliases SET pending = false WHERE partition = %s AND subject = %s", [partition, subject]
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


# Answers --------------------------------------------------------------------------------------------------------------

ANSWERS_KEPT_SECONDS: Final = 600


async def answer(connection: Connection, answers: Mapping[tuple[int, str], str], *, recorded_at: datetime) -> None:
    """Say what became of reports that somebody asks about. The first answer stands: a repeat would say otherwise."""
    keys = sorted(answers)
    await connection.execute(
        """
        INSERT INTO answers (partition, question, outcome, recorded_at)
        SELECT partition, question, outcome, %s FROM unnest(%s::smallint[], %s::text[], %s::text[])
             AS told (partition, question, outcome)
        ON CONFLICT DO NOTHING
        """,
        [
            recorded_at,
            [partition for partition, _ in keys],
            [question for _, question in keys],
            [answers[key] for key in keys],
        ],
    )


async def take_answers(connection: Connection, questions: Collection[tuple[int, str]]) -> dict[str, str]:
    """What became of those reports that have been looked at, by question. Each is told once."""
    cursor = await connection.execute(
        """
        DELETE FROM answers USING unnest(%s::smallint[], %s::text[]) AS asked (partition, question)
        WHERE (answers.partition, answers.question) = (asked.partition, asked.question)
        RETURNING answers.question, answers.outcome
        """,
        [[partition for partition, _ in questions], [question for _, question in questions]],
    )
    found: dict[str, str] = dict(await cursor.fetchall())
    return found


async def forget_answers(connection: Connection) -> None:
    """Forget what nobody fetched."""
    await connection.execute(
        "DELETE FROM answers WHERE recorded_at < clock_timestamp() - make_interval(secs => %s)",
        [ANSWERS_KEPT_SECONDS],
    )


# Counts of periods ----------------------------------------------------------------------------------------------------


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
