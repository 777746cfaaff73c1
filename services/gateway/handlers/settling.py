"""How a call that holds something ends: its use is reported, on disk, or its hold is released."""

import time
from collections.abc import Mapping

import httpx2

from contracts.accounts import root
from contracts.usage import AttributeText, ModelUsed
from services.gateway import translate
from services.gateway.domain import counting, quote
from services.gateway.domain.counting import Counted, Seen
from services.gateway.domain.errors import NotRecorded
from services.gateway.handlers.calls import ADDED_SECONDS, CALLS, ENDPOINT, ESTIMATED, Call, Ending, Gateway
from services.gateway.store import SpoolFailed
from services.kit import tracing
from services.kit.telemetry import get_logger

log = get_logger(__name__)


async def settle(
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


async def release(gateway: Gateway, call: Call) -> None:
    """Give back what an admitted call holds, at once or later. A spool that fails has been alarmed."""
    if call.hold is None:
        return
    try:
        await gateway.outside.recorder.release(hold=call.hold, account=call.verified.account)
    except SpoolFailed:
        log.critical("hold left to its deadline", hold=call.hold)


async def release_later(gateway: Gateway, call: Call) -> None:
    """Give back what a call may hold, whether the ledger has placed the hold or not."""
    if call.hold is None:
        return
    try:
        await gateway.outside.recorder.release_later(
            translate.release_hold(hold=call.hold, account=call.verified.account)
        )
    except SpoolFailed:
        log.critical("hold left to its deadline", hold=call.hold)


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
