"""What a process does of long corrections: slice by slice, each a transaction that says how far it is.

Whoever has a correction's row locked goes on with it; who dies leaves it to the next, where the last slice ended.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Final, assert_never

import msgspec

from contracts.pricing import Counter
from services.kit.clock import now
from services.metering.correcting import backfilling, records, rerating, undoing
from services.metering.correcting.changing import Item, Slice, Task
from services.metering.correcting.records import Correction, Progress
from services.metering.correcting.turns import InTurn, Turn
from services.metering.domain.corrections import Amounts, Counters, State
from services.metering.domain.prices import CounterKey, PriceBook
from services.metering.queries.archive import whole
from services.metering.store import Connection

# A dry run looks at no more than that, and for no longer.
DRY_RUN_EVENTS_MAX: Final = 10_000
DRY_RUN_SECONDS_MAX: Final = 8.0
# Whoever is stuck holds its heads' locks against ingest no longer than this.
TRANSACTION_TIMEOUT: Final = "15s"
_NONE: Final[Counters] = {}


async def step(
    connection: Connection, correction: Correction, cursor: str | None, *, book: PriceBook, counters: Counters = _NONE
) -> Slice:
    """The next slice of a correction, in the transaction that has its row locked; the first says where it begins.

    `counters` are those that the slices before it moved, if that was taken back. VersionNotRead, PeriodArchived.
    """
    task = Task(correction.id, correction.reason, book, counters)
    if correction.state == "undoing":
        return await _undo(connection, correction, cursor, task)
    match correction.kind:
        case "rerate":
            return await _rerate(connection, correction, cursor, task)
        case "backfill":
            return await _backfill(connection, correction, cursor, task)
        case "void" | "amend" | "settle":
            raise AssertionError(f"{correction.id} is done as soon as it is recorded")
        case _:
            assert_never(correction.kind)


async def _rerate(connection: Connection, correction: Correction, cursor: str | None, task: Task) -> Slice:
    parameters = msgspec.json.decode(correction.parameters, type=rerating.Parameters)
    if cursor is None:
        return Slice(await rerating.first_cursor(connection, parameters))
    at = msgspec.json.decode(cursor, type=rerating.Cursor)
    # What is archived meanwhile is not there to be looked at: it waits until that is restored.
    async with whole(connection, since=parameters.since, until=parameters.until):
        return await rerating.rerate_slice(connection, task, parameters, at)


async def _backfill(connection: Connection, correction: Correction, cursor: str | None, task: Task) -> Slice:
    parameters = msgspec.json.decode(correction.parameters, type=backfilling.Parameters)
    if cursor is None:
        return Slice(await backfilling.first_cursor(connection, correction, parameters))
    at = msgspec.json.decode(cursor, type=backfilling.Cursor)
    async with whole(connection, since=parameters.since, until=parameters.until):
        return await backfilling.apply_slice(connection, correction, task, parameters, at)


async def _undo(connection: Connection, correction: Correction, cursor: str | None, task: Task) -> Slice:
    if cursor is None:
        return Slice(await undoing.first_cursor(connection, correction.id))
    task = replace(task, reason=correction.undo_reason or correction.reason)
    return await undoing.undo_slice(connection, task, msgspec.json.decode(cursor, type=undoing.Cursor))


def _as_json(cursor: msgspec.Struct | None) -> str | None:
    return None if cursor is None else msgspec.json.encode(cursor).decode()


@dataclass(slots=True)
class Preview:
    """What a correction would come to. `complete`: all of it was looked at."""

    counts: dict[str, int] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)
    complete: bool = False


async def preview(connection: Connection, correction: Correction, *, book: PriceBook) -> Preview:
    """What a correction would come to: slice by slice, each done and taken back. VersionNotRead, PeriodArchived.

    The connection commits by itself.
    """
    found = Preview()
    counters: dict[CounterKey, Counter] = {}
    cursor: str | None = None
    deadline = time.monotonic() + DRY_RUN_SECONDS_MAX
    while True:
        async with connection.transaction(force_rollback=True):
            await connection.execute(f"SET LOCAL transaction_timeout = '{TRANSACTION_TIMEOUT}'")
            done = await step(connection, correction, cursor, book=book, counters=counters)
        counters |= done.written.counters
        for name, count in done.counts.items():
            found.counts[name] = found.counts.get(name, 0) + count
        found.items += done.written.items
        cursor = _as_json(done.cursor)
        if cursor is None:
            found.complete = True
            return found
        looked_at = max(found.counts.get("events", 0), len(found.items))
        if looked_at >= DRY_RUN_EVENTS_MAX or time.monotonic() > deadline:
            return found


class Corrector(InTurn[str]):
    """Goes on with corrections that are under way, of whichever process they were asked."""

    place = "metering.correct"
    poll_seconds = 0.5
    retry_seconds = 5.0

    async def find(self, connection: Connection, *, without: Collection[str]) -> str | None:
        """The id of the oldest one, locked: nobody else goes on with it meanwhile."""
        return await records.find_under_way(connection, without=without)

    async def go_on(self, connection: Connection, id: str) -> Turn:
        """Do the next slice, and record that."""
        found = await records.find(connection, id)
        assert found is not None
        done = await step(connection, found, found.cursor, book=self._prices.book())
        progress = _progress(found, done)
        await records.write_progress(connection, id, progress)
        finished = {"state": progress.state, **progress.counts} if done.cursor is None else None
        return Turn(done.written.rows, finished=finished)


def _progress(found: Correction, done: Slice) -> Progress:
    counts: dict[str, int] = msgspec.json.decode(found.counts)
    for name, count in done.counts.items():
        counts[name] = counts.get(name, 0) + count
    difference: Amounts = records.amounts_from(found.difference)
    state: State = found.state
    finished_at = found.finished_at
    if found.state == "running":
        for each in done.written.items:
            difference = records.sum_of(difference, each.difference)
    if done.cursor is None:
        state = "done" if found.state == "running" else "undone"
        finished_at = finished_at or now()
    return Progress(state, _as_json(done.cursor), counts, difference, finished_at)
