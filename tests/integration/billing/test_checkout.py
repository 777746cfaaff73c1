"""Checkout, with Stripe's own library against the simulator: opened once, paid, refunded; Stripe away, or refusing."""

import asyncio

import pytest
from pydantic import SecretStr

from contracts.billing import PaymentClaimed, PaymentReceived
from tests.integration.billing.driving import Billing, Driver, wanted
from tests.unit.billing.building import event

pytestmark = pytest.mark.anyio

KEY = {"Authorization": "Bearer sk_test_billing"}


async def claims(driver: Driver) -> dict[str, tuple[str, str]]:
    """The last fact about each claim."""
    told = [fact for fact in await driver.facts() if isinstance(fact, PaymentClaimed)]
    return {fact.claim: (fact.state, fact.claimed.amount) for fact in told}


async def test_from_checkout_to_grant_to_refund_though_stripe_repeats_and_reorders(driver: Driver) -> None:
    async with driver.with_stripe(duplicate=1.0, reorder_seconds=0.3, concurrent=4, seed=5) as (billing, stripe):
        checkout = await billing.checkout("usd-50", account="acme/ana")
        assert (checkout["status"], checkout["price_minor"], checkout["currency"]) == ("open", 5000, "usd")
        assert checkout["url"].startswith(stripe.url)
        paid = await stripe.does(f"checkout/{checkout['session']}/pay")
        await driver.until_published(1)
        for name in (checkout["checkout"], checkout["session"]):
            shown = await billing.get(f"/v1/checkout/{name}")
            assert (shown["status"], shown["payment"]) == ("paid", paid["payment_intent"]["id"])
        for amount in (2000, 3000):
            await stripe.does("refund", payment_intent=shown["payment"], amount=amount)
        await stripe.delivered()
        await driver.until("SELECT count(*) FROM stripe_events WHERE status NOT IN ('applied', 'ignored')", (0,))
        await driver.until_published(3)
        (payment,) = (await billing.get("/v1/payments?account=acme/ana"))["payments"]
        assert (await billing.get("/v1/payments?account=acme"))["payments"] == []
    assert payment["paid"] == {"amount": "50", "unit": "usd"}
    assert payment["bonus"] == {"amount": "5", "unit": "usd"}
    assert sorted(claim["claimed"]["amount"] for claim in payment["claims"]) == ["20", "30"]
    (received, *_) = await driver.facts()
    assert isinstance(received, PaymentReceived)
    assert (received.account, received.package) == ("acme/ana", "usd-50")
    assert sorted((await claims(driver)).values()) == [("final", "20"), ("final", "30")]
    ((deliveries,),) = await driver.rows("SELECT max(deliveries) FROM stripe_events")
    assert deliveries == 2


async def test_a_quantity_is_paid_and_granted_whole(driver: Driver) -> None:
    async with driver.with_stripe() as (billing, stripe):
        checkout = await billing.checkout("credits-100", quantity=250)
        assert checkout["price_minor"] == 25_000
        await stripe.does(f"checkout/{checkout['session']}/pay")
        await driver.until_published(1)
    (received,) = await driver.facts()
    assert isinstance(received, PaymentReceived)
    assert (received.quantity, received.paid.amount, received.bonus) == (250, "250", None)


async def test_a_delayed_payment_is_granted_when_it_arrives(driver: Driver) -> None:
    async with driver.with_stripe() as (billing, stripe):
        checkout = await billing.checkout()
        await stripe.does(f"checkout/{checkout['session']}/pay", outcome="delayed")
        await stripe.delivered()
        await driver.until("SELECT count(*) FROM stripe_events WHERE status = 'ignored'", (2,))
        assert await driver.facts() == []
        await stripe.does(f"checkout/{checkout['session']}/pay")
        await driver.until_published(1)


