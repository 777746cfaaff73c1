"""Laws of the simulated Stripe, seen through the unmodified stripe library on real sockets."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import stripe
from stripe import StripeClient

from infra.servers import free_port
from infra.simulators.stripe.app import API_VERSION, Settings, build_app
from infra.simulators.stripe.webhooks import DeliverySettings, Endpoint
from tests.integration.simulators.serving import Receiver, process, serving, until
from tests.integration.simulators.stripe_shapes import problems

KEY = "sk_test_of_the_tests"
SECRET = "whsec_of_the_tests"
PAID = ["charge.succeeded", "payment_intent.succeeded", "checkout.session.completed"]


class Simulated:
    """A simulated Stripe and its endpoint, each on a port."""

    def __init__(self, url: str, receiver: Receiver) -> None:
        self.url = url
        self.receiver = receiver
        self.http = httpx2.Client(base_url=url)
        self._requests = stripe.RequestsClient()
        self.client = self.connect(KEY)

    def close(self) -> None:
        self.http.close()
        self._requests.close()  # type: ignore[no-untyped-call]  # the library does not say

    def connect(self, key: str) -> StripeClient:
        return StripeClient(key, base_addresses={"api": self.url}, http_client=self._requests, max_network_retries=2)

    def sim(self, path: str, **body: Any) -> Any:
        answer = self.http.post(f"/__sim/{path}", json=body)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def deliveries(self, **chosen: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/__sim/deliveries", params=chosen).json()["deliveries"]
        return found

    def settled(self) -> None:
        """Return when every delivery has reached its end."""
        until(lambda: not self.deliveries(state="pending"))

    def open(self, *, cents: int = 1000, key: str | None = None, **more: Any) -> stripe.checkout.Session:
        params: Any = {
            "mode": "payment",
            "line_items": [
                {
                    "price_data": {
                        "currency": "usd",
                        "unit_amount": cents,
                        "product_data": {"name": "Ten dollars of credit"},
                    },
                    "quantity": 1,
                }
            ],
            "success_url": "http://localhost/done?session={CHECKOUT_SESSION_ID}",
            "cancel_url": "http://localhost/back",
            "client_reference_id": "acme",
            "metadata": {"account": "acme", "package": "ten"},
            **more,
        }
        return self.client.v1.checkout.sessions.create(params, {"idempotency_key": key} if key else {})

    def paid(self, *, cents: int = 1000) -> stripe.Charge:
        """A charge that was just paid through Checkout."""
        charge = self.sim(f"checkout/{self.open(cents=cents).id}/pay")["charge"]
        return self.client.v1.charges.retrieve(charge["id"])


@contextmanager
def simulated(receiver: Receiver | None = None, **delivery: Any) -> Iterator[Simulated]:
    receiver = receiver or Receiver(SECRET)
    with serving(receiver.app()) as endpoint:
        settings = DeliverySettings(
            endpoints=(Endpoint(f"{endpoint}/stripe/webhook", SECRET),), retry_seconds_first=0.02, **delivery
        )
        with serving(build_app(Settings(delivery=settings))) as url:
            made = Simulated(url, receiver)
            try:
                yield made
            finally:
                made.close()


@pytest.fixture(scope="module")
def one_for_all() -> Iterator[Simulated]:
    with simulated() as made:
        yield made


@pytest.fixture
def sim(one_for_all: Simulated) -> Simulated:
    one_for_all.settled()
    one_for_all.sim("reset")
    one_for_all.receiver.received.clear()
    return one_for_all


def test_it_speaks_the_version_of_the_library() -> None:
    assert stripe.api_version == API_VERSION


def test_a_paid_session_is_told_in_signed_events(sim: Simulated) -> None:
    session = sim.open()
    assert (session.status, session.payment_status, session.payment_intent) == ("open", "unpaid", None)
    assert session.url == f"{sim.url}/c/pay/{session.id}"
    sim.sim(f"checkout/{session.id}/pay")
    sim.settled()
    assert sim.receiver.types == PAID
    assert sim.receiver.forged == 0
    completed = sim.receiver.received[-1]["data"]["object"]
    assert completed["id"] == session.id
    assert (completed["payment_status"], completed["amount_total"], completed["currency"]) == ("paid", 1000, "usd")
    assert (completed["client_reference_id"], completed["metadata"]["package"]) == ("acme", "ten")
    intent = sim.client.v1.payment_intents.retrieve(completed["payment_intent"])
    assert (intent.status, intent.amount_received) == ("succeeded", 1000)
    assert sim.client.v1.checkout.sessions.retrieve(session.id).payment_status == "paid"
    assert sim.client.v1.events.list({"limit": 1}).data[0].pending_webhooks == 0


def test_metadata_reaches_the_payment_intent_only_if_it_is_given_for_it(sim: Simulated) -> None:
    for expected in ({}, {"to": "it"}):
        given: dict[str, Any] = {"payment_intent_data": {"metadata": expected}} if expected else {}
        found = sim.sim(f"checkout/{sim.open(**given).id}/pay")
        assert found["session"]["metadata"] == {"account": "acme", "package": "ten"}
        assert found["payment_intent"]["metadata"] == expected
        assert found["charge"]["metadata"] == expected


def test_paying_twice_happens_once(sim: Simulated) -> None:
    session = sim.open()
    first, second = (sim.sim(f"checkout/{session.id}/pay") for _ in range(2))
    assert first == second
    sim.settled()
    assert sim.receiver.types == PAID


def test_a_declined_card_can_be_followed_by_another(sim: Simulated) -> None:
    session = sim.open()
    declined = sim.sim(f"checkout/{session.id}/pay", outcome="declined")
    assert (declined["session"]["status"], declined["payment_intent"]["status"]) == ("open", "requires_payment_method")
    paid = sim.sim(f"checkout/{session.id}/pay")
    assert paid["payment_intent"]["id"] == declined["payment_intent"]["id"]
    assert paid["charge"]["id"] != declined["charge"]["id"]
    sim.settled()
    assert sim.receiver.types == ["charge.failed", "payment_intent.payment_failed", *PAID]


@pytest.mark.parametrize(("outcome", "told"), [("paid", "succeeded"), ("declined", "failed")])
def test_a_delayed_payment_is_complete_before_it_is_paid(sim: Simulated, outcome: str, told: str) -> None:
    session = sim.open()
    delayed = sim.sim(f"checkout/{session.id}/pay", outcome="delayed")["session"]
    assert (delayed["status"], delayed["payment_status"]) == ("complete", "unpaid")
    sim.sim(f"checkout/{session.id}/pay", outcome=outcome)
    sim.settled()
    assert sim.receiver.types[:2] == ["payment_intent.processing", "checkout.session.completed"]
    assert sim.receiver.types[-1] == f"checkout.session.async_payment_{told}"


def test_an_expired_session_cannot_be_paid(sim: Simulated) -> None:
    session = sim.client.v1.checkout.sessions.expire(sim.open().id)
    assert (session.status, session.url) == ("expired", None)
    assert sim.http.post(f"/__sim/checkout/{session.id}/pay").status_code == 400
    sim.settled()
    assert sim.receiver.types == ["checkout.session.expired"]


def test_the_pay_page_pays_and_goes_on(sim: Simulated) -> None:
    session = sim.open()
    assert session.url is not None
    page = sim.http.get(session.url)
    assert "10.00 USD" in page.text
    assert f'action="/__sim/checkout/{session.id}/pay"' in page.text
    answer = sim.http.post(f"/__sim/checkout/{session.id}/pay", data={"outcome": "paid"})
    assert (answer.status_code, answer.headers["location"]) == (303, f"http://localhost/done?session={session.id}")
    assert "is paid" in sim.http.get(session.url).text


def test_a_charge_is_refunded_whole_or_in_part_and_never_beyond(sim: Simulated) -> None:
    charge = sim.paid()
    refunds = sim.client.v1.refunds
    assert charge.payment_intent is not None
    part = refunds.create({"charge": charge.id, "amount": 300, "reason": "requested_by_customer"})
    assert (part.amount, part.status, part.payment_intent) == (300, "succeeded", charge.payment_intent)
    with pytest.raises(stripe.InvalidRequestError, match="greater than unrefunded amount") as refused:
        refunds.create({"charge": charge.id, "amount": 701})
    assert refused.value.param == "amount"
    assert sim.client.v1.charges.retrieve(charge.id).refunded is False
    rest = refunds.create({"payment_intent": str(charge.payment_intent)})
    assert rest.amount == 700
    after = sim.client.v1.charges.retrieve(charge.id)
    assert (after.refunded, after.amount_refunded) == (True, 1000)
    with pytest.raises(stripe.InvalidRequestError) as again:
        refunds.create({"charge": charge.id})
    assert again.value.code == "charge_already_refunded"
    assert [each.id for each in refunds.list({"charge": charge.id}).data] == [rest.id, part.id]
    sim.settled()
    assert sim.receiver.types[3:] == ["refund.created", "charge.refunded", "refund.updated"] * 2
    told = [event for event in sim.receiver.received if event["type"] == "charge.refunded"]
    assert [event["data"]["object"]["amount_refunded"] for event in told] == [300, 1000]


def test_a_dispute_takes_money_back_and_forbids_a_refund(sim: Simulated) -> None:
    charge = sim.paid()
    dispute = sim.sim("dispute", charge=charge.id, reason="product_not_received")
    assert (dispute["amount"], dispute["payment_intent"]) == (1000, charge.payment_intent)
    with pytest.raises(stripe.InvalidRequestError) as refused:
        sim.client.v1.refunds.create({"charge": charge.id})
    assert refused.value.code == "charge_disputed"
    sim.sim(f"dispute/{dispute['id']}/close", status="won")
    assert sim.client.v1.disputes.retrieve(dispute["id"]).status == "won"
    sim.settled()
    assert sim.receiver.types[3:] == [
        "charge.dispute.created",
        "charge.dispute.funds_withdrawn",
        "charge.dispute.funds_reinstated",
        "charge.dispute.closed",
    ]


def test_the_same_idempotency_key_gets_the_same_answer(sim: Simulated) -> None:
    first, second = sim.open(key="once"), sim.open(key="once")
    assert first.to_dict() == second.to_dict()
    assert first.last_response is not None
    assert "idempotent-replayed" not in first.last_response.headers
    assert second.last_response is not None
    assert second.last_response.headers["idempotent-replayed"] == "true"
    with pytest.raises(stripe.IdempotencyError, match="same parameters"):
        sim.open(cents=2000, key="once")
    assert len(sim.client.v1.checkout.sessions.list().data) == 1
    assert sim.open(cents=2000, key="twice").id != first.id


def test_a_refusal_is_kept_under_its_key_but_not_a_mistake_in_the_request(sim: Simulated) -> None:
    charge = sim.paid()
    for _ in range(2):
        with pytest.raises(stripe.InvalidRequestError, match="greater than"):
            sim.client.v1.refunds.create({"charge": charge.id, "amount": 9999}, {"idempotency_key": "refund"})
    with pytest.raises(stripe.IdempotencyError):
        sim.client.v1.refunds.create({"charge": charge.id}, {"idempotency_key": "refund"})
    with pytest.raises(stripe.InvalidRequestError, match="Missing required param"):
        sim.open(success_url="", key="mistake")
    assert sim.open(key="mistake").status == "open"


def test_a_lost_answer_is_not_a_second_refund_for_who_keeps_the_key(sim: Simulated) -> None:
    charge = sim.paid()
    refunds = sim.client.v1.refunds
    options: stripe.RequestOptions = {"idempotency_key": "refund-of-acme"}
    sim.sim("faults", lost_answers=1, errors=1)
    # The library repeats what was answered 500 by itself, but not what broke off in the middle of its answer.
    with pytest.raises(stripe.APIConnectionError):
        refunds.create({"charge": charge.id, "amount": 400}, options)
    refund = refunds.create({"charge": charge.id, "amount": 400}, options)
    assert [each.id for each in refunds.list().data] == [refund.id]
    assert sim.client.v1.charges.retrieve(charge.id).amount_refunded == 400


def test_a_bad_key_is_refused_and_not_repeated(sim: Simulated) -> None:
    stranger = sim.connect("sk_live_" + "x" * 20)
    with pytest.raises(stripe.AuthenticationError) as refused:
        stranger.v1.charges.list()
    assert "x" * 20 not in str(refused.value)


def test_what_does_not_exist_is_missing(sim: Simulated) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="No such charge: 'ch_none'") as refused:
        sim.client.v1.charges.retrieve("ch_none")
    assert (refused.value.http_status, refused.value.code) == (404, "resource_missing")
    with pytest.raises(stripe.InvalidRequestError, match="Unrecognized request URL"):
        sim.client.v1.invoices.list()


@pytest.mark.parametrize(
    "more",
    [
        {"mode": "subscription"},
        {"line_items": []},
        {"success_url": "javascript:alert(1)"},
        {"customer": "cus_none"},
        {"expires_at": 1},
        {"metadata": {"k" * 41: "v"}},
        {"payment_intent_data": {"capture_method": "manual"}},
        {"allow_promotion_codes": True},
        {"cents": 49},
    ],
)
def test_what_is_not_understood_is_refused_and_not_ignored(sim: Simulated, more: dict[str, Any]) -> None:
    with pytest.raises(stripe.InvalidRequestError):
        sim.open(**more)
    assert sim.client.v1.checkout.sessions.list().data == []


def test_events_are_listed_in_pages_newest_first(sim: Simulated) -> None:
    for _ in range(4):
        sim.paid()
    pages = [event.type for event in sim.client.v1.events.list({"limit": 5}).auto_paging_iter()]
    assert pages == list(reversed(PAID)) * 4
    first = sim.client.v1.events.list({"limit": 5})
    assert (first.has_more, len(first.data), first.url) == (True, 5, "/v1/events")
    second = sim.client.v1.events.list({"limit": 5, "starting_after": first.data[-1].id})
    before = sim.client.v1.events.list({"limit": 5, "ending_before": second.data[0].id})
    assert [event.id for event in before.data] == [event.id for event in first.data]
    chosen = sim.client.v1.events.list({"types": ["charge.succeeded"], "created": {"gte": int(time.time()) - 60}})
    assert {event.type for event in chosen.data} == {"charge.succeeded"}
    assert sim.client.v1.events.list({"created": {"lt": 1}}).data == []
    assert sim.client.v1.events.retrieve(first.data[0].id).data.object["id"] == first.data[0].data.object["id"]


def test_ids_are_expanded_into_objects(sim: Simulated) -> None:
    charge = sim.paid()
    (session,) = sim.client.v1.checkout.sessions.list({"payment_intent": str(charge.payment_intent)}).data
    found = sim.client.v1.checkout.sessions.retrieve(session.id, {"expand": ["payment_intent.latest_charge"]})
    assert isinstance(found.payment_intent, stripe.PaymentIntent)
    assert isinstance(found.payment_intent.latest_charge, stripe.Charge)
    assert found.payment_intent.latest_charge.id == charge.id


def test_every_object_is_of_stripes_shape(sim: Simulated) -> None:
    customer = sim.client.v1.customers.create({"email": "ana@example.com", "metadata": {"account": "acme"}})
    session = sim.open(customer=customer.id, customer_email="ana@example.com")
    sim.sim(f"checkout/{session.id}/pay", outcome="declined")
    charge = sim.sim(f"checkout/{session.id}/pay")["charge"]
    refund = sim.client.v1.refunds.create({"charge": charge["id"], "amount": 1, "metadata": {"why": "test"}})
    dispute = sim.sim("dispute", charge=charge["id"])
    sim.sim(f"dispute/{dispute['id']}/close", status="lost")
    other = sim.open()
    sim.sim(f"checkout/{other.id}/pay", outcome="delayed")
    sim.client.v1.checkout.sessions.expire(sim.open().id)
    sim.settled()
    seen = [customer.to_dict(), session.to_dict(), refund.to_dict(), dispute, charge, *sim.receiver.received]
    for path in ("checkout/sessions", "payment_intents", "charges", "refunds", "disputes", "customers", "events"):
        listed = sim.http.get(f"/v1/{path}?limit=100", headers={"authorization": f"Bearer {KEY}"}).json()
        assert listed["data"], path
        seen += listed["data"]
    assert {each["object"] for each in seen} >= {"event", "refund", "dispute", "customer"}
    assert [problem for each in seen for problem in problems(each)] == []


def test_an_object_of_another_shape_would_be_noticed(sim: Simulated) -> None:
    charge: dict[str, Any] = sim.sim(f"checkout/{sim.open().id}/pay")["charge"]
    assert problems(charge) == []
    for wrong in ({"extra": 1}, {"amount": "1000"}, {"status": None}, {"refunded": 1}, {"customer": 5}):
        assert problems(charge | wrong), wrong
    del charge["refunded"]
    assert problems(charge)


def test_an_endpoint_that_refuses_is_tried_again_with_growing_pauses() -> None:
    receiver = Receiver(SECRET, refuse_first=4)
    with simulated(receiver) as sim:
        sim.sim(f"checkout/{sim.open().id}/pay")
        sim.settled()
        assert sorted(receiver.types) == sorted(PAID)
        attempts = [each["attempts"] for each in sim.deliveries()]
        assert sum(len(each) for each in attempts) == 3 + 4
        (most,) = [each for each in attempts if len(each) == max(map(len, attempts))][:1]
        assert [each["status"] for each in most] == [500] * (len(most) - 1) + [200]
        signatures = {event["id"] for event in receiver.received}
        assert len(signatures) == 3


def test_an_endpoint_that_cannot_be_reached_is_given_up_in_the_end() -> None:
    settings = DeliverySettings(
        endpoints=(Endpoint(f"http://127.0.0.1:{free_port()}/", SECRET),), retry_seconds_first=0.01, attempts_max=3
    )
    with serving(build_app(Settings(delivery=settings))) as url:
        sim = Simulated(url, Receiver(SECRET))
        sim.sim(f"checkout/{sim.open().id}/pay")
        sim.settled()
        assert {each["state"] for each in sim.deliveries()} == {"given_up"}
        assert [each["error"] for each in sim.deliveries()[0]["attempts"]] == ["ConnectError"] * 3
        assert sim.client.v1.events.list().data[0].pending_webhooks == 1
        sim.close()


def test_deliveries_are_doubled_and_reordered_as_the_seed_says() -> None:
    orders = []
    with simulated(duplicate=1.0, reorder_seconds=0.2) as sim:
        for seed in (3, 3, 4):
            sim.sim("settings", seed=seed)
            sim.sim(f"checkout/{sim.open().id}/pay")
            sim.settled()
            events = [event["id"] for event in sim.receiver.received]
            assert sorted(events) == sorted([*{*events}] * 2)
            orders.append(sim.receiver.types)
            sim.sim("reset")
            sim.receiver.received.clear()
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == sorted(PAID * 2) for order in orders)
    assert list(dict.fromkeys(orders[0])) != PAID


def test_how_events_are_delivered_can_be_changed_while_it_runs(sim: Simulated) -> None:
    sim.sim("settings", duplicate=1.0)
    try:
        sim.paid()
        sim.settled()
        assert sim.receiver.types == [type for type in PAID for _ in range(2)]
    finally:
        sim.sim("settings", duplicate=0.0)
    sim.sim(f"events/{sim.receiver.received[0]['id']}/resend")
    sim.settled()
    assert len(sim.receiver.received) == 7
    assert sim.http.post("/__sim/settings", json={"duplicated": 1}).status_code == 400


def test_a_wrong_secret_is_noticed_by_the_library() -> None:
    receiver = Receiver("whsec_of_somebody_else")
    with simulated(receiver, attempts_max=1) as sim:
        sim.paid()
        sim.settled()
    assert (receiver.forged, receiver.received) == (3, [])


def test_its_memory_outlives_its_process_and_pending_deliveries_with_it(tmp_path: Path) -> None:
    state, port = tmp_path / "stripe.sqlite", free_port()
    receiver = Receiver(SECRET, refuse_first=10_000)
    with serving(receiver.app()) as endpoint:
        arguments = ["--state", str(state), "--webhook-url", f"{endpoint}/stripe/webhook"]
        arguments += ["--webhook-secret", SECRET, "--retry-first", "0.01", "--retry-max", "0.05"]
        with process("stripe", *arguments, port=port) as first:
            sim = Simulated(f"http://127.0.0.1:{port}", receiver)
            session = sim.open(key="once")
            sim.sim(f"checkout/{session.id}/pay")
            until(lambda: len(receiver.refused) >= 3)
            first.send_signal(signal.SIGKILL)
            first.wait()
        receiver.refuse_first = 0
        with process("stripe", *arguments, port=port) as second:
            sim.settled()
            assert sorted(receiver.types) == sorted(PAID)
            assert sim.open(key="once").id == session.id
            assert sim.client.v1.checkout.sessions.retrieve(session.id).payment_status == "paid"
            second.send_signal(signal.SIGTERM)
            assert second.wait(timeout=5) in (0, -signal.SIGTERM)
        sim.close()
    assert state.stat().st_mode & 0o777 == 0o600
    assert json.dumps(KEY).encode() not in state.read_bytes()
