"""HTTP in: usage as CloudEvents, on disk in the stream when 204 is answered. And what became of what was reported."""

import base64
import binascii
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from nats.aio.client import Client
from psycopg import AsyncConnection, OperationalError
from psycopg.rows import TupleRow
from psycopg_pool import PoolTimeout
from pydantic import BaseModel

from contracts.envelope import InvalidEvent
from contracts.streams import USAGE
from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.database import Pool
from services.kit.dead_letters import DeadLetter, dead_letters_router
from services.kit.problems import Problem
from services.kit.publish import Message, PublishFailed, PublishRefused, publish_batch
from services.metering import projections, translate
from services.metering.projections import ConflictingReport, SourceCounters, WaitingUse

BATCH_EVENTS_MAX: Final = 1_000
PAGE_SIZE_MAX: Final = 500
RETRY_AFTER_SECONDS: Final = 2

_SINGLE: Final = "application/cloudevents+json"
_BATCH: Final = "application/cloudevents-batch+json"
_PLAIN: Final = "application/json"


@dataclass(frozen=True, slots=True)
class Backend:
    """What the routes work on. Made by the lifespan, before the first request."""

    nats: Client
    pool: Pool
    redrive: Callable[[DeadLetter], Awaitable[None]]


def routers(backend: Callable[[], Backend]) -> Sequence[APIRouter]:
    """All routes of metering."""

    async def redrive(letter: DeadLetter) -> None:
        await backend().redrive(letter)

    return (
        _events_router(backend),
        _reading_router(backend),
        dead_letters_router(
            connect=lambda: _connection(backend()),
            redrive=redrive,
            authorize=require("operate"),
        ),
    )


# Reporting ------------------------------------------------------------------------------------------------------------


def _events_router(backend: Callable[[], Backend]) -> APIRouter:
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


# Reading --------------------------------------------------------------------------------------------------------------


class IngestCounters(BaseModel):
    """The counters of each source. A source that was asked for and never reported has zeros."""

    sources: list[SourceCounters]


class ConflictPage(BaseModel):
    """Conflicts in the order of partition, source and id. `next_after` asks for the next page; null on the last."""

    conflicts: list[ConflictingReport]
    next_after: str | None


class SetAsidePage(BaseModel):
    """What is set aside, in the order of partition, source and id. `next_after` asks for the next page."""

    set_aside: list[WaitingUse]
    next_after: str | None


_Limit = Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)]


def _reading_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["usage"], dependencies=[Depends(require("metering:read"))])

    @router.get("/api/v1/ingest")
    async def ingest_counters(source: str | None = None) -> IngestCounters:
        """What became of everything that was reported, per source. Exact at the time of asking."""
        async with _connection(backend()) as connection:
            counters = await projections.ingest_counters(connection, source=source)
        if source is not None and not counters:
            counters = [SourceCounters(source=source)]
        return IngestCounters(sources=counters)

    @router.get("/api/v1/conflicts")
    async def conflicts(source: str | None = None, limit: _Limit = 100, after: str | None = None) -> ConflictPage:
        """Reports whose id was used before for other content."""
        place = _read_cursor(after, tuple[int, str, str, str]) if after is not None else (-1, "", "", "")
        async with _connection(backend()) as connection:
            found = await projections.conflicts_after(connection, place, source=source, limit=limit + 1)
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        return ConflictPage(
            conflicts=page,
            next_after=_cursor((last.partition, last.source, last.id, last.body_sha256)) if last else None,
        )

    @router.get("/api/v1/set-aside")
    async def set_aside(
        reason: Literal["unattributed", "unpriced"] | None = None,
        key: str | None = None,
        limit: _Limit = 100,
        after: str | None = None,
    ) -> SetAsidePage:
        """Logged use that waits for its account to be opened, or for a price."""
        place = _read_cursor(after, tuple[int, str, str]) if after is not None else (-1, "", "")
        async with _connection(backend()) as connection:
            found = await projections.set_aside_after(connection, place, reason=reason, key=key, limit=limit + 1)
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        return SetAsidePage(
            set_aside=page, next_after=_cursor((last.partition, last.source, last.id)) if last else None
        )

    return router


@asynccontextmanager
async def _connection(backend: Backend) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection of the pool. Problem 503 if there is none."""
    try:
        async with backend.pool.connection() as connection:
            yield connection
    except (PoolTimeout, OperationalError) as error:
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        raise Problem(503, "database_away", "the database is away: ask again", headers=headers) from error


Place = TypeVar("Place", tuple[int, str, str], tuple[int, str, str, str])


def _cursor(place: Place) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode()


def _read_cursor(text: str, shape: type[Place]) -> Place:
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(text), type=shape)
    except (binascii.Error, msgspec.DecodeError, UnicodeError, ValueError) as error:
        raise Problem(422, "invalid_cursor", "`after` is not a place that an earlier page named") from error
