"""`Scrip` and `AsyncScrip`: report usage, and ask the ledger. Both deliver by the same two threads."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx2

from scrip_client.errors import SpoolFailed
from scrip_client.events import UsageEvent, encode
from scrip_client.ledger import AsyncLedger, Ledger
from scrip_client.recorder import Durability, Recorder, Settings, Status
from scrip_client.spool import RefusedEvent

SPOOL_BYTES_MAX: Final = 256 << 20
BUFFER_EVENTS_MAX: Final = 10_000
CLOSE_SECONDS: Final = 5.0

# What a forked child inherited: its parent's, not to be used or closed by it.
_inherited: list[object] = []


class _Reporting:
    """What both clients share: a recorder, made anew in a forked child."""

    def __init__(
        self,
        url: str,
        *,
        source: str,
        token: str,
        spool: Path | str | None,
        durability: Durability = "disk",
        ledger_url: str | None = None,
        ledger_token: str | None = None,
        ledger_seconds: float = 2.0,
        spool_bytes_max: int = SPOOL_BYTES_MAX,
        buffer_events_max: int = BUFFER_EVENTS_MAX,
        accept_seconds: float = 10.0,
        request_seconds: float = 10.0,
        gzip: bool = True,
        on_refused: Callable[[RefusedEvent], None] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """`url` is metering's, `source` the principal that `token` belongs to. Raises sqlite3.Error, OSError.

        `spool` is a file on a disk that lasts; None keeps events in memory, which has to be said by `durability`, too.
        `durability` `disk`: an event is accepted once it is on disk. `memory`: once it is in a bounded buffer, of which
        a crash loses what was not written yet, some milliseconds; nothing else does.
        `ledger_url` is the ledger's, if it is to be asked; it has `ledger_token`, or the same.
        """
        if durability not in ("disk", "memory"):
            raise ValueError(f"the durability is {durability!r}; it is disk or memory")
        if spool is None and durability == "disk":
            raise ValueError('without a spool nothing is on disk: give it a file, or say durability="memory"')
        if httpx2.URL(url).scheme not in ("http", "https"):
            raise ValueError(f"{url!r} is not the address of a metering service")
        self._settings = Settings(
            url=url,
            token=token,
            spool=None if spool is None else Path(spool).absolute(),
            durability=durability,
            spool_bytes_max=spool_bytes_max,
            buffer_events_max=buffer_events_max,
            accept_seconds=accept_seconds,
            request_seconds=request_seconds,
            gzip=gzip,
            on_refused=on_refused,
            transport=transport,
        )
        self.source = source
        self._ledger_settings = (ledger_url, ledger_token or token, ledger_seconds)
        self._recorder = Recorder(self._settings)
        self._process = os.getpid()

    @property
    def recorder(self) -> Recorder:
        """This process's."""
        if os.getpid() != self._process:
            _inherited.append(self._recorder)
            self._recorder = Recorder(self._settings)
            self._process = os.getpid()
        return self._recorder

    def _accept(self, event: UsageEvent | Mapping[str, Any]) -> tuple[str, Future[None]]:
        event_id, body = encode(event, source=self.source)
        return event_id, self.recorder.accept(body)

    def status(self) -> Status:
        """What waits, what was refused, and why the last delivery failed, if it did."""
        return self.recorder.status()

    def refused(self, *, limit: int = 100, after: int = 0) -> Sequence[RefusedEvent]:
        """Events that metering will not take as they are, by number."""
        return self.recorder.refused(limit=limit, after=after)

    def discard(self, numbers: Sequence[int]) -> None:
        """Forget refused events: they are charged to nobody."""
        self.recorder.discard(numbers)

    def send_again(self, numbers: Sequence[int]) -> None:
        """Deliver refused events after all, once what was wrong has been put right elsewhere."""
        self.recorder.send_again(numbers)

    def is_full(self) -> bool:
        """Whether there may be no room for another event."""
        return self.recorder.is_full()

    def _asks_the_ledger(self) -> tuple[str, str, float]:
        url, token, seconds = self._ledger_settings
        if url is None:
            raise ValueError("the client was made without a ledger_url")
        return url, token, seconds


