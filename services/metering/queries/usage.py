"""What accounts used: sums by group, window and account, calls with their latencies, single uses. Exact, and paged.

Tokens are those of model calls; what other events hold is their meters'. Amounts are what was charged, as numeric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, Literal

from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow
from pydantic import AwareDatetime, BaseModel

from contracts.partition import partition_of
from contracts.usage import MODEL_USED
from services.metering.queries.reading import APART, snapshot

# Of one account, in its summary: those with the most events.
FEATURES_MAX: Final = 50

PERCENTILES: Final = (50, 90, 95, 99)

Connection = AsyncConnection[TupleRow]

Group = Literal[
    "model",
    "day",
    "provider",
    "account",
    "month",
    "type",
    "source",
    "feature",
    "endpoint",
    "method",
    "status",
    "own_key",
]

# What a service says of a call stands in a model call's attributes, and in the data of other events as it likes.
_ATTRIBUTE: Final = "coalesce(data #>> '{{attributes,{0}}}', data ->> '{0}', '')"
_GROUPS: Final[Mapping[Group, str]] = {
    "day": "to_char(occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    "month": "to_char(occurred_at AT TIME ZONE 'UTC', 'YYYY-MM')",
    "model": "coalesce(data ->> 'model', '')",
    "provider": "coalesce(data ->> 'provider', '')",
    "account": "account",
    "type": "type",
    "source": "source",
    "feature": "coalesce(data ->> 'feature', '')",
    "own_key": "coalesce(data ->> 'own_key', 'false')",
    "endpoint": _ATTRIBUTE.format("endpoint"),
    "method": _ATTRIBUTE.format("method"),
    "status": _ATTRIBUTE.format("status"),
}
GROUPS: Final[tuple[Group, ...]] = tuple(_GROUPS)

# Of what stands there only a number is a latency.
_LATENCY_NODE: Final = "coalesce(data #> '{attributes,latency_ms}', data -> 'latency_ms')"
_LATENCY: Final = "CASE jsonb_typeof(node) WHEN 'number' THEN node::numeric END"


class Sums(BaseModel):
    """Use, summed. `amounts` are decimal strings by unit: those of the `charged_events`; the others wait.

    `accounts` is how many different ones used something.
    """

    events: int
    accounts: int
    input_tokens: int
    output_tokens: int
    own_key_events: int
    charged_events: int
    amounts: Mapping[str, str]


class UsageRow(Sums):
    """The use of one group. The members that were grouped by are set."""

    day: str | None = None
    month: str | None = None
    model: str | None = None
    provider: str | None = None
    account: str | None = None
    type: str | None = None
    source: str | None = None
    feature: str | None = None
    own_key: str | None = None
    endpoint: str | None = None
    method: str | None = None
    status: str | None = None


class WindowRow(Sums):
    """The use of one window of time, which may be none."""

    window_start: AwareDatetime
    window_end: AwareDatetime


class SummaryRow(Sums):
    """An account's month. `features` are events by the feature they were for, at most 50, empty for those of none.

    `failed_events` have a status of 400 or more; the average is of those that say how long they took, in milliseconds.
    """

    account: str
    month: str
    failed_events: int
    features: Mapping[str, int]
    latency_ms_average: str | None


class Latencies(BaseModel):
    """How long calls took, in milliseconds, of those that say so. Percentiles are values that occurred."""

    calls: int
    average: str
    min: str
    p50: str
    p90: str
    p95: str
    p99: str
    max: str


class CallsRow(BaseModel):
    """The calls of one group. The members that were grouped by are set; empty: the events do not say it."""

    endpoint: str | None = None
    method: str | None = None
    status: str | None = None
    model: str | None = None
    provider: str | None = None
    account: str | None = None
    day: str | None = None
    feature: str | None = None
    calls: int
    failed_calls: int
    latency_ms: Latencies | None


class UseRow(BaseModel):
    """One use as it is logged. `subject` is whom it was reported of, where that is not the account."""

    id: str
    source: str
    type: str
    account: str
    subject: str | None
    occurred_at: AwareDatetime
    recorded_at: AwareDatetime
    data: Any
    price_version: str | None
    amounts: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Whose use, from when until before when. `account` None: everybody's. `tree`: also of all accounts below."""

    account: str | None
    since: datetime
    until: datetime
    tree: bool = False


