"""Deliveries and HTTP bodies become usage, messages to publish, or letters."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from typing import Final

import msgspec
from nats.aio.msg import Msg
from pydantic import TypeAdapter, ValidationError

from contracts.envelope import (
    EVENT_BYTES_MAX,
    SERVER_FILLED,
    TRACEPARENT,
    InvalidEvent,
    OtherEvent,
    Problem,
    UsageEvent,
    binary_attributes,
    events_of,
    is_account,
    message_bodies,
    read_quickly,
    read_usage_event,
    structured,
)
from contracts.ledger import AccountOpened
from contracts.partition import PARTITION_COUNT, partition_of, token
from contracts.streams import FORWARDED, USAGE, usage_subject
from contracts.times import Time
from contracts.usage import MODEL_USED, ModelUsed, QuickCall
from services.kit.dead_letters import DeadLetter, Letter, Unreadable, letter_of
from services.kit.publish import Message
from services.metering.domain.usage import (
    AGE_MAX,
    AGE_TOLERANCE,
    AHEAD_MAX,
    PINNING_SOURCE,
    Key,
    Reroute,
    Usage,
    age_problems,
    report_problems,
    reroute,
)

# What metering says of what it sends on, or what somebody waits to hear of. Believed on its own subjects only.
ACCOUNT_HEADER: Final = "Scrip-Account"
OCCURRED_AT_HEADER: Final = "Scrip-Occurred-At"
BODY_HASH_HEADER: Final = "Scrip-Body-Hash"
QUESTION_HEADER: Final = "Scrip-Question"

# With its time filled in, or written anew from the log, an event may be longer than it was.
FORWARDED_BYTES_MAX: Final = 240 << 10

_TOKENS: Final = tuple(token(partition) for partition in range(PARTITION_COUNT))
_PARTITIONS: Final = {each: partition for partition, each in enumerate(_TOKENS)}
# What most messages have, and no attributes of binary mode are among.
_OF_NATS: Final = frozenset(
    {"Nats-Msg-Id", "Nats-Expected-Stream", "Nats-Batch-Id", "Nats-Batch-Sequence", "Nats-Batch-Commit"}
)
# Of the acknowledgement subject of a delivery, on a server without a domain; and which token is the time.
_PLAIN_TOKENS: Final = 9
_PLAIN_TIME, _TIME_BEHIND_DOMAIN = 7, 9
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_REASON_LENGTH_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Late:
    """Use that is too old: a dead letter, unless it is a repeat of what came in time."""

    usage: Usage
    letter: Letter


class TooOld(InvalidEvent):
    """A report that is too old, and nothing else: refused, unless it is a repeat. `message` is what to publish then."""

    def __init__(self, problems: tuple[Problem, ...], *, key: Key, message: Message) -> None:
        super().__init__(problems)
        self.key = key
        self.message = message


def events_of_message(message: Msg) -> Sequence[Msg]:
    """The events of a message of the usage stream, each as if it had been delivered alone."""
    if message.data.startswith(b"{") or not _OF_NATS.issuperset(message.headers or ()):
        return (message,)
    bodies = events_of(message.data)
    if bodies[0] is message.data:
        return (message,)
    return [Msg(message._client, message.subject, message.reply, body) for body in bodies]


def read_delivery(message: Msg, *, age_max: timedelta = AGE_MAX) -> Usage | Reroute | Late | Letter:
    """A message of the usage stream as usage; sent on, if it came on another partition's subject; or as a dead letter.

    The letter names all that is wrong. How old use is, or how far ahead, is reckoned from when the stream took it: the
    answer is the same at every delivery.
    """
    arrived = _arrival(message.subject, message.reply)
    partition_token, reporter, _ = arrived
    if reporter == FORWARDED:
        return _read_forwarded(message, partition_token=partition_token)
    age_max += AGE_TOLERANCE
    return _read_usual(message, arrived, age_max=age_max) or _read_closely(message, arrived, age_max=age_max)


def _read_closely(message: Msg, arrived: "_Arrival", *, age_max: timedelta) -> Usage | Reroute | Late | Letter:
    partition_token, reporter, arrived_at = arrived
    body = message.data
    try:
        if (headers := message.headers) is not None and not _OF_NATS.issuperset(headers):
            body = _as_structured(headers.items(), body)
        report = _read(body)
    except InvalidEvent as error:
        further = _further_problems(body, reporter=reporter, arrived_at=arrived_at, age_max=age_max)
        return dead(message, (*error.problems, *further))
    occurred_at = arrived_at if report.time is None else report.time
    partition = partition_of(report.subject)
    problems = _report_problems(report, reporter=reporter, occurred_at=occurred_at, arrived_at=arrived_at)
    late = age_problems(occurred_at=occurred_at, arrived_at=arrived_at, age_max=age_max)
    if problems:
        return dead(message, (*problems, *late), partition=partition)
    usage = _usage(report, partition=partition, occurred_at=occurred_at, body=body)
    if late:
        return Late(usage=usage, letter=dead(message, late, partition=partition))
    if partition_token != _TOKENS[partition]:
        came_on = _PARTITIONS.get(partition_token, partition)
        return reroute(usage, partition=came_on, to=partition, account=None)
    return usage


# Of a message: on which partition's subject it came, who reported it, and when the stream took it.
_Arrival = tuple[str, str, datetime]


# A message may have hundreds of events.
@lru_cache(maxsize=256)
def _arrival(subject: str, reply: str) -> _Arrival:
    _, _, partition_token, reporter = subject.split(".")
    tokens = reply.split(".")
    stored_at_ns = int(tokens[_PLAIN_TIME if len(tokens) == _PLAIN_TOKENS else _TIME_BEHIND_DOMAIN])
    return partition_token, reporter, _EPOCH + timedelta(microseconds=stored_at_ns // 1000)


def _read_usual(message: Msg, arrived: _Arrival, *, age_max: timedelta) -> Usage | None:
    """An event with which nothing is wrong, as with most; None of one that is to be looked at closely."""
    if (headers := message.headers) is not None and not _OF_NATS.issuperset(headers):
        return None
    quick = read_quickly(message.data)
    if quick is None:
        return None
    partition_token, reporter, arrived_at = arrived
    event, time = quick.event, quick.time
    source, event_id, subject = event.source, event.id, event.subject
    if source != reporter or time is None or not -AHEAD_MAX <= arrived_at - time <= age_max:
        return None
    if event.data.price_version is not None and source != PINNING_SOURCE:
        return None
    partition = partition_of(subject)
    if partition_token != _TOKENS[partition]:
        return None
    return Usage(
        key=(partition, source, event_id),
        partition=partition,
        source=source,
        event_id=event_id,
        subject=subject,
        # What can be read quickly names an account.
        account=subject,
        type=event.type,
        occurred_at=time,
        body_hash=quick.body_hash,
        used=event.data,
        data=quick.data,
        context=None,
        body=message.data,
    )


def _read_forwarded(message: Msg, *, partition_token: str) -> Usage | Letter:
    """What metering sent on itself, or published to hear of: who reported it, and when, was looked at before."""
    headers = message.headers or {}
    try:
        report = _read(message.data, bytes_max=FORWARDED_BYTES_MAX)
    except InvalidEvent as error:
        return dead(message, error.problems)
    account = headers.get(ACCOUNT_HEADER)
    partition = partition_of(account or report.subject)
    if partition_token != token(partition):
        place = f"the account is of partition {token(partition)}, the event came on {partition_token}"
        return dead(message, (Problem("subject", place),), partition=partition)
    occurred_at = stored_at(message) if report.time is None else report.time
    if OCCURRED_AT_HEADER in headers:
        occurred_at = datetime.fromisoformat(headers[OCCURRED_AT_HEADER])
    body_hash = bytes.fromhex(headers[BODY_HASH_HEADER]) if BODY_HASH_HEADER in headers else None
    return _usage(
        report,
        partition=partition,
        occurred_at=occurred_at,
        body_hash=body_hash,
        body=message.data,
        account=account,
        question=headers.get(QUESTION_HEADER),
    )


def dead(message: Msg, problems: Sequence[Problem], *, partition: int | None = None) -> Letter:
    """The dead letter of a message of the usage stream."""
    return letter_of(message, reason=_reason(problems), problems=_as_members(problems), partition=partition)


def stored_at(message: Msg) -> datetime:
    """When the stream took a message: the same at every delivery."""
    return _arrival(message.subject, message.reply)[2]


def partition_token_of(subject: str) -> str:
    """On which partition's subject a usage message came."""
    return subject.split(".", 3)[2]


