"""Corrections over HTTP: asked for, backfilled and undone elsewhere; listed and shown here, with what each did."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from contracts.money import Unit
from services.kit.auth import require
from services.metering.correcting import records
from services.metering.correcting.records import RecordedItem
from services.metering.routes.backend import Backend, IngestLimits, connection
from services.metering.routes.backfills import add_backfilling
from services.metering.routes.corrections_asked import add_asking
from services.metering.routes.corrections_shown import UNKNOWN, Id, corrected, shown, unknown, view
from services.metering.routes.corrections_undone import add_undoing
from services.metering.routes.paging import Limit, cursor, not_a_place, read_cursor
from services.metering.translate.corrections import CorrectedEvent, CorrectionView


class CorrectionPage(BaseModel):
    """Corrections, the latest first. `next_after` asks for the next page; null on the last."""

    corrections: list[CorrectionView]
    next_after: str | None


class CorrectedPage(BaseModel):
    """What a correction did to which event, in the order of partition, source and id."""

    events: list[CorrectedEvent]
    next_after: str | None


def corrections_router(backend: Callable[[], Backend], *, limits: IngestLimits) -> APIRouter:
    """Corrections of what was charged."""
    router = APIRouter(tags=["corrections"])
    add_asking(router, backend)
    add_backfilling(router, backend, limits)
    add_undoing(router, backend)
    _add_reading(router, backend)
    return router


def _add_reading(router: APIRouter, backend: Callable[[], Backend]) -> None:
    reader = Depends(require("metering:read"))

    @router.get("/api/v1/corrections", dependencies=[reader])
    async def list_corrections(limit: Limit = 100, after: str | None = None) -> CorrectionPage:
        """All corrections, the latest first."""
        place = None
        if after is not None:
            try:
                at, id = read_cursor(after, list[str])
                place = (datetime.fromisoformat(at).astimezone(UTC), id)
            except (ValueError, OverflowError) as error:
                raise not_a_place() from error
        async with connection(backend()) as connected:
            found = await records.list_before(connected, place, limit=limit + 1)
        units = backend().prices.book().units
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        return CorrectionPage(
            corrections=[view(each, units) for each in page],
            next_after=cursor([last.recorded_at.isoformat(), last.id]) if last else None,
        )

    @router.get("/api/v1/corrections/{id}", dependencies=[reader], responses=UNKNOWN)
    async def show_correction(id: Id) -> CorrectionView:
        """A correction: what was asked for, how far it is, and what it came to."""
        return await shown(backend(), id)

    @router.get("/api/v1/corrections/{id}/events", dependencies=[reader], responses=UNKNOWN)
    async def list_corrected(id: Id, limit: Limit = 100, after: str | None = None) -> CorrectedPage:
        """What a correction did to which event."""
        place = read_cursor(after, tuple[int, str, str]) if after is not None else (-1, "", "")
        async with connection(backend()) as connected:
            known = await records.find(connected, id)
            found = await records.items_after(connected, id, place, limit=limit + 1)
        if known is None:
            raise unknown(id)
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        units = backend().prices.book().units
        return CorrectedPage(
            events=[_recorded(each, units) for each in page], next_after=cursor(last.key) if last else None
        )


def _recorded(item: RecordedItem, units: Mapping[str, Unit]) -> CorrectedEvent:
    shown = corrected(item, records.amounts_from(item.difference), units)
    return shown.model_copy(update={"undone": item.undone, "undone_revision": item.undone_revision})
