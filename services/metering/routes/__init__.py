"""HTTP in: usage, and what became of it."""

from collections.abc import Callable, Sequence

from fastapi import APIRouter

from services.kit.auth import require
from services.kit.dead_letters import DeadLetter, dead_letters_router
from services.metering.routes.aliases import aliases_router
from services.metering.routes.backend import Backend, IngestLimits, connection
from services.metering.routes.corrections import corrections_router
from services.metering.routes.events import events_router
from services.metering.routes.meter_queries import meter_queries_routers
from services.metering.routes.meters import meters_router
from services.metering.routes.prices import prices_router
from services.metering.routes.reading import reading_router
from services.metering.routes.receipts import receipts_router
from services.metering.routes.usage import usage_router

__all__ = ["Backend", "IngestLimits", "routers"]


def routers(backend: Callable[[], Backend], *, limits: IngestLimits) -> Sequence[APIRouter]:
    """All routes of metering."""

    async def redrive(letter: DeadLetter) -> None:
        await backend().redrive(letter)

    return (
        events_router(backend, limits=limits),
        aliases_router(backend),
        reading_router(backend),
        usage_router(backend),
        meters_router(backend),
        *meter_queries_routers(backend),
        prices_router(backend),
        receipts_router(backend),
        corrections_router(backend, limits=limits),
        dead_letters_router(
            connect=lambda: connection(backend()),
            redrive=redrive,
            authorize=require("operate"),
        ),
    )
