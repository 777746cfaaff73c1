"""The statements of billing. Takes a connection, and never commits.

Locks are taken in one order by everybody, so that nobody deadlocks: a payment, then its events, then a head.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg import AsyncConnection
from psycopg.rows import TupleRow, class_row

from contracts.billing import ClaimState
from services.billing.domain.offers import Price, Terms
from services.billing.domain.payments import Claim, EventStatus, Granted, Settled, Told, Unattributed
from services.billing.translate import Envelope

Connection = AsyncConnection[TupleRow]


@dataclass(frozen=True, slots=True)
class Head:
    """Where a lane stands: the number of its last message, and the last time it recorded."""

    outbox_number: int
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class InboxEvent:
    """An event in the inbox."""

    event: str
    type: str
    payload: bytes
    received_at: datetime
    status: EventStatus
    payment: str | None


@dataclass(frozen=True, slots=True)
class ListedRefunds:
    """What Stripe answered when it was asked for refunds, because of `event`."""

    event: str
    payload: bytes
    listed_at: datetime


@dataclass(frozen=True, slots=True)
class Checkout:
    """An opened checkout, or one that is being opened: then it has no session yet."""

    checkout: str
    principal: str
    idempotency_key: str
    body_hash: bytes
    account: str
    package: str
    quantity: int
    price_minor: int
    denomination: str
    unit: str
    paid: int
    bonus: int
    title: str
    success_url: str
    cancel_url: str
    session: str | None
    url: str | None
    expires_at: datetime | None
    recorded_at: datetime

    @property
    def terms(self) -> Terms:
        """What was agreed on."""
        return Terms(
            account=self.account,
            package=self.package,
            quantity=self.quantity,
            price=Price(self.price_minor, self.denomination),
            unit=self.unit,
            paid=self.paid,
            bonus=self.bonus,
            checkout=self.checkout,
        )


# Heads ----------------------------------------------------------------------------------------------------------------


async def lock_head(connection: Connection, lane: int) -> Head:
    """Lock a lane until the end of the transaction."""
    cursor = await connection.execute(
        "SELECT outbox_number, recorded_at FROM heads WHERE partition = %s FOR NO KEY UPDATE", [lane]
    )
    row = await cursor.fetchone()
    assert row is not None, f"no head {lane}: the migration makes all of them"
    return Head(outbox_number=row[0], recorded_at=row[1])


async def move_head(connection: Connection, lane: int, head: Head) -> None:
    """Write where a locked lane stands now."""
    await connection.execute(
        "UPDATE heads SET outbox_number = %s, recorded_at = %s WHERE partition = %s",
        [head.outbox_number, head.recorded_at, lane],
    )


# The inbox ------------------------------------------------------------------------------------------------------------


async def note_repeat(connection: Connection, event: str) -> bool:
    """Count another delivery of an event; false if there is no such event yet."""
    cursor = await connection.execute("UPDATE stripe_events SET deliveries = deliveries + 1 WHERE event = %s", [event])
    return cursor.rowcount == 1


async def add_event(
    connection: Connection, envelope: Envelope, payload: bytes, *, number: int, received_at: datetime
) -> None:
    """Store an event. The caller holds the lane's head, and found that there is none of its id."""
    await connection.execute(
        """
        INSERT INTO stripe_events (event, number, type, payload, created_at, received_at, deliveries, status, failures)
        VALUES (%s, %s, %s, %s, %s, %s, 1, 'received', 0)
        """,
        [envelope.id, number, envelope.type, payload, envelope.created_at, received_at],
    )


async def find_event(connection: Connection, event: str) -> InboxEvent | None:
    """An event of the inbox."""
    async with connection.cursor(row_factory=class_row(InboxEvent)) as cursor:
        await cursor.execute(f"SELECT {_EVENT} FROM stripe_events WHERE event = %s", [event])
        return await cursor.fetchone()


async def events_of(connection: Connection, payment: str) -> list[InboxEvent]:
    """All events that were found to be about a payment."""
    async with connection.cursor(row_factory=class_row(InboxEvent)) as cursor:
        await cursor.execute(f"SELECT {_EVENT} FROM stripe_events WHERE payment = %s ORDER BY number", [payment])
        return await cursor.fetchall()


async def tie_event(connection: Connection, event: str, *, payment: str) -> None:
    """Note which payment an event is about. The caller holds the payment."""
    await connection.execute(
        "UPDATE stripe_events SET payment = %s WHERE event = %s AND payment IS DISTINCT FROM %s",
        [payment, event, payment],
    )


