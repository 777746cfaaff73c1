"""Laws of an answer that is written as it is taken: slowly is well, not at all is not for ever."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from services.ledger.routes.streaming import StreamTaken

pytestmark = pytest.mark.anyio

SCOPE = {"type": "http", "path": "/v1/exports/journal", "asgi": {"spec_version": "2.3"}}


class Reader:
    """Takes some messages of an answer, each after a while, then none; it stays all the time."""

    def __init__(self, *, takes: int) -> None:
        self.taken: list[Any] = []
        self._takes = takes

    async def receive(self) -> Any:
        """Nothing more comes from it."""
        await asyncio.Event().wait()

    async def send(self, message: Any) -> None:
        """Take a message, or never return."""
        if len(self.taken) == self._takes:
            await asyncio.Event().wait()
        await asyncio.sleep(0.03)
        self.taken.append(message)


@pytest.mark.parametrize("takes", [0, 1, 3, 100])
async def test_what_nobody_takes_is_given_up_and_has_no_end(takes: int) -> None:
    held = asyncio.Semaphore(1)

    async def parts() -> AsyncGenerator[bytes, None]:
        async with held:
            for _ in range(8):
                yield b"row\n"

    reader = Reader(takes=takes)
    answer = StreamTaken(parts(), media_type="text/csv", stalled_seconds_max=0.1)
    # In all it takes longer than it may stand still.
    await asyncio.wait_for(answer(SCOPE, reader.receive, reader.send), 5)
    assert not held.locked()
    is_whole = bool(reader.taken) and reader.taken[-1].get("more_body") is False
    assert is_whole == (takes == 100)
