"""What happens to objects: sessions are opened and paid, charges refunded and disputed. Each step is one transaction.

Stripe's own refusals are raised as `Refused`. Events are recorded with the objects they report, and staged for
delivery in the same transaction.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args

from infra.simulators.stripe import objects
from infra.simulators.stripe.forms import Params, Refused
from infra.simulators.stripe.objects import DAY_SECONDS, Object, new_id
from infra.simulators.stripe.store import Store

Outcome = Literal["paid", "declined", "delayed"]

OUTCOMES: Final[tuple[str, ...]] = get_args(Outcome)
CURRENCY_LENGTH: Final = 3
# Stripe's smallest charge, in the currencies it is the same in.
AMOUNT_LEAST: Final = {"usd": 50, "eur": 50, "gbp": 30}
LINE_ITEMS_MAX: Final = 100
REFUND_REASONS: Final = ("duplicate", "fraudulent", "requested_by_customer")
DISPUTE_REASONS: Final = ("duplicate", "fraudulent", "general", "product_not_received", "unrecognized")
PAYER_EMAIL: Final = "payer@example.com"
PAYER_NAME: Final = "Simulated Payer"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request an event goes back to; nobody's, when it happened on a page of Stripe's."""

    request_id: str | None = None
    idempotency_key: str | None = None


