"""The outbox: what a service says is written with its effect, gapless per partition, and relayed in that order.

One relay per partition is meant to run; a second one (of a deposed owner) only repeats what consumers tolerate.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import msgspec
import psycopg
from nats.aio.client import Client
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import PoolTimeout
from sqlalchemy import TIMESTAMP, BigInteger, Column, LargeBinary, MetaData, SmallInteger, Table, Text

from contracts.partition import PARTITION_COUNT
from services.kit.database import Pool
from services.kit.publish import Message, PublishFailed, publish_batch
from services.kit.telemetry import FAULTS, OUTBOX_BLOCKED, get_logger

log = get_logger(__name__)

RETRY_SECONDS_MIN: Final = 0.1
RETRY_SECONDS_MAX: Final = 5.0
# Rows of a partition kept in memory; beyond, they are read from the table when their turn comes.
LANE_ROWS_MAX: Final = 2_000
# How far a relay got is stored now and then: who dies in between publishes a little once more.
STORE_EVERY_SECONDS: Final = 0.1
# A lone row goes out at once; what comes right behind it is gathered for so long: each batch is a write to disk.
GATHER_SECONDS: Final = 0.02
PRUNE_EVERY_SECONDS: Final = 30.0
PRUNE_ROWS_MAX: Final = 20_000


class OutboxRow(msgspec.Struct, frozen=True, gc=False):
    """One message: `number` is the next one of its partition, from 1, without gaps."""

    partition: int
    number: int
    subject: str
    message_id: str
    payload: bytes
    recorded_at: datetime


def outbox_table(metadata: MetaData) -> Table:
    """The table `outbox`."""
    return Table(
        "outbox",
        metadata,
        Column("partition", SmallInteger, primary_key=True),
        Column("number", BigInteger, primary_key=True),
        Column("subject", Text, nullable=False),
        Column("message_id", Text, nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("recorded_at", TIMESTAMP(timezone=True), nullable=False),
    )


def relayed_table(metadata: MetaData) -> Table:
    """The table `relayed`: up to which number a partition's outbox has been published. A partition without row: 0."""
    return Table(
        "relayed",
        metadata,
        Column("partition", SmallInteger, primary_key=True, autoincrement=False),
        Column("number", BigInteger, nullable=False),
    )


async def stage(connection: AsyncConnection[TupleRow], rows: Sequence[OutboxRow]) -> None:
    """Write rows in the caller's transaction, in one statement. Never commits; after that tell `Relay.notify`."""
    if not rows:
        return
    await connection.execute(
        """
        INSERT INTO outbox (partition, number, subject, message_id, payload, recorded_at)
        SELECT unnest(%s::smallint[]), unnest(%s::bigint[]), unnest(%s::text[]), unnest(%s::text[]),
               unnest(%b::bytea[]), unnest(%s::timestamptz[])
        """,
        [
            [row.partition for row in rows],
            [row.number for row in rows],
            [row.subject for row in rows],
            [row.message_id for row in rows],
            [row.payload for row in rows],
            [row.recorded_at for row in rows],
        ],
    )