def reporter_of(subject: str) -> str:
    """Who published a usage message: the last token of its subject, which the server lets nobody else use."""
    return subject.rpartition(".")[2]


def source_of(letter: Letter) -> str:
    """Whose report a dead letter is: who published it, or the source of what metering sent on."""
    reporter = reporter_of(letter.subject)
    if reporter != FORWARDED:
        return reporter
    try:
        return _read(letter.payload, bytes_max=FORWARDED_BYTES_MAX).source
    except InvalidEvent:
        return reporter


def read_report(
    body: bytes,
    *,
    reporter: str,
    received_at: datetime,
    age_max: timedelta = AGE_MAX,
    attributes_max: int | None = None,
    question: str | None = None,
) -> Message:
    """An event reported over HTTP as the message to publish. Raises InvalidEvent with every problem, or TooOld.

    A missing `time` is filled in, and marked as ours: the body hash leaves it out, so that a retry is a repeat.
    `question`: somebody waits to hear what becomes of it, so the stream must not take it for a repeat by itself.
    """
    try:
        report = _read(body)
    except InvalidEvent as error:
        more = _further_problems(body, reporter=reporter, arrived_at=received_at, age_max=age_max)
        raise InvalidEvent((*error.problems, *more)) from error
    occurred_at = report.time
    problems = list(_report_problems(report, reporter=reporter, occurred_at=occurred_at, arrived_at=received_at))
    late = age_problems(occurred_at=occurred_at, arrived_at=received_at, age_max=age_max)
    if SERVER_FILLED in report.extensions:
        problems.append(Problem(SERVER_FILLED, "this attribute is set by ingest alone"))
    if attributes_max is not None and len(report.extensions) > attributes_max:
        said = f"an event has at most {attributes_max} extension attributes, this one has {len(report.extensions)}"
        problems.append(Problem("", said))
    if occurred_at is None:
        body = _with_time(body, received_at)
        if len(body) > EVENT_BYTES_MAX:
            problems.append(Problem("", f"with its time filled in the event has more than {EVENT_BYTES_MAX} bytes"))
    if problems:
        raise InvalidEvent((*problems, *late))
    partition = partition_of(report.subject)
    if question is not None:
        subject = usage_subject(partition=partition, source=FORWARDED)
        message = Message(subject=subject, payload=body, message_id=None, headers={QUESTION_HEADER: question})
    else:
        subject = usage_subject(partition=partition, source=report.source)
        known_by = message_id(report.source, report.id, report.body_hash)
        message = Message(subject=subject, payload=body, message_id=known_by)
    if late:
        raise TooOld(tuple(late), key=(partition, report.source, report.id), message=message)
    return message


