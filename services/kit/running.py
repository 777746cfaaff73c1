"""What every composition root does: its application, the tasks it runs, the database URL it is told."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, TypeVar

from fastapi import APIRouter, FastAPI
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from services.kit.http import BODY_BYTES_MAX, Readiness, build_app
from services.kit.settings import ServiceSettings
from services.kit.telemetry import get_logger

log = get_logger(__name__)

# A service looks up by key. A session keeps the plans of its statements, also those made while a table was empty: one
# that reads the table whole costs more with each row that comes, until statistics are gathered.
_BY_KEY: Final = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
# For questions about much at once: each is planned anew, by what the statistics say.
BY_STATISTICS: Final = {**dict.fromkeys(_BY_KEY, "on"), "plan_cache_mode": "force_custom_plan"}

Settings = TypeVar("Settings", bound=ServiceSettings)
Made = TypeVar("Made")


def service_app(
    name: str,
    settings: Settings,
    *,
    running: Callable[[Settings, Readiness], AbstractAsyncContextManager[Made]],
    routers: Callable[[Callable[[], Made]], Sequence[APIRouter]],
    body_bytes_max: int = BODY_BYTES_MAX,
) -> FastAPI:
    """The application of a service, whose routers work on what `running` makes when the lifespan begins."""
    readiness = Readiness()
    backend: list[Made] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.tokens.load()
        async with running(settings, readiness) as made:
            backend[:] = [made]
            readiness.started()
            yield

    return build_app(
        name=name,
        lifespan=lifespan,
        readiness=readiness,
        tokens_file=settings.tokens_file,
        routers=routers(lambda: backend[0]),
        body_bytes_max=body_bytes_max,
    )


def essential_task(work: Coroutine[None, None, None], *, name: str) -> asyncio.Task[None]:
    """A task without which the process is of no use: if it fails, the process ends, to be started anew."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a task failed, the process ends", task=name, exc_info=error)
            os.kill(os.getpid(), signal.SIGTERM)

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    return task


async def finish_tasks(tasks: Sequence[asyncio.Task[None]], *, deadline_seconds: float) -> None:
    """Wait for tasks that were told to stop. One that is stuck is cancelled: what it did not finish is done again."""
    if not tasks:
        return
    _, stuck = await asyncio.wait(tasks, timeout=deadline_seconds)
    for task in stuck:
        log.warning("task did not stop in time", task=task.get_name())
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def url_with_options(url: SecretStr, **options: str) -> SecretStr:
    """A database URL whose sessions run in UTC, by index, with settings of Postgres: `statement_timeout="10s"`."""
    chosen = " ".join(f"-c {name}={value}" for name, value in {"timezone": "UTC", **_BY_KEY, **options}.items())
    return SecretStr(make_conninfo(url.get_secret_value(), options=chosen))
