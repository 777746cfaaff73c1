"""Keyvault's composition root: constructs everything and reads the settings. Importing it does no I/O.

Run as `python -m services.keyvault.app`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
from services.kit.http import Readiness, serve
from services.kit.leases import LeaseKeeper, owner_name
from services.kit.outbox import OutboxRow, Relay
from services.kit.running import essential_task, finish_tasks, service_app, url_with_options
from services.kit.telemetry import FAULTS, configure_logging, get_logger
from services.kit.tracing import configure_tracing
from services.kit.trimmer import Trimmer

log = get_logger(__name__)

SERVICE: Final = "keyvault"
BODY_BYTES_MAX: Final = 64 << 10
# A process that is stuck holds its locks against the others no longer than this.
TRANSACTION_TIMEOUT: Final = "15s"
STATEMENT_TIMEOUT: Final = "10s"


def build(settings: KeyvaultSettings) -> FastAPI:
    """The application. Everything is connected when its lifespan begins, and finished when it ends."""
    return service_app(
        SERVICE,
        settings,
        running=_running,
        routers=routers,
        body_bytes_max=BODY_BYTES_MAX,
    )


@asynccontextmanager
async def _running(settings: KeyvaultSettings, readiness: Readiness) -> AsyncIterator[Vault]:
    catalogue = load_catalogue(settings.catalogue_file)
    new_holder = translate.read_new_holder(catalogue.sections.get(SERVICE, {}), units=catalogue.units)
    keyring = KeyringFile(settings.keyring_file)
    keyring.read()
    async with AsyncExitStack() as stack:
        url = url_with_options(
            settings.database_url, statement_timeout=STATEMENT_TIMEOUT, transaction_timeout=TRANSACTION_TIMEOUT
        )

        async def pool(name: str) -> Pool:
            made = await open_pool(url, name=f"{SERVICE}-{name}")
            stack.push_async_callback(made.close)
            return made

        changes, lookups = await pool("pool"), await pool("lookups")
        lease_writer = Writer(url, name=f"{SERVICE}-leases")
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
            essential_task(relay.run(), name="relay"),
            essential_task(leases.run(), name="leases"),
            essential_task(trimmer.run(), name="trimmer"),
            essential_task(
                _every(settings.uses_flush_seconds, lambda: handlers.flush_uses(vault), stopping, name="uses"),
                name="uses",
            ),
            essential_task(
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
            await finish_tasks(tasks, deadline_seconds=settings.shutdown_seconds / 2)


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


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    settings = KeyvaultSettings()
    configure_logging(service=SERVICE, level=settings.log_level)
    configure_tracing(SERVICE, settings)
    serve(build(settings), settings)


if __name__ == "__main__":
    main()