def read_binary_report(headers: Collection[tuple[str, str]], data: bytes) -> bytes | None:
    """The event of a request in binary mode in structured form; None if it is not in binary mode. InvalidEvent."""
    attributes = binary_attributes(headers)
    return None if attributes is None else structured(attributes, data)


def together(messages: Sequence[Message]) -> list[Message]:
    """Messages of one event each as messages of as many as may be, of one subject each. Of the same come the same."""
    by_subject: dict[str, list[Message]] = {}
    for message in messages:
        by_subject.setdefault(message.subject, []).append(message)
    found: list[Message] = []
    for subject, alike in by_subject.items():
        if len(alike) == 1:
            found += alike
        else:
            for payload in message_bodies([each.payload for each in alike]):
                found.append(Message(subject, payload, sha256(payload).hexdigest()[:32]))
    return found


def message_id(source: str, event_id: str, body_hash: bytes) -> str:
    """What a stream knows a repeat by, for as long as its window lasts."""
    return sha256(f"{source}\n{event_id}\n".encode() + body_hash).hexdigest()[:32]


def rerouted(stored: Reroute) -> Message:
    """What is sent on, to the partition it belongs to. Repeats are identical, and count once there."""
    headers = {
        OCCURRED_AT_HEADER: stored.occurred_at.astimezone(UTC).isoformat(),
        BODY_HASH_HEADER: stored.body_hash.hex(),
    }
    if stored.account is not None:
        headers[ACCOUNT_HEADER] = stored.account
    place = f"{stored.partition}\n{stored.to}\n{stored.source}\n{stored.event_id}\n"
    return Message(
        subject=usage_subject(partition=stored.to, source=FORWARDED),
        payload=stored.body,
        message_id=f"rerouted.{sha256(place.encode() + stored.body_hash).hexdigest()[:32]}",
        headers=headers,
    )


