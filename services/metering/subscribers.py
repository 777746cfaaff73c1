"""Messages in: usage in batches, read and priced while the batch before commits; the ledger's facts one by one."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Final, TypeVar

import psycopg
from faststream.nats import NatsBroker
from nats.aio.msg import Msg
from prometheus_client import Counter, Gauge, Histogram

from contracts.envelope import Problem
from contracts.partition import PARTITION_COUNT
from contracts.streams import CONSUMERS, METERING_DIRECTORY_CONSUMER
from services.kit.broker import pull_subscriber
from services.kit.clock import now
from services.kit.database import DATABASE_AWAY, Writer
from services.kit.outbox import OutboxRow
from services.kit.reader import PullReader
from services.kit.redelivery import place_of, retry_delay_seconds
from services.kit.settings import ServiceSettings
from services.kit.telemetry import FAULTS, REGISTRY, get_logger
from services.metering import handlers, translate
from services.metering.domain.prices import PriceBook
from services.metering.domain.usage import AGE_MAX
from services.metering.handlers import Batch, Ingested, Known, Reading

log = get_logger(__name__)

Result = TypeVar("Result")

EVENTS: Final = Counter(
    "scrip_metering_events",
    "Events by what became of them: new, duplicate, conflicting, dead, rerouted; the new: charged, unattributed,"
    " unpriced, unmapped.",
    ("outcome",),
    registry=REGISTRY,
)
CONFLICTS: Final = Counter(
    "scrip_metering_conflicts", "Event ids used again for other content: each is an alarm.", registry=REGISTRY
)
BATCH_EVENTS: Final = Histogram(
    "scrip_metering_batch_events",
    "Deliveries per transaction.",
    buckets=(1, 10, 30, 100, 300, 1000, 2000, 3000, 5000),
    registry=REGISTRY,
)
LAG_SECONDS: Final = Gauge(
    "scrip_metering_lag_seconds", "From stream to log, of the first event of the last batch.", registry=REGISTRY
)

RETRY_SECONDS_MIN: Final = 0.1
RETRY_SECONDS_MAX: Final = 5.0
# Some thousand events, however many a message has.
BATCH_BYTES_MAX: Final = 1 << 20
# From one batch to the next, while their bundles would be small.
LINGER_SECONDS: Final = 0.12
LINGER_EVENTS_MIN: Final = 2 * PARTITION_COUNT
BUNDLE_EVENTS_ENOUGH: Final = 32
# A millisecond or two.
READ_SLICE: Final = 100

# Not the fault of any event: the same batch is tried again.
# An event that Postgres cannot store is as good as unreadable.
_UNSTORABLE: Final = (psycopg.DataError, psycopg.errors.ProgramLimitExceeded, UnicodeError)


@dataclass(frozen=True, slots=True)
class _Work:
    """Messages, of one event each or of several, and all their events as a batch."""

    messages: Sequence[Msg]
    events: int
    batch: Batch


def lingers(*, events: int, subjects: int, is_full: bool) -> bool:
    """Whether the next batch is taken a moment after one of so many events of so many subjects, so that more can come.

    A batch makes a bundle for each partition that it has events of, and a bundle costs all who handle it by itself: so
    what comes steadily is charged sooner. Of a few events each is taken at once, and what waits behind a full batch is.
    """
    return LINGER_EVENTS_MIN <= events < subjects * BUNDLE_EVENTS_ENOUGH and not is_full


class UsageSubscriber:
    """Reads the usage stream for one process. Any number of processes may do so at once."""

    def __init__(
        self,
        *,
        reader: PullReader,
        durable: str,
        writer: Writer,
        price_book: Callable[[], PriceBook],
        known: Known,
        notify: Callable[[Sequence[OutboxRow]], None],
        rerouted: Callable[[], None] = lambda: None,
        age_max: timedelta = AGE_MAX,
        attempt_seconds_max: float = 10.0,
    ) -> None:
        """`writer` is the subscriber's own. `notify` is told what has been committed to the outbox.

        `rerouted` is told that there is something to be sent on. `age_max`: older use is refused.
        `attempt_seconds_max` is well below the consumer's ack_wait: after each attempt more time is asked for.
        """
        self._reader = reader
        self._durable = durable
        self._writer = writer
        self._price_book = price_book
        self._known = known
        self._notify = notify
        self._rerouted = rerouted
        self._age_max = age_max
        self._attempt_seconds_max = attempt_seconds_max
        self._read: asyncio.Queue[_Work | None] = asyncio.Queue(maxsize=1)
        self._stopping = False

    async def run(self) -> None:
        """Ingest until `stop`; then finish what has been read, and give back the rest."""
        await self._reader.add(self._durable)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read_all())
                tasks.create_task(self._ingest_all())
        finally:
            await self._reader.close()

    def stop(self) -> None:
        """Let `run` return soon."""
        self._stopping = True
        self._reader.stop_waiting()

    async def _read_all(self) -> None:
        while not self._stopping:
            messages = await self._reader.next_batch(bytes_max=BATCH_BYTES_MAX, timeout_seconds=0.5)
            if messages:
                taken_at = time.monotonic()
                work = await self._read_work(messages)
                await self._read.put(work)
                size = sum([len(message.data) for message in messages])
                is_full = len(messages) >= self._reader.batch_size_max or size >= BATCH_BYTES_MAX // 2
                subjects = len({message.subject for message in messages})
                if lingers(events=work.events, subjects=subjects, is_full=is_full):
                    await asyncio.sleep(max(0.0, taken_at + LINGER_SECONDS - time.monotonic()))
        await self._read.put(None)

    async def _read_work(self, messages: Sequence[Msg]) -> _Work:
        events = [event for message in messages for event in translate.events_of_message(message)]
        return _Work(messages=messages, events=len(events), batch=await self._read_batch(events))

    async def _read_batch(self, events: Sequence[Msg]) -> Batch:
        reading = Reading(price_book=self._price_book(), received_at=now(), age_max=self._age_max)
        for start in range(0, len(events), READ_SLICE):
            reading.add(events[start : start + READ_SLICE])
            # Others have their turn: readiness, HTTP, and the batch before, whose heads wait for its next statement.
            await asyncio.sleep(0)
        return reading.batch()

    async def _ingest_all(self) -> None:
        while (work := await self._read.get()) is not None:
            await self._ingest(work)

    async def _ingest(self, work: _Work) -> None:
        """Ingest a batch. What the database cannot take is found by halving, and put aside alone."""
        messages = work.messages
        try:
            await self._commit(messages, work.batch, events=work.events)
        except Exception as error:
            if len(messages) == 1:
                await self._ingest_singly(messages[0], error)
                return
            FAULTS.labels(place="metering.ingest").inc()
            log.error("batch failed, trying its halves", messages=len(messages), exc_info=error)
            middle = len(messages) // 2
            for half in (messages[:middle], messages[middle:]):
                await self._ingest(await self._read_work(half))
            return
        await self._reader.ack(messages)

    async def _ingest_singly(self, message: Msg, error: Exception) -> None:
        """Of a message that fails alone, take every event that can be: the message comes again for the others."""
        delay = 0.0
        events = translate.events_of_message(message)
        for event in events:
            if len(events) > 1:
                await self._reader.in_progress([message])
                try:
                    await self._commit([message], await self._read_batch([event]), events=1)
                except Exception as found:
                    error = found
                else:
                    continue
            delay = max(delay, await self._put_aside(event, error))
        if delay:
            await self._reader.nak([message], delay_seconds=delay)
        else:
            await self._reader.ack([message])

    async def _commit(self, messages: Sequence[Msg], batch: Batch, *, events: int) -> None:
        ingested = await self._with_retries(messages, lambda: self._attempt(batch))
        self._notify(ingested.rows)
        if ingested.counts.rerouted:
            self._rerouted()
        self._report(messages, ingested, events=events)

    async def _attempt(self, batch: Batch) -> Ingested:
        async with asyncio.timeout(self._attempt_seconds_max):
            return await handlers.ingest(batch, writer=self._writer, known=self._known)

    async def _put_aside(self, message: Msg, error: Exception) -> float:
        """One event that fails alone: dead if it can never be stored, else for another time, in so many seconds."""
        if isinstance(error, _UNSTORABLE):
            problem = Problem("", f"cannot be stored: {str(error).splitlines()[0]}")
            letter = translate.dead(message, [problem])
            await self._with_retries([message], lambda: handlers.put_aside([letter], writer=self._writer))
            log.warning("event dead-lettered", subject=message.subject, reason=letter.reason)
            return 0.0
        place = place_of(message)
        delay = retry_delay_seconds(place.deliveries)
        FAULTS.labels(place="metering.event").inc()
        log.error(
            "event failed alone, it will be delivered again",
            subject=message.subject,
            sequence=place.stream_sequence,
            delay_seconds=delay,
            exc_info=error,
        )
        return delay

    async def _with_retries(self, messages: Sequence[Msg], attempt: Callable[[], Awaitable[Result]]) -> Result:
        delay = RETRY_SECONDS_MIN
        while True:
            try:
                return await attempt()
            except DATABASE_AWAY as error:
                FAULTS.labels(place="metering.database").inc()
                log.error("batch not committed", messages=len(messages), retry_seconds=delay, error=repr(error))
            # Not acknowledged, and not for others either: they would meet the same database.
            await self._reader.in_progress(messages)
            await asyncio.sleep(delay)
            delay = min(delay * 2, RETRY_SECONDS_MAX)

    def _report(self, messages: Sequence[Msg], ingested: Ingested, *, events: int) -> None:
        counts = ingested.counts
        BATCH_EVENTS.observe(events)
        for outcome, count in asdict(counts).items():
            EVENTS.labels(outcome=outcome).inc(count)
        LAG_SECONDS.set(max(0, (now() - translate.stored_at(messages[0])).total_seconds()))
        if counts.dead:
            log.warning("events dead-lettered", events=counts.dead)
        if counts.unpriced:
            log.warning("use set aside for want of a price: see /api/v1/set-aside", events=counts.unpriced)
        for conflict in ingested.conflicts:
            CONFLICTS.inc()
            log.error(
                "conflict: an event id was used again for other content",
                partition=conflict.usage.partition,
                source=conflict.usage.source,
                event_id=conflict.usage.event_id,
                account=conflict.usage.account,
            )


def subscribe_directory(
    broker: NatsBroker,
    settings: ServiceSettings,
    *,
    writer: Writer,
    price_book: Callable[[], PriceBook],
    notify: Callable[[Sequence[OutboxRow]], None],
) -> None:
    """Have `broker` tell metering of every account that is opened."""
    consumer = next(each for each in CONSUMERS if each.durable == METERING_DIRECTORY_CONSUMER)

    @pull_subscriber(broker, settings, consumer=consumer)
    async def account_opened(body: bytes) -> None:
        fact = translate.read_account_opened(body)
        notify(await handlers.open_account(fact, writer=writer, price_book=price_book()))
