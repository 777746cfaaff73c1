"""Where foreign words stop: Stripe's events and sessions, the catalogue file, and the facts the ledger is told."""

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from contracts.billing import (
    STRIPE_RECEIVED_SUBJECT,
    ClaimId,
    ClaimState,
    PackageId,
    PaymentClaimed,
    PaymentId,
    PaymentReceived,
    StripeId,
    StripeReceived,
    payment_subject,
)
from contracts.money import Amount, AmountText, Unit, UnitName, format_amount, parse_amount
from contracts.partition import PARTITION_COUNT
from services.billing.domain.offers import QUANTITY_MAX, Offers, Package, Plan, PlanGrant, Price, Terms
from services.billing.domain.payments import ClaimedFact, Fact, ReceivedFact
from services.billing.domain.reports import (
    ClaimReport,
    Naming,
    PaymentReport,
    RefundedReport,
    RefundsListed,
    Report,
)
from services.kit.dead_letters import Unreadable
from services.kit.outbox import OutboxRow

if TYPE_CHECKING:
    from stripe.params.checkout import SessionCreateParams

# The outbox lane of what billing says to itself: beside the partitions, so that these stay numbered without gaps.
STRIPE_LANE: Final = PARTITION_COUNT

# Decimals of a denomination's smallest coin.
MINOR_DECIMALS: Final[Mapping[str, int]] = {"usd": 2, "eur": 2, "gbp": 2, "chf": 2, "cad": 2, "aud": 2, "jpy": 0}

METADATA_ACCOUNT: Final = "scrip_account"
METADATA_PACKAGE: Final = "scrip_package"
METADATA_QUANTITY: Final = "scrip_quantity"
METADATA_CHECKOUT: Final = "scrip_checkout"

_EVENT_ID: Final = re.compile(r"[A-Za-z0-9_]{1,255}")
_TYPE_LENGTH_MAX: Final = 255


# Stripe in ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Envelope:
    """What the inbox keys an event by. A signed body that is no event has an id of its hash, and no time of its own."""

    id: str
    type: str
    created_at: datetime | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What an event says about a payment. Without a payment it says nothing, and `ignored` is why."""

    payment: str | None
    reports: tuple[Report, ...] = ()
    ignored: str | None = None


def is_signed(body: bytes, signature: str | None, *, secret: SecretStr, tolerance_seconds: int) -> bool:
    """Whether Stripe signed these very bytes with the secret, at most so long ago."""
    import stripe  # noqa: PLC0415 - its HTTP library binds a socket when it is imported

    try:
        stripe.WebhookSignature.verify_header(body, signature, secret.get_secret_value(), tolerance_seconds)
    except (stripe.SignatureVerificationError, UnicodeDecodeError):
        return False
    return True


class _Envelope(msgspec.Struct):
    id: str = ""
    type: str = ""
    created: int = -1


def read_envelope(body: bytes) -> Envelope:
    """The head of a signed body, whatever it is: nothing that Stripe signed is turned away."""
    try:
        head = msgspec.json.decode(body, type=_Envelope)
        created_at = datetime.fromtimestamp(head.created, UTC) if head.created >= 0 else None
    except (msgspec.DecodeError, ValueError, OverflowError, OSError, RecursionError):
        head, created_at = _Envelope(), None
    if _EVENT_ID.fullmatch(head.id) is None:
        return Envelope(id=f"body_{hashlib.sha256(body).hexdigest()}", type="unreadable", created_at=None)
    shown = re.sub(r"[^\x20-\x7e]", "?", head.type)[:_TYPE_LENGTH_MAX]
    return Envelope(id=head.id, type=shown or "unreadable", created_at=created_at)


class _Said(BaseModel):
    """A part of one of Stripe's objects: strictly typed, so that no amount is ever a fraction; the rest is not read."""

    # Personal data: no error, and so no log of one, repeats what was said.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)


