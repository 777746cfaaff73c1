"""Usage in as CloudEvents: on disk in the stream when 204 is answered."""

import asyncio
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from nats.aio.client import Client
from pydantic import BaseModel

from contracts.envelope import InvalidEvent
from contracts.streams import USAGE
from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.ids import new_uuid7
from services.kit.problems import Problem
from services.kit.publish import Message, PublishFailed, PublishRefused, publish_batch
from services.metering import store, translate
from services.metering.routes.backend import RETRY_AFTER_SECONDS, Backend, IngestLimits, connection

# How long it may take to hear what became of a report; and how often that is asked.
ANSWER_SECONDS_MAX: Final = 10.0
ANSWER_POLL_SECONDS: Final = 0.05
# Of one compressed body: each is inflated by itself.
GZIP_MEMBERS_MAX: Final = 16

_SINGLE: Final = "application/cloudevents+json"
_BATCH: Final = "application/cloudevents-batch+json"
_PLAIN: Final = "application/json"


class ReportedEvent(BaseModel):
    """What became of one event of a report. Pending: it is on disk, and not looked at yet."""

    index: int
    outcome: Literal["new", "duplicate", "conflicting", "pending"]


class Report(BaseModel):
    """What became of a report, in the order of its events."""

    events: list[ReportedEvent]


def events_router(backend: Callable[[], Backend], *, limits: IngestLimits) -> APIRouter:
    """Reporting use."""
    router = APIRouter(tags=["usage"])
    reporter = Depends(require("usage:write"))

    @router.post(
        "/api/v1/events",
        status_code=204,
        responses={
            200: {"model": Report, "description": "What became of each event, if that was asked for with `debug`"},
            400: {"description": "Something is wrong with some events; all of it is named, and nothing was taken"},
            413: {"description": "The body, as sent or inflated, or the batch is too large"},
            415: {"description": "The content type is none of those of CloudEvents in JSON, or the encoding not gzip"},
            503: {"description": "The events may or may not have been taken: sending them again is safe"},
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    _SINGLE: {"schema": {"type": "object"}},
                    _BATCH: {
                        "schema": {"type": "array", "items": {"type": "object"}, "maxItems": limits.batch_events_max}
                    },
                    _PLAIN: {"schema": {"oneOf": [{"type": "object"}, {"type": "array"}]}},
                },
            }
        },
    )
    async def report_usage(
        request: Request,
        *,
        debug: Annotated[bool, Query(description="Wait until the events are looked at, and say what they are")] = False,
        principal: Principal = reporter,
    ) -> Response:
        """Take usage events (CloudEvents 1.0). `source` is the caller's own name; all of a batch is taken, or nothing.

        Sending an event again changes nothing, whatever became of the first time. With `ce-` headers the body is the
        data of one event (binary mode).
        """
        body = _inflated(
            await request.body(),
            encoding=request.headers.get("content-encoding", ""),
            bytes_max=limits.body_bytes_max,
        )
        bodies = _split(body, headers=request.headers.items(), batch_events_max=limits.batch_events_max)
        asked = f"{new_uuid7()}" if debug else None
        messages = await _messages(
            backend, bodies, reporter=principal.name, received_at=now(), limits=limits, asked=asked
        )
        if asked is None:
            await _publish(backend().nats, translate.together(messages))
            return Response(status_code=204)
        await _publish(backend().nats, messages)
        return JSONResponse((await _report(backend(), messages, asked=asked)).model_dump())

    return router


def _inflated(body: bytes, *, encoding: str, bytes_max: int) -> bytes:
    """The body without its content encoding. Problem 400, 413 or 415."""
    match encoding.strip().lower():
        case "" | "identity":
            return body
        case "gzip" | "x-gzip":
            pass
        case other:
            raise Problem(
                415,
                "unsupported_content_encoding",
                f"the content encoding is {other!r}; it must be gzip, or none",
                headers={"Accept-Encoding": "gzip, identity"},
            )
    found = bytearray()
    for _ in range(GZIP_MEMBERS_MAX):
        inflater = zlib.decompressobj(wbits=31)
        try:
            found += inflater.decompress(body, bytes_max + 1 - len(found))
        except zlib.error as error:
            raise Problem(400, "not_gzip", f"the body is not gzip: {error}") from error
        if len(found) > bytes_max:
            raise Problem(413, "body_too_large", f"the inflated body has more than {bytes_max} bytes")
        if not inflater.eof:
            raise Problem(400, "not_gzip", "the body is not all of a gzip stream")
        body = inflater.unused_data
        if not body:
            return bytes(found)
    raise Problem(400, "not_gzip", f"the body has more than {GZIP_MEMBERS_MAX} gzip members")


