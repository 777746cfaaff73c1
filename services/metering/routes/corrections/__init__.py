"""Corrections over HTTP: asked for, previewed, undone, listed, shown."""

from collections.abc import Callable

from fastapi import APIRouter

from services.metering.routes.backend import Backend, IngestLimits
from services.metering.routes.corrections.asking import add_asking
from services.metering.routes.corrections.backfilling import add_backfilling
from services.metering.routes.corrections.reading import add_reading
from services.metering.routes.corrections.undoing import add_undoing

__all__ = ["corrections_router"]


def corrections_router(backend: Callable[[], Backend], *, limits: IngestLimits) -> APIRouter:
    """Corrections of what was charged."""
    router = APIRouter(tags=["corrections"])
    add_asking(router, backend)
    add_backfilling(router, backend, limits)
    add_undoing(router, backend)
    add_reading(router, backend)
    return router
