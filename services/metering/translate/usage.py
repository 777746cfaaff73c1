"""An event as somebody said it becomes use, or every problem it has is named: whichever way it came."""

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
from pydantic import TypeAdapter, ValidationError

from contracts.envelope import (
    EVENT_BYTES_MAX,
    OtherEvent,
    Problem,
    UsageEvent,
    binary_attributes,
    is_account,
    read_quickly,
    read_usage_event,
    structured,
)
from contracts.times import Time
from contracts.usage import MODEL_USED, ModelUsed, QuickCall
from services.metering.domain.usage import Usage, age_problems, report_problems

# What metering says of what it sends on, or what somebody waits to hear of. Believed on its own subjects only.
ACCOUNT_HEADER: Final = "Scrip-Account"
OCCURRED_AT_HEADER: Final = "Scrip-Occurred-At"
BODY_HASH_HEADER: Final = "Scrip-Body-Hash"
QUESTION_HEADER: Final = "Scrip-Question"
# With its time filled in, or written anew from the log, an event may be longer than it was.
FORWARDED_BYTES_MAX: Final = 240 << 10
_REASON_LENGTH_MAX: Final = 500


class Report(msgspec.Struct, frozen=True, gc=False):
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


def read_event(body: bytes, *, bytes_max: int = EVENT_BYTES_MAX) -> Report:
    """The event that a body holds. Raises InvalidEvent with every problem."""
    if (usual := read_usual(body)) is not None:
        return usual
    event, body_hash = read_usage_event(body, bytes_max=bytes_max)
    return Report(
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


def read_usual(body: bytes) -> Report | None:
    """The event that a body holds, if it is as most are; its subject is an account then."""
    if (quick := read_quickly(body)) is None:
        return None
    said = quick.event
    return Report(said.source, said.id, said.subject, said.type, quick.time, said.data, quick.data, quick.body_hash)


class _DataOnly(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"{}")


_DATA_ONLY: Final = msgspec.json.Decoder(_DataOnly)


def _context(event: UsageEvent | OtherEvent) -> str | None:
    further = dict(event.model_extra or {})
    if event.dataschema is not None:
        further["dataschema"] = event.dataschema
    return msgspec.json.encode(further, order="sorted").decode() if further else None


def usage_of(
    report: Report,
    *,
    partition: int,
    occurred_at: datetime,
    body: bytes,
    body_hash: bytes | None = None,
    account: str | None = None,
    question: str | None = None,
) -> Usage:
    """What was reported as use of a partition, of the account given or else of the one that its subject names."""
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


def problems_of(
    report: Report, *, reporter: str, occurred_at: datetime | None, arrived_at: datetime
) -> Sequence[Problem]:
    """What is wrong with a readable event because of who reports it, or when."""
    return report_problems(
        source=report.source,
        reporter=reporter,
        occurred_at=occurred_at,
        arrived_at=arrived_at,
        price_version=None if report.used is None else report.used.price_version,
    )


def further_problems(body: bytes, *, reporter: str, arrived_at: datetime, age_max: timedelta) -> Sequence[Problem]:
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


_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)


def in_structured_form(headers: Collection[tuple[str, str]], body: bytes) -> bytes:
    """What came, with attributes in its headers (binary mode) or without, as one JSON object. Raises InvalidEvent."""
    attributes = binary_attributes(headers)
    return body if attributes is None else structured(attributes, body)


def reason_of(problems: Sequence[Problem]) -> str:
    """Problems as one sentence."""
    text = "; ".join(
        f"{problem.field}: {problem.message}" if problem.field else problem.message for problem in problems
    )
    return text if len(text) <= _REASON_LENGTH_MAX else f"{text[: _REASON_LENGTH_MAX - 1]}…"


def as_members(problems: Sequence[Problem]) -> list[Mapping[str, str]]:
    """Problems as members of a letter."""
    return [{"field": problem.field, "message": problem.message} for problem in problems]
