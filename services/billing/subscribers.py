"""Messages in: an event of Stripe's is in the inbox. It is processed until that succeeds, each time a little later."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import psycopg
from faststream.exceptions import NackMessage
from faststream.nats import NatsBroker
from psycopg_pool import PoolTimeout

from contracts.billing import StripeReceived
from contracts.streams import CONSUMERS, STRIPE
from services.billing import handlers, translate
from services.billing.handlers import Books, EventUnknown, Transaction
from services.kit.broker import pull_subscriber
from services.kit.clock import now
from services.kit.dead_letters import Unreadable
from services.kit.outbox import OutboxRow
from services.kit.settings import ServiceSettings

if TYPE_CHECKING:
    import stripe

# The reports of refunds come with the report of the charge, in any order. Stripe is asked for them after so long only.
REFUNDS_AWAITED: Final = timedelta(seconds=2)


def subscribe_inbox(
    broker: NatsBroker,
    settings: ServiceSettings,
    *,
    client: "stripe.StripeClient",
    transaction: Transaction,
    books: Books,
    notify: Callable[[Sequence[OutboxRow]], None],
) -> None:
    """Have `broker` tell billing of every event that is in the inbox."""
    (consumer,) = (each for each in CONSUMERS if each.stream == STRIPE and each.service == settings.service)

    async def process(received: StripeReceived) -> None:
        processed = await handlers.process(received.event, transaction=transaction, books=books)
        notify(processed.rows)
        if processed.unlisted is None:
            return
        if now() - received.recorded_at < REFUNDS_AWAITED:
            # Nothing is wrong yet.
            raise NackMessage(delay=REFUNDS_AWAITED.total_seconds())
        listed = await handlers.list_refunds(processed.unlisted, client=client, transaction=transaction, books=books)
        notify(listed.rows)

    @pull_subscriber(broker, settings, consumer=consumer)
    async def stripe_received(body: bytes) -> None:
        received = translate.read_received(body)
        try:
            await process(received)
        except NackMessage:
            raise
        except EventUnknown as error:
            # Its message is sent only after it was stored: another database speaks, or this one was restored.
            raise Unreadable(f"there is no event {error.event} in the inbox") from error
        except Exception as error:
            await _note(received.event, error, transaction)
            raise


async def _note(event: str, error: Exception, transaction: Transaction) -> None:
    try:
        await handlers.note_failure(event, error, transaction=transaction)
    except (psycopg.Error, PoolTimeout, TimeoutError, OSError):
        # The fault itself is logged and counted by whoever delivers the message again.
        return