_Coins = Annotated[str, Field(pattern=r"^[a-z]{3}$")]
_Minor = Annotated[int, Field(ge=0, le=10**12)]
_Seconds = Annotated[int, Field(ge=0, le=7_258_118_400)]
_Metadata = dict[str, str]


class _Session(_Said):
    id: StripeId
    mode: str
    payment_status: str
    payment_intent: PaymentId | None = None
    amount_total: _Minor | None = None
    currency: _Coins | None = None
    metadata: _Metadata | None = None


class _Intent(_Said):
    id: PaymentId
    status: str
    amount_received: _Minor
    currency: _Coins
    metadata: _Metadata | None = None


class _Refund(_Said):
    id: ClaimId
    payment_intent: PaymentId | None = None
    amount: _Minor
    currency: _Coins
    created: _Seconds
    status: str | None = None


class _RefundList(_Said):
    data: list[_Refund]
    has_more: bool = False


class _Charge(_Said):
    payment_intent: PaymentId | None = None
    amount_refunded: _Minor
    currency: _Coins
    refunds: _RefundList | None = None


class _Dispute(_Said):
    id: ClaimId
    payment_intent: PaymentId | None = None
    amount: _Minor
    currency: _Coins
    created: _Seconds
    status: str


class _Data(_Said):
    object: dict[str, Any]


class _Event(_Said):
    id: StripeId
    type: str
    created: _Seconds
    data: _Data


_NOT_OURS: Final = "it is about a charge without a payment intent, and a payment of ours has one"

_REFUND_STATES: Final[Mapping[str | None, ClaimState]] = {
    "pending": "open",
    "requires_action": "open",
    "succeeded": "final",
    "failed": "void",
    "canceled": "void",
}
# An inquiry (warning_…) takes no money yet: it claims nothing.
_DISPUTE_STATES: Final[Mapping[str, ClaimState]] = {
    "needs_response": "open",
    "under_review": "open",
    "won": "void",
    "prevented": "void",
    "lost": "final",
}


