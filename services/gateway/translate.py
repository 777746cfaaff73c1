"""Where foreign words stop: OpenAI's requests, answers and errors, and what is said to other services."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final

import msgspec
from pydantic import TypeAdapter, ValidationError

from contracts import ledger as words
from contracts.envelope import TRACEPARENT, body_hash
from contracts.money import Unit, format_amount, parse_amount
from contracts.partition import partition_of
from contracts.pricebook import PriceBookRow, read_version
from contracts.streams import usage_subject
from contracts.usage import (
    MODEL_USED,
    TOKENS_MAX,
    AttributeName,
    AttributeText,
    ModelUsed,
)
from services.gateway.domain.counting import Reported, tokens_of_text
from services.gateway.domain.errors import (
    AccountNotOpen,
    BodyTooLarge,
    BodyTooSlow,
    ClientLeft,
    InsufficientFunds,
    KeyRefused,
    ModelNotPriced,
    NoProvider,
    NotRecorded,
    ProviderFailed,
    Refusal,
    RequestInvalid,
    SecretRefused,
    Unavailable,
    UnknownPath,
)
from services.gateway.domain.prices import PriceBook, PricedModel
from services.kit.publish import Message

SOURCE: Final = "gateway"

Headers = list[tuple[bytes, bytes]]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


# The price book -------------------------------------------------------------------------------------------------------


class UnreadablePrices(ValueError):
    """What metering answered is no price book."""


def read_price_book(body: bytes) -> PriceBook:
    """Metering's price book. Raises UnreadablePrices: a book is used whole or not at all."""
    try:
        # What a newer metering says besides is no concern of an older gateway.
        said = PriceBookRow.model_validate_json(body, extra="ignore")
        units = {unit.name: Unit(**unit.model_dump()) for unit in said.units}
        versions = [read_version(version, units=units) for version in said.versions]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise UnreadablePrices(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise UnreadablePrices(str(error)) from error
    return PriceBook(units=units, versions=sorted(versions, key=lambda version: version.effective_at))


# Requests -------------------------------------------------------------------------------------------------------------

ATTRIBUTES_FREE_MAX: Final = 12
_ATTRIBUTE_HEADER: Final = "x-scrip-attribute-"
_NAMED: Final = ("conversation", "source")
# What the gateway itself says of a call.
OWN_ATTRIBUTES: Final = frozenset(
    {
        "endpoint",
        "status",
        "ended",
        "latency_ms",
        "streamed",
        "estimated",
        "request_bytes",
        "response_bytes",
        "key",
        "choices",
        "served_model",
        "provider_request_id",
        "cached_tokens",
        "reasoning_tokens",
        "user_agent",
        "client_network",
    }
)
_NAME: Final[TypeAdapter[str]] = TypeAdapter(AttributeName)
_TEXT: Final[TypeAdapter[str]] = TypeAdapter(AttributeText)
_USER_AGENT_LENGTH_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class Labels:
    """What the client says of a call, to be grouped by."""

    feature: str | None
    attributes: Mapping[str, str]


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body. RequestInvalid."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestInvalid(reason="we could not parse the JSON body of your request", code="invalid_json") from error
    if not isinstance(found, dict):
        raise RequestInvalid(reason="the body of your request must be a JSON object", code="invalid_json")
    return found


def read_labels(headers: Mapping[str, str]) -> Labels:
    """X-Scrip-Feature, -Conversation, -Source, and free X-Scrip-Attribute-<name>. RequestInvalid."""
    found: dict[str, str] = {}
    for header, value in headers.items():
        if header.startswith(_ATTRIBUTE_HEADER):
            name = _checked(_NAME, header.removeprefix(_ATTRIBUTE_HEADER).replace("-", "_"), header)
            if name in OWN_ATTRIBUTES:
                raise _bad_header(header, f"the gateway itself says {name}")
            found[name] = _checked(_TEXT, value, header)
    if len(found) > ATTRIBUTES_FREE_MAX:
        raise _bad_header(_ATTRIBUTE_HEADER, f"there are {len(found)}, and may be at most {ATTRIBUTES_FREE_MAX}")
    for name in _NAMED:
        header = f"x-scrip-{name}"
        if header in headers:
            found[name] = _checked(_TEXT, headers[header], header)
    feature = headers.get("x-scrip-feature")
    return Labels(feature=None if feature is None else _checked(_NAME, feature, "x-scrip-feature"), attributes=found)


def client_attributes(headers: Mapping[str, str], *, address: str | None) -> dict[str, str]:
    """What is kept of who called: the program, and the network without the host."""
    found = {}
    if user_agent := headers.get("user-agent", "").replace("\x00", "")[:_USER_AGENT_LENGTH_MAX]:
        found["user_agent"] = user_agent
    if address is not None:
        try:
            network = ipaddress.ip_network(f"{address}/{48 if ':' in address else 24}", strict=False)
        except ValueError:
            return found
        found["client_network"] = str(network)
    return found


def _checked(adapter: TypeAdapter[str], text: str, header: str) -> str:
    try:
        return adapter.validate_python(text)
    except ValidationError as error:
        raise _bad_header(header, error.errors(include_url=False, include_context=False)[0]["msg"]) from None


def _bad_header(header: str, why: str) -> RequestInvalid:
    return RequestInvalid(reason=f"the header {header[:80]!r}: {why}", param=header[:80], code="invalid_attribute")


# To and from a provider -----------------------------------------------------------------------------------------------

# With an own key the account may choose among what that key may use; with ours it may not.
_PASSED: Final = ("openai-beta",)
_PASSED_OWN: Final = ("openai-organization", "openai-project")

_STATUSES_PASSED: Final = frozenset({400, 404, 409, 413, 415, 422})
_REFUSED_KEY: Final = frozenset({401, 403})
_RETRY_HEADERS: Final = ("retry-after", "retry-after-ms")
_MESSAGE_LENGTH_MAX: Final = 500
_CODE: Final = re.compile(r"[a-z0-9_.-]{1,64}")
# Keys of any provider, whole or in part, and whose they are.
_SECRETS: Final = re.compile(
    r"(?i)\b(?:sk|pk|rk|gsk|xai|org|proj|user)-[\w*.…-]{4,}|\b(?:gsk|proj)_\w{6,}|\bAIza[\w*-]{8,}|\bBearer\s+\S+"
    r"|[\w-]*\*{3,}[\w-]*"
)


def request_body(body: Mapping[str, Any], *, stream: bool, usage_wanted: bool) -> bytes:
    """The body to forward. Encoded anew, so that the provider reads what was read here; a stream tells its usage."""
    if stream and not usage_wanted:
        options = body.get("stream_options") or {}
        body = {**body, "stream_options": {**options, "include_usage": True}}
    return msgspec.json.encode(body)


def request_headers(headers: Mapping[str, str], *, secret: str, own: bool, request_id: str) -> dict[str, str]:
    """The headers to forward: what a provider needs, and nothing of who called us."""
    passed = (*_PASSED, *_PASSED_OWN) if own else _PASSED
    return {
        **{name: headers[name] for name in passed if headers.get(name, "").isascii() and name in headers},
        "accept": "*/*",
        "accept-encoding": "identity",
        "authorization": f"Bearer {secret}",
        "content-type": "application/json",
        "user-agent": "scrip-gateway",
        "x-client-request-id": request_id,
    }


class _Function(msgspec.Struct):
    name: Any = None
    arguments: Any = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: Any = None
    refusal: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    message: _Delta | None = None


class _Answer(msgspec.Struct):
    model: Any = None
    choices: list[_Choice] | None = None
    usage: Any = None
    service_tier: Any = None
    error: Any = None


_ANSWER: Final = msgspec.json.Decoder(_Answer)


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of a stream, or a whole answer: the bytes of text of each choice that has any, and what else it says."""

    texts: Sequence[int] = ()
    has_choices: bool = False
    reported: Reported | None = None
    model: str | None = None
    service_tier: str | None = None
    error: Mapping[str, Any] | None = None


def read_piece(data: bytes) -> Piece | None:
    """A chunk of a stream, or a whole answer. None if it is not readable as either."""
    try:
        found = _ANSWER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    choices = found.choices or ()
    texts = [size for choice in choices if (size := _size(choice.delta or choice.message))]
    return Piece(
        texts=texts,
        has_choices=bool(choices),
        reported=_reported(found.usage),
        model=found.model if isinstance(found.model, str) and len(found.model) <= 128 else None,
        service_tier=found.service_tier if isinstance(found.service_tier, str) else None,
        error=found.error if isinstance(found.error, dict) else {"message": str(found.error)} if found.error else None,
    )


def text_bytes_of_part(body: bytes) -> int:
    """The bytes of text in an answer that broke off: from its first content on."""
    start = body.find(b'"content"')
    return max(0, len(body) - start - len(b'"content":"')) if start != -1 else 0


def tokens_of_answer(piece: Piece) -> int:
    """About how many tokens a whole answer has whose usage is not told."""
    return sum(tokens_of_text(size) for size in piece.texts)


def _size(delta: _Delta | None) -> int:
    if delta is None:
        return 0
    texts = [delta.content, delta.refusal, delta.reasoning_content or delta.reasoning]
    for function in (delta.function_call, *(call.function for call in delta.tool_calls or ())):
        if function is not None:
            texts += [function.name, function.arguments]
    return sum(len(text.encode()) for text in texts if isinstance(text, str))


def _reported(usage: Any) -> Reported | None:
    if not isinstance(usage, dict):
        return None
    inputs, outputs = _tokens(usage.get("prompt_tokens")), _tokens(usage.get("completion_tokens"))
    if inputs is None or outputs is None:
        return None
    return Reported(
        input_tokens=inputs,
        output_tokens=outputs,
        cached_tokens=_detail(usage.get("prompt_tokens_details"), "cached_tokens"),
        reasoning_tokens=_detail(usage.get("completion_tokens_details"), "reasoning_tokens"),
        input_audio_tokens=_detail(usage.get("prompt_tokens_details"), "audio_tokens"),
        output_audio_tokens=_detail(usage.get("completion_tokens_details"), "audio_tokens"),
    )


def _detail(details: Any, name: str) -> int:
    return (_tokens(details.get(name)) or 0) if isinstance(details, dict) else 0


def _tokens(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= TOKENS_MAX else None


def provider_refused(
    *, provider: str, status: int, headers: Mapping[str, str], body: bytes, secret: str, own: bool
) -> ProviderFailed:
    """What a provider's error answer is to the client: its message without secrets, never its 401 as ours."""
    said = _error_of(body)
    code = said.get("code")
    code = code if isinstance(code, str) and _CODE.fullmatch(code) else None
    if status in _REFUSED_KEY or code == "invalid_api_key":
        whose = "the account's own key" if own else "the platform's key"
        return ProviderFailed(
            reason=f"{provider} did not accept {whose} for this call (status {status})",
            code="provider_key_rejected",
            headers={"x-should-retry": "false"},
        )
    message = sanitised(said.get("message"), secret=secret)
    text = f"{provider} refused the call (status {status}): {message}"
    if status == 429 and code != "insufficient_quota":
        return ProviderFailed(
            reason=text,
            code=code or "rate_limit_exceeded",
            status=429,
            headers={"retry-after": "1"}
            | {name: headers[name] for name in _RETRY_HEADERS if _is_number(headers, name)},
        )
    if status in _STATUSES_PASSED:
        param = said.get("param")
        return ProviderFailed(
            reason=message,
            code=code or "provider_refused",
            status=status,
            param=sanitised(param, secret=secret) if isinstance(param, str) else None,
        )
    return ProviderFailed(reason=text, code="provider_out_of_quota" if status == 429 else "provider_failed")


def provider_broke(error: Mapping[str, Any], *, provider: str, produced: bool) -> ProviderFailed:
    """What an error in place of an answer, or in the middle of one, is to the client."""
    return ProviderFailed(reason=f"{provider} failed: {sanitised(error.get('message'))}", produced=produced)


def sanitised(message: object, *, secret: str = "") -> str:
    """A provider's words without the key, anything like one, or whose it is."""
    if not isinstance(message, str) or not message:
        return "it gave no reason"
    if secret:
        message = message.replace(secret, "***")
    message = "".join(letter if letter.isprintable() else " " for letter in message[: 4 * _MESSAGE_LENGTH_MAX])
    return _SECRETS.sub("***", message)[:_MESSAGE_LENGTH_MAX]


def _error_of(body: bytes) -> Mapping[str, Any]:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    if isinstance(found, list) and found:
        # Gemini wraps it.
        found = found[0]
    error = found.get("error") if isinstance(found, dict) else None
    return error if isinstance(error, dict) else {"message": error}


def _is_number(headers: Mapping[str, str], name: str) -> bool:
    text = headers.get(name, "")
    return text.isascii() and text.isdigit() and len(text) < 9


# To other services ----------------------------------------------------------------------------------------------------


def place_hold(
    *, hold: str, account: str, amounts: Mapping[str, int], units: Mapping[str, Unit], lifetime_seconds: int
) -> words.PlaceHold:
    """The command that sets a quote aside: all of it or nothing."""
    legs = []
    for name, amount in amounts.items():
        text = format_amount(amount, units[name])
        legs.append(words.HoldLeg(unit=name, at_least=text, at_most=text))
    return words.PlaceHold(
        idempotency_key=f"place:{hold}",
        hold=hold,
        account=account,
        legs=tuple(legs),
        lifetime_seconds=lifetime_seconds,
    )


def read_remaining(reply: words.Accepted, *, units: Mapping[str, Unit]) -> dict[str, int]:
    """What is available after a hold, per unit: where several wallets have it, in the tightest."""
    found: dict[str, int] = {}
    for each in reply.remaining:
        if each.unit in units:
            available = parse_amount(each.available, units[each.unit])
            found[each.unit] = min(available, found.get(each.unit, available))
    return found


def release_hold(*, hold: str, account: str) -> words.ReleaseHold:
    """The command that gives it back."""
    return words.ReleaseHold(idempotency_key=f"release:{hold}", hold=hold, account=account)


def usage_message(
    used: ModelUsed, *, request_id: str, account: str, occurred_at: datetime, traceparent: str | None = None
) -> Message:
    """The usage event of a call, ready to publish or to spool: the same bytes whenever it is told.

    Of which trace it is a step is no part of what it says: neither its hash nor its message id change with it.
    """
    event = {
        "specversion": "1.0",
        "id": request_id,
        "source": SOURCE,
        "type": MODEL_USED,
        "subject": account,
        "time": occurred_at.isoformat(timespec="microseconds"),
        "data": used.model_dump(mode="json", exclude_defaults=True),
        **({} if traceparent is None else {TRACEPARENT: traceparent}),
    }
    return Message(
        subject=usage_subject(partition=partition_of(account), source=SOURCE),
        payload=msgspec.json.encode(event),
        message_id=sha256(f"{SOURCE}\n{request_id}\n".encode() + body_hash(event)).hexdigest()[:32],
    )


# Answers --------------------------------------------------------------------------------------------------------------

_TYPES: Final = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
}


