"""Re-rating a period: by slices of the log, and, where prices count over a period, account by account in order of use.

A slice is one transaction. What is left as it is, is counted: pinned, waiting, unpriced, too_many, not_all_here.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec
from psycopg import sql
from psycopg.rows import class_row

from contracts.partition import PARTITION_COUNT, partition_of
from contracts.pricing import Counter, PriceVersion, Rated
from services.metering import store
from services.metering.correcting import records, versions
from services.metering.correcting.changing import (
    Change,
    Charged,
    Rating,
    Slice,
    Task,
    VersionNotRead,
    Waits,
    charged,
    counts_of,
    lowered,
)
from services.metering.correcting.versions import LOGGED, Found, LoggedVersion, Place
from services.metering.domain.charging import Head
from services.metering.domain.corrections import CounterMove, moves, put_in, take_out
from services.metering.domain.prices import CounterKey, PriceBook
from services.metering.domain.prices import Counts as CountedAs
from services.metering.domain.usage import Key, Usage
from services.metering.store import Connection

EVERYBODY: Final = "*"
# Of a transaction.
EVENTS_MAX: Final = 500
# What is to be done is counted no further: it would take longer than a transaction may.
OF_MAX: Final = 1_000_000
# Of an account in a period, which is one transaction.
COUNTED_EVENTS_MAX: Final = 10_000

Counts = dict[str, int]


class Parameters(msgspec.Struct, rename={"since": "from", "until": "to"}):
    """What is re-rated. Without `price_version`: under the version of each use's own time."""

    account: str
    since: datetime
    until: datetime
    tree: bool = False
    price_version: str | None = None
    provider: str | None = None
    model: str | None = None
    type: str | None = None
    include_pinned: bool = False

    @property
    def partitions(self) -> Sequence[int]:
        """Where the use is logged."""
        return range(PARTITION_COUNT) if self.account == EVERYBODY else [partition_of(self.account)]


class Cursor(msgspec.Struct):
    """How far a re-rating is: in a partition, in what no period counts, and then in what one does."""

    of: int
    done: int = 0
    partition: int = 0
    # Those that come after it, and have anything.
    partitions: list[int] = []
    counted: bool = False
    # The last one that was looked at: time, source and id; or account, type and the time its period began.
    place: tuple[str, str, str] | None = None


async def first_cursor(connection: Connection, parameters: Parameters) -> Cursor | None:
    """Where it begins, and of how much use, as far as that is counted; None: there is none."""
    where = _Where(parameters)
    cursor = await connection.execute(
        sql.SQL(
            "SELECT count(*) FROM ("
            "SELECT FROM usage_log AS l WHERE partition = ANY(%(partitions)s) AND {} LIMIT {}) AS u"
        ).format(where.condition, sql.Literal(OF_MAX)),
        {**where.parameters, "partitions": list(parameters.partitions)},
    )
    ((count,),) = await cursor.fetchall()
    cursor = await connection.execute(
        sql.SQL(
            """
            SELECT p FROM unnest(%(partitions)s::smallint[]) AS p
            WHERE EXISTS (SELECT FROM usage_log AS l WHERE partition = p AND {}) ORDER BY p
            """
        ).format(where.condition),
        {**where.parameters, "partitions": list(parameters.partitions)},
    )
    found = [partition for (partition,) in await cursor.fetchall()]
    return Cursor(of=count, partition=found[0], partitions=found[1:]) if found else None


def _next_partition(cursor: Cursor) -> Cursor | None:
    if not cursor.partitions:
        return None
    first, *rest = cursor.partitions
    return Cursor(of=cursor.of, done=cursor.done, partition=first, partitions=rest)


