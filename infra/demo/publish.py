"""The publisher: a process of its own that sends the trace as NATS user `demo`, and is told of nothing but NATS.

It keeps no cursor: started again it sends everything again, under the same ids.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

import nats
import uvloop
from nats.aio.client import Client

from contracts.streams import USAGE, inbox_prefix
from infra.demo.events import SOURCE, message
from infra.demo.trace import Request, requests
from services.kit.publish import BATCH_SIZE_MAX, Message, Published, PublishFailed, publish_batch

URL_VARIABLE: Final = "SCRIP_NATS_URL"
PASSWORD_VARIABLE: Final = "SCRIP_NATS_PASSWORD"
PENDING_BYTES_MAX: Final = 16 << 20
RETRY_SECONDS: Final = 0.25
ENDED_EARLY: Final = "publisher: ended early; the next run sends everything again, and what is known counts once"


@dataclass(frozen=True, slots=True)
class Sendings:
    """What to send: the first `rows_max` rows, `times` times, in the order of the trace or shuffled by a seed."""

    anchor: datetime
    edition: str = ""
    rows_max: int | None = None
    times: int = 1
    shuffle: int | None = None
    batch_size: int = BATCH_SIZE_MAX
    rate_per_second: float | None = None
    without_progress_seconds_max: float = 60.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the publisher is. `duplicates` are confirmed, too: the stream knew their ids already."""

    total: int
    confirmed: int = 0
    duplicates: int = 0
    in_flight: int = 0


class PublisherGaveUp(Exception):
    """Nothing was confirmed for too long."""


def messages(sendings: Sendings, rows: Sequence[Request]) -> list[Message]:
    """Every message, in the order of sending."""
    found = [
        message(row, anchor=sendings.anchor, edition=sendings.edition, sending=sending)
        for sending in range(sendings.times)
        for row in rows
    ]
    if sendings.shuffle is not None:
        random.Random(sendings.shuffle).shuffle(found)
    return found


async def publish_all(client: Client, sendings: Sendings, report: Callable[[Progress], None]) -> Progress:
    """Publish until everything is confirmed. Raises PublisherGaveUp."""
    waiting = messages(sendings, requests(rows_max=sendings.rows_max))
    progress = Progress(total=len(waiting))
    begin = progressed = time.monotonic()
    batch: list[Message] = []
    while batch or waiting:
        if not batch:
            batch, waiting = waiting[: sendings.batch_size], waiting[sendings.batch_size :]
        report(replace(progress, in_flight=len(batch)))
        found, batch, reason = await _attempt(client, batch)
        progress = replace(
            progress,
            confirmed=progress.confirmed + len(found),
            duplicates=progress.duplicates + sum(one.duplicate for one in found),
            in_flight=len(batch),
        )
        report(progress)
        if found:
            progressed = time.monotonic()
        elif time.monotonic() - progressed > sendings.without_progress_seconds_max:
            raise PublisherGaveUp(
                f"NATS confirmed nothing for {sendings.without_progress_seconds_max:.0f} seconds: {reason}"
            )
        if batch:
            await asyncio.sleep(RETRY_SECONDS)
        elif sendings.rate_per_second:
            await asyncio.sleep(begin + progress.confirmed / sendings.rate_per_second - time.monotonic())
    return progress


async def connect(url: str, password: str, *, user: str = SOURCE) -> Client:
    """A connection as a service has it: its own user, its own inbox, reconnecting for ever."""

    said: set[str] = set()

    async def complain(error: Exception) -> None:
        text = str(error) or type(error).__name__
        # While a server restarts the same error comes at every attempt.
        if text not in said:
            said.add(text)
            sys.stderr.write(f"publisher: {text}\n")

    return await nats.connect(
        url,
        user=user,
        password=password,
        name=f"{user}-publisher",
        inbox_prefix=inbox_prefix(user),
        pending_size=PENDING_BYTES_MAX,
        max_reconnect_attempts=-1,
        reconnect_time_wait=RETRY_SECONDS,
        connect_timeout=2,
        error_cb=complain,
    )


async def _attempt(client: Client, batch: list[Message]) -> tuple[list[Published], list[Message], str]:
    """What was confirmed, what is to be sent again, and why."""
    try:
        return await publish_batch(client, stream=USAGE, messages=batch), [], ""
    except PublishFailed as error:
        # Refused or unconfirmed, the ids stay the same: sending again is harmless.
        left = [batch[place] for place in sorted(error.failed)]
        return list(error.confirmed.values()), left, str(error)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.demo.publish", description="Publish the trace as usage.")
    parser.add_argument("--anchor", type=datetime.fromisoformat, required=True, help="time of the first event")
    parser.add_argument("--edition", default="", help="another copy of the job: its own ids and accounts")
    parser.add_argument("--rows", type=int, help="only the first ROWS rows")
    parser.add_argument("--times", type=int, default=1, help="how often to send every event")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="send in another order")
    parser.add_argument("--batch", type=int, default=BATCH_SIZE_MAX, help="events per atomic batch")
    parser.add_argument("--rate", type=float, metavar="EVENTS", help="at most so many per second")
    parser.add_argument("--status", type=Path, help="a file that always holds the last progress")
    return parser.parse_args()


async def _main(arguments: argparse.Namespace) -> None:
    """Progress goes to stdout, a JSON object a line; who reads it ends this process by closing the pipe."""
    client = await connect(os.environ[URL_VARIABLE], os.environ[PASSWORD_VARIABLE])

    def report(progress: Progress) -> None:
        line = json.dumps(asdict(progress))
        if arguments.status:
            arguments.status.write_text(line)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    sendings = Sendings(
        anchor=arguments.anchor,
        edition=arguments.edition,
        rows_max=arguments.rows,
        times=arguments.times,
        shuffle=arguments.shuffle,
        batch_size=arguments.batch,
        rate_per_second=arguments.rate,
    )
    try:
        await publish_all(client, sendings, report)
    finally:
        await client.close()


def _nobody_listens() -> None:
    """Let what is still buffered for a closed pipe go nowhere, or Python complains of it at the very end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    try:
        uvloop.run(_main(_arguments()))
    except (BrokenPipeError, KeyboardInterrupt):
        _nobody_listens()
        sys.stderr.write(f"{ENDED_EARLY}\n")
        sys.exit(130)
    except (PublisherGaveUp, nats.errors.Error, OSError) as error:
        sys.stderr.write(f"publisher: {str(error) or type(error).__name__}\n")
        sys.exit(1)
    except KeyError as error:
        sys.stderr.write(f"publisher: the environment lacks {error}: start it through `scrip demo`\n")
        sys.exit(2)
