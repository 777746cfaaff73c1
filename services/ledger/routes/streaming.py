"""An answer that is written as it is taken, and given up when nobody takes it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from services.kit.telemetry import get_logger

log = get_logger(__name__)


class _Stalled(Exception):
    """Nobody takes what is sent."""


class StreamTaken(StreamingResponse):
    """A stream that is cut off, and its parts closed, once its reader has taken nothing for `stalled_seconds_max`.

    Who stops reading and stays would otherwise keep for ever what the stream holds.
    """

    def __init__(self, parts: AsyncGenerator[bytes, None], *, media_type: str, stalled_seconds_max: float) -> None:
        super().__init__(parts, media_type=media_type)
        self._parts = parts
        self._stalled_seconds_max = stalled_seconds_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Cut off, it has no end, so that nobody takes it for the whole."""

        async def sent(message: Message) -> None:
            try:
                async with asyncio.timeout(self._stalled_seconds_max):
                    await send(message)
            except TimeoutError as error:
                raise _Stalled from error

        async with aclosing(self._parts):
            try:
                await super().__call__(scope, receive, sent)
            except* _Stalled:
                log.warning("nobody takes the answer: cut off", path=scope["path"])
