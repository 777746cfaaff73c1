"""HTTP in: commands go to their partition's owner by request/reply, the one way in; reads see one snapshot."""

from collections.abc import Callable, Sequence

from fastapi import APIRouter

from services.kit.auth import require
from services.kit.dead_letters import DeadLetter, dead_letters_router
from services.ledger.routes.backend import Backend, connected
from services.ledger.routes.commands import commands_router
from services.ledger.routes.reading import reading_routers
from services.ledger.routes.redriving import redrive

__all__ = ["Backend", "routers"]


def routers(backend: Callable[[], Backend]) -> Sequence[APIRouter]:
    """All routes of the ledger."""

    async def redriven(letter: DeadLetter) -> None:
        await redrive(backend(), letter)

    return (
        # The balance first of all: it is asked for most.
        *reading_routers(backend),
        commands_router(backend),
        dead_letters_router(connect=lambda: connected(backend()), redrive=redriven, authorize=require("operate")),
    )