def read_event(body: bytes) -> Reading:
    """What an event says about a payment. Raises Unreadable for one that should, and cannot be understood."""
    try:
        # Not straight from JSON: lax pydantic would let a number be text there.
        raw = msgspec.json.decode(body)
        event = _Event.model_validate(raw)
        return _read(event)
    except ValidationError as error:
        raise Unreadable("not an event as Stripe sends it", problems=_problems(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from error


def read_refunds(body: bytes, *, event: str, told_at: datetime) -> tuple[Report, ...]:
    """What Stripe answered when it was asked, because of `event`, for the refunds of a payment. Raises Unreadable."""
    try:
        listed = _RefundList.model_validate(msgspec.json.decode(body))
    except ValidationError as error:
        raise Unreadable("not a list of refunds as Stripe sends it", problems=_problems(error)) from error
    refunds = (_refund_report(each, event=event, told_at=told_at) for each in listed.data)
    return (RefundsListed(event=event), *refunds)


def _read(event: _Event) -> Reading:
    subject, told_at = event.data.object, datetime.fromtimestamp(event.created, UTC)
    match event.type:
        case "checkout.session.completed" | "checkout.session.async_payment_succeeded":
            return _read_session(_Session.model_validate(subject), event=event.id, told_at=told_at)
        case "payment_intent.succeeded":
            return _read_intent(_Intent.model_validate(subject), event=event.id, told_at=told_at)
        case "charge.refunded":
            return _read_charge(_Charge.model_validate(subject), event=event.id, told_at=told_at)
        case "refund.created" | "refund.updated" | "refund.failed" | "charge.refund.updated":
            return _read_refund(_Refund.model_validate(subject), event=event.id, told_at=told_at)
        case str(type) if type.startswith("charge.dispute."):
            return _read_dispute(_Dispute.model_validate(subject), event=event.id, told_at=told_at)
        case _:
            return Reading(None, ignored="events of this type say nothing about payments")


def _read_session(session: _Session, *, event: str, told_at: datetime) -> Reading:
    if session.mode != "payment":
        return Reading(None, ignored=f"the session's mode is {session.mode}, not payment")
    if session.payment_status != "paid":
        return Reading(None, ignored=f"the session is {session.payment_status}: another event will report the payment")
    if session.payment_intent is None or session.amount_total is None or session.currency is None:
        raise Unreadable("a paid session names its payment intent, its amount and its currency, and this one does not")
    report = PaymentReport(
        event=event,
        told_at=told_at,
        paid=Price(session.amount_total, session.currency),
        naming=_naming(session.metadata),
        session=session.id,
    )
    return Reading(session.payment_intent, (report,))


def _read_intent(intent: _Intent, *, event: str, told_at: datetime) -> Reading:
    if intent.status != "succeeded":
        raise Unreadable(f"a payment intent that succeeded has the status {intent.status!r}")
    paid = Price(intent.amount_received, intent.currency)
    report = PaymentReport(event=event, told_at=told_at, paid=paid, naming=_naming(intent.metadata))
    return Reading(intent.id, (report,))


def _read_charge(charge: _Charge, *, event: str, told_at: datetime) -> Reading:
    if charge.payment_intent is None:
        return Reading(None, ignored=_NOT_OURS)
    refunded = RefundedReport(event=event, told_at=told_at, refunded=Price(charge.amount_refunded, charge.currency))
    # Only older versions of the API list them here.
    listed = charge.refunds.data if charge.refunds is not None else []
    refunds = (_refund_report(each, event=event, told_at=told_at) for each in listed)
    return Reading(charge.payment_intent, (refunded, *refunds))


def _read_refund(refund: _Refund, *, event: str, told_at: datetime) -> Reading:
    if refund.payment_intent is None:
        return Reading(None, ignored=_NOT_OURS)
    return Reading(refund.payment_intent, (_refund_report(refund, event=event, told_at=told_at),))


def _read_dispute(dispute: _Dispute, *, event: str, told_at: datetime) -> Reading:
    if dispute.payment_intent is None:
        return Reading(None, ignored=_NOT_OURS)
    if dispute.status.startswith("warning_"):
        return Reading(None, ignored="an inquiry takes no money")
    state = _DISPUTE_STATES.get(dispute.status)
    if state is None:
        raise Unreadable(f"the status {dispute.status!r} of a dispute is not known")
    report = ClaimReport(
        event=event,
        told_at=told_at,
        claim=dispute.id,
        claimed_at=datetime.fromtimestamp(dispute.created, UTC),
        reason="dispute",
        state=state,
        claimed=Price(dispute.amount, dispute.currency),
    )
    return Reading(dispute.payment_intent, (report,))


def _refund_report(refund: _Refund, *, event: str, told_at: datetime) -> ClaimReport:
    state = _REFUND_STATES.get(refund.status)
    if state is None:
        raise Unreadable(f"the status {refund.status!r} of a refund is not known")
    return ClaimReport(
        event=event,
        told_at=told_at,
        claim=refund.id,
        claimed_at=datetime.fromtimestamp(refund.created, UTC),
        reason="refund",
        state=state,
        claimed=Price(refund.amount, refund.currency),
    )


def _naming(metadata: Mapping[str, str] | None) -> Naming:
    found = metadata or {}
    # Text goes into a report and its sentences: nothing that Postgres has no text for.
    said = {name: re.sub(r"[\x00-\x1f]", "?", text) for name, text in found.items() if text}
    return Naming(
        account=said.get(METADATA_ACCOUNT),
        package=said.get(METADATA_PACKAGE),
        quantity=said.get(METADATA_QUANTITY),
        checkout=said.get(METADATA_CHECKOUT),
    )


def _problems(error: ValidationError) -> list[dict[str, str]]:
    """Where and why, never what: an event holds personal data."""
    return [
        {"field": ".".join(str(part) for part in found["loc"]), "message": found["msg"]}
        for found in error.errors(include_url=False, include_context=False, include_input=False)
    ]


# Stripe out -----------------------------------------------------------------------------------------------------------


def session_params(terms: Terms, *, title: str, success_url: str, cancel_url: str) -> "SessionCreateParams":
    """A session for one payment. Whose it is stands on the session and on its payment intent: Checkout copies nothing.

    All of it is the checkout's own, and nothing the catalogue's: asking Stripe again must be the same request.
    """
    metadata = {
        METADATA_ACCOUNT: terms.account,
        METADATA_PACKAGE: terms.package,
        METADATA_QUANTITY: str(terms.quantity),
        METADATA_CHECKOUT: terms.checkout or "",
    }
    return {
        "mode": "payment",
        "client_reference_id": terms.checkout or "",
        "line_items": [
            {
                "quantity": terms.quantity,
                "price_data": {
                    "currency": terms.price.denomination,
                    "unit_amount": terms.price.minor // terms.quantity,
                    "product_data": {"name": title},
                },
            }
        ],
        "metadata": metadata,
        "payment_intent_data": {"metadata": metadata},
        "success_url": success_url,
        "cancel_url": cancel_url,
    }


# To the ledger, and to ourselves --------------------------------------------------------------------------------------


def fact_row(
    fact: Fact, *, payment: str, terms: Terms, unit: Unit, partition: int, number: int, recorded_at: datetime
) -> OutboxRow:
    """A fact as the message to the ledger. Its bytes are kept, and repeats are identical."""

    def amount(value: int) -> Amount:
        return Amount(amount=format_amount(value, unit), unit=unit.name)

    message: PaymentReceived | PaymentClaimed
    verb: Literal["received", "claimed"]
    match fact:
        case ReceivedFact():
            verb = "received"
            message = PaymentReceived(
                partition=partition,
                number=number,
                account=terms.account,
                payment=payment,
                recorded_at=recorded_at,
                package=terms.package,
                quantity=terms.quantity,
                paid=amount(terms.paid),
                bonus=amount(terms.bonus) if terms.bonus else None,
                occurred_at=fact.occurred_at,
            )
        case ClaimedFact():
            verb = "claimed"
            message = PaymentClaimed(
                partition=partition,
                number=number,
                account=terms.account,
                payment=payment,
                recorded_at=recorded_at,
                claim=fact.claim,
                reason=fact.reason,
                state=fact.state,
                claimed=amount(fact.amount),
                occurred_at=fact.occurred_at,
            )
    return OutboxRow(
        partition=partition,
        number=number,
        subject=payment_subject(partition=partition, verb=verb),
        message_id=f"billing.{partition}.{number}",
        payload=message.model_dump_json().encode(),
        recorded_at=recorded_at,
    )


def received_row(event: str, *, number: int, recorded_at: datetime) -> OutboxRow:
    """The message to ourselves that an event is in the inbox."""
    return OutboxRow(
        partition=STRIPE_LANE,
        number=number,
        subject=STRIPE_RECEIVED_SUBJECT,
        message_id=f"billing.stripe.{number}",
        payload=StripeReceived(number=number, event=event, recorded_at=recorded_at).model_dump_json().encode(),
        recorded_at=recorded_at,
    )


def read_received(body: bytes) -> StripeReceived:
    """The message to ourselves. Raises Unreadable."""
    try:
        return StripeReceived.model_validate_json(body)
    except ValidationError as error:
        raise Unreadable("not a message that an event was received", problems=_problems(error)) from error


# The catalogue --------------------------------------------------------------------------------------------------------


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


_Title = Annotated[str, Field(min_length=1, max_length=200)]
_PriceText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})(\.[0-9]{1,3})?$")]


