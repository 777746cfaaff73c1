"""Backfilling a period: events are staged, as many as there are, and then applied by slices, each a transaction.

How old they are does not matter. With `replace`, what the period holds of the account and is not staged, becomes void.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from psycopg import sql

from contracts.partition import partition_of
from contracts.pricing import Counter
from services.metering import store, translate
from services.metering.correcting import carrying, records, rerating, versions
from services.metering.correcting.changing import Change, Rating, Slice, Task, VersionNotRead, Voided
from services.metering.correcting.records import Correction
from services.metering.correcting.versions import Found, Place
from services.metering.domain.prices import CounterKey, PriceBook, period_end
from services.metering.domain.usage import Key, Usage
from services.metering.store import Connection
from services.metering.translate.items import is_same_data

# Of a transaction.
EVENTS_MAX: Final = 500
DELETED_MAX: Final = 10_000


class Parameters(msgspec.Struct, rename={"since": "from", "until": "to"}):
    """What is backfilled."""

    account: str
    since: datetime
    until: datetime
    tree: bool = False
    replace: bool = False

    @property
    def partition(self) -> int:
        """Where the use is logged."""
        return partition_of(self.account)

    def covers(self, account: str) -> bool:
        """Whether an account is one whose use is backfilled."""
        return account == self.account or (self.tree and account.startswith(f"{self.account}/"))


class Cursor(msgspec.Struct):
    """How far it is: first in what is to be void, by time, source and id; then in what is staged, by number.

    At last in what it left owed by others.
    """

    of: int
    done: int = 0
    is_replacing: bool = False
    is_settling: bool = False
    place: tuple[str, str, str] | None = None
    number: int = 0


# Staging --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Staged:
    """What became of events that were to be staged; those that are staged with other contents, by their place."""

    new: int
    repeated: int
    conflicting: Sequence[int]
    total: int


async def stage_events(connection: Connection, correction: Correction, usages: Sequence[Usage]) -> Staged:
    """Keep events until they are applied, each once. The caller has the correction locked."""
    parameters = msgspec.json.decode(correction.parameters, type=Parameters)
    ((last,),) = await _fetch(
        connection,
        "SELECT coalesce(max(number), 0) FROM correction_events WHERE partition = %s AND correction = %s",
        [parameters.partition, correction.id],
    )
    added = await _fetch(
        connection,
        """
        INSERT INTO correction_events (partition, correction, number, source, event_id, occurred_at, body_hash, body)
        SELECT %s, %s, %s + number, source, event_id, occurred_at, body_hash, body
        FROM unnest(%s::text[], %s::text[], %s::timestamptz[], %s::bytea[], %s::bytea[])
             WITH ORDINALITY AS n (source, event_id, occurred_at, body_hash, body, number)
        ON CONFLICT (partition, correction, source, event_id) DO NOTHING
        RETURNING source, event_id
        """,
        [
            parameters.partition,
            correction.id,
            last,
            [each.source for each in usages],
            [each.event_id for each in usages],
            [each.occurred_at for each in usages],
            [each.body_hash for each in usages],
            [each.body for each in usages],
        ],
    )
    known = {
        (source, event_id): body_hash
        for source, event_id, body_hash in await _fetch(
            connection,
            """
            SELECT source, event_id, body_hash FROM correction_events
            JOIN unnest(%s::text[], %s::text[]) AS asked (source, event_id) USING (source, event_id)
            WHERE partition = %s AND correction = %s
            """,
            [
                [each.source for each in usages],
                [each.event_id for each in usages],
                parameters.partition,
                correction.id,
            ],
        )
    }
    ((total,),) = await _fetch(
        connection,
        "SELECT count(*) FROM correction_events WHERE partition = %s AND correction = %s",
        [parameters.partition, correction.id],
    )
    return Staged(
        new=len(added),
        repeated=len(usages) - len(added),
        conflicting=[place for place, each in enumerate(usages) if known[each.source, each.event_id] != each.body_hash],
        total=total,
    )


async def delete_staged(connection: Connection, correction: Correction) -> bool:
    """Forget some of what is staged for a correction that was discarded; whether there may be more."""
    parameters = msgspec.json.decode(correction.parameters, type=Parameters)
    cursor = await connection.execute(
        """
        DELETE FROM correction_events WHERE partition = %(partition)s AND correction = %(correction)s AND number IN (
            SELECT number FROM correction_events
            WHERE partition = %(partition)s AND correction = %(correction)s ORDER BY number LIMIT %(limit)s
        )
        """,
        {"partition": parameters.partition, "correction": correction.id, "limit": DELETED_MAX},
    )
    return cursor.rowcount == DELETED_MAX


async def find_foreign(connection: Connection, usages: Sequence[Usage]) -> dict[str, str]:
    """Which subjects are names of other accounts, and of which."""
    subjects = {(each.partition, each.subject) for each in usages}
    aliases = await store.find_aliases(connection, subjects) if subjects else {}
    return {subject: account for (_, subject), account in aliases.items()}


# Applying -------------------------------------------------------------------------------------------------------------


async def first_cursor(connection: Connection, correction: Correction, parameters: Parameters) -> Cursor:
    """Where it begins, and of how much, as far as that is counted."""
    ((staged,),) = await _fetch(
        connection,
        "SELECT count(*) FROM correction_events WHERE partition = %s AND correction = %s",
        [parameters.partition, correction.id],
    )
    if not parameters.replace:
        return Cursor(of=staged)
    where, values = _to_be_void(correction, parameters, None)
    ((there,),) = await _fetch(
        connection,
        sql.SQL("SELECT count(*) FROM (SELECT FROM usage_log AS l WHERE {} LIMIT {}) AS u").format(
            where, sql.Literal(rerating.OF_MAX)
        ),
        values,
    )
    return Cursor(of=staged + there, is_replacing=True)


async def apply_slice(
    connection: Connection, correction: Correction, task: Task, parameters: Parameters, cursor: Cursor
) -> Slice:
    """Apply the next slice, in the caller's transaction. VersionNotRead."""
    if cursor.is_replacing:
        return await _replace_slice(connection, correction, task, parameters, cursor)
    if cursor.is_settling:
        return await _settle_slice(connection, task, parameters, cursor)
    rows = await _fetch(
        connection,
        """
        SELECT number, occurred_at, body_hash, body FROM correction_events
        WHERE partition = %s AND correction = %s AND number > %s ORDER BY number LIMIT %s
        """,
        [parameters.partition, correction.id, cursor.number, EVENTS_MAX],
    )
    usages = [
        translate.waiting_usage(body, occurred_at=occurred_at, body_hash=body_hash)
        for _, occurred_at, body_hash, body in rows
    ]
    heads = await store.lock_heads(connection, [parameters.partition])
    known = await store.claim(connection, sorted(usages, key=lambda usage: usage.key)) if usages else {}
    uses = await _find_known(connection, known)
    counts = {"events": len(usages), "corrected": 0}
    wanted: list[tuple[Found, Usage]] = []
    for usage in usages:
        found = uses.get(usage.key)
        if found is None:
            place = Place(usage.partition, usage.source, usage.event_id, usage.occurred_at)
            wanted.append((Found(place, (), None), usage))
        elif (left := _left_as(found, usage, parameters)) is not None:
            counts[left] = counts.get(left, 0) + 1
        else:
            wanted.append((found, msgspec.structs.replace(usage, revision=found.next_revision)))
    counts["corrected"] = len(wanted)
    rating = await Rating.of(connection, wanted, task)
    changes = []
    # In order of use, so that it does not matter in which order they were staged.
    for found, usage in sorted(wanted, key=lambda each: each[0].place.in_order):
        if found.current is not None:
            rating.take_out(found.current)
        changes.append(Change(found, rating.rated(usage), rating.moves()))
    written = await records.write_and_record(connection, changes, task, heads=heads, counters=rating.moved())
    following = msgspec.structs.replace(cursor, done=cursor.done + len(rows))
    if len(rows) == EVENTS_MAX:
        following.number = rows[-1][0]
    else:
        following.is_settling = True
    return Slice(following, counts, written)


