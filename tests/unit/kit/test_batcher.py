"""Laws of the batcher: order, isolation of the one bad item, bounded queues, no timer."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kit.batcher import Batcher, Busy, Fault, Stopped


class Deposed(Exception):
    """A failure of the whole batch."""


class Store:
    """A process function that notes what took effect, and fails as a database would: all or nothing."""

    def __init__(self, *, bad: Sequence[int] = (), failures: Sequence[Exception] = ()) -> None:
        self.bad = set(bad)
        self.failures = list(failures)
        self.batches: list[list[int]] = []
        self.applied: list[int] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def process(self, batch: list[int], _may_go_on: Callable[[], None] = lambda: None) -> list[int]:
        self.batches.append(batch)
        await self.may_go_on.wait()
        if self.failures:
            raise self.failures.pop(0)
        if bad := self.bad & set(batch):
            raise ValueError(f"bad items {sorted(bad)}")
        self.applied += batch
        return [item * 10 for item in batch]


async def run(batcher: Batcher[int, int], items: Sequence[int]) -> list[int | BaseException]:
    futures = [batcher.submit(item) for item in items]
    batcher.stop()
    await batcher.run()
    return await asyncio.gather(*futures, return_exceptions=True)


@given(
    items=st.lists(st.integers(0, 30), min_size=1, max_size=60, unique=True),
    bad=st.sets(st.integers(0, 30), max_size=5),
    batch_cost_max=st.integers(1, 20),
)
def test_bad_items_fail_alone_and_the_others_take_effect_in_order(
    items: list[int], bad: set[int], batch_cost_max: int
) -> None:
    async def law() -> None:
        store = Store(bad=sorted(bad))
        batcher = Batcher(name="test", process=store.process, batch_cost_max=batch_cost_max)
        results = await run(batcher, items)
        for item, result in zip(items, results, strict=True):
            if item in bad:
                assert isinstance(result, Fault)
                assert isinstance(result.__cause__, ValueError)
            else:
                assert result == item * 10
        assert store.applied == [item for item in items if item not in bad]

    asyncio.run(law())


def test_the_next_batch_is_what_queued_during_the_last() -> None:
    async def law() -> None:
        store = Store()
        batcher = Batcher(name="test", process=store.process, batch_cost_max=4)
        running = asyncio.create_task(batcher.run())
        store.may_go_on.clear()
        first = batcher.submit(1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        rest = [batcher.submit(item) for item in range(2, 8)]
        store.may_go_on.set()
        await asyncio.gather(first, *rest)
        batcher.stop()
        await running
        assert store.batches == [[1], [2, 3, 4, 5], [6, 7]]

    asyncio.run(law())


def test_a_failure_of_the_whole_batch_is_everybodys_and_not_bisected() -> None:
    async def law() -> None:
        store = Store(failures=[Deposed("taken")])
        batcher = Batcher(name="test", process=store.process, whole_batch_errors=(Deposed,))
        results = await run(batcher, [1, 2, 3])
        assert all(isinstance(result, Deposed) for result in results)
        assert store.batches == [[1, 2, 3]]

    asyncio.run(law())


def test_a_failure_that_passes_costs_nobody_anything() -> None:
    async def law() -> None:
        store = Store(failures=[ValueError("once")])
        batcher = Batcher(name="test", process=store.process)
        assert await run(batcher, [1, 2, 3]) == [10, 20, 30]

    asyncio.run(law())


def test_a_full_queue_is_busy_and_says_how_full() -> None:
    async def law() -> None:
        batcher = Batcher(name="test", process=Store().process, queue_cost_max=10)
        batcher.submit(1, cost=6)
        batcher.submit(2, cost=4)
        with pytest.raises(Busy) as busy:
            batcher.submit(3)
        assert (busy.value.queued_cost, busy.value.queue_cost_max) == (10, 10)
        batcher.stop()
        await batcher.run()

    asyncio.run(law())


def test_an_item_larger_than_every_limit_is_still_processed_alone() -> None:
    async def law() -> None:
        store = Store()
        batcher = Batcher(name="test", process=store.process, batch_cost_max=5, queue_cost_max=10)
        futures = [batcher.submit(1, cost=50)]
        with pytest.raises(Busy):
            batcher.submit(2)
        batcher.stop()
        await batcher.run()
        assert await asyncio.gather(*futures) == [10]

    asyncio.run(law())


@given(
    submitted=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=60),
    batch_cost_max=st.integers(1, 40),
)
def test_each_queue_keeps_its_order_and_neither_keeps_the_other_away(
    submitted: list[tuple[int, bool]], batch_cost_max: int
) -> None:
    async def law() -> None:
        store = Store()
        batcher = Batcher(name="test", process=store.process, batch_cost_max=batch_cost_max)
        for item, (cost, in_bulk) in enumerate(submitted):
            batcher.submit(item, cost=cost, in_bulk=in_bulk)
        batcher.stop()
        await batcher.run()
        bulk = [item for item, (_, in_bulk) in enumerate(submitted) if in_bulk]
        awaited = [item for item, (_, in_bulk) in enumerate(submitted) if not in_bulk]
        assert [item for item in store.applied if item in set(bulk)] == bulk
        assert [item for item in store.applied if item in set(awaited)] == awaited
        for batch in store.batches:
            begun = [item in set(bulk) for item in batch]
            assert begun == sorted(begun), "what somebody waits for comes first"
            assert not bulk or True in begun, "some of what goes in bulk goes with every batch"
            bulk, awaited = [i for i in bulk if i not in batch], [i for i in awaited if i not in batch]
            if False in begun and True in begun:
                costs = [submitted[item][0] for item in batch if submitted[item][1]]
                assert len(costs) == 1 or sum(costs) <= batch_cost_max / 8

    asyncio.run(law())


def test_a_queue_full_of_what_goes_in_bulk_is_not_busy_for_who_waits() -> None:
    async def law() -> None:
        store = Store()
        batcher = Batcher(name="test", process=store.process, batch_cost_max=8, queue_cost_max=10)
        charges = [batcher.submit(item, cost=5, in_bulk=True) for item in (1, 2)]
        with pytest.raises(Busy):
            batcher.submit(3, cost=5, in_bulk=True)
        command = batcher.submit(4, cost=8)
        assert batcher.queued_cost == 18
        batcher.stop()
        await batcher.run()
        assert await asyncio.gather(*charges, command) == [10, 20, 40]
        assert store.batches == [[4, 1], [2]]

    asyncio.run(law())


def test_a_cancelled_item_is_left_out_and_stopping_takes_no_more() -> None:
    async def law() -> None:
        store = Store()
        batcher = Batcher(name="test", process=store.process)
        gone, stays = batcher.submit(1), batcher.submit(2)
        gone.cancel()
        batcher.stop()
        with pytest.raises(Stopped):
            batcher.submit(3)
        await batcher.run()
        assert await stays == 20
        assert store.applied == [2]

    asyncio.run(law())


def test_cancelling_the_batcher_fails_what_waits() -> None:
    async def law() -> None:
        store = Store()
        store.may_go_on.clear()
        batcher = Batcher(name="test", process=store.process, batch_cost_max=1)
        running = asyncio.create_task(batcher.run())
        in_process, waiting = batcher.submit(1), batcher.submit(2)
        await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert in_process.cancelled()
        assert isinstance(waiting.exception(), Stopped)

    asyncio.run(law())


def test_a_process_that_loses_results_stops_the_batcher() -> None:
    async def law() -> None:
        async def forgetful(_batch: list[int], _may_go_on: Callable[[], None]) -> list[int]:
            return []

        batcher = Batcher(name="test", process=forgetful)
        future = batcher.submit(1)
        with pytest.raises(Fault, match="0 results for 1 items"):
            await batcher.run()
        assert isinstance(future.exception(), Fault)

    asyncio.run(law())


class Committing(Store):
    """A process function that says at once that the next batch may begin: what is left to do is in its commit."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: dict[int, asyncio.Event] = {}

    async def process(self, batch: list[int], may_go_on: Callable[[], None] = lambda: None) -> list[int]:
        self.batches.append(batch)
        self.commits[batch[0]] = asyncio.Event()
        may_go_on()
        await self.commits[batch[0]].wait()
        if self.failures:
            raise self.failures.pop(0)
        return [item * 10 for item in batch]


