"""Laws of work in rounds."""

import asyncio

import psycopg
import pytest

from services.kit.worker import Worker
from tests.eventually import eventually

pytestmark = pytest.mark.anyio


class Rounds(Worker):
    """Does what it is told to, round by round, then has nothing to do."""

    def __init__(self, *outcomes: bool | Exception, poll_seconds: float = 60.0) -> None:
        super().__init__(place="test", poll_seconds=poll_seconds)
        self.outcomes = list(outcomes)
        self.done = 0

    async def round(self) -> bool:
        self.done += 1
        outcome = self.outcomes.pop(0) if self.outcomes else False
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def rounds(worker: Rounds, count: int) -> None:
    async def is_done() -> bool:
        return worker.done >= count

    await eventually(is_done, seconds=5)


async def test_it_goes_on_at_once_while_there_is_more_and_then_waits_to_be_woken() -> None:
    worker = Rounds(True, True)
    running = asyncio.create_task(worker.run())
    await rounds(worker, 3)
    await asyncio.sleep(0.02)
    assert worker.done == 3
    worker.wake()
    await rounds(worker, 4)
    worker.stop()
    async with asyncio.timeout(5):
        await running
    assert worker.done == 4


async def test_it_works_every_so_often_though_nobody_wakes_it() -> None:
    worker = Rounds(poll_seconds=0.005)
    running = asyncio.create_task(worker.run())
    await rounds(worker, 4)
    worker.stop()
    async with asyncio.timeout(5):
        await running


async def test_it_outlives_a_database_that_is_away_and_no_fault_of_ours() -> None:
    worker = Rounds(psycopg.OperationalError("away"), KeyError("ours"), poll_seconds=0.005)
    with pytest.raises(KeyError):
        async with asyncio.timeout(5):
            await worker.run()
    assert worker.done == 2
