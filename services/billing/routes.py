"""HTTP in: Stripe's webhook, stored before it is answered; checkouts; and what became of payments and events."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from prometheus_client import Counter
from psycopg import AsyncConnection, InterfaceError, OperationalError
from psycopg.rows import TupleRow
from psycopg_pool import PoolTimeout
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from contracts.accounts import AccountId
from contracts.billing import PackageId, StripeId
from contracts.ledger import IdempotencyKey
from contracts.money import Amount, Unit, format_amount
from services.billing import handlers, projections
from services.billing.domain.offers import QUANTITY_MAX, Package, Plan
from services.billing.domain.payments import EventStatus
from services.billing.handlers import (
    Books,
    EventUnknown,
    KeyUsed,
    NotUnattributed,
    PackageUnknown,
    QuantityTooLarge,
    ResolutionRefused,
    StripeAway,
    StripeRefused,
    Transaction,
)
from services.billing.projections import CheckoutView, PaymentView, StripeEventView, UnattributedPayment
from services.billing.translate import is_signed, price_text
from services.kit.auth import Principal, require
from services.kit.database import Pool
from services.kit.dead_letters import DeadLetter, dead_letters_router
from services.kit.outbox import OutboxRow
from services.kit.problems import Problem
from services.kit.query import OwnQueryRouter
from services.kit.telemetry import REGISTRY, get_logger

if TYPE_CHECKING:
    import stripe

log = get_logger(__name__)

PAGE_SIZE_MAX: Final = 500
# Postgres has no text with a NUL in it, and no number above this.
_NO_NUL: Final = r"^[^\x00]*$"
_NUMBER_MAX: Final = 2**63 - 1
RETRY_AFTER_SECONDS: Final = 2

_RETRY: Final = {"Retry-After": str(RETRY_AFTER_SECONDS)}

BAD_SIGNATURES: Final = Counter(
    "scrip_billing_bad_signatures", "Webhooks turned away for their signature.", registry=REGISTRY
)


@dataclass(frozen=True, slots=True)
class Backend:
    """What the routes work on. Made by the lifespan, before the first request."""

    pool: Pool
    transaction: Transaction
    client: "stripe.StripeClient"
    books: Books
    webhook_secrets: Sequence[SecretStr]
    webhook_tolerance_seconds: int
    notify: Callable[[Sequence[OutboxRow]], None]
    redrive: Callable[[DeadLetter], Awaitable[None]]


def routers(backend: Callable[[], Backend]) -> Sequence[APIRouter]:
    """All routes of billing."""

    async def redrive(letter: DeadLetter) -> None:
        await backend().redrive(letter)

    return (
        _webhook_router(backend),
        _checkout_router(backend),
        _reading_router(backend),
        _attribution_router(backend),
        dead_letters_router(connect=lambda: _connection(backend()), redrive=redrive, authorize=require("operate")),
    )


# The webhook ----------------------------------------------------------------------------------------------------------


def _webhook_router(backend: Callable[[], Backend]) -> APIRouter:
    # What else the address has that Stripe was told is nobody's business: an event must not be lost for it.
    router = OwnQueryRouter(tags=["stripe"])

    @router.post(
        "/stripe/webhook",
        responses={
            400: {"description": "The signature is missing, wrong or too old"},
            413: {"description": "The body is too large"},
            503: {"description": "It could not be stored: send it again"},
        },
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": {}}}}},
    )
    async def stripe_webhook(
        request: Request, stripe_signature: Annotated[str | None, Header()] = None
    ) -> dict[str, bool]:
        """Store an event of Stripe's, whatever it is, and answer 200; it is processed afterwards. Needs no token."""
        body, made = await request.body(), backend()
        _verify(body, stripe_signature, made)
        async with _database():
            row = await handlers.receive(body, transaction=made.transaction)
        if row is not None:
            made.notify([row])
        return {"received": True}

    return router


def _verify(body: bytes, signature: str | None, backend: Backend) -> None:
    """Problem 400 unless one of the secrets signed these very bytes, not long ago."""
    secrets, tolerance_seconds = backend.webhook_secrets, backend.webhook_tolerance_seconds
    if not any(is_signed(body, signature, secret=each, tolerance_seconds=tolerance_seconds) for each in secrets):
        BAD_SIGNATURES.inc()
        raise Problem(
            400, "signature_invalid", "the header Stripe-Signature is missing, wrong or too old for this body"
        )


# Checkouts ------------------------------------------------------------------------------------------------------------


class OpenCheckout(BaseModel):
    """A package to be paid for. `{CHECKOUT_SESSION_ID}` in a URL is replaced by Stripe."""

    model_config = ConfigDict(extra="forbid")

    account: AccountId
    package: PackageId
    quantity: Annotated[int, Field(ge=1, le=QUANTITY_MAX, strict=True)] = 1
    success_url: Annotated[str, Field(max_length=2048, pattern=r"^https?://[^\s\x00]+$")]
    cancel_url: Annotated[str, Field(max_length=2048, pattern=r"^https?://[^\s\x00]+$")]


