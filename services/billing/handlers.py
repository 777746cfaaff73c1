"""What happens to Stripe's events and to checkouts. Each handler is one transaction, or two around a call of Stripe.

An event is answered, and a message acknowledged, after the commit only. Processing an event again, or late, or before
another, comes to the same: a payment is settled anew from all that was reported about it, under the lock of its row.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
from prometheus_client import Counter

from contracts.billing import ClaimState
from contracts.money import Unit
from contracts.partition import partition_of
from services.billing import store, translate
from services.billing.domain.offers import Offers, Package, Terms, terms_of
from services.billing.domain.payments import (
    ClaimedFact,
    Granted,
    Settled,
    Unattributed,
    Unpaid,
    settle,
    status_of,
)
from services.billing.domain.reports import PaymentReport, Report
from services.billing.store import Checkout, Connection, Head
from services.billing.translate import STRIPE_LANE
from services.kit.clock import now
from services.kit.dead_letters import Letter, Unreadable
from services.kit.dead_letters import record as record_letters
from services.kit.ids import new_uuid7
from services.kit.outbox import OutboxRow, stage
from services.kit.telemetry import REGISTRY, get_logger

if TYPE_CHECKING:
    import stripe

log = get_logger(__name__)

Transaction = Callable[[], AbstractAsyncContextManager[Connection]]
Answer = TypeVar("Answer")

EVENTS: Final = Counter(
    "scrip_billing_stripe_events",
    "Events of Stripe's: new and repeated deliveries, then what became of each: applied, waiting, ignored, …",
    ("outcome",),
    registry=REGISTRY,
)
GRANTED: Final = Counter("scrip_billing_payments", "Payments granted.", registry=REGISTRY)
ALARMS: Final = Counter(
    "scrip_billing_alarms",
    "What somebody must look at: payments unattributed, events conflicting or unreadable. Each is an alarm.",
    ("kind",),
    registry=REGISTRY,
)

_STEP: Final = timedelta(microseconds=1)
_REFUNDS_PAGE: Final = 100


class StripeAway(Exception):
    """Stripe could not be reached, or failed: nothing is known to have happened, and asking again is safe."""


class StripeRefused(Exception):
    """Stripe will not, and asking again will not help: our key, or what we ask for."""


@dataclass(eq=False)
class PackageUnknown(Exception):
    """The catalogue sells no such package."""

    package: str


@dataclass(eq=False)
class QuantityTooLarge(Exception):
    """More than the package is sold in at once."""

    quantity: int
    quantity_max: int


@dataclass(eq=False)
class KeyUsed(Exception):
    """The idempotency key was used for another checkout."""

    idempotency_key: str


@dataclass(eq=False)
class NotUnattributed(Exception):
    """The event is not about a payment that waits for somebody to say whose it is. `detail` is how things stand."""

    event: str
    detail: str


@dataclass(eq=False)
class EventUnknown(Exception):
    """There is no such event in the inbox."""

    event: str


@dataclass(eq=False)
class ResolutionRefused(Exception):
    """What was paid is not what that package costs, or the account is none."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Processed:
    """What processing an event came to, and what the ledger is told.

    `unlisted`: the payment, where more was refunded than the refunds known come to.
    """

    settled: Settled | None
    rows: Sequence[OutboxRow] = ()
    unlisted: str | None = None


@dataclass(frozen=True, slots=True)
class Books:
    """What payments are held against, and the units they are granted in."""

    offers: Offers
    units: Mapping[str, Unit]


# The inbox ------------------------------------------------------------------------------------------------------------


async def receive(body: bytes, *, transaction: Transaction) -> OutboxRow | None:
    """Store what Stripe signed, and that it is to be processed. Null for a repeat."""
    envelope = translate.read_envelope(body)
    async with transaction() as connection:
        if await store.note_repeat(connection, envelope.id):
            EVENTS.labels(outcome="repeated").inc()
            return None
        head = await store.lock_head(connection, STRIPE_LANE)
        # Once more: whoever held the lane may have stored this very event.
        if await store.note_repeat(connection, envelope.id):
            EVENTS.labels(outcome="repeated").inc()
            return None
        moved = _next(head)
        await store.add_event(connection, envelope, body, number=moved.outbox_number, received_at=moved.recorded_at)
        row = translate.received_row(envelope.id, number=moved.outbox_number, recorded_at=moved.recorded_at)
        await stage(connection, [row])
        await store.move_head(connection, STRIPE_LANE, moved)
    EVENTS.labels(outcome="new").inc()
    return row


