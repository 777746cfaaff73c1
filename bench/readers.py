"""Asks for balances over HTTP at a rate, whatever comes back, over connections kept open. A process of its own.

Prints one JSON object: answered, seconds, and the times from when a request was due to its answer, in milliseconds.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from typing import Final

import httpx2

from bench.publisher import account

CONNECTIONS: Final = 32


async def _run(arguments: argparse.Namespace) -> None:
    chosen = random.Random(3)
    limits = httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    taken: list[float] = []
    failed = 0
    async with httpx2.AsyncClient(
        base_url=arguments.url, headers={"Authorization": f"Bearer {arguments.token}"}, limits=limits, timeout=30
    ) as client:

        async def ask(due: float) -> None:
            nonlocal failed
            answer = await client.get(f"/v1/balances/{account(chosen.randrange(arguments.accounts))}")
            if answer.status_code == httpx2.codes.OK:
                taken.append((time.perf_counter() - due) * 1000)
            else:
                failed += 1

        begin = time.perf_counter()
        running: set[asyncio.Task[None]] = set()
        for number in range(arguments.rate * arguments.seconds):
            due = begin + number / arguments.rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(ask(due))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        seconds = time.perf_counter() - begin
    taken.sort()
    report = {
        "answered": len(taken),
        "failed": failed,
        "seconds": seconds,
        "p50": statistics.median(taken),
        "p99": taken[int(len(taken) * 0.99)],
    }
    sys.stdout.write(json.dumps(report) + "\n")


def main() -> None:
    """Ask for a while, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--rate", type=int, default=500)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--accounts", type=int, default=10_000)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
