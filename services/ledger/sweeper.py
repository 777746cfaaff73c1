"""Looks for what is due where nobody asks: lots that end, periods that begin, holds past their deadline.

Nothing depends on it having run: whoever decides or reads applies the same rules. It tells the world in time.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final

import psycopg
from prometheus_client import Counter, Gauge
from psycopg_pool import PoolTimeout

from services.kit.batcher import Batcher, Busy, Stopped
from services.kit.database import Pool
from services.kit.telemetry import FAULTS, REGISTRY, get_logger
from services.ledger import store
from services.ledger.domain.commands import CatchUp, ResolveHold
from services.ledger.handlers import Item, Result, SweepItem, Swept, cost_of

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
        async with self._pool.connection() as connection:
            overdue = await store.oldest_due(connection, partitions, at)
            accounts = await store.due_accounts(connection, partitions, at, most)
            holds = await store.overdue_holds(connection, partitions, at, most)
        for what, since in zip(("account", "hold"), overdue, strict=True):
            age = 0.0 if since is None else max(0.0, (at - since).total_seconds())
            OVERDUE_SECONDS.labels(what=what).set(age)
        # Holds first: what they release of a lot that has ended expires with it.
        done = await self._do(
            [SweepItem(partition, ResolveHold(hold=hold, account=account)) for partition, hold, account in holds]
        )
        SWEPT.labels(what="hold").inc(done)
        done_accounts = await self._do(
            [SweepItem(partition, CatchUp(account=account)) for partition, account in accounts]
        )
        SWEPT.labels(what="account").inc(done_accounts)
        return not is_busy and most in {len(holds), len(accounts)} and bool(done or done_accounts)

    async def _do(self, items: Sequence[SweepItem]) -> int:
        """How many of the items there was something to do for. What was not done is found again."""
        futures = []
        for item in items:
            try:
                futures.append(self._batcher.submit(item, cost=cost_of(item), in_bulk=True))
            except Busy:
                break
        results = await asyncio.gather(*futures, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                FAULTS.labels(place="ledger.sweeper").inc()
                log.warning("not swept", error=repr(result))
        return sum(isinstance(result, Swept) and result.entries > 0 for result in results)
