"""What is reported over HTTP, sent on or sent anew becomes messages to publish."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final

from contracts.envelope import (
    EVENT_BYTES_MAX,
    SERVER_FILLED,
    InvalidEvent,
    Problem,
    binary_attributes,
    message_bodies,
    structured,
)
from contracts.partition import partition_of
from contracts.streams import FORWARDED, USAGE, usage_subject
from services.kit.dead_letters import DeadLetter, Unreadable
from services.kit.publish import Message
from services.metering.domain.usage import AGE_MAX, AGE_TOLERANCE, Key, Reroute, age_problems
from services.metering.translate.deliveries import reporter_of
from services.metering.translate.usage import (
    ACCOUNT_HEADER,
    BODY_HASH_HEADER,
    OCCURRED_AT_HEADER,
    QUESTION_HEADER,
    as_members,
    further_problems,
    in_structured_form,
    problems_of,
    read_event,
    reason_of,
)


class TooOld(InvalidEvent):
    """A report that is too old, and nothing else: refused, unless it is a repeat. `message` is what to publish then."""

    def __init__(self, problems: tuple[Problem, ...], *, key: Key, message: Message) -> None:
        super().__init__(problems)
        self.key = key
        self.message = message


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
        report = read_event(body)
    except InvalidEvent as error:
        more = further_problems(body, reporter=reporter, arrived_at=received_at, age_max=age_max)
        raise InvalidEvent((*error.problems, *more)) from error
    occurred_at = report.time
    problems = list(problems_of(report, reporter=reporter, occurred_at=occurred_at, arrived_at=received_at))
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


def _with_time(body: bytes, time: datetime) -> bytes:
    """The event with its time filled in. Of two members with one name the last one counts."""
    text = time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return body.rstrip()[:-1] + f',"time":"{text}","{SERVER_FILLED}":"time"}}'.encode()


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
        body = letter.payload if forwarded else in_structured_form(letter.headers.items(), letter.payload)
        report = read_event(body)
    except InvalidEvent as error:
        raise Unreadable(reason_of(error.problems), problems=as_members(error.problems)) from error
    said = report.time
    # Too old is what was too old then; ahead what is ahead still.
    arrived_at = min(received_at, max(said or letter.received_at, letter.received_at))
    reporter = report.source if forwarded else reporter
    problems = (
        *problems_of(report, reporter=reporter, occurred_at=said, arrived_at=arrived_at),
        *age_problems(occurred_at=said, arrived_at=arrived_at, age_max=age_max + AGE_TOLERANCE),
    )
    if problems:
        raise Unreadable(reason_of(problems), problems=as_members(problems))
    headers = {OCCURRED_AT_HEADER: (said or letter.received_at.astimezone(UTC)).isoformat()}
    if forwarded:
        headers = {name: value for name, value in letter.headers.items() if name in _OURS} or headers
    partition = partition_of(headers.get(ACCOUNT_HEADER) or report.subject)
    return Message(
        subject=usage_subject(partition=partition, source=FORWARDED), payload=body, message_id=None, headers=headers
    )


_OURS: Final = (ACCOUNT_HEADER, OCCURRED_AT_HEADER, BODY_HASH_HEADER)
