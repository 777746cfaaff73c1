"""What tests do to billing: run it, with Stripe's simulator or without, send it webhooks, look at what came of it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx2
from nats.aio.client import Client
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from contracts.billing import PaymentClaimed, PaymentReceived
from contracts.streams import PAYMENTS
from infra.simulators.stripe.app import build_app as stripe_simulator
from infra.simulators.stripe.webhooks import signature_header
from services.billing.app import build
from services.billing.settings import BillingSettings
from services.billing.translate import STRIPE_LANE
from tests.integration.simulators.serving import serving
from tests.unit.billing.building import body

SECRET: Final = "whsec_of_the_tests"
WAIT_SECONDS_MAX: Final = 30.0

Json = dict[str, Any]
Told = PaymentReceived | PaymentClaimed


def signed(content: bytes, *, secret: str = SECRET, age_seconds: int = 0) -> dict[str, str]:
    """The headers of a webhook."""
    signature = signature_header(content, secret=secret, timestamp=int(time.time()) - age_seconds)
    return {"Stripe-Signature": signature, "Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Billing:
    """A running billing: its HTTP API as a caller sees it."""

    http: httpx2.AsyncClient
    url: str

    async def tell(self, *events: Json) -> None:
        """Webhooks, one after the other; each is taken."""
        for each in events:
            answer = await self.webhook(body(each))
            assert answer.status_code == 200, answer.text

    async def webhook(self, content: bytes, headers: Mapping[str, str] | None = None) -> httpx2.Response:
        """A webhook as Stripe would send it, or with other headers."""
        return await self.http.post(
            "/stripe/webhook", content=content, headers=dict(headers if headers is not None else signed(content))
        )

    async def get(self, path: str) -> Json:
        """What the operator is answered."""
        answer = await self.http.get(path, headers={"Authorization": "Bearer token-of-operator"})
        assert answer.status_code == 200, answer.text
        found: Json = answer.json()
        return found

    async def post(self, path: str, content: Json, *, by: str = "operator", key: str | None = None) -> httpx2.Response:
        """A command."""
        headers = {"Authorization": f"Bearer token-of-{by}"} | ({"Idempotency-Key": key} if key else {})
        return await self.http.post(path, json=content, headers=headers)

    async def checkout(self, package: str = "usd-25", *, account: str = "acme", key: str = "k", **more: Any) -> Json:
        """A checkout that is opened."""
        answer = await self.post("/v1/checkout", wanted(package, account=account, **more), by="shop", key=key)
        assert answer.status_code == 201, answer.text
        found: Json = answer.json()
        return found


def wanted(package: str = "usd-25", *, account: str = "acme", **more: Any) -> Json:
    """The body of a checkout."""
    urls = {"success_url": "https://shop/done?{CHECKOUT_SESSION_ID}", "cancel_url": "https://shop/"}
    return {"account": account, "package": package, **urls, **more}


@dataclass(frozen=True, slots=True)
class Stripe:
    """The simulator: what only a simulator has."""

    http: httpx2.AsyncClient
    url: str

    async def does(self, what: str, **given: Any) -> Json:
        """Something happens at Stripe: checkout/<session>/pay, refund, dispute, settings, faults."""
        answer = await self.http.post(f"/__sim/{what}", json=given)
        assert answer.status_code in (200, 204), answer.text
        found: Json = answer.json() if answer.content else {}
        return found

    async def delivered(self) -> None:
        """Wait until every webhook has been accepted."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (await self.http.get("/__sim/deliveries?state=pending")).json()["deliveries"]:
            assert time.monotonic() < deadline, "Stripe still has something to deliver"
            await asyncio.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Driver:
    """The world around billing."""

    settings: BillingSettings
    operator_nats: Client
    connection: AsyncConnection[TupleRow]
    tokens: Mapping[str, str]

    @asynccontextmanager
    async def running(self, **changes: Any) -> AsyncIterator[Billing]:
        """Billing runs, on a socket of its own."""
        settings = self.settings.model_copy(update=changes)
        async with _served(build(settings)) as (http, url):
            yield Billing(http, url)

    @asynccontextmanager
    async def with_stripe(self, **delivery: Any) -> AsyncIterator[tuple[Billing, Stripe]]:
        """Billing and a Stripe run, and know each other. `delivery`: how webhooks are delivered."""
        async with _served(stripe_simulator()) as (http, url), self.running(stripe_api_base=url) as billing:
            stripe = Stripe(http, url)
            await stripe.does("settings", endpoints=[endpoint(billing.url)], **delivery)
            yield billing, stripe

    async def rows(self, statement: str, *parameters: object) -> list[TupleRow]:
        """What a query answers."""
        cursor = await self.connection.execute(statement, parameters)
        return await cursor.fetchall()

    async def until(self, statement: str, *wanted: TupleRow) -> None:
        """Wait until a query answers these rows."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (found := await self.rows(statement)) != list(wanted):
            assert time.monotonic() < deadline, f"{statement}: {found!r}, not {wanted!r}"
            await asyncio.sleep(0.02)

    async def until_processed(self, events: int) -> None:
        """Wait until so many events are in the inbox and none waits to be processed."""
        await self.until(
            "SELECT count(*), count(*) FILTER (WHERE status IN ('received', 'failed', 'waiting')) FROM stripe_events",
            (events, 0),
        )

    async def facts(self) -> list[Told]:
        """What the ledger is told, from the outbox: by partition and number, without gaps."""
        found = await self.rows(
            "SELECT partition, number, subject, payload FROM outbox WHERE partition <> %s ORDER BY partition, number",
            STRIPE_LANE,
        )
        told: list[Told] = []
        last: dict[int, int] = {}
        for partition, number, subject, payload in found:
            model = PaymentReceived if subject.endswith(".received") else PaymentClaimed
            fact = model.model_validate_json(payload)
            assert (fact.partition, fact.number) == (partition, number) == (partition, last.get(partition, 0) + 1)
            last[partition] = number
            told.append(fact)
        return told

    async def published(self) -> list[Json]:
        """What is in the stream for the ledger."""
        jetstream = self.operator_nats.jetstream(timeout=5)
        state = (await jetstream.stream_info(PAYMENTS)).state
        return [
            json.loads((await jetstream.get_msg(PAYMENTS, number)).data or b"")
            for number in range(state.first_seq, state.last_seq + 1)
        ]

    async def until_published(self, facts: int) -> None:
        """Wait until so many facts are in the stream for the ledger."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (found := (await self.operator_nats.jetstream(timeout=5).stream_info(PAYMENTS)).state.messages) != facts:
            assert time.monotonic() < deadline, f"{found} facts are published, not {facts}"
            await asyncio.sleep(0.02)


def endpoint(url: str) -> Json:
    """Billing as an endpoint of Stripe's."""
    return {"url": f"{url}/stripe/webhook", "secret": SECRET}


@asynccontextmanager
async def _served(app: Any) -> AsyncIterator[tuple[httpx2.AsyncClient, str]]:
    server = serving(app)
    url = await asyncio.to_thread(server.__enter__)
    try:
        async with httpx2.AsyncClient(base_url=url, timeout=10.0, trust_env=False) as http:
            yield http, url
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)
