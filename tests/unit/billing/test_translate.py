"""What Stripe's objects say, by its own fixtures; what the catalogue file sells; what the ledger is told."""

import json
import re
from typing import Any

import pytest

from contracts.billing import PaymentClaimed, PaymentReceived, StripeReceived
from contracts.partition import partition_of
from services.billing.domain.offers import Price, Terms
from services.billing.domain.payments import ClaimedFact, Fact, ReceivedFact
from services.billing.domain.reports import ClaimReport, Naming, PaymentReport, RefundedReport, RefundsListed
from services.billing.translate import (
    STRIPE_LANE,
    fact_row,
    price_text,
    read_envelope,
    read_event,
    read_offers,
    read_refunds,
    received_row,
    session_params,
)
from services.kit.dead_letters import Unreadable
from tests.unit.billing.building import (
    BILLING_CATALOGUE_FILE,
    FIXTURES,
    OFFERS,
    UNITS,
    at,
    body,
    charge,
    completed,
    dispute,
    event,
    intent,
    refund,
    session,
    succeeded,
)

CATALOGUE = BILLING_CATALOGUE_FILE.read_text(encoding="utf-8")


def test_both_events_of_a_checkout_report_the_same_payment() -> None:
    first, second = (read_event(body(each)) for each in (completed(), succeeded()))
    assert first.payment == second.payment == "pi_1"
    for reading, named in ((first, "cs_of_pi_1"), (second, None)):
        (report,) = reading.reports
        assert isinstance(report, PaymentReport)
        assert (report.paid, report.naming, report.session, report.told_at) == (
            Price(2500, "usd"),
            Naming(account="acme", package="usd-25"),
            named,
            at(0),
        )


def test_a_delayed_payment_is_reported_when_it_arrives() -> None:
    waiting = read_event(body(completed(payment_status="unpaid")))
    assert (waiting.payment, waiting.reports) == (None, ())
    arrived = read_event(body(event("checkout.session.async_payment_succeeded", session())))
    assert arrived.payment == "pi_1"


@pytest.mark.parametrize("values", [{"mode": "subscription"}, {"payment_status": "no_payment_required"}])
def test_a_session_that_is_no_payment_is_ignored(values: dict[str, Any]) -> None:
    assert read_event(body(completed(**values))).ignored is not None


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("pending", "open"),
        ("requires_action", "open"),
        ("succeeded", "final"),
        ("failed", "void"),
        ("canceled", "void"),
    ],
)
def test_a_refund_is_a_claim(status: str, state: str) -> None:
    for type in ("refund.created", "refund.updated", "refund.failed", "charge.refund.updated"):
        reading = read_event(body(event(type, refund(status=status, amount=700))))
        (report,) = reading.reports
        assert isinstance(report, ClaimReport)
        assert (reading.payment, report.claim, report.reason) == ("pi_1", "re_1", "refund")
        assert (report.state, report.claimed, report.claimed_at) == (state, Price(700, "usd"), at(60))


@pytest.mark.parametrize(
    ("status", "state"),
    [("needs_response", "open"), ("under_review", "open"), ("won", "void"), ("lost", "final"), ("prevented", "void")],
)
def test_a_dispute_is_a_claim(status: str, state: str) -> None:
    reading = read_event(body(event("charge.dispute.updated", dispute(status=status))))
    (report,) = reading.reports
    assert isinstance(report, ClaimReport)
    assert (reading.payment, report.claim, report.reason, report.state) == ("pi_1", "dp_1", "dispute", state)


def test_a_refunded_charge_says_how_much_and_in_old_versions_by_which_refunds() -> None:
    reading = read_event(body(event("charge.refunded", charge(refunded=900))))
    assert reading.payment == "pi_1"
    (report,) = reading.reports
    assert isinstance(report, RefundedReport)
    assert report.refunded == Price(900, "usd")
    old = charge(refunded=900, refunds={"object": "list", "data": [refund(amount=900)], "has_more": False})
    assert [type(each) for each in read_event(body(event("charge.refunded", old))).reports] == [
        RefundedReport,
        ClaimReport,
    ]
    without = {name: value for name, value in charge(refunded=900).items() if name != "refunds"}
    assert len(read_event(body(event("charge.refunded", without))).reports) == 1


def test_a_list_of_refunds_is_read_as_it_is_answered() -> None:
    answered = json.dumps({"data": [refund(amount=900), refund("re_2", amount=1600)]}).encode()
    reports = read_refunds(answered, event="evt_9", told_at=at(90))
    assert reports[0] == RefundsListed("evt_9")
    assert [each.claim for each in reports if isinstance(each, ClaimReport)] == ["re_1", "re_2"]


