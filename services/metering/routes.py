"""HTTP in: usage as CloudEvents, on disk in the stream when 204 is answered. And what became of what was reported."""

import base64
import binascii
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from nats.aio.client import Client
from psycopg import AsyncConnection, OperationalError
from psycopg.errors import QueryCanceled
from psycopg.rows import TupleRow
from psycopg_pool import PoolTimeout
from pydantic import BaseModel, TypeAdapter, ValidationError

from contracts.accounts import check_account
from contracts.envelope import InvalidEvent
from contracts.partition import PARTITION_COUNT, partition_of
from contracts.streams import USAGE
from contracts.times import Time
from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.database import Pool
from services.kit.dead_letters import DeadLetter, dead_letters_router
from services.kit.problems import Problem
from services.kit.publish import Message, PublishFailed, PublishRefused, publish_batch
from services.metering import projections, translate
from services.metering.domain.prices import VersionRefused, difference, is_new
from services.metering.engine import PriceKeeper
from services.metering.projections import (
    ConflictingReport,
    Group,
    ListedVersion,
    SourceCounters,
    UsageQuestion,
    UsageRow,
    WaitingUse,
)
from services.metering.translate import InvalidVersion, PriceBookRow, VersionDifference, VersionRow

BATCH_EVENTS_MAX: Final = 1_000
PAGE_SIZE_MAX: Final = 500
RETRY_AFTER_SECONDS: Final = 2
USAGE_ROWS_MAX: Final = 1_000
USAGE_RANGE_MAX: Final = timedelta(days=92)

_SINGLE: Final = "application/cloudevents+json"
_BATCH: Final = "application/cloudevents-batch+json"
_PLAIN: Final = "application/json"

# Before the first place there is none.
_HASH: Final = re.compile(r"([0-9a-f]{64})?")


@dataclass(frozen=True, slots=True)
class Backend:
    """What the routes work on. Made by the lifespan, before the first request."""

    nats: Client
    pool: Pool
    prices: PriceKeeper
    redrive: Callable[[DeadLetter], Awaitable[None]]


def routers(backend: Callable[[], Backend]) -> Sequence[APIRouter]:
    """All routes of metering."""

    async def redrive(letter: DeadLetter) -> None:
        await backend().redrive(letter)

    return (
        _events_router(backend),
        _reading_router(backend),
        _usage_router(backend),
        _prices_router(backend),
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
# Postgres has no text with a NUL in it.
_Text = Annotated[str, Query(max_length=600, pattern=r"^[^\x00]*$")]


def _reading_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["usage"], dependencies=[Depends(require("metering:read"))])

    @router.get("/api/v1/ingest")
    async def ingest_counters(source: _Text | None = None) -> IngestCounters:
        """What became of everything that was reported, per source. Exact at the time of asking."""
        async with _connection(backend()) as connection:
            counters = await projections.ingest_counters(connection, source=source)
        if source is not None and not counters:
            counters = [SourceCounters(source=source)]
        return IngestCounters(sources=counters)

    @router.get("/api/v1/conflicts")
    async def conflicts(source: _Text | None = None, limit: _Limit = 100, after: str | None = None) -> ConflictPage:
        """Reports whose id was used before for other content."""
        place = _read_cursor(after, tuple[int, str, str, str]) if after is not None else (-1, "", "", "")
        if _HASH.fullmatch(place[3]) is None:
            raise _not_a_place()
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
        key: _Text | None = None,
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


# Usage ----------------------------------------------------------------------------------------------------------------


class UsagePage(BaseModel):
    """Use by group, in the order of the groups as they were asked for. `next_after` asks for the next page."""

    usage: list[UsageRow]
    next_after: str | None


_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)
_GROUPS: Final[tuple[Group, ...]] = ("model", "day", "provider", "account")