async def settled() -> None:
    """Whatever can go on without anything coming from outside has done so."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_next_batch_begins_while_one_commits_if_enough_is_waiting_and_never_a_third() -> None:
    async def law() -> None:
        store = Committing()
        batcher = Batcher(name="test", process=store.process, batch_cost_max=2, ahead_cost_min=2)
        running = asyncio.create_task(batcher.run())
        first = batcher.submit(1)
        await settled()
        second = batcher.submit(2)
        await settled()
        # One alone is better decided with those that come.
        assert store.batches == [[1]]
        third, fourth, fifth, sixth = [batcher.submit(item) for item in (3, 4, 5, 6)]
        await settled()
        assert store.batches == [[1], [2, 3]]
        assert not first.done()
        store.commits[1].set()
        assert await first == 10
        await settled()
        assert store.batches == [[1], [2, 3], [4, 5]]
        for begun in (2, 4):
            store.commits[begun].set()
        assert [await each for each in (second, third, fourth, fifth)] == [20, 30, 40, 50]
        # Nothing commits any more: it need not wait for others.
        await settled()
        store.commits[6].set()
        assert await sixth == 60
        batcher.stop()
        await running

    asyncio.run(law())


def test_stopping_waits_for_what_commits_and_cancelling_does_not() -> None:
    async def law(*, cancel: bool) -> None:
        store = Committing()
        batcher = Batcher(name="test", process=store.process, batch_cost_max=1, ahead_cost_min=1)
        running = asyncio.create_task(batcher.run())
        first, second, third = [batcher.submit(item) for item in (1, 2, 3)]
        await settled()
        assert store.batches == [[1], [2]]
        if cancel:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert first.cancelled()
            assert second.cancelled()
            assert isinstance(third.exception(), Stopped)
            return
        batcher.stop()
        for number in (1, 2, 3):
            await settled()
            assert not running.done()
            store.commits[number].set()
        await running
        assert [await each for each in (first, second, third)] == [10, 20, 30]

    asyncio.run(law(cancel=False))
    asyncio.run(law(cancel=True))
