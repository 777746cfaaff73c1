"""What a process does besides reading use: it keeps the price book, charges what has a price by now, and sends on.

The price book is read from its table, and told to whoever prices.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from nats.aio.client import Client

from contracts.money import Unit
from contracts.pricing import PriceVersion
from contracts.streams import USAGE
from services.kit.clock import now
from services.kit.database import DATABASE_AWAY, Pool, Writer
from services.kit.outbox import OutboxRow
from services.kit.publish import PublishFailed, publish_batch
from services.kit.telemetry import FAULTS, get_logger
from services.kit.worker import Worker
from services.metering import handlers, store, translate
from services.metering.domain.prices import PriceBook, is_new
from services.metering.store import Connection

log = get_logger(__name__)

CATALOGUE: Final = "catalogue"

POLL_SECONDS: Final = 1.0
# How long a use may wait whose batch was priced with a book that another process had extended already.
SWEEP_SECONDS: Final = 5.0


class PriceKeeper:
    """Keeps the price book. Versions that other processes add are known within seconds.

    Of the partitions that this process holds, use that waits for a price is charged as soon as there is one; and
    looked for again and again, so that nothing is forgotten by whoever dies.
    """

    def __init__(
        self,
        *,
        writer: Writer,
        pool: Pool,
        units: Mapping[str, Unit],
        partitions: Callable[[], frozenset[int]],
        notify: Callable[[Sequence[OutboxRow]], None],
        poll_seconds: float = POLL_SECONDS,
        sweep_seconds: float = SWEEP_SECONDS,
    ) -> None:
        """`writer` is the keeper's own. `notify` is told what has been committed to the outbox."""
        self._writer = writer
        self._pool = pool
        self._partitions = partitions
        self._notify = notify
        self._poll_seconds = poll_seconds
        self._sweep_seconds = sweep_seconds
        self._book = PriceBook([], units=units)
        self._stopping = asyncio.Event()

    def book(self) -> PriceBook:
        """The book as it was read last. It is another object after every extension."""
        return self._book

    async def start(self, catalogue: Iterable[PriceVersion]) -> None:
        """Read the book, and add the catalogue's versions. VersionRefused if one contradicts what is stored."""
        async with self._writer.transaction() as connection:
            await self._read(connection)
            for version in catalogue:
                await self._add(connection, version, source=CATALOGUE, backdate=True)

    async def add(self, version: PriceVersion, *, source: str, backdate: bool) -> bool:
        """Store a version; False if it is stored already. IdTaken, TimeTaken, InThePast."""
        async with self._pool.connection() as connection:
            await self._read(connection)
            return await self._add(connection, version, source=source, backdate=backdate)

    async def refresh(self) -> None:
        """Read what was added since the last time."""
        async with self._pool.connection() as connection:
            await self._read(connection)

    async def run(self) -> None:
        """Follow the table, and charge what has a price by now, until `stop`."""
        swept_at = float("-inf")
        swept_with: PriceBook | None = None
        while not self._stopping.is_set():
            try:
                await self.refresh()
                book = self._book
                if book is not swept_with or time.monotonic() - swept_at >= self._sweep_seconds:
                    await self.sweep()
                    swept_with, swept_at = book, time.monotonic()
            except DATABASE_AWAY as error:
                FAULTS.labels(place="metering.prices").inc()
                log.error("price book not followed", retry_seconds=self._poll_seconds, error=repr(error))
            except ValueError as error:
                # Stored by a process with another catalogue. Those that do not know its units go on as they are.
                FAULTS.labels(place="metering.prices").inc()
                log.error("price book not readable, the last one stays in force", reason=str(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds):
                    await self._stopping.wait()

    def stop(self) -> None:
        """Let `run` return soon."""
        self._stopping.set()

    async def sweep(self) -> None:
        """Charge what waits for a price that the book has, in the partitions that this process holds."""
        book, partitions = self._book, self._partitions()
        if not partitions:
            return
        async with self._pool.connection() as connection:
            waiting = await store.find_missing_prices(connection, partitions)
        for partition, key in waiting:
            if self._stopping.is_set():
                return
            if book.priced_times(key):
                await self._charge(partition, key, book)

    async def _charge(self, partition: int, key: str, book: PriceBook) -> None:
        try:
            rows = await handlers.charge_unpriced(partition, key, writer=self._writer, price_book=book)
        except DATABASE_AWAY:
            raise
        except Exception as error:
            # What waits under one key must not hold up what waits under others. It is tried again at the next sweep.
            FAULTS.labels(place="metering.unpriced").inc()
            log.error("use that waits for a price cannot be charged", partition=partition, key=key, exc_info=error)
            return
        self._notify(rows)
        if rows:
            log.info("use charged that had waited for a price", partition=partition, key=key)

    async def _add(self, connection: Connection, version: PriceVersion, *, source: str, backdate: bool) -> bool:
        recorded_at = now()
        while is_new(version, book=self._book, at=recorded_at, backdate=backdate):
            added = await store.add_price_version(
                connection,
                id=version.id,
                effective_at=version.effective_at,
                recorded_at=recorded_at,
                source=source,
                models=translate.models_as_json(version),
                further=translate.further_as_json(version),
            )
            await self._read(connection)
            if added:
                log.info("price version stored", id=version.id, effective_at=version.effective_at.isoformat())
                return True
            # Another process was faster, with this id or this time: the book says which, now.
        return False

    async def _read(self, connection: Connection) -> None:
        rows = await store.find_price_versions(connection, known=[version.id for version in self._book.versions])
        # Nothing is awaited from here on: the book that is extended is still the last one.
        further = [
            translate.stored_version(
                id=row.id,
                effective_at=row.effective_at,
                models=row.models,
                further=row.further,
                units=self._book.units,
            )
            for row in rows
            if self._book.find(row.id) is None
        ]
        if further:
            self._book = self._book.extended(further)


# How soon is found what another process left to be sent on.
REROUTE_POLL_SECONDS: Final = 0.5
REROUTE_ROWS_MAX: Final = 500


class Rerouter(Worker):
    """Sends on use that belongs to another partition, and finishes what a new alias began.

    Of the partitions that this process holds. What it does not finish is found in the tables by whoever is next; what
    it does twice counts once where it goes.
    """

    def __init__(
        self,
        *,
        client: Client,
        writer: Writer,
        pool: Pool,
        partitions: Callable[[], frozenset[int]],
        price_book: Callable[[], PriceBook],
        notify: Callable[[Sequence[OutboxRow]], None],
        poll_seconds: float = REROUTE_POLL_SECONDS,
    ) -> None:
        """`writer` is the rerouter's own. `notify` is told what has been committed to the outbox."""
        super().__init__(place="metering.reroute", poll_seconds=poll_seconds)
        self._client = client
        self._writer = writer
        self._pool = pool
        self._partitions = partitions
        self._price_book = price_book
        self._notify = notify

    async def round(self) -> bool:
        """Have what waited for an alias wait no more, and send on."""
        await self.map_waiting()
        return await self.send_on()

    async def map_waiting(self) -> None:
        """Charge, or have sent on, what waited for aliases that are there now."""
        if not (partitions := self._partitions()):
            return
        async with self._pool.connection() as connection:
            pending = await store.find_pending_aliases(connection, partitions)
        for _, subject in pending:
            if self._stopping:
                return
            try:
                self._notify(await handlers.charge_mapped(subject, writer=self._writer, price_book=self._price_book()))
            except DATABASE_AWAY:
                raise
            except Exception as error:
                # What waits under one name must not hold up what waits under others. It is tried again.
                FAULTS.labels(place="metering.alias").inc()
                log.error("use that waited for an alias cannot be charged", subject=subject, exc_info=error)

    async def send_on(self) -> bool:
        """Publish what is to be sent on, and forget what the stream has; whether there may be more."""
        if not (partitions := self._partitions()):
            return False
        async with self._pool.connection() as connection:
            found = await store.find_reroutes(connection, partitions, limit=REROUTE_ROWS_MAX)
        if not found:
            return False
        sent, complete = found, True
        try:
            await publish_batch(self._client, stream=USAGE, messages=[translate.rerouted(each) for each in found])
        except PublishFailed as error:
            FAULTS.labels(place="metering.reroute").inc()
            log.error("use not sent on, it is tried again", failed=len(error.failed), reason=str(error))
            sent, complete = [found[place] for place in error.confirmed], False
        async with self._pool.connection() as connection:
            await store.delete_reroutes(connection, sent)
        return complete and len(found) == REROUTE_ROWS_MAX
