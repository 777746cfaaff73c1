"""Usage events as CloudEvents 1.0 (structured JSON): reading, checking, and the hash that tells two bodies apart."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contracts.accounts import AccountId
from contracts.times import Time
from contracts.usage import MODEL_USED, ModelUsed

EVENT_BYTES_MAX: Final = 64 << 10
PROBLEMS_MAX: Final = 100
NAME_SHOWN_MAX: Final = 64

# The extension attribute by which ingest says that it filled in `time` for the producer.
SERVER_FILLED: Final = "scripfilled"
# The extension attribute, and the field, that says of which trace something is a step (W3C Trace Context).
TRACEPARENT: Final = "traceparent"
# The path an event took says nothing about what happened: a retry may travel under another trace.
_NOT_CONTENT: Final = frozenset({SERVER_FILLED, TRACEPARENT, "tracestate"})

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


class UsageEvent(BaseModel):
    """One use of one resource by one account: a CloudEvent whose subject is the account id.

    `source` is the publishing service, its authenticated principal. (partition, source, id) is unique for ever.
    Extension attributes are allowed as CloudEvents has them: lower-case names; strings, integers, booleans.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")
    __pydantic_extra__: dict[Annotated[str, Field(pattern=r"^[a-z0-9]{1,20}$")], ExtensionValue | None]

    specversion: Literal["1.0"]
    id: EventId
    source: SourceName
    type: Literal["scrip.model.used.v1"]
    subject: AccountId
    time: Time | None = None
    datacontenttype: Literal["application/json"] | None = None
    dataschema: Annotated[str, Field(max_length=1024, pattern=_TEXT)] | None = None
    data: ModelUsed


def read_usage_event(body: bytes) -> tuple[UsageEvent, bytes]:
    """The event that a body holds, and its body hash. Raises InvalidEvent with every problem."""
    if len(body) > EVENT_BYTES_MAX:
        raise InvalidEvent((Problem("", f"an event has at most {EVENT_BYTES_MAX} bytes, this one has {len(body)}"),))
    try:
        raw = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidEvent((Problem("", "not an event: nested too deeply"),)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidEvent((Problem("", f"not JSON: {error}"),)) from error
    if not isinstance(raw, dict):
        raise InvalidEvent((Problem("", "an event is a JSON object"),))
    try:
        event = UsageEvent.model_validate_json(body)
    except ValidationError as error:
        raise InvalidEvent(_problems(error)) from error
    return event, body_hash(raw)


def body_hash(raw: dict[str, Any]) -> bytes:
    """SHA-256 of what the producer sent in canonical form: sorted keys, no white space, nothing ingest filled in."""
    left_out = _NOT_CONTENT | {"time"} if raw.get(SERVER_FILLED) == "time" else _NOT_CONTENT
    content = raw if left_out.isdisjoint(raw) else {each: value for each, value in raw.items() if each not in left_out}
    return sha256(msgspec.json.encode(content, order="sorted")).digest()


def _problems(error: ValidationError) -> tuple[Problem, ...]:
    messages: dict[str, list[str]] = {}
    for found in error.errors(include_url=False, include_context=False, include_input=False):
        messages.setdefault(_field(found["loc"], found["type"]), []).append(
            _message(found["loc"], found["type"], found["msg"])
        )
    problems = [Problem(field, ", or ".join(alternatives)) for field, alternatives in messages.items()]
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
    if loc == ("type",) and kind == "literal_error":
        return f"unknown event type: known is {MODEL_USED}"
    return message.removeprefix("Value error, ")
