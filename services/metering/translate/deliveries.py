"""Messages of the usage stream become usage, are sent on, or become letters."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

from nats.aio.msg import Msg
from pydantic import ValidationError

from contracts.envelope import InvalidEvent, Problem, events_of
from contracts.ledger import AccountOpened
from contracts.partition import PARTITION_COUNT, partition_of, token
from contracts.streams import FORWARDED
from services.kit.dead_letters import Letter, Unreadable, letter_of
from services.metering.domain.usage import (
    AGE_MAX,
    AGE_TOLERANCE,
    AHEAD_MAX,
    PINNING_SOURCE,
    Reroute,
    Usage,
    age_problems,
    reroute,
)
from services.metering.translate.usage import (
    ACCOUNT_HEADER,
    BODY_HASH_HEADER,
    FORWARDED_BYTES_MAX,
    OCCURRED_AT_HEADER,
    QUESTION_HEADER,
    as_members,
    further_problems,
    in_structured_form,
    problems_of,
    read_event,
    read_usual,
    reason_of,
    usage_of,
)

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


@dataclass(frozen=True, slots=True)
class Late:
    """Use that is too old: a dead letter, unless it is a repeat of what came in time."""

    usage: Usage
    letter: Letter


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


def _read_usual(message: Msg, arrived: "_Arrival", *, age_max: timedelta) -> Usage | None:
    """An event with which nothing is wrong, as with most; None of one that is to be looked at closely."""
    if (headers := message.headers) is not None and not _OF_NATS.issuperset(headers):
        return None
    report = read_usual(message.data)
    if report is None or (time := report.time) is None:
        return None
    partition_token, reporter, arrived_at = arrived
    if report.source != reporter or not -AHEAD_MAX <= arrived_at - time <= age_max:
        return None
    if report.used is not None and report.used.price_version is not None and reporter != PINNING_SOURCE:
        return None
    subject = report.subject
    partition = partition_of(subject)
    if partition_token != _TOKENS[partition]:
        return None
    return usage_of(report, partition=partition, occurred_at=time, body=message.data, account=subject)


def _read_closely(message: Msg, arrived: "_Arrival", *, age_max: timedelta) -> Usage | Reroute | Late | Letter:
    partition_token, reporter, arrived_at = arrived
    body = message.data
    try:
        if (headers := message.headers) is not None and not _OF_NATS.issuperset(headers):
            body = in_structured_form(headers.items(), body)
        report = read_event(body)
    except InvalidEvent as error:
        further = further_problems(body, reporter=reporter, arrived_at=arrived_at, age_max=age_max)
        return dead(message, (*error.problems, *further))
    occurred_at = arrived_at if report.time is None else report.time
    partition = partition_of(report.subject)
    problems = problems_of(report, reporter=reporter, occurred_at=occurred_at, arrived_at=arrived_at)
    late = age_problems(occurred_at=occurred_at, arrived_at=arrived_at, age_max=age_max)
    if problems:
        return dead(message, (*problems, *late), partition=partition)
    usage = usage_of(report, partition=partition, occurred_at=occurred_at, body=body)
    if late:
        return Late(usage=usage, letter=dead(message, late, partition=partition))
    if partition_token != _TOKENS[partition]:
        came_on = _PARTITIONS.get(partition_token, partition)
        return reroute(usage, partition=came_on, to=partition, account=None)
    return usage


def _read_forwarded(message: Msg, *, partition_token: str) -> Usage | Letter:
    """What metering sent on itself, or published to hear of: who reported it, and when, was looked at before."""
    headers = message.headers or {}
    try:
        report = read_event(message.data, bytes_max=FORWARDED_BYTES_MAX)
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
    return usage_of(
        report,
        partition=partition,
        occurred_at=occurred_at,
        body_hash=body_hash,
        body=message.data,
        account=account,
        question=headers.get(QUESTION_HEADER),
    )


# Of a message: on which partition's subject it came, who reported it, and when the stream took it.
_Arrival = tuple[str, str, datetime]


# A message may have hundreds of events.
@lru_cache(maxsize=256)
def _arrival(subject: str, reply: str) -> _Arrival:
    _, _, partition_token, reporter = subject.split(".")
    tokens = reply.split(".")
    stored_at_ns = int(tokens[_PLAIN_TIME if len(tokens) == _PLAIN_TOKENS else _TIME_BEHIND_DOMAIN])
    return partition_token, reporter, _EPOCH + timedelta(microseconds=stored_at_ns // 1000)


def dead(message: Msg, problems: Sequence[Problem], *, partition: int | None = None) -> Letter:
    """The dead letter of a message of the usage stream."""
    return letter_of(message, reason=reason_of(problems), problems=as_members(problems), partition=partition)


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
        return read_event(letter.payload, bytes_max=FORWARDED_BYTES_MAX).source
    except InvalidEvent:
        return reporter


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
