"""HTTP in: usage, and what became of it."""

from collections.abc import Callable, Sequence

from fastapi import APIRouter

from services.kit.auth import require
from services.kit.dead_letters import DeadLetter, dead_letters_router
from services.metering.routes.backend import Backend, connection
from services.metering.routes.events import events_router
from services.metering.routes.prices import prices_router
from services.metering.routes.reading import reading_router
from services.metering.routes.usage import usage_router

__all__ = ["Backend", "routers"]


def routers(backend: Callable[[], Backend]) -> Sequence[APIRouter]:
    """All routes of metering."""

    async def redrive(letter: DeadLetter) -> None:
        await backend().redrive(letter)

    return (
        events_router(backend),
        reading_router(backend),
        usage_router(backend),
        prices_router(backend),
        dead_letters_router(
            connect=lambda: connection(backend()),
            redrive=redrive,
            authorize=require("operate"),
        ),
    )
