"""Metering's composition root: constructs everything and reads the settings. Importing it does no I/O.

Run as `python -m services.metering.app`.
"""

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from fastapi import FastAPI
from faststream.nats import NatsBroker
from nats.aio.client import Client
from nats.errors import Error as NatsError
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from contracts.streams import CHARGES, CONSUMERS, LEDGER, METERING_CONSUMER, USAGE
from services.kit.broker import build_broker, connect_nats, nats_check
from services.kit.catalogue import load_catalogue
from services.kit.clock import now
from services.kit.database import Writer, database_check, open_pool
from services.kit.dead_letters import DeadLetter, Letter
from services.kit.http import Readiness, build_app, serve
from services.kit.leases import LeaseKeeper, owner_name
from services.kit.outbox import OutboxRow, Relay
from services.kit.problems import Problem
from services.kit.publish import PublishFailed, publish
from services.kit.reader import PullReader
from services.kit.telemetry import configure_logging, get_logger
from services.kit.trimmer import Trimmer
from services.metering import handlers, translate
from services.metering.domain.prices import PriceBook
from services.metering.handlers import Known
from services.metering.routes import Backend, routers
from services.metering.settings import MeteringSettings
from services.metering.subscribers import UsageSubscriber, subscribe_directory

log = get_logger(__name__)

SERVICE: Final = "metering"

# A process that is stuck holds its heads' locks against the others no longer than this.
TRANSACTION_TIMEOUT: Final = "15s"
READ_TIMEOUT: Final = "10s"


def build(settings: MeteringSettings) -> FastAPI:
    """The application. Everything is connected when its lifespan begins, and finished when it ends."""
    readiness = Readiness()
    backend: list[Backend] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.tokens.load()
        async with _running(settings, readiness) as made:
            backend[:] = [made]
            readiness.started()
            yield

    return build_app(
        name=SERVICE,
        lifespan=lifespan,
        readiness=readiness,
        tokens_file=settings.tokens_file,
        routers=routers(lambda: backend[0]),
    )


@asynccontextmanager
async def _running(settings: MeteringSettings, readiness: Readiness) -> AsyncIterator[Backend]:
    catalogue = load_catalogue(settings.catalogue_file)
    price_book = translate.read_price_book(catalogue.section("price_versions"), units=catalogue.units)
    async with AsyncExitStack() as stack:

        def writer(name: str) -> Writer:
            made = Writer(_url(settings, transaction_timeout=TRANSACTION_TIMEOUT), name=f"{SERVICE}-{name}")
            stack.push_async_callback(made.close)
            return made

        pool = await open_pool(_url(settings, statement_timeout=READ_TIMEOUT), name=f"{SERVICE}-pool")
        stack.push_async_callback(pool.close)
        directory_writer = writer("directory")

        async def dead_letter(letter: Letter) -> None:
            await handlers.put_aside([letter], writer=directory_writer)

        broker = build_broker(settings, dead_letter=dead_letter)
        stack.push_async_callback(_disconnect, broker, await broker.connect())
        client = await connect_nats(settings)
        stack.push_async_callback(client.close)
        readiness.add("nats", nats_check(client))
        readiness.add("database", database_check(pool))

        relay = Relay(client=client, stream=CHARGES, pool=pool)

        async def acquired(partitions: frozenset[int]) -> None:
            relay.own(partitions)

        async def lost(partitions: frozenset[int]) -> None:
            relay.disown(partitions)

        def notify(rows: Sequence[OutboxRow]) -> None:
            if rows:
                relay.notify(rows)

        leases = LeaseKeeper(
            writer("leases"),
            owner=owner_name(SERVICE),
            ttl_seconds=settings.lease_seconds,
            on_acquired=acquired,
            on_lost=lost,
        )
        consumer = next(each for each in CONSUMERS if each.durable == METERING_CONSUMER)
        usage = UsageSubscriber(
            reader=PullReader(
                client,
                stream=consumer.stream,
                ack_wait_seconds=consumer.ack_wait_seconds,
                batch_size_max=settings.batch_size_max,
            ),
            durable=consumer.durable,
            writer=writer("ingest"),
            price_book=price_book,
            known=Known(),
            notify=notify,
            attempt_seconds_max=consumer.ack_wait_seconds / 3,
        )
        subscribe_directory(broker, settings, writer=directory_writer, price_book=price_book, notify=notify)
        trimmer = Trimmer(client, service=SERVICE)

        tasks = [
            _started(relay.run(), name="relay"),
            _started(leases.run(), name="leases"),
            _started(usage.run(), name="usage"),
            _started(trimmer.run(), name="trimmer"),
        ]
        await broker.start()
        try:
            yield Backend(
                nats=client, pool=pool, redrive=_redriver(settings, client=client, price_book=price_book, notify=notify)
            )
        finally:
            for stop in (usage.stop, leases.stop, relay.stop, trimmer.stop):
                stop()
            await _ended(tasks, seconds=settings.shutdown_seconds / 2)


def _redriver(
    settings: MeteringSettings, *, client: Client, price_book: PriceBook, notify: Callable[[Sequence[OutboxRow]], None]
) -> Callable[[DeadLetter], Awaitable[None]]:
    async def redrive(letter: DeadLetter) -> None:
        if letter.stream == LEDGER:
            # Metering may not publish what the ledger says: it takes it in directly.
            writer = Writer(_url(settings, transaction_timeout=TRANSACTION_TIMEOUT), name=f"{SERVICE}-redrive")
            try:
                fact = translate.read_account_opened(letter.payload)
                notify(await handlers.open_account(fact, writer=writer, price_book=price_book))
            finally:
                await writer.close()
            return
        try:
            await publish(client, stream=USAGE, message=translate.redriven(letter, received_at=now()))
        except PublishFailed as error:
            raise Problem(503, "not_confirmed", f"{error}; re-driving it again is safe") from error

    return redrive


def _url(settings: MeteringSettings, **options: str) -> SecretStr:
    chosen = " ".join(f"-c {name}={value}" for name, value in {"timezone": "UTC", **options}.items())
    return SecretStr(make_conninfo(settings.database_url.get_secret_value(), options=chosen))


def _started(work: Coroutine[None, None, None], *, name: str) -> asyncio.Task[None]:
    """A task without which the process is of no use: if it fails, the process ends, to be started anew."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a task failed, the process ends", task=name, exc_info=error)
            os.kill(os.getpid(), signal.SIGTERM)

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    return task


async def _disconnect(broker: NatsBroker, client: Client) -> None:
    try:
        await broker.stop()
    except NatsError as error:
        # Away or reconnecting: there is nothing to drain to.
        log.warning("NATS connection not drained", error=repr(error))
        await client.close()


async def _ended(tasks: Sequence[asyncio.Task[None]], *, seconds: float) -> None:
    """Wait for tasks that were told to stop. One that is stuck is cancelled: what it did not finish is done again."""
    _, stuck = await asyncio.wait(tasks, timeout=seconds)
    for task in stuck:
        log.warning("task did not stop in time", task=task.get_name())
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    settings = MeteringSettings()
    configure_logging(service=SERVICE, level=settings.log_level)
    # Batches are many objects that live for a moment: what is loaded by now need not be looked through each time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    serve(build(settings), settings)


if __name__ == "__main__":
    main()