def redriven(letter: DeadLetter, *, received_at: datetime, age_max: timedelta = AGE_MAX) -> Message:
    """A dead letter of the usage stream as the message to publish anew, on the subject of its account's partition.

    Without a message id: the stream may still know the first one. Raises Unreadable if it would only die again. How old
    it is is reckoned from when it came first, and it keeps that time if it has none.
    """
    if letter.stream != USAGE:
        raise Unreadable(f"a message of {letter.stream} is not usage")
    reporter = reporter_of(letter.subject)
    forwarded = reporter == FORWARDED
    try:
        body = letter.payload if forwarded else _as_structured(letter.headers.items(), letter.payload)
        report = _read(body)
    except InvalidEvent as error:
        raise Unreadable(_reason(error.problems), problems=_as_members(error.problems)) from error
    said = report.time
    # Too old is what was too old then; ahead what is ahead still.
    arrived_at = min(received_at, max(said or letter.received_at, letter.received_at))
    reporter = report.source if forwarded else reporter
    problems = (
        *_report_problems(report, reporter=reporter, occurred_at=said, arrived_at=arrived_at),
        *age_problems(occurred_at=said, arrived_at=arrived_at, age_max=age_max + AGE_TOLERANCE),
    )
    if problems:
        raise Unreadable(_reason(problems), problems=_as_members(problems))
    headers = {OCCURRED_AT_HEADER: (said or letter.received_at.astimezone(UTC)).isoformat()}
    if forwarded:
        headers = {name: value for name, value in letter.headers.items() if name in _OURS} or headers
    partition = partition_of(headers.get(ACCOUNT_HEADER) or report.subject)
    return Message(
        subject=usage_subject(partition=partition, source=FORWARDED), payload=body, message_id=None, headers=headers
    )


_OURS: Final = (ACCOUNT_HEADER, OCCURRED_AT_HEADER, BODY_HASH_HEADER)


def logged_usage(
    *,
    partition: int,
    source: str,
    event_id: str,
    account: str,
    type: str,
    occurred_at: datetime,
    data: str,
    subject: str | None = None,
    context: str | None = None,
    revision: int = 0,
) -> Usage:
    """Use that is in the log already, to be charged now. The log keeps neither its body nor the hash."""
    return Usage(
        key=(partition, source, event_id),
        partition=partition,
        source=source,
        event_id=event_id,
        subject=account if subject is None else subject,
        account=account,
        type=type,
        occurred_at=occurred_at.astimezone(UTC),
        body_hash=b"",
        used=ModelUsed.model_validate_json(data) if type == MODEL_USED else None,
        data=data,
        context=context,
        body=b"",
        revision=revision,
    )


def amended_usage(usage: Usage, data: bytes) -> Usage:
    """The use with other data, to be its next version. Raises InvalidEvent with every problem of the data."""
    said = {
        "specversion": "1.0",
        "id": usage.event_id,
        "source": usage.source,
        "type": usage.type,
        "subject": usage.subject,
        **(msgspec.json.decode(usage.context) if usage.context is not None else {}),
        "data": msgspec.Raw(data),
    }
    event = _checked(msgspec.json.encode(said))
    return msgspec.structs.replace(
        usage,
        used=event.data if isinstance(event, UsageEvent) else None,
        data=data.decode() if data != b"null" else "{}",
        revision=usage.revision + 1,
    )


