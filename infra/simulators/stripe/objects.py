"""Stripe's objects: copies of its own fixtures with the values of a story. No field is added and none is missing.

What the fixtures fill with made-up values, and Stripe leaves empty in a plain card payment, is emptied here.
"""

import copy
import json
import secrets
import string
from pathlib import Path
from typing import Any, Final

Object = dict[str, Any]

DAY_SECONDS: Final = 86_400
DISPUTE_DUE_SECONDS: Final = 7 * DAY_SECONDS

_FIXTURES: Final[dict[str, Object]] = json.loads((Path(__file__).parent / "fixtures.json").read_text(encoding="utf-8"))[
    "resources"
]
_ALPHABET: Final = string.ascii_letters + string.digits


def new_id(prefix: str, *, length: int = 24) -> str:
    """An id as Stripe makes them: opaque."""
    return prefix + "_" + "".join(secrets.choice(_ALPHABET) for _ in range(length))


def checkout_session(*, url: str, id: str, now: int, **values: Any) -> Object:
    return _made(
        "checkout.session",
        id=id,
        url=url,
        created=now,
        payment_intent=None,
        status="open",
        payment_status="unpaid",
        ui_mode="hosted_page",
        customer_creation="if_required",
        payment_method_collection="if_required",
        total_details={"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
        adaptive_pricing={"enabled": False},
        managed_payments={"enabled": False},
        automatic_tax={"enabled": False, "liability": None, "provider": None, "status": None},
        custom_text=dict.fromkeys(_FIXTURES["checkout.session"]["custom_text"]),
        **_none(
            "after_expiration",
            "collected_information",
            "consent",
            "consent_collection",
            "currency_conversion",
            "customer_details",
            "invoice_creation",
            "payment_method_configuration_details",
            "permissions",
            "saved_payment_method_options",
            "shipping_address_collection",
            "shipping_cost",
            "wallet_options",
        ),
        **values,
    )


def customer_details(*, email: str | None, name: str | None) -> Object:
    """What Checkout collected, for `customer_details` of a completed session."""
    details: Object = copy.deepcopy(_FIXTURES["checkout.session"]["customer_details"])
    return details | {"email": email, "name": name, "tax_ids": []}


def payment_intent(*, amount: int, currency: str, now: int, **values: Any) -> Object:
    id = new_id("pi")
    return _made(
        "payment_intent",
        id=id,
        client_secret=f"{id}_secret_{new_id('', length=25)[1:]}",
        amount=amount,
        currency=currency,
        created=now,
        capture_method="automatic_async",
        managed_payments={"enabled": False},
        **_none(
            "canceled_at",
            "last_payment_error",
            "next_action",
            "payment_method_configuration_details",
            "processing",
            "shipping",
            "transfer_data",
        ),
        **values,
    )


def charge(*, intent: Object, now: int, succeeded: bool, email: str | None, name: str | None) -> Object:
    """The attempt to collect a payment intent by card."""
    id = new_id("ch")
    shape = _FIXTURES["charge"]
    amount = intent["amount"]
    details = copy.deepcopy(shape["payment_method_details"])
    details["card"]["overcapture"]["maximum_amount_capturable"] = amount
    if not succeeded:
        details["card"]["last4"] = "0002"
    outcome = shape["outcome"] | (
        {"type": "authorized", "network_status": "approved_by_network", "seller_message": "Payment complete."}
        if succeeded
        else {
            "type": "issuer_declined",
            "network_status": "declined_by_network",
            "reason": "generic_decline",
            "seller_message": "The bank did not return any further details with this decline.",
        }
    )
    return _made(
        "charge",
        id=id,
        amount=amount,
        amount_captured=amount if succeeded else 0,
        captured=succeeded,
        paid=succeeded,
        status="succeeded" if succeeded else "failed",
        failure_code=None if succeeded else "card_declined",
        failure_message=None if succeeded else "Your card was declined.",
        outcome=outcome,
        created=now,
        currency=intent["currency"],
        customer=intent["customer"],
        description=intent["description"],
        metadata=dict(intent["metadata"]),
        payment_intent=intent["id"],
        payment_method=new_id("pm"),
        payment_method_details=details,
        billing_details=copy.deepcopy(shape["billing_details"]) | {"email": email, "name": name},
        receipt_email=intent["receipt_email"],
        refunds=shape["refunds"] | {"data": [], "url": f"/v1/charges/{id}/refunds"},
        **_none("balance_transaction", "receipt_url", "shipping", "source", "transfer_data"),
    )


def refund(*, charge: Object, amount: int, reason: str | None, metadata: dict[str, str], now: int) -> Object:
    return _made(
        "refund",
        id=new_id("re"),
        amount=amount,
        charge=charge["id"],
        payment_intent=charge["payment_intent"],
        currency=charge["currency"],
        destination_details={"card": {"type": "refund"}, "type": "card"},
        reason=reason,
        metadata=metadata,
        created=now,
    )


def dispute(*, charge: Object, amount: int, reason: str, now: int) -> Object:
    shape = _FIXTURES["dispute"]
    details = copy.deepcopy(shape["payment_method_details"])
    details["card"]["case_type"] = "chargeback"
    return _made(
        "dispute",
        id=new_id("dp"),
        amount=amount,
        charge=charge["id"],
        payment_intent=charge["payment_intent"],
        currency=charge["currency"],
        created=now,
        evidence_details=shape["evidence_details"] | {"due_by": now + DISPUTE_DUE_SECONDS},
        is_charge_refundable=False,
        payment_method_details=details,
        enhanced_eligibility_types=[],
        reason=reason,
        status="needs_response",
    )


def customer(*, now: int, **values: Any) -> Object:
    return _made(
        "customer",
        id=new_id("cus", length=14),
        created=now,
        invoice_prefix=secrets.token_hex(4).upper(),
        **_none("address", "currency", "discount", "shipping"),
        **values,
    )


def event(
    *, type: str, subject: Object, now: int, api_version: str, request_id: str | None, idempotency_key: str | None
) -> Object:
    """That something happened to an object, with the object as it is now."""
    return _made(
        "event",
        id=new_id("evt"),
        type=type,
        created=now,
        api_version=api_version,
        data={"object": copy.deepcopy(subject)},
        request={"id": request_id, "idempotency_key": idempotency_key},
    )


def _made(kind: str, **values: Any) -> Object:
    made = copy.deepcopy(_FIXTURES[kind])
    assert made.keys() >= values.keys(), f"{kind} has no {values.keys() - made.keys()}"
    return made | values


def _none(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)
