"""Partition leases: at most one owner per partition believes in it at a time, and an epoch unmasks one that is late.

They are shared out by groups, whose charges have one consumer. The lease only avoids useless work: what makes a deposed
owner harmless is that every commit is conditional on the partition's head row, which carries the epoch.
"""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import psycopg
from sqlalchemy import TIMESTAMP, BigInteger, Column, MetaData, SmallInteger, Table, Text

from contracts.partition import GROUP_COUNT, GROUP_SIZE, PARTITION_COUNT, group_of
from services.kit.database import Writer
from services.kit.telemetry import FAULTS, LEASES_HELD, get_logger

log = get_logger(__name__)

# Part of the time to live after which an owner that cannot renew stops believing, before others may take over.
_BELIEVED_SHARE: Final = 0.9


class Deposed(Exception):
    """Another owner has taken the partition: what was being committed on it must not be."""

    def __init__(self, *, partition: int, epoch: int) -> None:
        super().__init__(f"partition {partition} has another owner than the one of epoch {epoch}")
        self.partition = partition
        self.epoch = epoch


def leases_table(metadata: MetaData) -> Table:
    """The table `leases`. An owner adds the rows when it first looks."""
    return Table(
        "leases",
        metadata,
        Column("partition", SmallInteger, primary_key=True, autoincrement=False),
        Column("owner", Text),
        Column("epoch", BigInteger, nullable=False),
        Column("expires_at", TIMESTAMP(timezone=True), nullable=False),
    )


def members_table(metadata: MetaData) -> Table:
    """The table `members`: who is there to share the partitions with."""
    return Table(
        "members",
        metadata,
        Column("owner", Text, primary_key=True),
        Column("seen_at", TIMESTAMP(timezone=True), nullable=False),
    )


def owner_name(service: str) -> str:
    """A name for this process that no other process has, ever."""
    return f"{service}@{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


