"""Metering's composition root: constructs everything and reads the settings. Importing it does no I/O.

Run as `python -m services.metering.app`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Final

from fastapi import FastAPI
from nats.aio.client import Client

from contracts.pricing import PriceVersion
from contracts.streams import CHARGES, CONSUMERS, LEDGER, METERING_CONSUMER, USAGE
from services.kit.broker import build_broker, connect_nats, disconnect, nats_check
from services.kit.catalogue import load_catalogue
from services.kit.clock import now
from services.kit.database import Writer, database_check, open_pool
from services.kit.dead_letters import DeadLetter, Letter
from services.kit.http import Readiness, serve
from services.kit.leases import LeaseKeeper, owner_name
from services.kit.outbox import OutboxRow, Relay
from services.kit.problems import Problem
from services.kit.publish import PublishFailed, publish
from services.kit.reader import PullReader
from services.kit.running import BY_STATISTICS, essential_task, finish_tasks, service_app, url_with_options
from services.kit.telemetry import configure_logging, get_logger
from services.kit.tracing import configure_tracing
from services.kit.trimmer import Trimmer
from services.metering import handlers, translate
from services.metering.correcting.jobs import Corrector
from services.metering.correcting.settling import Settler
from services.metering.domain.prices import PriceBook
from services.metering.engine import PriceKeeper, Rerouter
from services.metering.handlers import Known
from services.metering.queries.definitions import follow_catalogue
from services.metering.routes import Backend, IngestLimits, routers
from services.metering.settings import MeteringSettings
from services.metering.subscribers import UsageSubscriber, subscribe_directory
from services.metering.translate.meters import CatalogueMeter, read_catalogue_meters

log = get_logger(__name__)

SERVICE: Final = "metering"

# A process that is stuck holds its heads' locks against the others no longer than this.
TRANSACTION_TIMEOUT: Final = "15s"
READ_TIMEOUT: Final = "10s"


def build(settings: MeteringSettings) -> FastAPI:
    """The application. Everything is connected when its lifespan begins, and finished when it ends."""
    return service_app(
        SERVICE,
        settings,
        running=_running,
        routers=lambda backend: routers(backend, limits=_limits(settings)),
        body_bytes_max=settings.metering_body_bytes_max,
    )


def _limits(settings: MeteringSettings) -> IngestLimits:
    return IngestLimits(
        age_max=timedelta(days=settings.metering_age_days_max),
        body_bytes_max=settings.metering_body_bytes_max,
        batch_events_max=settings.metering_batch_events_max,
        attributes_max=settings.metering_attributes_max,
    )


@asynccontextmanager
async def _running(settings: MeteringSettings, readiness: Readiness) -> AsyncIterator[Backend]:
    catalogue = load_catalogue(settings.catalogue_file)
    versions = translate.read_catalogue_versions(catalogue.section("price_versions"), units=catalogue.units)
    meters = read_catalogue_meters(catalogue.sections.get("meters", []))
    async with AsyncExitStack() as stack:

        def writer(name: str) -> Writer:
            url = url_with_options(settings.database_url, transaction_timeout=TRANSACTION_TIMEOUT)
            made = Writer(url, name=f"{SERVICE}-{name}")
            stack.push_async_callback(made.close)
            return made

        pool = await open_pool(
            url_with_options(settings.database_url, statement_timeout=READ_TIMEOUT), name=f"{SERVICE}-pool"
        )
        stack.push_async_callback(pool.close)
        questions = await open_pool(
            url_with_options(settings.database_url, statement_timeout=READ_TIMEOUT, **BY_STATISTICS),
            name=f"{SERVICE}-questions",
        )
        stack.push_async_callback(questions.close)
        directory_writer = writer("directory")

        async def dead_letter(letter: Letter) -> None:
            await handlers.put_aside([letter], writer=directory_writer)

        broker = build_broker(settings, dead_letter=dead_letter)
        stack.push_async_callback(disconnect, broker, await broker.connect())
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
        prices = PriceKeeper(
            writer=writer("prices"),
            pool=pool,
            units=catalogue.units,
            partitions=lambda: leases.partitions,
            notify=notify,
        )
        await _start(prices, versions)
        await _follow_catalogue(writer("meters"), meters)
        rerouter = Rerouter(
            client=client,
            writer=writer("rerouter"),
            pool=pool,
            partitions=lambda: leases.partitions,
            price_book=prices.book,
            notify=notify,
        )
        corrector = Corrector(writer=writer("corrections"), prices=prices, notify=notify)
        settler = Settler(writer=writer("settling"), prices=prices, partitions=lambda: leases.partitions, notify=notify)
        age_max = timedelta(days=settings.metering_age_days_max)
        consumer = next(each for each in CONSUMERS if each.durable == METERING_CONSUMER)
        usage = UsageSubscriber(
            reader=PullReader(
                client,
                stream=consumer.stream,
                ack_wait_seconds=consumer.ack_wait_seconds,
                batch_size_max=settings.batch_size_max,
                # The more of a partition a batch has, the fewer bundles its charges are.
                turn_of=translate.partition_token_of,
            ),
            durable=consumer.durable,
            writer=writer("ingest"),
            price_book=prices.book,
            known=Known(),
            notify=notify,
            rerouted=rerouter.wake,
            age_max=age_max,
            attempt_seconds_max=consumer.ack_wait_seconds / 3,
        )
        subscribe_directory(broker, settings, writer=directory_writer, price_book=prices.book, notify=notify)
        trimmer = Trimmer(client, service=SERVICE)

        tasks = [
            essential_task(relay.run(), name="relay"),
            essential_task(leases.run(), name="leases"),
            essential_task(usage.run(), name="usage"),
            essential_task(prices.run(), name="prices"),
            essential_task(rerouter.run(), name="rerouter"),
            essential_task(corrector.run(), name="corrections"),
            essential_task(settler.run(), name="settling"),
            essential_task(trimmer.run(), name="trimmer"),
        ]
        await broker.start()
        try:
            yield Backend(
                nats=client,
                pool=pool,
                questions=questions,
                prices=prices,
                redrive=_redriver(settings, client=client, price_book=prices.book, notify=notify),
                mapped=rerouter.wake,
                correcting=corrector.wake,
                staged=notify,
            )
        finally:
            for each in (usage, prices, rerouter, corrector, settler, leases, relay, trimmer):
                each.stop()
            await finish_tasks(tasks, deadline_seconds=settings.shutdown_seconds / 2)


async def _start(prices: PriceKeeper, catalogue: Sequence[PriceVersion]) -> None:
    """Have the price book read. Whoever would price otherwise than what is stored must not start."""
    try:
        await prices.start(catalogue)
    except ValueError as error:
        log.critical("metering does not start: the catalogue contradicts the price book", reason=str(error))
        raise


async def _follow_catalogue(writer: Writer, meters: Sequence[CatalogueMeter]) -> None:
    """Have the catalogue's meters stored. One that contradicts what is stored must not start."""
    try:
        async with writer.transaction() as connection:
            await follow_catalogue(connection, meters, at=now())
    except ValueError as error:
        log.critical("metering does not start: the catalogue contradicts the meters", reason=str(error))
        raise
    finally:
        await writer.close()


