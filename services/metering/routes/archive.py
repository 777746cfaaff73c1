"""Questions about time whose use is archived: refused, never answered with less."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from services.kit.problems import Problem
from services.metering.queries.archive import PeriodArchived, check_not_archived, whole

ARCHIVED: Final[dict[int | str, dict[str, Any]]] = {
    409: {"description": "Use of that time is archived; `months` names them, and `scrip usage restore` brings it back"}
}


_MICROSECOND: Final = timedelta(microseconds=1)


@asynccontextmanager
async def of_whole_log(
    connection: AsyncConnection[TupleRow], *, since: datetime | None, until: datetime | None
) -> AsyncIterator[None]:
    """Ask the log about a time in here. Problem 409 if use of it is archived."""
    try:
        async with whole(connection, since=since, until=until):
            yield
    except PeriodArchived as error:
        raise archived(error) from error


async def refuse_archived(connection: AsyncConnection[TupleRow], *, at: datetime) -> None:
    """Problem 409 for use that is not in the log, if use of its time is archived."""
    try:
        await check_not_archived(connection, since=at, until=at + _MICROSECOND)
    except PeriodArchived as error:
        raise archived(error) from error


def archived(error: PeriodArchived) -> Problem:
    """It is refused, with the months that are to be restored."""
    return Problem(409, "archived", str(error), members={"months": [f"{month:%Y-%m}" for month in error.months]})