def _usage_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["usage"], dependencies=[Depends(require("metering:read"))])

    @router.get(
        "/api/v1/usage", responses={400: {"description": "Something is wrong with the question; all of it is named"}}
    )
    async def usage(
        *,
        account: str | None = None,
        since: Annotated[str | None, Query(alias="from", description="RFC 3339; included")] = None,
        until: Annotated[
            str | None, Query(alias="to", description=f"Not included; at most {USAGE_RANGE_MAX.days} days later")
        ] = None,
        group_by: Annotated[str, Query(description=f"Of {', '.join(_GROUPS)}; empty: one sum")] = "model,day",
        tree: Annotated[bool, Query(description="Also all accounts below")] = False,
        limit: Annotated[int, Query(ge=1, le=USAGE_ROWS_MAX)] = USAGE_ROWS_MAX,
        after: str | None = None,
    ) -> UsagePage:
        """What an account used, summed exactly from the log. Days are those of UTC."""
        question = _read_question(account=account, since=since, until=until, group_by=group_by, tree=tree)
        place = _read_cursor(after, list[str]) if after is not None else None
        if place is not None and len(place) != max(len(question.group_by), 1):
            raise Problem(422, "invalid_cursor", "`after` is a place of another question")
        async with _connection(backend()) as connection:
            found = await projections.usage_after(connection, question, place, limit=limit + 1)
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        if last is None:
            return UsagePage(usage=page, next_after=None)
        return UsagePage(usage=page, next_after=_cursor([getattr(last, name) for name in question.group_by]))

    return router


def _read_question(
    *, account: str | None, since: str | None, until: str | None, group_by: str, tree: bool
) -> UsageQuestion:
    """The question; Problem 400 with everything that is wrong with it."""
    errors: list[Mapping[str, Any]] = []

    def wrong(name: str, detail: str) -> None:
        errors.append({"pointer": f"/query/{name}", "detail": detail})

    def time_of(name: str, text: str | None) -> datetime:
        try:
            if text is not None:
                return _TIME.validate_python(text).astimezone(UTC)
            wrong(name, f"{name} is missing")
        except ValidationError as error:
            wrong(name, error.errors(include_url=False)[0]["msg"].removeprefix("Value error, "))
        return datetime.min.replace(tzinfo=UTC)

    try:
        checked = check_account(account or "")
    except ValueError as error:
        wrong("account", str(error) if account else "account is missing")
        checked = ""
    first, last = time_of("from", since), time_of("to", until)
    if not errors or all(each["pointer"] == "/query/account" for each in errors):
        if first >= last:
            wrong("to", "to is not after from")
        elif last - first > USAGE_RANGE_MAX:
            wrong("to", f"from and to are more than {USAGE_RANGE_MAX.days} days apart")
    names = [name.strip() for name in group_by.split(",") if name.strip()]
    if unknown := [name for name in names if name not in _GROUPS]:
        wrong("group_by", f"{', '.join(unknown)}: known are {', '.join(_GROUPS)}")
    if len(set(names)) != len(names):
        wrong("group_by", "a group is named twice")
    if errors:
        raise Problem(400, "invalid_question", f"the question has {len(errors)} problem(s): see errors", errors=errors)
    return UsageQuestion(
        partition=partition_of(checked),
        account=checked,
        since=first,
        until=last,
        group_by=[each for name in names for each in _GROUPS if each == name],
        tree=tree,
    )


# Prices ---------------------------------------------------------------------------------------------------------------


class PriceVersions(BaseModel):
    """All price versions, in the order in which they take effect."""

    versions: list[ListedVersion]


