"""Metering's edge as clients see it, in this process: takes, refuses and fails as told, and keeps what it took."""

import gzip
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import httpx2

BATCH_EVENTS_MAX: Final = 1_000
BAD: Final = "bad"

Answer = httpx2.Response | Exception
# What becomes of a request before it is looked at; None: it is looked at.
Fate = Callable[[], Answer] | None


class Metering:
    """The handler of a transport. An event whose type is `bad` is refused, by index."""

    def __init__(self, fates: Iterable[Fate] = (), *, reads_gzip: bool = True) -> None:
        self.fates = deque(fates)
        self.reads_gzip = reads_gzip
        self.taken: dict[str, dict[str, Any]] = {}
        self.deliveries = 0
        self.requests: list[httpx2.Request] = []
        self.lock = threading.Lock()
        # Of each request that was looked at: whether what was taken is answered with an error all the same.
        self.loses_answers = 0

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        with self.lock:
            self.requests.append(request)
            fate = self.fates.popleft() if self.fates else None
            answer = self._look_at(request) if fate is None else fate()
            if isinstance(answer, Exception):
                raise answer
            if answer.status_code == 204 and self.loses_answers:
                self.loses_answers -= 1
                raise httpx2.ReadError("the connection broke")
            return answer

    @property
    def transport(self) -> httpx2.MockTransport:
        """To be given to a client."""
        return httpx2.MockTransport(self)

    def _look_at(self, request: httpx2.Request) -> httpx2.Response:
        body = request.content
        if request.headers.get("content-encoding") == "gzip":
            if not self.reads_gzip:
                return problem(400, "not_a_batch")
            body = gzip.decompress(body)
        events = json.loads(body)
        if len(events) > BATCH_EVENTS_MAX:
            return problem(413, "batch_too_large")
        errors = [
            {"index": index, "field": "type", "detail": "unknown"}
            for index, event in enumerate(events)
            if event["type"] == BAD
        ]
        if errors:
            return problem(400, "invalid_events", errors=errors)
        for event in events:
            self.deliveries += 1
            known = self.taken.setdefault(event["id"], event)
            assert known == event, "a repeat says something else"
        return httpx2.Response(204)


def problem(status: int, code: str, *, headers: dict[str, str] | None = None, **members: Any) -> httpx2.Response:
    """An answer in metering's words."""
    return httpx2.Response(
        status,
        headers={"content-type": "application/problem+json"} | (headers or {}),
        content=json.dumps({"status": status, "code": code, "detail": "so it is"} | members).encode(),
    )


def refused_connection() -> Exception:
    """Nobody is there."""
    return httpx2.ConnectError("connection refused")