async def usage_after(
    connection: Connection, selection: Selection, groups: Sequence[Group], place: Sequence[str] | None, *, limit: int
) -> list[UsageRow]:
    """Use by groups, in their order, after a place: one value per group."""
    keys = [sql.SQL(_GROUPS[name]) for name in groups] or [sql.SQL("''")]
    async with snapshot(connection):
        rows = await _summed(connection, selection, keys, place=place, limit=limit)
    return [UsageRow(**dict(zip(groups, key, strict=False)), **found) for key, found in rows]


async def usage_by_window(connection: Connection, selection: Selection, bounds: Sequence[datetime]) -> list[WindowRow]:
    """Use by windows that tile the selection, the latest first. A window without use has a row of zeros."""
    bucket = sql.SQL("lpad(width_bucket(occurred_at, {}::timestamptz[])::text, 8, '0')").format(
        sql.Placeholder("bounds")
    )
    async with snapshot(connection):
        rows = await _summed(
            connection, selection, [bucket], place=None, limit=len(bounds), parameters={"bounds": list(bounds)}
        )
    found = {int(key): sums for (key,), sums in rows}
    nothing: dict[str, Any] = {**dict.fromkeys(Sums.model_fields, 0), "amounts": {}}
    return [
        WindowRow(window_start=bounds[number - 1], window_end=bounds[number], **found.get(number, nothing))
        for number in range(len(bounds) - 1, 0, -1)
    ]


async def summaries_after(
    connection: Connection, selection: Selection, place: Sequence[str] | None, *, month: str, limit: int
) -> list[SummaryRow]:
    """Accounts with use in the selection, which is a month, in order, after a place: an account."""
    async with snapshot(connection):
        rows = await _summed(connection, selection, [sql.SQL("account")], place=place, limit=limit)
        details = await _details(connection, selection, [account for (account,), _ in rows])
    return [
        SummaryRow(
            account=account,
            month=month,
            failed_events=details[account][0],
            latency_ms_average=_rounded(details[account][1]),
            features=details[account][2],
            **found,
        )
        for (account,), found in rows
    ]


async def calls_after(
    connection: Connection, selection: Selection, groups: Sequence[Group], place: Sequence[str] | None, *, limit: int
) -> list[CallsRow]:
    """Calls with their latencies by groups, in their order, after a place: one value per group."""
    parameters, condition = _condition(selection)
    keys = [sql.SQL(_GROUPS[name]) for name in groups] or [sql.SQL("''")]
    names = _names(keys)
    statement = sql.SQL(_CALLS).format(
        selected=_selected(keys),
        node=sql.SQL(_LATENCY_NODE),
        status=sql.SQL(_GROUPS["status"]),
        condition=condition,
        keys=names,
        after=_after(names, place),
    )
    shares = [Decimal(percentile) / 100 for percentile in PERCENTILES]
    async with snapshot(connection):
        cursor = await connection.execute(
            statement, {**parameters, "place": list(place or ()), "limit": limit, "shares": shares}
        )
        rows = await cursor.fetchall()
    return [
        CallsRow(
            **dict(zip(groups, key, strict=False)),
            calls=calls,
            failed_calls=failed,
            latency_ms=None if not timed else _latencies(timed, average, least, shared, most),
        )
        for key, calls, failed, timed, average, least, shared, most in rows
    ]


async def uses_before(
    connection: Connection, selection: Selection, place: Sequence[str] | None, *, limit: int
) -> list[UseRow]:
    """Single uses, the latest first, before a place: time, source, id."""
    parameters, condition = _condition(selection)
    statement = sql.SQL(_USES).format(
        condition=condition,
        before=sql.SQL(
            "AND (occurred_at, source, event_id) < (%(at)s::timestamptz, %(source)s::text, %(id)s::text)"
            if place
            else ""
        ),
    )
    at, source, event_id = place or (None, None, None)
    cursor = await connection.execute(
        statement, {**parameters, "at": at, "source": source, "id": event_id, "limit": limit}
    )
    return [
        UseRow(
            id=event_id,
            source=source,
            type=kind,
            account=account,
            subject=subject,
            occurred_at=occurred_at,
            recorded_at=recorded_at,
            data=data,
            price_version=price_version,
            amounts={each["unit"]: each["amount"] for each in amounts or ()},
        )
        for event_id, source, kind, account, subject, occurred_at, recorded_at, data, price_version, amounts in (
            await cursor.fetchall()
        )
    ]


