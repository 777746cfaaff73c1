"""Billing's composition root: constructs everything and reads the settings. Importing it does no I/O.

Run as `python -m services.billing.app`.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fastapi import FastAPI

from contracts.streams import PAYMENTS, STRIPE
from services.billing import handlers, translate
from services.billing.handlers import Books, EventUnknown
from services.billing.routes import Backend, routers
from services.billing.settings import BillingSettings
from services.billing.store import Connection
from services.billing.subscribers import subscribe_inbox
from services.billing.translate import STRIPE_LANE
from services.kit.broker import build_broker, connect_nats, disconnect, nats_check
from services.kit.catalogue import load_catalogue
from services.kit.database import Writer, database_check, open_pool
from services.kit.dead_letters import DeadLetter, Letter, Unreadable
from services.kit.http import Readiness, serve
from services.kit.leases import LeaseKeeper, owner_name
from services.kit.outbox import OutboxRow, Relay
from services.kit.running import essential_task, finish_tasks, service_app, url_with_options
from services.kit.telemetry import configure_logging, get_logger
from services.kit.tracing import configure_tracing
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
    return service_app(
        SERVICE,
        settings,
        running=_running,
        routers=routers,
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
            made = Writer(
                url_with_options(settings.database_url, transaction_timeout=TRANSACTION_TIMEOUT),
                name=f"{SERVICE}-{name}",
            )
            stack.push_async_callback(made.close)
            return made

        pool = await open_pool(
            url_with_options(
                settings.database_url, statement_timeout=STATEMENT_TIMEOUT, transaction_timeout=TRANSACTION_TIMEOUT
            ),
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

        # Closed after the broker: what still comes while that stops would open another connection.
        inbox_writer = writer("inbox")
        broker = build_broker(settings, dead_letter=dead_letter)
        stack.push_async_callback(disconnect, broker, await broker.connect())
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
            transaction=inbox_writer.transaction,
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
            essential_task(relays.payments.run(), name="payments-relay"),
            essential_task(relays.stripe.run(), name="stripe-relay"),
            essential_task(leases.run(), name="leases"),
            essential_task(trimmer.run(), name="trimmer"),
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
            await finish_tasks(tasks, deadline_seconds=settings.shutdown_seconds / 2)


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


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    settings = BillingSettings()
    configure_logging(service=SERVICE, level=settings.log_level)
    configure_tracing(SERVICE, settings)
    serve(build(settings), settings)


if __name__ == "__main__":
    main()
