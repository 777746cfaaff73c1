"""Whose call it is, what it may cost, and the hold on that: everything before the provider hears of it."""

import asyncio
from dataclasses import replace

from contracts import ledger
from contracts.accounts import root
from contracts.keyvault import ACCESS_KEY, Verified, key_hash
from contracts.keyvault import KeyRefused as SaidKeyRefused
from services.gateway import translate
from services.gateway.domain import errors, policy, quote
from services.gateway.domain.errors import Unavailable
from services.gateway.domain.request import chat_request
from services.gateway.engine import Away, unavailable
from services.gateway.handlers.calls import Call, Gateway, Incoming, trace_names
from services.gateway.handlers.settling import release_later
from services.kit import tracing
from services.kit.clock import now
from services.kit.ids import new_hold_id
from services.kit.telemetry import FAULTS, get_logger

log = get_logger(__name__)


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


async def admit(gateway: Gateway, verified: Verified, incoming: Incoming) -> Call:
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
    with tracing.span("quote", attributes=trace_names(priced)) as span:
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
            await release_later(gateway, call)
        raise unavailable("the ledger", error) from error
    except asyncio.CancelledError:
        await release_later(gateway, call)
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