def error_answer(refusal: Refusal, *, request_id: str) -> tuple[int, Headers, bytes]:
    """A refusal in OpenAI's error shape: status, headers, body."""
    status, headers = _status_of(refusal)
    body = msgspec.json.encode(error_object(refusal, status=status))
    return status, answer_headers(request_id, content_type="application/json", length=len(body), more=headers), body


def error_object(refusal: Refusal, *, status: int) -> dict[str, Any]:
    """OpenAI's error object; a refusal's numbers are members beside the usual four."""
    members: dict[str, Any] = {
        "message": str(refusal),
        "type": _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": refusal.param if isinstance(refusal, RequestInvalid | ProviderFailed) else None,
        "code": refusal.code,
    }
    if isinstance(refusal, InsufficientFunds):
        members |= {
            "limit_source": refusal.limit_source,
            "required": refusal.required and refusal.required.model_dump(),
            "remaining": refusal.remaining and refusal.remaining.model_dump(),
            "affordable_max_tokens": refusal.affordable_max_tokens,
        }
    return {"error": members}


def error_event(refusal: Refusal) -> bytes:
    """A refusal in the middle of a stream."""
    return b"data: " + msgspec.json.encode(error_object(refusal, status=500)) + b"\n\n"


def cost_comment(amounts: Sequence[tuple[str, str]]) -> bytes:
    """What a stream cost, as comments that clients of OpenAI's skip."""
    return b"".join(f": scrip cost={amount} unit={unit}\n\n".encode() for amount, unit in amounts)