@pytest.mark.parametrize("kind", ["refund", "dispute", "charge"])
def test_the_fixtures_themselves_are_read(kind: str) -> None:
    """They name no payment intent: it is not a payment of ours."""
    types = {"refund": "refund.created", "dispute": "charge.dispute.created", "charge": "charge.refunded"}
    reading = read_event(body(event(types[kind], FIXTURES[kind])))
    assert reading.payment is None
    assert reading.ignored is not None


def test_an_inquiry_claims_nothing() -> None:
    reading = read_event(body(event("charge.dispute.created", dispute(status="warning_needs_response"))))
    assert reading.ignored == "an inquiry takes no money"


def test_what_is_not_about_payments_is_ignored() -> None:
    assert read_event(body(FIXTURES["event"])).ignored is not None


@pytest.mark.parametrize(
    "bad",
    [
        b"not JSON",
        b"[]",
        b'{"id": "evt_1"}',
        body(completed(amount=25.0)),
        body(completed(amount=-1)),
        body(completed(amount="2500")),
        body(completed(amount=True)),
        body(completed(currency=None)),
        body(completed(payment_intent=None)),
        body(completed(payment_intent={"id": "pi_1"})),
        body(succeeded(status="processing")),
        body(succeeded(amount_received=1e3)),
        body(event("refund.created", refund(status="unheard_of"))),
        body(event("refund.created", refund(status=None))),
        body(event("charge.dispute.created", dispute(status="unheard_of"))),
        body(event("charge.refunded", charge(amount_refunded=None))),
        body(completed() | {"created": "now"}),
        b"[" * 100_000,
    ],
)
def test_what_should_report_a_payment_and_does_not_is_unreadable(bad: bytes) -> None:
    with pytest.raises(Unreadable) as caught:
        read_event(bad)
    assert "acme" not in str(caught.value) + str(caught.value.problems)


def test_metadata_with_what_postgres_cannot_store_are_read_all_the_same() -> None:
    reading = read_event(body(succeeded(metadata={"scrip_account": "a\x00b", "scrip_package": "", "other": "x"})))
    (report,) = reading.reports
    assert isinstance(report, PaymentReport)
    assert report.naming == Naming(account="a?b")


def test_the_inbox_takes_whatever_was_signed() -> None:
    envelope = read_envelope(body(completed() | {"id": "evt_7"}))
    assert (envelope.id, envelope.type, envelope.created_at) == ("evt_7", "checkout.session.completed", at(0))
    assert read_envelope(b'{"id": "evt_8", "type": "a\\u0000b"}').type == "a?b"
    for odd in (
        b"",
        b"\xff",
        b"[]",
        b'{"id": 7}',
        b'{"id": "no id"}',
        b'{"id": "evt_1", "created": 1e400}',
        b"[" * 99_999,
    ):
        envelope = read_envelope(odd)
        assert re.fullmatch(r"body_[0-9a-f]{64}", envelope.id)
        assert envelope.type == "unreadable"


def test_a_session_names_its_account_on_both_objects_and_asks_for_whole_coins() -> None:
    terms = Terms("acme/ana", "credits-100", 7, Price(700, "usd"), "usd", 7 * 10**9, 0, checkout="checkout_1")
    params = session_params(
        terms, title="100 credits", success_url="https://a/{CHECKOUT_SESSION_ID}", cancel_url="https://a/"
    )
    named = {
        "scrip_account": "acme/ana",
        "scrip_package": "credits-100",
        "scrip_quantity": "7",
        "scrip_checkout": "checkout_1",
    }
    assert params["metadata"] == params["payment_intent_data"]["metadata"] == named
    assert params["line_items"] == [
        {"quantity": 7, "price_data": {"currency": "usd", "unit_amount": 100, "product_data": {"name": "100 credits"}}}
    ]
    assert params["success_url"] == "https://a/{CHECKOUT_SESSION_ID}"


