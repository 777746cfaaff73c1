"""Waiting for what another process or task brings about."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable


async def eventually(condition: Callable[[], bool | Awaitable[bool]], *, seconds: float = 30.0) -> None:
    """Return once the condition holds; AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        holds = condition()
        if await holds if inspect.isawaitable(holds) else holds:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not so within {seconds:g} s: {inspect.getsource(condition).strip()}")
