"""What a process does of long corrections: slice by slice, each a transaction that says how far it is.

Whoever has a correction's row locked goes on with it; who dies leaves it to the next, where the last slice ended.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, assert_never

import msgspec

from services.kit.clock import now
from services.kit.database import DATABASE_AWAY, Writer
from services.kit.outbox import OutboxRow
from services.kit.telemetry import FAULTS, get_logger
from services.kit.worker import Worker
from services.metering.correcting import backfilling, records, rerating, undoing
from services.metering.correcting.changing import Item, Task, VersionNotRead
from services.metering.correcting.records import Correction, Progress
from services.metering.domain.corrections import Amounts, State
from services.metering.domain.prices import PriceBook
from services.metering.engine import PriceKeeper
from services.metering.queries.archive import whole
from services.metering.store import Connection

log = get_logger(__name__)

POLL_SECONDS: Final = 0.5
RETRY_SECONDS: Final = 5.0
# A dry run looks at no more than that, and for no longer.
DRY_RUN_EVENTS_MAX: Final = 10_000
DRY_RUN_SECONDS_MAX: Final = 8.0
# Whoever is stuck holds its heads' locks against ingest no longer than this.
TRANSACTION_TIMEOUT: Final = "15s"


@dataclass(frozen=True, slots=True)
class Step:
    """What one transaction of a correction came to. `cursor` is JSON; None: it was the last."""

    cursor: str | None
    counts: Mapping[str, int]
    items: Sequence[Item]
    rows: Sequence[OutboxRow]


async def step(connection: Connection, correction: Correction, cursor: str | None, *, book: PriceBook) -> Step:
    """The next slice of a correction, in the transaction that has its row locked. VersionNotRead, PeriodArchived."""
    if correction.state == "undoing":
        return await _undo_step(connection, correction, cursor, book=book)
    match correction.kind:
        case "rerate":
            return await _rerate_step(connection, correction, cursor, book=book)
        case "backfill":
            return await _backfill_step(connection, correction, cursor, book=book)
        case "void" | "amend" | "settle":
            raise AssertionError(f"{correction.id} is done as soon as it is recorded")
        case _:
            assert_never(correction.kind)


async def _rerate_step(connection: Connection, correction: Correction, cursor: str | None, *, book: PriceBook) -> Step:
    parameters = msgspec.json.decode(correction.parameters, type=rerating.Parameters)
    if cursor is None:
        begin = await rerating.first_cursor(connection, parameters)
        return Step(None if begin is None else msgspec.json.encode(begin).decode(), {}, (), ())
    at = msgspec.json.decode(cursor, type=rerating.Cursor)
    # What is archived meanwhile is not there to be looked at: it waits until that is restored.
    async with whole(connection, since=parameters.since, until=parameters.until):
        found = await rerating.rerate_slice(connection, Task(correction.id, correction.reason, book), parameters, at)
    following = None if found.cursor is None else msgspec.json.encode(found.cursor).decode()
    return Step(following, found.counts, found.written.items, found.written.rows)


async def _backfill_step(
    connection: Connection, correction: Correction, cursor: str | None, *, book: PriceBook
) -> Step:
    parameters = msgspec.json.decode(correction.parameters, type=backfilling.Parameters)
    if cursor is None:
        begin = await backfilling.first_cursor(connection, correction, parameters)
        return Step(msgspec.json.encode(begin).decode(), {}, (), ())
    at = msgspec.json.decode(cursor, type=backfilling.Cursor)
    task = Task(correction.id, correction.reason, book)
    async with whole(connection, since=parameters.since, until=parameters.until):
        found = await backfilling.apply_slice(connection, correction, task, parameters, at)
    following = None if found.cursor is None else msgspec.json.encode(found.cursor).decode()
    return Step(following, found.counts, found.written.items, found.written.rows)


async def _undo_step(connection: Connection, correction: Correction, cursor: str | None, *, book: PriceBook) -> Step:
    if cursor is None:
        begin = await undoing.first_cursor(connection, correction.id)
        return Step(msgspec.json.encode(begin).decode(), {}, (), ())
    at = msgspec.json.decode(cursor, type=undoing.Cursor)
    task = Task(correction.id, correction.undo_reason or correction.reason, book)
    found = await undoing.undo_slice(connection, task, at)
    following = None if found.cursor is None else msgspec.json.encode(found.cursor).decode()
    return Step(following, found.counts, found.written.items, found.written.rows)


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
    cursor: str | None = None
    deadline = time.monotonic() + DRY_RUN_SECONDS_MAX
    while True:
        async with connection.transaction(force_rollback=True):
            await connection.execute(f"SET LOCAL transaction_timeout = '{TRANSACTION_TIMEOUT}'")
            done = await step(connection, correction, cursor, book=book)
        for name, count in done.counts.items():
            found.counts[name] = found.counts.get(name, 0) + count
        found.items += done.items
        cursor = done.cursor
        if cursor is None:
            found.complete = True
            return found
        looked_at = max(found.counts.get("events", 0), len(found.items))
        if looked_at >= DRY_RUN_EVENTS_MAX or time.monotonic() > deadline:
            return found


class Corrector(Worker):
    """Goes on with corrections that are under way, of whichever process they were asked."""

    def __init__(
        self,
        *,
        writer: Writer,
        prices: PriceKeeper,
        notify: Callable[[Sequence[OutboxRow]], None],
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`writer` is the corrector's own. `notify` is told what has been committed to the outbox."""
        super().__init__(place="metering.correct", poll_seconds=poll_seconds)
        self._writer = writer
        self._prices = prices
        self._notify = notify
        # Those that failed, and when they are tried again: they must not hold up the others.
        self._failed: dict[str, float] = {}

    async def round(self) -> bool:
        """One slice of one correction; False: there is none."""
        id: str | None = None
        try:
            async with self._writer.transaction() as connection:
                found = await records.find_under_way(connection, without=self._put_off())
                if found is None:
                    return False
                id = found.id
                done = await step(connection, found, found.cursor, book=self._prices.book())
                progress = _progress(found, done)
                await records.write_progress(connection, id, progress)
        except VersionNotRead as error:
            assert id is not None
            log.info("correction waits for the price book", id=id, reason=str(error))
            self._failed[id] = time.monotonic() + self._poll_seconds
            with suppress(ValueError):
                await self._prices.refresh()
            return True
        except DATABASE_AWAY:
            raise
        except Exception as error:
            FAULTS.labels(place="metering.correction").inc()
            log.error("correction fails, it is tried again", id=id, retry_seconds=RETRY_SECONDS, exc_info=error)
            if id is None:
                raise
            self._failed[id] = time.monotonic() + RETRY_SECONDS
            return True
        self._notify(done.rows)
        if done.cursor is None:
            log.info("correction finished", id=id, state=progress.state, **progress.counts)
        return True

    def _put_off(self) -> Collection[str]:
        present = time.monotonic()
        self._failed = {id: until for id, until in self._failed.items() if until > present}
        return self._failed


def _progress(found: Correction, done: Step) -> Progress:
    counts: dict[str, int] = msgspec.json.decode(found.counts)
    for name, count in done.counts.items():
        counts[name] = counts.get(name, 0) + count
    difference: Amounts = records.amounts_from(found.difference)
    state: State = found.state
    finished_at = found.finished_at
    if found.state == "running":
        for each in done.items:
            difference = records.sum_of(difference, each.difference)
    if done.cursor is None:
        state = "done" if found.state == "running" else "undone"
        finished_at = finished_at or now()
    return Progress(state, done.cursor, counts, difference, finished_at)
