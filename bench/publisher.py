"""The bench's publisher, a process of its own: synthetic usage events in batches, as fast as they are confirmed or at a
rate; over NATS, or over HTTP if it is told a URL. The time of an event is when it was sent; at a rate, when it was due.

Prints one JSON line at the end: when it began and ended on the machine's monotonic clock, and its CPU time.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final
from uuid import UUID

import httpx2
import msgspec
import uvloop

from contracts.envelope import message_bodies
from contracts.partition import partition_of
from contracts.streams import OPERATOR, USAGE, usage_subject
from contracts.usage import MODEL_USED
from infra.demo.events import MODEL, PROVIDER, SOURCE
from infra.demo.publish import PASSWORD_VARIABLE, URL_VARIABLE, connect
from services.kit.publish import BATCH_SIZE_MAX, Message, publish_batch

# Nano-dollars per token of the catalogue's gpt-4o-mini, as literals: the check must not share the price book.
INPUT_NANOS: Final = 150
OUTPUT_NANOS: Final = 600

TOKEN_VARIABLE: Final = "BENCH_TOKEN"
# At a rate, a batch is what comes in this time: what came first waits so long, and that counts.
BATCH_SECONDS: Final = 0.1

_encode: Final = msgspec.json.Encoder(order="sorted").encode


@dataclass(frozen=True, slots=True)
class Load:
    """What to publish. The same load is the same events, whoever makes it.

    Ids are in the order of the events, or, with `random_ids`, in none, as those of clients that draw them.
    """

    name: str
    events: int
    accounts: int
    seed: int
    random_ids: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    """One event of a load."""

    number: int
    account: str
    input_tokens: int
    output_tokens: int

    @property
    def nanos(self) -> int:
        return self.input_tokens * INPUT_NANOS + self.output_tokens * OUTPUT_NANOS


def account(number: int) -> str:
    """The bench's account of this number; its root is its own, so accounts are spread over all partitions."""
    return f"bench-{number}"


def uses(load: Load) -> Iterator[Use]:
    """The events of a load, in order."""
    chosen = random.Random(load.seed)
    for number in range(load.events):
        yield Use(
            number=number,
            account=account(int(chosen.random() * load.accounts)),
            input_tokens=50 + int(chosen.random() * 1950),
            output_tokens=10 + int(chosen.random() * 390),
        )


def expected(load: Load) -> Counter[str]:
    """What the load costs, in nano-dollars by account."""
    nanos: Counter[str] = Counter()
    for use in uses(load):
        nanos[use.account] += use.nanos
    return nanos


Send = Callable[[Sequence[Use], Sequence[str]], Awaitable[None]]


async def publish(load: Load, *, in_flight: int, rate: float | None, url: str | None, singly: bool) -> None:
    """Publish the load with so many batches in flight, at most `rate` events a second, and print the times.

    Over NATS the events of a batch that go to one subject are one message, unless they are to go `singly`.
    """
    async with AsyncExitStack() as stack:
        send = await (_over_nats(load, stack, singly=singly) if url is None else _over_http(load, url, stack))
        waiting = uses(load)
        begin, cpu_begin = time.monotonic(), time.process_time()
        begin_at = datetime.now(UTC)
        sent = 0
        size = BATCH_SIZE_MAX if rate is None else max(1, min(BATCH_SIZE_MAX, int(rate * BATCH_SECONDS)))

        async def work() -> None:
            nonlocal sent
            while batch := [found for _, found in zip(range(size), waiting, strict=False)]:
                before, sent = sent, sent + len(batch)
                if rate is None:
                    times = [datetime.now(UTC)] * len(batch)
                else:
                    times = [begin_at + timedelta(seconds=number / rate) for number in range(before, sent)]
                    await asyncio.sleep(max(0.0, begin + sent / rate - time.monotonic()))
                await send(batch, list(map(_text, times)))

        await asyncio.gather(*(work() for _ in range(in_flight)))
        report = {"begin": begin, "end": time.monotonic(), "cpu_seconds": time.process_time() - cpu_begin}
        sys.stdout.write(json.dumps(report) + "\n")


async def _over_nats(load: Load, stack: AsyncExitStack, *, singly: bool) -> Send:
    client = await connect(os.environ[URL_VARIABLE], os.environ[PASSWORD_VARIABLE])
    stack.push_async_callback(client.close)

    async def send(batch: Sequence[Use], times: Sequence[str]) -> None:
        by_partition: dict[int, list[bytes]] = {}
        for use, at in zip(batch, times, strict=True):
            body = _encode(_event(load, use, source=SOURCE, at=at))
            by_partition.setdefault(partition_of(use.account), []).append(body)
        messages = [
            Message(usage_subject(partition=partition, source=SOURCE), payload, sha256(payload).hexdigest()[:32])
            for partition, bodies in by_partition.items()
            for payload in (bodies if singly else message_bodies(bodies))
        ]
        await publish_batch(client, stream=USAGE, messages=messages, timeout_seconds=30)

    return send


async def _over_http(load: Load, url: str, stack: AsyncExitStack) -> Send:
    client = await stack.enter_async_context(
        httpx2.AsyncClient(
            base_url=url,
            headers={
                "Authorization": f"Bearer {os.environ[TOKEN_VARIABLE]}",
                "Content-Type": "application/cloudevents-batch+json",
            },
            timeout=30,
        )
    )

    async def send(batch: Sequence[Use], times: Sequence[str]) -> None:
        events = zip(batch, times, strict=True)
        body = _encode([_event(load, use, source=OPERATOR, at=at) for use, at in events])
        answer = await client.post("/api/v1/events", content=body)
        if answer.status_code != httpx2.codes.NO_CONTENT:
            raise RuntimeError(f"{answer.status_code}: {answer.text[:500]}")

    return send


def _text(time: datetime) -> str:
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _id(load: Load, use: Use) -> str:
    name = f"{load.name}:{use.number}"
    return str(UUID(bytes=sha256(name.encode()).digest()[:16], version=4)) if load.random_ids else name


def _event(load: Load, use: Use, *, source: str, at: str) -> dict[str, object]:
    return {
        "specversion": "1.0",
        "id": _id(load, use),
        "source": source,
        "type": MODEL_USED,
        "subject": use.account,
        "time": at,
        "data": {
            "provider": PROVIDER,
            "model": MODEL,
            "input_tokens": use.input_tokens,
            "output_tokens": use.output_tokens,
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.publisher", description="Publish synthetic usage events.")
    parser.add_argument("--name", required=True, help="prefix of the event ids")
    for option in ("events", "accounts", "seed", "in-flight"):
        parser.add_argument(f"--{option}", type=int, required=True)
    parser.add_argument("--rate", type=float, help="events a second; as fast as they are confirmed without it")
    parser.add_argument("--url", help="of metering: over HTTP")
    parser.add_argument("--singly", action="store_true", help="over NATS: each event in a message of its own")
    parser.add_argument("--random-ids", action="store_true", help="ids as if drawn, rather than in order")
    given = parser.parse_args()
    uvloop.run(
        publish(
            Load(given.name, given.events, given.accounts, given.seed, random_ids=given.random_ids),
            in_flight=given.in_flight,
            rate=given.rate,
            url=given.url,
            singly=given.singly,
        )
    )