async def _details(
    connection: Connection, selection: Selection, accounts: Sequence[str]
) -> dict[str, tuple[int, Decimal | None, Mapping[str, int]]]:
    """By account: how many calls failed, what latencies are on average, events by feature."""
    parameters, condition = _condition(selection)
    statement = sql.SQL(_DETAILS).format(
        node=sql.SQL(_LATENCY_NODE),
        status=sql.SQL(_GROUPS["status"]),
        feature=sql.SQL(_GROUPS["feature"]),
        condition=condition,
        features_max=sql.Literal(FEATURES_MAX),
    )
    cursor = await connection.execute(statement, {**parameters, "accounts": list(accounts)})
    return {account: (failed, latency, features) for account, failed, latency, features in await cursor.fetchall()}


async def _summed(
    connection: Connection,
    selection: Selection,
    keys: Sequence[sql.Composable],
    *,
    place: Sequence[str] | None,
    limit: int,
    parameters: Mapping[str, object] | None = None,
) -> list[tuple[list[str], dict[str, Any]]]:
    """Keys, and the members of Sums. To be called in a snapshot: it asks twice."""
    given, condition = _condition(selection)
    names = _names(keys)
    asked = {**given, **(parameters or {}), "model_used": MODEL_USED, "place": list(place or ()), "limit": limit}
    parts = {"selected": _selected(keys), "condition": condition, "keys": names}
    cursor = await connection.execute(sql.SQL(_TOTALS).format(after=_after(names, place), **parts), asked)
    totals = await cursor.fetchall()
    if not totals:
        return []
    # Of what is on the page alone: to read amounts out of JSON is most of the work.
    shown = sql.SQL("{} ARRAY[{}] <= %(last)s::text[]").format(
        sql.SQL("{} AND").format(_after(names, place)) if place else sql.SQL("WHERE"), names
    )
    cursor = await connection.execute(sql.SQL(_AMOUNTS).format(shown=shown, **parts), {**asked, "last": totals[-1][0]})
    amounts: dict[tuple[str, ...], dict[str, str]] = {}
    for key, unit, amount in sorted(await cursor.fetchall()):
        amounts.setdefault(tuple(key), {})[unit] = _plain(amount)
    members = [name for name in Sums.model_fields if name != "amounts"]
    return [
        (key, {**dict(zip(members, sums, strict=True)), "amounts": amounts.get(tuple(key), {})})
        for key, *sums in totals
    ]


# Tokens are summed as what they are, integers; amounts as numeric, which knows no rounding in sums. Each account is
# summed up first, by hashing, and then counted: to sort what was used would take far longer.
_TOTALS: Final = f"""
SELECT ARRAY[{{keys}}] AS key, sum(events)::bigint AS events, count(*) AS accounts,
       coalesce(sum(input_tokens), 0)::bigint AS input_tokens,
       coalesce(sum(output_tokens), 0)::bigint AS output_tokens,
       sum(own_key_events)::bigint AS own_key_events, sum(charged_events)::bigint AS charged_events
FROM (
    SELECT {{keys}}, used_by, count(*) AS events, sum(input_tokens) AS input_tokens,
           sum(output_tokens) AS output_tokens, count(*) FILTER (WHERE own_key) AS own_key_events,
           count(*) FILTER (WHERE charged) AS charged_events
    FROM (
        SELECT {{selected}}, account AS used_by, amounts IS NOT NULL AS charged,
               CASE WHEN type = %(model_used)s THEN (data ->> 'input_tokens')::bigint END AS input_tokens,
               CASE WHEN type = %(model_used)s THEN (data ->> 'output_tokens')::bigint END AS output_tokens,
               type = %(model_used)s AND (data ->> 'own_key') = 'true' AS own_key
        FROM usage_log WHERE {{condition}} {APART}
    ) AS used {{after}} GROUP BY {{keys}}, used_by
) AS of_accounts GROUP BY {{keys}} ORDER BY 1 LIMIT %(limit)s
"""
_AMOUNTS: Final = f"""
SELECT ARRAY[{{keys}}] AS key, unit, sum(amount)::text
FROM (
    SELECT {{selected}}, amounts FROM usage_log WHERE amounts IS NOT NULL AND {{condition}} {APART}
) AS used CROSS JOIN LATERAL jsonb_to_recordset(amounts) AS each (unit text, amount numeric)
{{shown}} GROUP BY {{keys}}, unit
"""