def test_the_ledger_is_told_decimal_strings_in_the_wallets_unit() -> None:
    terms = Terms("acme/ana", "usd-25", 1, Price(2500, "usd"), "usd", 25 * 10**9, 2 * 10**9)
    partition = partition_of("acme/ana")
    facts: list[Fact] = [
        ReceivedFact(terms, at(0)),
        ClaimedFact("re_1", "refund", "final", 12_345_678_901, at(60)),
    ]
    rows = [
        fact_row(
            fact, payment="pi_1", terms=terms, unit=UNITS["usd"], partition=partition, number=number, recorded_at=at(9)
        )
        for number, fact in enumerate(facts, start=1)
    ]
    received, claimed = (
        PaymentReceived.model_validate_json(rows[0].payload),
        PaymentClaimed.model_validate_json(rows[1].payload),
    )
    assert (received.paid.amount, received.bonus and received.bonus.amount) == ("25", "2")
    assert (claimed.claimed.amount, claimed.claimed.unit) == ("12.345678901", "usd")
    assert [row.subject for row in rows] == [
        f"billing.v1.{partition:02}.payment.{verb}" for verb in ("received", "claimed")
    ]
    own = received_row("evt_1", number=4, recorded_at=at(0))
    assert own.partition == STRIPE_LANE
    assert StripeReceived.model_validate_json(own.payload).event == "evt_1"


# The catalogue --------------------------------------------------------------------------------------------------------


def test_the_packages_of_the_source_systems_are_sold() -> None:
    sold = {each.id: (each.price.minor, each.paid, each.bonus, each.quantity_max) for each in OFFERS.packages.values()}
    usd = 10**9
    assert sold == {
        "credits-100": (100, usd, 0, 10_000),
        "usd-10": (1_000, 10 * usd, 0, 1),
        "usd-25": (2_500, 25 * usd, 2 * usd, 1),
        "usd-50": (5_000, 50 * usd, 5 * usd, 1),
        "usd-100": (10_000, 100 * usd, 15 * usd, 1),
    }
    assert {each.price.denomination for each in OFFERS.packages.values()} == {"usd"}


def test_the_plans_of_the_source_systems_are_sold() -> None:
    plans = {
        each.id: (
            each.price.minor,
            {grant.unit: "unlimited" if grant.unlimited else grant.amount for grant in each.grants},
        )
        for each in OFFERS.plans.values()
    }
    assert plans == {
        "tokens-free": (0, {"tokens": 1_000}),
        "tokens-pro": (2_900, {"tokens": 100_000}),
        "tokens-enterprise": (9_900, {"tokens": "unlimited"}),
        "calls-free": (0, {"calls": 50, "analyze_calls": 10}),
        "calls-pro": (999, {"calls": 500, "analyze_calls": 100}),
        "calls-enterprise": (4_999, {"calls": 5_000, "analyze_calls": 1_000}),
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('price = "1.00"', "price = 1.00"),
        ('price = "1.00"', 'price = "1.005"'),
        ('price = "1.00"', 'price = "0.00"'),
        ('price = "1.00"', 'price = "-1.00"'),
        ('price = "1.00"', 'price = "1e2"'),
        ('currency = "usd"\nunit', 'currency = "xau"\nunit'),
        ('unit = "usd"', 'unit = "gold"'),
        ('paid = "1"', 'paid = "0"'),
        ('paid = "1"', 'paid = "0.0000000001"'),
        ('paid = "1"', 'paid = "999999999"'),
        ('bonus = "2"', 'bonus = "-2"'),
        ('id = "usd-10"', 'id = "usd-25"'),
        ('id = "usd-10"', 'id = "usd-10"\ndiscount = "1"'),
        ("quantity_max = 10_000", "quantity_max = 0"),
        ("unlimited = true", 'unlimited = true, amount = "-1"'),
        ("unlimited = true", "unlimited = false"),
        ('amount = "50"', 'amount = "0"'),
        ('unit = "analyze_calls", amount = "10"', 'unit = "calls", amount = "10"'),
        ('id = "calls-free"', 'id = "calls-pro"'),
    ],
)
def test_a_catalogue_that_cannot_be_sold_from_is_refused(before: str, after: str) -> None:
    assert before in CATALOGUE
    with pytest.raises(ValueError):
        read_offers(CATALOGUE.replace(before, after, 1), units=UNITS)


@pytest.mark.parametrize(
    ("price", "text"),
    [(Price(1000, "usd"), "10.00"), (Price(5, "usd"), "0.05"), (Price(0, "usd"), "0.00"), (Price(120, "jpy"), "120")],
)
def test_prices_are_shown_as_people_write_them(price: Price, text: str) -> None:
    assert price_text(price) == text


def test_an_intent_reports_what_arrived_not_what_was_asked() -> None:
    reading = read_event(body(event("payment_intent.succeeded", intent(amount=2500) | {"amount_received": 2000})))
    (report,) = reading.reports
    assert isinstance(report, PaymentReport)
    assert report.paid == Price(2000, "usd")
