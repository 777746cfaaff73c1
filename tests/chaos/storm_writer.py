"""A writer of a storm: its share of a wave, each event three times in an order of chance. Run as a process of its own.

It sends without message ids, so that no window of the stream helps, and sends again what was not confirmed.
"""

import argparse
import asyncio
import os
import random
import time
from datetime import UTC, datetime
from typing import Final

import msgspec
import nats.errors

from bench.publisher import Load, uses
from contracts.partition import partition_of
from contracts.streams import USAGE, usage_subject
from contracts.usage import MODEL_USED
from infra.demo.events import MODEL, PROVIDER, SOURCE
from infra.demo.publish import PASSWORD_VARIABLE, URL_VARIABLE, connect
from services.kit.publish import Message, PublishFailed, publish_batch

TIMES: Final = 3
BATCH: Final = 500
SECONDS_MAX: Final = 240.0


def messages(load: Load, *, writer: int, writers: int) -> list[Message]:
    """This writer's share of all copies of a load's events."""
    at = datetime.now(UTC).replace(minute=0, second=0, microsecond=0).isoformat().replace("+00:00", "Z")
    made = []
    for use in uses(load):
        event = {
            "specversion": "1.0",
            "id": f"{load.name}:{use.number}",
            "source": SOURCE,
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
        subject = usage_subject(partition=partition_of(use.account), source=SOURCE)
        made.append(Message(subject=subject, payload=msgspec.json.encode(event), message_id=None))
    # All writers deal the same cards: the copies of one event go to any of them.
    copies = made * TIMES
    random.Random(load.seed).shuffle(copies)
    return copies[writer::writers]


async def write(load: Load, *, writer: int, writers: int) -> None:
    """Publish the share; TimeoutError if it is not all confirmed in time."""
    client = await connect(os.environ[URL_VARIABLE], os.environ[PASSWORD_VARIABLE])
    share = messages(load, writer=writer, writers=writers)
    deadline = time.monotonic() + SECONDS_MAX
    for start in range(0, len(share), BATCH):
        while True:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(share) - start} events are not confirmed after {SECONDS_MAX:.0f} s")
            try:
                await publish_batch(client, stream=USAGE, messages=share[start : start + BATCH], timeout_seconds=5)
                break
            except (PublishFailed, nats.errors.Error):
                await asyncio.sleep(0.2)
    await client.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.storm_writer", description="Write a share of a storm.")
    parser.add_argument("--name", required=True)
    for option in ("events", "accounts", "seed", "writer", "writers"):
        parser.add_argument(f"--{option}", type=int, required=True)
    given = parser.parse_args()
    wave = Load(name=given.name, events=given.events, accounts=given.accounts, seed=given.seed)
    asyncio.run(write(wave, writer=given.writer, writers=given.writers))
