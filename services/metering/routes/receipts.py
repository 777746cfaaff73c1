"""Receipts: what one event cost, explained to the last digit."""

from collections.abc import Callable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query

from services.kit.auth import require
from services.kit.problems import Problem
from services.metering.queries.receipts import find_receipts
from services.metering.routes.archive import refuse_archived
from services.metering.routes.backend import Backend, away_as_problem, connection
from services.metering.routes.paging import Text
from services.metering.translate.receipts import Receipt, receipt

_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    404: {"description": "No event of that id was ever reported"},
    409: {
        "description": "Several events have that id; the problem names their sources and accounts. "
        "Or it is archived; `months` says when it was"
    },
}


def receipts_router(backend: Callable[[], Backend]) -> APIRouter:
    """Receipts, by source and id, or by the id alone while only one event has it."""
    router = APIRouter(tags=["prices"], dependencies=[Depends(require("metering:read"))])

    async def find(event_id: str, *, source: str | None, account: str | None) -> Receipt:
        # Postgres has no text with a NUL in it, so nothing has such an id.
        if "\x00" in event_id or "\x00" in (source or ""):
            raise _unknown(event_id)
        async with connection(backend()) as connected:
            found = await find_receipts(connected, event_id=event_id, source=source, account=account)
            for row in found:
                if not row.is_here:
                    await refuse_archived(connected, at=row.occurred_at)
        if not found:
            raise _unknown(event_id)
        if len(found) > 1:
            raise Problem(
                409,
                "ambiguous",
                f"{len(found)} events have the id {event_id!r}: say of which source, or of which account",
                errors=[{"source": row.source, "account": row.account} for row in found],
            )
        (row,) = found
        prices = backend().prices
        if row.price_version is not None and prices.book().find(row.price_version) is None:
            async with away_as_problem():
                await prices.refresh()
        version = None if row.price_version is None else prices.book().find(row.price_version)
        return receipt(row, price_version=version, units=prices.book().units)

    @router.get("/api/v1/receipts", responses=_RESPONSES)
    async def receipt_by_query(
        id: Annotated[str, Query(max_length=256)], source: Text | None = None, account: Text | None = None
    ) -> Receipt:
        """What became of an event, and what it cost. For ids that do not stand well in a path."""
        return await find(id, source=source, account=account)

    @router.get("/api/v1/receipts/{event_id}", responses=_RESPONSES)
    @router.get("/receipts/{event_id}", responses=_RESPONSES, include_in_schema=False)
    async def receipt_by_id(event_id: str, account: Text | None = None) -> Receipt:
        """What became of the one event that has this id, and what it cost."""
        return await find(event_id, source=None, account=account)

    @router.get("/api/v1/receipts/{source}/{event_id:path}", responses=_RESPONSES)
    async def receipt_of_source(source: str, event_id: str, account: Text | None = None) -> Receipt:
        """What became of the event that a source reported under this id, and what it cost."""
        return await find(event_id, source=source, account=account)

    return router


def _unknown(event_id: str) -> Problem:
    return Problem(404, "unknown_event", f"no event of the id {event_id!r} was ever reported")
