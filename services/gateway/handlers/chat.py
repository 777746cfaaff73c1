"""A call from its beginning to its end.

After the hold every way out ends in exactly one of two: the hold is released, or a usage event names it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from contracts.keyvault import Verified
from services.gateway.domain import errors
from services.gateway.domain.errors import ProviderFailed
from services.gateway.handlers.admission import admit
from services.gateway.handlers.calls import CALLS, HELD, Call, Gateway, Incoming, Listener
from services.gateway.handlers.relaying import answer, forward, stream
from services.gateway.handlers.settling import release
from services.kit import tracing
from services.kit.telemetry import get_logger

log = get_logger(__name__)


async def complete_chat(gateway: Gateway, verified: Verified, incoming: Incoming, listener: Listener) -> None:
    """Serve one call. Any refusal of domain/errors.py but KeyRefused; none once the listener has been told a status."""
    with gateway.running.one_more():
        call = await admit(gateway, verified, incoming)
        with _held(call):
            try:
                response = await forward(gateway, call, listener)
            except BaseException:
                await release(gateway, call)
                raise
            try:
                # Some providers answer in one piece whatever was asked.
                streamed = "text/event-stream" in response.headers.get("content-type", "")
                serve = stream if call.request.stream and streamed else answer
                await serve(gateway, call, response, listener)
            finally:
                await _closed(response)


def note_refusal(refusal: errors.Refusal, *, request_id: str) -> None:
    """Count and log why a call was not served. What a provider calls its errors is not counted apart."""
    outcome = refusal.code
    if isinstance(refusal, ProviderFailed) and not outcome.startswith("provider_"):
        outcome = f"provider_{refusal.status}"
    CALLS.labels(outcome=outcome).inc()
    tracing.annotate({"scrip.outcome": outcome})
    log.info("call not served", request=request_id, code=refusal.code, reason=str(refusal))


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
