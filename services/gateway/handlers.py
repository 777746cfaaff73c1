"""One model call: verify → quote → hold → lease → forward → relay → report. The charge is metering's.

After the hold every way out ends in exactly one of two: the hold is released, or a usage event names it.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from typing import Final, Protocol

import httpx2
from prometheus_client import Counter, Gauge, Histogram

from contracts import ledger
from contracts.accounts import root
from contracts.keyvault import ACCESS_KEY, Verified, key_hash
from contracts.keyvault import KeyRefused as SaidKeyRefused
from contracts.usage import AttributeText, ModelUsed
from services.gateway import translate
from services.gateway.domain import counting, errors, policy, quote
from services.gateway.domain.counting import Counted, Seen
from services.gateway.domain.errors import NotRecorded, ProviderFailed, Unavailable
from services.gateway.domain.lately import OutputLately
from services.gateway.domain.prices import PriceBook, PricedModel
from services.gateway.domain.quote import Quote
from services.gateway.domain.request import ChatRequest, chat_request
from services.gateway.domain.sse import EventSplitter, EventTooLarge, data_of
from services.gateway.engine import Away, Outside, unavailable
from services.gateway.settings import GatewaySettings
from services.gateway.store import SpoolFailed
from services.gateway.translate import Headers, Labels
from services.kit import tracing
from services.kit.clock import now
from services.kit.ids import new_hold_id
from services.kit.telemetry import FAULTS, REGISTRY, get_logger

log = get_logger(__name__)

ENDPOINT: Final = "/v1/chat/completions"
# What keyvault says of a lease when it has just said otherwise of the key.
_CONTRADICTING: Final = frozenset({"policy_forbids", "consent_missing", "no_own_secret"})
# Between the last event of a stream and the end of the connection: waited for so that it can be used again.
END_SECONDS: Final = 0.5

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


# Who ------------------------------------------------------------------------------------------------------------------


async def authenticate(gateway: Gateway, authorization: str | None) -> Verified:
    """Whose key came. KeyRefused (key_missing, invalid_api_key, key_disabled, key_expired), Unavailable."""
    scheme, _, key = (authorization or "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise errors.KeyRefused(code="key_missing", reason="you must send your access key: Authorization: Bearer sk-…")
    unknown = errors.KeyRefused(code="invalid_api_key", reason="the access key is not known")
    if ACCESS_KEY.fullmatch(key) is None:
        raise unknown
    try:
        with tracing.span("verify", kind="client"):
            found = await gateway.outside.keys.verify(key_hash(key))
    except Away as error:
        raise unavailable("keyvault", error) from error
    if isinstance(found, SaidKeyRefused):
        if found.code in ("key_disabled", "key_expired"):
            raise errors.KeyRefused(code=found.code, reason=found.message)
        if found.code == "key_unknown":
            raise unknown
        FAULTS.labels(place="gateway.verify").inc()
        log.error("keyvault refused to verify", code=found.code, reason=found.message)
        raise Unavailable(reason="the access key could not be verified")
    if found.expires_at is not None and found.expires_at <= now():
        raise errors.KeyRefused(code="key_expired", reason=f"the access key {found.key_id} has expired")
    tracing.annotate({"scrip.account": found.account, "scrip.key": found.key_id})
    return found


# The call -------------------------------------------------------------------------------------------------------------


async def complete_chat(gateway: Gateway, verified: Verified, incoming: Incoming, listener: Listener) -> None:
    """Serve one call. Any refusal of domain/errors.py but KeyRefused; none once the listener has been told a status."""
    with gateway.running.one_more():
        call = await _admit(gateway, verified, incoming)
        with _held(call):
            try:
                response = await _forward(gateway, call, listener)
            except BaseException:
                await _release(gateway, call)
                raise
            try:
                # Some providers answer in one piece whatever was asked.
                streamed = "text/event-stream" in response.headers.get("content-type", "")
                serve = _stream if call.request.stream and streamed else _answer
                await serve(gateway, call, response, listener)
            finally:
                await _closed(response)


async def _admit(gateway: Gateway, verified: Verified, incoming: Incoming) -> Call:
    """Everything before the provider hears of it, but the lease. What is refused here holds nothing."""
    settings, outside = gateway.settings, gateway.outside
    if outside.spool.full or outside.spool.broken is not None:
        # What could not be recorded must not be produced.
        raise Unavailable(reason="usage cannot be recorded at the moment", retry_after_seconds=5)
    request = chat_request(translate.read_body(incoming.body), image_tokens_max=settings.image_tokens_max)
    labels = translate.read_labels(incoming.headers)
    book = outside.prices.book()
    priced = book.find(request.model, at=incoming.at, providers=outside.providers.names)
    own = policy.uses_own_secret(verified, provider=priced.provider)
    priced = replace(priced, account=verified.account)
    if request.dearer_tier is not None and not own and quote.priced_tier(request, priced) is None:
        raise errors.RequestInvalid(
            reason=f"the price book has no price for the service tier {request.dearer_tier!r}", param="service_tier"
        )
    with tracing.span("quote", attributes=_trace_names(priced)) as span:
        quoted = quote.quote(
            request,
            priced,
            units=book.units,
            own_key=own,
            lately=gateway.lately.percentile(root(verified.account), request.model),
            output_tokens_max=settings.output_tokens_max_by_model.get(request.model, settings.output_tokens_max),
        )
        span.set({f"scrip.amount.{unit}": amount for unit, amount in quoted.amounts.items()})
    call = Call(
        incoming=incoming,
        verified=verified,
        request=request,
        labels=labels,
        book=book,
        priced=priced,
        quoted=quoted,
        own=own,
        hold=new_hold_id(verified.account) if quoted.amounts else None,
        remaining={},
        deadline=asyncio.get_running_loop().time() + settings.call_seconds,
    )
    return await _hold(gateway, call)


async def _hold(gateway: Gateway, call: Call) -> Call:
    """Set the quote aside. InsufficientFunds, AccountNotOpen, Unavailable: nothing is held then, or not for long."""
    if call.hold is None:
        # With an own key a call may cost nothing in any unit.
        return call
    settings, units = gateway.settings, call.book.units
    command = translate.place_hold(
        hold=call.hold,
        account=call.verified.account,
        amounts=call.quoted.amounts,
        units=units,
        lifetime_seconds=int(settings.call_seconds) + settings.hold_margin_seconds,
    )
    try:
        with tracing.span("place_hold", kind="client", attributes={"scrip.hold": call.hold}) as span:
            reply = await gateway.outside.services.place_hold(command)
            span.set({"scrip.outcome": reply.status if isinstance(reply, ledger.Accepted) else reply.code})
    except Away as error:
        if error.maybe_done:
            await _release_later(gateway, call)
        raise unavailable("the ledger", error) from error
    except asyncio.CancelledError:
        await _release_later(gateway, call)
        raise
    match reply:
        case ledger.Accepted():
            remaining = translate.read_remaining(reply, units=units)
            return replace(call, remaining=remaining)
        case ledger.Refused():
            raise _refused(call, reply)
        case ledger.Failed():
            FAULTS.labels(place="gateway.hold").inc()
            log.error("the ledger cannot read a hold", code=reply.code, reason=reply.message)
            raise Unavailable(reason="the hold could not be placed")


def _refused(call: Call, reply: ledger.Refused) -> errors.Refusal:
    match reply.code:
        case "insufficient_funds":
            affordable = 0
            if reply.remaining is not None and reply.remaining.unit in call.book.units:
                affordable = quote.affordable_max_tokens(
                    call.quoted,
                    call.request,
                    call.priced,
                    units=call.book.units,
                    unit=reply.remaining.unit,
                    remaining=reply.remaining.amount,
                )
            return errors.InsufficientFunds(
                limit_source=reply.limit_source,
                required=reply.required,
                remaining=reply.remaining,
                affordable_max_tokens=affordable,
            )
        case "account_not_open":
            return errors.AccountNotOpen(account=call.verified.account)
        case _:
            FAULTS.labels(place="gateway.hold").inc()
            log.error("hold refused", hold=call.hold, code=reply.code, reason=reply.message)
            return Unavailable(reason=f"the ledger refused the hold ({reply.code})")


async def _forward(gateway: Gateway, call: Call, listener: Listener) -> httpx2.Response:
    """Lease a secret, forward the call, return when the provider answers.

    SecretRefused, KeyRefused, Unavailable, ClientLeft, ProviderFailed.
    """
    outside, settings, request = gateway.outside, gateway.settings, call.request
    provider = call.priced.provider
    try:
        with tracing.span("lease", kind="client") as span:
            leased = await outside.services.lease(call.verified.account, provider=provider, own=call.own)
            span.set({"scrip.outcome": leased.code if isinstance(leased, SaidKeyRefused) else leased.status})
    except Away as error:
        raise unavailable("keyvault", error) from error
    if isinstance(leased, SaidKeyRefused):
        outside.keys.forget(call.verified)
        if leased.code in ("key_disabled", "key_expired"):
            raise errors.KeyRefused(code=leased.code, reason=leased.message)
        if leased.code in _CONTRADICTING:
            raise Unavailable(reason=f"the key policy of {call.verified.account} has just changed")
        raise errors.SecretRefused(code=leased.code, reason=leased.message, own=call.own)
    if listener.left:
        raise errors.ClientLeft
    secret = leased.secret.get_secret_value()
    ADDED_SECONDS.labels(part="admission").observe(time.monotonic() - call.incoming.started)
    # Of an answer that is not streamed the first byte comes when all of it has been produced.
    left = call.deadline - asyncio.get_running_loop().time()
    within = min(settings.first_byte_seconds, left) if request.stream else left
    # What the provider is sent says nothing of the trace: it is not the provider's.
    with tracing.span("forward", kind="client", attributes=_trace_names(call.priced)):
        return await outside.providers.open(
            provider,
            body=translate.request_body(request.body, stream=request.stream, usage_wanted=request.usage_wanted),
            headers=translate.request_headers(
                call.incoming.headers, secret=secret, own=call.own, request_id=call.incoming.request_id
            ),
            secret=secret,
            own=call.own,
            within_seconds=within,
        )


# An answer in one piece -----------------------------------------------------------------------------------------------


async def _answer(gateway: Gateway, call: Call, response: httpx2.Response, listener: Listener) -> None:
    """Read the whole answer, report its use, pass it on. A client's leaving changes nothing: all of it is billed."""
    with tracing.span("relay", kind="client"):
        body, failed, cancelled = await _read_whole(gateway, call, response)
    ended = time.monotonic()
    seen = Seen(began=True)
    if failed is None and cancelled is None:
        piece = translate.read_piece(body)
        if piece is not None and piece.error is not None:
            await _release(gateway, call)
            raise translate.provider_broke(piece.error, provider=call.priced.provider, produced=False)
        if piece is None:
            failed = _broke(call, "gave an answer that is not readable")
        else:
            seen.reported, seen.served_model, seen.service_tier = piece.reported, piece.model, piece.service_tier
            seen.pieces = translate.tokens_of_answer(piece)
    if failed is not None or cancelled is not None:
        seen.pieces = counting.tokens_of_text(translate.text_bytes_of_part(body))
    cost = await _settle(
        gateway,
        call,
        response,
        seen,
        ending=Ending.STOPPED if cancelled else Ending.BROKEN if failed else Ending.COMPLETE,
        complete=not (cancelled or failed),
        status=failed.status if failed else 200,
        response_bytes=len(body),
        ended=ended,
    )
    if cancelled is not None:
        raise cancelled
    if failed is not None:
        raise failed
    await listener.start(200, _headers(call, response, cost=cost, length=len(body)))
    await listener.write(body, more=False)