async def test_a_lost_dispute_after_a_partial_refund(driver: Driver) -> None:
    """20 of 50 refunded, then 50 lost to the bank: both are told; whoever claws back takes no more than was paid."""
    async with driver.with_stripe() as (billing, stripe):
        checkout = await billing.checkout("usd-50")
        paid = await stripe.does(f"checkout/{checkout['session']}/pay")
        intent = paid["payment_intent"]["id"]
        await stripe.does("refund", payment_intent=intent, amount=2000)
        dispute = await stripe.does("dispute", payment_intent=intent)
        await stripe.does(f"dispute/{dispute['id']}/close", status="lost")
        await stripe.delivered()
        await driver.until("SELECT count(*) FROM claims WHERE told_state = 'final'", (2,))
    assert sorted((await claims(driver)).values()) == [("final", "20"), ("final", "50")]


async def test_refunds_of_which_only_the_charge_reports_are_asked_of_stripe(driver: Driver) -> None:
    """An endpoint that does not get `refund.*`: it is down while they are delivered, and they are given up."""
    async with driver.with_stripe() as (billing, stripe):
        checkout = await billing.checkout()
        paid = await stripe.does(f"checkout/{checkout['session']}/pay")
        await stripe.delivered()
        intent = paid["payment_intent"]["id"]
        # Nobody is told of these.
        await stripe.does("settings", endpoints=[])
        refund = await stripe.does("refund", payment_intent=intent, amount=700)
        answer = await stripe.http.get(f"/v1/charges/{refund['charge']}", headers=KEY)
        await billing.tell(event("charge.refunded", answer.json(), id="evt_charge"))
        await driver.until("SELECT status FROM stripe_events WHERE event = 'evt_charge'", ("waiting",))
        await driver.until("SELECT status FROM stripe_events WHERE event = 'evt_charge'", ("applied",))
    assert await claims(driver) == {refund["id"]: ("final", "7")}


async def test_a_checkout_is_opened_once_under_a_key(driver: Driver) -> None:
    async with driver.with_stripe() as (billing, stripe):
        answers = await asyncio.gather(*(billing.checkout("usd-25", key="once") for _ in range(6)))
        assert len({(answer["checkout"], answer["session"]) for answer in answers}) == 1
        other = await billing.post("/v1/checkout", wanted("usd-50"), by="shop", key="once")
        assert (other.status_code, other.json()["code"]) == (409, "idempotency_key_used")
        own = await billing.post("/v1/checkout", wanted("usd-50"), by="operator", key="once")
        assert own.status_code == 201
        listed = await stripe.http.get("/v1/checkout/sessions", headers=KEY)
        assert len(listed.json()["data"]) == 2


async def test_stripe_losing_its_answer_opens_one_session(driver: Driver) -> None:
    async with driver.with_stripe() as (billing, stripe):
        await stripe.does("faults", lost_answers=4)
        first = await billing.post("/v1/checkout", wanted(), by="shop", key="k")
        assert (first.status_code, first.json()["code"]) == (503, "stripe_away")
        assert first.headers["retry-after"]
        await stripe.does("faults")
        checkout = await billing.checkout(key="k")
        listed = await stripe.http.get("/v1/checkout/sessions", headers=KEY)
        assert [each["id"] for each in listed.json()["data"]] == [checkout["session"]]


async def test_stripe_away_or_refusing_is_said_plainly(driver: Driver) -> None:
    async with driver.running() as billing:
        away = await billing.post("/v1/checkout", wanted(), by="shop", key="k")
        assert (away.status_code, away.json()["code"]) == (503, "stripe_away")
        ((checkout,),) = await driver.rows("SELECT checkout FROM checkouts")
        assert (await billing.get(f"/v1/checkout/{checkout}"))["status"] == "starting"
    wrong = SecretStr("pk_live_no_secret_key_at_all")
    async with driver.with_stripe() as (_, stripe):
        async with driver.running(stripe_api_base=stripe.url, stripe_api_key=wrong) as billing:
            refused = await billing.post("/v1/checkout", wanted(), by="shop", key="k")
            assert (refused.status_code, refused.json()["code"]) == (502, "stripe_refused")
            assert "pk_" not in refused.text
        async with driver.running(stripe_api_base=stripe.url) as billing:
            assert (await billing.checkout(key="k"))["checkout"] == checkout