class _PackageRow(_Row):
    id: PackageId
    title: _Title
    price: _PriceText
    currency: _Coins
    unit: UnitName
    paid: AmountText
    bonus: AmountText = "0"
    quantity_max: Annotated[int, Field(ge=1, le=QUANTITY_MAX)] = 1


class _PlanGrantRow(_Row):
    unit: UnitName
    amount: AmountText | None = None
    unlimited: bool = False


class _PlanRow(_Row):
    id: PackageId
    title: _Title
    price: _PriceText
    currency: _Coins
    period: Literal["month"]
    grants: Annotated[list[_PlanGrantRow], Field(min_length=1, max_length=16)]
    features: list[_Title] = []


class _Catalogue(_Row):
    packages: list[_PackageRow] = []
    plans: list[_PlanRow] = []


_CATALOGUE: Final[TypeAdapter[_Catalogue]] = TypeAdapter(_Catalogue)


def read_offers(text: str, *, units: Mapping[str, Unit]) -> Offers:
    """What the catalogue file sells. Raises ValueError, which names the place."""
    catalogue = _CATALOGUE.validate_python(tomllib.loads(text))
    packages = {row.id: _package(row, units) for row in catalogue.packages}
    plans = {row.id: _plan(row, units) for row in catalogue.plans}
    if len(packages) != len(catalogue.packages) or len(plans) != len(catalogue.plans):
        raise ValueError("the catalogue names a package or a plan twice")
    return Offers(packages=packages, plans=plans)


