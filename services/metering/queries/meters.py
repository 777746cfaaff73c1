"""A meter's answers, straight from the log: exact at any moment, whatever arrived in whatever order.

Counted is what is logged when the question is asked, in one snapshot, by the time it happened. Numbers are numeric all
the way; a value is a JSON number, or a string of one. An event whose value is missing or is none counts for COUNT
alone, and a group with no value at all has no row.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final, assert_never

from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow

from contracts.partition import partition_of
from services.metering.domain.meters import (
    ACCOUNT_GROUP,
    SUBJECT,
    Aggregate,
    Aggregation,
    AllOf,
    AnyOf,
    Comparison,
    Filter,
    Meter,
    MeterQuestion,
    Path,
    average,
    plain,
)
from services.metering.domain.windows import window_bounds
from services.metering.queries.reading import APART, snapshot

# A year of hours, a week of minutes.
WINDOWS_MAX: Final = 12_000
ROWS_MAX: Final = 20_000
LISTED_MAX: Final = 10_000

# Above that, a number is none: nothing that is used is counted so.
NUMBER_MAX: Final = "1e40"
NUMBER_DECIMALS_MAX: Final = 40
NUMBER_LENGTH_MAX: Final = 60

Connection = AsyncConnection[TupleRow]

_MINUTE: Final = timedelta(minutes=1)
_MICROSECOND: Final = timedelta(microseconds=1)


class TooManyRows(ValueError):
    """An answer is longer than one may be."""

    def __init__(self, rows_max: int) -> None:
        super().__init__(
            f"the answer has more than {rows_max} rows: ask for fewer groups, larger windows, or less time"
        )


async def ask_meter(connection: Connection, meter: Meter, question: MeterQuestion) -> list[Aggregate]:
    """The answer, in the order of windows and groups. TooManyWindows, TooManyRows."""
    async with snapshot(connection):
        bounds = await _bounds(connection, meter, question) if question.size is not None else None
        if question.size is not None and bounds is None:
            return []
        statement, parameters = _statement(meter, question, bounds=bounds)
        cursor = await connection.execute(statement, parameters)
        rows = await cursor.fetchall()
    if len(rows) > ROWS_MAX:
        raise TooManyRows(ROWS_MAX)
    found = []
    for bucket, first, last, total, count, *groups in rows:
        value = average(total, count) if meter.aggregation == "AVG" else Decimal(total)
        if bounds is not None:
            start, end = bounds[bucket - 1], bounds[bucket]
        else:
            start = question.since or _minute(first)
            end = question.until or _minute(last) + _MINUTE
        found.append(Aggregate(plain(value), start, end, groups))
    return found


async def list_values(
    connection: Connection, meter: Meter, group: str, *, since: datetime | None, until: datetime | None
) -> list[str]:
    """All values of a group, SUBJECT for instance, in the order of their code points. TooManyRows."""
    picked = _Picked(meter, since=since, until=until)
    statement = sql.SQL('SELECT DISTINCT {value} COLLATE "C" FROM {rows} ORDER BY 1 LIMIT {limit}').format(
        value=picked.group(group), rows=picked.rows(), limit=sql.Literal(LISTED_MAX + 1)
    )
    cursor = await connection.execute(statement, picked.parameters)
    found = [value for (value,) in await cursor.fetchall()]
    if len(found) > LISTED_MAX:
        raise TooManyRows(LISTED_MAX)
    return found


async def _bounds(connection: Connection, meter: Meter, question: MeterQuestion) -> list[datetime] | None:
    """Where windows begin and the last one ends; None: there is no event."""
    assert question.size is not None
    since, until = _later(question.since, meter.event_from), question.until
    if since is None or until is None:
        picked = _Picked.of(meter, question)
        statement = sql.SQL("SELECT min(occurred_at), max(occurred_at) FROM {rows}").format(rows=picked.rows())
        ((first, last),) = await (await connection.execute(statement, picked.parameters)).fetchall()
        if first is None:
            return None
        since, until = since or first, until or last + _MICROSECOND
    if since >= until:
        return None
    return window_bounds(question.size, zone=question.zone, since=since, until=until, windows_max=WINDOWS_MAX)


def _statement(
    meter: Meter, question: MeterQuestion, *, bounds: Sequence[datetime] | None
) -> tuple[sql.Composed, Mapping[str, object]]:
    picked = _Picked.of(meter, question)
    names = [sql.Identifier(f"group_{number}") for number in range(len(question.group_by))]
    bucket = sql.SQL("1") if bounds is None else sql.SQL("width_bucket(occurred_at, %(bounds)s::timestamptz[])")
    named = sql.SQL("").join(sql.SQL(", {}").format(name) for name in names)
    read = sql.SQL(_READ).format(
        bucket=bucket,
        value=picked.value(),
        groups=sql.SQL("").join(
            sql.SQL(', {} COLLATE "C" AS {}').format(picked.group(group), name)
            for group, name in zip(question.group_by, names, strict=True)
        ),
        rows=picked.rows(),
        names=named,
    )
    counted = read
    if picked.is_of_numbers:
        counted = sql.SQL(_NUMBERS).format(
            read=read,
            names=named,
            maximum=sql.Literal(NUMBER_MAX),
            decimals=sql.Literal(NUMBER_DECIMALS_MAX),
            length=sql.Literal(NUMBER_LENGTH_MAX),
            form=sql.Literal(_NUMBER_FORM),
        )
    aggregates = _UNIQUE if meter.aggregation == "UNIQUE_COUNT" else _AGGREGATES
    statement = sql.SQL(aggregates).format(
        counted=counted,
        aggregate=sql.SQL(_AGGREGATE[meter.aggregation]),
        names=named,
        having=sql.SQL("WHERE counted > 0" if picked.is_of_numbers else ""),
        limit=sql.Literal(ROWS_MAX + 1),
    )
    return statement, {**picked.parameters, "bounds": None if bounds is None else list(bounds)}


_READ: Final = f"""
SELECT {{bucket}} AS bucket, occurred_at, source, event_id, partition, {{value}} AS value {{groups}}
FROM {{rows}} {APART}
"""
_NUMBERS: Final = f"""
SELECT bucket, occurred_at, source, event_id, partition,
       CASE WHEN abs(value) < {{maximum}}::numeric AND scale(value) <= {{decimals}} THEN value END AS value {{names}}
