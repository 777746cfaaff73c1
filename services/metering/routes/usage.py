"""Questions about what accounts used."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Final, Literal, cast
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Depends, Query
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from pydantic import BaseModel, TypeAdapter, ValidationError

from contracts.accounts import check_account
from contracts.times import Time
from services.kit.auth import require
from services.kit.problems import Problem
from services.metering.domain.windows import TooManyWindows, WindowSize, first_instant, window_bounds
from services.metering.queries import usage
from services.metering.queries.meters import WINDOWS_MAX
from services.metering.queries.usage import (
    GROUPS,
    CallsRow,
    Group,
    Selection,
    SummaryRow,
    UsageRow,
    UseRow,
    WindowRow,
)
from services.metering.routes.archive import ARCHIVED, of_whole_log
from services.metering.routes.backend import Backend, asking
from services.metering.routes.paging import Place, cursor, not_a_place, read_cursor
from services.metering.translate.meters import ZoneName

USAGE_ROWS_MAX: Final = 1_000
SUMMARY_ROWS_MAX: Final = 200
WINDOWS_SHOWN_MAX: Final = 400
USAGE_RANGE_MAX: Final = timedelta(days=92)
HISTORY_RANGE_MAX: Final = timedelta(days=3_660)

# What is said instead of an account for the use of all of them.
EVERYBODY: Final = "*"


class UsagePage(BaseModel):
    """Use by group, in the order of the groups as they were asked for. `next_after` asks for the next page."""

    usage: list[UsageRow]
    next_after: str | None


class HistoryPage(BaseModel):
    """Use by windows of time, the latest first, also of those without any. `next_after` asks for the next page."""

    history: list[WindowRow]
    next_after: str | None


class SummaryPage(BaseModel):
    """What accounts used in a month, in their order. `next_after` asks for the next page."""

    summaries: list[SummaryRow]
    next_after: str | None


class CallsPage(BaseModel):
    """Calls by group, in the order of the groups as they were asked for. `next_after` asks for the next page."""

    calls: list[CallsRow]
    next_after: str | None


class UsesPage(BaseModel):
    """Single uses, the latest first. `next_after` asks for the next page."""

    uses: list[UseRow]
    next_after: str | None


_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)
_ZONE: Final[TypeAdapter[str]] = TypeAdapter(ZoneName)
_MONTH: Final = re.compile(r"(19[7-9]|20[0-9]|21[0-9])[0-9]-(0[1-9]|1[0-2])")
_SIZES: Final[Mapping[str, WindowSize]] = {"hour": "HOUR", "day": "DAY", "month": "MONTH"}
_CALL_GROUPS: Final[tuple[Group, ...]] = tuple(name for name in GROUPS if name in CallsRow.model_fields)
_WRONG: Final[dict[int | str, dict[str, Any]]] = {
    400: {"description": "Something is wrong with the question; all of it is named"},
    503: {"description": "The answer takes too long to find: ask for less at once"},
    **ARCHIVED,
}

Account = Annotated[str | None, Query(description=f"`{EVERYBODY}`: everybody's use")]
Since = Annotated[str | None, Query(alias="from", description="RFC 3339; included")]
Until = Annotated[str | None, Query(alias="to", description="Not included")]
Tree = Annotated[bool, Query(description="Also all accounts below")]
Zone = Annotated[str, Query(description="IANA name of the zone whose days and months they are")]
After = Annotated[str | None, Query(description="`next_after` of the page before")]


def usage_router(backend: Callable[[], Backend]) -> APIRouter:
    """Questions about use."""
    router = APIRouter(tags=["usage"], dependencies=[Depends(require("metering:read"))])

    @router.get("/api/v1/usage", responses=_WRONG)
    async def by_group(
        *,
        account: Account = None,
        since: Since = None,
        until: Until = None,
        group_by: Annotated[str, Query(description=f"Of {', '.join(GROUPS)}; empty: one sum")] = "model,day",
        tree: Tree = False,
        limit: Annotated[int, Query(ge=1, le=USAGE_ROWS_MAX)] = USAGE_ROWS_MAX,
        after: After = None,
    ) -> UsagePage:
        """What an account used, of at most 92 days, summed exactly from the log. Days and months are those of UTC."""
        question = _Question()
        selection = question.selection(account=account, since=since, until=until, tree=tree)
        groups = question.groups(group_by, known=GROUPS)
        question.check()
        place = _place_of_groups(after, groups)
        async with asking(backend()) as connected, _of_whole(connected, selection):
            found = await usage.usage_after(connected, selection, groups, place, limit=limit + 1)
        page, more = found[:limit], len(found) > limit
        return UsagePage(usage=page, next_after=_cursor_of_groups(page[-1], groups) if more else None)

    @router.get("/api/v1/usage/history", responses=_WRONG)
    async def history(
        *,
        account: Account = None,
        since: Since = None,
        until: Until = None,
        size: Literal["hour", "day", "month"] = "day",
        zone: Zone = "UTC",
        tree: Tree = False,
        limit: Annotated[int, Query(ge=1, le=WINDOWS_SHOWN_MAX)] = 31,
        after: After = None,
    ) -> HistoryPage:
        """What an account used by hour, day or month of a zone, of at most ten years. The ends may cut a window."""
        question = _Question()
        selection = question.selection(
            account=account, since=since, until=until, tree=tree, range_max=HISTORY_RANGE_MAX
        )
        where = question.zone(zone)
        question.check()
        if after is not None:
            selection = _until(selection, _read_place(after, list[str]))
        try:
            bounds = window_bounds(
                _SIZES[size], zone=where, since=selection.since, until=selection.until, windows_max=WINDOWS_MAX
            )
        except TooManyWindows as error:
            question.wrong("size", str(error))
            raise question.problem() from error
        more = len(bounds) - 1 > limit
        shown = [*bounds[-limit - 1 :]]
        # The use that is summed is that of the range, not of all of its first and last window.
        part = Selection(
            account=selection.account,
            since=max(shown[0], selection.since),
            until=min(shown[-1], selection.until),
            tree=tree,
        )
        async with asking(backend()) as connected, _of_whole(connected, part):
            page = await usage.usage_by_window(connected, part, shown)
        return HistoryPage(history=page, next_after=cursor([shown[0].isoformat()]) if more else None)

    @router.get("/api/v1/usage/summary", responses=_WRONG)
    async def summary(
        *,
        account: Account = None,
        month: Annotated[str | None, Query(description="2026-11")] = None,
        zone: Zone = "UTC",
        tree: Tree = False,
        limit: Annotated[int, Query(ge=1, le=SUMMARY_ROWS_MAX)] = 100,
        after: After = None,
    ) -> SummaryPage:
        """What accounts used in a month of a zone: each that used something, by itself."""
        question = _Question()
        where = question.zone(zone)
        since, until = question.month(month, zone=where)
        selection = Selection(account=question.account(account), since=since, until=until, tree=tree)
        question.check()
        place = _read_place(after, list[str], length=1) if after is not None else None
        async with asking(backend()) as connected, _of_whole(connected, selection):
            found = await usage.summaries_after(connected, selection, place, month=month or "", limit=limit + 1)
        page, more = found[:limit], len(found) > limit
        return SummaryPage(summaries=page, next_after=cursor([page[-1].account]) if more else None)

    _add_calls(router, backend)
    return router


def _add_calls(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/api/v1/usage/calls", responses=_WRONG)
    async def calls(
        *,
        account: Account = None,
        since: Since = None,
        until: Until = None,
        group_by: Annotated[str, Query(description=f"Of {', '.join(_CALL_GROUPS)}; empty: all")] = "endpoint,status",
        tree: Tree = False,
        limit: Annotated[int, Query(ge=1, le=USAGE_ROWS_MAX)] = 100,
        after: After = None,
    ) -> CallsPage:
        """Calls by endpoint and status, of at most 92 days, with what their latencies were: exact percentiles.

        Endpoint, method, status and latency_ms are attributes of a model call, or members of another event's data.
        """
        question = _Question()
        selection = question.selection(account=account, since=since, until=until, tree=tree)
        groups = question.groups(group_by, known=_CALL_GROUPS)
        question.check()
        place = _place_of_groups(after, groups)
        async with asking(backend()) as connected, _of_whole(connected, selection):
            found = await usage.calls_after(connected, selection, groups, place, limit=limit + 1)
        page, more = found[:limit], len(found) > limit
        return CallsPage(calls=page, next_after=_cursor_of_groups(page[-1], groups) if more else None)

    @router.get("/api/v1/usage/events", responses=_WRONG)
    async def uses(
        *,
        account: Account = None,
        since: Since = None,
        until: Until = None,
        tree: Tree = False,
        limit: Annotated[int, Query(ge=1, le=USAGE_ROWS_MAX)] = 100,
        after: After = None,
    ) -> UsesPage:
        """Single uses of at most 92 days, the latest first, with what each was charged."""
        question = _Question()
        selection = question.selection(account=account, since=since, until=until, tree=tree)
        question.check()
        place = _read_place(after, list[str], length=3) if after is not None else None
        if place is not None:
            _read_instant(place[0])
        async with asking(backend()) as connected, _of_whole(connected, selection):
            found = await usage.uses_before(connected, selection, place, limit=limit + 1)
        page, last = found[:limit], found[limit - 1] if len(found) > limit else None
        return UsesPage(
            uses=page, next_after=cursor([last.occurred_at.isoformat(), last.source, last.id]) if last else None
        )


class _Question:
    """Reads a question, and remembers everything that is wrong with it."""

    def __init__(self) -> None:
        self._errors: list[Mapping[str, Any]] = []

    def wrong(self, name: str, detail: str) -> None:
        """Something is wrong with a parameter."""
        self._errors.append({"pointer": f"/query/{name}", "detail": detail})

    def problem(self) -> Problem:
        """Problem 400 with all of it."""
        said = f"the question has {len(self._errors)} problem(s): see errors"
        return Problem(400, "invalid_question", said, errors=self._errors)

    def check(self) -> None:
        """Raise it, if something is wrong."""
        if self._errors:
            raise self.problem()

    def account(self, text: str | None) -> str | None:
        """An account; None for everybody."""
        if text == EVERYBODY:
            return None
        try:
            return check_account(text or "")
        except ValueError as error:
            self.wrong("account", str(error) if text else f"account is missing; {EVERYBODY} is everybody's")
            return ""

    def selection(
        self,
        *,
        account: str | None,
        since: str | None,
        until: str | None,
        tree: bool,
        range_max: timedelta = USAGE_RANGE_MAX,
    ) -> Selection:
        """Whose use, from when until before when."""
        checked = self.account(account)
        before = len(self._errors)
        first, last = self._time("from", since), self._time("to", until)
        if len(self._errors) == before:
            if first >= last:
                self.wrong("to", "to is not after from")
            elif last - first > range_max:
                self.wrong("to", f"from and to are more than {range_max.days} days apart")
        return Selection(account=checked, since=first, until=last, tree=tree)

    def groups(self, text: str, *, known: Sequence[Group]) -> list[Group]:
        """What is grouped by."""
        names = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in names if name not in known]:
            self.wrong("group_by", f"{', '.join(unknown)}: known are {', '.join(known)}")
        if len(set(names)) != len(names):
            self.wrong("group_by", "a group is named twice")
        return [cast(Group, name) for name in names if name in known]

    def zone(self, name: str) -> ZoneInfo:
        """A time zone."""
        try:
            return ZoneInfo(_ZONE.validate_python(name))
        except ValidationError as error:
            self.wrong("zone", error.errors(include_url=False)[0]["msg"].removeprefix("Value error, "))
            return ZoneInfo("UTC")

    def month(self, text: str | None, *, zone: ZoneInfo) -> tuple[datetime, datetime]:
        """When a month begins and ends in a zone."""
        if text is None or _MONTH.fullmatch(text) is None:
            self.wrong("month", "month is missing" if text is None else f"{text[:32]!r} is no month, like 2026-11")
            text = "2026-01"
        first = date.fromisoformat(f"{text}-01")
        following = (first + timedelta(days=31)).replace(day=1)
        return first_instant(first, zone=zone), first_instant(following, zone=zone)

    def _time(self, name: str, text: str | None) -> datetime:
        try:
            if text is not None:
                return _TIME.validate_python(text).astimezone(UTC)
            self.wrong(name, f"{name} is missing")
        except ValidationError as error:
            self.wrong(name, error.errors(include_url=False)[0]["msg"].removeprefix("Value error, "))
        return datetime.min.replace(tzinfo=UTC)


def _of_whole(connection: AsyncConnection[TupleRow], selection: Selection) -> AbstractAsyncContextManager[None]:
    return of_whole_log(connection, since=selection.since, until=selection.until)


def _place_of_groups(after: str | None, groups: Sequence[Group]) -> list[str] | None:
    return None if after is None else _read_place(after, list[str], length=max(len(groups), 1))


def _cursor_of_groups(last: UsageRow | CallsRow, groups: Sequence[Group]) -> str:
    return cursor([getattr(last, name) for name in groups])


def _read_place(after: str, shape: type[Place], *, length: int | None = None) -> Place:
    place = read_cursor(after, shape)
    if length is not None and len(place) != length:
        raise Problem(422, "invalid_cursor", "`after` is a place of another question")
    return place


def _read_instant(text: str) -> datetime:
    try:
        return _TIME.validate_python(text).astimezone(UTC)
    except ValidationError as error:
        raise not_a_place() from error


def _until(selection: Selection, place: Sequence[str]) -> Selection:
    """The part of a selection before the windows of the page before."""
    until = _read_instant(place[0]) if len(place) == 1 else selection.since
    if not selection.since < until <= selection.until:
        raise Problem(422, "invalid_cursor", "`after` is a place of another question")
    return Selection(account=selection.account, since=selection.since, until=until, tree=selection.tree)