async def rerate_slice(connection: Connection, task: Task, parameters: Parameters, cursor: Cursor) -> Slice:
    """Re-rate the next slice, in the caller's transaction. VersionNotRead."""
    under = None if parameters.price_version is None else task.book.find(parameters.price_version)
    if under is None and parameters.price_version is not None:
        raise VersionNotRead(parameters.price_version)
    heads = await store.lock_heads(connection, [cursor.partition])
    if cursor.counted:
        return await _counted_slice(connection, task, parameters, cursor, under=under, heads=heads)
    where = _Where(parameters)
    rows = await _rows(
        connection,
        sql.SQL("{} AND type <> ALL(%(counted)s)").format(where.after(cursor)),
        {**where.parameters, "counted": list(task.book.counts_types())},
        limit=EVENTS_MAX,
    )
    uses = await _uses(connection, rows)
    counts: Counts = {}
    wanted = [(each, usage) for each in uses if (usage := _rateable(each, parameters, counts)) is not None]
    rating = await Rating.of(connection, wanted, task, under=under)
    changes = []
    for found, usage in wanted:
        to = rating.rated(usage, under=under)
        if _changes(found, to, counts):
            changes.append(Change(found, to))
    written = await records.write_and_record(connection, changes, task, heads=heads, counters={})
    last = rows[-1] if rows else None
    following: Cursor | None = msgspec.structs.replace(
        cursor,
        done=cursor.done + len(rows),
        place=None if last is None else (last.occurred_at.isoformat(), last.source, last.event_id),
    )
    if len(rows) < EVENTS_MAX:
        assert following is not None
        following = msgspec.structs.replace(following, counted=True, place=None)
        if not _may_count(task.book, parameters):
            following = _next_partition(following)
    return Slice(following, _with_corrected(counts, changes, len(rows)), written)


def _rateable(found: Found, parameters: Parameters, counts: Counts) -> Usage | None:
    """The use as its next version would be, if it may be re-rated."""
    assert found.current is not None
    usage = found.current.usage()
    if found.waiting is not None and found.waiting.reason != "unpriced":
        _add(counts, "waiting")
        return None
    if usage.used is not None and usage.used.price_version is not None and not parameters.include_pinned:
        _add(counts, "pinned")
        return None
    return msgspec.structs.replace(usage, revision=found.next_revision)


def _changes(found: Found, to: Charged | Waits, counts: Counts) -> bool:
    """Whether that is another version. What has no price stays what it was, never for nothing."""
    if isinstance(to, Waits):
        _add(counts, "unpriced")
        return False
    now = found.current
    assert now is not None
    if (
        now.price_version == to.price_version
        and now.amounts is not None
        and now.line_items is not None
        and msgspec.json.decode(now.amounts) == msgspec.json.decode(to.amounts_json)
        and msgspec.json.decode(now.line_items) == msgspec.json.decode(to.line_items)
    ):
        _add(counts, "unchanged")
        return False
    return True


# What counts over a period -------------------------------------------------------------------------------------------


class _Group(msgspec.Struct):
    """The use of a type, of an account, in the longest period that any of its prices counts over."""

    account: str
    type: str
    since: datetime
    until: datetime


async def _counted_slice(
    connection: Connection,
    task: Task,
    parameters: Parameters,
    cursor: Cursor,
    *,
    under: PriceVersion | None,
    heads: Mapping[int, Head],
) -> Slice:
    group = await _next_group(connection, task.book, parameters, cursor)
    if group is None:
        return Slice(_next_partition(cursor))
    counts: Counts = {}
    rows = await _rows(
        connection,
        sql.SQL(
            "partition = %(partition)s AND account = %(account)s AND type = %(type)s AND NOT superseded"
            " AND occurred_at >= %(since)s AND occurred_at < %(until)s"
        ),
        {"partition": cursor.partition, **msgspec.structs.asdict(group)},
        limit=COUNTED_EVENTS_MAX + 1,
    )
    inside = sum(parameters.since <= each.occurred_at < parameters.until for each in rows)
    changes: list[Change] = []
    moved: Mapping[CounterKey, Counter] = {}
    if len(rows) > COUNTED_EVENTS_MAX:
        _add(counts, "too_many", inside)
    else:
        uses = await _uses(connection, rows)
        changes, moved = await _recount(connection, task.book, parameters, uses, under=under, counts=counts)
    written = await records.write_and_record(connection, changes, task, heads=heads, counters=moved)
    following = msgspec.structs.replace(
        cursor, done=cursor.done + inside, place=(group.account, group.type, group.since.isoformat())
    )
    return Slice(following, _with_corrected(counts, changes, inside), written)


def _may_count(book: PriceBook, parameters: Parameters) -> bool:
    """Whether any of it may be counted over a period. Calls of models are not."""
    return bool(book.counts_types()) and parameters.provider is None and parameters.model is None


