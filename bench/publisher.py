"""The bench's publisher, a process of its own: synthetic usage events in atomic batches, as fast as they are confirmed.

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
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import msgspec
import uvloop

from contracts.partition import partition_of
from contracts.streams import USAGE, usage_subject
from contracts.usage import MODEL_USED
from infra.demo.events import MODEL, PROVIDER, SOURCE
from infra.demo.publish import PASSWORD_VARIABLE, URL_VARIABLE, connect
from services.kit.publish import BATCH_SIZE_MAX, Message, publish_batch

# Nano-dollars per token of the catalogue's gpt-4o-mini, as literals: the check must not share the price book.
INPUT_NANOS: Final = 150
OUTPUT_NANOS: Final = 600


@dataclass(frozen=True, slots=True)
class Load:
    """What to publish. The same load is the same events, whoever makes it."""

    name: str
    events: int
    accounts: int
    seed: int


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


async def publish(load: Load, *, in_flight: int) -> None:
    """Publish the load with so many batches in flight, and print the times."""
    client = await connect(os.environ[URL_VARIABLE], os.environ[PASSWORD_VARIABLE])
    messages = _messages(load)
    begin, cpu_begin = time.monotonic(), time.process_time()

    async def work() -> None:
        while batch := [found for _, found in zip(range(BATCH_SIZE_MAX), messages, strict=False)]:
            await publish_batch(client, stream=USAGE, messages=batch, timeout_seconds=30)

    await asyncio.gather(*(work() for _ in range(in_flight)))
    report = {"begin": begin, "end": time.monotonic(), "cpu_seconds": time.process_time() - cpu_begin}
    sys.stdout.write(json.dumps(report) + "\n")
    await client.close()


def _messages(load: Load) -> Iterator[Message]:
    time_of_use = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    encode = msgspec.json.Encoder(order="sorted").encode
    for use in uses(load):
        event_id = f"{load.name}:{use.number}"
        body = encode(
            {
                "specversion": "1.0",
                "id": event_id,
                "source": SOURCE,
                "type": MODEL_USED,
                "subject": use.account,
                "time": time_of_use,
                "data": {
                    "provider": PROVIDER,
                    "model": MODEL,
                    "input_tokens": use.input_tokens,
                    "output_tokens": use.output_tokens,
                },
            }
        )
        subject = usage_subject(partition=partition_of(use.account), source=SOURCE)
        yield Message(subject=subject, payload=body, message_id=event_id)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.publisher", description="Publish synthetic usage events.")
    parser.add_argument("--name", required=True, help="prefix of the event ids")
    for option in ("events", "accounts", "seed", "in-flight"):
        parser.add_argument(f"--{option}", type=int, required=True)
    given = parser.parse_args()
    uvloop.run(
        publish(
            Load(name=given.name, events=given.events, accounts=given.accounts, seed=given.seed),
            in_flight=given.in_flight,
        )
    )
