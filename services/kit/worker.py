"""Work that is done in rounds beside everything else a service does."""

import asyncio
from abc import ABC, abstractmethod
from contextlib import suppress

from services.kit.database import DATABASE_AWAY
from services.kit.telemetry import FAULTS, get_logger

log = get_logger(__name__)


class Worker(ABC):
    """Rounds until `stop`: the next at once while there is more to do, else when woken, or after `poll_seconds`.

    A round that the database was away for is one without work. `run` is one task.
    """

    def __init__(self, *, place: str, poll_seconds: float) -> None:
        """`place` names it in logs and in the count of faults."""
        self._place = place
        self._poll_seconds = poll_seconds
        self._wake = asyncio.Event()
        self._stopping = False

    @abstractmethod
    async def round(self) -> bool:
        """Do some of what there is to do; whether there may be more."""

    def wake(self) -> None:
        """There is something to be done."""
        self._wake.set()

    def stop(self) -> None:
        """Let `run` return after the round in hand."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Work until `stop`."""
        while not self._stopping:
            self._wake.clear()
            try:
                if await self.round():
                    # Others have their turn.
                    await asyncio.sleep(0)
                    continue
            except DATABASE_AWAY as error:
                FAULTS.labels(place=self._place).inc()
                log.error("round not done", place=self._place, retry_seconds=self._poll_seconds, error=repr(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds):
                    await self._wake.wait()