async def _next_group(connection: Connection, book: PriceBook, parameters: Parameters, cursor: Cursor) -> _Group | None:
    periods = book.counts_types()
    where = _Where(parameters)
    found = await connection.execute(
        sql.SQL(
            """
            SELECT account, type, since AT TIME ZONE 'UTC', (since + ('1 ' || period)::interval) AT TIME ZONE 'UTC'
            FROM (
                SELECT account, type, period, date_trunc(period, occurred_at AT TIME ZONE 'UTC') AS since
                FROM usage_log AS l JOIN unnest(%(types)s::text[], %(periods)s::text[]) AS t (type, period) USING (type)
                WHERE partition = %(partition)s AND {}
            ) AS counted
            WHERE %(place)s::text[] IS NULL OR (account, type, since AT TIME ZONE 'UTC')
                > ((%(place)s::text[])[1], (%(place)s::text[])[2], ((%(place)s::text[])[3])::timestamptz)
            ORDER BY 1, 2, 3 LIMIT 1
            """
        ).format(where.condition),
        {
            **where.parameters,
            "types": list(periods),
            "periods": list(periods.values()),
            "partition": cursor.partition,
            "place": None if cursor.place is None else list(cursor.place),
        },
    )
    rows = await found.fetchall()
    return None if not rows else _Group(*rows[0])


async def _recount(
    connection: Connection,
    book: PriceBook,
    parameters: Parameters,
    uses: Sequence[Found],
    *,
    under: PriceVersion | None,
    counts: Counts,
) -> tuple[list[Change], dict[CounterKey, Counter]]:
    """Price all of a period anew in order of use, as if nothing had been counted. What is not re-rated keeps its cost.

    So what is charged does not depend on the order in which it was reported, or corrected; twice is once.
    """
    was: dict[CounterKey, Counter] = {}
    own: dict[Key, dict[CounterKey, Counter]] = {}
    for each in uses:
        for share in [] if each.current is None else counts_of(each.current, book).shares:
            _by(was, share.key, Counter(quantity=share.quantity))
            _by(own.setdefault(each.place.key, {}), share.key, Counter(quantity=-share.quantity))
    open_accounts = await store.find_open(connection, {(each.place.partition, each.account or "") for each in uses})
    now: dict[CounterKey, Counter] = {}
    made: dict[Key, Charged] = {}
    for each in uses:
        current = each.current
        assert current is not None
        if parameters.since <= each.place.occurred_at < parameters.until:
            usage = _rateable(each, parameters, counts)
            price = None
            if usage is not None and usage.account in open_accounts:
                price = book.price(usage, counted=now, under=under)
            if usage is not None and isinstance(price, Rated):
                for counting in price.counting:
                    key = (usage.partition, usage.account, counting.price_id, counting.period)
                    more = counting.counter.quantity - now.get(key, Counter()).quantity
                    _by(own.setdefault(each.place.key, {}), key, Counter(quantity=more))
                    now[key] = counting.counter
                made[each.place.key] = charged(usage, price, units=book.units)
                continue
            if usage is not None:
                _add(counts, "unpriced")
        if current.amounts is not None:
            amounts = versions.amounts_of(current.amounts, book.units)
            now |= put_in(now, counts_of(current, book), amounts)
    _settle(uses, made, now, book=book)
    to = {
        each.place.key: rated for each in uses if (rated := made.get(each.place.key)) and _changes(each, rated, counts)
    }
    stored = await store.find_counters(connection, {*was, *now})
    if any(stored.get(key, Counter()).quantity != was.get(key, Counter()).quantity for key in {*was, *now}):
        # Some of what was counted is not in the log any more.
        _add(counts, "not_all_here", len(to))
        return [], {}
    if not to:
        return [], {}
    after = {key: now.get(key, Counter()) for key in {*was, *now}}
    return _with_moves(uses, to, own, stored, after, book=book), after


def _settle(
    uses: Sequence[Found], made: dict[Key, Charged], now: dict[CounterKey, Counter], *, book: PriceBook
) -> None:
    """Have the latest of what is re-rated cost less, or more, by what is carried: there is no use to come for it."""
    for key, counter in now.items():
        credit = counter.credit
        for each in reversed(uses):
            if not credit:
                break
            if (rated := made.get(each.place.key)) is not None:
                made[each.place.key], steps = lowered(rated, key, -credit, book=book)
                credit += steps
        now[key] = Counter(quantity=counter.quantity, credit=credit)