async def process(event: str, *, transaction: Transaction, books: Books) -> Processed:
    """Let an event of the inbox have its effect, whatever it was before. Raises EventUnknown."""
    async with transaction() as connection:
        found = await store.find_event(connection, event)
        if found is None:
            raise EventUnknown(event)
        try:
            reading = translate.read_event(found.payload)
        except Unreadable as error:
            detail = "; ".join([error.reason, *(f"{each['field']}: {each['message']}" for each in error.problems)])
            if await store.close_event(connection, event, status="unreadable", detail=detail, at=now()):
                _alarm("unreadable", stripe_event=event, type=found.type, detail=detail)
            return Processed(None)
        if reading.payment is None:
            if await store.close_event(connection, event, status="ignored", detail=reading.ignored, at=now()):
                EVENTS.labels(outcome="ignored").inc()
            return Processed(None)
        before = await store.lock_payment(connection, reading.payment, recorded_at=now())
        await store.tie_event(connection, event, payment=reading.payment)
        settled, rows = await _settle(connection, reading.payment, books=books)
    _report(reading.payment, before=before, settled=settled)
    return Processed(settled, rows, unlisted=reading.payment if settled.unlisted else None)


async def list_refunds(
    payment: str, *, client: "stripe.StripeClient", transaction: Transaction, books: Books
) -> Processed:
    """Ask Stripe for the refunds of a payment that were not reported, and settle it. Raises StripeAway, StripeRefused.

    An endpoint that is told of charges only hears how much was refunded, not by which refunds.
    """

    def listed() -> list[object]:
        pages = client.v1.refunds.list({"payment_intent": payment, "limit": _REFUNDS_PAGE})
        return [refund.to_dict() for refund in pages.auto_paging_iter()]

    payload = msgspec.json.encode({"data": await _ask(listed, what="list refunds")})
    async with transaction() as connection:
        before = await store.lock_payment(connection, payment, recorded_at=now())
        settled, _ = await _settled(connection, payment, books=books)
        listed_at = now()
        for event in settled.unlisted:
            await store.add_listed_refunds(connection, event, payment=payment, payload=payload, listed_at=listed_at)
        settled, rows = await _settle(connection, payment, books=books)
    _report(payment, before=before, settled=settled)
    return Processed(settled, rows)


async def note_failure(event: str, error: Exception, *, transaction: Transaction) -> None:
    """Show at the event that a fault met it. It is tried again all the same."""
    async with transaction() as connection:
        await store.note_failure(connection, event, detail=type(error).__name__)


async def put_aside(letters: Sequence[Letter], *, transaction: Transaction) -> None:
    """Record dead letters, each once."""
    async with transaction() as connection:
        await record_letters(connection, letters)


# Payments -------------------------------------------------------------------------------------------------------------


async def resolve(
    event: str, *, account: str, package: str, quantity: int, principal: str, transaction: Transaction, books: Books
) -> Processed:
    """Say whose the payment is that an event reported, and grant it. Again in the same words does nothing.

    Raises EventUnknown, NotUnattributed, PackageUnknown, QuantityTooLarge, ResolutionRefused.
    """
    resolution = _agree(books.offers, account=account, package=package, quantity=quantity)
    async with transaction() as connection:
        found = await store.find_event(connection, event)
        if found is None:
            raise EventUnknown(event)
        if found.payment is None:
            raise NotUnattributed(event, f"it is {found.status}, and about no payment")
        before = await store.lock_payment(connection, found.payment, recorded_at=now())
        told = await store.find_told(connection, found.payment)
        if told.terms is not None:
            terms = told.terms
            same = (terms.account, terms.package, terms.quantity) == (account, package, quantity)
            if same and await store.is_resolved(connection, found.payment):
                settled, _ = await _settled(connection, found.payment, books=books)
                return Processed(settled)
            raise NotUnattributed(event, f"its payment was granted to {terms.account} for {terms.package}")
        settled, _ = await _settled(connection, found.payment, books=books, resolution=resolution)
        match settled.standing:
            case Granted():
                pass
            case Unpaid():
                raise NotUnattributed(event, "nothing has reported that its payment was made")
            case Unattributed(reason=reason, detail=detail):
                raise ResolutionRefused(reason, detail)
        await store.add_resolution(
            connection, found.payment, resolution, event=event, principal=principal, recorded_at=now()
        )
        settled, rows = await _settle(connection, found.payment, books=books, resolution=resolution)
    log.warning("payment attributed by hand", payment=found.payment, account=account, package=package, by=principal)
    _report(found.payment, before=before, settled=settled)
    return Processed(settled, rows)