async def _read_whole(
    gateway: Gateway, call: Call, response: httpx2.Response
) -> tuple[bytes, ProviderFailed | None, asyncio.CancelledError | None]:
    """What came of an answer, and what ended it early."""
    settings = gateway.settings
    found = bytearray()
    failed: ProviderFailed | None = None
    try:
        async with asyncio.timeout_at(call.deadline):
            async for received in response.aiter_bytes():
                found += received
                if len(found) > settings.answer_bytes_max:
                    failed = _broke(call, f"answered with more than {settings.answer_bytes_max} bytes")
                    break
    except TimeoutError:
        failed = _broke(call, "took too long")
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        failed = _broke(call, f"broke off ({type(error).__name__})")
    except asyncio.CancelledError as cancelled:
        return bytes(found), None, cancelled
    return bytes(found), failed, None


# A stream -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Relayed:
    """What became of a stream. `done` is its last event, held back until the use is on disk."""

    seen: Seen = field(default_factory=Seen)
    done: bytes = b""
    received_bytes: int = 0
    aborted: bool = False
    failed: ProviderFailed | None = None
    fault: Exception | None = None
    cancelled: asyncio.CancelledError | None = None

    @property
    def complete(self) -> bool:
        return not (self.aborted or self.failed or self.fault or self.cancelled)

    def ending(self, *, left: bool) -> Ending:
        if self.cancelled is not None:
            return Ending.STOPPED
        if self.failed is not None or self.fault is not None:
            return Ending.BROKEN
        return Ending.LEFT if left else Ending.COMPLETE