def _with_moves(
    uses: Iterable[Found],
    to: Mapping[Key, Charged],
    own: Mapping[Key, Mapping[CounterKey, Counter]],
    before: Mapping[CounterKey, Counter],
    after: Mapping[CounterKey, Counter],
    *,
    book: PriceBook,
) -> list[Change]:
    """Changes with their part of how counters moved. The first has what is nobody's own: what prices changed."""
    rest = {each.key: each.by for each in moves(before, after)}
    changed = [(each, to[each.place.key]) for each in uses if each.place.key in to]
    without = dict(after)
    parts: list[list[CounterMove]] = []
    for found, made in reversed(changed):
        assert found.current is not None
        if found.current.price_version is None:
            # It is counted from now on, as if it had come last.
            taken_out = take_out(without, _counts_of(made, book), made.amounts)
            part = moves(taken_out, {key: without[key] for key in taken_out})
            without |= taken_out
        else:
            by = dict(own.get(found.place.key, {}))
            for key, credit in _own_credit(found, made, book).items():
                _by(by, key, Counter(credit=credit))
            part = [CounterMove(key, each) for key, each in sorted(by.items()) if each != Counter()]
        parts.insert(0, part)
        for each in part:
            _by(rest, each.key, Counter(quantity=-each.by.quantity, credit=-each.by.credit))
    parts[0] += [CounterMove(key, by) for key, by in sorted(rest.items()) if by != Counter()]
    return [Change(found, made, part) for (found, made), part in zip(changed, parts, strict=True)]


def _own_credit(found: Found, made: Charged, book: PriceBook) -> dict[CounterKey, int]:
    """What is carried less since a use is charged more: so each can be undone by itself."""
    current = found.current
    assert current is not None
    more = dict(made.amounts)
    for unit, steps in versions.amounts_of(current.amounts, book.units).items():
        more[unit] = more.get(unit, 0) - steps
    shares = (*_counts_of(made, book).shares, *counts_of(current, book).shares)
    return {share.key: -steps for share in shares if (steps := more.pop(share.unit.name, 0))}


def _counts_of(made: Charged, book: PriceBook) -> CountedAs:
    version = book.find(made.price_version)
    assert version is not None
    return book.counts(made.usage, version)


def _by(counters: dict[CounterKey, Counter], key: CounterKey, more: Counter) -> None:
    found = counters.get(key, Counter())
    counters[key] = Counter(quantity=found.quantity + more.quantity, credit=found.credit + more.credit)


# The log --------------------------------------------------------------------------------------------------------------


class _Where:
    """Which use is re-rated, as SQL."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters: dict[str, object] = {"since": parameters.since, "until": parameters.until}
        conditions = ["NOT superseded", "occurred_at >= %(since)s", "occurred_at < %(until)s"]
        if parameters.account != EVERYBODY:
            below = " OR starts_with(account, %(account)s || '/')" if parameters.tree else ""
            conditions.append(f"(account = %(account)s{below})")
            self.parameters["account"] = parameters.account
        for name, value in (("provider", parameters.provider), ("model", parameters.model)):
            if value is not None:
                conditions.append(f"data ->> '{name}' = %({name})s")
                self.parameters[name] = value
        if parameters.type is not None:
            conditions.append("type = %(type)s")
            self.parameters["type"] = parameters.type
        self.condition = sql.SQL(" AND ".join(conditions))

    def after(self, cursor: Cursor) -> sql.Composable:
        """Those of the cursor's partition that come after its place."""
        self.parameters["partition"] = cursor.partition
        own = sql.SQL("partition = %(partition)s AND {}").format(self.condition)
        if cursor.place is None:
            return own
        self.parameters |= dict(zip(("at", "source", "event_id"), cursor.place, strict=True))
        # The first is said apart: it says which months need not be looked at.
        return sql.SQL(
            "{} AND occurred_at >= %(at)s::timestamptz"
            " AND (occurred_at, source, event_id) > (%(at)s::timestamptz, %(source)s::text, %(event_id)s::text)"
        ).format(own)


async def _rows(
    connection: Connection, condition: sql.Composable, parameters: Mapping[str, object], *, limit: int
) -> list[LoggedVersion]:
    async with connection.cursor(row_factory=class_row(LoggedVersion)) as cursor:
        await cursor.execute(
            sql.SQL("SELECT {} FROM usage_log AS l WHERE {} ORDER BY occurred_at, source, event_id LIMIT {}").format(
                sql.SQL(LOGGED), condition, sql.Literal(limit)
            ),
            parameters,
        )
        return await cursor.fetchall()


async def _uses(connection: Connection, rows: Sequence[LoggedVersion]) -> list[Found]:
    """Uses with all their versions, in the order of the rows."""
    places = [Place(each.partition, each.source, each.event_id, each.occurred_at.astimezone(UTC)) for each in rows]
    found = await versions.find_uses(connection, places)
    return [found[place.key] for place in places]


def _with_corrected(counts: Counts, changes: Sequence[Change], events: int) -> Counts:
    return {"events": events, "corrected": len(changes), **counts}


def _add(counts: Counts, name: str, number: int = 1) -> None:
    counts[name] = counts.get(name, 0) + number