def _left_as(found: Found, usage: Usage, parameters: Parameters) -> str | None:
    """As what a use that was reported before is left; None: it becomes what is staged."""
    if not found.is_here:
        return "not_here"
    last = found.versions[-1] if found.versions else None
    if last is None or (last.account, last.type) != (usage.account, usage.type):
        return "conflicting"
    if found.place.occurred_at != usage.occurred_at:
        return "other_time"
    if found.is_void:
        return None if parameters.replace else "void"
    if is_same_data(last.data, usage.data):
        return "unchanged"
    return None if parameters.replace else "conflicting"


async def _find_known(connection: Connection, known: Mapping[Key, bytes]) -> dict[Key, Found]:
    """Uses that were reported before, as they stand."""
    if not known:
        return {}
    rows = await _fetch(
        connection,
        """
        SELECT partition, source, event_id, occurred_at FROM seen
        JOIN unnest(%s::smallint[], %s::text[], %s::text[]) AS asked (partition, source, event_id)
             USING (partition, source, event_id)
        """,
        [list(column) for column in zip(*known, strict=True)],
    )
    return await versions.find_uses(
        connection, [Place(partition, source, id, at.astimezone(UTC)) for partition, source, id, at in rows]
    )


async def _replace_slice(
    connection: Connection, correction: Correction, task: Task, parameters: Parameters, cursor: Cursor
) -> Slice:
    """Have the next of what the period holds be void."""
    heads = await store.lock_heads(connection, [parameters.partition])
    where, values = _to_be_void(correction, parameters, cursor.place)
    rows = await _fetch(
        connection,
        sql.SQL(
            "SELECT partition, source, event_id, occurred_at FROM usage_log AS l WHERE {}"
            " ORDER BY occurred_at, source, event_id LIMIT {}"
        ).format(where, sql.Literal(EVENTS_MAX)),
        values,
    )
    places = [Place(partition, source, id, at.astimezone(UTC)) for partition, source, id, at in rows]
    found = await versions.find_uses(connection, places)
    uses = [found[place.key] for place in places]
    rating = await Rating.of(connection, ((each, None) for each in uses), task)
    changes = []
    for each in uses:
        if each.current is not None:
            rating.take_out(each.current)
        changes.append(Change(each, Voided(), rating.moves()))
    written = await records.write_and_record(connection, changes, task, heads=heads, counters=rating.moved())
    following = msgspec.structs.replace(cursor, done=cursor.done + len(rows))
    if len(rows) == EVENTS_MAX:
        last = places[-1]
        following = msgspec.structs.replace(following, place=(last.occurred_at.isoformat(), last.source, last.event_id))
    else:
        following = msgspec.structs.replace(following, is_replacing=False, place=None)
    counts = {"events": len(rows), "corrected": len(rows), "replaced": len(rows)}
    return Slice(following, counts, written)


