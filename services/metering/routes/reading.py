"""What became of what was reported."""

import re
from collections.abc import Callable
from typing import Final, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from services.kit.auth import require
from services.metering import projections
from services.metering.projections import (
    ConflictingReport,
    SourceCounters,
    WaitingUse,
)
from services.metering.routes.backend import Backend, connection
from services.metering.routes.paging import Limit, Text, cursor, not_a_place, read_cursor

# Before the first place there is none.
_HASH: Final = re.compile(r"([0-9a-f]{64})?")


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


def reading_router(backend: Callable[[], Backend]) -> APIRouter:
    """Counters, conflicts, and what is set aside."""
    router = APIRouter(tags=["usage"], dependencies=[Depends(require("metering:read"))])

    @router.get("/api/v1/ingest")
    async def ingest_counters(source: Text | None = None) -> IngestCounters:
        """What became of everything that was reported, per source. Exact at the time of asking."""
        async with connection(backend()) as connected:
            counters = await projections.ingest_counters(connected, source=source)
        if source is not None and not counters:
            counters = [SourceCounters(source=source)]
        return IngestCounters(sources=counters)

    @router.get("/api/v1/conflicts")
    async def conflicts(source: Text | None = None, limit: Limit = 100, after: str | None = None) -> ConflictPage:
        """Reports whose id was used before for other content."""
        place = read_cursor(after, tuple[int, str, str, str]) if after is not None else (-1, "", "", "")
        if _HASH.fullmatch(place[3]) is None:
            raise not_a_place()
        async with connection(backend()) as connected:
            found = await projections.conflicts_after(connected, place, source=source, limit=limit + 1)
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        return ConflictPage(
            conflicts=page,
            next_after=cursor((last.partition, last.source, last.id, last.body_sha256)) if last else None,
        )

    @router.get("/api/v1/set-aside")
    async def set_aside(
        reason: Literal["unattributed", "unpriced", "unmapped"] | None = None,
        key: Text | None = None,
        limit: Limit = 100,
        after: str | None = None,
    ) -> SetAsidePage:
        """Use that waits for its account to be opened, for a price, or for its subject to be mapped to an account."""
        place = read_cursor(after, tuple[int, str, str]) if after is not None else (-1, "", "")
        async with connection(backend()) as connected:
            found = await projections.set_aside_after(connected, place, reason=reason, key=key, limit=limit + 1)
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        return SetAsidePage(set_aside=page, next_after=cursor((last.partition, last.source, last.id)) if last else None)

    return router
