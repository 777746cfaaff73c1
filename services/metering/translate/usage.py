"""Deliveries and HTTP bodies become usage, messages to publish, or letters."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
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
    Problem,
    UsageEvent,
    read_usage_event,
)
from contracts.ledger import AccountOpened
from contracts.partition import partition_of
from contracts.streams import USAGE, usage_subject
from contracts.times import Time
from contracts.usage import ModelUsed
from services.kit.dead_letters import DeadLetter, Letter, Unreadable, letter_of
from services.kit.publish import Message
from services.kit.redelivery import place_of
from services.metering.domain.usage import Usage, place_problems, report_problems

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_REASON_LENGTH_MAX: Final = 500


def read_delivery(message: Msg, *, received_at: datetime) -> Usage | Letter:
    """A message of the usage stream as usage, or as a dead letter that names all that is wrong with it."""
    _, _, partition_token, reporter = message.subject.split(".")
    body = message.data
    try:
        event, found_hash = read_usage_event(body)
        occurred_at = stored_at(message) if event.time is None else event.time.astimezone(UTC)
        partition = partition_of(event.subject)
        problems = (
            *_report_problems(event, reporter=reporter, occurred_at=occurred_at, received_at=received_at),
            *place_problems(partition=partition, partition_token=partition_token),
        )
    except InvalidEvent as error:
        problems = (*error.problems, *_further_problems(body, reporter=reporter, received_at=received_at))
        return dead(message, problems)
    if problems:
        return dead(message, problems, partition=partition)
    return _usage(event, partition=partition, occurred_at=occurred_at, found_hash=found_hash, body=body)


def dead(message: Msg, problems: Sequence[Problem], *, partition: int | None = None) -> Letter:
    """The dead letter of a message of the usage stream."""
    return letter_of(message, reason=_reason(problems), problems=_as_members(problems), partition=partition)


def stored_at(message: Msg) -> datetime:
    """When the stream took a message: the same at every delivery."""
    return _EPOCH + timedelta(microseconds=place_of(message).stored_at_ns // 1000)


def reporter_of(subject: str) -> str:
    """Who published a usage message: the last token of its subject, which the server lets nobody else use."""
    return subject.rpartition(".")[2]


def read_report(body: bytes, *, reporter: str, received_at: datetime) -> Message:
    """An event reported over HTTP as the message to publish. Raises InvalidEvent with every problem.

    A missing `time` is filled in, and marked as ours: the body hash leaves it out, so that a retry is a repeat.
    """
    try:
        event, found_hash = read_usage_event(body)
    except InvalidEvent as error:
        more = _further_problems(body, reporter=reporter, received_at=received_at)
        raise InvalidEvent((*error.problems, *more)) from error
    occurred_at = None if event.time is None else event.time.astimezone(UTC)
    problems = list(_report_problems(event, reporter=reporter, occurred_at=occurred_at, received_at=received_at))
    if SERVER_FILLED in (event.model_extra or {}):
        problems.append(Problem(SERVER_FILLED, "this attribute is set by ingest alone"))
    if occurred_at is None:
        body = _with_time(body, received_at)
        if len(body) > EVENT_BYTES_MAX:
            problems.append(Problem("", f"with its time filled in the event has more than {EVENT_BYTES_MAX} bytes"))
    if problems:
        raise InvalidEvent(tuple(problems))
    return Message(
        subject=usage_subject(partition=partition_of(event.subject), source=event.source),
        payload=body,
        message_id=message_id(event, found_hash),
    )


def message_id(event: UsageEvent, found_hash: bytes) -> str:
    """What a stream knows a repeat by, for as long as its window lasts."""
    return sha256(f"{event.source}\n{event.id}\n".encode() + found_hash).hexdigest()[:32]


def redriven(letter: DeadLetter, *, received_at: datetime) -> Message:
    """A dead letter of the usage stream as the message to publish anew, on the subject of its account's partition.

    Without a message id: the stream may still know the first one. Raises Unreadable if it would only die again.
    """
    if letter.stream != USAGE:
        raise Unreadable(f"a message of {letter.stream} is not usage")
    reporter = reporter_of(letter.subject)
    body = letter.payload
    try:
        event, _ = read_usage_event(body)
        occurred_at = None if event.time is None else event.time.astimezone(UTC)
    except InvalidEvent as error:
        raise Unreadable(_reason(error.problems), problems=_as_members(error.problems)) from error
    problems = _report_problems(event, reporter=reporter, occurred_at=occurred_at, received_at=received_at)
    if problems:
        raise Unreadable(_reason(problems), problems=_as_members(problems))
    return Message(
        subject=usage_subject(partition=partition_of(event.subject), source=reporter),
        # Its time is when it came first, not when somebody looked after it.
        payload=_with_time(body, letter.received_at) if occurred_at is None else body,
        message_id=None,
    )


def logged_usage(
    *, partition: int, source: str, event_id: str, account: str, type: str, occurred_at: datetime, data: str
) -> Usage:
    """Use that is in the log already, to be charged now. The log keeps neither its body nor the hash."""
    return Usage(
        key=(partition, source, event_id),
        partition=partition,
        source=source,
        event_id=event_id,
        account=account,
        type=type,
        occurred_at=occurred_at.astimezone(UTC),
        body_hash=b"",
        used=ModelUsed.model_validate_json(data),
        data=data,
        context=None,
        body=b"",
    )


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


class _DataOnly(msgspec.Struct):
    data: msgspec.Raw


_DATA_ONLY: Final = msgspec.json.Decoder(_DataOnly)


def _usage(event: UsageEvent, *, partition: int, occurred_at: datetime, found_hash: bytes, body: bytes) -> Usage:
    return Usage(
        key=(partition, event.source, event.id),
        partition=partition,
        source=event.source,
        event_id=event.id,
        account=event.subject,
        type=event.type,
        occurred_at=occurred_at,
        body_hash=found_hash,
        used=event.data,
        data=bytes(_DATA_ONLY.decode(body).data).decode(),
        context=_context(event),
        body=body,
    )


def _report_problems(
    event: UsageEvent, *, reporter: str, occurred_at: datetime | None, received_at: datetime
) -> Sequence[Problem]:
    return report_problems(
        source=event.source,
        reporter=reporter,
        occurred_at=occurred_at,
        received_at=received_at,
        price_version=event.data.price_version,
    )


def _context(event: UsageEvent) -> str | None:
    further = dict(event.model_extra or {})
    if event.dataschema is not None:
        further["dataschema"] = event.dataschema
    return msgspec.json.encode(further, order="sorted").decode() if further else None


def _with_time(body: bytes, time: datetime) -> bytes:
    """The event with its time filled in. Of two members with one name the last one counts."""
    text = time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return body.rstrip()[:-1] + f',"time":"{text}","{SERVER_FILLED}":"time"}}'.encode()


_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)


def _further_problems(body: bytes, *, reporter: str, received_at: datetime) -> Sequence[Problem]:
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
    pinned = data.get("price_version") if isinstance(data, dict) else None
    return report_problems(
        source=raw["source"],
        reporter=reporter,
        occurred_at=occurred_at,
        received_at=received_at,
        price_version=pinned if isinstance(pinned, str) else None,
    )


def _reason(problems: Sequence[Problem]) -> str:
    text = "; ".join(
        f"{problem.field}: {problem.message}" if problem.field else problem.message for problem in problems
    )
    return text if len(text) <= _REASON_LENGTH_MAX else f"{text[: _REASON_LENGTH_MAX - 1]}…"


def _as_members(problems: Sequence[Problem]) -> list[Mapping[str, str]]:
    return [{"field": problem.field, "message": problem.message} for problem in problems]