def staged_usage(body: bytes, *, received_at: datetime, since: datetime, until: datetime) -> Usage:
    """An event of the past that is to be logged, whoever reported it. Raises InvalidEvent with every problem."""
    report = _read(body)
    problems = list(_report_problems(report, reporter=report.source, occurred_at=report.time, arrived_at=received_at))
    if report.time is None:
        problems.append(Problem("time", "an event of the past says when it happened"))
    elif not since <= report.time < until:
        problems.append(Problem("time", f"the time is not from {since.isoformat()} on and before {until.isoformat()}"))
    if not is_account(report.subject):
        problems.append(Problem("subject", "the subject is no account id"))
    if problems or report.time is None:
        raise InvalidEvent(tuple(problems))
    return _usage(report, partition=partition_of(report.subject), occurred_at=report.time, body=body)


def amended_body(body: bytes, data: bytes) -> bytes:
    """An event as it came, with other data. Raises InvalidEvent with every problem of the data."""
    said = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    amended = msgspec.json.encode({**said, "data": msgspec.Raw(data)})
    _checked(amended)
    return amended


def _checked(body: bytes) -> UsageEvent | OtherEvent:
    event, _ = read_usage_event(body, bytes_max=FORWARDED_BYTES_MAX)
    pinned = event.data.price_version if isinstance(event, UsageEvent) else None
    problems = report_problems(
        source=event.source,
        reporter=event.source,
        occurred_at=None,
        arrived_at=_EPOCH,
        price_version=pinned,
    )
    if problems:
        raise InvalidEvent(tuple(problems))
    return event


def waiting_usage(body: bytes, *, occurred_at: datetime, body_hash: bytes) -> Usage:
    """Use that waited for its subject to be mapped, as it came."""
    report = _read(body, bytes_max=FORWARDED_BYTES_MAX)
    return _usage(
        report,
        partition=partition_of(report.subject),
        occurred_at=occurred_at.astimezone(UTC),
        body_hash=body_hash,
        body=body,
    )


def taken_usage(
    *,
    source: str,
    event_id: str,
    subject: str,
    type: str,
    occurred_at: datetime,
    data: str,
    context: str | None,
    body_hash: bytes,
) -> Usage:
    """Use that was logged under a subject which is an alias now: an event that says the same. Its hash is the first's.

    Of its body the log kept what counts, not how it was written.
    """
    said = {
        "specversion": "1.0",
        "id": event_id,
        "source": source,
        "type": type,
        "subject": subject,
        "time": occurred_at.astimezone(UTC).isoformat(),
        **(msgspec.json.decode(context) if context is not None else {}),
        "data": msgspec.Raw(data.encode()),
    }
    return waiting_usage(msgspec.json.encode(said), occurred_at=occurred_at, body_hash=body_hash)


def traceparent_of(usage: Usage) -> str | None:
    """Of which trace its report was a step."""
    if usage.context is None or TRACEPARENT not in usage.context:
        return None
    found = msgspec.json.decode(usage.context).get(TRACEPARENT)
    return found if isinstance(found, str) else None


