"""What a meter answers is what a computation in memory says of the same events: any question, any order of arrival."""

import json
import random
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any, Final
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from contracts.partition import partition_of
from services.metering.domain.meters import (
    Aggregate,
    Aggregation,
    AllOf,
    AnyOf,
    Comparison,
    Filter,
    Meter,
    MeterQuestion,
    Operator,
)
from services.metering.domain.windows import TooManyWindows, WindowSize, window_bounds
from services.metering.queries import meters
from services.metering.queries.meters import TooManyRows, ask_meter, list_values
from tests.conftest import Database

pytestmark = pytest.mark.anyio

Connection = AsyncConnection[TupleRow]

SIZES: Final[tuple[WindowSize, ...]] = ("MINUTE", "HOUR", "DAY", "MONTH")
AGGREGATIONS: Final[tuple[Aggregation, ...]] = ("COUNT", "SUM", "MIN", "MAX", "AVG", "LATEST", "UNIQUE_COUNT")
ZONES: Final = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe", "America/Havana")
ACCOUNTS: Final = ("acme", "acme/ana", "acme/bob", "other", "third/key_1", "%C3%A4rger")
SUBJECTS: Final = (None, None, None, "customer 42", "ärger", "acme")
# Clocks change in Berlin on the 25th, in New York and Havana on 1 November, on Lord Howe on the 4th.
SINCE: Final = datetime(2026, 10, 2, tzinfo=UTC)
DAYS: Final = 34

# What is written, and which number that is.
VALUES: Final[tuple[tuple[str, Decimal | None], ...]] = (
    ("7", Decimal(7)),
    ("-3", Decimal(-3)),
    ("0.1", Decimal("0.1")),
    ("0.10", Decimal("0.1")),
    ("123456789012345678901234.000000001", Decimal("123456789012345678901234.000000001")),
    ("1e3", Decimal(1000)),
    ('"12.5"', Decimal("12.5")),
    ('"+1e-3"', Decimal("0.001")),
    ('".5"', Decimal("0.5")),
    ('"0x10"', None),
    ('"NaN"', None),
    ('"Infinity"', None),
    ('" 1"', None),
    ('""', None),
    ('"many"', None),
    ("1e45", None),
    ('"1e45"', None),
    ("1e-45", None),
    ("null", None),
    ("true", None),
    ("[1]", None),
    ('{"a": 1}', None),
)


@dataclass(frozen=True)
class Event:
    number: int
    at: datetime
    account: str
    subject: str | None
    kind: str
    data: str

    @property
    def source(self) -> str:
        return ("demo", "gateway")[self.number % 2]


def events(chance: random.Random, count: int) -> list[Event]:
    made = []
    for number in range(count):
        members = []
        if chance.random() < 0.9:
            members.append(f'"tokens": {chance.choice(VALUES)[0]}')
        if chance.random() < 0.8:
            members.append(f'"model": {json.dumps(chance.choice(["gpt-4o", "gpt-4o-mini", "ä_1%", "", "o4"]))}')
        if chance.random() < 0.8:
            inner = f'"status": {chance.choice(["200", "200.0", "429", "true", "null", "[]"])}'
            members.append(f'"attributes": {{{inner}}}')
        # Few times, so that there are ties.
        at = SINCE + timedelta(seconds=chance.randrange(0, DAYS * 24 * 3600, 900), microseconds=chance.randrange(2))
        account = chance.choice(ACCOUNTS)
        kind = "used" if chance.random() < 0.9 else "other"
        made.append(Event(number, at, account, chance.choice(SUBJECTS), kind, f"{{{', '.join(members)}}}"))
    return made


async def log(connection: Connection, found: Iterable[Event], *, prefix: str = "") -> None:
    async with (
        connection.cursor() as cursor,
        cursor.copy(
            "COPY usage_log (partition, occurred_at, source, event_id, account, type, recorded_at, data, subject)"
            " FROM STDIN"
        ) as copy,
    ):
        for each in found:
            key = (partition_of(each.account), each.at, each.source, f"use-{each.number}{prefix}")
            await copy.write_row((*key, each.account, prefix + each.kind, datetime.now(UTC), each.data, each.subject))


# The same in memory, with other means ---------------------------------------------------------------------------------


@cache
def read(data: str) -> Any:
    return json.loads(data, parse_float=Decimal, parse_int=Decimal)