def _split(body: bytes, *, headers: Collection[tuple[str, str]], batch_events_max: int) -> Sequence[bytes]:
    """The events in a body, each as its own JSON. Problem 400, 413 or 415."""
    content_type = next((value for name, value in headers if name.lower() == "content-type"), "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == _PLAIN or not (media_type or body):
        try:
            binary = translate.read_binary_report(headers, body)
        except InvalidEvent as error:
            raise _invalid_events(_errors(0, error), bad=1, events=1) from error
        if binary is not None:
            return [binary]
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
    if len(bodies) > batch_events_max:
        raise Problem(413, "batch_too_large", f"the batch holds {len(bodies)} events, more than {batch_events_max}")
    return [bytes(each) for each in bodies]


async def _messages(
    backend: Callable[[], Backend],
    bodies: Sequence[bytes],
    *,
    reporter: str,
    received_at: datetime,
    limits: IngestLimits,
    asked: str | None,
) -> list[Message]:
    """The messages to publish, repeats collapsed unless somebody asks what becomes of each.

    Problem 400 names everything that is wrong with every event.
    """
    messages: dict[int, Message] = {}
    refused: dict[int, InvalidEvent] = {}
    for index, body in enumerate(bodies):
        try:
            messages[index] = translate.read_report(
                body,
                reporter=reporter,
                received_at=received_at,
                age_max=limits.age_max,
                attributes_max=limits.attributes_max,
                question=None if asked is None else _question(asked, index),
            )
        except InvalidEvent as error:
            refused[index] = error
    late = {index: error for index, error in refused.items() if isinstance(error, translate.TooOld)}
    if late:
        async with connection(backend()) as connected:
            seen = await store.find_seen(connected, {error.key for error in late.values()})
        for index, each in late.items():
            if each.key in seen:
                messages[index] = each.message
                del refused[index]
    if refused:
        errors = [found for index, invalid in refused.items() for found in _errors(index, invalid)]
        raise _invalid_events(errors, bad=len(refused), events=len(bodies))
    collapsed: dict[str | int, Message] = {}
    for index in sorted(messages):
        collapsed.setdefault(messages[index].message_id or index, messages[index])
    return list(collapsed.values())


def _question(asked: str, index: int) -> str:
    return f"{asked}:{index}"


def _errors(index: int, error: InvalidEvent) -> list[Mapping[str, Any]]:
    return [{"index": index, "field": problem.field, "detail": problem.message} for problem in error.problems]


def _invalid_events(errors: Sequence[Mapping[str, Any]], *, bad: int, events: int) -> Problem:
    said = f"{bad} of {events} events cannot be taken, and nothing was: see errors"
    return Problem(400, "invalid_events", said, errors=errors)


async def _report(backend: Backend, messages: Sequence[Message], *, asked: str) -> Report:
    """Wait until the events of a report have been looked at, for a while, and say what became of each."""
    # The partition is a token of the subject.
    waiting = {(int(each.subject.split(".")[2]), _question(asked, index)) for index, each in enumerate(messages)}
    outcomes: dict[str, str] = {}
    deadline = time.monotonic() + ANSWER_SECONDS_MAX
    while True:
        async with connection(backend) as connected:
            outcomes |= await store.take_answers(connected, waiting)
            if len(outcomes) == len(messages) or time.monotonic() > deadline:
                await store.forget_answers(connected)
                break
        waiting = {each for each in waiting if each[1] not in outcomes}
        await asyncio.sleep(ANSWER_POLL_SECONDS)
    found = [outcomes.get(_question(asked, index), "pending") for index in range(len(messages))]
    return Report.model_validate(
        {"events": [{"index": index, "outcome": outcome} for index, outcome in enumerate(found)]}
    )


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
