"""Callers of the ledger by request/reply, as gateways are: each holds, then settles. Run as a process of its own.

Closed loop: so many callers, each asking again once it is answered. Open loop: pairs begin at a rate, whatever comes
back. Prints one JSON object: pairs done, refused as busy, seconds, and the times of single commands in milliseconds.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import nats.errors
from nats.aio.client import Client

from bench.publisher import account
from contracts.ids import make_id, uuid7
from contracts.partition import partition_of
from contracts.streams import OPERATOR, ledger_command_subject
from infra.demo.publish import PASSWORD_VARIABLE, URL_VARIABLE, connect

TIMEOUT_SECONDS: Final = 10.0
OPEN_PAIRS_MAX: Final = 20_000
HELD: Final = "0.01"
CHARGED: Final = "0.0075"


@dataclass(slots=True)
class Seen:
    """What came back: how often which answer, and how long the accepted ones took."""

    answers: Counter[str] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)
    pairs: int = 0


async def pair(client: Client, number: int, seen: Seen) -> None:
    """One hold and its settlement."""
    name = account(number)
    partition = partition_of(name)
    uuid = uuid7(milliseconds=time.time_ns() // 1_000_000, entropy=os.urandom(10))
    hold = make_id("hold", partition=partition, uuid=uuid)
    placed = (
        f'{{"command":"place_hold","idempotency_key":"{hold}","hold":"{hold}","account":"{name}",'
        f'"legs":[{{"unit":"usd","at_least":"{HELD}","at_most":"{HELD}"}}]}}'
    )
    if not await _ask(client, partition, "place_hold", placed, seen):
        return
    settled = (
        f'{{"command":"settle_hold","idempotency_key":"{hold}:1","hold":"{hold}","account":"{name}",'
        f'"settlement":"{hold}:1","amounts":[{{"amount":"{CHARGED}","unit":"usd"}}]}}'
    )
    if await _ask(client, partition, "settle_hold", settled, seen):
        seen.pairs += 1


async def _ask(client: Client, partition: int, command: str, body: str, seen: Seen) -> bool:
    subject = ledger_command_subject(partition=partition, command=command, principal=OPERATOR)
    begin = time.perf_counter()
    try:
        reply = (await client.request(subject, body.encode(), timeout=TIMEOUT_SECONDS)).data
    except nats.errors.Error as error:
        seen.answers[type(error).__name__] += 1
        return False
    if b'"status":"accepted"' in reply:
        seen.answers["accepted"] += 1
        seen.milliseconds.append((time.perf_counter() - begin) * 1000)
        return True
    seen.answers[json.loads(reply).get("code", "?")] += 1
    return False


async def closed_loop(client: Client, *, callers: int, seconds: float, accounts: int, seen: Seen) -> None:
    """So many callers, one after another's answer."""
    end = time.perf_counter() + seconds

    async def call(seed: int) -> None:
        chosen = random.Random(seed)
        while time.perf_counter() < end:
            await pair(client, chosen.randrange(accounts), seen)

    await asyncio.gather(*(call(seed) for seed in range(callers)))


async def open_loop(client: Client, *, pairs_per_second: float, seconds: float, accounts: int, seen: Seen) -> None:
    """Pairs begin at random times, at a rate, whether the ones before have ended or not."""
    chosen = random.Random(1)
    begin = at = time.perf_counter()
    running: set[asyncio.Task[None]] = set()
    while at < begin + seconds and len(running) < OPEN_PAIRS_MAX:
        at += chosen.expovariate(pairs_per_second)
        if (wait := at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(pair(client, chosen.randrange(accounts), seen))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def _run(arguments: argparse.Namespace) -> None:
    client = await connect(os.environ[URL_VARIABLE], os.environ[PASSWORD_VARIABLE], user="ledger")
    seen = Seen()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    if arguments.rate:
        await open_loop(
            client, pairs_per_second=arguments.rate, seconds=arguments.seconds, accounts=arguments.accounts, seen=seen
        )
    else:
        await closed_loop(
            client, callers=arguments.callers, seconds=arguments.seconds, accounts=arguments.accounts, seen=seen
        )
    taken = sorted(seen.milliseconds)
    report = {
        "pairs": seen.pairs,
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu_begin,
        "answers": dict(seen.answers),
        "p50": statistics.median(taken) if taken else None,
        "p99": taken[int(len(taken) * 0.99)] if taken else None,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    await client.close()


def main() -> None:
    """Call for a while, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=64, help="callers of the closed loop")
    parser.add_argument("--rate", type=float, default=0.0, help="pairs per second: an open loop instead")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--accounts", type=int, default=10_000)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
