"""The call at the provider: forwarded with a leased secret, its answer passed on as it comes, its use reported."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import httpx2

from contracts.keyvault import KeyRefused as SaidKeyRefused
from services.gateway import translate
from services.gateway.domain import counting, errors, quote
from services.gateway.domain.counting import Seen
from services.gateway.domain.errors import ProviderFailed, Unavailable
from services.gateway.domain.sse import EventSplitter, EventTooLarge, data_of
from services.gateway.engine import Away, unavailable
from services.gateway.handlers.calls import ADDED_SECONDS, Call, Ending, Gateway, Listener, broke, trace_names
from services.gateway.handlers.settling import release, settle
from services.gateway.translate import Headers
from services.kit import tracing
from services.kit.telemetry import FAULTS, get_logger

log = get_logger(__name__)

# What keyvault says of a lease when it has just said otherwise of the key.
_CONTRADICTING: Final = frozenset({"policy_forbids", "consent_missing", "no_own_secret"})
# Between the last event of a stream and the end of the connection: waited for so that it can be used again.
END_SECONDS: Final = 0.5


async def forward(gateway: Gateway, call: Call, listener: Listener) -> httpx2.Response:
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
    with tracing.span("forward", kind="client", attributes=trace_names(call.priced)):
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


async def answer(gateway: Gateway, call: Call, response: httpx2.Response, listener: Listener) -> None:
    """Read the whole answer, report its use, pass it on. A client's leaving changes nothing: all of it is billed."""
    with tracing.span("relay", kind="client"):
        body, failed, cancelled = await _read_whole(gateway, call, response)
    ended = time.monotonic()
    seen = Seen(began=True)
    if failed is None and cancelled is None:
        piece = translate.read_piece(body)
        if piece is not None and piece.error is not None:
            await release(gateway, call)
            raise translate.provider_broke(piece.error, provider=call.priced.provider, produced=False)
        if piece is None:
            failed = broke(call, "gave an answer that is not readable")
        else:
            seen.reported, seen.served_model, seen.service_tier = piece.reported, piece.model, piece.service_tier
            seen.pieces = translate.tokens_of_answer(piece)
    if failed is not None or cancelled is not None:
        seen.pieces = counting.tokens_of_text(translate.text_bytes_of_part(body))
    cost = await settle(
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


async def stream(gateway: Gateway, call: Call, response: httpx2.Response, listener: Listener) -> None:
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
        relayed.fault, relayed.failed = fault, broke(call, "could not be relayed")
    ended = time.monotonic()
    if not relayed.seen.began:
        await release(gateway, call)
        raise relayed.cancelled or relayed.failed or broke(call, "sent nothing", produced=False)
    cost = await settle(
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
                    failed = broke(call, f"answered with more than {settings.answer_bytes_max} bytes")
                    break
    except TimeoutError:
        failed = broke(call, "took too long")
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        failed = broke(call, f"broke off ({type(error).__name__})")
    except asyncio.CancelledError as cancelled:
        return bytes(found), None, cancelled
    return bytes(found), failed, None


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
            relayed.failed = broke(call, str(error), produced=relayed.seen.began)
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
            relayed.failed = broke(call, what, produced=relayed.seen.began)
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