async def _stream(gateway: Gateway, call: Call, response: httpx2.Response, listener: Listener) -> None:
    """Relay a stream as it comes, report its use, end it. Whatever ended it, what was produced is reported."""
    relayed = _Relayed()
    try:
        with tracing.span("relay", kind="client"):
            await _relay(gateway, call, response, listener, relayed)
    except asyncio.CancelledError as cancelled:
        relayed.cancelled = cancelled
    except Exception as fault:
        FAULTS.labels(place="gateway.relay").inc()
        log.error("relaying failed", request=call.incoming.request_id, exc_info=fault)
        relayed.fault, relayed.failed = fault, _broke(call, "could not be relayed")
    ended = time.monotonic()
    if not relayed.seen.began:
        await _release(gateway, call)
        raise relayed.cancelled or relayed.failed or _broke(call, "sent nothing", produced=False)
    cost = await _settle(
        gateway,
        call,
        response,
        relayed.seen,
        ending=relayed.ending(left=listener.left),
        complete=relayed.complete,
        status=200,
        response_bytes=relayed.received_bytes,
        ended=ended,
    )
    if relayed.cancelled is not None:
        raise relayed.cancelled
    last = relayed.done if relayed.failed is None else translate.error_event(relayed.failed)
    shown = quote.shown(cost, units=call.book.units)
    await listener.write(translate.cost_comment(shown) + last, more=False)


