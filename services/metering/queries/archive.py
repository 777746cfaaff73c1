"""Which months of the log are in files and not in the log. No question about them is answered with less.

A question is asked in `whole`, which also notices a month that is dropped or comes back while it is asked.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import date, datetime

from psycopg import AsyncConnection
from psycopg.rows import TupleRow


class PeriodArchived(Exception):
    """Use of the time that is asked about is archived: its months, in order."""

    def __init__(self, months: Sequence[date]) -> None:
        self.months = tuple(months)
        named = ", ".join(f"{month:%Y-%m}" for month in self.months)
        super().__init__(f"use of {named} is archived: restore it with `scrip usage restore`, or ask for other times")


@asynccontextmanager
async def whole(
    connection: AsyncConnection[TupleRow], *, since: datetime | None, until: datetime | None
) -> AsyncIterator[None]:
    """Ask the log about a time in here; None is as far as there is use. PeriodArchived."""
    await check_not_archived(connection, since=since, until=until)
    yield
    # Who drops a month notes it in the same transaction: whoever did not find its use finds the note.
    await check_not_archived(connection, since=since, until=until)


async def check_not_archived(
    connection: AsyncConnection[TupleRow], *, since: datetime | None, until: datetime | None
) -> None:
    """PeriodArchived, if use of the time is archived."""
    if months := await find_archived(connection, since=since, until=until):
        raise PeriodArchived(months)


async def find_archived(
    connection: AsyncConnection[TupleRow], *, since: datetime | None = None, until: datetime | None = None
) -> list[date]:
    """The archived months that a time touches, in order; or all."""
    cursor = await connection.execute(
        """
        SELECT month FROM archived_months
        WHERE (%(since)s::timestamptz IS NULL
               OR (month + interval '1 month') AT TIME ZONE 'UTC' > %(since)s::timestamptz)
          AND (%(until)s::timestamptz IS NULL OR month::timestamp AT TIME ZONE 'UTC' < %(until)s::timestamptz)
        ORDER BY month
        """,
        {"since": since, "until": until},
    )
    return [month for (month,) in await cursor.fetchall()]