def node(data: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(data, dict) or name not in data:
            return None
        data = data[name]
    return data


def text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return str(value.normalize()) if value != value.to_integral_value() else str(int(value))
    return value if isinstance(value, str) else ""


NUMBERS: Final = {json.loads(written): number for written, number in VALUES if written.startswith('"')}


def number_of(value: Any) -> Decimal | None:
    if isinstance(value, str):
        return NUMBERS[value]
    if isinstance(value, Decimal) and abs(value) < Decimal("1e40") and value > Decimal("-1e40"):
        exponent = value.as_tuple().exponent
        assert isinstance(exponent, int)
        return value if exponent >= -40 else None
    return None


def meets(found: Filter, value: str) -> bool:
    match found:
        case AllOf(filters):
            return all(meets(each, value) for each in filters)
        case AnyOf(filters):
            return any(meets(each, value) for each in filters)
        case Comparison(operator, values):
            return COMPARED[operator](value, values)


def like(value: str, pattern: str) -> bool:
    if not pattern:
        return not value
    if pattern[0] == "%":
        return any(like(value[place:], pattern[1:]) for place in range(len(value) + 1))
    if pattern[0] == "\\":
        return value[:1] == pattern[1] and like(value[1:], pattern[2:])
    return value != "" and pattern[0] in ("_", value[0]) and like(value[1:], pattern[1:])


COMPARED: Final[dict[Operator, Callable[[str, Sequence[str]], bool]]] = {
    "eq": lambda value, of: value == of[0],
    "ne": lambda value, of: value != of[0],
    "in": lambda value, of: value in of,
    "nin": lambda value, of: value not in of,
    "like": lambda value, of: like(value, of[0]),
    "nlike": lambda value, of: not like(value, of[0]),
    "ilike": lambda value, of: like(value.lower(), of[0].lower()),
    "nilike": lambda value, of: not like(value.lower(), of[0].lower()),
    "gt": lambda value, of: value.encode() > of[0].encode(),
    "gte": lambda value, of: value.encode() >= of[0].encode(),
    "lt": lambda value, of: value.encode() < of[0].encode(),
    "lte": lambda value, of: value.encode() <= of[0].encode(),
}


def group_of(meter: Meter, each: Event, data: Any, name: str) -> str:
    if name == "subject":
        return each.account if each.subject is None else each.subject
    return each.account if name == "customer_id" else text(node(data, meter.group_by[name]))


def is_asked_for(meter: Meter, question: MeterQuestion, each: Event, data: Any) -> bool:
    return (
        each.kind == meter.event_type
        and (question.since is None or each.at >= question.since)
        and (question.until is None or each.at < question.until)
        and (meter.event_from is None or each.at >= meter.event_from)
        and (question.accounts is None or each.account in question.accounts)
        and (question.subjects is None or (each.subject or each.account) in question.subjects)
        and all(meets(found, text(node(data, path))) for path, found in meter.filters.items())
        and all(meets(found, group_of(meter, each, data, name)) for name, found in question.filters.items())
    )


def aggregated(meter: Meter, group: Sequence[tuple[Event, Any]]) -> Decimal | None:
    values = [node(data, meter.value or ()) for _, data in group]
    match meter.aggregation:
        case "COUNT":
            return Decimal(len(group))
        case "UNIQUE_COUNT":
            return Decimal(len({text(value) for value in values} - {""}))
        case _:
            pass
    numbers = [(each, number_of(value)) for (each, _), value in zip(group, values, strict=True)]
    counted = [(each, Fraction(number)) for each, number in numbers if number is not None]
    if not counted:
        return None
    found = [number for _, number in counted]
    total: Fraction
    match meter.aggregation:
        case "SUM":
            total = sum(found, Fraction())
        case "MIN":
            total = min(found)
        case "MAX":
            total = max(found)
        case "LATEST":
            total = max(counted, key=lambda each: (each[0].at, each[0].source, f"use-{each[0].number}"))[1]
        case _:
            # Python rounds fractions half-even.
            total = Fraction(round(sum(found, Fraction()) / len(found) * 10**18), 10**18)
    # A literal is not rounded.
    return Decimal(f"{total.numerator * 10**60 // total.denominator}e-60")


def expected(meter: Meter, question: MeterQuestion, found: Iterable[Event]) -> list[Aggregate]:
    picked = []
    for each in found:
        data = read(each.data)
        if is_asked_for(meter, question, each, data):
            picked.append((each, data))
    if not picked:
        return []
    first, last = min(each.at for each, _ in picked), max(each.at for each, _ in picked)
    bounds = None
    if question.size is not None:
        starts = [each for each in (question.since, meter.event_from) if each is not None]
        bounds = window_bounds(
            question.size,
            zone=question.zone,
            since=max(starts) if starts else first,
            until=question.until or last + timedelta(microseconds=1),
            windows_max=10**6,
        )
    groups: dict[tuple[int, tuple[str, ...]], list[tuple[Event, Any]]] = {}
    for each, data in picked:
        bucket = 0 if bounds is None else bisect_right(bounds, each.at) - 1
        values = tuple(group_of(meter, each, data, name) for name in question.group_by)
        groups.setdefault((bucket, values), []).append((each, data))
    rows = []
    for key in sorted(groups, key=lambda key: (key[0], [part.encode() for part in key[1]])):
        value = aggregated(meter, groups[key])
        if value is None:
            continue
        if bounds is None:
            times = [each.at for each, _ in groups[key]]
            start = question.since or min(times).replace(second=0, microsecond=0)
            end = question.until or max(times).replace(second=0, microsecond=0) + timedelta(minutes=1)
        else:
            start, end = bounds[key[0]], bounds[key[0] + 1]
        rows.append(Aggregate(value, start, end, list(key[1])))
    return rows


# Questions ------------------------------------------------------------------------------------------------------------


def comparison(chance: random.Random) -> Filter:
    operator: Operator = chance.choice(list(COMPARED))
    values = ["gpt-4o", "", "429", "200", "%4o%", "GPT%", "ä\\_1\\%", "_4", "acme", "true"]
    chosen = chance.sample(values, 3) if operator in ("in", "nin") else [chance.choice(values)]
    return Comparison(operator, chosen)


def any_filter(chance: random.Random) -> Filter:
    kind = chance.randrange(5)
    if kind > 1:
        return comparison(chance)
    return (AllOf, AnyOf)[kind]([comparison(chance), comparison(chance)])


def any_meter(chance: random.Random) -> Meter:
    aggregation = chance.choice(AGGREGATIONS)
    value = ("model",) if aggregation == "UNIQUE_COUNT" and chance.random() < 0.5 else ("tokens",)
    return Meter(
        slug="tokens",
        aggregation=aggregation,
        event_type="used",
        value=None if aggregation == "COUNT" else value,
        group_by={"model": ("model",), "status": ("attributes", "status"), "deep": ("attributes", "x", "y")},
        filters={("attributes", "status"): any_filter(chance)} if chance.random() < 0.3 else {},
        event_from=SINCE + timedelta(days=7) if chance.random() < 0.2 else None,
    )


def any_question(chance: random.Random) -> MeterQuestion:
    def moment() -> datetime:
        return SINCE + timedelta(minutes=chance.randrange(-600, DAYS * 24 * 60 + 600))

    names = ["subject", "customer_id", "model", "status", "deep"]
    one, other = sorted((moment(), moment()))
    size = chance.choice([None, None, *SIZES])
    if size == "MINUTE":
        other = min(other, one + timedelta(days=3))
    return MeterQuestion(
        since=one if chance.random() < 0.7 or size == "MINUTE" else None,
        until=other + timedelta(seconds=1) if chance.random() < 0.7 or size == "MINUTE" else None,
        size=size,
        zone=ZoneInfo(chance.choice(ZONES)),
        group_by=chance.sample(names, chance.randrange(0, 4)),
        subjects=chance.sample(["acme", "customer 42", "ärger", "other", "nobody"], 2)
        if chance.random() < 0.3
        else None,
        accounts=chance.sample(ACCOUNTS, 2) if chance.random() < 0.3 else None,
        filters={chance.choice(names): any_filter(chance)} if chance.random() < 0.4 else {},
    )


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    url = database.url("metering").get_secret_value()
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as opened:
        await opened.execute("SELECT ensure_usage_month('2026-10-01')")
        yield opened


async def test_every_answer_is_what_a_computation_in_memory_says(connection: Connection) -> None:
    chance = random.Random(20261121)
    found = events(chance, 2_500)
    await log(connection, found)
    seen = set()
    for _ in range(400):
        meter, question = any_meter(chance), any_question(chance)
        wanted = expected(meter, question, found)
        assert await ask_meter(connection, meter, question) == wanted, (meter, question)
        seen.add((meter.aggregation, question.size, bool(wanted)))
    assert len(seen) > 2 * len(AGGREGATIONS) * len(SIZES) - 10


async def test_the_order_of_arrival_says_nothing(connection: Connection) -> None:
    chance = random.Random(7)
    found = events(chance, 600)
    await log(connection, found)
    for attempt in ("b", "c"):
        shuffled = chance.sample(found, len(found))
        for place in range(0, len(shuffled), 90):
            await log(connection, shuffled[place : place + 90], prefix=attempt)
    for aggregation in AGGREGATIONS:
        meter = replace(any_meter(chance), aggregation=aggregation, value=("tokens",), filters={})
        for size in (None, "HOUR", "DAY"):
            question = replace(any_question(chance), size=size, since=None, until=None)
            answers = [
                await ask_meter(connection, replace(meter, event_type=kind), question)
                for kind in ("used", "bused", "cused")
            ]
            assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("zone", ZONES)
async def test_windows_sum_to_the_total(connection: Connection, zone: str) -> None:
    chance = random.Random(11)
    await log(connection, events(chance, 800))
    meter = Meter(
        slug="tokens", aggregation="SUM", event_type="used", value=("tokens",), group_by={"model": ("model",)}
    )
    whole = MeterQuestion(since=None, until=None, size=None, zone=ZoneInfo(zone), group_by=[])
    (total,) = await ask_meter(connection, meter, whole)
    (counted,) = await ask_meter(connection, replace(meter, aggregation="COUNT", value=None), whole)
    for size in ("HOUR", "DAY", "MONTH"):
        for group_by in ([], ["model"], ["model", "subject"]):
            asked = replace(whole, size=size, group_by=group_by)
            rows = await ask_meter(connection, meter, asked)
            assert sum(Fraction(row.value) for row in rows) == total.value
            rows = await ask_meter(connection, replace(meter, aggregation="COUNT", value=None), asked)
            assert sum(Fraction(row.value) for row in rows) == counted.value
            assert all(
                one.window_end <= other.window_start or one.window_start == other.window_start
                for one, other in pairwise(rows)
            )


async def test_where_midnight_is_plain_windows_are_those_of_postgres(connection: Connection) -> None:
    chance = random.Random(13)
    for name in ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Asia/Beirut", "Pacific/Apia"):
        for size in SIZES:
            for _ in range(25):
                at = datetime(2012, 1, 5, tzinfo=UTC) + timedelta(minutes=chance.randrange(14 * 365 * 24 * 60))
                bounds = window_bounds(
                    size, zone=ZoneInfo(name), since=at, until=at + timedelta(microseconds=1), windows_max=1
                )
                cursor = await connection.execute("SELECT date_trunc(%s, %s::timestamptz, %s)", [size, at, name])
                assert (bounds[0],) == await cursor.fetchone(), (name, size, at)


async def test_a_meter_made_today_has_all_of_the_past(connection: Connection) -> None:
    old = [Event(number, SINCE, "acme", None, "used", '{"tokens": 2}') for number in range(3)]
    await log(connection, old)
    meter = Meter(slug="new", aggregation="SUM", event_type="used", value=("tokens",))
    question = MeterQuestion(since=None, until=None, size="MONTH", zone=UTC, group_by=[])
    assert [row.value for row in await ask_meter(connection, meter, question)] == [6]
    late = Event(9, SINCE - timedelta(days=200), "other", None, "used", '{"tokens": 5}')
    await log(connection, [late])
    assert [row.value for row in await ask_meter(connection, meter, question)] == [5, 6]


async def test_answers_are_bounded(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    await log(connection, events(random.Random(17), 300))
    meter = Meter(slug="n", aggregation="COUNT", event_type="used", value=None, group_by={"model": ("model",)})
    question = MeterQuestion(since=None, until=None, size="MINUTE", zone=UTC, group_by=["model"])
    with pytest.raises(TooManyWindows):
        await ask_meter(connection, meter, question)
    monkeypatch.setattr(meters, "ROWS_MAX", 10)
    with pytest.raises(TooManyRows, match="more than 10 rows"):
        await ask_meter(connection, meter, replace(question, size="DAY"))
    monkeypatch.setattr(meters, "LISTED_MAX", 3)
    with pytest.raises(TooManyRows):
        await list_values(connection, meter, "model", since=None, until=None)


async def test_the_values_of_groups_are_listed_in_order(connection: Connection) -> None:
    found = events(random.Random(19), 300)
    await log(connection, found)
    meter = Meter(slug="n", aggregation="COUNT", event_type="used", value=None, group_by={"model": ("model",)})
    counted = [each for each in found if each.kind == "used"]
    subjects = sorted({each.subject or each.account for each in counted})
    assert await list_values(connection, meter, "subject", since=None, until=None) == subjects
    models = sorted({text(json.loads(each.data).get("model")) for each in counted})
    assert await list_values(connection, meter, "model", since=None, until=None) == models
    assert await list_values(connection, meter, "model", since=SINCE + timedelta(days=99), until=None) == []
