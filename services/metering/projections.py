"""What metering answers about its work, straight from the tables: exact at any moment. The models are those of HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow, class_row
from pydantic import AwareDatetime, BaseModel


class SourceCounters(BaseModel):
    """What became of a source's events. new = charged + unattributed + unpriced: the last two are what waits now."""

    source: str
    new: int = 0
    duplicate: int = 0
    conflicting: int = 0
    dead: int = 0
    unattributed: int = 0
    unpriced: int = 0
    charged: int = 0


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
    """Logged use that is not charged yet. `key` is the account, or the provider/model, that it waits for."""

    partition: int
    source: str
    id: str
    account: str
    occurred_at: AwareDatetime
    recorded_at: AwareDatetime
    reason: Literal["unattributed", "unpriced"]
    key: str


class ListedVersion(BaseModel):
    """A price version without its prices. `source` is `catalogue`, or the principal who posted it."""

    id: str
    effective_at: AwareDatetime
    recorded_at: AwareDatetime
    source: str
    models: int


Group = Literal["day", "model", "provider", "account"]

_GROUPS: Final[Mapping[str, sql.SQL]] = {
    "day": sql.SQL("to_char(occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')"),
    "model": sql.SQL("data ->> 'model'"),
    "provider": sql.SQL("data ->> 'provider'"),
    "account": sql.SQL("account"),
}


class UsageRow(BaseModel):
    """The use of one group. The members that were grouped by are set. `amounts` are decimal strings by unit.

    `charged_events` counts those whose charge is in `amounts`; the others wait for their account or their price.
    """

    day: str | None = None
    model: str | None = None
    provider: str | None = None
    account: str | None = None
    events: int
    input_tokens: int
    output_tokens: int
    own_key_events: int
    charged_events: int
    amounts: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuestion:
    """Whose use, from when until before when, by what. `tree`: also of all accounts below."""

    partition: int
    account: str
    since: datetime
    until: datetime
    group_by: Sequence[Group]
    tree: bool


async def usage_after(
    connection: AsyncConnection[TupleRow], question: UsageQuestion, place: Sequence[str] | None, *, limit: int
) -> list[UsageRow]:
    """Logged use, summed exactly, in the order of its groups, after a place: one value per group."""
    # Every group sorts by its bytes, so that no locale of a server tells another order than the place's.
    keys = [sql.SQL('{} COLLATE "C"').format(_GROUPS[name]) for name in question.group_by] or [
        sql.Composed([sql.SQL("''")])
    ]
    named = [sql.Identifier(f"key_{number}") for number in range(len(keys))]
    statement = sql.SQL(_USAGE).format(
        selected=sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(key, name) for key, name in zip(keys, named, strict=True)
        ),
        keys=sql.SQL(", ").join(named),
        below=sql.SQL("OR starts_with(account, %(account)s || '/')" if question.tree else ""),
        after=sql.SQL("WHERE ARRAY[{keys}] > %(place)s::text[]" if place else "").format(
            keys=sql.SQL(", ").join(named)
        ),
    )
    cursor = await connection.execute(
        statement,
        {
            "partition": question.partition,
            "account": question.account,
            "since": question.since,
            "until": question.until,
            "place": list(place or ()),
            "limit": limit,
        },
    )
    return [_usage_row(question.group_by, row) for row in await cursor.fetchall()]


# Tokens are summed as what they are, integers; amounts as numeric, which knows no rounding in sums.
_USAGE: Final = """
WITH used AS MATERIALIZED (
    SELECT {selected}, data, amounts FROM usage_log
    WHERE partition = %(partition)s AND occurred_at >= %(since)s AND occurred_at < %(until)s
      AND (account = %(account)s {below})
), totals AS (
    SELECT ARRAY[{keys}] AS key, count(*) AS events,
           sum((data ->> 'input_tokens')::bigint)::bigint AS input_tokens,
           sum((data ->> 'output_tokens')::bigint)::bigint AS output_tokens,
           count(*) FILTER (WHERE (data ->> 'own_key')::boolean) AS own_key_events,
           count(amounts) AS charged_events
    FROM used {after} GROUP BY {keys} ORDER BY 1 LIMIT %(limit)s
), sums AS (
    SELECT ARRAY[{keys}] AS key, each.unit, sum(each.amount) AS amount
    FROM used CROSS JOIN LATERAL jsonb_to_recordset(amounts) AS each (unit text, amount numeric)
    GROUP BY {keys}, each.unit
)
SELECT totals.*, coalesce((SELECT jsonb_object_agg(sums.unit, sums.amount::text) FROM sums
                           WHERE sums.key = totals.key), '{{}}') AS amounts
FROM totals ORDER BY key
"""


def _usage_row(groups: Sequence[str], row: TupleRow) -> UsageRow:
    key, events, input_tokens, output_tokens, own_key_events, charged_events, amounts = row
    return UsageRow(
        **dict(zip(groups, key, strict=False)),
        events=events,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        own_key_events=own_key_events,
        charged_events=charged_events,
        amounts={unit: _plain(amounts[unit]) for unit in sorted(amounts)},
    )


def _plain(amount: str) -> str:
    """A decimal without zeros that say nothing: Postgres keeps those of the addend with the most decimals."""
    return amount.rstrip("0").rstrip(".") if "." in amount else amount


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
                   sum(charged)::bigint AS charged
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
