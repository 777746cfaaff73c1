"""Builders: Stripe's events, made of Stripe's own fixtures, and reports. Valid by default."""

import copy
import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from services.billing.domain.offers import Offers, Package, Price, Terms, terms_of
from services.billing.domain.reports import ClaimReport, Naming, PaymentReport
from services.billing.translate import read_offers
from services.kit.catalogue import load_catalogue

REPOSITORY: Final = Path(__file__).resolve().parents[3]
FIXTURES: Final[dict[str, dict[str, Any]]] = json.loads(
    (REPOSITORY / "infra" / "simulators" / "stripe" / "fixtures.json").read_text(encoding="utf-8")
)["resources"]
CATALOGUE_FILE: Final = REPOSITORY / "infra" / "catalogue" / "catalogue.toml"
BILLING_CATALOGUE_FILE: Final = REPOSITORY / "infra" / "catalogue" / "billing.toml"
UNITS: Final = load_catalogue(CATALOGUE_FILE).units
OFFERS: Final = read_offers(BILLING_CATALOGUE_FILE.read_text(encoding="utf-8"), units=UNITS)

NOON: Final = 1_782_907_200
PAYMENT: Final = "pi_1"

_numbers = itertools.count(1)


def at(second: int) -> datetime:
    """A time of the story."""
    return datetime.fromtimestamp(NOON, UTC) + timedelta(seconds=second)


def event(type: str, subject: dict[str, Any], *, id: str | None = None, created: int = NOON) -> dict[str, Any]:
    """An event about an object."""
    whole = copy.deepcopy(FIXTURES["event"])
    return whole | {
        "id": id or f"evt_{next(_numbers)}",
        "type": type,
        "created": created,
        "data": {"object": subject},
    }


def body(of: dict[str, Any]) -> bytes:
    """An event as Stripe sends it."""
    return json.dumps(of, indent=2).encode()


def metadata(account: str | None = "acme", package: str | None = "usd-25", **more: str) -> dict[str, str]:
    """Whose a payment is."""
    named = {"scrip_account": account, "scrip_package": package}
    return {name: text for name, text in named.items() if text is not None} | {
        f"scrip_{name}": text for name, text in more.items()
    }


def session(payment: str = PAYMENT, *, amount: int = 2500, **values: Any) -> dict[str, Any]:
    """A session that was paid."""
    made = copy.deepcopy(FIXTURES["checkout.session"])
    return (
        made
        | {
            "id": f"cs_of_{payment}",
            "payment_intent": payment,
            "payment_status": "paid",
            "status": "complete",
            "amount_total": amount,
            "currency": "usd",
            "metadata": metadata(),
        }
        | values
    )


def intent(payment: str = PAYMENT, *, amount: int = 2500, **values: Any) -> dict[str, Any]:
    """A payment intent that succeeded."""
    made = copy.deepcopy(FIXTURES["payment_intent"])
    return (
        made
        | {
            "id": payment,
            "status": "succeeded",
            "amount": amount,
            "amount_received": amount,
            "currency": "usd",
            "metadata": metadata(),
        }
        | values
    )


def refund(id: str = "re_1", payment: str | None = PAYMENT, *, amount: int = 2500, **values: Any) -> dict[str, Any]:
    """A refund that succeeded."""
    made = copy.deepcopy(FIXTURES["refund"])
    return made | {"id": id, "payment_intent": payment, "amount": amount, "created": NOON + 60} | values


def charge(payment: str | None = PAYMENT, *, amount: int = 2500, refunded: int = 0, **values: Any) -> dict[str, Any]:
    """A charge of which so much was refunded."""
    made = copy.deepcopy(FIXTURES["charge"])
    return made | {"payment_intent": payment, "amount": amount, "amount_refunded": refunded} | values


def dispute(id: str = "dp_1", payment: str | None = PAYMENT, *, amount: int = 2500, **values: Any) -> dict[str, Any]:
    """A dispute that waits for an answer."""
    made = copy.deepcopy(FIXTURES["dispute"])
    return (
        made
        | {"id": id, "payment_intent": payment, "amount": amount, "created": NOON + 60, "status": "needs_response"}
        | values
    )


def completed(payment: str = PAYMENT, **values: Any) -> dict[str, Any]:
    """checkout.session.completed."""
    return event("checkout.session.completed", session(payment, **values))


def succeeded(payment: str = PAYMENT, **values: Any) -> dict[str, Any]:
    """payment_intent.succeeded."""
    return event("payment_intent.succeeded", intent(payment, **values))


def package(*, price: int = 2500, paid: int = 25_000_000_000, bonus: int = 2_000_000_000, unit: str = "usd") -> Package:
    """A package of any price and grant."""
    return Package("made", "Made", Price(price, "usd"), unit, paid, bonus, quantity_max=100)


def offers(*packages: Package) -> Offers:
    """A catalogue of these packages."""
    return Offers(packages={each.id: each for each in packages}, plans={})


def terms(of: Package, *, account: str = "acme", quantity: int = 1) -> Terms:
    """What was agreed on."""
    return terms_of(of, account=account, quantity=quantity)


def payment_report(
    event: str, *, second: int = 0, minor: int = 2500, naming: Naming | None = None, session: str | None = None
) -> PaymentReport:
    """A report that the payment succeeded."""
    named = Naming(account="acme", package="made") if naming is None else naming
    return PaymentReport(event=event, told_at=at(second), paid=Price(minor, "usd"), naming=named, session=session)


def claim_report(event: str, claim: str = "re_1", *, second: int = 60, minor: int = 2500, **values: Any) -> ClaimReport:
    """A report that a refund succeeded."""
    made: dict[str, Any] = {"reason": "refund", "state": "final", "claimed_at": at(60), "claimed": Price(minor, "usd")}
    return ClaimReport(event=event, told_at=at(second), claim=claim, **(made | values))
