"""What a composition root does with the tasks it runs and the database URL it is told."""

import asyncio
import os
import signal
from collections.abc import Coroutine, Sequence

from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from services.kit.telemetry import get_logger

log = get_logger(__name__)


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
    """A database URL whose sessions run in UTC and with settings of Postgres: `statement_timeout="10s"`."""
    chosen = " ".join(f"-c {name}={value}" for name, value in {"timezone": "UTC", **options}.items())
    return SecretStr(make_conninfo(url.get_secret_value(), options=chosen))
