"""Takes events and delivers them. Two threads: one writes to the spool, one sends what is in it; no caller does either.

The writer commits together whatever queued while it wrote last; the sender sends together whatever came while it sent
last. No event leaves the spool before metering has it on disk, or has said that it will not take it.
"""

import atexit
import gzip
import logging
import os
import random
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, assert_never

import httpx2

from scrip_client.delivery import BadBatch, BadEvents, Delivered, Later, NoGzip, Outcome, outcome, retry_seconds
from scrip_client.errors import ClientClosed, NotAccepted, NotDelivered, SpoolFailed, SpoolFull
from scrip_client.events import EVENT_BYTES_MAX
from scrip_client.spool import ROW_BYTES, RefusedEvent, Spool, Turn

log = logging.getLogger("scrip_client")

Durability = Literal["disk", "memory"]

BATCH_EVENTS_MAX: Final = 1_000
# Metering takes 4 MiB.
BATCH_BYTES_MAX: Final = 3 << 20
COMMIT_EVENTS_MAX: Final = 1_000
GZIP_BYTES_MIN: Final = 1 << 10
# How soon what another process left behind is looked for, and how often it is asked whose turn it is.
IDLE_SECONDS: Final = 1.0
TURN_SECONDS: Final = 0.05
WRITE_AGAIN_SECONDS: Final = 0.2
FLUSH_LOOK_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How events are taken and delivered; as `Scrip` documents them."""

    url: str
    token: str
    spool: Path | None
    durability: Durability
    spool_bytes_max: int
    buffer_events_max: int
    accept_seconds: float
    request_seconds: float
    gzip: bool
    on_refused: Callable[[RefusedEvent], None] | None
    transport: httpx2.BaseTransport | None


@dataclass(frozen=True, slots=True)
class Status:
    """How it goes: what waits on disk and in memory, what was refused, and why the last delivery failed, if it did."""

    waiting: int
    buffered: int
    refused: int
    bytes: int
    failures: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class _Taken:
    """An event on its way to the spool, and who waits for it to be there."""

    body: bytes
    stored: Future[None] | None


class Recorder:
    """Events in, deliveries out. Safe to use from any thread; a forked child has to make its own."""

    def __init__(self, settings: Settings) -> None:
        """Raises sqlite3.Error or OSError if the spool cannot be opened."""
        self._settings = settings
        self._spool = Spool(settings.spool, bytes_max=settings.spool_bytes_max)
        beside = None if settings.spool is None else settings.spool.with_name(settings.spool.name + "-turn")
        self._turn = Turn(beside)
        self._queue: deque[_Taken] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._waiting = threading.Event()
        self._stopped = threading.Event()
        self._hurried = threading.Event()
        self._pauses = 0
        self._not_before = 0.0
        self._batch_bytes_max = BATCH_BYTES_MAX
        self._batch_events_max = BATCH_EVENTS_MAX
        self._gzip = settings.gzip
        self._failures = 0
        self._problem: str | None = None
        self._process = os.getpid()
        self._writer = threading.Thread(target=self._write, name="scrip-writer", daemon=True)
        self._sender = threading.Thread(target=self._send, name="scrip-sender", daemon=True)
        self._writer.start()
        self._sender.start()
        atexit.register(self._flush_at_exit)

    def accept(self, body: bytes) -> Future[None]:
        """Take an event. The future is done once it is accepted, or has the NotAccepted that says why not.

        With durability `memory` it is done at once. Raises ClientClosed, SpoolFull.
        """
        stored: Future[None] = Future()
        with self._changed:
            if self._closing:
                raise ClientClosed("the client is closed")
            if len(self._queue) >= self._settings.buffer_events_max:
                raise SpoolFull(f"{len(self._queue)} events wait in memory already, as many as may")
            in_memory = self._settings.durability == "memory"
            self._queue.append(_Taken(body, None if in_memory else stored))
            self._changed.notify_all()
        if in_memory:
            stored.set_result(None)
        return stored

    def status(self) -> Status:
        """How it goes."""
        counts = self._spool.counts()
        return Status(
            waiting=counts.waiting,
            buffered=len(self._queue),
            refused=counts.refused,
            bytes=counts.bytes,
            failures=self._failures,
            problem=self._problem,
        )

    def is_full(self) -> bool:
        """Whether the next event may not be taken, as far as this process knows. Waits for nothing."""
        room = self._settings.spool_bytes_max - self._spool.bytes_used
        return room < EVENT_BYTES_MAX + ROW_BYTES or len(self._queue) >= self._settings.buffer_events_max

    def refused(self, *, limit: int, after: int) -> Sequence[RefusedEvent]:
        """What metering will not take."""
        return self._spool.refused(limit=limit, after=after)

    def discard(self, numbers: Sequence[int]) -> None:
        """Forget refused events."""
        self._spool.discard(numbers)

    def send_again(self, numbers: Sequence[int]) -> None:
        """Deliver refused events after all."""
        self._spool.send_again(numbers)
        self._waiting.set()

    def flush(self, seconds: float) -> int:
        """Wait until everything is delivered, but not longer. How many events are left."""
        deadline = time.monotonic() + seconds
        # Metering may be there again: who waits does not wait out a pause that has grown to half a minute.
        self._pauses = 0
        self._hurried.set()
        while self._buffered() or self._spool.has_waiting():
            if time.monotonic() >= deadline:
                return self._spool.counts().waiting + self._buffered()
            self._waiting.set()
            time.sleep(FLUSH_LOOK_SECONDS)
        return 0

    def close(self, seconds: float) -> int:
        """Take nothing more, deliver until the deadline, and stop. How many events are left in the spool.

        Raises NotDelivered for what is left in memory only.
        """
        with self._changed:
            if self._closing:
                return 0
            self._closing = True
            self._changed.notify_all()
        atexit.unregister(self._flush_at_exit)
        self.flush(seconds)
        self._stopped.set()
        self._hurried.set()
        self._waiting.set()
        with self._changed:
            self._changed.notify_all()
        # A request under way ends by its own time-out; its events stay in the spool until then.
        self._writer.join(WRITE_AGAIN_SECONDS + self._settings.accept_seconds)
        self._sender.join(max(seconds, TURN_SECONDS))
        left = self._spool.counts().waiting + self._buffered()
        lost = self._in_memory_only()
        if not self._sender.is_alive() and not self._writer.is_alive():
            self._turn.close()
            self._spool.close()
        if lost:
            raise NotDelivered(lost)
        return left

    def _buffered(self) -> int:
        with self._changed:
            return len(self._queue)

    def _in_memory_only(self) -> list[bytes]:
        with self._changed:
            lost = [each.body for each in self._queue if each.stored is None]
        if self._settings.spool is None:
            stored = self._spool.oldest(events_max=1 << 31, bytes_max=1 << 62)
            lost = [body for _, body in stored] + lost
        return lost

    def _flush_at_exit(self) -> None:
        """Whoever forgot to close loses nothing but what is in memory only, and nothing of that if there is a file."""
        if os.getpid() != self._process:
            # A forked child's exit is no business of its parent's.
            return
        try:
            self.close(0.0 if self._settings.spool is not None else 2.0)
        except NotDelivered as error:
            log.critical("%s", error)

    # The writer -------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    return
                # They stay in the queue until they are in the spool: what is accepted is always in one of the two.
                taken = [self._queue[place] for place in range(min(len(self._queue), COMMIT_EVENTS_MAX))]
            wanted = [each for each in taken if each.stored is None or each.stored.set_running_or_notify_cancel()]
            failed: NotAccepted | None = None
            stored = 0
            try:
                stored = self._spool.put([each.body for each in wanted])
                if stored < len(wanted):
                    failed = self._full()
            except (sqlite3.Error, OSError) as error:
                failed = SpoolFailed(f"the spool cannot be written: {error}")
            self._settle(taken, wanted, stored=stored, failed=failed)
            self._waiting.set()
            if failed is not None and self._stopped.wait(WRITE_AGAIN_SECONDS):
                # Closed, and there is no room: `close` says which are left.
                return

    def _settle(
        self, taken: Sequence[_Taken], wanted: Sequence[_Taken], *, stored: int, failed: NotAccepted | None
    ) -> None:
        """Tell who waits. What is accepted already and found no room stays in the queue, at its front."""
        kept = [each for each in wanted[stored:] if each.stored is None]
        with self._changed:
            for _ in taken:
                self._queue.popleft()
            self._queue.extendleft(reversed(kept))
        for place, each in enumerate(wanted):
            if each.stored is None:
                continue
            if place < stored:
                each.stored.set_result(None)
            else:
                assert failed is not None
                each.stored.set_exception(failed)
        if kept and failed is not None:
            log.error("%d accepted events wait in memory: %s", len(kept), failed)

    def _full(self) -> SpoolFull:
        counts = self._spool.counts()
        return SpoolFull(
            f"the spool is full: {counts.waiting} events wait and {counts.refused} are refused, which is"
            f" {counts.bytes} of at most {self._settings.spool_bytes_max} bytes"
        )

    # The sender -------------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        with httpx2.Client(
            base_url=self._settings.url,
            headers={"Authorization": f"Bearer {self._settings.token}"},
            timeout=self._settings.request_seconds,
            transport=self._settings.transport,
            trust_env=False,
        ) as http:
            while not self._stopped.is_set():
                self._waiting.clear()
                try:
                    pause = self._deliver(http)
                except (sqlite3.Error, OSError) as error:
                    pause = self._failed(Later(f"the spool cannot be read: {error}"))
                except Exception as error:
                    # Nobody would notice that this thread has ended, and events would wait for ever.
                    log.exception("delivering failed")
                    pause = self._failed(Later(f"{type(error).__name__}: {error}"))
                if pause is None:
                    self._waiting.wait(IDLE_SECONDS)
                else:
                    self._rest(pause)

    def _rest(self, pause: float) -> None:
        """Between two tries: cut short for who waits until all is delivered, but not below what metering asked for."""
        self._hurried.wait(pause)
        self._hurried.clear()
        self._stopped.wait(max(self._not_before - time.monotonic(), 0.0))

    def _deliver(self, http: httpx2.Client) -> float | None:
        """Send what waits. How long to wait before the next try; None: nothing waits."""
        if not self._spool.has_waiting():
            return None
        if not self._turn.take():
            return TURN_SECONDS
        try:
            while not self._stopped.is_set():
                waiting = self._spool.oldest(events_max=self._batch_events_max, bytes_max=self._batch_bytes_max)
                if not waiting:
                    return None
                if (pause := self._deliver_batch(http, waiting)) is not None:
                    return pause
        finally:
            self._turn.give()
        return 0.0

    def _deliver_batch(self, http: httpx2.Client, waiting: Sequence[tuple[int, bytes]]) -> float | None:
        """Send a batch, and do what its answer says. How long to wait before going on, if so."""
        answer = self._post(http, [body for _, body in waiting])
        match answer:
            case Delivered():
                # First: whoever sees that nothing waits any more sees no problem either.
                self._succeeded()
                self._spool.remove([number for number, _ in waiting])
            case BadEvents(problems=problems):
                self._set_apart({waiting[place][0]: why for place, why in problems.items()})
            case BadBatch(problem=problem) if len(waiting) == 1:
                self._set_apart({waiting[0][0]: [problem]})
                self._batch_events_max = BATCH_EVENTS_MAX
            case BadBatch():
                # Halves, until the good ones are through and the bad one is alone.
                self._batch_events_max = len(waiting) // 2
            case NoGzip():
                self._gzip = False
            case Later():
                return self._failed(answer)
            case _:
                assert_never(answer)
        return None

    def _post(self, http: httpx2.Client, bodies: Sequence[bytes]) -> Outcome:
        content = b"[" + b",".join(bodies) + b"]"
        headers = {"Content-Type": "application/cloudevents-batch+json"}
        gzipped = self._gzip and len(content) >= GZIP_BYTES_MIN
        if gzipped:
            content = gzip.compress(content, compresslevel=5)
            headers["Content-Encoding"] = "gzip"
        try:
            response = http.post("/api/v1/events", content=content, headers=headers)
        except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
            return Later(f"{type(error).__name__}: {error}")
        return outcome(
            response.status_code,
            response.headers,
            response.content,
            events=len(bodies),
            gzipped=gzipped,
            now=datetime.now(UTC),
        )

    def _set_apart(self, problems: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
        for refused in self._spool.set_apart(problems):
            log.error("metering refused an event, it is set apart: %s", refused.problems)
            if self._settings.on_refused is not None:
                try:
                    self._settings.on_refused(refused)
                except Exception:
                    # Somebody else's code, and no reason to deliver nothing more.
                    log.exception("on_refused failed")

    def _succeeded(self) -> None:
        if self._failures:
            log.warning("metering takes events again, after %d failures", self._failures)
        self._failures = 0
        self._pauses = 0
        self._problem = None
        self._batch_events_max = min(self._batch_events_max * 2, BATCH_EVENTS_MAX)

    def _failed(self, later: Later) -> float:
        self._failures += 1
        self._pauses += 1
        self._problem = later.why
        self._not_before = time.monotonic() + later.seconds
        if self._failures == 1:
            log.warning("events cannot be delivered, they wait: %s", later.why)
        return retry_seconds(self._pauses, at_least=later.seconds, chance=random.random())