class Payments:
    """`stage` is told of every event, within the transaction."""

    def __init__(self, store: Store, *, api_version: str, stage: Callable[[Object], None]) -> None:
        self._store = store
        self._api_version = api_version
        self._stage = stage

    def get(self, id: str, *, kind: str, param: str) -> Object:
        """An object, or Stripe's refusal that there is none."""
        found = self._store.get(id, kind=kind)
        if found is None:
            name = kind.replace(".", "_")
            raise Refused(404, f"No such {name}: '{id}'", code="resource_missing", param=param)
        return found

    def open_session(self, params: Params, *, pay_url: str) -> Object:
        """POST /v1/checkout/sessions, for one payment."""
        now = _now()
        if params.required("mode") != "payment":
            raise Refused(400, "This simulator knows the mode payment only.", param="mode")
        params.one_of("ui_mode", ("hosted_page",))
        params.texts("payment_method_types")
        amount, currency = self._amount(params)
        least = AMOUNT_LEAST.get(currency, 1)
        if amount < least:
            message = f"The Checkout Session's total amount must convert to at least {least} {currency}."
            raise Refused(400, message, code="amount_too_small")
        customer = params.text("customer")
        if customer is not None:
            self.get(customer, kind="customer", param="customer")
        expires_at = params.integer("expires_at", least=0) or now + DAY_SECONDS
        if not now + 1800 <= expires_at <= now + DAY_SECONDS:
            message = "The `expires_at` timestamp must be at least 30 minutes and at most 24 hours from now."
            raise Refused(400, message, param="expires_at")
        id = new_id("cs_test", length=58)
        session = objects.checkout_session(
            id=id,
            url=f"{pay_url}/{id}",
            now=now,
            amount_subtotal=amount,
            amount_total=amount,
            currency=currency,
            client_reference_id=params.text("client_reference_id", length_max=200),
            customer=customer,
            customer_email=params.text("customer_email"),
            expires_at=expires_at,
            metadata=params.metadata(),
            success_url=params.required_url("success_url"),
            cancel_url=params.url("cancel_url"),
        )
        # The session's metadata stays the session's: only what is given here reaches the payment intent.
        intent = params.inner("payment_intent_data")
        unseen: Object = {"metadata": {}, "description": None, "receipt_email": None}
        if intent is not None:
            unseen = {
                "metadata": intent.metadata(),
                "description": intent.text("description"),
                "receipt_email": intent.text("receipt_email"),
            }
            intent.finish()
        params.finish()
        self._store.add(session, unseen=unseen)
        return session

    def pay(self, session_id: str, outcome: Outcome) -> Object:
        """The payer presses the button, or a delayed payment comes to its end. Paying what is paid changes nothing."""
        session = self.get(session_id, kind="checkout.session", param="session")
        if session["status"] == "expired" or (session["status"] == "open" and session["expires_at"] <= _now()):
            raise Refused(400, "This Checkout Session has expired.", code="checkout_session_expired")
        if session["payment_status"] == "paid":
            return session
        was_delayed = session["status"] == "complete"
        intent = self._intent(session)
        match outcome:
            case "paid":
                self._collect(session, intent, was_delayed=was_delayed)
            case "declined":
                self._decline(session, intent, was_delayed=was_delayed)
            case "delayed" if not was_delayed:
                self._complete(session, payment_status="unpaid")
                self._change(intent, status="processing", payment_method=new_id("pm"))
                self._tell("payment_intent.processing", intent)
                self._tell("checkout.session.completed", session)
        return session

    def expire(self, session_id: str, *, caller: Caller) -> Object:
        session = self.get(session_id, kind="checkout.session", param="session")
        if session["status"] != "open":
            message = f"Only Checkout Sessions with a status in [open] can be expired. This one is {session['status']}."
            raise Refused(400, message)
        self._change(session, status="expired", url=None)
        self._tell("checkout.session.expired", session, caller=caller)
        return session

    def refund(self, params: Params, *, caller: Caller) -> Object:
        """POST /v1/refunds: a charge, or the charge of a payment intent, wholly or in part."""
        charge = self._charge(params)
        amount = params.integer("amount", least=1)
        reason = params.one_of("reason", REFUND_REASONS)
        metadata = params.metadata()
        params.finish()
        left = charge["amount_captured"] - charge["amount_refunded"]
        if charge["disputed"]:
            message = f"Charge {charge['id']} has been charged back; cannot issue a refund."
            raise Refused(400, message, code="charge_disputed", executed=True)
        if left == 0:
            message = f"Charge {charge['id']} has already been refunded."
            raise Refused(400, message, code="charge_already_refunded", executed=True)
        amount = left if amount is None else amount
        if amount > left:
            message = f"Refund amount ({_shown(amount)}) is greater than unrefunded amount on charge ({_shown(left)})"
            raise Refused(400, message, param="amount", executed=True)
        refund = objects.refund(charge=charge, amount=amount, reason=reason, metadata=metadata, now=_now())
        self._store.add(refund)
        self._change(charge, amount_refunded=charge["amount_refunded"] + amount, refunded=amount == left)
        self._tell("refund.created", refund, caller=caller)
        self._tell("charge.refunded", charge, caller=caller)
        self._tell("refund.updated", refund)
        return refund

    def dispute(self, params: Params) -> Object:
        """The payer's bank takes money back."""
        charge = self._charge(params)
        amount = params.integer("amount", least=1) or charge["amount_captured"]
        reason = params.one_of("reason", DISPUTE_REASONS) or "fraudulent"
        params.finish()
        if charge["disputed"]:
            raise Refused(400, f"Charge {charge['id']} is already disputed.", code="charge_disputed")
        dispute = objects.dispute(charge=charge, amount=amount, reason=reason, now=_now())
        self._store.add(dispute)
        self._change(charge, disputed=True)
        self._tell("charge.dispute.created", dispute)
        self._tell("charge.dispute.funds_withdrawn", dispute)
        return dispute

    def close_dispute(self, dispute_id: str, *, won: bool) -> Object:
        """The bank has decided."""
        dispute = self.get(dispute_id, kind="dispute", param="dispute")
        if dispute["status"] not in ("needs_response", "under_review"):
            raise Refused(400, f"This dispute is already closed: it is {dispute['status']}.")
        self._change(dispute, status="won" if won else "lost")
        if won:
            self._tell("charge.dispute.funds_reinstated", dispute)
        self._tell("charge.dispute.closed", dispute)
        return dispute

    def create_customer(self, params: Params, *, caller: Caller) -> Object:
        customer = objects.customer(
            now=_now(),
            email=params.text("email", length_max=512),
            name=params.text("name", length_max=256),
            description=params.text("description"),
            phone=params.text("phone", length_max=20),
            metadata=params.metadata(),
        )
        params.finish()
        self._store.add(customer)
        self._tell("customer.created", customer, caller=caller)
        return customer

    def _amount(self, params: Params) -> tuple[int, str]:
        """The sum of the line items, and their one currency."""
        items = params.items("line_items")
        if not 1 <= len(items) <= LINE_ITEMS_MAX:
            message = f"One to {LINE_ITEMS_MAX} line items are required in payment mode."
            raise Refused(400, message, code="parameter_missing", param="line_items")
        amount, currencies = 0, set()
        for item in items:
            if item.text("price") is not None:
                raise Refused(400, "This simulator knows no prices: give price_data.", param="line_items")
            price = item.required_inner("price_data")
            product = price.required_inner("product_data")
            product.required("name")
            product.text("description")
            product.texts("images")
            product.metadata()
            product.finish()
            currency = price.required("currency").lower()
            if len(currency) != CURRENCY_LENGTH or not currency.isalpha():
                raise Refused(400, f"Invalid currency: {currency}", param="line_items")
            currencies.add(currency)
            amount += price.required_integer("unit_amount", least=0) * item.required_integer("quantity", least=1)
            price.one_of("tax_behavior", ("exclusive", "inclusive", "unspecified"))
            price.finish()
            item.finish()
        if len(currencies) > 1:
            raise Refused(400, "All line items must have the same currency.", param="line_items")
        return amount, currencies.pop()

    def _intent(self, session: Object) -> Object:
        """The session's payment intent, made when it is first paid."""
        if session["payment_intent"] is not None:
            return self.get(session["payment_intent"], kind="payment_intent", param="payment_intent")
        intent = objects.payment_intent(
            amount=session["amount_total"],
            currency=session["currency"],
            customer=session["customer"],
            now=_now(),
            **self._store.unseen(session["id"]),
        )
        self._store.add(intent)
        self._change(session, payment_intent=intent["id"])
        return intent

    def _collect(self, session: Object, intent: Object, *, was_delayed: bool) -> None:
        charge = self._attempt(session, intent, succeeded=True)
        self._change(
            intent,
            status="succeeded",
            amount_received=intent["amount"],
            latest_charge=charge["id"],
            payment_method=charge["payment_method"],
            last_payment_error=None,
        )
        self._complete(session, payment_status="paid")
        self._tell("charge.succeeded", charge)
        self._tell("payment_intent.succeeded", intent)
        self._tell(f"checkout.session.{'async_payment_succeeded' if was_delayed else 'completed'}", session)

    def _decline(self, session: Object, intent: Object, *, was_delayed: bool) -> None:
        charge = self._attempt(session, intent, succeeded=False)
        self._change(
            intent,
            status="requires_payment_method",
            latest_charge=charge["id"],
            payment_method=None,
            last_payment_error={"type": "card_error"},
        )
        self._tell("charge.failed", charge)
        self._tell("payment_intent.payment_failed", intent)
        if was_delayed:
            self._tell("checkout.session.async_payment_failed", session)

    def _attempt(self, session: Object, intent: Object, *, succeeded: bool) -> Object:
        charge = objects.charge(
            intent=intent,
            now=_now(),
            succeeded=succeeded,
            email=session["customer_email"] or PAYER_EMAIL,
            name=PAYER_NAME,
        )
        self._store.add(charge)
        return charge

    def _complete(self, session: Object, *, payment_status: str) -> None:
        details = objects.customer_details(email=session["customer_email"] or PAYER_EMAIL, name=PAYER_NAME)
        self._change(session, status="complete", payment_status=payment_status, url=None, customer_details=details)

    def _charge(self, params: Params) -> Object:
        """The charge that is named, itself or by its payment intent."""
        charge, intent = params.text("charge"), params.text("payment_intent")
        if (charge is None) == (intent is None):
            raise Refused(400, "One of the params charge and payment_intent must be provided.", param="charge")
        if intent is not None:
            charge = self.get(intent, kind="payment_intent", param="payment_intent")["latest_charge"]
        found = None if charge is None else self.get(charge, kind="charge", param="charge")
        if found is None or found["status"] != "succeeded":
            message = f"This PaymentIntent ({intent}) does not have a successful charge to refund."
            raise Refused(400, message, param="payment_intent" if intent else "charge")
        return found

    def _change(self, subject: Object, **values: object) -> None:
        assert subject.keys() >= values.keys()
        subject.update(values)
        self._store.put(subject)

    def _tell(self, type: str, subject: Object, *, caller: Caller = Caller()) -> None:
        event = objects.event(
            type=type,
            subject=subject,
            now=_now(),
            api_version=self._api_version,
            request_id=caller.request_id,
            idempotency_key=caller.idempotency_key,
        )
        self._store.add(event)
        self._stage(event)


def _now() -> int:
    return int(time.time())


def _shown(amount: int) -> str:
    return f"${amount // 100}.{amount % 100:02d}"
