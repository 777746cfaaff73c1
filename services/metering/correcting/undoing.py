"""Undoing a correction: use by use, by the same difference. What was corrected since is left as it is."""

from datetime import timedelta

import msgspec

from contracts.envelope import read_usage_event
from contracts.partition import PARTITION_COUNT
from services.metering import store
from services.metering.correcting import carrying, records, versions
from services.metering.correcting.changing import (
    Change,
    Rating,
    Slice,
    Task,
    Voided,
    WaitsForAlias,
    charged_again,
    counts_of,
    write,
)
from services.metering.correcting.records import ItemPlace, RecordedItem
from services.metering.correcting.rerating import EVENTS_MAX
from services.metering.correcting.versions import Found, LoggedVersion, Place
from services.metering.domain.prices import CounterKey, PriceBook
from services.metering.domain.usage import Usage
from services.metering.queries.archive import PeriodArchived, check_not_archived, find_archived
from services.metering.store import Connection
from services.metering.translate import FORWARDED_BYTES_MAX


class Cursor(msgspec.Struct):
    """How far an undoing is: behind the last use that was looked at. What was done last is undone first."""

    of: int
    done: int = 0
    before: ItemPlace | None = None


async def first_cursor(connection: Connection, correction: str) -> Cursor:
    """Where it begins, and of how many uses."""
    cursor = await connection.execute(
        "SELECT count(*) FROM correction_items WHERE partition = ANY(%s) AND correction = %s",
        [list(range(PARTITION_COUNT)), correction],
    )
    ((count,),) = await cursor.fetchall()
    return Cursor(of=count)


async def check_undoable(connection: Connection, correction: str) -> None:
    """PeriodArchived, if a use that it corrected is archived."""
    if not (archived := await find_archived(connection)):
        return
    cursor = await connection.execute(
        """
        SELECT DISTINCT date_trunc('month', occurred_at AT TIME ZONE 'UTC')::date FROM correction_items
        WHERE partition = ANY(%s) AND correction = %s AND NOT undone
        """,
        [list(range(PARTITION_COUNT)), correction],
    )
    if months := sorted({month for (month,) in await cursor.fetchall()}.intersection(archived)):
        raise PeriodArchived(months)


async def undo_slice(connection: Connection, task: Task, cursor: Cursor) -> Slice:
    """Undo what was done to the next uses, in the caller's transaction. VersionNotRead, PeriodArchived."""
    items = await records.items_before(connection, task.id, cursor.before, limit=EVENTS_MAX)
    heads = await store.lock_heads(connection, {each.partition for each in items})
    places = {
        each.key: Place(each.partition, each.source, each.event_id, each.occurred_at)
        for each in items
        if not each.undone
    }
    uses = await versions.find_uses(connection, list(places.values()))
    for each in uses.values():
        if not each.is_here:
            at = each.place.occurred_at
            await check_not_archived(connection, since=at, until=at + timedelta(microseconds=1))
    undone = [(each, uses[each.key]) for each in items if each.key in places and _stands(each, uses[each.key])]
    rating = await Rating.of(
        connection,
        [(found, _anew(item, found)) for item, found in undone],
        task,
        further={
            *(key for item, found in undone for key in _keys_of(_before(item, found), task.book)),
            *(each.key for item, _ in undone for each in item.moves),
        },
    )
    changes = [_restored(item, found, rating, task) for item, found in undone]
    # What was counted since makes others cost more or less than before it was corrected.
    settled = await carrying.settle_corrected(connection, changes, rating, task)
    written = await write(connection, [*changes, *settled], task, heads=heads, counters=rating.moved())
    revisions = {each.key: each.to_revision for each in written.items}
    await records.settle_items(connection, task.id, [each for each in written.items if each.key not in places])
    await records.undo_items(connection, [(item, revisions[item.key]) for item, _ in undone])
    following = None
    if len(items) == EVENTS_MAX:
        following = Cursor(of=cursor.of, done=cursor.done + len(items), before=items[-1].place)
    counts = {"undone": len(undone), "left": len(places) - len(undone)}
    return Slice(following, counts, written)


def _stands(item: RecordedItem, found: Found) -> bool:
    """Whether the use still is what the correction made of it."""
    if item.to_revision is None:
        # Void, and by this: a version later than it was would be somebody else's.
        last = found.versions[-1].revision if found.versions else item.from_revision
        return found.is_void and last == item.from_revision
    if item.body is not None:
        waiting = found.waiting
        return waiting is not None and waiting.body is not None and waiting.revision == item.stands_as
    return found.current is not None and found.revision == item.stands_as


def _before(item: RecordedItem, found: Found) -> LoggedVersion | None:
    """The version that was before the correction, if it is logged."""
    return _version(found, item.from_revision)


def _version(found: Found, revision: int | None) -> LoggedVersion | None:
    return next((each for each in found.versions if each.revision == revision), None)


def _anew(item: RecordedItem, found: Found) -> Usage | None:
    """The use as it was, if it waited: it is charged by what is known now."""
    before = _before(item, found)
    if before is None or before.price_version is not None:
        return None
    return msgspec.structs.replace(before.usage(), revision=found.next_revision)


def _keys_of(version: LoggedVersion | None, book: PriceBook) -> list[CounterKey]:
    return [] if version is None else [share.key for share in counts_of(version, book).shares]


def _recount(item: RecordedItem, found: Found, rating: Rating) -> None:
    """Have counters stand as if the correction had not been.

    They go back the way they came; if they count something else by now, by what the use takes out and puts in there.
    """
    before, current = _before(item, found), found.current
    if current is not None and not item.charged:
        # It had waited, and was charged since.
        rating.take_out(current)
        current = None
    own = [each for each in item.moves if each.at is not None]
    if not rating.stands_at(own):
        if current is not None:
            rating.take_out(current)
        if before is not None:
            rating.put_in(before)
        own = []
    elif current is not None and (made := _version(found, item.to_revision)) is not None:
        # What was settled of it since is carried again.
        rating.carry(made, current)
    rating.move_back([*own, *(each for each in item.moves if each.at is None)])


def _restored(item: RecordedItem, found: Found, rating: Rating, task: Task) -> Change:
    _recount(item, found, rating)
    if item.body is not None:
        event, _ = read_usage_event(item.body, bytes_max=FORWARDED_BYTES_MAX)
        last = found.waiting.revision if found.waiting is not None else item.from_revision or 0
        return Change(found, WaitsForAlias(item.body, event.subject, last + 1))
    before = _before(item, found)
    if before is None:
        return Change(found, Voided())
    anew = _anew(item, found)
    if anew is not None:
        return Change(found, rating.rated(anew))
    return Change(found, charged_again(before, revision=found.next_revision, units=task.book.units))