class Scrip(_Reporting):
    """A client for threads. `with Scrip(...) as scrip:`, or `close()` it at the end."""

    _ledger: Ledger | None = None
    _ledger_process = 0

    @property
    def ledger(self) -> Ledger:
        """Holds and balances. ValueError without a `ledger_url`."""
        if self._ledger is None or self._ledger_process != os.getpid():
            _inherited.append(self._ledger)
            url, token, seconds = self._asks_the_ledger()
            self._ledger, self._ledger_process = Ledger(url, token=token, seconds=seconds), os.getpid()
        return self._ledger

    def report(self, event: UsageEvent | Mapping[str, Any]) -> str:
        """Accept an event, and return its id: from then on it is delivered, whatever happens. Raises NotAccepted.

        It waits for the disk, together with all others who report at the moment, and never for the network.
        """
        event_id, stored = self._accept(event)
        try:
            stored.result(self._settings.accept_seconds)
        except FutureTimeout:
            # Its event may be written yet; nobody is told that it was.
            raise SpoolFailed(f"not on disk within {self._settings.accept_seconds:g} s") from None
        return event_id

    def record(
        self,
        account: str,
        type: str,
        data: Mapping[str, Any] | None = None,
        *,
        id: str | None = None,
        time: datetime | None = None,
    ) -> str:
        """`report`, of an event that is made here."""
        return self.report(UsageEvent(account=account, type=type, data=data or {}, id=id, time=time))

    def flush(self, seconds: float = CLOSE_SECONDS) -> int:
        """Wait until everything is delivered, but not longer. How many events are left."""
        return self.recorder.flush(seconds)

    def close(self, seconds: float = CLOSE_SECONDS) -> int:
        """Deliver until the deadline, and stop. How many events are left: in the spool, for the next process.

        Raises NotDelivered for those that are in memory only.
        """
        if self._ledger is not None and self._ledger_process == os.getpid():
            self._ledger.close()
        return self._recorder.close(seconds) if self._process == os.getpid() else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncScrip(_Reporting):
    """A client for asyncio. `async with AsyncScrip(...) as scrip:`, or `await close()` it at the end."""

    _ledger: AsyncLedger | None = None
    _ledger_process = 0

    @property
    def ledger(self) -> AsyncLedger:
        """Holds and balances. ValueError without a `ledger_url`."""
        if self._ledger is None or self._ledger_process != os.getpid():
            _inherited.append(self._ledger)
            url, token, seconds = self._asks_the_ledger()
            self._ledger, self._ledger_process = AsyncLedger(url, token=token, seconds=seconds), os.getpid()
        return self._ledger

    async def report(self, event: UsageEvent | Mapping[str, Any]) -> str:
        """Accept an event, and return its id: from then on it is delivered, whatever happens. Raises NotAccepted.

        Only this task waits for the disk. One that is cancelled meanwhile may have reported it, or not.
        """
        event_id, stored = self._accept(event)
        try:
            async with asyncio.timeout(self._settings.accept_seconds):
                await asyncio.wrap_future(stored)
        except TimeoutError:
            raise SpoolFailed(f"not on disk within {self._settings.accept_seconds:g} s") from None
        return event_id

    async def record(
        self,
        account: str,
        type: str,
        data: Mapping[str, Any] | None = None,
        *,
        id: str | None = None,
        time: datetime | None = None,
    ) -> str:
        """`report`, of an event that is made here."""
        return await self.report(UsageEvent(account=account, type=type, data=data or {}, id=id, time=time))

    async def flush(self, seconds: float = CLOSE_SECONDS) -> int:
        """Wait until everything is delivered, but not longer. How many events are left."""
        return await asyncio.to_thread(self.recorder.flush, seconds)

    async def close(self, seconds: float = CLOSE_SECONDS) -> int:
        """Deliver until the deadline, and stop. How many events are left: in the spool, for the next process.

        Raises NotDelivered for those that are in memory only.
        """
        if self._ledger is not None and self._ledger_process == os.getpid():
            await self._ledger.close()
        return await asyncio.to_thread(self._recorder.close, seconds) if self._process == os.getpid() else 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()