async def _settled(
    connection: Connection, payment: str, *, books: Books, resolution: Terms | None = None
) -> tuple[Settled, Mapping[str, list[Report]]]:
    """A payment as it follows from everything that was reported about it, by event. The caller holds it."""
    by_event: dict[str, list[Report]] = {
        found.event: list(translate.read_event(found.payload).reports)
        for found in await store.events_of(connection, payment)
    }
    reports = [report for of_event in by_event.values() for report in of_event]
    for listed in await store.refunds_listed_of(connection, payment):
        reports += translate.read_refunds(listed.payload, event=listed.event, told_at=listed.listed_at.astimezone(UTC))
    named = {each.naming.checkout for each in reports if isinstance(each, PaymentReport)} - {None}
    settled = settle(
        reports,
        offers=books.offers,
        checkouts=await store.find_checkouts(connection, [each for each in named if each is not None]),
        resolution=resolution,
        resolved=await store.is_resolved(connection, payment),
        told=await store.find_told(connection, payment),
    )
    return settled, by_event


async def _settle(
    connection: Connection, payment: str, *, books: Books, resolution: Terms | None = None
) -> tuple[Settled, list[OutboxRow]]:
    """Settle a payment: write how it stands, tell the ledger what is new, and note what became of its events."""
    settled, by_event = await _settled(connection, payment, books=books, resolution=resolution)
    rows, told_claims = await _tell(connection, payment, settled, books=books)
    received = rows[0] if rows and len(told_claims) < len(rows) else None
    await store.write_payment(
        connection,
        payment,
        settled,
        partition=received.partition if received else None,
        number=received.number if received else None,
    )
    await store.write_claims(connection, payment, settled.claims, told=told_claims)
    for event, reports in by_event.items():
        status, detail = status_of(reports, settled)
        if await store.close_event(connection, event, status=status, detail=detail, at=now()):
            EVENTS.labels(outcome=status).inc()
            if status == "conflicting":
                _alarm("conflicting", stripe_event=event, payment=payment, detail=detail)
    return settled, rows


async def _tell(
    connection: Connection, payment: str, settled: Settled, *, books: Books
) -> tuple[list[OutboxRow], dict[str, tuple[ClaimState, int, int]]]:
    """Stage the facts under the next numbers of the account's partition; and which claims were told, under which."""
    if not settled.facts or not isinstance(settled.standing, Granted):
        return [], {}
    terms = settled.standing.terms
    partition = partition_of(terms.account)
    head = await store.lock_head(connection, partition)
    rows: list[OutboxRow] = []
    claims: dict[str, tuple[ClaimState, int, int]] = {}
    for fact in settled.facts:
        head = _next(head)
        rows.append(
            translate.fact_row(
                fact,
                payment=payment,
                terms=terms,
                unit=books.units[terms.unit],
                partition=partition,
                number=head.outbox_number,
                recorded_at=head.recorded_at,
            )
        )
        if isinstance(fact, ClaimedFact):
            claims[fact.claim] = (fact.state, fact.amount, head.outbox_number)
    await stage(connection, rows)
    await store.move_head(connection, partition, head)
    return rows, claims


def _report(payment: str, *, before: str, settled: Settled) -> None:
    """Count and log how a payment's standing has changed. After the commit."""
    match settled.standing:
        case Granted(terms=terms) if before != "granted":
            GRANTED.inc()
            log.info(
                "payment granted",
                payment=payment,
                account=terms.account,
                package=terms.package,
                quantity=terms.quantity,
            )
        case Unattributed(reason=reason, detail=detail) if before != "unattributed":
            _alarm("unattributed", payment=payment, reason=reason, detail=detail)
        case _:
            pass


def _alarm(kind: str, **values: object) -> None:
    ALARMS.labels(kind=kind).inc()
    log.error(f"alarm: {kind}", **values)