_FAILED: Final = "status ~ '^[0-9]{{1,9}}$' AND status::bigint >= 400"

_DETAILS: Final = f"""
WITH used AS MATERIALIZED (
    SELECT account, status, feature, {_LATENCY} AS latency
    FROM (
        SELECT account, {{status}} AS status, {{feature}} AS feature, {{node}} AS node
        FROM usage_log WHERE {{condition}} AND account = ANY(%(accounts)s) {APART}
    ) AS read
), features AS (
    SELECT account, feature, count(*) AS events,
           row_number() OVER (PARTITION BY account ORDER BY count(*) DESC, feature) AS place
    FROM used GROUP BY account, feature
)
SELECT account, count(*) FILTER (WHERE {_FAILED}), avg(latency),
       (SELECT jsonb_object_agg(features.feature, features.events) FROM features
        WHERE features.account = used.account AND place <= {{features_max}})
FROM used GROUP BY account
"""

_CALLS: Final = f"""
WITH used AS (
    SELECT {{keys}}, status, {_LATENCY} AS latency
    FROM (
        SELECT {{selected}}, {{status}} AS status, {{node}} AS node FROM usage_log WHERE {{condition}} {APART}
    ) AS read {APART}
)
SELECT ARRAY[{{keys}}] AS key, count(*), count(*) FILTER (WHERE {_FAILED}), count(latency), avg(latency), min(latency),
       percentile_disc(%(shares)s::float8[]) WITHIN GROUP (ORDER BY latency), max(latency)
FROM used {{after}} GROUP BY {{keys}} ORDER BY 1 LIMIT %(limit)s
"""

_USES: Final = """
SELECT event_id, source, type, account, subject, occurred_at, recorded_at, data, price_version, amounts
FROM usage_log WHERE {condition} {before}
ORDER BY occurred_at DESC, source DESC, event_id DESC LIMIT %(limit)s
"""


def _condition(selection: Selection) -> tuple[dict[str, object], sql.Composable]:
    parameters: dict[str, object] = {"since": selection.since, "until": selection.until}
    # Of the versions of a use one counts, or none.
    times = sql.SQL("occurred_at >= %(since)s AND occurred_at < %(until)s AND NOT superseded")
    if selection.account is None:
        return parameters, times
    parameters |= {"partition": partition_of(selection.account), "account": selection.account}
    below = sql.SQL("OR starts_with(account, %(account)s || '/')" if selection.tree else "")
    return parameters, sql.SQL("partition = %(partition)s AND {} AND (account = %(account)s {})").format(times, below)


def _selected(keys: Sequence[sql.Composable]) -> sql.Composable:
    # Every group sorts by its bytes, so that no locale of a server tells another order than the place's.
    return sql.SQL(", ").join(
        sql.SQL('{} COLLATE "C" AS {}').format(key, sql.Identifier(f"key_{number}")) for number, key in enumerate(keys)
    )


def _names(keys: Sequence[sql.Composable]) -> sql.Composable:
    return sql.SQL(", ").join(sql.Identifier(f"key_{number}") for number in range(len(keys)))


def _after(names: sql.Composable, place: Sequence[str] | None) -> sql.Composable:
    return sql.SQL("WHERE ARRAY[{}] > %(place)s::text[]").format(names) if place else sql.SQL("")


def _latencies(calls: int, average: Decimal, least: Decimal, shared: Sequence[Decimal], most: Decimal) -> Latencies:
    percentiles = {f"p{share}": _plain(f"{value:f}") for share, value in zip(PERCENTILES, shared, strict=True)}
    return Latencies(
        calls=calls,
        average=_rounded(average) or "0",
        min=_plain(f"{least:f}"),
        max=_plain(f"{most:f}"),
        **percentiles,
    )


def _rounded(average: Decimal | None) -> str | None:
    return None if average is None else _plain(f"{average:.3f}")


def _plain(amount: str) -> str:
    """A decimal without zeros that say nothing: Postgres keeps those of the addend with the most decimals."""
    return amount.rstrip("0").rstrip(".") if "." in amount else amount
