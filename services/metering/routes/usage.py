"""What accounts used, summed from the log."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, TypeAdapter, ValidationError

from contracts.accounts import check_account
from contracts.partition import partition_of
from contracts.times import Time
from services.kit.auth import require
from services.kit.problems import Problem
from services.metering import projections
from services.metering.projections import (
    Group,
    UsageQuestion,
    UsageRow,
)
from services.metering.routes.backend import Backend, connection
from services.metering.routes.paging import cursor, read_cursor

USAGE_ROWS_MAX: Final = 1_000
USAGE_RANGE_MAX: Final = timedelta(days=92)


class UsagePage(BaseModel):
    """Use by group, in the order of the groups as they were asked for. `next_after` asks for the next page."""

    usage: list[UsageRow]
    next_after: str | None


_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)
_GROUPS: Final[tuple[Group, ...]] = ("model", "day", "provider", "account")


def usage_router(backend: Callable[[], Backend]) -> APIRouter:
    """Questions about use."""
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
        place = read_cursor(after, list[str]) if after is not None else None
        if place is not None and len(place) != max(len(question.group_by), 1):
            raise Problem(422, "invalid_cursor", "`after` is a place of another question")
        async with connection(backend()) as connected:
            found = await projections.usage_after(connected, question, place, limit=limit + 1)
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        if last is None:
            return UsagePage(usage=page, next_after=None)
        return UsagePage(usage=page, next_after=cursor([getattr(last, name) for name in question.group_by]))

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