async def close_event(
    connection: Connection, event: str, *, status: EventStatus, detail: str | None, at: datetime
) -> bool:
    """Note what became of an event; false if that had been noted before."""
    cursor = await connection.execute(
        """
        UPDATE stripe_events SET status = %(status)s, detail = %(detail)s, processed_at = %(at)s
        WHERE event = %(event)s AND (status, detail) IS DISTINCT FROM (%(status)s::text, %(detail)s::text)
        """,
        {"event": event, "status": status, "detail": detail, "at": at},
    )
    return cursor.rowcount == 1


async def note_failure(connection: Connection, event: str, *, detail: str) -> None:
    """Note that processing an event failed, if nothing came of it before."""
    await connection.execute(
        """
        UPDATE stripe_events SET failures = failures + 1, status = 'failed', detail = %s
        WHERE event = %s AND status IN ('received', 'waiting', 'failed')
        """,
        [detail, event],
    )


async def add_listed_refunds(
    connection: Connection, event: str, *, payment: str, payload: bytes, listed_at: datetime
) -> None:
    """Keep what Stripe answered about the refunds of a payment; once per event that made us ask."""
    await connection.execute(
        """
        INSERT INTO listed_refunds (event, payment, payload, listed_at) VALUES (%s, %s, %s, %s)
        ON CONFLICT DO NOTHING
        """,
        [event, payment, payload, listed_at],
    )


async def refunds_listed_of(connection: Connection, payment: str) -> list[ListedRefunds]:
    """Everything Stripe answered about the refunds of a payment."""
    async with connection.cursor(row_factory=class_row(ListedRefunds)) as cursor:
        await cursor.execute(
            "SELECT event, payload, listed_at FROM listed_refunds WHERE payment = %s ORDER BY event", [payment]
        )
        return await cursor.fetchall()


# Payments -------------------------------------------------------------------------------------------------------------


async def lock_payment(connection: Connection, payment: str, *, recorded_at: datetime) -> str:
    """Lock a payment, known or new, until the end of the transaction; its status."""
    await connection.execute(
        "INSERT INTO payments (payment, status, recorded_at) VALUES (%s, 'unpaid', %s) ON CONFLICT DO NOTHING",
        [payment, recorded_at],
    )
    cursor = await connection.execute("SELECT status FROM payments WHERE payment = %s FOR NO KEY UPDATE", [payment])
    row = await cursor.fetchone()
    assert row is not None, f"payment {payment} was just inserted, or was there"
    return str(row[0])


async def find_told(connection: Connection, payment: str) -> Told:
    """What the ledger was told of a payment."""
    cursor = await connection.execute(
        """
        SELECT account, package, quantity, price_minor, denomination, unit, paid, bonus, checkout
        FROM payments WHERE payment = %s AND status = 'granted'
        """,
        [payment],
    )
    row = await cursor.fetchone()
    terms = None
    if row is not None:
        account, package, quantity, price_minor, denomination, unit, paid, bonus, checkout = row
        terms = Terms(account, package, quantity, Price(price_minor, denomination), unit, paid, bonus, checkout)
    cursor = await connection.execute(
        "SELECT claim, told_state, told_amount FROM claims WHERE payment = %s AND number IS NOT NULL", [payment]
    )
    claims: dict[str, tuple[ClaimState, int]] = {
        claim: (state, amount) for claim, state, amount in await cursor.fetchall()
    }
    return Told(terms=terms, claims=claims)


async def write_payment(
    connection: Connection, payment: str, settled: Settled, *, partition: int | None, number: int | None
) -> None:
    """Write how a payment stands. `partition` and `number` are of the fact that it was received, told now."""
    standing = settled.standing
    if isinstance(standing, Granted):
        # Its terms are written once: with the fact.
        if number is not None:
            terms = standing.terms
            await connection.execute(
                """
                UPDATE payments
                SET status = 'granted', reason = NULL, detail = NULL, account = %s, package = %s, quantity = %s,
                    checkout = %s, price_minor = %s, denomination = %s, unit = %s, paid = %s, bonus = %s,
                    partition = %s, number = %s
                WHERE payment = %s
                """,
                [
                    terms.account,
                    terms.package,
                    terms.quantity,
                    terms.checkout,
                    terms.price.minor,
                    terms.price.denomination,
                    terms.unit,
                    terms.paid,
                    terms.bonus,
                    partition,
                    number,
                    payment,
                ],
            )
    else:
        unattributed = isinstance(standing, Unattributed)
        await connection.execute(
            "UPDATE payments SET status = %s, reason = %s, detail = %s, denomination = %s WHERE payment = %s",
            [
                "unattributed" if unattributed else "unpaid",
                standing.reason if isinstance(standing, Unattributed) else None,
                standing.detail if isinstance(standing, Unattributed) else None,
                settled.paid.denomination if settled.paid else None,
                payment,
            ],
        )
    await connection.execute(
        "UPDATE payments SET session = %s, paid_minor = %s, paid_at = %s WHERE payment = %s",
        [settled.session, settled.paid.minor if settled.paid else None, settled.paid_at, payment],
    )