def price_text(price: Price) -> str:
    """`10.00` for 1000 minor coins of usd."""
    decimals = MINOR_DECIMALS[price.denomination]
    digits = str(price.minor).rjust(decimals + 1, "0")
    return f"{digits[:-decimals]}.{digits[-decimals:]}" if decimals else digits


def _package(row: _PackageRow, units: Mapping[str, Unit]) -> Package:
    where = f"package {row.id}"
    unit = _unit(row.unit, units, where)
    package = Package(
        id=row.id,
        title=row.title,
        price=_price(row.price, row.currency, where),
        unit=row.unit,
        paid=parse_amount(row.paid, unit),
        bonus=parse_amount(row.bonus, unit),
        quantity_max=row.quantity_max,
    )
    if package.price.minor == 0 or package.paid <= 0 or package.bonus < 0:
        raise ValueError(f"{where}: price and paid are more than nothing, bonus is not less")
    # What is granted for the largest quantity is still an amount.
    parse_amount(format_amount(max(package.paid, package.bonus) * package.quantity_max, unit), unit)
    return package


def _plan(row: _PlanRow, units: Mapping[str, Unit]) -> Plan:
    where = f"plan {row.id}"
    grants = tuple(_plan_grant(each, units, where) for each in row.grants)
    if len({each.unit for each in grants}) != len(grants):
        raise ValueError(f"{where}: a unit is granted twice")
    return Plan(
        id=row.id,
        title=row.title,
        price=_price(row.price, row.currency, where),
        period=row.period,
        grants=grants,
        features=tuple(row.features),
    )


def _plan_grant(row: _PlanGrantRow, units: Mapping[str, Unit], where: str) -> PlanGrant:
    unit = _unit(row.unit, units, where)
    if row.unlimited == (row.amount is not None):
        raise ValueError(f"{where}: a grant has an amount or is unlimited")
    amount = parse_amount(row.amount, unit) if row.amount is not None else 0
    if not row.unlimited and amount <= 0:
        raise ValueError(f"{where}: a grant is more than nothing")
    return PlanGrant(unit=row.unit, amount=amount, unlimited=row.unlimited)


def _price(text: str, denomination: str, where: str) -> Price:
    decimals = MINOR_DECIMALS.get(denomination)
    if decimals is None:
        raise ValueError(f"{where}: the smallest coin of {denomination} is not known; known are {_known()}")
    whole, _, fraction = text.partition(".")
    if len(fraction) > decimals:
        raise ValueError(f"{where}: {text} {denomination} is not a whole number of its smallest coins")
    return Price(int(whole + fraction.ljust(decimals, "0")), denomination)


def _unit(name: str, units: Mapping[str, Unit], where: str) -> Unit:
    if name not in units:
        raise ValueError(f"{where}: the unit {name} is not one of {sorted(units)}")
    return units[name]


def _known() -> Sequence[str]:
    return sorted(MINOR_DECIMALS)
