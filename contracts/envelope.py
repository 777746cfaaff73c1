"""Usage events as CloudEvents 1.0, structured or binary: reading, checking, the hash that tells two bodies apart."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Any, Final, Literal
from urllib.parse import unquote

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from contracts.accounts import ACCOUNT_LENGTH_MAX, check_account
from contracts.ids import HoldId
from contracts.times import TIME_MAX, TIME_MIN, Time
from contracts.usage import (
    MODEL_USED,
    AttributeName,
    ModelName,
    ModelUsed,
    PriceVersionId,
    ProviderName,
    QuickCall,
    ServiceTier,
)

EVENT_BYTES_MAX: Final = 64 << 10
# A message is one event, or a JSON array of several: as many bytes in all, and so many events at most.
MESSAGE_BYTES_MAX: Final = EVENT_BYTES_MAX
MESSAGE_EVENTS_MAX: Final = 1_000
PROBLEMS_MAX: Final = 100
NAME_SHOWN_MAX: Final = 64

# Of a subject that is no account id.
SUBJECT_LENGTH_MAX: Final = 256
# Of the data of other types than ours: how deep, how many members of objects in all, how long a number is.
DATA_DEPTH_MAX: Final = 8
DATA_MEMBERS_MAX: Final = 256
NUMBER_DIGITS_MAX: Final = 64
_NUMBER_BEYOND: Final[int] = 10**NUMBER_DIGITS_MAX

JSON_TYPE: Final = "application/json"
# The prefix of attributes in binary mode.
BINARY_PREFIX: Final = "ce-"

# The extension attribute by which ingest says that it filled in `time` for the producer.
SERVER_FILLED: Final = "scripfilled"
# The extension attribute, and the field, that says of which trace something is a step (W3C Trace Context).
TRACEPARENT: Final = "traceparent"
# The path an event took says nothing about what happened: a retry may travel under another trace, or in another mode.
# What `datacontenttype` says is known: it can only say one thing, and binary mode always does.
_NOT_CONTENT: Final = frozenset({SERVER_FILLED, TRACEPARENT, "tracestate", "datacontenttype"})
# How CloudEvents say data that is no JSON, which use always is.
_DATA_BASE64: Final = "data_base64"
# Event types with this prefix are ours: one that is not known is a mistake.
_OURS: Final = "scrip."

# Where a value may be of several types, pydantic reports one error for each and adds the type to the place.
_ALTERNATIVES: Final = frozenset({"constrained-str", "constrained-int", "bool"})

EventId = Annotated[
    str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]+$", examples=["azure-conv-2023:17"])
]
SourceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", examples=["demo"])]
# Not checked further: a malformed one counts as none, and must not cost what it came with.
Traceparent = Annotated[
    str, Field(max_length=256, examples=["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"])
]
# Any other than ours.
EventType = Annotated[
    str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]+$", examples=["api-calls", "com.example.rendered"])
]

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@lru_cache(maxsize=65_536)
def is_account(subject: str) -> bool:
    """Whether a subject is an account id as it stands. Any other one needs an alias to be charged."""
    try:
        check_account(subject)
    except ValueError:
        return False
    return True


def check_subject(subject: str) -> str:
    """Return `subject` unchanged if it can be one; ValueError says what is wrong otherwise."""
    if is_account(subject):
        return subject
    if len(subject) > SUBJECT_LENGTH_MAX:
        raise ValueError(
            f"a subject that is no account id has at most {SUBJECT_LENGTH_MAX} characters, this one has {len(subject)}"
        )
    if _CONTROL.search(subject) is not None:
        raise ValueError("a subject has no control characters")
    return subject


Subject = Annotated[
    str,
    Field(
        min_length=1,
        max_length=ACCOUNT_LENGTH_MAX,
        description="The account id, or what the publisher calls the account: a text that an alias maps to it.",
        examples=["acme/ml/ana/key_7f3"],
    ),
    AfterValidator(check_subject),
]
# Postgres has no text with a NUL in it.
_TEXT = r"^[^\x00]*$"
# The CloudEvents type Integer.
ExtensionNumber = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
ExtensionValue = Annotated[str, Field(max_length=1024, pattern=_TEXT)] | ExtensionNumber | bool


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an event. `field` is its place, `data.input_tokens`, or empty for the whole."""

    field: str
    message: str


