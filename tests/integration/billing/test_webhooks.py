"""Stripe's events: stored before they are answered, processed afterwards; once, in any order, through any death."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import httpx2
import psycopg
import pytest

from contracts.billing import STRIPE_RECEIVED_SUBJECT, PaymentClaimed, PaymentReceived, StripeReceived
from contracts.streams import BILLING_STRIPE_CONSUMER, CONSUMERS, STRIPE
from infra.provision import consumer_config
from infra.servers import free_port
from services.billing import handlers
from services.billing.settings import BillingSettings
from services.kit.database import Writer
from services.kit.publish import Message, publish
from tests.conftest import NatsAccount
from tests.integration.billing.driving import Billing, Driver, signed
from tests.unit.billing.building import (
    NOON,
    OFFERS,
    UNITS,
    at,
    body,
    charge,
    completed,
    dispute,
    event,
    metadata,
    refund,
    succeeded,
)

pytestmark = pytest.mark.anyio

GRANTED = "SELECT payment, account, package, paid, bonus FROM payments WHERE status = 'granted' ORDER BY payment"
ACME_25 = ("pi_1", "acme", "usd-25", 25_000_000_000, 2_000_000_000)


async def test_an_event_is_taken_whatever_else_the_address_says(driver: Driver) -> None:
    content = body(succeeded())
    async with driver.running() as billing:
        answer = await billing.http.post("/stripe/webhook?shop=1&shop=2", content=content, headers=signed(content))
        assert answer.status_code == 200, answer.text
        await driver.until_processed(1)


async def test_both_events_of_a_payment_grant_it_once(driver: Driver) -> None:
    async with driver.running() as billing:
        await billing.tell(completed(), succeeded())
        await driver.until_processed(2)
        await driver.until_published(1)
    assert await driver.rows(GRANTED) == [ACME_25]
    (fact,) = await driver.facts()
    assert isinstance(fact, PaymentReceived)
    assert (fact.payment, fact.account, fact.package, fact.quantity) == ("pi_1", "acme", "usd-25", 1)
    assert (fact.paid.model_dump(), fact.bonus and fact.bonus.model_dump()) == (
        {"amount": "25", "unit": "usd"},
        {"amount": "2", "unit": "usd"},
    )
    (published,) = await driver.published()
    assert published["payment"] == "pi_1"


async def test_what_stripe_signed_is_stored_once_and_answered_each_time(driver: Driver) -> None:
    content = body(completed())
    async with driver.running() as billing:
        answers = await asyncio.gather(*(billing.webhook(content) for _ in range(12)))
        assert {answer.status_code for answer in answers} == {200}
        await driver.until_processed(1)
    assert await driver.rows("SELECT deliveries, status, payload FROM stripe_events") == [(12, "applied", content)]
    assert len(await driver.facts()) == 1


async def test_every_order_of_the_events_comes_to_the_same(driver: Driver) -> None:
    """A payment, refunded in two parts, for each order of its five events, and each event twice."""
    orders = random.Random(7).sample(list(permutations(range(5))), 10)
    async with driver.running() as billing:
        for number, order in enumerate(orders):
            payment = f"pi_{number:02}"
            story = [
                completed(payment),
                succeeded(payment),
                event("refund.created", refund(f"re_{number}_a", payment, amount=1000, status="pending")),
                event("refund.updated", refund(f"re_{number}_a", payment, amount=1000), created=NOON + 1),
                event("refund.created", refund(f"re_{number}_b", payment, amount=1500)),
            ]
            await asyncio.gather(*(billing.tell(story[place], story[place]) for place in order))
        await driver.until_processed(5 * len(orders))
    received = [fact for fact in await driver.facts() if isinstance(fact, PaymentReceived)]
    assert sorted(fact.payment for fact in received) == [f"pi_{number:02}" for number in range(len(orders))]
    last: dict[str, PaymentClaimed] = {}
    for fact in await driver.facts():
        if isinstance(fact, PaymentClaimed):
            last[fact.claim] = fact
    assert {(claim[-1], fact.state, fact.claimed.amount) for claim, fact in last.items()} == {
        ("a", "final", "10"),
        ("b", "final", "15"),
    }
    assert len(last) == 2 * len(orders)


async def test_a_dispute_is_told_open_then_as_it_ends(driver: Driver) -> None:
    async with driver.running() as billing:
        await billing.tell(succeeded(), event("charge.dispute.created", dispute()))
        await driver.until_processed(2)
        await billing.tell(event("charge.dispute.closed", dispute(status="won"), created=NOON + 9))
        await driver.until_processed(3)
        (shown,) = (await billing.get("/v1/payments?account=acme"))["payments"]
    assert [
        (fact.reason, fact.state, fact.claimed.amount)
        for fact in await driver.facts()
        if isinstance(fact, PaymentClaimed)
    ] == [("dispute", "open", "25"), ("dispute", "void", "25")]
    assert [(claim["claim"], claim["state"], claim["claimed_minor"]) for claim in shown["claims"]] == [
        ("dp_1", "void", 2500)
    ]


async def test_what_stripe_did_not_sign_is_turned_away(driver: Driver) -> None:
    async with driver.running() as billing:
        for headers in (
            {},
            {"Stripe-Signature": ""},
            {"Stripe-Signature": "t=1,v1=00"},
            {"Stripe-Signature": "nonsense"},
            signed(body(succeeded()), secret="whsec_of_somebody_else"),
            signed(b"another body"),
        ):
            answer = await billing.webhook(body(succeeded()), headers)
            assert (answer.status_code, answer.json()["code"]) == (400, "signature_invalid"), headers
        assert (await billing.webhook(b"\xff", signed(b"x"))).status_code == 400
    assert await driver.rows("SELECT 1 FROM stripe_events") == []


async def test_signatures_grow_old_and_secrets_are_rotated(driver: Driver) -> None:
    content = body(succeeded())
    async with driver.running() as billing:
        assert (await billing.webhook(content, signed(content, age_seconds=400))).status_code == 400
        assert (await billing.webhook(content, signed(content, age_seconds=200))).status_code == 200
        assert (await billing.webhook(content, signed(content, secret="whsec_older"))).status_code == 200


async def test_a_body_that_is_too_large_is_turned_away_and_nothing_else_is(driver: Driver) -> None:
    """Whatever Stripe signed is kept, byte for byte, and shown; nothing of it is lost for not being understood."""
    odd = [
        b"",
        b"not JSON",
        b"[1]",
        b'{"id": 7}',
        b"\xc3\xa4",
        body(completed(amount=None)),
        body(event("plan.made", {})),
    ]
    async with driver.running() as billing:
        large = b'{"id": "' + b"x" * (1 << 20) + b'"}'
        answer = await billing.webhook(large, signed(large))
        assert answer.status_code == 413
        for content in odd:
            assert (await billing.webhook(content)).status_code == 200
        await driver.until_processed(len(odd))
        shown = (await billing.get("/v1/stripe-events?limit=3"))["stripe_events"]
        rest = (await billing.get(f"/v1/stripe-events?before={shown[-1]['number']}"))["stripe_events"]
        unreadable = (await billing.get("/v1/stripe-events?status=unreadable"))["stripe_events"]
        ignored = (await billing.get("/v1/stripe-events?status=ignored"))["stripe_events"]
    assert [each["number"] for each in [*shown, *rest]] == [7, 6, 5, 4, 3, 2, 1]
    assert [each["number"] for each in unreadable] == [6, 5, 4, 3, 2, 1]
    assert [each["type"] for each in ignored] == ["plan.made"]
    assert "amount" in unreadable[0]["detail"]
    stored = await driver.rows("SELECT payload FROM stripe_events ORDER BY number")
    assert [bytes(payload) for (payload,) in stored] == odd


async def test_a_payment_that_names_nobody_grants_nothing_until_somebody_says_whose_it_is(driver: Driver) -> None:
    async with driver.running() as billing:
        await billing.tell(
            event("payment_intent.succeeded", succeeded(metadata={})["data"]["object"], id="evt_lost"),
            completed(metadata={}),
            event("refund.created", refund(amount=500)),
        )
        await driver.until_processed(3)
        (lost,) = (await billing.get("/v1/unattributed"))["unattributed"]
        assert (lost["event"], lost["payment"], lost["reason"]) == ("evt_lost", "pi_1", "metadata_missing")
        assert (lost["paid_minor"], lost["currency"]) == (2500, "usd")
        assert await driver.facts() == []
        path, whose = "/v1/unattributed/evt_lost/resolve", {"account": "acme", "package": "usd-25"}
        assert (await billing.post(path, whose, by="shop")).status_code == 403
        dear = await billing.post(path, whose | {"package": "usd-50"})
        assert (dear.status_code, dear.json()["code"]) == (422, "price_differs")
        assert (await billing.post(path, whose | {"package": "gone"})).status_code == 404
        assert (await billing.post("/v1/unattributed/evt_unheard_of/resolve", whose)).status_code == 404
        for _ in range(2):
            assert (await billing.post(path, whose)).status_code == 200
        other = await billing.post(path, whose | {"account": "other"})
        assert (other.status_code, other.json()["code"]) == (409, "not_unattributed")
        await billing.tell(completed(metadata={}))
        await driver.until_processed(4)
        assert (await billing.get("/v1/unattributed"))["unattributed"] == []
    assert await driver.rows(GRANTED) == [ACME_25]
    assert await driver.rows("SELECT account, package, principal FROM resolutions") == [("acme", "usd-25", "operator")]
    assert [type(fact).__name__ for fact in await driver.facts()] == ["PaymentReceived", "PaymentClaimed"]
    assert await driver.rows("SELECT DISTINCT status FROM stripe_events") == [("applied",)]


async def test_what_the_catalogue_does_not_sell_is_kept_alarmed_and_listed(driver: Driver) -> None:
    odd: dict[str, tuple[dict[str, Any], str]] = {
        "pi_1": ({"amount": 2400}, "price_differs"),
        "pi_2": ({"currency": "eur"}, "price_differs"),
        "pi_3": ({"metadata": metadata(package="usd-50")}, "price_differs"),
        "pi_4": ({"metadata": metadata(package="gone")}, "package_unknown"),
        "pi_5": ({"metadata": metadata(account="no account")}, "account_invalid"),
        "pi_6": ({"metadata": metadata(checkout="checkout_unheard_of")}, "checkout_unknown"),
    }
    handlers.ALARMS.labels(kind="unattributed")
    before = _alarms()
    async with driver.running() as billing:
        await billing.tell(*(completed(payment, **values) for payment, (values, _) in odd.items()))
        await driver.until_processed(6)
        first = await billing.get("/v1/unattributed?limit=4")
        rest = await billing.get(f"/v1/unattributed?after={first['next_after']}")
        assert (await billing.get("/v1/payments"))["payments"] == []
    listed = [*first["unattributed"], *rest["unattributed"]]
    assert {each["payment"]: each["reason"] for each in listed} == {name: reason for name, (_, reason) in odd.items()}
    assert await driver.facts() == []
    assert _alarms() == before + 6


def _alarms() -> int:
    (sample,) = (
        each
        for metric in handlers.ALARMS.collect()
        for each in metric.samples
        if each.name.endswith("_total") and each.labels["kind"] == "unattributed"
    )
    return int(sample.value)


async def test_metadata_on_one_of_the_two_objects_is_enough(driver: Driver) -> None:
    async with driver.running() as billing:
        await billing.tell(succeeded(metadata={}), completed())
        await driver.until_processed(2)
        assert (await billing.get("/v1/unattributed"))["unattributed"] == []
    assert await driver.rows(GRANTED) == [ACME_25]
    assert len(await driver.facts()) == 1


async def test_refunds_that_no_event_reports_are_asked_for_until_stripe_answers(driver: Driver) -> None:
    """Stripe is away: the event waits and shows it. (The simulator's answer is in test_checkout.)"""
    async with driver.running() as billing:
        await billing.tell(succeeded(), event("charge.refunded", charge(refunded=2500), id="evt_refunded"))
        await driver.until("SELECT status FROM stripe_events ORDER BY number", ("applied",), ("waiting",))
        (waiting,) = (await billing.get("/v1/stripe-events?status=waiting"))["stripe_events"]
        assert waiting["event"] == "evt_refunded"
        # Until its refund is reported after all.
        await billing.tell(event("refund.created", refund()))
        await driver.until_processed(3)
    assert [type(fact).__name__ for fact in await driver.facts()] == ["PaymentReceived", "PaymentClaimed"]


async def test_what_was_stored_and_not_processed_is_processed_after_a_restart(
    driver: Driver, billing_settings: BillingSettings
) -> None:
    writer = Writer(billing_settings.database_url, name="test")
    for each in (event("refund.created", refund(amount=1000)), completed(), succeeded()):
        await handlers.receive(body(each), transaction=writer.transaction)
    await writer.close()
    async with driver.running():
        await driver.until_processed(3)
        await driver.until_published(2)


async def test_two_processes_at_once_grant_once(driver: Driver) -> None:
    async with driver.running() as one, driver.running() as other:
        await asyncio.gather(
            *(
                each.tell(completed(f"pi_{number}"), succeeded(f"pi_{number}"))
                for number in range(10)
                for each in (one, other)
            )
        )
        await driver.until_processed(40)
        await driver.until_published(10)
    assert len(await driver.facts()) == 10


async def test_processing_the_same_event_at_the_same_time_grants_once(
    driver: Driver, billing_settings: BillingSettings
) -> None:
    """As a redelivery may, while the first is still being processed."""
    books = handlers.Books(OFFERS, UNITS)
    writers = [Writer(billing_settings.database_url, name=f"test-{number}") for number in range(6)]
    stories = [
        completed() | {"id": "evt_s"},
        succeeded() | {"id": "evt_i"},
        event("refund.created", refund(), id="evt_r"),
    ]
    for each in stories:
        await handlers.receive(body(each), transaction=writers[0].transaction)
    await asyncio.gather(
        *(
            handlers.process(each["id"], transaction=writer.transaction, books=books)
            for writer, each in zip(writers, stories * 2, strict=True)
        )
    )
    for writer in writers:
        await writer.close()
    assert [type(fact).__name__ for fact in await driver.facts()] == ["PaymentReceived", "PaymentClaimed"]


async def test_a_killed_process_loses_and_repeats_nothing(driver: Driver) -> None:
    """Killed right after an answer, again and again: what was answered 200 has its effect, once."""
    port = free_port()
    await _redeliver_soon(driver)
    for number in range(2):
        with _process(driver.settings, port=port) as process:
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
                billing = Billing(http, str(http.base_url))
                await _until_alive(http)
                await billing.tell(completed(f"pi_{number}"), succeeded(f"pi_{number}"))
            process.send_signal(signal.SIGKILL)
    async with driver.running():
        await driver.until_processed(4)
        await driver.until_published(2)
    # Two payments may be granted in any order: the first may have been redelivered after the second.
    assert sorted(fact.payment for fact in await driver.facts()) == ["pi_0", "pi_1"]


async def test_what_comes_while_it_stops_opens_no_connection_anew(driver: Driver, nats_account: NatsAccount) -> None:
    nats = await nats_account.connect("billing")
    messages = [
        StripeReceived(number=number, event=f"evt_{number}", recorded_at=at(0)).model_dump_json().encode()
        for number in range(1, 401)
    ]
    async with driver.running():
        for payload in messages:
            await publish(nats, stream=STRIPE, message=Message(STRIPE_RECEIVED_SUBJECT, payload, None))
        await driver.until("SELECT count(*) > 0 FROM dead_letters", (True,))
    await nats.close()
    # Postgres notices some time later that a connection was closed.
    await driver.until("SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^billing-'", (0,))
    # It was stopped in the middle of them.
    assert (await driver.rows("SELECT count(*) FROM dead_letters"))[0][0] < len(messages)


async def test_a_message_about_an_event_that_is_not_there_is_a_dead_letter(
    driver: Driver, nats_account: NatsAccount
) -> None:
    """And one that cannot be read; after the event has come, it can be re-driven."""
    nats = await nats_account.connect("billing")
    messages = [StripeReceived(number=1, event="evt_later", recorded_at=at(0)).model_dump_json().encode(), b"{}"]
    async with driver.running() as billing:
        for payload in messages:
            await publish(nats, stream=STRIPE, message=Message(STRIPE_RECEIVED_SUBJECT, payload, None))
        await driver.until("SELECT count(*) FROM dead_letters", (2,))
        letters = (await billing.get("/dead-letters"))["dead_letters"]
        paths = [f"/dead-letters/{each['id']}/redrive" for each in reversed(letters)]
        assert [(await billing.post(path, {})).status_code for path in paths] == [422, 422]
        await billing.tell(completed() | {"id": "evt_later"})
        await driver.until_processed(1)
        assert [(await billing.post(path, {})).status_code for path in paths] == [200, 422]
    await nats.close()
    assert len(await driver.facts()) == 1


async def test_the_database_away_is_a_503_and_nothing_is_said_to_be_stored(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with driver.running() as billing:
        content = body(completed())

        monkeypatch.setattr(handlers, "receive", _raising_operational_error)
        answer = await billing.webhook(content)
        assert (answer.status_code, answer.json()["code"]) == (503, "database_away")
        monkeypatch.undo()
        assert (await billing.webhook(content)).status_code == 200
        await driver.until_processed(1)


async def _raising_operational_error(*_arguments: object, **_more: object) -> None:
    raise psycopg.OperationalError("the connection is lost")


async def _redeliver_soon(driver: Driver) -> None:
    """What a killed process had in hand is delivered again after the consumer's ack_wait: too long for a test."""
    (consumer,) = (each for each in CONSUMERS if each.durable == BILLING_STRIPE_CONSUMER)
    config = consumer_config(consumer)
    config.ack_wait = 1.5
    await driver.operator_nats.jetstream(timeout=5).add_consumer(consumer.stream, config)


@contextmanager
def _process(settings: BillingSettings, *, port: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        "SCRIP_NATS_URL": settings.nats_url,
        "SCRIP_NATS_USER": settings.nats_user,
        "SCRIP_NATS_PASSWORD": settings.nats_password.get_secret_value(),
        "SCRIP_DATABASE_URL": settings.database_url.get_secret_value(),
        "SCRIP_HTTP_PORT": str(port),
        "SCRIP_TOKENS_FILE": str(settings.tokens_file),
        "SCRIP_CATALOGUE_FILE": str(settings.catalogue_file),
        "SCRIP_LEASE_SECONDS": "1",
        "SCRIP_BILLING_CATALOGUE_FILE": str(settings.billing_catalogue_file),
        "SCRIP_STRIPE_API_KEY": "sk_test_billing",
        "SCRIP_STRIPE_WEBHOOK_SECRETS": ",".join(each.get_secret_value() for each in settings.stripe_webhook_secrets),
    }
    started = subprocess.Popen(
        [sys.executable, "-m", "services.billing.app"], env=os.environ | environment, stderr=subprocess.DEVNULL
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


async def _until_alive(http: httpx2.AsyncClient) -> None:
    # A process that has just been started shares few processors with whatever else runs.
    deadline = time.monotonic() + 60
    while True:
        try:
            if (await http.get("/readyz")).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        assert time.monotonic() < deadline, "billing did not start"
        await asyncio.sleep(0.05)
