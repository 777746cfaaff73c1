"""Billing's composition root: constructs everything and reads the settings. Importing it does no I/O.

Run as `python -m services.billing.app`.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fastapi import FastAPI
from faststream.nats import NatsBroker
from nats.aio.client import Client
from nats.errors import Error as NatsError
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from contracts.streams import PAYMENTS, STRIPE
from services.billing import handlers, translate
from services.billing.handlers import Books, EventUnknown
from services.billing.routes import Backend, routers
from services.billing.settings import BillingSettings
from services.billing.store import Connection
from services.billing.subscribers import subscribe_inbox
from services.billing.translate import STRIPE_LANE
from services.kit.broker import build_broker, connect_nats, nats_check
from services.kit.catalogue import load_catalogue
from services.kit.database import Writer, database_check, open_pool
from services.kit.dead_letters import DeadLetter, Letter, Unreadable
from services.kit.http import Readiness, build_app, serve
from services.kit.leases import LeaseKeeper, owner_name
from services.kit.outbox import OutboxRow, Relay
from services.kit.telemetry import configure_logging, get_logger
from services.kit.trimmer import Trimmer

if TYPE_CHECKING:
    import stripe

log = get_logger(__name__)

SERVICE: Final = "billing"

# A process that is stuck holds its locks against the others no longer than this.
TRANSACTION_TIMEOUT: Final = "15s"
STATEMENT_TIMEOUT: Final = "10s"
POOL_CONNECTIONS_MAX: Final = 8
# Stripe's events are far smaller.
BODY_BYTES_MAX: Final = 1 << 20
STRIPE_RETRIES: Final = 1
# Who relays this partition relays what billing says to itself, too.
STRIPE_RELAYED_WITH: Final = 0


def build(settings: BillingSettings) -> FastAPI:
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
        body_bytes_max=BODY_BYTES_MAX,
    )


@asynccontextmanager
async def _running(settings: BillingSettings, readiness: Readiness) -> AsyncIterator[Backend]:
    units = load_catalogue(settings.catalogue_file).units
    offers = translate.read_offers(settings.billing_catalogue_file.read_text(encoding="utf-8"), units=units)
    books = Books(offers=offers, units=units)
    stripe_client = _stripe_client(settings)
    async with AsyncExitStack() as stack:

        def writer(name: str) -> Writer:
            made = Writer(_url(settings, transaction_timeout=TRANSACTION_TIMEOUT), name=f"{SERVICE}-{name}")
            stack.push_async_callback(made.close)
            return made

        pool = await open_pool(
            _url(settings, statement_timeout=STATEMENT_TIMEOUT, transaction_timeout=TRANSACTION_TIMEOUT),
            name=f"{SERVICE}-pool",
            connections_max=POOL_CONNECTIONS_MAX,
        )
        stack.push_async_callback(pool.close)

        @asynccontextmanager
        async def pooled() -> AsyncIterator[Connection]:
            async with pool.connection() as connection, connection.transaction():
                yield connection

        async def dead_letter(letter: Letter) -> None:
            await handlers.put_aside([letter], transaction=pooled)

        broker = build_broker(settings, dead_letter=dead_letter)
        stack.push_async_callback(_disconnect, broker, await broker.connect())
        client = await connect_nats(settings)
        stack.push_async_callback(client.close)
        readiness.add("nats", nats_check(client))
        readiness.add("database", database_check(pool))

        relays = _Relays(
            payments=Relay(client=client, stream=PAYMENTS, pool=pool),
            stripe=Relay(client=client, stream=STRIPE, pool=pool),
        )
        leases = LeaseKeeper(
            writer("leases"),
            owner=owner_name(SERVICE),
            ttl_seconds=settings.lease_seconds,
            on_acquired=relays.own,
            on_lost=relays.disown,
        )
        subscribe_inbox(
            broker,
            settings,
            client=stripe_client,
            transaction=writer("inbox").transaction,
            books=books,
            notify=relays.notify,
        )
        trimmer = Trimmer(client, service=SERVICE)

        async def redrive(letter: DeadLetter) -> None:
            received = translate.read_received(letter.payload)
            try:
                processed = await handlers.process(received.event, transaction=pooled, books=books)
            except EventUnknown as error:
                raise Unreadable(f"there is no event {error.event} in the inbox") from error
            relays.notify(processed.rows)

        tasks = [
            _started(relays.payments.run(), name="payments-relay"),
            _started(relays.stripe.run(), name="stripe-relay"),
            _started(leases.run(), name="leases"),
            _started(trimmer.run(), name="trimmer"),
        ]
        await broker.start()
        try:
            yield Backend(
                pool=pool,
                transaction=pooled,
                client=stripe_client,
                books=books,
                webhook_secrets=settings.stripe_webhook_secrets,
                webhook_tolerance_seconds=settings.webhook_tolerance_seconds,
                notify=relays.notify,
                redrive=redrive,
            )
        finally:
            for stop in (leases.stop, relays.payments.stop, relays.stripe.stop, trimmer.stop):
                stop()
            await _ended(tasks, seconds=settings.shutdown_seconds / 2)


@dataclass(frozen=True, slots=True)
class _Relays:
    """One outbox, two streams: the partitions' facts for the ledger, and the lane of what billing says to itself."""

    payments: Relay
    stripe: Relay

    async def own(self, partitions: frozenset[int]) -> None:
        self.payments.own(partitions)
        if STRIPE_RELAYED_WITH in partitions:
            self.stripe.own([STRIPE_LANE])

    async def disown(self, partitions: frozenset[int]) -> None:
        self.payments.disown(partitions)
        if STRIPE_RELAYED_WITH in partitions:
            self.stripe.disown([STRIPE_LANE])

    def notify(self, rows: Sequence[OutboxRow]) -> None:
        if rows:
            self.stripe.notify(row for row in rows if row.partition == STRIPE_LANE)
            self.payments.notify(row for row in rows if row.partition != STRIPE_LANE)


def _stripe_client(settings: BillingSettings) -> "stripe.StripeClient":
    """Stripe's own library. It is used from threads: the library has a session of its own in each."""
    import stripe  # noqa: PLC0415 - its HTTP library binds a socket when it is imported

    # It would report to Stripe how long our calls took.
    stripe.enable_telemetry = False
    api_key = settings.stripe_api_key.get_secret_value()
    timeout_seconds, base = settings.stripe_timeout_seconds, settings.stripe_api_base
    if base is None:
        http = stripe.RequestsClient(timeout=timeout_seconds)
        return stripe.StripeClient(api_key, http_client=http, max_network_retries=STRIPE_RETRIES)
    # A simulator is near: the proxies of the environment lead elsewhere.
    http = stripe.RequestsClient(timeout=timeout_seconds, proxy={"http": "", "https": ""})
    return stripe.StripeClient(
        api_key, http_client=http, max_network_retries=STRIPE_RETRIES, base_addresses={"api": base}
    )


def _url(settings: BillingSettings, **options: str) -> SecretStr:
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
    settings = BillingSettings()
    configure_logging(service=SERVICE, level=settings.log_level)
    serve(build(settings), settings)


if __name__ == "__main__":
    main()