def _checkout_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["checkout"])
    writer = Depends(require("billing:write"))

    @router.post(
        "/v1/checkout",
        status_code=201,
        responses={
            404: {"description": "The catalogue has no such package"},
            409: {"description": "The key was used for another checkout"},
            422: {"description": "Something is wrong with the body, or the quantity is too large"},
            502: {"description": "Stripe refuses"},
            503: {"description": "Stripe, or the database, is away: ask again with the same key"},
        },
    )
    async def open_checkout(
        wanted: OpenCheckout,
        idempotency_key: Annotated[IdempotencyKey, Header()],
        principal: Principal = writer,
    ) -> CheckoutView:
        """Open a page at Stripe where the package can be paid. Under the same key it is the same checkout."""
        made = backend()
        async with _database(), _refusals():
            checkout = await handlers.open_checkout(
                account=wanted.account,
                package=wanted.package,
                quantity=wanted.quantity,
                success_url=wanted.success_url,
                cancel_url=wanted.cancel_url,
                principal=principal.name,
                idempotency_key=idempotency_key,
                client=made.client,
                transaction=made.transaction,
                books=made.books,
            )
        return await _checkout(made, checkout)

    @router.get("/v1/checkout/{checkout}", dependencies=[Depends(require("billing:read"))])
    async def show_checkout(checkout: Annotated[str, Path(max_length=255, pattern=_NO_NUL)]) -> CheckoutView:
        """A checkout, by its id or by that of Stripe's session."""
        return await _checkout(backend(), checkout)

    return router


async def _checkout(backend: Backend, name: str) -> CheckoutView:
    async with _connection(backend) as connection:
        found = await projections.find_checkout(connection, name)
    if found is None:
        raise Problem(404, "checkout_unknown", f"there is no checkout {name!r}")
    return found


# Reading --------------------------------------------------------------------------------------------------------------


class PackageView(BaseModel):
    """A package. `price` is `price_minor` smallest coins of `currency`, as people write it."""

    id: str
    title: str
    price: str
    price_minor: int
    currency: str
    paid: Amount
    bonus: Amount | None
    quantity_max: int


class PlanGrantView(BaseModel):
    """What a plan brings of a unit: an amount, or as much as is used."""

    unit: str
    amount: str | None
    unlimited: bool


class PlanView(BaseModel):
    """A plan, paid each period."""

    id: str
    title: str
    price: str
    price_minor: int
    currency: str
    period: Literal["month"]
    grants: list[PlanGrantView]
    features: list[str]


class Packages(BaseModel):
    """Every package, as the catalogue lists them."""

    packages: list[PackageView]


class Plans(BaseModel):
    """Every plan, as the catalogue lists them."""

    plans: list[PlanView]


class PaymentPage(BaseModel):
    """Payments in the order of their ids. `next_after` asks for the next page; null on the last."""

    payments: list[PaymentView]
    next_after: str | None


class StripeEventPage(BaseModel):
    """Events, newest first. `next_before` asks for the next page; null on the last."""

    stripe_events: list[StripeEventView]
    next_before: int | None


class UnattributedPage(BaseModel):
    """Payments granted to nobody, in the order of their ids. `next_after` asks for the next page; null on the last."""

    unattributed: list[UnattributedPayment]
    next_after: str | None


_Limit = Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)]
_After = Annotated[str, Query(max_length=255, pattern=_NO_NUL)]


def _reading_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["billing"], dependencies=[Depends(require("billing:read"))])

    @router.get("/v1/packages")
    async def packages() -> Packages:
        """What can be bought once."""
        books = backend().books
        return Packages(
            packages=[_package_view(each, books.units[each.unit]) for each in books.offers.packages.values()]
        )

    @router.get("/v1/plans")
    async def plans() -> Plans:
        """What can be subscribed to."""
        books = backend().books
        return Plans(plans=[_plan_view(each, books.units) for each in books.offers.plans.values()])

    @router.get("/v1/payments")
    async def payments(account: AccountId | None = None, limit: _Limit = 100, after: _After = "") -> PaymentPage:
        """Payments that were granted, with the refunds and disputes about them."""
        made = backend()
        async with _connection(made) as connection:
            found = await projections.payments_after(
                connection, after, account=account, limit=limit + 1, units=made.books.units
            )
        page = found[:limit]
        return PaymentPage(payments=page, next_after=page[-1].payment if len(found) > limit else None)

    @router.get("/v1/stripe-events")
    async def stripe_events(
        status: EventStatus | None = None,
        limit: _Limit = 100,
        before: Annotated[int | None, Query(ge=1, le=_NUMBER_MAX)] = None,
    ) -> StripeEventPage:
        """The inbox: every event that Stripe signed, and what became of it."""
        async with _connection(backend()) as connection:
            found = await projections.stripe_events_before(connection, before, status=status, limit=limit + 1)
        page = found[:limit]
        return StripeEventPage(stripe_events=page, next_before=page[-1].number if len(found) > limit else None)

    @router.get("/v1/unattributed")
    async def unattributed(limit: _Limit = 100, after: _After = "") -> UnattributedPage:
        """Payments that nobody is granted anything for: their metadata name nobody, or their price is not right."""
        async with _connection(backend()) as connection:
            found = await projections.unattributed_after(connection, after, limit=limit + 1)
        page = found[:limit]
        return UnattributedPage(unattributed=page, next_after=page[-1].payment if len(found) > limit else None)

    return router


