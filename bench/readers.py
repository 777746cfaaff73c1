"""Asks for balances over HTTP at a rate, whatever comes back, over connections kept open. A process of its own.

It shares the cores with what it measures, so it speaks just as much HTTP as that takes. Prints one JSON object:
answered, failed, seconds, and the times from when a request was due to its answer, in milliseconds.
"""

import argparse
import asyncio
import gc
import json
import random
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import urlsplit

import uvloop

from bench.publisher import account

CONNECTIONS: Final = 32
LAST_ANSWER_SECONDS_MAX: Final = 60.0
# Not counted: the server opens connections of its own, and plans.
WARMING_SECONDS: Final = 1


@dataclass(slots=True)
class Asked:
    """What was asked for and when it was due, what was answered and how long that took, and who is free to ask."""

    waiting: deque[tuple[bytes, float]] = field(default_factory=deque)
    free: "deque[Connection]" = field(default_factory=deque)
    # When each question was due, and in how many milliseconds it was answered.
    answers: list[tuple[float, float]] = field(default_factory=list)
    failed: int = 0

    def ask(self, request: bytes, due: float) -> None:
        """Ask, or wait for a connection to ask on: that time counts."""
        if self.free:
            # In turn: the server closes what nobody asks on for seconds.
            self.free.popleft().ask(request, due)
        else:
            self.waiting.append((request, due))

    def answered(self, connection: "Connection", due: float, *, is_well: bool) -> None:
        """An answer has come, whole."""
        if is_well:
            self.answers.append((due, (time.perf_counter() - due) * 1000))
        else:
            self.failed += 1
        if self.waiting:
            connection.ask(*self.waiting.popleft())
        else:
            self.free.append(connection)


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._transport: asyncio.Transport | None = None
        self._answer = b""
        self._due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not by its class: uvloop's is none of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def ask(self, request: bytes, due: float) -> None:
        """Send a request. Its answer must name its length."""
        assert self._transport is not None
        self._answer, self._due = b"", due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, separator, body = self._answer.partition(b"\r\n\r\n")
        if not separator:
            return
        _, _, length = head.lower().partition(b"\r\ncontent-length:")
        if len(body) >= int(length.partition(b"\r\n")[0]):
            self._asked.answered(self, self._due, is_well=head.startswith(b"HTTP/1.1 200 "))

    def connection_lost(self, error: Exception | None) -> None:
        if self._asked.waiting or self not in self._asked.free:
            raise ConnectionError("a connection was closed before its answer") from error


async def _run(arguments: argparse.Namespace) -> None:
    chosen = random.Random(3)
    place = urlsplit(arguments.url)
    asked = Asked()
    loop = asyncio.get_running_loop()
    for _ in range(CONNECTIONS):
        _, connection = await loop.create_connection(lambda: Connection(asked), place.hostname, place.port)
        asked.free.append(connection)
    count = arguments.rate * (arguments.seconds + WARMING_SECONDS)
    headers = f"HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {arguments.token}\r\n\r\n"
    requests = [
        f"GET /v1/balances/{account(chosen.randrange(arguments.accounts))} {headers}".encode() for _ in range(count)
    ]
    gc.freeze()
    begin = time.perf_counter()
    for number, request in enumerate(requests):
        due = begin + number / arguments.rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        asked.ask(request, due)
    while len(asked.answers) + asked.failed < count:
        if time.perf_counter() - begin > arguments.seconds + LAST_ANSWER_SECONDS_MAX:
            raise TimeoutError(f"{len(asked.answers)} of {count} were answered")
        await asyncio.sleep(0.001)
    measured_from = begin + WARMING_SECONDS
    seconds = time.perf_counter() - measured_from
    taken = sorted(milliseconds for due, milliseconds in asked.answers if due >= measured_from)
    report = {
        "answered": len(taken),
        "failed": asked.failed,
        "seconds": seconds,
        "p50": statistics.median(taken),
        "p99": taken[int(len(taken) * 0.99)],
        "cpu_seconds": time.process_time(),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Ask for a while, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--rate", type=int, default=500)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--accounts", type=int, default=10_000)
    uvloop.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
