"""Usage events for the tests: valid by default, and the two doors by which they come in."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from contracts.partition import partition_of
from contracts.streams import USAGE, usage_subject
from infra.demo.publish import connect
from infra.demo.scratch_stack import ScratchStack
from services.kit.publish import Message, publish

SETTLE_SECONDS_MAX = 20.0

Value = TypeVar("Value")


def event(event_id: str, account: str, **changes: Any) -> dict[str, Any]:
    """A use of 1,000 input and 100 output tokens, an hour ago: 0.00021 dollars. `changes` replace or add fields."""
    body: dict[str, Any] = {
        "specversion": "1.0",
        "id": event_id,
        "source": "demo",
        "type": "scrip.model.used.v1",
        "subject": account,
        "time": at(timedelta(hours=-1)),
        "data": {"provider": "openai", "model": "gpt-4o-mini", "input_tokens": 1000, "output_tokens": 100},
    }
    return body | changes


def at(offset: timedelta) -> str:
    """A time relative to the present, as events carry it."""
    return (datetime.now(UTC) + offset).isoformat()


def fresh(name: str) -> str:
    """A name that no earlier test used."""
    return f"{name}-{os.urandom(4).hex()}"


def send(stack: ScratchStack, *bodies: bytes | dict[str, Any], account: str, partition: int | None = None) -> None:
    """Publish over NATS as the source `demo`, on the subject of the account's partition or of another one."""
    subject = usage_subject(partition=partition_of(account) if partition is None else partition, source="demo")

    async def run() -> None:
        client = await connect(f"nats://127.0.0.1:{stack.run.ports['nats']}", stack.credentials.nats["demo"])
        try:
            for body in bodies:
                payload = body if isinstance(body, bytes) else json.dumps(body).encode()
                message = Message(subject=subject, payload=payload, message_id=os.urandom(8).hex())
                await publish(client, stream=USAGE, message=message)
        finally:
            await client.close()

    asyncio.run(run())


def eventually(read: Callable[[], Value], holds: Callable[[Value], bool]) -> Value:
    """What is read as soon as it holds. AssertionError with the last reading otherwise."""
    deadline = time.monotonic() + SETTLE_SECONDS_MAX
    while not holds(found := read()):
        assert time.monotonic() < deadline, f"never held, last read: {found!r}"
        time.sleep(0.05)
    return found