def _package_view(package: Package, unit: Unit) -> PackageView:
    def amount(value: int) -> Amount:
        return Amount(amount=format_amount(value, unit), unit=unit.name)

    return PackageView(
        id=package.id,
        title=package.title,
        price=price_text(package.price),
        price_minor=package.price.minor,
        currency=package.price.denomination,
        paid=amount(package.paid),
        bonus=amount(package.bonus) if package.bonus else None,
        quantity_max=package.quantity_max,
    )


def _plan_view(plan: Plan, units: Mapping[str, Unit]) -> PlanView:
    return PlanView(
        id=plan.id,
        title=plan.title,
        price=price_text(plan.price),
        price_minor=plan.price.minor,
        currency=plan.price.denomination,
        period=plan.period,
        grants=[
            PlanGrantView(
                unit=each.unit,
                amount=None if each.unlimited else format_amount(each.amount, units[each.unit]),
                unlimited=each.unlimited,
            )
            for each in plan.grants
        ],
        features=list(plan.features),
    )


# Attribution ----------------------------------------------------------------------------------------------------------


class Attribution(BaseModel):
    """Whose a payment is, and what was paid for."""

    model_config = ConfigDict(extra="forbid")

    account: AccountId
    package: PackageId
    quantity: Annotated[int, Field(ge=1, le=QUANTITY_MAX, strict=True)] = 1


class Attributed(BaseModel):
    """The payment is granted, as `GET /v1/payments` shows it."""

    event: str
    account: str
    package: str
    quantity: int
    paid_at: datetime | None


def _attribution_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["billing"])
    operator = Depends(require("operate"))

    @router.post(
        "/v1/unattributed/{event}/resolve",
        responses={
            404: {"description": "There is no such event, or no such package"},
            409: {"description": "The event's payment is granted already, or was not made"},
            422: {"description": "What was paid is not what that package costs"},
        },
    )
    async def resolve(event: StripeId, wanted: Attribution, principal: Principal = operator) -> Attributed:
        """Say whose an unattributed payment is: it is granted at once. What was paid must be what the package costs."""
        made = backend()
        async with _database(), _refusals():
            processed = await handlers.resolve(
                event,
                account=wanted.account,
                package=wanted.package,
                quantity=wanted.quantity,
                principal=principal.name,
                transaction=made.transaction,
                books=made.books,
            )
        made.notify(processed.rows)
        return Attributed(
            event=event,
            account=wanted.account,
            package=wanted.package,
            quantity=wanted.quantity,
            paid_at=processed.settled.paid_at if processed.settled else None,
        )

    return router


# Problems -------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _refusals() -> AsyncIterator[None]:
    """Refusals as problems."""
    try:
        yield
    except PackageUnknown as error:
        raise Problem(404, "package_unknown", f"the catalogue has no package {error.package!r}") from error
    except QuantityTooLarge as error:
        detail = f"{error.quantity} are more than the {error.quantity_max} that are sold at once"
        raise Problem(422, "quantity_too_large", detail, members={"quantity_max": error.quantity_max}) from error
    except KeyUsed as error:
        detail = f"the key {error.idempotency_key!r} was used for another checkout"
        raise Problem(409, "idempotency_key_used", detail) from error
    except EventUnknown as error:
        raise Problem(404, "event_unknown", f"there is no event {error.event!r}") from error
    except NotUnattributed as error:
        raise Problem(409, "not_unattributed", f"{error.event} cannot be resolved: {error.detail}") from error
    except ResolutionRefused as error:
        raise Problem(422, error.reason, error.detail) from error
    except StripeAway as error:
        raise Problem(503, "stripe_away", f"{error}: ask again with the same key", headers=_RETRY) from error
    except StripeRefused as error:
        raise Problem(502, "stripe_refused", str(error)) from error


@asynccontextmanager
async def _database() -> AsyncIterator[None]:
    """Problem 503 when the database is away."""
    try:
        yield
    except (PoolTimeout, OperationalError, InterfaceError) as error:
        log.error("database not reachable", error=str(error).strip())
        raise Problem(503, "database_away", "the database is away: ask again", headers=_RETRY) from error


@asynccontextmanager
async def _connection(backend: Backend) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection of the pool. Problem 503 if there is none."""
    async with _database(), backend.pool.connection() as connection:
        yield connection