def _next(head: Head) -> Head:
    """The next message's place: never a time twice, never backwards, whatever the clock does."""
    return Head(outbox_number=head.outbox_number + 1, recorded_at=max(now(), head.recorded_at + _STEP))


# Checkouts ------------------------------------------------------------------------------------------------------------


async def open_checkout(
    *,
    account: str,
    package: str,
    quantity: int,
    success_url: str,
    cancel_url: str,
    principal: str,
    idempotency_key: str,
    client: "stripe.StripeClient",
    transaction: Transaction,
    books: Books,
) -> str:
    """Open a session at Stripe under which an account can pay for a package; the checkout's id.

    Asked again under the same key it is the same checkout. What was agreed on is stored before Stripe is asked: a
    payment never finds its checkout missing.

    Raises PackageUnknown, QuantityTooLarge, KeyUsed, StripeAway, StripeRefused.
    """
    body = [account, package, quantity, success_url, cancel_url]
    body_hash = hashlib.sha256(msgspec.json.encode(body)).digest()
    async with transaction() as connection:
        found = await store.find_checkout_by_key(connection, principal=principal, idempotency_key=idempotency_key)
        if found is None:
            terms = _agree(books.offers, account=account, package=package, quantity=quantity)
            fresh = Checkout(
                checkout=f"checkout_{new_uuid7().hex}",
                principal=principal,
                idempotency_key=idempotency_key,
                body_hash=body_hash,
                account=account,
                package=package,
                quantity=quantity,
                price_minor=terms.price.minor,
                denomination=terms.price.denomination,
                unit=terms.unit,
                paid=terms.paid,
                bonus=terms.bonus,
                title=books.offers.packages[package].title,
                success_url=success_url,
                cancel_url=cancel_url,
                session=None,
                url=None,
                expires_at=None,
                recorded_at=now(),
            )
            added = await store.add_checkout(connection, fresh)
            # Somebody was asked the same at the same time.
            found = (
                fresh
                if added
                else await store.find_checkout_by_key(connection, principal=principal, idempotency_key=idempotency_key)
            )
    if found is None or found.body_hash != body_hash:
        raise KeyUsed(idempotency_key)
    if found.session is None:
        await _open_session(found, client=client, transaction=transaction)
    return found.checkout


async def _open_session(checkout: Checkout, *, client: "stripe.StripeClient", transaction: Transaction) -> None:
    params = translate.session_params(
        checkout.terms, title=checkout.title, success_url=checkout.success_url, cancel_url=checkout.cancel_url
    )
    # Stripe answers a repeat under the same key with the same session.
    session = await _ask(
        lambda: client.v1.checkout.sessions.create(params, {"idempotency_key": checkout.checkout}),
        what="open a checkout session",
    )
    if session.url is None:
        raise StripeRefused(f"the session {session.id} has no page to pay at")
    async with transaction() as connection:
        await store.open_checkout(
            connection,
            checkout.checkout,
            session=session.id,
            url=session.url,
            expires_at=datetime.fromtimestamp(session.expires_at, UTC),
        )


def _agree(offers: Offers, *, account: str, package: str, quantity: int) -> Terms:
    """Today's terms. Raises PackageUnknown, QuantityTooLarge."""
    found: Package | None = offers.packages.get(package)
    if found is None:
        raise PackageUnknown(package)
    if quantity > found.quantity_max:
        raise QuantityTooLarge(quantity, found.quantity_max)
    return terms_of(found, account=account, quantity=quantity)


async def _ask(call: Callable[[], Answer], *, what: str) -> Answer:
    """Call Stripe, in a thread. Raises StripeAway, StripeRefused."""
    import stripe  # noqa: PLC0415 - its HTTP library binds a socket when it is imported

    try:
        return await asyncio.to_thread(call)
    except (stripe.APIConnectionError, stripe.RateLimitError, stripe.APIError) as error:
        log.error("Stripe does not answer", what=what, error=type(error).__name__, status=error.http_status)
        raise StripeAway(f"Stripe could not be asked to {what}") from error
    except stripe.StripeError as error:
        # Its own message may show a part of our key.
        log.error("Stripe refuses", what=what, error=type(error).__name__, code=error.code, request_id=error.request_id)
        raise StripeRefused(f"Stripe refused to {what}: {error.code or type(error).__name__}") from error