class Relay:
    """Publishes the outbox of the partitions this process owns to one stream, in number order per partition.

    A partition stops at its first failure and is tried again after a growing delay; the others go on. After a restart
    it continues from `relayed`. `run` is one task; the other methods may be called from any task of the loop.
    """

    def __init__(
        self,
        *,
        client: Client,
        stream: str,
        pool: Pool,
        poll_seconds: float = 0.2,
        keep_seconds: float | None = None,
        batch_size_max: int = 1000,
    ) -> None:
        """`poll_seconds`: how soon rows are found that nobody told of. `keep_seconds`: relayed rows older than that are
        deleted; null keeps them all."""
        self._client = client
        self._stream = stream
        self._pool = pool
        self._poll_seconds = poll_seconds
        self._keep_seconds = keep_seconds
        self._batch_size_max = batch_size_max
        self._lanes: dict[int, _Lane] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._polled_at = 0.0
        # Published, by partition, and not stored as `relayed` yet.
        self._reached: dict[int, int] = {}
        self._stored_at = 0.0
        self._pruned_at = time.monotonic()

    @property
    def partitions(self) -> frozenset[int]:
        """What this relay publishes."""
        return frozenset(self._lanes)

    def own(self, partitions: Iterable[int]) -> None:
        """Begin to relay partitions: their lease has been acquired."""
        for partition in partitions:
            self._lanes.setdefault(partition, _Lane())
        self._wake.set()

    def disown(self, partitions: Iterable[int]) -> None:
        """Stop relaying partitions. What is being published right now may still go out."""
        for partition in partitions:
            self._lanes.pop(partition, None)

    def notify(self, rows: Iterable[OutboxRow]) -> None:
        """Tell of rows that have just been committed; they need not be read again."""
        for row in rows:
            lane = self._lanes.get(row.partition)
            if lane is not None:
                lane.push(row)
        self._wake.set()

    async def run(self) -> None:
        """Relay until `stop`."""
        delay = RETRY_SECONDS_MIN
        while not self._stopping:
            try:
                count = await self._relay_once()
                if not count:
                    await self._sleep(self._poll_seconds)
                elif count < self._batch_size_max:
                    await asyncio.sleep(GATHER_SECONDS)
                delay = RETRY_SECONDS_MIN
            except (psycopg.OperationalError, PoolTimeout) as error:
                FAULTS.labels(place=f"relay.{self._stream}").inc()
                log.error("outbox not readable", stream=self._stream, retry_seconds=delay, error=str(error).strip())
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_SECONDS_MAX)
        with suppress(psycopg.OperationalError, PoolTimeout):
            await self._store()

    def stop(self) -> None:
        """Let `run` return after the batch in hand."""
        self._stopping = True
        self._wake.set()

    async def _relay_once(self) -> int:
        """One round of load, publish, advance. How many rows there were to publish."""
        self._wake.clear()
        await self._load()
        rows = self._take()
        if rows:
            await self._publish(rows)
        if time.monotonic() - self._stored_at >= STORE_EVERY_SECONDS:
            await self._store()
        await self._prune()
        OUTBOX_BLOCKED.labels(stream=self._stream).set(sum(lane.failures > 0 for lane in self._lanes.values()))
        return len(rows)

    async def _load(self) -> None:
        """Read from the tables what is not in memory: at the start, after a gap, and now and then for all."""
        started = time.monotonic()
        poll = started - self._polled_at >= self._poll_seconds
        wanted = {
            partition: lane
            for partition, lane in self._lanes.items()
            if started >= lane.retry_at and not lane.rows and (poll or lane.incomplete)
        }
        if poll:
            self._polled_at = started
        if not wanted:
            return
        async with self._pool.connection() as connection:
            unknown = [partition for partition, lane in wanted.items() if lane.relayed is None]
            if unknown:
                cursor = await connection.execute(
                    "SELECT partition, number FROM relayed WHERE partition = ANY(%s)", [unknown]
                )
                relayed = {int(partition): int(number) for partition, number in await cursor.fetchall()}
                for partition in unknown:
                    wanted[partition].relayed = relayed.get(partition, 0)
            per_lane = max(self._batch_size_max // len(wanted), 10)
            for lane in wanted.values():
                lane.incomplete = False
            cursor = await connection.execute(
                """
                SELECT o.partition, o.number, o.subject, o.message_id, o.payload, o.recorded_at
                FROM (SELECT unnest(%s::smallint[]) AS partition, unnest(%s::bigint[]) AS number) AS w,
                     LATERAL (SELECT * FROM outbox WHERE partition = w.partition AND number > w.number
                              ORDER BY number LIMIT %s) AS o
                ORDER BY o.partition, o.number
                """,
                [list(wanted), [lane.relayed for lane in wanted.values()], per_lane],
            )
            found = [OutboxRow(*row) for row in await cursor.fetchall()]
        counts: dict[int, int] = {}
        for row in found:
            # A row may have been told of while the table was read.
            wanted[row.partition].push(row)
            counts[row.partition] = counts.get(row.partition, 0) + 1
        for partition, count in counts.items():
            lane = wanted[partition]
            lane.incomplete |= count == per_lane
            if not lane.rows:
                self._report_gap(partition, lane)

    def _report_gap(self, partition: int, lane: "_Lane") -> None:
        lane.fail()
        FAULTS.labels(place=f"relay.{self._stream}").inc()
        log.critical(
            "the outbox has a gap, nothing of this partition is relayed",
            stream=self._stream,
            partition=partition,
            missing_number=(lane.relayed or 0) + 1,
        )

    def _take(self) -> list[OutboxRow]:
        """The next rows of all partitions that may go on, in number order per partition."""
        present = time.monotonic()
        ready = [lane for lane in self._lanes.values() if lane.rows and present >= lane.retry_at]
        rows: list[OutboxRow] = []
        for waiting, lane in enumerate(ready):
            share = -(-(self._batch_size_max - len(rows)) // (len(ready) - waiting))
            rows.extend(lane.rows[place] for place in range(min(share, len(lane.rows))))
        return rows

    async def _publish(self, rows: Sequence[OutboxRow]) -> None:
        """Publish rows, and advance each partition to the number up to which all are confirmed."""
        messages = [Message(row.subject, row.payload, row.message_id) for row in rows]
        lanes = [row.partition for row in rows]
        failed: Mapping[int, str] = {}
        try:
            await publish_batch(self._client, stream=self._stream, messages=messages, lanes=lanes)
        except PublishFailed as error:
            failed = error.failed
        reached: dict[int, int] = {}
        stopped: dict[int, str] = {}
        for place, row in enumerate(rows):
            if row.partition in stopped:
                continue
            if place in failed:
                stopped[row.partition] = failed[place]
            else:
                reached[row.partition] = row.number
        # The failure comes second: an advance forgets earlier failures.
        self._advance(reached)
        for partition, reason in stopped.items():
            if lane := self._lanes.get(partition):
                lane.fail()
                FAULTS.labels(place=f"relay.{self._stream}").inc()
                log.error(
                    "outbox message not published, its partition waits",
                    stream=self._stream,
                    partition=partition,
                    number=reached.get(partition, lane.relayed or 0) + 1,
                    failures=lane.failures,
                    reason=reason,
                )

    def _advance(self, reached: Mapping[int, int]) -> None:
        for partition, number in reached.items():
            if lane := self._lanes.get(partition):
                lane.advance(number)
        self._reached.update(reached)

    async def _store(self) -> None:
        """Store how far it got. Losing this in a crash means publishing once more, which consumers tolerate."""
        if not self._reached:
            return
        reached = dict(sorted(self._reached.items()))
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("SET LOCAL synchronous_commit = off")
            await connection.execute(
                """
                INSERT INTO relayed AS r (partition, number) SELECT unnest(%s::smallint[]), unnest(%s::bigint[])
                ON CONFLICT (partition) DO UPDATE SET number = excluded.number WHERE r.number < excluded.number
                """,
                [list(reached), list(reached.values())],
            )
        self._reached.clear()
        self._stored_at = time.monotonic()

    async def _prune(self) -> None:
        if self._keep_seconds is None or time.monotonic() - self._pruned_at < PRUNE_EVERY_SECONDS or not self._lanes:
            return
        self._pruned_at = time.monotonic()
        async with self._pool.connection() as connection:
            await prune(connection, partitions=list(self._lanes), keep_seconds=self._keep_seconds)

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass


async def prune(connection: AsyncConnection[TupleRow], *, partitions: Sequence[int], keep_seconds: float) -> int:
    """Delete relayed rows older than `keep_seconds`, a bounded number at once; how many were deleted."""
    cursor = await connection.execute(
        """
        DELETE FROM outbox WHERE (partition, number) IN (
            SELECT o.partition, o.number FROM relayed r
            CROSS JOIN LATERAL (
                SELECT partition, number FROM outbox
                WHERE partition = r.partition AND number <= r.number
                  AND recorded_at < clock_timestamp() - make_interval(secs => %s)
                ORDER BY number LIMIT %s
            ) AS o
            WHERE r.partition = ANY(%s)
        )
        """,
        [keep_seconds, PRUNE_ROWS_MAX // PARTITION_COUNT, list(partitions)],
    )
    return cursor.rowcount


@dataclass(slots=True)
class _Lane:
    """One partition: `rows` follow `relayed` without a gap; `incomplete`: the table has more."""

    relayed: int | None = None
    rows: deque[OutboxRow] = field(default_factory=deque)
    incomplete: bool = True
    failures: int = 0
    retry_at: float = 0.0

    def push(self, row: OutboxRow) -> None:
        """Append the row if it is the next one; otherwise it is found in the table later, or is here already."""
        last = self.rows[-1].number if self.rows else self.relayed
        if last is None or row.number > last + 1 or len(self.rows) >= LANE_ROWS_MAX:
            self.incomplete = True
        elif row.number == last + 1:
            self.rows.append(row)

    def advance(self, number: int) -> None:
        """Everything up to `number` is published."""
        self.failures = 0
        self.retry_at = 0.0
        self.relayed = max(self.relayed or 0, number)
        while self.rows and self.rows[0].number <= number:
            self.rows.popleft()

    def fail(self) -> None:
        """Wait before the next attempt, longer each time."""
        self.failures += 1
        self.retry_at = time.monotonic() + min(RETRY_SECONDS_MIN * 2 ** min(self.failures - 1, 10), RETRY_SECONDS_MAX)
