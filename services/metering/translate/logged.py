"""Use that was logged or kept before becomes usage again: to be charged, amended, or taken in."""

from datetime import UTC, datetime
from typing import Final

import msgspec

from contracts.envelope import (
    TRACEPARENT,
    InvalidEvent,
    OtherEvent,
    Problem,
    UsageEvent,
    is_account,
    read_usage_event,
)
from contracts.partition import partition_of
from contracts.usage import MODEL_USED, ModelUsed
from services.metering.domain.usage import Usage, report_problems
from services.metering.translate.usage import FORWARDED_BYTES_MAX, problems_of, read_event, usage_of

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


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


def staged_usage(body: bytes, *, received_at: datetime, since: datetime, until: datetime) -> Usage:
    """An event of the past that is to be logged, whoever reported it. Raises InvalidEvent with every problem."""
    report = read_event(body)
    problems = list(problems_of(report, reporter=report.source, occurred_at=report.time, arrived_at=received_at))
    if report.time is None:
        problems.append(Problem("time", "an event of the past says when it happened"))
    elif not since <= report.time < until:
        problems.append(Problem("time", f"the time is not from {since.isoformat()} on and before {until.isoformat()}"))
    if not is_account(report.subject):
        problems.append(Problem("subject", "the subject is no account id"))
    if problems or report.time is None:
        raise InvalidEvent(tuple(problems))
    return usage_of(report, partition=partition_of(report.subject), occurred_at=report.time, body=body)


def waiting_usage(body: bytes, *, occurred_at: datetime, body_hash: bytes) -> Usage:
    """Use that waited for its subject to be mapped, as it came."""
    report = read_event(body, bytes_max=FORWARDED_BYTES_MAX)
    return usage_of(
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