async def _relay(
    gateway: Gateway, call: Call, response: httpx2.Response, listener: Listener, relayed: _Relayed
) -> None:
    """Read the stream to its end, and pass it on for as long as somebody listens."""
    settings = gateway.settings
    time_of = asyncio.get_running_loop().time
    until = min(time_of() + settings.first_byte_seconds, call.deadline)
    splitter = EventSplitter()
    stream = response.aiter_bytes()
    aborts = gateway.outside.providers.aborts(call.priced.provider)
    while (received := await _next(call, stream, listener, relayed, until=until, aborts=aborts)) is not None:
        relayed.received_bytes += len(received)
        try:
            passed = b"".join(_passed_on(call, relayed, event) for event in splitter.feed(received))
        except EventTooLarge as error:
            relayed.failed = _broke(call, str(error), produced=relayed.seen.began)
            return
        if passed:
            if not listener.started:
                await listener.start(200, _headers(call, response))
            await listener.write(passed, more=True)
        if relayed.failed is not None:
            return
        until = min(time_of() + (END_SECONDS if relayed.done else settings.between_seconds), call.deadline)
    if relayed.complete and (rest := splitter.rest()) and (passed := _passed_on(call, relayed, rest + b"\n\n")):
        # Its last event lacks the blank line that ends it.
        if not listener.started:
            await listener.start(200, _headers(call, response))
        await listener.write(passed, more=True)


async def _next(
    call: Call,
    stream: AsyncIterator[bytes],
    listener: Listener,
    relayed: _Relayed,
    *,
    until: float,
    aborts: bool,
) -> bytes | None:
    """The next bytes of a stream. None at its end: `relayed` says what ended it, unless it was whole."""
    try:
        async with asyncio.timeout_at(until) as waiting:
            if aborts:
                listener.ends(waiting)
            return await anext(stream)
    except StopAsyncIteration:
        return None
    except (TimeoutError, httpx2.HTTPError, httpx2.StreamError) as error:
        if aborts and listener.left:
            relayed.aborted = not relayed.done
        elif not relayed.done:
            what = "took too long" if isinstance(error, TimeoutError) else f"broke off ({type(error).__name__})"
            relayed.failed = _broke(call, what, produced=relayed.seen.began)
        return None
    finally:
        if aborts:
            listener.ends(None)