class InvalidEvent(ValueError):
    """An event that cannot be read as a usage event; carries every problem found."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("; ".join(f"{problem.field}: {problem.message}" for problem in problems))
        self.problems = problems


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow")
    __pydantic_extra__: dict[Annotated[str, Field(pattern=r"^[a-z0-9]{1,20}$")], ExtensionValue | None]

    specversion: Literal["1.0"]
    id: EventId
    source: SourceName
    subject: Subject
    time: Time | None = None
    datacontenttype: Literal["application/json"] | None = None
    dataschema: Annotated[str, Field(max_length=1024, pattern=_TEXT)] | None = None


class UsageEvent(_Event):
    """One use of one model by one account: a CloudEvent whose subject is the account id, or an alias of it.

    `source` is the publishing service, its authenticated principal. (partition, source, id) is unique for ever.
    Extension attributes are allowed as CloudEvents has them: lower-case names; strings, integers, booleans.
    Over NATS a message is one event, or a JSON array of several.
    """

    type: Literal["scrip.model.used.v1"]
    data: ModelUsed


class OtherEvent(_Event):
    """A use of anything else: a CloudEvent of the publisher's own type, whose data is any JSON object within bounds.

    What it costs and how it is counted is said by prices and meters of its type.
    """

    type: EventType
    data: dict[str, Any] | None = None


# Numbers are kept as they were written: 0.1 is a tenth, and what a producer sent is what is hashed.
_DECODER: Final = msgspec.json.Decoder(float_hook=Decimal)
_ENCODER: Final = msgspec.json.Encoder(order="sorted", decimal_format="number")


def read_usage_event(body: bytes, *, bytes_max: int = EVENT_BYTES_MAX) -> tuple[UsageEvent | OtherEvent, bytes]:
    """The event that a body holds, and its body hash. Raises InvalidEvent with every problem."""
    if len(body) > bytes_max:
        raise InvalidEvent((Problem("", f"an event has at most {bytes_max} bytes, this one has {len(body)}"),))
    raw = _decoded(body)
    if not isinstance(raw, dict):
        raise InvalidEvent((Problem("", "an event is a JSON object"),))
    kind = raw.get("type")
    if isinstance(kind, str) and not kind.startswith(_OURS):
        return _other_event(body, raw), body_hash(raw)
    try:
        event = UsageEvent.model_validate_json(body)
    except ValidationError as error:
        raise InvalidEvent(_problems(error)) from error
    return event, body_hash(raw)


def events_of(body: bytes) -> list[bytes]:
    """The bodies of the events of a message in structured form, as they stand there: its own, or those of an array.

    What is neither is one body, and no event: reading it says why.
    """
    if not body.lstrip().startswith(b"["):
        return [body]
    try:
        found = [bytes(event) for event in _ARRAY.decode(body)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return [body]
    return found if len(body) <= MESSAGE_BYTES_MAX and 0 < len(found) <= MESSAGE_EVENTS_MAX else [body]


def message_bodies(bodies: Iterable[bytes]) -> Iterator[bytes]:
    """The bodies of messages that hold these events, in their order: each as many of them as it may."""
    held: list[bytes] = []
    size = 0
    for body in bodies:
        if held and (size + len(body) + 2 > MESSAGE_BYTES_MAX or len(held) == MESSAGE_EVENTS_MAX):
            yield _joined(held)
            held, size = [], 0
        held.append(body)
        size += len(body) + 1
    if held:
        yield _joined(held)


def _joined(bodies: Sequence[bytes]) -> bytes:
    return bodies[0] if len(bodies) == 1 else b"[" + b",".join(bodies) + b"]"


_ARRAY: Final = msgspec.json.Decoder(list[msgspec.Raw])


class QuickEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """A UsageEvent without extension attributes, as it is read fast. In the order of names, which is canonical."""

    data: QuickCall
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    source: str
    specversion: Literal["1.0"]
    subject: str
    # As it was written: that is what is hashed.
    time: str | None = None
    type: Literal["scrip.model.used.v1"]


class QuickRead(msgspec.Struct, frozen=True, gc=False):
    """An event that was read fast, and what is worked out of it: `data` is JSON, in canonical form; `time` in UTC."""

    event: QuickEvent
    time: datetime | None
    data: str
    body_hash: bytes


_QUICK: Final = msgspec.json.Decoder(QuickEvent)
# Fields stand in order; what remains are the attributes.
_QUICK_ENCODER: Final = msgspec.json.Encoder(order="deterministic")
_QUICK_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{3}(?:[0-9]{3})?)?(?:Z|\+00:00)"
)


def read_quickly(body: bytes) -> QuickRead | None:
    """The event of a body of ours, in an eighth of the time; None if anything is odd: `read_usage_event` says what.

    Of what it reads it says the same. That nothing of the body was passed over shows in what comes out: its canonical
    form is that of the body. Without a backslash no text has a control character, or needs one to be written.
    """
    if len(body) > EVENT_BYTES_MAX or b"\\" in body:
        return None
    try:
        event = _QUICK.decode(body)
        canonical = _QUICK_ENCODER.encode(event)
        # Most producers write it so.
        if canonical != body and canonical != _ENCODER.encode(_DECODER.decode(body)):
            return None
        time = None if event.time is None else _quick_time(event.time)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    if not _are_valid_texts(event):
        return None
    return QuickRead(event, time, _QUICK_ENCODER.encode(event.data).decode(), sha256(canonical).digest())


def _quick_time(text: str) -> datetime:
    """A time in UTC as most are written; ValueError for all others."""
    if _QUICK_TIME.fullmatch(text) is None:
        raise ValueError("another form")
    time = datetime.fromisoformat(text)
    if not TIME_MIN <= time < TIME_MAX:
        raise ValueError("out of bounds")
    return time


def _are_valid_texts(event: QuickEvent) -> bool:
    call = event.data
    optional = (call.hold, call.feature, call.price_version, call.service_tier)
    return (
        is_account(event.subject)
        and _are_names(event.source, call.provider, call.model)
        and (optional == _NONE or _is_valid(_OPTIONAL, optional))
    )


_NAMES: Final[TypeAdapter[tuple[str, str, str]]] = TypeAdapter(tuple[SourceName, ProviderName, ModelName])
_OPTIONAL: Final[TypeAdapter[tuple[str | None, ...]]] = TypeAdapter(
    tuple[HoldId | None, AttributeName | None, PriceVersionId | None, ServiceTier | None]
)
_NONE: Final = (None, None, None, None)


@lru_cache(maxsize=4096)
def _are_names(source: str, provider: str, model: str) -> bool:
    return _is_valid(_NAMES, (source, provider, model))


def _is_valid(adapter: TypeAdapter[Any], value: object) -> bool:
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def body_hash(raw: dict[str, Any]) -> bytes:
    """SHA-256 of what the producer sent in canonical form: sorted keys, no white space, nothing ingest filled in."""
    left_out = _NOT_CONTENT | {"time"} if raw.get(SERVER_FILLED) == "time" else _NOT_CONTENT
    content = raw if left_out.isdisjoint(raw) else {each: value for each, value in raw.items() if each not in left_out}
    return sha256(_ENCODER.encode(content)).digest()


def binary_attributes(headers: Collection[tuple[str, str]]) -> dict[str, str] | None:
    """The attributes that headers of an event in binary mode say; None if it is not in binary mode.

    As the HTTP binding has it, percent-encoded; NATS likewise. Raises InvalidEvent.
    """
    said = [(name[3:].lower(), value) for name, value in headers if name[:3].lower() == BINARY_PREFIX]
    if not said:
        return None
    content_type = next((value for name, value in headers if name.lower() == "content-type"), None)
    if content_type is not None and content_type.lower().startswith("application/cloudevents"):
        return None
    attributes: dict[str, str] = {}
    problems = []
    for name, value in said:
        if name in attributes or name == "data":
            message = "this attribute is given twice" if name in attributes else "data is the body, not an attribute"
            problems.append(Problem(_readable(name), message))
        try:
            attributes[name] = _unescaped(value)
        except UnicodeDecodeError:
            problems.append(Problem(_readable(name), "not percent-encoded UTF-8"))
    if problems:
        raise InvalidEvent(tuple(problems))
    if content_type is not None:
        attributes.setdefault("datacontenttype", content_type)
    return attributes


def structured(attributes: Mapping[str, str], data: bytes) -> bytes:
    """An event of binary mode in structured form, its data as sent: the same content, and the same body hash.

    Raises InvalidEvent if the data is not JSON.
    """
    said = dict(attributes)
    if said.get("datacontenttype", "").partition(";")[0].strip().lower() == JSON_TYPE:
        del said["datacontenttype"]
    encoded = _ENCODER.encode(said)
    if not data.strip():
        return encoded
    try:
        # Read on its own: pasted in unread, it could end and say attributes.
        _decoded(data)
    except InvalidEvent as error:
        raise InvalidEvent(tuple(Problem("data", problem.message) for problem in error.problems)) from error
    return encoded[:-1] + (b"," if said else b"") + b'"data":' + data + b"}"


def _decoded(body: bytes) -> Any:
    try:
        return _DECODER.decode(body)
    except RecursionError:
        raise InvalidEvent((Problem("", "not an event: nested too deeply"),)) from None
    except ArithmeticError:
        raise InvalidEvent((Problem("", "not an event: a number is beyond all bounds"),)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidEvent((Problem("", f"not JSON: {error}"),)) from error


def _unescaped(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    return unquote(value, errors="strict")


def _other_event(body: bytes, raw: dict[str, Any]) -> OtherEvent:
    data = raw.get("data")
    bounds = tuple(_Bounds().problems(data)) if isinstance(data, dict) else ()
    try:
        event = OtherEvent.model_validate_json(body)
    except ValidationError as error:
        raise InvalidEvent((*_problems(error), *bounds)) from error
    if bounds:
        raise InvalidEvent(bounds)
    return event


class _Bounds:
    """Whether data is within what can be stored and looked through. Each bound is named once."""

    def __init__(self) -> None:
        self._members = 0

    def problems(self, data: dict[str, Any]) -> Iterator[Problem]:
        """What is out of bounds."""
        named = set()
        for place, message in self._beyond(data, "data", 1):
            if message not in named:
                named.add(message)
                yield Problem(place, message)
        if self._members > DATA_MEMBERS_MAX:
            yield Problem("data", f"data has at most {DATA_MEMBERS_MAX} members in all, this one has {self._members}")

    def _beyond(self, value: Any, place: str, depth: int) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict | list) and depth > DATA_DEPTH_MAX:
            yield place, f"data is nested at most {DATA_DEPTH_MAX} deep"
        elif isinstance(value, dict):
            self._members += len(value)
            for name, member in value.items():
                if "\x00" in name:
                    yield place, "the name of a member has a NUL"
                yield from self._beyond(member, f"{place}.{_readable(name)}", depth + 1)
        elif isinstance(value, list):
            for number, item in enumerate(value):
                yield from self._beyond(item, f"{place}.{number}", depth + 1)
        elif isinstance(value, str) and "\x00" in value:
            yield place, "a text has a NUL"
        elif isinstance(value, int | Decimal) and not _is_short(value):
            yield place, f"a number has at most {NUMBER_DIGITS_MAX} digits before and after its point"


def _is_short(number: int | Decimal) -> bool:
    if isinstance(number, int):
        return -_NUMBER_BEYOND < number < _NUMBER_BEYOND
    exponent = number.as_tuple().exponent
    return isinstance(exponent, int) and exponent >= -NUMBER_DIGITS_MAX and number.adjusted() < NUMBER_DIGITS_MAX


def _problems(error: ValidationError) -> tuple[Problem, ...]:
    messages: dict[str, list[str]] = {}
    for found in error.errors(include_url=False, include_context=False, include_input=False):
        messages.setdefault(_field(found["loc"], found["type"]), []).append(
            _message(found["loc"], found["type"], found["msg"])
        )
    problems = [Problem(field, ", or ".join(dict.fromkeys(alternatives))) for field, alternatives in messages.items()]
    if len(problems) > PROBLEMS_MAX:
        left_out = Problem("", f"and {len(problems) - PROBLEMS_MAX} more problems")
        problems = [*problems[:PROBLEMS_MAX], left_out]
    return tuple(problems)


def _field(loc: tuple[int | str, ...], kind: str) -> str:
    if kind != "extra_forbidden" and loc and loc[-1] in _ALTERNATIVES:
        loc = loc[:-1]
    return ".".join(_readable(str(part)) for part in loc)


def _readable(name: str) -> str:
    # Names come from outside, and a problem is stored and printed: no control characters, no page-long names.
    shown = name if name.isprintable() else ascii(name)
    return shown if len(shown) <= NAME_SHOWN_MAX else f"{shown[:NAME_SHOWN_MAX]}…"


def _message(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    if loc[:1] == (_DATA_BASE64,):
        return "data in base64 is not supported: send the use as a JSON object in `data`"
    if kind == "string_pattern_mismatch" and len(loc) == 1 and loc[0] not in OtherEvent.model_fields:
        return "an attribute has a name of 1 to 20 characters, all of them a-z or 0-9"
    if loc == ("type",) and kind == "literal_error":
        return f"unknown event type: of {_OURS}* known is {MODEL_USED}"
    return message.removeprefix("Value error, ")
