"""Delivers events to webhook endpoints: signed, retried until accepted, and as a seed will have it twice or late."""

import asyncio
import hashlib
import hmac
import json
import random
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import httpx2

from infra.simulators.stripe.objects import Object
from infra.simulators.stripe.store import Delivery, Store
from services.kit.telemetry import get_logger

log = get_logger(__name__)

_TIMEOUT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where events go, and what they are signed with."""

    url: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySettings:
    """How events reach the endpoints.

    `duplicate`: the share of deliveries, 0 to 1, that is sent twice. `reorder_seconds`: each waits up to this long,
    so that they overtake one another. The same seed gives the same choices to the same sequence of events.
    """

    endpoints: tuple[Endpoint, ...] = ()
    duplicate: float = 0.0
    reorder_seconds: float = 0.0
    delay_seconds: float = 0.0
    seed: int = 0
    concurrent: int = 1
    retry_seconds_first: float = 0.2
    retry_seconds_max: float = 10.0
    attempts_max: int = 200


def signature_header(payload: bytes, *, secret: str, timestamp: int) -> str:
    """Stripe's signature: an HMAC-SHA256 over the time and the body's exact bytes."""
    signed = f"{timestamp}.".encode() + payload
    return f"t={timestamp},v1={hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()}"


class Courier:
    """Every delivery is a task: wait until it is due, send, and again later if that was not answered with 2xx."""

    def __init__(self, store: Store, settings: DeliverySettings) -> None:
        self.settings = settings
        self._store = store
        self._last_number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Semaphore(settings.concurrent)
        self._http = httpx2.AsyncClient(timeout=_TIMEOUT_SECONDS, trust_env=False, follow_redirects=False)

    async def __aenter__(self) -> Self:
        self.wake()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.forget()
        await self._http.aclose()

    def stage(self, event: Object) -> None:
        """Within a transaction: the event shall be delivered to every endpoint. `wake` once it is committed."""
        settings = self.settings
        payload = json.dumps(event | {"pending_webhooks": len(settings.endpoints)}, indent=2)
        for endpoint in range(len(settings.endpoints)):
            # From the event's place in the sequence, not from one generator: a restart changes nothing.
            chance = random.Random(f"{settings.seed}/{self._store.count('event')}/{endpoint}")
            due_at = time.time() + settings.delay_seconds + chance.uniform(0, settings.reorder_seconds)
            self._store.add_delivery(event, endpoint=endpoint, copy=0, payload=payload, due_at=due_at)
            if chance.random() < settings.duplicate:
                due_at += chance.uniform(0, settings.reorder_seconds)
                self._store.add_delivery(event, endpoint=endpoint, copy=1, payload=payload, due_at=due_at)

    def wake(self) -> None:
        """Take up what has been staged."""
        for delivery in self._store.pending_after(self._last_number):
            self._last_number = delivery.number
            task = asyncio.create_task(self._deliver(delivery))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def change(self, settings: DeliverySettings) -> None:
        """Deliver otherwise from now on, what is pending included."""
        await self.forget()
        self.settings = settings
        self._turn = asyncio.Semaphore(settings.concurrent)
        self.wake()

    async def forget(self) -> None:
        """Stop delivering; what is pending stays so in the store."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._last_number = 0

    async def _deliver(self, delivery: Delivery) -> None:
        settings = self.settings
        due_at, attempts = delivery.due_at, delivery.attempts
        while True:
            await asyncio.sleep(max(0.0, due_at - time.time()))
            if delivery.endpoint >= len(settings.endpoints):
                # It was configured when the event happened, and is no longer.
                self._store.give_up(delivery.number)
                return
            async with self._turn:
                at = time.time()
                status, error = await self._send(settings.endpoints[delivery.endpoint], delivery)
            attempts += 1
            accepted = status is not None and 200 <= status < 300
            spent = attempts >= settings.attempts_max
            pause = min(settings.retry_seconds_first * 2 ** min(attempts - 1, 30), settings.retry_seconds_max)
            due_at = time.time() + pause
            self._store.note_attempt(
                delivery.number,
                at=at,
                status=status,
                error=error,
                state="delivered" if accepted else "given_up" if spent else "pending",
                due_at=due_at,
            )
            if accepted or spent:
                return

    async def _send(self, endpoint: Endpoint, delivery: Delivery) -> tuple[int | None, str | None]:
        payload = delivery.payload.encode()
        headers = {
            "content-type": "application/json; charset=utf-8",
            "user-agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
            "stripe-signature": signature_header(payload, secret=endpoint.secret, timestamp=int(time.time())),
        }
        try:
            response = await self._http.post(endpoint.url, content=payload, headers=headers)
        except httpx2.HTTPError as error:
            log.info("webhook not delivered", event_id=delivery.event, type=delivery.type, error=repr(error))
            return None, type(error).__name__
        return response.status_code, None
