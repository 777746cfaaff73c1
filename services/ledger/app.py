"""The ledger's composition root: constructs everything and reads the settings. Importing it does no I/O.

Run as `python -m services.ledger.app`.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from fastapi import FastAPI
from faststream.nats import NatsBroker
from nats.aio.client import Client
from nats.errors import Error as NatsError

from contracts.streams import CHARGES, CONSUMERS, LEDGER
from services.kit import dead_letters
from services.kit.batcher import Batcher
from services.kit.broker import build_broker, connect_nats, disconnect, nats_check
from services.kit.catalogue import load_catalogue
from services.kit.clock import now
from services.kit.database import Pool, Writer, database_check, open_pool
from services.kit.dead_letters import Letter
from services.kit.http import Readiness, serve
from services.kit.leases import LeaseKeeper, owner_name
from services.kit.outbox import OutboxRow, Relay
from services.kit.running import essential_task, finish_tasks, service_app, url_with_options
from services.kit.telemetry import configure_logging, get_logger
from services.kit.tracing import configure_tracing
from services.kit.trimmer import Trimmer
from services.ledger.domain.commands import Units
from services.ledger.engine import Owners
from services.ledger.handlers import COMMAND_COST, Item, Ledger, Result
from services.ledger.routes import Backend, routers
from services.ledger.settings import LedgerSettings
from services.ledger.signing import Signer, read_signer, signer
from services.ledger.subscribers import TRY_AGAIN, ChargesSubscriber, CommandSubscriber, Limits, subscribe_payments
from services.ledger.sweeper import Sweeper

log = get_logger(__name__)

SERVICE: Final = "ledger"

# A transaction of an owner that is stuck holds its heads' locks against the next owner no longer than this.
TRANSACTION_TIMEOUT: Final = "5s"
# So much has to wait for the next batch to be decided while one commits. Less is better decided with what comes then.
AHEAD_COST_MIN: Final = 500
READ_TIMEOUT: Final = "10s"


def build(settings: LedgerSettings) -> FastAPI:
    """The application. Everything is connected when its lifespan begins, and finished when it ends."""
    return service_app(SERVICE, settings, running=_running, routers=routers, body_bytes_max=settings.body_bytes_max)


@asynccontextmanager
async def _running(settings: LedgerSettings, readiness: Readiness) -> AsyncIterator[Backend]:
    units = Units.of(load_catalogue(settings.catalogue_file).units)
    async with AsyncExitStack() as stack:
        pool = await open_pool(
            url_with_options(settings.database_url, statement_timeout=READ_TIMEOUT), name=f"{SERVICE}-pool"
        )
        stack.push_async_callback(pool.close)
        client = await connect_nats(settings)
        stack.push_async_callback(client.close)
        readiness.add("nats", nats_check(client))
        readiness.add("database", database_check(pool))
        owners = Owners(client)
        if settings.ledger_owns:
            await stack.enter_async_context(_owning(settings, client=client, pool=pool, units=units, owners=owners))
        yield Backend(owners=owners, pool=pool, units=units)


@asynccontextmanager
async def _owning(
    settings: LedgerSettings, *, client: Client, pool: Pool, units: Units, owners: Owners
) -> AsyncIterator[None]:
    """Own partitions: decide their commands and charges, tell what became of them, do what is due."""
    async with AsyncExitStack() as stack:

        def writer(name: str) -> Writer:
            made = Writer(
                url_with_options(
                    settings.database_url,
                    transaction_timeout=TRANSACTION_TIMEOUT,
                    # All that is written is asked for by keys: to plan for the keys of one batch gains nothing.
                    plan_cache_mode="force_generic_plan",
                ),
                name=f"{SERVICE}-{name}",
            )
            stack.push_async_callback(made.close)
            return made

        broker = _broker(settings, pool)
        stack.push_async_callback(disconnect, broker, await broker.connect())

        relay = Relay(client=client, stream=LEDGER, pool=pool, keep_seconds=settings.outbox_keep_seconds)

        def on_committed(rows: Iterable[OutboxRow]) -> None:
            relay.notify(rows)

        ledger = Ledger(
            writer=writer("writer"), units=units, now=now, on_committed=on_committed, signer=_signer(settings)
        )
        batcher: Batcher[Item, Result] = Batcher(
            name=SERVICE,
            process=ledger.process,
            batch_cost_max=settings.batch_cost_max,
            queue_cost_max=settings.queue_cost_max,
            ahead_cost_min=AHEAD_COST_MIN,
            whole_batch_errors=TRY_AGAIN,
        )
        limits = Limits(body_bytes_max=settings.body_bytes_max, list_commands_max=settings.list_commands_max)
        commands = CommandSubscriber(
            client,
            batcher=batcher,
            units=units,
            limits=limits,
            # All that may wait, and two batches.
            under_way_max=(settings.queue_cost_max + 2 * settings.batch_cost_max) // COMMAND_COST,
        )
        charges = ChargesSubscriber(
            client,
            batcher=batcher,
            units=units,
            pool=pool,
            ack_wait_seconds=next(each.ack_wait_seconds for each in CONSUMERS if each.stream == CHARGES),
        )

        async def acquired(partitions: frozenset[int]) -> None:
            epochs = {partition: epoch for partition in partitions if (epoch := leases.epoch(partition)) is not None}
            owned = await ledger.take_over(epochs)
            relay.own(owned)
            await commands.own(owned)
            await charges.own(owned)

        async def lost(partitions: frozenset[int]) -> None:
            await commands.disown(partitions)
            await charges.disown(partitions)
            ledger.give_up(partitions)
            relay.disown(partitions)

        leases = LeaseKeeper(
            writer("leases"),
            owner=owner_name(SERVICE),
            ttl_seconds=settings.lease_seconds,
            on_acquired=acquired,
            on_lost=lost,
        )
        subscribe_payments(broker, settings, owners=owners)
        trimmer = Trimmer(client, service=SERVICE)
        sweeper = Sweeper(
            batcher=batcher,
            pool=pool,
            partitions=lambda: ledger.partitions,
            now=now,
            seconds=settings.sweep_seconds,
            cost_max=settings.sweep_cost_max,
            batch_cost_max=settings.batch_cost_max,
        )
        tasks = {
            name: essential_task(work, name=name)
            for name, work in (
                ("relay", relay.run()),
                ("batcher", batcher.run()),
                ("charges", charges.run()),
                ("leases", leases.run()),
                ("trimmer", trimmer.run()),
                ("sweeper", sweeper.run()),
            )
        }
        await broker.start()
        try:
            yield
        finally:
            # From the outside inwards: no more work, then the work in hand, then what it has to say.
            await _no_more_payments(broker)
            await charges.stop()
            sweeper.stop()
            leases.stop()
            await finish_tasks(
                [tasks["charges"], tasks["leases"], tasks["sweeper"]], deadline_seconds=settings.shutdown_seconds / 4
            )
            batcher.stop()
            await finish_tasks([tasks["batcher"]], deadline_seconds=settings.shutdown_seconds / 4)
            relay.stop()
            trimmer.stop()
            await finish_tasks([tasks["relay"], tasks["trimmer"]], deadline_seconds=settings.shutdown_seconds / 4)


def _signer(settings: LedgerSettings) -> Signer | None:
    if settings.ledger_signing_key is not None:
        return signer(settings.ledger_signing_key.get_secret_value())
    if settings.ledger_signing_key_file is not None:
        return read_signer(settings.ledger_signing_key_file)
    log.warning("no signing key: who may change the journal may also change its chain")
    return None


def _broker(settings: LedgerSettings, pool: Pool) -> NatsBroker:
    async def dead_letter(letter: Letter) -> None:
        async with pool.connection() as connection:
            await dead_letters.record(connection, [letter])

    return build_broker(settings, dead_letter=dead_letter)


async def _no_more_payments(broker: NatsBroker) -> None:
    for subscriber in broker.subscribers:
        try:
            await subscriber.stop()
        except NatsError as error:
            # Away or reconnecting: nothing comes in anyway.
            log.warning("payments not unsubscribed", error=repr(error))


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    settings = LedgerSettings()
    configure_logging(service=SERVICE, level=settings.log_level)
    configure_tracing(SERVICE, settings)
    serve(build(settings), settings)


if __name__ == "__main__":
    main()
