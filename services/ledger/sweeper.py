"""Looks for what is due where nobody asks: lots that end or begin, periods, holds past their deadline.

Nothing depends on it having run: whoever decides or reads applies the same rules. It tells the world in time.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import psycopg
from prometheus_client import Counter, Gauge
from psycopg_pool import PoolTimeout

from services.kit.batcher import Batcher, Busy, Stopped
from services.kit.database import Pool
from services.kit.telemetry import FAULTS, REGISTRY, get_logger
from services.ledger import store
from services.ledger.domain.commands import CatchUp, ResolveHold
from services.ledger.handlers import BATCH_SECONDS_MAX, Item, Result, SweepItem, Swept, cost_of

log = get_logger(__name__)

SWEPT: Final = Counter(
    "scrip_ledger_swept", "What was found due and done, by what: account, hold.", ("what",), registry=REGISTRY
)
OVERDUE_SECONDS: Final = Gauge(
    "scrip_ledger_overdue_seconds",
    "Age of what is due longest and not done yet, by what: account, hold.",
    ("what",),
    registry=REGISTRY,
)

# Of the queue that others may fill: with more than that waiting the sweeper does little.
_BUSY_SHARE: Final = 0.25
_WHEN_BUSY_SHARE: Final = 16
# What was granted before it begins may be committed as late as this after it was decided.
_COMMITTED_WITHIN: Final = timedelta(seconds=BATCH_SECONDS_MAX)
_NO_LOT: Final = UUID(int=0)
_EVER: Final = (datetime.min.replace(tzinfo=UTC), _NO_LOT)


class Sweeper:
    """Submits what is due on the partitions owned, some of it at a time, and waits for it. One task runs it."""

    def __init__(
        self,
        *,
        batcher: Batcher[Item, Result],
        pool: Pool,
        partitions: Callable[[], frozenset[int]],
        now: Callable[[], datetime],
        seconds: float,
        cost_max: int,
        batch_cost_max: int,
    ) -> None:
        """Every `seconds`, at most `cost_max` at once; little of it while more than part of a batch is waiting."""
        self._batcher = batcher
        self._pool = pool
        self._partitions = partitions
        self._now = now
        self._seconds = seconds
        self._cost_max = cost_max
        self._busy_cost = int(batch_cost_max * _BUSY_SHARE)
        self._stopping = asyncio.Event()
        # Of each partition, up to which time and lot it was told that lots have begun.
        self._begun_until: dict[int, tuple[datetime, UUID]] = {}

    async def run(self) -> None:
        """Sweep until `stop`."""
        while not self._stopping.is_set():
            is_more = False
            try:
                is_more = await self._sweep()
            except (psycopg.Error, PoolTimeout, TimeoutError) as error:
                log.warning("not swept", error=repr(error))
            except Stopped:
                return
            if not is_more:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._seconds)

    def stop(self) -> None:
        """Begin no other round."""
        self._stopping.set()

    async def _sweep(self) -> bool:
        """One round; whether it did as much as it may, so that there is probably more."""
        partitions, at = self._partitions(), self._now()
        if not partitions:
            return False
        is_busy = self._batcher.queued_cost > self._busy_cost
        most = max(1, self._cost_max // _WHEN_BUSY_SHARE) if is_busy else self._cost_max
        since = {partition: self._begun_until.get(partition, _EVER) for partition in partitions}
        async with self._pool.connection() as connection:
            overdue = await store.oldest_due(connection, partitions, at)
            accounts = await store.due_accounts(connection, partitions, at, most)
            holds = await store.overdue_holds(connection, partitions, at, most)
            begun = await store.begun_lots(connection, since, at, most)
        for what, oldest in zip(("account", "hold"), overdue, strict=True):
            age = 0.0 if oldest is None else max(0.0, (at - oldest).total_seconds())
            OVERDUE_SECONDS.labels(what=what).set(age)
        # Holds first: what they release of a lot that has ended expires with it.
        ended = await self._do(
            [SweepItem(partition, ResolveHold(hold=hold, account=account)) for partition, hold, account in holds]
        )
        SWEPT.labels(what="hold").inc(_count_done(ended))
        reached = dict.fromkeys([*accounts, *((lot.partition, lot.account) for lot in begun)])
        caught_up = await self._do([SweepItem(partition, CatchUp(account=account)) for partition, account in reached])
        SWEPT.labels(what="account").inc(_count_done(caught_up))
        is_more = most in {len(holds), len(accounts)} and bool(_count_done(ended) or _count_done(caught_up))
        if len(caught_up) == len(reached):
            self._begun_until = _reached(since, begun, at, is_all=len(begun) < most)
            is_more |= len(begun) == most
        return not is_busy and is_more

    async def _do(self, items: Sequence[SweepItem]) -> list[Result]:
        """Submit items, as many as there is room for, and wait for them. What was not done is found again."""
        futures = []
        for item in items:
            try:
                futures.append(self._batcher.submit(item, cost=cost_of(item), in_bulk=True))
            except Busy:
                break
        results = await asyncio.gather(*futures, return_exceptions=True)
        done = []
        for result in results:
            if isinstance(result, BaseException):
                FAULTS.labels(place="ledger.sweeper").inc()
                log.warning("not swept", error=repr(result))
            else:
                done.append(result)
        return done


def _count_done(results: Sequence[Result]) -> int:
    """For how many of the items there was something to do."""
    return sum(isinstance(result, Swept) and result.entries > 0 for result in results)


def _reached(
    since: Mapping[int, tuple[datetime, UUID]], begun: Sequence[store.Begun], at: datetime, *, is_all: bool
) -> dict[int, tuple[datetime, UUID]]:
    """Where to go on, once it was told of lots: behind the last, or where a grant may still be on its way."""
    if is_all:
        return dict.fromkeys(since, (at - _COMMITTED_WITHIN, _NO_LOT))
    last = (begun[-1].effective_at, begun[-1].lot)
    return {partition: max(place, last) for partition, place in since.items()}