def read_account_opened(body: bytes) -> AccountOpened:
    """A fact of the ledger. Raises Unreadable."""
    try:
        return AccountOpened.model_validate_json(body)
    except ValidationError as error:
        problems = [
            {"field": ".".join(str(part) for part in found["loc"]), "message": found["msg"]}
            for found in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise Unreadable("not a fact account.opened of the ledger", problems=problems) from error


def _as_structured(headers: Collection[tuple[str, str]], body: bytes) -> bytes:
    attributes = binary_attributes(headers)
    return body if attributes is None else structured(attributes, body)


class _Report(msgspec.Struct, frozen=True, gc=False):
    """An event as it was reported, whichever way it was read. `time` is in UTC; `data` and `context` are JSON."""

    source: str
    id: str
    subject: str
    type: str
    time: datetime | None
    used: ModelUsed | QuickCall | None
    data: str
    body_hash: bytes
    context: str | None = None
    extensions: Mapping[str, object] = {}


class _DataOnly(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"{}")


_DATA_ONLY: Final = msgspec.json.Decoder(_DataOnly)


def _read(body: bytes, *, bytes_max: int = EVENT_BYTES_MAX) -> _Report:
    """The event that a body holds. Raises InvalidEvent with every problem."""
    if (quick := read_quickly(body)) is not None:
        said = quick.event
        return _Report(
            said.source, said.id, said.subject, said.type, quick.time, said.data, quick.data, quick.body_hash
        )
    event, body_hash = read_usage_event(body, bytes_max=bytes_max)
    return _Report(
        event.source,
        event.id,
        event.subject,
        event.type,
        None if event.time is None else event.time.astimezone(UTC),
        event.data if isinstance(event, UsageEvent) else None,
        "{}" if event.data is None else bytes(_DATA_ONLY.decode(body).data).decode(),
        body_hash,
        _context(event),
        event.model_extra or {},
    )


def _usage(
    report: _Report,
    *,
    partition: int,
    occurred_at: datetime,
    body: bytes,
    body_hash: bytes | None = None,
    account: str | None = None,
    question: str | None = None,
) -> Usage:
    source, event_id, subject = report.source, report.id, report.subject
    if account is None:
        account = subject if is_account(subject) else ""
    return Usage(
        key=(partition, source, event_id),
        partition=partition,
        source=source,
        event_id=event_id,
        subject=subject,
        account=account,
        type=report.type,
        occurred_at=occurred_at,
        body_hash=report.body_hash if body_hash is None else body_hash,
        used=report.used,
        data=report.data,
        context=report.context,
        body=body,
        question=question,
    )


def _report_problems(
    report: _Report, *, reporter: str, occurred_at: datetime | None, arrived_at: datetime
) -> Sequence[Problem]:
    return report_problems(
        source=report.source,
        reporter=reporter,
        occurred_at=occurred_at,
        arrived_at=arrived_at,
        price_version=None if report.used is None else report.used.price_version,
    )


def _context(event: UsageEvent | OtherEvent) -> str | None:
    further = dict(event.model_extra or {})
    if event.dataschema is not None:
        further["dataschema"] = event.dataschema
    return msgspec.json.encode(further, order="sorted").decode() if further else None


def _with_time(body: bytes, time: datetime) -> bytes:
    """The event with its time filled in. Of two members with one name the last one counts."""
    text = time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return body.rstrip()[:-1] + f',"time":"{text}","{SERVER_FILLED}":"time"}}'.encode()


_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)


def _further_problems(body: bytes, *, reporter: str, arrived_at: datetime, age_max: timedelta) -> Sequence[Problem]:
    """What is wrong with who reports an unreadable event and when, as far as that can be read."""
    try:
        raw = msgspec.json.decode(body) if len(body) <= EVENT_BYTES_MAX else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    if not isinstance(raw, dict) or not isinstance(raw.get("source"), str):
        return ()
    try:
        occurred_at = _TIME.validate_python(raw.get("time"))
    except ValidationError:
        occurred_at = None
    data = raw.get("data")
    pinned = data.get("price_version") if isinstance(data, dict) and raw.get("type") == MODEL_USED else None
    return (
        *report_problems(
            source=raw["source"],
            reporter=reporter,
            occurred_at=occurred_at,
            arrived_at=arrived_at,
            price_version=pinned if isinstance(pinned, str) else None,
        ),
        *age_problems(occurred_at=occurred_at, arrived_at=arrived_at, age_max=age_max),
    )


def _reason(problems: Sequence[Problem]) -> str:
    text = "; ".join(
        f"{problem.field}: {problem.message}" if problem.field else problem.message for problem in problems
    )
    return text if len(text) <= _REASON_LENGTH_MAX else f"{text[: _REASON_LENGTH_MAX - 1]}…"


def _as_members(problems: Sequence[Problem]) -> list[Mapping[str, str]]:
    return [{"field": problem.field, "message": problem.message} for problem in problems]