async def test_a_checkout_that_cannot_be_opened(driver: Driver) -> None:
    async with driver.running() as billing:
        for body, status, code in (
            (wanted("gone"), 404, "package_unknown"),
            (wanted("usd-25", quantity=2), 422, "quantity_too_large"),
            (wanted("usd-25", quantity=0), 422, "invalid_request"),
            (wanted("usd-25", quantity=1.5), 422, "invalid_request"),
            (wanted("usd-25", account="not an account"), 422, "invalid_request"),
            (wanted("usd-25") | {"success_url": "javascript:alert(1)"}, 422, "invalid_request"),
            (wanted("usd-25") | {"price": 1}, 422, "invalid_request"),
        ):
            answer = await billing.post("/v1/checkout", body, by="shop", key="k")
            assert (answer.status_code, answer.json()["code"]) == (status, code), body
        assert (await billing.post("/v1/checkout", wanted(), by="shop")).status_code == 422
    assert await driver.rows("SELECT 1 FROM checkouts") == []


async def test_packages_and_plans_are_listed(driver: Driver) -> None:
    async with driver.running() as billing:
        packages = (await billing.get("/v1/packages"))["packages"]
        plans = (await billing.get("/v1/plans"))["plans"]
    (best,) = (each for each in packages if each["id"] == "usd-100")
    assert best == {
        "id": "usd-100",
        "title": "$100 of credit and $15 on top",
        "price": "100.00",
        "price_minor": 10_000,
        "currency": "usd",
        "paid": {"amount": "100", "unit": "usd"},
        "bonus": {"amount": "15", "unit": "usd"},
        "quantity_max": 1,
    }
    (enterprise,) = (each for each in plans if each["id"] == "tokens-enterprise")
    assert (enterprise["price_minor"], enterprise["grants"]) == (
        9900,
        [{"unit": "tokens", "amount": None, "unlimited": True}],
    )


async def test_a_parameter_that_nobody_reads_is_named_and_nothing_is_opened(driver: Driver) -> None:
    async with driver.with_stripe() as (billing, _):
        answer = await billing.post("/v1/checkout?dryrun=true", wanted(), key="k")
        assert answer.status_code == 422, answer.text
        assert [each["pointer"] for each in answer.json()["errors"]] == ["/query/dryrun"]
        # Without the account the payments would be everybody's.
        headers = {"Authorization": "Bearer token-of-operator"}
        for path in ("/v1/payments?acount=acme", "/v1/stripe-events?state=failed", "/dead-letters?page=2"):
            answer = await billing.http.get(path, headers=headers)
            assert (answer.status_code, answer.json()["errors"][0]["code"]) == (422, "unknown_parameter"), path
    assert await driver.rows("SELECT * FROM checkouts") == []


async def test_everything_but_the_webhook_needs_a_token(driver: Driver) -> None:
    async with driver.running() as billing:
        paths = [
            ("GET", path)
            for path in ("packages", "plans", "payments", "stripe-events", "unattributed", "checkout/checkout_1")
        ]
        for method, path in [*paths, ("POST", "checkout"), ("POST", "unattributed/evt_1/resolve")]:
            assert await _status(billing, method, f"/v1/{path}", token=None) == 401, path
            assert await _status(billing, method, f"/v1/{path}", token="token-of-demo") == 403, path
        assert await _status(billing, "GET", "/dead-letters", token="token-of-shop") == 403
        assert await _status(billing, "GET", "/dead-letters", token="token-of-operator") == 200


async def _status(billing: Billing, method: str, path: str, *, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    given = {"json": wanted()} if path.endswith("checkout") else {"json": {"account": "acme", "package": "usd-25"}}
    headers |= {"Idempotency-Key": "k"}
    answer = await billing.http.request(method, path, headers=headers, **(given if method == "POST" else {}))
    return int(answer.status_code)
