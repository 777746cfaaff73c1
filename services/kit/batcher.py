"""Group commit without a timer: the next batch is what queued while the last one was processed."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

from services.kit.telemetry import BATCH_ITEMS, BATCH_SECONDS, FAULTS, get_logger

log = get_logger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Busy(Exception):
    """The queue is full: nothing was taken. Ask again later."""

    def __init__(self, *, name: str, queued_cost: int, queue_cost_max: int) -> None:
        super().__init__(f"{name} is busy: work that costs {queued_cost} is waiting, of at most {queue_cost_max}")
        self.queued_cost = queued_cost
        self.queue_cost_max = queue_cost_max


class Fault(Exception):
    """This one item made its batch fail, alone as well as with others. The cause is chained."""


class Stopped(Exception):
    """The batcher was stopped before the item was processed. Nothing was done with it."""


# Of a batch's cost, what goes in bulk may make up so much while somebody waits for the rest.
BULK_SHARE: Final = 1 / 8


class Batcher(Generic[Item, Result]):
    """Hands queued items to `process` in batches, in the order of submission, one batch at a time.

    What is submitted `in_bulk` stands in a queue of its own: it comes after that for which somebody waits, and if there
    is any of that, few go with it. A batch has some of it at any rate, so that neither keeps the other away.

    `process` may call what it is given as soon as the next batch may begin although this one is not done, as its commit
    is on its way. It then begins once `ahead_cost_min` is waiting; there are never more than these two.

    `process` returns one result per item. When it raises, nothing of the batch may have taken effect: halves of the
    batch are tried again, in order, until the one bad item is alone and gets a Fault. An exception of a type in
    `whole_batch_errors` (a lost connection, a deposed owner) is not the fault of an item: every item of the batch
    gets that exception, and may have taken effect.
    """

    def __init__(
        self,
        *,
        name: str,
        process: Callable[[list[Item], Callable[[], None]], Awaitable[Sequence[Result]]],
        batch_cost_max: int = 1000,
        queue_cost_max: int = 20_000,
        ahead_cost_min: int | None = None,
        whole_batch_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self._name = name
        self._process = process
        self._batch_cost_max = batch_cost_max
        self._queue_cost_max = queue_cost_max
        self._ahead_cost_min = queue_cost_max * 2 if ahead_cost_min is None else ahead_cost_min
        self._whole_batch_errors = whole_batch_errors
        self._awaited: _Lane[Item, Result] = _Lane()
        self._bulk: _Lane[Item, Result] = _Lane()
        # At least so much is waiting when the next batch begins.
        self._wanted_cost = 0
        self._wake = asyncio.Event()
        self._stopping = False

    @property
    def queued_cost(self) -> int:
        """What is waiting, without the batch in process."""
        return self._awaited.cost + self._bulk.cost

    def submit(self, item: Item, *, cost: int = 1, in_bulk: bool = False) -> asyncio.Future[Result]:
        """Queue an item; the future is its result. Raises Busy, or Stopped. A cancelled item may still be processed."""
        if self._stopping:
            raise Stopped(f"{self._name} is stopping")
        lane = self._bulk if in_bulk else self._awaited
        if lane.cost + cost > self._queue_cost_max and lane.queue:
            raise Busy(name=self._name, queued_cost=lane.cost, queue_cost_max=self._queue_cost_max)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        lane.queue.append(_Waiting(item, cost, future))
        lane.cost += cost
        if self.queued_cost >= self._wanted_cost:
            self._wake.set()
        return future

    async def run(self) -> None:
        """Process until `stop` was called and the queue is empty. One task runs it."""
        begun: asyncio.Task[None] | None = None
        try:
            while True:
                if begun is not None and begun.done():
                    await begun
                    begun = None
                if self._stopping and not self._is_waiting and begun is None:
                    return
                self._wanted_cost = 0 if begun is None else self._ahead_cost_min
                if not self._is_waiting or self.queued_cost < self._wanted_cost:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                before, begun = begun, await self._begin(self._take_batch())
                if before is not None:
                    await before
        finally:
            self._stopping = True
            if begun is not None:
                begun.cancel()
                await asyncio.wait([begun])
            for lane in (self._awaited, self._bulk):
                for waiting in lane.queue:
                    _fail(waiting, Stopped(f"{self._name} was stopped"))
                lane.queue.clear()

    def stop(self) -> None:
        """Take no more items; `run` returns once those queued are done. Cancel `run` not to wait for them."""
        self._stopping = True
        self._wake.set()

    @property
    def _is_waiting(self) -> bool:
        return bool(self._awaited.queue or self._bulk.queue)

    def _take_batch(self) -> list["_Waiting[Item, Result]"]:
        batch = self._awaited.take(self._batch_cost_max)
        return batch + self._bulk.take(self._batch_cost_max * BULK_SHARE if batch else self._batch_cost_max)

    async def _begin(self, batch: list["_Waiting[Item, Result]"]) -> asyncio.Task[None]:
        """Process a batch: until it is done, or the next one may begin."""
        may_go_on = asyncio.Event()

        def done(_: asyncio.Task[None]) -> None:
            may_go_on.set()
            self._wake.set()

        task = asyncio.create_task(self._process_all(batch, may_go_on.set), name=f"batch of {self._name}")
        task.add_done_callback(done)
        try:
            await may_go_on.wait()
        except BaseException:
            task.cancel()
            await asyncio.wait([task])
            raise
        return task

    async def _process_all(self, batch: list["_Waiting[Item, Result]"], may_go_on: Callable[[], None]) -> None:
        if not batch:
            return
        started = time.monotonic()
        try:
            results = await self._process([waiting.item for waiting in batch], may_go_on)
        except self._whole_batch_errors as error:
            FAULTS.labels(place=f"batcher.{self._name}").inc()
            log.error("batch failed", batcher=self._name, items=len(batch), error=repr(error))
            for waiting in batch:
                _fail(waiting, error)
            return
        except Exception as error:
            failure = error
        except BaseException:
            for waiting in batch:
                waiting.future.cancel()
            raise
        else:
            BATCH_ITEMS.labels(name=self._name).observe(len(batch))
            BATCH_SECONDS.labels(name=self._name).observe(time.monotonic() - started)
            if len(results) != len(batch):
                # Not bisected: it did take effect.
                fault = Fault(f"{self._name} gave {len(results)} results for {len(batch)} items")
                for waiting in batch:
                    _fail(waiting, fault)
                raise fault
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(result)
            return
        await self._bisect(batch, failure, may_go_on)

    async def _bisect(
        self, batch: list["_Waiting[Item, Result]"], error: Exception, may_go_on: Callable[[], None]
    ) -> None:
        if len(batch) == 1:
            FAULTS.labels(place=f"batcher.{self._name}").inc()
            log.error("item failed alone", batcher=self._name, exc_info=error)
            fault = Fault(f"{self._name} failed on this item: {type(error).__name__}")
            fault.__cause__ = error
            _fail(batch[0], fault)
            return
        log.warning("batch failed, trying its halves", batcher=self._name, items=len(batch), error=repr(error))
        middle = len(batch) // 2
        await self._process_all(batch[:middle], may_go_on)
        await self._process_all(batch[middle:], may_go_on)


class _Waiting(NamedTuple, Generic[Item, Result]):
    item: Item
    cost: int
    future: asyncio.Future[Result]


@dataclass(slots=True)
class _Lane(Generic[Item, Result]):
    """What is waiting, in order, and what it costs together."""

    queue: "deque[_Waiting[Item, Result]]" = field(default_factory=deque)
    cost: int = 0

    def take(self, cost_max: float) -> "list[_Waiting[Item, Result]]":
        """The first of what is waiting: one, or as many as cost no more."""
        taken: list[_Waiting[Item, Result]] = []
        cost = 0
        while self.queue and (not taken or cost + self.queue[0].cost <= cost_max):
            waiting = self.queue.popleft()
            self.cost -= waiting.cost
            if waiting.future.cancelled():
                continue
            cost += waiting.cost
            taken.append(waiting)
        return taken


def _fail(waiting: "_Waiting[Item, Result]", error: Exception) -> None:
    if not waiting.future.done():
        waiting.future.set_exception(error)