# What a provider says in every other chunk, because its usage was asked for here.
_NO_USAGE: Final = re.compile(rb',\s*"usage"\s*:\s*null(?=\s*[,}])')


def _passed_on(call: Call, relayed: _Relayed, event: bytes) -> bytes:
    """Count an event of a stream. What of it the client is sent: all, or nothing."""
    data = data_of(event)
    if relayed.done or relayed.failed is not None:
        return b""
    if not data:
        # A comment.
        return event
    if data == b"[DONE]":
        relayed.done = event
        return b""
    piece, seen = translate.read_piece(data), relayed.seen
    if piece is not None and piece.error is not None:
        relayed.failed = translate.provider_broke(piece.error, provider=call.priced.provider, produced=seen.began)
        return b""
    seen.began = True
    if piece is None:
        # Not for us to judge: the client is sent what the provider sent.
        return event
    seen.served_model = seen.served_model or piece.model
    seen.service_tier = seen.service_tier or piece.service_tier
    for size in piece.texts:
        seen.add(size)
    seen.reported = piece.reported or seen.reported
    unasked = piece.reported is not None and not piece.has_choices and not call.request.usage_wanted
    wanted = event if call.request.usage_wanted else _NO_USAGE.sub(b"", event)
    return b"" if unasked else wanted


# What every call ends with --------------------------------------------------------------------------------------------


