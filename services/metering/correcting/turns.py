"""What a process does of its own accord about what was charged: one thing after another, each turn a transaction.

Whoever dies has done nothing of the turn it was in; what fails is put off, and holds up nothing else.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from services.kit.database import DATABASE_AWAY, Writer
from services.kit.outbox import OutboxRow
from services.kit.telemetry import FAULTS, get_logger
from services.kit.worker import Worker
from services.metering.correcting.changing import VersionNotRead
from services.metering.engine import PriceKeeper
from services.metering.store import Connection

log = get_logger(__name__)

Id = TypeVar("Id")


@dataclass(frozen=True, slots=True)
class Turn:
    """What a transaction came to. `is_stuck`: no more can be done for now. `finished`: it was the last; what to log."""

    rows: Sequence[OutboxRow] = ()
    is_stuck: bool = False
    finished: Mapping[str, object] | None = None


class InTurn(Worker, Generic[Id]):
    """Finds something that is to be done, does some of it, and finds the next, until there is none."""

    place: ClassVar[str]
    poll_seconds: ClassVar[float]
    # What fails, or is stuck, is left for so long.
    retry_seconds: ClassVar[float]

    def __init__(self, *, writer: Writer, prices: PriceKeeper, notify: Callable[[Sequence[OutboxRow]], None]) -> None:
        """`writer` is this one's own. `notify` is told what has been committed to the outbox."""
        super().__init__(place=self.place, poll_seconds=self.poll_seconds)
        self._writer = writer
        self._prices = prices
        self._notify = notify
        # Until when not to try again.
        self._put_off: dict[Id, float] = {}

    @abstractmethod
    async def find(self, connection: Connection, *, without: Collection[Id]) -> Id | None:
        """One that something is to be done of, and none of those."""

    @abstractmethod
    async def go_on(self, connection: Connection, id: Id) -> Turn:
        """Do some of it, in the transaction that found it. VersionNotRead."""

    async def round(self) -> bool:
        """One turn; False: there is nothing to be done."""
        present = time.monotonic()
        self._put_off = {id: until for id, until in self._put_off.items() if until > present}
        id: Id | None = None
        try:
            async with self._writer.transaction() as connection:
                id = await self.find(connection, without=self._put_off)
                if id is None:
                    return False
                turn = await self.go_on(connection, id)
        except VersionNotRead as error:
            assert id is not None
            log.info("it waits for the price book", place=self.place, id=str(id), reason=str(error))
            self._wait(id, self.poll_seconds)
            with suppress(ValueError):
                await self._prices.refresh()
            return True
        except DATABASE_AWAY:
            raise
        except Exception as error:
            if id is None:
                raise
            FAULTS.labels(place=self.place).inc()
            log.error(
                "not done, it is tried again",
                place=self.place,
                id=str(id),
                retry_seconds=self.retry_seconds,
                exc_info=error,
            )
            self._wait(id, self.retry_seconds)
            return True
        self._notify(turn.rows)
        if turn.is_stuck:
            self._wait(id, self.retry_seconds)
        if turn.finished is not None:
            log.info("finished", place=self.place, id=str(id), **turn.finished)
        return True

    def _wait(self, id: Id, seconds: float) -> None:
        self._put_off[id] = time.monotonic() + seconds
