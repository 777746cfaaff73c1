"""A call and what it needs: what the handlers work with, what was admitted, how it may end, what is measured."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Final, Protocol

from prometheus_client import Counter, Gauge, Histogram

from contracts.keyvault import Verified
from services.gateway.domain.errors import ProviderFailed, Unavailable
from services.gateway.domain.lately import OutputLately
from services.gateway.domain.prices import PriceBook, PricedModel
from services.gateway.domain.quote import Quote
from services.gateway.domain.request import ChatRequest
from services.gateway.engine import Outside
from services.gateway.settings import GatewaySettings
from services.gateway.translate import Headers, Labels
from services.kit import tracing
from services.kit.telemetry import REGISTRY, get_logger

log = get_logger(__name__)

ENDPOINT: Final = "/v1/chat/completions"
CALLS: Final = Counter(
    "scrip_gateway_calls", "Calls by how they ended, or by the code they were refused with.", ("outcome",),
    registry=REGISTRY,
)  # fmt: skip
RUNNING: Final = Gauge("scrip_gateway_running_calls", "Calls that hold something now.", registry=REGISTRY)
HELD: Final = Gauge("scrip_gateway_held", "What running calls hold now.", ("unit",), registry=REGISTRY)
ESTIMATED: Final = Counter(
    "scrip_gateway_estimated_calls", "Calls charged by our own count.", ("provider",), registry=REGISTRY
)
ADDED_SECONDS: Final = Histogram(
    "scrip_gateway_added_seconds",
    "Time that is ours and not the provider's: admission until forwarded, settlement after its last byte.",
    ("part",),
    buckets=(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    registry=REGISTRY,
)


class Listener(Protocol):
    """The client, as long as it is there. Once it has `left`, what is told it goes nowhere."""

    left: bool
    started: bool

    def ends(self, waiting: "asyncio.Timeout | None") -> None:
        """Have a wait ended at once if the client leaves; None: no longer."""

    async def start(self, status: int, headers: Headers) -> None:
        """Tell the status and the headers."""

    async def write(self, body: bytes, *, more: bool) -> None:
        """Tell a part of the body."""


class Ending(Enum):
    """How a forwarded call ended: an attribute of its usage event, and the outcome it is counted under."""

    COMPLETE = "completed"
    BROKEN = "provider_broke_off"
    LEFT = "client_left"
    STOPPED = "gateway_stopped"


class Running:
    """How many calls run, and a bound on it."""

    def __init__(self, *, count_max: int) -> None:
        self._count_max = count_max
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """While a call runs. Unavailable if too many do."""
        if self._count >= self._count_max:
            raise Unavailable(reason=f"{self._count_max} calls are running")
        self._count += 1
        self._none.clear()
        RUNNING.set(self._count)
        try:
            yield
        finally:
            self._count -= 1
            RUNNING.set(self._count)
            if not self._count:
                self._none.set()

    async def ended(self, *, seconds: float) -> None:
        """Wait until no call runs, but not for ever."""
        try:
            async with asyncio.timeout(seconds):
                await self._none.wait()
        except TimeoutError:
            log.error("calls did not end in time", calls=self._count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """What the handlers work with."""

    settings: GatewaySettings
    outside: Outside
    lately: OutputLately
    running: Running


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A request for a call, read from the wire. `started` is of the monotonic clock."""

    request_id: str
    headers: Mapping[str, str]
    address: str | None
    body: bytes
    at: datetime
    started: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call that was admitted: what it holds, and what it may use."""

    incoming: Incoming
    verified: Verified
    request: ChatRequest
    labels: Labels
    book: PriceBook
    priced: PricedModel
    quoted: Quote
    own: bool
    hold: str | None
    remaining: Mapping[str, int]
    # Of the loop's clock: whatever waits for the provider waits no longer.
    deadline: float


def broke(call: Call, what: str, *, produced: bool = True) -> ProviderFailed:
    """The provider failed, in words: `took too long`. `produced`: there may be something to bill."""
    return ProviderFailed(reason=f"{call.priced.provider} {what}", produced=produced)


def trace_names(priced: PricedModel) -> tracing.Attributes:
    """What is called, as the price book has it: what the client wrote may be anything."""
    return {"scrip.provider": priced.provider, "scrip.model": priced.model, "scrip.price_version": priced.version.id}
