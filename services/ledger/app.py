"""The ledger's composition root: constructs everything and reads the settings. Importing it does no I/O.

Run as `python -m services.ledger.app`.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from fastapi import FastAPI
from faststream.nats import NatsBroker
from nats.aio.client import Client
from nats.errors import Error as NatsError
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from contracts.streams import CHARGES, CONSUMERS, LEDGER
from services.kit import dead_letters
from services.kit.batcher import Batcher
from services.kit.broker import build_broker, connect_nats, nats_check
from services.kit.catalogue import load_catalogue
from services.kit.clock import now
from services.kit.database import Pool, Writer, database_check, open_pool
from services.kit.dead_letters import Letter
from services.kit.http import Readiness, build_app, serve
from services.kit.leases import LeaseKeeper, owner_name
from services.kit.outbox import OutboxRow, Relay
from services.kit.telemetry import configure_logging, get_logger
from services.kit.trimmer import Trimmer
from services.ledger.domain.commands import Units
from services.ledger.engine import Owners
from services.ledger.handlers import Item, Ledger, Result
from services.ledger.routes import Backend, routers
from services.ledger.settings import LedgerSettings
from services.ledger.subscribers import TRY_AGAIN, ChargesSubscriber, CommandSubscriber, subscribe_payments

log = get_logger(__name__)

SERVICE: Final = "ledger"

# A transaction of an owner that is stuck holds its heads' locks against the next owner no longer than this.
TRANSACTION_TIMEOUT: Final = "5s"
READ_TIMEOUT: Final = "10s"


def build(settings: LedgerSettings) -> FastAPI:
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
async def _running(settings: LedgerSettings, readiness: Readiness) -> AsyncIterator[Backend]:
    units = Units.of(load_catalogue(settings.catalogue_file).units)
    async with AsyncExitStack() as stack:

        def writer(name: str) -> Writer:
            made = Writer(_url(settings, transaction_timeout=TRANSACTION_TIMEOUT), name=f"{SERVICE}-{name}")
            stack.push_async_callback(made.close)
            return made

        pool = await open_pool(_url(settings, statement_timeout=READ_TIMEOUT), name=f"{SERVICE}-pool")
        stack.push_async_callback(pool.close)
        broker = _broker(settings, pool)
        stack.push_async_callback(_disconnect, broker, await broker.connect())
        client = await connect_nats(settings)
        stack.push_async_callback(client.close)
        readiness.add("nats", nats_check(client))
        readiness.add("database", database_check(pool))

        relay = Relay(client=client, stream=LEDGER, pool=pool, keep_seconds=settings.outbox_keep_seconds)

        def on_committed(rows: Iterable[OutboxRow]) -> None:
            relay.notify(rows)

        ledger = Ledger(writer=writer("writer"), units=units, now=now, on_committed=on_committed)
        batcher: Batcher[Item, Result] = Batcher(
            name=SERVICE,
            process=ledger.process,
            batch_cost_max=settings.batch_cost_max,
            queue_cost_max=settings.queue_cost_max,
            whole_batch_errors=TRY_AGAIN,
        )
        commands = CommandSubscriber(client, batcher=batcher, units=units)
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
        owners = Owners(client)
        subscribe_payments(broker, settings, owners=owners)
        trimmer = Trimmer(client, service=SERVICE)
        tasks = {
            name: _started(work, name=name)
            for name, work in (
                ("relay", relay.run()),
                ("batcher", batcher.run()),
                ("charges", charges.run()),
                ("leases", leases.run()),
                ("trimmer", trimmer.run()),
            )
        }
        await broker.start()
        try:
            yield Backend(owners=owners, pool=pool, units=units)
        finally:
            # From the outside inwards: no more work, then the work in hand, then what it has to say.
            await _no_more_payments(broker)
            await charges.stop()
            leases.stop()
            await _ended([tasks["charges"], tasks["leases"]], seconds=settings.shutdown_seconds / 4)
            batcher.stop()
            await _ended([tasks["batcher"]], seconds=settings.shutdown_seconds / 4)
            relay.stop()
            trimmer.stop()
            await _ended([tasks["relay"], tasks["trimmer"]], seconds=settings.shutdown_seconds / 4)


def _broker(settings: LedgerSettings, pool: Pool) -> NatsBroker:
    async def dead_letter(letter: Letter) -> None:
        async with pool.connection() as connection:
            await dead_letters.record(connection, [letter])

    return build_broker(settings, dead_letter=dead_letter)


def _url(settings: LedgerSettings, **options: str) -> SecretStr:
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


async def _no_more_payments(broker: NatsBroker) -> None:
    for subscriber in broker.subscribers:
        try:
            await subscriber.stop()
        except NatsError as error:
            # Away or reconnecting: nothing comes in anyway.
            log.warning("payments not unsubscribed", error=repr(error))


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
    settings = LedgerSettings()
    configure_logging(service=SERVICE, level=settings.log_level)
    serve(build(settings), settings)


if __name__ == "__main__":
    main()
