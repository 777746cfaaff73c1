"""What billing answers about its work, straight from the tables: exact at any moment. The models are those of HTTP."""

from collections.abc import Mapping
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import TupleRow, class_row, dict_row
from pydantic import AwareDatetime, BaseModel

from contracts.billing import ClaimReason, ClaimState
from contracts.money import Amount, Unit, format_amount
from services.billing.domain.payments import EventStatus, Reason


class StripeEventView(BaseModel):
    """An event in the inbox and what became of it. Not its contents: they hold personal data."""

    number: int
    event: str
    type: str
    status: EventStatus
    detail: str | None
    payment: str | None
    created_at: AwareDatetime | None
    received_at: AwareDatetime
    processed_at: AwareDatetime | None
    deliveries: int
    failures: int


class ClaimView(BaseModel):
    """A refund or a dispute. `claimed` is what the ledger was told; null while nothing was granted."""

    claim: str
    reason: ClaimReason
    state: ClaimState
    claimed_minor: int
    currency: str
    claimed_at: AwareDatetime
    claimed: Amount | None


class PaymentView(BaseModel):
    """A payment that was granted, and the claims on it."""

    payment: str
    account: str
    package: str
    quantity: int
    checkout: str | None
    session: str | None
    price_minor: int
    currency: str
    paid_at: AwareDatetime
    paid: Amount
    bonus: Amount | None
    claims: list[ClaimView]


class UnattributedPayment(BaseModel):
    """A payment that is granted to nobody. `event` is the first that reported it: resolve it by that."""

    event: str
    payment: str
    reason: Reason
    detail: str
    session: str | None
    paid_minor: int
    currency: str
    paid_at: AwareDatetime
    recorded_at: AwareDatetime


class CheckoutView(BaseModel):
    """A checkout. `status`: starting (Stripe has not answered), open, paid, expired. `payment` once it is paid."""

    checkout: str
    status: str
    account: str
    package: str
    quantity: int
    price_minor: int
    currency: str
    session: str | None
    url: str | None
    expires_at: AwareDatetime | None
    payment: str | None


async def stripe_events_before(
    connection: AsyncConnection[TupleRow], before: int | None, *, status: str | None, limit: int
) -> list[StripeEventView]:
    """Events, newest first."""
    async with connection.cursor(row_factory=class_row(StripeEventView)) as cursor:
        await cursor.execute(
            """
            SELECT number, event, type, status, detail, payment, created_at, received_at, processed_at, deliveries,
                   failures
            FROM stripe_events
            WHERE (%(before)s::bigint IS NULL OR number < %(before)s)
              AND (%(status)s::text IS NULL OR status = %(status)s)
            ORDER BY number DESC LIMIT %(limit)s
            """,
            {"before": before, "status": status, "limit": limit},
        )
        return await cursor.fetchall()


async def payments_after(
    connection: AsyncConnection[TupleRow], after: str, *, account: str | None, limit: int, units: Mapping[str, Unit]
) -> list[PaymentView]:
    """Granted payments of one account or of all, in the order of their ids."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            """
            SELECT payment, account, package, quantity, checkout, session, price_minor, denomination, paid_at, unit,
                   paid, bonus
            FROM payments
            WHERE status = 'granted' AND payment > %(after)s
              AND (%(account)s::text IS NULL OR account = %(account)s)
            ORDER BY payment LIMIT %(limit)s
            """,
            {"after": after, "account": account, "limit": limit},
        )
        rows = await cursor.fetchall()
        await cursor.execute(
            """
            SELECT payment, claim, reason, state, claimed_minor, denomination AS currency, claimed_at, told_amount
            FROM claims WHERE payment = ANY(%s) ORDER BY claimed_at, claim
            """,
            [[row["payment"] for row in rows]],
        )
        claims = await cursor.fetchall()
    return [
        _payment(row, [claim for claim in claims if claim["payment"] == row["payment"]], units[row["unit"]])
        for row in rows
    ]


async def unattributed_after(
    connection: AsyncConnection[TupleRow], after: str, *, limit: int
) -> list[UnattributedPayment]:
    """Payments that are granted to nobody, in the order of their ids."""
    async with connection.cursor(row_factory=class_row(UnattributedPayment)) as cursor:
        await cursor.execute(
            """
            SELECT first.event, p.payment, p.reason, p.detail, p.session, p.paid_minor, p.denomination AS currency,
                   p.paid_at, p.recorded_at
            FROM payments AS p
            CROSS JOIN LATERAL (SELECT event FROM stripe_events WHERE payment = p.payment AND status = 'unattributed'
                                ORDER BY number LIMIT 1) AS first
            WHERE p.status = 'unattributed' AND p.payment > %s ORDER BY p.payment LIMIT %s
            """,
            [after, limit],
        )
        return await cursor.fetchall()


async def find_checkout(connection: AsyncConnection[TupleRow], name: str) -> CheckoutView | None:
    """A checkout by its id, or by that of Stripe's session."""
    async with connection.cursor(row_factory=class_row(CheckoutView)) as cursor:
        await cursor.execute(
            """
            SELECT c.checkout, c.account, c.package, c.quantity, c.price_minor, c.denomination AS currency, c.session,
                   c.url, c.expires_at, p.payment,
                   CASE WHEN p.payment IS NOT NULL THEN 'paid'
                        WHEN c.session IS NULL THEN 'starting'
                        WHEN c.expires_at < clock_timestamp() THEN 'expired'
                        ELSE 'open' END AS status
            FROM checkouts AS c LEFT JOIN payments AS p ON p.checkout = c.checkout AND p.status = 'granted'
            WHERE c.checkout = %(name)s OR c.session = %(name)s ORDER BY p.payment LIMIT 1
            """,
            {"name": name},
        )
        return await cursor.fetchone()


def _payment(row: dict[str, Any], claims: list[dict[str, Any]], unit: Unit) -> PaymentView:
    def amount(value: int | None) -> Amount | None:
        return None if value is None else Amount(amount=format_amount(value, unit), unit=unit.name)

    return PaymentView.model_validate(
        {
            **row,
            "currency": row["denomination"],
            "paid": amount(row["paid"]),
            "bonus": amount(row["bonus"] or None),
            "claims": [{**claim, "claimed": amount(claim["told_amount"])} for claim in claims],
        }
    )
