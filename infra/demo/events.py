"""A request of the trace as the usage event that its service would report, and as the message that carries it."""

from datetime import datetime
from hashlib import sha256
from typing import Final

import msgspec

from contracts.partition import partition_of
from contracts.streams import usage_subject
from contracts.usage import MODEL_USED
from infra.demo.trace import Request, account_of
from services.kit.publish import Message

SOURCE: Final = "demo"
PROVIDER: Final = "openai"
MODEL: Final = "gpt-4o-mini"


def event_id(number: int, *, edition: str = "") -> str:
    """The id of row `number`: the same in every run, so that a repeat is known as one."""
    return f"azure-conv-2023{'-' + edition if edition else ''}:{number}"


def usage_event(request: Request, *, anchor: datetime, edition: str = "") -> dict[str, object]:
    """The CloudEvent of a request that happened `after_first` the anchor."""
    return {
        "specversion": "1.0",
        "id": event_id(request.number, edition=edition),
        "source": SOURCE,
        "type": MODEL_USED,
        "subject": account_of(request.number, edition=edition),
        "time": (anchor + request.after_first).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "data": {
            "provider": PROVIDER,
            "model": MODEL,
            "input_tokens": request.input_tokens,
            "output_tokens": request.output_tokens,
        },
    }


def message(request: Request, *, anchor: datetime, edition: str = "", sending: int = 0) -> Message:
    """The message to publish. Each `sending` has a message id of its own: the server's window must not help dedupe."""
    body = msgspec.json.encode(usage_event(request, anchor=anchor, edition=edition), order="sorted")
    partition = partition_of(account_of(request.number, edition=edition))
    content = sha256(f"{SOURCE}/{event_id(request.number, edition=edition)}/".encode() + body).hexdigest()[:32]
    return Message(
        subject=usage_subject(partition=partition, source=SOURCE),
        payload=body,
        message_id=f"{content}.{sending}" if sending else content,
    )