def fair_share(members: int) -> int:
    """How many partitions one of `members` may hold: whole groups."""
    return GROUP_SIZE * -(-GROUP_COUNT // max(members, 1))


def surplus(held: Mapping[int, int], *, members: int) -> list[int]:
    """Which of the partitions held (with their epochs) are too many: those of the groups acquired last."""
    acquired: dict[int, int] = {}
    for partition, epoch in held.items():
        group = group_of(partition)
        acquired[group] = max(acquired.get(group, 0), epoch)
    staying = sorted(acquired, key=lambda group: (acquired[group], group))[: fair_share(members) // GROUP_SIZE]
    return [partition for partition in held if group_of(partition) not in staying]


@dataclass(slots=True)
class _Held:
    epoch: int
    believed_until: float
    leaving: bool = False


class LeaseKeeper:
    """Holds a fair share of the partitions for one process, and tells it of each one won and lost.

    `on_acquired` and `on_lost` run one after the other, never at once, in a task of their own; renewals go on
    meanwhile. A partition given back is lost gracefully: it is held until `on_lost` returns, then released. One
    whose lease could not be renewed is no longer held when `on_lost` is called. A partition whose `on_acquired`
    raises is given back.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        owner: str,
        ttl_seconds: float,
        on_acquired: Callable[[frozenset[int]], Awaitable[None]],
        on_lost: Callable[[frozenset[int]], Awaitable[None]],
        name: str = "leases",
    ) -> None:
        """`writer` is the keeper's own. All times are the database's; `name` labels the metric."""
        self._writer = writer
        self._owner = owner
        self._ttl_seconds = ttl_seconds
        self._on_acquired = on_acquired
        self._on_lost = on_lost
        self._name = name
        self._held: dict[int, _Held] = {}
        self._notices: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._database = asyncio.Lock()
        self._seeded = False
        self._stopping = asyncio.Event()

    def holds(self, partition: int) -> bool:
        """Whether this process owns the partition, as far as it can know right now."""
        return self.epoch(partition) is not None

    def epoch(self, partition: int) -> int | None:
        """The epoch of this process's lease on the partition; null if it does not hold it."""
        held = self._held.get(partition)
        return held.epoch if held is not None and time.monotonic() < held.believed_until else None

    @property
    def partitions(self) -> frozenset[int]:
        """All partitions held."""
        return frozenset(partition for partition in self._held if self.holds(partition))

    async def run(self) -> None:
        """Keep leases until `stop`, then give all back. One task runs it."""
        async with asyncio.TaskGroup() as tasks:
            notifier = tasks.create_task(self._notify())
            watch = tasks.create_task(self._watch())
            while not self._stopping.is_set():
                await self._tick()
                await _wait(self._stopping, self._ttl_seconds / 3)
            watch.cancel()
            self._leave(frozenset(self._held))
            await self._notices.join()
            notifier.cancel()
            await self._resign()

    def stop(self) -> None:
        """Let `run` give everything back and return."""
        self._stopping.set()

    async def _tick(self) -> None:
        """Renew, then take what is free or give back what is too much."""
        try:
            async with asyncio.timeout(self._ttl_seconds), self._database:
                acquired, lost, members = await self._renew_and_acquire()
        except (psycopg.Error, TimeoutError) as error:
            FAULTS.labels(place=f"{self._name}.renew").inc()
            log.error("leases not renewed", owner=self._owner, error=repr(error))
            return
        if lost:
            log.error("leases taken by others", owner=self._owner, partitions=sorted(lost))
            self._lose(lost)
        if acquired:
            log.info("leases acquired", owner=self._owner, partitions=sorted(acquired), members=members)
            self._notices.put_nowait(lambda: self._acquired(acquired))
        staying = {partition: held.epoch for partition, held in self._held.items() if not held.leaving}
        self._leave(frozenset(surplus(staying, members=members)))
        LEASES_HELD.labels(name=self._name).set(len(self._held))

    async def _renew_and_acquire(self) -> tuple[frozenset[int], frozenset[int], int]:
        """What was acquired, what was lost to others, and how many members share."""
        believed_until = time.monotonic() + self._ttl_seconds * _BELIEVED_SHARE
        before = {partition: held.epoch for partition, held in self._held.items()}
        async with self._writer.transaction() as connection:
            cursor = await connection.execute(_SEE_MEMBERS, {"owner": self._owner, "ttl": self._ttl_seconds})
            members = int((await cursor.fetchone() or (1,))[0])
            cursor = await connection.execute(
                _RENEW,
                {
                    "owner": self._owner,
                    "ttl": self._ttl_seconds,
                    "partitions": list(before),
                    "epochs": list(before.values()),
                },
            )
            renewed = {int(row[0]) for row in await cursor.fetchall()}
            room = fair_share(members) - len(renewed)
            acquired: dict[int, int] = {}
            if room > 0 and not self._stopping.is_set():
                if not self._seeded:
                    await connection.execute(_SEED, [PARTITION_COUNT])
                cursor = await connection.execute(
                    _ACQUIRE,
                    {
                        "owner": self._owner,
                        "ttl": self._ttl_seconds,
                        "held": list(before),
                        "room": room,
                        "size": GROUP_SIZE,
                    },
                )
                acquired = {int(partition): int(epoch) for partition, epoch in await cursor.fetchall()}
        self._seeded = True
        for partition in renewed:
            if (held := self._held.get(partition)) is not None and held.epoch == before[partition]:
                held.believed_until = believed_until
        for partition, epoch in acquired.items():
            self._held[partition] = _Held(epoch=epoch, believed_until=believed_until)
        return frozenset(acquired), frozenset(before) - renewed - frozenset(acquired), members

    async def _watch(self) -> None:
        """Lose, in time, what could not be renewed."""
        while True:
            await asyncio.sleep(self._ttl_seconds / 20)
            present = time.monotonic()
            late = frozenset(partition for partition, held in self._held.items() if present >= held.believed_until)
            if late:
                log.error("leases lost: not renewed in time", owner=self._owner, partitions=sorted(late))
                self._lose(late)

    def _lose(self, partitions: frozenset[int]) -> None:
        for partition in partitions:
            self._held.pop(partition, None)
        self._notices.put_nowait(lambda: self._on_lost(partitions))

    def _leave(self, partitions: frozenset[int]) -> None:
        """Give partitions back: drain first, then release."""
        if not partitions:
            return
        epochs = {partition: self._held[partition].epoch for partition in partitions}
        for partition in partitions:
            self._held[partition].leaving = True

        async def leave() -> None:
            await self._on_lost(partitions)
            await self._release(epochs)
            log.info("leases given back", owner=self._owner, partitions=sorted(partitions))

        self._notices.put_nowait(leave)

    async def _acquired(self, partitions: frozenset[int]) -> None:
        still = frozenset(partition for partition in partitions if self.holds(partition))
        if not still:
            return
        try:
            await self._on_acquired(still)
        except Exception:
            FAULTS.labels(place=f"{self._name}.acquired").inc()
            log.exception("partitions cannot be taken over, given back", partitions=sorted(still))
            self._leave(still & frozenset(self._held))

    async def _release(self, epochs: Mapping[int, int]) -> None:
        for partition, epoch in epochs.items():
            if (held := self._held.get(partition)) is not None and held.epoch == epoch:
                del self._held[partition]
        try:
            async with asyncio.timeout(self._ttl_seconds), self._database, self._writer.transaction() as connection:
                await connection.execute(
                    _RELEASE, {"owner": self._owner, "partitions": list(epochs), "epochs": list(epochs.values())}
                )
        except (psycopg.Error, TimeoutError) as error:
            log.warning("leases not released, they will expire", partitions=sorted(epochs), error=repr(error))

    async def _resign(self) -> None:
        try:
            async with asyncio.timeout(self._ttl_seconds), self._database, self._writer.transaction() as connection:
                await connection.execute("DELETE FROM members WHERE owner = %s", [self._owner])
        except (psycopg.Error, TimeoutError) as error:
            log.warning("not signed off", owner=self._owner, error=repr(error))

    async def _notify(self) -> None:
        while True:
            notice = await self._notices.get()
            try:
                await notice()
            except Exception:
                FAULTS.labels(place=f"{self._name}.callback").inc()
                log.exception("lease callback failed", owner=self._owner)
            finally:
                self._notices.task_done()


_SEE_MEMBERS = """
WITH seen AS (
    INSERT INTO members (owner, seen_at) VALUES (%(owner)s, clock_timestamp())
    ON CONFLICT (owner) DO UPDATE SET seen_at = excluded.seen_at
), gone AS (
    DELETE FROM members WHERE owner <> %(owner)s
                          AND seen_at < clock_timestamp() - 20 * make_interval(secs => %(ttl)s)
)
SELECT 1 + count(*) FROM members
WHERE owner <> %(owner)s AND seen_at > clock_timestamp() - make_interval(secs => %(ttl)s)
"""

_RENEW = """
WITH mine AS (
    SELECT l.partition FROM leases l
    JOIN unnest(%(partitions)s::smallint[], %(epochs)s::bigint[]) AS m (partition, epoch) USING (partition, epoch)
    WHERE l.owner = %(owner)s ORDER BY l.partition FOR NO KEY UPDATE OF l
)
UPDATE leases l SET expires_at = clock_timestamp() + make_interval(secs => %(ttl)s)
FROM mine WHERE l.partition = mine.partition RETURNING l.partition
"""

_SEED = """
INSERT INTO leases (partition, epoch, expires_at)
SELECT partition, 0, '-infinity' FROM generate_series(0, %s - 1) AS p (partition) ON CONFLICT DO NOTHING
"""

# What is free, not renewed in time, or was this owner's own until it lost faith; of a group all that is not held, or
# nothing. Two that look for leases at once pass over each other's.
_ACQUIRE = """
WITH groups AS (
    SELECT partition / %(size)s AS number FROM leases GROUP BY 1
    HAVING bool_and(owner IS NULL OR expires_at < clock_timestamp() OR owner = %(owner)s)
), found AS (
    SELECT partition FROM leases
    WHERE partition / %(size)s IN (SELECT number FROM groups)
      -- Asked of the row as it is once it is locked: another may have been faster.
      AND (owner IS NULL OR expires_at < clock_timestamp() OR owner = %(owner)s)
      -- One that has just been lost is given up first, and won again next time.
      AND NOT partition = ANY (%(held)s::smallint[])
    ORDER BY partition LIMIT %(room)s FOR NO KEY UPDATE SKIP LOCKED
), free AS (
    SELECT partition FROM found
    WHERE partition / %(size)s IN (
        SELECT partition / %(size)s FROM (SELECT partition FROM found UNION ALL SELECT unnest(%(held)s::smallint[])) f
        GROUP BY 1 HAVING count(*) = %(size)s
    )
)
UPDATE leases l
SET owner = %(owner)s, epoch = l.epoch + 1, expires_at = clock_timestamp() + make_interval(secs => %(ttl)s)
FROM free WHERE l.partition = free.partition RETURNING l.partition, l.epoch
"""

_RELEASE = """
UPDATE leases l SET owner = NULL, expires_at = clock_timestamp()
FROM unnest(%(partitions)s::smallint[], %(epochs)s::bigint[]) AS m (partition, epoch)
WHERE l.partition = m.partition AND l.epoch = m.epoch AND l.owner = %(owner)s
"""


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