async def write_claims(
    connection: Connection,
    payment: str,
    claims: Sequence[Claim],
    *,
    told: Mapping[str, tuple[ClaimState, int, int]],
) -> None:
    """Write claims as they are. `told` has, of those told now, the state, the amount, and the fact's number."""
    for claim in claims:
        await connection.execute(
            """
            INSERT INTO claims (claim, payment, reason, state, claimed_minor, denomination, claimed_at)
            VALUES (%s, %s, %s, %s, %s, %s, %s)
            ON CONFLICT (claim) DO UPDATE SET state = excluded.state, claimed_minor = excluded.claimed_minor
            """,
            [
                claim.id,
                payment,
                claim.reason,
                claim.state,
                claim.claimed.minor,
                claim.claimed.denomination,
                claim.claimed_at,
            ],
        )
    for name, (state, amount, number) in told.items():
        await connection.execute(
            "UPDATE claims SET told_state = %s, told_amount = %s, number = %s WHERE claim = %s",
            [state, amount, number, name],
        )


async def is_resolved(connection: Connection, payment: str) -> bool:
    """Whether somebody said whose a payment is. Its terms were granted in the same transaction."""
    cursor = await connection.execute("SELECT 1 FROM resolutions WHERE payment = %s", [payment])
    return await cursor.fetchone() is not None


async def add_resolution(
    connection: Connection, payment: str, terms: Terms, *, event: str, principal: str, recorded_at: datetime
) -> None:
    """Note whose somebody says a payment is."""
    await connection.execute(
        """
        INSERT INTO resolutions (payment, event, account, package, quantity, principal, recorded_at)
        VALUES (%s, %s, %s, %s, %s, %s, %s)
        """,
        [payment, event, terms.account, terms.package, terms.quantity, principal, recorded_at],
    )


# Checkouts ------------------------------------------------------------------------------------------------------------


async def add_checkout(connection: Connection, checkout: Checkout) -> bool:
    """Store a checkout that is about to be opened; false if its principal has used the key before."""
    names = [name for name in _CHECKOUT_COLUMNS if name not in ("session", "url", "expires_at")]
    cursor = await connection.execute(
        f"INSERT INTO checkouts ({', '.join(names)}) VALUES ({', '.join(['%s'] * len(names))})"
        " ON CONFLICT (principal, idempotency_key) DO NOTHING",
        [getattr(checkout, name) for name in names],
    )
    return cursor.rowcount == 1


async def find_checkout_by_key(connection: Connection, *, principal: str, idempotency_key: str) -> Checkout | None:
    """The checkout that a principal opened under a key."""
    async with connection.cursor(row_factory=class_row(Checkout)) as cursor:
        await cursor.execute(
            f"SELECT {', '.join(_CHECKOUT_COLUMNS)} FROM checkouts WHERE principal = %s AND idempotency_key = %s",
            [principal, idempotency_key],
        )
        return await cursor.fetchone()


async def open_checkout(connection: Connection, checkout: str, *, session: str, url: str, expires_at: datetime) -> None:
    """Note the session under which a checkout can be paid."""
    await connection.execute(
        "UPDATE checkouts SET session = %s, url = %s, expires_at = %s WHERE checkout = %s AND session IS NULL",
        [session, url, expires_at, checkout],
    )


async def find_checkouts(connection: Connection, checkouts: Collection[str]) -> dict[str, Terms]:
    """The terms of checkouts, of those that there are."""
    async with connection.cursor(row_factory=class_row(Checkout)) as cursor:
        await cursor.execute(
            f"SELECT {', '.join(_CHECKOUT_COLUMNS)} FROM checkouts WHERE checkout = ANY(%s)", [list(checkouts)]
        )
        return {each.checkout: each.terms for each in await cursor.fetchall()}


_EVENT = "event, type, payload, received_at, status, payment"
_CHECKOUT_COLUMNS = (
    "checkout",
    "principal",
    "idempotency_key",
    "body_hash",
    "account",
    "package",
    "quantity",
    "price_minor",
    "denomination",
    "unit",
    "paid",
    "bonus",
    "title",
    "success_url",
    "cancel_url",
    "session",
    "url",
    "expires_at",
    "recorded_at",
)