def answer_headers(
    request_id: str, *, content_type: str, length: int | None = None, more: Mapping[str, str] | None = None
) -> Headers:
    """The headers of any answer. OpenAI's clients show `x-request-id` as the request's id."""
    found = {
        "content-type": content_type,
        "x-request-id": request_id,
        "x-scrip-request-id": request_id,
        **(more or {}),
    }
    if length is not None:
        found["content-length"] = str(length)
    return [(name.encode(), value.encode("latin-1", "replace")) for name, value in found.items()]


def amounts_text(amounts: Sequence[tuple[str, str]]) -> str:
    """`0.000123 usd, 12 tokens`."""
    return ", ".join(f"{amount} {unit}" for amount, unit in amounts)


def models_answer(models: Sequence[PricedModel]) -> bytes:
    """OpenAI's list of models."""
    return msgspec.json.encode({"object": "list", "data": [_model(each) for each in models]})


def model_answer(priced: PricedModel) -> bytes:
    """OpenAI's answer about one model."""
    return msgspec.json.encode(_model(priced))


def _model(priced: PricedModel) -> dict[str, Any]:
    # It was created when its price came into force.
    return {
        "id": priced.model,
        "object": "model",
        "created": max(0, (priced.version.effective_at - _EPOCH).days * 86_400),
        "owned_by": priced.provider,
    }


