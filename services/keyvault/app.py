"""Keyvault's composition root: constructs everything and reads the settings. Importing it does no I/O.

Run as `python -m services.keyvault.app`.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Final

import psycopg
from fastapi import FastAPI
from psycopg_pool import PoolTimeout

from contracts import ledger
from contracts.streams import KEYS
from services.keyvault import engine, handlers, projections, translate
from services.keyvault.domain.keyring import Keyring
from services.keyvault.handlers import Vault
from services.keyvault.routes import routers
from services.keyvault.settings import KeyvaultSettings
from services.keyvault.store import KeyringFile
from services.keyvault.subscribers import KeySubscriber
from services.kit.broker import connect_nats, nats_check
from services.kit.catalogue import load_catalogue
from services.kit.clock import now
from services.kit.database import Pool, Writer, database_check, open_pool
from services.kit.http import Readiness, build_app, serve
from services.kit.leases import LeaseKeeper, owner_name
from services.kit.outbox import OutboxRow, Relay
from services.kit.telemetry import FAULTS, configure_logging, get_logger
from services.kit.trimmer import Trimmer

log = get_logger(__name__)

SERVICE: Final = "keyvault"
BODY_BYTES_MAX: Final = 64 << 10


def build(settings: KeyvaultSettings) -> FastAPI:
    """The application. Everything is connected when its lifespan begins, and finished when it ends."""
    readiness = Readiness()
    vault: list[Vault] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.tokens.load()
        async with _running(settings, readiness) as made:
            vault[:] = [made]
            readiness.started()
            yield

    return build_app(
        name=SERVICE,
        lifespan=lifespan,
        readiness=readiness,
        tokens_file=settings.tokens_file,
        routers=routers(lambda: vault[0]),
        body_bytes_max=BODY_BYTES_MAX,
    )


@asynccontextmanager
async def _running(settings: KeyvaultSettings, readiness: Readiness) -> AsyncIterator[Vault]:
    catalogue = load_catalogue(settings.catalogue_file)
    new_holder = translate.read_new_holder(catalogue.sections.get(SERVICE, {}), units=catalogue.units)
    keyring = KeyringFile(settings.keyring_file)
    keyring.read()
    async with AsyncExitStack() as stack:

        async def pool(name: str) -> Pool:
            made = await open_pool(settings.database_url, name=f"{SERVICE}-{name}")
            stack.push_async_callback(made.close)
            return made

        changes, lookups = await pool("pool"), await pool("lookups")
        lease_writer = Writer(settings.database_url, name=f"{SERVICE}-leases")
        stack.push_async_callback(lease_writer.close)
        client = await connect_nats(settings)
        stack.push_async_callback(client.close)
        readiness.add("nats", nats_check(client))
        readiness.add("database", database_check(changes))

        relay = Relay(client=client, stream=KEYS, pool=changes, keep_seconds=settings.outbox_keep_seconds)

        async def acquired(partitions: frozenset[int]) -> None:
            relay.own(partitions)

        async def lost(partitions: frozenset[int]) -> None:
            relay.disown(partitions)

        def notify(rows: Sequence[OutboxRow]) -> None:
            if rows:
                relay.notify(rows)

        async def ask(command: ledger.Command) -> ledger.Reply:
            return await engine.ask_ledger(client, command)

        vault = Vault(
            pool=changes,
            lookups=lookups,
            ring=lambda: _ring(keyring),
            ask=ask,
            units=catalogue.units,
            new_holder=new_holder,
            now=now,
            notify=notify,
            lease_valid=timedelta(seconds=settings.lease_valid_seconds),
        )
        leases = LeaseKeeper(
            lease_writer,
            owner=owner_name(SERVICE),
            ttl_seconds=settings.lease_seconds,
            on_acquired=acquired,
            on_lost=lost,
        )
        trimmer = Trimmer(client, service=SERVICE)
        subscriber = KeySubscriber(client, vault=vault)
        stopping = asyncio.Event()
        tasks = [
            _started(relay.run(), name="relay"),
            _started(leases.run(), name="leases"),
            _started(trimmer.run(), name="trimmer"),
            _started(
                _every(settings.uses_flush_seconds, lambda: handlers.flush_uses(vault), stopping, name="uses"),
                name="uses",
            ),
            _started(
                _every(settings.sweep_seconds, lambda: _sweep(vault), stopping, name="sweep"),
                name="sweep",
            ),
        ]
        await subscriber.start()
        try:
            yield vault
        finally:
            await subscriber.stop()
            stopping.set()
            for stop in (leases.stop, relay.stop, trimmer.stop):
                stop()
            await _ended(tasks, seconds=settings.shutdown_seconds / 2)


def _ring(keyring: KeyringFile) -> Keyring:
    """The ring as it stands in its file. A file that has become unusable leaves the last good one in force."""
    try:
        return keyring.read()
    except (OSError, translate.InvalidKeyring) as error:
        last = keyring.last_good
        if last is None:
            raise
        FAULTS.labels(place="keyvault.keyring").inc()
        log.error("key ring unusable, the last good one stays in force", error=str(error))
        return last


async def _sweep(vault: Vault) -> None:
    """Delete what has expired; say loudly if the ring lacks a key that secrets are wrapped with."""
    if deleted := await handlers.delete_expired(vault):
        log.info("expired secrets deleted", secrets=deleted)
    async with vault.pool.connection() as connection:
        rows = await projections.rows_by_ring_version(connection)
    ring = vault.ring()
    for version, count in rows.items():
        if version not in ring.keys:
            FAULTS.labels(place="keyvault.keyring").inc()
            log.critical("the key ring lacks a version", ring_version=version, secrets=count)


async def _every(seconds: float, work: Callable[[], Awaitable[None]], stopping: asyncio.Event, *, name: str) -> None:
    """Do something at once, every so often, and a last time at the end. What fails is logged, and tried again."""
    while True:
        last = stopping.is_set()
        try:
            await work()
        except (psycopg.Error, PoolTimeout, OSError) as error:
            FAULTS.labels(place=f"keyvault.{name}").inc()
            log.error("not done, it will be tried again", task=name, error=repr(error))
        if last:
            return
        try:
            async with asyncio.timeout(seconds):
                await stopping.wait()
        except TimeoutError:
            pass


def _started(work: Coroutine[None, None, None], *, name: str) -> asyncio.Task[None]:
    """A task without which the process is of no use: if it fails, the process ends, to be started anew."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a task failed, the process ends", task=name, exc_info=error)
            os.kill(os.getpid(), signal.SIGTERM)

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    return task


async def _ended(tasks: Sequence[asyncio.Task[None]], *, seconds: float) -> None:
    """Wait for tasks that were told to stop. One that is stuck is cancelled: what it did not finish is done again."""
    _, stuck = await asyncio.wait(tasks, timeout=seconds)
    for task in stuck:
        log.warning("task did not stop in time", task=task.get_name())
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    settings = KeyvaultSettings()
    configure_logging(service=SERVICE, level=settings.log_level)
    serve(build(settings), settings)


if __name__ == "__main__":
    main()