async def _settle(
    gateway: Gateway,
    call: Call,
    response: httpx2.Response,
    seen: Seen,
    *,
    ending: Ending,
    complete: bool,
    status: int,
    response_bytes: int,
    ended: float,
) -> Mapping[str, int]:
    """Report the use of a forwarded call, and return when that is on disk: what it costs. NotRecorded."""
    incoming, request = call.incoming, call.request
    found = counting.counted(seen, input_tokens_estimate=request.input_tokens_estimate, complete=complete)
    used = ModelUsed(
        provider=call.priced.provider,
        model=call.priced.model,
        input_tokens=found.input_tokens,
        output_tokens=found.output_tokens,
        hold=call.hold,
        own_key=call.own,
        price_version=call.priced.version.id,
        feature=call.labels.feature,
        attributes={
            **call.labels.attributes,
            **translate.client_attributes(incoming.headers, address=incoming.address),
            **_attributes(call, response, seen, found),
            "ended": ending.value,
            "status": status,
            "latency_ms": int((ended - incoming.started) * 1000),
            "response_bytes": response_bytes,
        },
        counts=found.counts(audio=request.has_audio),
        # What was asked for may not have been to be had: then it costs what it costs without.
        service_tier=call.quoted.used.service_tier if seen.service_tier in (None, request.dearer_tier) else None,
    )
    message = translate.usage_message(
        used,
        request_id=incoming.request_id,
        account=call.verified.account,
        occurred_at=incoming.at,
        traceparent=tracing.traceparent(sampled=True),
    )
    try:
        await gateway.outside.recorder.report(message)
    except SpoolFailed as error:
        CALLS.labels(outcome="usage_not_recorded").inc()
        raise NotRecorded(request_id=incoming.request_id) from error
    CALLS.labels(outcome=ending.value).inc()
    tracing.annotate({"scrip.outcome": ending.value})
    if found.estimated:
        ESTIMATED.labels(provider=call.priced.provider).inc()
    if complete:
        gateway.lately.add(root(call.verified.account), request.model, -(-found.output_tokens // request.choices))
    ADDED_SECONDS.labels(part="settlement").observe(time.monotonic() - ended)
    return quote.cost(used, call.priced, units=call.book.units)


def _trace_names(priced: PricedModel) -> tracing.Attributes:
    """What is called, as the price book has it: what the client wrote may be anything."""
    return {"scrip.provider": priced.provider, "scrip.model": priced.model, "scrip.price_version": priced.version.id}


def _attributes(
    call: Call, response: httpx2.Response, seen: Seen, found: Counted
) -> dict[str, AttributeText | int | bool]:
    attributes: dict[str, AttributeText | int | bool] = {
        "endpoint": ENDPOINT,
        "key": call.verified.key_id,
        "streamed": call.request.stream,
        "request_bytes": len(call.incoming.body),
    }
    if call.request.choices > 1:
        attributes["choices"] = call.request.choices
    if found.estimated:
        attributes["estimated"] = True
    if found.cached_tokens:
        attributes["cached_tokens"] = found.cached_tokens
    if found.reasoning_tokens:
        attributes["reasoning_tokens"] = found.reasoning_tokens
    if seen.served_model is not None and seen.served_model != call.priced.model:
        attributes["served_model"] = seen.served_model
    if provider_request_id := response.headers.get("x-request-id", "")[:200]:
        attributes["provider_request_id"] = provider_request_id
    return attributes


async def _release(gateway: Gateway, call: Call) -> None:
    """Give back what an admitted call holds, at once or later. A spool that fails has been alarmed."""
    if call.hold is None:
        return
    try:
        await gateway.outside.recorder.release(hold=call.hold, account=call.verified.account)
    except SpoolFailed:
        log.critical("hold left to its deadline", hold=call.hold)


async def _release_later(gateway: Gateway, call: Call) -> None:
    if call.hold is None:
        return
    try:
        await gateway.outside.recorder.release_later(
            translate.release_hold(hold=call.hold, account=call.verified.account)
        )
    except SpoolFailed:
        log.critical("hold left to its deadline", hold=call.hold)


def _broke(call: Call, what: str, *, produced: bool = True) -> ProviderFailed:
    return ProviderFailed(reason=f"{call.priced.provider} {what}", produced=produced)


def _headers(
    call: Call, response: httpx2.Response, *, cost: Mapping[str, int] | None = None, length: int | None = None
) -> Headers:
    units, held, remaining = call.book.units, call.quoted.amounts, call.remaining
    more = {}
    if held:
        more["x-scrip-held"] = translate.amounts_text(quote.shown(held, units=units))
    if cost is not None:
        more["x-scrip-cost"] = translate.amounts_text(quote.shown(cost, units=units))
        # What its charge leaves, which gives back what was held too much.
        remaining = {
            name: left + quote.amount_of(name, held, units=units) - quote.amount_of(name, cost, units=units)
            for name, left in remaining.items()
        }
    if remaining:
        more["x-scrip-remaining"] = translate.amounts_text(quote.shown(remaining, units=units))
    content_type = response.headers.get("content-type", "application/json")
    return translate.answer_headers(call.incoming.request_id, content_type=content_type, length=length, more=more)


@contextmanager
def _held(call: Call) -> Iterator[None]:
    amounts = [
        (HELD.labels(unit=name), amount / 10 ** call.book.units[name].scale)
        for name, amount in call.quoted.amounts.items()
    ]
    for gauge, amount in amounts:
        gauge.inc(amount)
    try:
        yield
    finally:
        for gauge, amount in amounts:
            gauge.dec(amount)


async def _closed(response: httpx2.Response) -> None:
    try:
        await response.aclose()
    except (httpx2.HTTPError, OSError, RuntimeError) as error:
        log.warning("a provider's connection did not close well", error=repr(error))


# Models ---------------------------------------------------------------------------------------------------------------


def models(gateway: Gateway) -> Sequence[PricedModel]:
    """Every model that may be called. Unavailable."""
    return gateway.outside.prices.book().models(at=now(), providers=gateway.outside.providers.names)


def model(gateway: Gateway, name: str) -> PricedModel:
    """One of them. ModelNotPriced, NoProvider, Unavailable."""
    return gateway.outside.prices.book().find(name, at=now(), providers=gateway.outside.providers.names)


def note_refusal(refusal: errors.Refusal, *, request_id: str) -> None:
    """Count and log why a call was not served. What a provider calls its errors is not counted apart."""
    outcome = refusal.code
    if isinstance(refusal, ProviderFailed) and not outcome.startswith("provider_"):
        outcome = f"provider_{refusal.status}"
    CALLS.labels(outcome=outcome).inc()
    tracing.annotate({"scrip.outcome": outcome})
    log.info("call not served", request=request_id, code=refusal.code, reason=str(refusal))