_STATUS: Final[Mapping[type[Refusal], int]] = {
    KeyRefused: 401,
    RequestInvalid: 400,
    BodyTooLarge: 413,
    BodyTooSlow: 408,
    ClientLeft: 408,
    ModelNotPriced: 404,
    NoProvider: 404,
    UnknownPath: 404,
    SecretRefused: 403,
    InsufficientFunds: 402,
    AccountNotOpen: 403,
    Unavailable: 503,
    NotRecorded: 500,
}
# The same again would end the same, or cost again.
_NO_RETRY: Final = {"x-should-retry": "false"}
_SECRETS_OF_OURS: Final = frozenset({"no_platform_secret", "secret_undecryptable"})


def _status_of(refusal: Refusal) -> tuple[int, Mapping[str, str]]:
    """The status and the headers of a refusal."""
    match refusal:
        case ProviderFailed(status=status, produced=produced, headers=headers):
            return status, {**headers, **(_NO_RETRY if produced else {})}
        case SecretRefused(own=False, code=code) if code in _SECRETS_OF_OURS:
            return 503, _NO_RETRY
        case Unavailable(retry_after_seconds=seconds):
            headers = {"retry-after": str(seconds)}
        case KeyRefused():
            headers = {"www-authenticate": 'Bearer realm="scrip"'}
        case BodyTooLarge() | BodyTooSlow():
            headers = {"connection": "close", **_NO_RETRY}
        case _:
            headers = _NO_RETRY
    return _STATUS[type(refusal)], headers
