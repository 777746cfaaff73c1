"""Usage in as CloudEvents: on disk in the stream when 204 is answered."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from nats.aio.client import Client

from contracts.envelope import InvalidEvent
from contracts.streams import USAGE
from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.problems import Problem
from services.kit.publish import Message, PublishFailed, PublishRefused, publish_batch
from services.metering import translate
from services.metering.routes.backend import RETRY_AFTER_SECONDS, Backend

BATCH_EVENTS_MAX: Final = 1_000

_SINGLE: Final = "application/cloudevents+json"
_BATCH: Final = "application/cloudevents-batch+json"
_PLAIN: Final = "application/json"


def events_router(backend: Callable[[], Backend]) -> APIRouter:
    """Reporting use."""
    router = APIRouter(tags=["usage"])
    reporter = Depends(require("usage:write"))

    @router.post(
        "/api/v1/events",
        status_code=204,
        responses={
            400: {"description": "Something is wrong with some events; all of it is named, and nothing was taken"},
            413: {"description": "The body, or the batch, is too large"},
            415: {"description": "The content type is none of those of CloudEvents in JSON"},
            503: {"description": "The events may or may not have been taken: sending them again is safe"},
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    _SINGLE: {"schema": {"type": "object"}},
                    _BATCH: {"schema": {"type": "array", "items": {"type": "object"}, "maxItems": BATCH_EVENTS_MAX}},
                    _PLAIN: {"schema": {"oneOf": [{"type": "object"}, {"type": "array"}]}},
                },
            }
        },
    )
    async def report_usage(request: Request, principal: Principal = reporter) -> Response:
        """Take usage events (CloudEvents 1.0). `source` is the caller's own name; all of a batch is taken, or nothing.

        Sending an event again changes nothing, whatever became of the first time.
        """
        bodies = _split(await request.body(), content_type=request.headers.get("content-type", ""))
        messages = _messages(bodies, reporter=principal.name, received_at=now())
        await _publish(backend().nats, messages)
        return Response(status_code=204)

    return router


def _split(body: bytes, *, content_type: str) -> Sequence[bytes]:
    """The events in a body, each as its own JSON. Problem 400, 413 or 415."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in (_SINGLE, _BATCH, _PLAIN):
        raise Problem(
            415,
            "unsupported_media_type",
            f"the content type is {media_type or 'missing'!r}; it must be one of {_SINGLE}, {_BATCH}, {_PLAIN}",
        )
    is_array = body.lstrip()[:1] == b"["
    if media_type == _SINGLE or (media_type == _PLAIN and not is_array):
        return [body]
    try:
        bodies = msgspec.json.decode(body, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "not_a_batch", f"the body is not a JSON array of events: {error}") from error
    if not bodies:
        raise Problem(400, "empty_batch", "the batch holds no event")
    if len(bodies) > BATCH_EVENTS_MAX:
        raise Problem(413, "batch_too_large", f"the batch holds {len(bodies)} events, more than {BATCH_EVENTS_MAX}")
    return [bytes(each) for each in bodies]


def _messages(bodies: Sequence[bytes], *, reporter: str, received_at: datetime) -> list[Message]:
    """The messages to publish, repeats collapsed. Problem 400 names everything that is wrong with every event."""
    messages: dict[str | None, Message] = {}
    errors: list[Mapping[str, Any]] = []
    bad = 0
    for index, body in enumerate(bodies):
        try:
            message = translate.read_report(body, reporter=reporter, received_at=received_at)
        except InvalidEvent as error:
            bad += 1
            errors.extend(
                {"index": index, "field": problem.field, "detail": problem.message} for problem in error.problems
            )
        else:
            messages.setdefault(message.message_id, message)
    if errors:
        raise Problem(
            400,
            "invalid_events",
            f"{bad} of {len(bodies)} events cannot be taken, and nothing was: see errors",
            errors=errors,
        )
    return list(messages.values())


async def _publish(client: Client, messages: Sequence[Message]) -> None:
    """Publish, or Problem 503. What was published all the same is known as a repeat when it is sent again."""
    retry = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    if not client.is_connected:
        raise Problem(503, "stream_away", "the stream is away and nothing was taken: send it again", headers=retry)
    try:
        await publish_batch(client, stream=USAGE, messages=messages)
    except PublishFailed as error:
        reason = next(iter(error.failed.values()))
        match error:
            case PublishRefused() if not error.confirmed:
                said = f"the stream took nothing: {reason}"
            case _:
                said = f"the stream did not confirm all events: {reason}; sending them again is safe"
        raise Problem(503, "not_confirmed", said, headers=retry) from error