def _redriver(
    settings: MeteringSettings,
    *,
    client: Client,
    price_book: Callable[[], PriceBook],
    notify: Callable[[Sequence[OutboxRow]], None],
) -> Callable[[DeadLetter], Awaitable[None]]:
    async def redrive(letter: DeadLetter) -> None:
        if letter.stream == LEDGER:
            # Metering may not publish what the ledger says: it takes it in directly.
            url = url_with_options(settings.database_url, transaction_timeout=TRANSACTION_TIMEOUT)
            writer = Writer(url, name=f"{SERVICE}-redrive")
            try:
                fact = translate.read_account_opened(letter.payload)
                notify(await handlers.open_account(fact, writer=writer, price_book=price_book()))
            finally:
                await writer.close()
            return
        try:
            age_max = timedelta(days=settings.metering_age_days_max)
            message = translate.redriven(letter, received_at=now(), age_max=age_max)
            await publish(client, stream=USAGE, message=message)
        except PublishFailed as error:
            raise Problem(503, "not_confirmed", f"{error}; re-driving it again is safe") from error

    return redrive


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    settings = MeteringSettings()
    configure_logging(service=SERVICE, level=settings.log_level)
    configure_tracing(SERVICE, settings)
    serve(build(settings), settings)


if __name__ == "__main__":
    main()