def _prices_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["prices"])
    operator = Depends(require("operate"))

    @router.get(
        "/api/v1/price-book",
        response_model=PriceBookRow,
        dependencies=[Depends(require("metering:read"))],
        responses={404: {"description": "There is no version of that id"}},
    )
    async def price_book(version: _Text | None = None) -> Response:
        """The units, and the versions in force now and later; or one version, of whatever time."""
        prices = backend().prices
        if version is None:
            shown = prices.book().from_now_on(now())
        else:
            if (found := prices.book().find(version)) is None:
                async with _away_as_problem():
                    await prices.refresh()
                found = prices.book().find(version)
            if found is None:
                raise Problem(404, "unknown_version", f"there is no price version {version!r}")
            shown = [found]
        return Response(translate.price_book_as_json(prices.book(), shown), media_type=_PLAIN)

    @router.get("/api/v1/price-book/versions", dependencies=[Depends(require("metering:read"))])
    async def price_versions() -> PriceVersions:
        """All versions without their prices."""
        async with _connection(backend()) as connection:
            return PriceVersions(versions=await projections.listed_versions(connection))

    @router.post(
        "/api/v1/price-book",
        status_code=201,
        response_model=VersionDifference,
        responses={
            200: {"model": VersionDifference, "description": "A dry run; or the version is stored already"},
            409: {"description": "Its id is stored with other contents, its time is taken, or it is in the past"},
            422: {"description": "It is no price version; everything that is wrong with it is named"},
        },
    )
    async def add_price_version(
        body: VersionRow,
        response: Response,
        *,
        dry_run: Annotated[bool, Query(description="Only say what would change")] = False,
        backdate: Annotated[bool, Query(description="It may take effect in the past")] = False,
        principal: Principal = operator,
    ) -> VersionDifference:
        """Add a version to the price book, for good. It prices use from `effective_at` on, all of it.

        What was charged keeps the price it was charged at. Use that waits for a price is charged if it has one now:
        use of that time, or pinned to this version.
        """
        prices = backend().prices
        try:
            version = translate.read_version(body, units=prices.book().units)
            async with _away_as_problem():
                await prices.refresh()
                before = prices.book()
                if dry_run:
                    new, stored = is_new(version, book=before, at=now(), backdate=backdate), False
                else:
                    new = stored = await prices.add(version, source=principal.name, backdate=backdate)
        except InvalidVersion as error:
            errors = [{"pointer": f"/body/{each.field}", "detail": each.message} for each in error.problems]
            raise Problem(422, "invalid_price_version", str(error), errors=errors) from error
        except VersionRefused as error:
            raise Problem(409, error.code, str(error)) from error
        response.status_code = 201 if stored else 200
        # A version that is stored already takes over from nobody anew.
        compared_with = before.version_at(version.effective_at) if new else version
        return translate.difference_row(
            version,
            difference(compared_with, version),
            compared_with=compared_with,
            stored=stored or not new,
            unchanged=not new,
        )

    return router


@asynccontextmanager
async def _connection(backend: Backend) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection of the pool. Problem 503 if there is none."""
    async with _away_as_problem(), backend.pool.connection() as connection:
        yield connection


@asynccontextmanager
async def _away_as_problem() -> AsyncIterator[None]:
    try:
        yield
    except QueryCanceled as error:
        raise Problem(503, "too_much", "the answer takes too long to find: ask for less at once") from error
    except (PoolTimeout, OperationalError) as error:
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        raise Problem(503, "database_away", "the database is away: ask again", headers=headers) from error


Place = TypeVar("Place", tuple[int, str, str], tuple[int, str, str, str], list[str])


def _cursor(place: Place) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode()


def _read_cursor(text: str, shape: type[Place]) -> Place:
    try:
        place = msgspec.json.decode(base64.urlsafe_b64decode(text), type=shape)
    except (binascii.Error, msgspec.DecodeError, UnicodeError, ValueError) as error:
        raise _not_a_place() from error
    if not all(_can_be_asked_for(part) for part in place):
        raise _not_a_place()
    return place


def _can_be_asked_for(part: str | int) -> bool:
    """Postgres has no text with a NUL in it; the only numbers of places are partitions."""
    return "\x00" not in part if isinstance(part, str) else 0 <= part < PARTITION_COUNT


def _not_a_place() -> Problem:
    return Problem(422, "invalid_cursor", "`after` is not a place that an earlier page named")