async def _settle_slice(connection: Connection, task: Task, parameters: Parameters, cursor: Cursor) -> Slice:
    """Charge what is owed of a period since some of it became void, and nothing that is staged has taken it up."""
    heads = await store.lock_heads(connection, [parameters.partition])
    found = await _fetch(
        connection,
        """
        SELECT account, price_id, period, quantity, credit FROM price_counters
        WHERE partition = %s AND (account = %s OR %s AND starts_with(account, %s)) AND credit > 0 AND period < %s
        """,
        [parameters.partition, parameters.account, parameters.tree, f"{parameters.account}/", parameters.until],
    )
    counters: dict[CounterKey, Counter] = {
        (parameters.partition, account, price, period.astimezone(UTC)): Counter(quantity=quantity, credit=credit)
        for account, price, period, quantity, credit in found
        if _ends_after(parameters.since, price, period.astimezone(UTC), book=task.book)
    }
    counters.update(task.counters)
    settled: carrying.Changes = {}
    moved: dict[CounterKey, Counter] = {}
    for key, counter in sorted(counters.items()):
        if counter.credit > 0 and len(settled) < EVENTS_MAX:
            left = await carrying.settle(connection, key, counter.credit, settled, book=task.book, not_of=task.id)
            moved[key] = Counter(quantity=counter.quantity, credit=left)
    written = await records.write_and_record(connection, list(settled.values()), task, heads=heads, counters=moved)
    await records.settle_items(connection, task.id, written.items)
    following = cursor if len(settled) == EVENTS_MAX else None
    return Slice(following, {"settled": len(settled)} if settled else {}, written)


def _ends_after(time: datetime, price_id: str, period: datetime, *, book: PriceBook) -> bool:
    """Whether a counter counts any use from a time on."""
    price = book.counted_price(price_id)
    if price is None or price.period is None:
        raise VersionNotRead(f"with {price_id}")
    return period_end(price.period, period) > time


def _to_be_void(
    correction: Correction, parameters: Parameters, place: tuple[str, str, str] | None
) -> tuple[sql.Composable, dict[str, object]]:
    """What the period holds and is not staged, after a place."""
    below = " OR starts_with(account, %(account)s || '/')" if parameters.tree else ""
    values: dict[str, object] = {
        "partition": parameters.partition,
        "account": parameters.account,
        "since": parameters.since,
        "until": parameters.until,
        "correction": correction.id,
    }
    after = ""
    if place is not None:
        values |= dict(zip(("at", "source", "event_id"), place, strict=True))
        after = (
            " AND occurred_at >= %(at)s::timestamptz"
            " AND (occurred_at, source, event_id) > (%(at)s::timestamptz, %(source)s::text, %(event_id)s::text)"
        )
    return (
        sql.SQL(
            "partition = %(partition)s AND NOT superseded AND occurred_at >= %(since)s AND occurred_at < %(until)s"
            f" AND (account = %(account)s{below}){after}"
            " AND NOT EXISTS (SELECT FROM correction_events AS e WHERE e.partition = l.partition"
            " AND e.correction = %(correction)s AND e.source = l.source AND e.event_id = l.event_id)"
        ),
        values,
    )


async def _fetch(connection: Connection, statement: Any, values: Any) -> list[Any]:
    cursor = await connection.execute(statement, values)
    return await cursor.fetchall()