FROM (SELECT bucket, occurred_at, source, event_id, partition,
             CASE jsonb_typeof(value)
                 WHEN 'number' THEN value::numeric
                 WHEN 'string' THEN CASE WHEN length(value #>> ARRAY[]::text[]) <= {{length}}
                                              AND value #>> ARRAY[]::text[] ~ {{form}}
                                         THEN (value #>> ARRAY[]::text[])::numeric END
             END AS value {{names}}
      FROM ({{read}}) AS read {APART}) AS numbers {APART}
"""
_NUMBER_FORM: Final = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9][0-9]?)?$"

_AGGREGATES: Final = """
SELECT * FROM (
    SELECT bucket, min(occurred_at), max(occurred_at), {aggregate} AS value, count(value) AS counted {names}
    FROM ({counted}) AS counted GROUP BY bucket {names}
) AS aggregates {having} ORDER BY bucket {names} LIMIT {limit}
"""
# Each value once, by hashing, and then counted: to sort them all would take far longer.
_UNIQUE: Final = """
SELECT bucket, min(first), max(last), {aggregate} AS value, count(value) AS counted {names}
FROM (SELECT bucket, value, min(occurred_at) AS first, max(occurred_at) AS last {names}
      FROM ({counted}) AS counted GROUP BY bucket, value {names}) AS values
{having} GROUP BY bucket {names} ORDER BY bucket {names} LIMIT {limit}
"""

# Ties of time are decided by the event's key, so that the order of arrival says nothing.
_AGGREGATE: Final[Mapping[Aggregation, str]] = {
    "COUNT": "count(*)",
    "SUM": "sum(value)",
    "MIN": "min(value)",
    "MAX": "max(value)",
    "AVG": "sum(value)",
    "UNIQUE_COUNT": "count(value)",
    "LATEST": """(array_agg(value ORDER BY occurred_at DESC, source COLLATE "C" DESC, event_id COLLATE "C" DESC,
                            partition DESC) FILTER (WHERE value IS NOT NULL))[1]""",
}

_NODE: Final = "data #> {path}::text[]"
# Texts as they are, numbers without zeros that say nothing; what is missing, and what is no single value, is empty.
_TEXT: Final = """
CASE jsonb_typeof({node}) WHEN 'string' THEN {node} #>> '{{}}' WHEN 'boolean' THEN {node} #>> '{{}}'
                          WHEN 'number' THEN trim_scale(({node})::numeric)::text ELSE '' END
"""

_SUBJECT: Final = sql.SQL("coalesce(subject, account)")
_ACCOUNT: Final = sql.SQL("account")


class _Picked:
    """The events a question is about, as SQL. Every value is a parameter."""

    def __init__(
        self,
        meter: Meter,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        subjects: Sequence[str] | None = None,
        accounts: Sequence[str] | None = None,
        filters: Mapping[str, Filter] | None = None,
    ) -> None:
        self.parameters: dict[str, object] = {}
        self._meter = meter
        # Of the versions of a use one counts, or none.
        self._conditions: list[sql.Composable] = [self._sql("type = {}", meter.event_type), sql.SQL("NOT superseded")]
        since = _later(since, meter.event_from)
        if since is not None:
            self._conditions.append(self._sql("occurred_at >= {}", since))
        if until is not None:
            self._conditions.append(self._sql("occurred_at < {}", until))
        if accounts is not None:
            self._conditions += [self._partitions(accounts), self._sql("account = ANY({}::text[])", list(accounts))]
        for path, each in meter.filters.items():
            self._conditions.append(self._filter(each, self._text(path)))
        for name, each in (filters or {}).items():
            self._conditions.append(self._filter(each, self.group(name)))
        self._subjects = subjects

    @classmethod
    def of(cls, meter: Meter, question: MeterQuestion) -> "_Picked":
        """Those of a question."""
        return cls(
            meter,
            since=question.since,
            until=question.until,
            subjects=question.subjects,
            accounts=question.accounts,
            filters=question.filters,
        )

    def rows(self) -> sql.Composable:
        """What to select from."""
        if self._subjects is None:
            return self._selected()
        # Use that was reported of the account itself is found in its partition, that of foreign subjects by an index.
        subjects = list(self._subjects)
        own = [sql.SQL("subject IS NULL"), self._partitions(subjects), self._sql("account = ANY({}::text[])", subjects)]
        return sql.SQL("({own} UNION ALL {foreign}) AS reported").format(
            own=sql.SQL("SELECT * FROM {}").format(self._selected(*own)),
            foreign=sql.SQL("SELECT * FROM {}").format(
                self._selected(sql.SQL("subject IS NOT NULL"), self._sql("subject = ANY({}::text[])", subjects))
            ),
        )

    @property
    def is_of_numbers(self) -> bool:
        """Whether `value` is a JSON value that is yet to be read as a number."""
        return self._meter.value is not None and self._meter.aggregation != "UNIQUE_COUNT"

    def value(self) -> sql.Composable:
        """What is aggregated of an event; null if it has none."""
        if self._meter.value is None:
            return sql.SQL("1")
        if self.is_of_numbers:
            return self._node(self._meter.value)
        return sql.SQL("nullif({}, '')").format(self._text(self._meter.value))

    def group(self, name: str) -> sql.Composable:
        """The text by which a group is grouped, and filtered."""
        if name == SUBJECT:
            return _SUBJECT
        if name == ACCOUNT_GROUP:
            return _ACCOUNT
        return self._text(self._meter.group_by[name])

    def _selected(self, *more: sql.Composable) -> sql.Composable:
        return sql.SQL("(SELECT * FROM usage_log WHERE {}) AS logged").format(
            sql.SQL(" AND ").join([*self._conditions, *more])
        )

    def _partitions(self, accounts: Sequence[str]) -> sql.Composable:
        return self._sql("partition = ANY({}::smallint[])", sorted({partition_of(each) for each in accounts}))

    def _node(self, path: Path) -> sql.Composable:
        return sql.SQL("({})").format(self._sql(_NODE.replace("{path}", "{}"), list(path)))

    def _text(self, path: Path) -> sql.Composable:
        return sql.SQL("({})").format(sql.SQL(_TEXT).format(node=self._node(path)))

    def _filter(self, found: Filter, text: sql.Composable) -> sql.Composable:
        match found:
            case AllOf():
                return self._joined(" AND ", [self._filter(each, text) for each in found.filters])
            case AnyOf():
                return self._joined(" OR ", [self._filter(each, text) for each in found.filters])
            case Comparison():
                value: object = list(found.values) if found.operator in ("in", "nin") else found.values[0]
                return sql.SQL(_COMPARISONS[found.operator]).format(text=text, value=self._parameter(value))
            case never:
                assert_never(never)

    @staticmethod
    def _joined(by: str, conditions: Sequence[sql.Composable]) -> sql.Composable:
        return sql.SQL("({})").format(sql.SQL(by).join(conditions))

    def _sql(self, text: str, *values: object) -> sql.Composable:
        return sql.SQL(text).format(*(self._parameter(value) for value in values))

    def _parameter(self, value: object) -> sql.Composable:
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return sql.Placeholder(name)


_COMPARISONS: Final = {
    "eq": "{text} = {value}",
    "ne": "{text} <> {value}",
    "in": "{text} = ANY({value}::text[])",
    "nin": "{text} <> ALL({value}::text[])",
    "like": "{text} LIKE {value}",
    "nlike": "{text} NOT LIKE {value}",
    "ilike": "{text} ILIKE {value}",
    "nilike": "{text} NOT ILIKE {value}",
    "gt": '{text} COLLATE "C" > {value}',
    "gte": '{text} COLLATE "C" >= {value}',
    "lt": '{text} COLLATE "C" < {value}',
    "lte": '{text} COLLATE "C" <= {value}',
}


def _later(one: datetime | None, other: datetime | None) -> datetime | None:
    return max(one, other) if one is not None and other is not None else one or other


def _minute(instant: datetime) -> datetime:
    return instant.replace(second=0, microsecond=0)
