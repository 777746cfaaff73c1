"""Usage events: CloudEvents 1.0, whose subject is the account and whose source is whoever reports.

An event is given its id and time when it is reported, so that however late it arrives, and however often, it is the
same event of the same moment.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID
from zlib import crc32

from scrip_client.errors import InvalidEvent

EVENT_BYTES_MAX: Final = 64 << 10
MODEL_USED: Final = "scrip.model.used.v1"

_PARTITIONS: Final = 64
_REQUIRED: Final = ("id", "source", "type", "subject")


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEvent:
    """One use of one resource by one account.

    `data` is a JSON object; of a use that was held for it names the `hold`. Without `id` and `time` it gets both when
    it is reported. `attributes` are CloudEvents extension attributes, `traceparent` for instance.
    """

    account: str
    type: str
    data: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None
    time: datetime | None = None
    attributes: Mapping[str, str | int | bool] = field(default_factory=dict)


def model_used(
    *, account: str, provider: str, model: str, input_tokens: int, output_tokens: int, **more: Any
) -> UsageEvent:
    """One call of a model. `more`: `hold`, `feature`, `own_key`, `attributes`, as Scrip's event catalogue has them."""
    data = {"provider": provider, "model": model, "input_tokens": input_tokens, "output_tokens": output_tokens}
    return UsageEvent(account=account, type=MODEL_USED, data=data | more)


def encode(event: UsageEvent | Mapping[str, Any], *, source: str) -> tuple[str, bytes]:
    """The id and the JSON of an event, with what it lacks filled in. A mapping is a CloudEvent. Raises InvalidEvent."""
    if not isinstance(event, UsageEvent | Mapping):
        raise InvalidEvent(f"a usage event is a UsageEvent or a mapping, not {type(event).__name__}")
    cloud_event = _cloud_event(event) if isinstance(event, UsageEvent) else dict(event)
    cloud_event.setdefault("specversion", "1.0")
    cloud_event.setdefault("source", source)
    if cloud_event.get("id") is None:
        cloud_event["id"] = new_id()
    if cloud_event.get("time") is None:
        cloud_event["time"] = datetime.now(UTC)
    if isinstance(cloud_event["time"], datetime):
        cloud_event["time"] = _time_text(cloud_event["time"])
    for name in _REQUIRED:
        if not isinstance(cloud_event.get(name), str) or not cloud_event[name]:
            what = "subject, the account" if name == "subject" else name
            raise InvalidEvent(f"a usage event has a text as its {what}")
    if "data" in cloud_event:
        if not isinstance(cloud_event["data"], Mapping):
            raise InvalidEvent("the data of a usage event is an object")
        cloud_event["data"] = dict(cloud_event["data"])
    try:
        body = json.dumps(cloud_event, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEvent(f"the event is not JSON: {error}") from error
    if len(body) > EVENT_BYTES_MAX:
        raise InvalidEvent(f"an event has at most {EVENT_BYTES_MAX} bytes, this one has {len(body)}")
    return cloud_event["id"], body


def new_id() -> str:
    """A new id for an event: a UUIDv7, so that ids sort by time."""
    return str(_uuid7())


def new_hold_id(account: str) -> str:
    """The id of a new hold on `account`, made by whoever is going to place it: `hold_07_<uuidv7>`."""
    root = account.partition("/")[0]
    return f"hold_{crc32(root.encode()) % _PARTITIONS:02d}_{_uuid7()}"


def _cloud_event(event: UsageEvent) -> dict[str, Any]:
    return {
        **event.attributes,
        "id": event.id,
        "type": event.type,
        "subject": event.account,
        "time": event.time,
        "data": event.data,
    }


def _time_text(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise InvalidEvent("the time of an event has an offset")
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _uuid7() -> UUID:
    value = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    return UUID(int=value & ~(0x3 << 62) | 0x2 << 62)
