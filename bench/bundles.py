"""Publishes charge bundles to the ledger as metering does, numbered without gaps. Run as a process of its own.

The bundles are made before the clock starts. Prints one JSON object: when it began and ended, and its CPU time.
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
from datetime import UTC, datetime
from typing import Final

from bench.publisher import account
from contracts.money import Amount
from contracts.partition import partition_of
from contracts.streams import CHARGES, charges_rated_subject
from infra.demo.publish import PASSWORD_VARIABLE, URL_VARIABLE, connect
from services.kit.publish import Message, publish_batch

LINES: Final = 500
BUNDLES_PER_PUBLISH: Final = 8
SCOPE: Final = '"scope":{"provider":"openai","model":"gpt-4o-mini"},"price_version":"2026-11-01"'


def costs(*, lines: int, accounts: int, seed: int) -> Iterator[tuple[str, int]]:
    """The account and the nano-dollars of each line, in order."""
    chosen = random.Random(seed)
    for _ in range(lines):
        yield account(int(chosen.random() * accounts)), 10_000 + int(chosen.random() * 500_000)


def expected(*, lines: int, accounts: int, seed: int) -> Counter[str]:
    """What a load costs, in nano-dollars by account."""
    nanos: Counter[str] = Counter()
    for name, cost in costs(lines=lines, accounts=accounts, seed=seed):
        nanos[name] += cost
    return nanos


def bundles(load: str, *, lines: int, accounts: int, seed: int, after: dict[int, int]) -> list[Message]:
    """The messages of a load. `after`: the number of each partition's last bundle."""
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    waiting: dict[int, list[str]] = {}
    made: list[Message] = []
    numbers = dict(after)

    def close(partition: int) -> None:
        numbers[partition] = number = numbers.get(partition, 0) + 1
        body = (
            f'{{"type":"metering.charges.rated.v1","partition":{partition},"number":{number},'
            f'"recorded_at":"{now}","lines":[{",".join(waiting.pop(partition))}]}}'
        )
        made.append(
            Message(
                subject=charges_rated_subject(partition),
                payload=body.encode(),
                message_id=f"{load}-{partition}-{number}",
            )
        )

    for number, (name, cost) in enumerate(costs(lines=lines, accounts=accounts, seed=seed)):
        partition = partition_of(name)
        amount = Amount(amount=f"0.{cost:09d}".rstrip("0"), unit="usd").model_dump_json()
        waiting.setdefault(partition, []).append(
            f'{{"source":"bench","event_id":"{load}-{number}","account":"{name}","occurred_at":"{now}",'
            f'{SCOPE},"amounts":[{amount}]}}'
        )
        if len(waiting[partition]) == LINES:
            close(partition)
    for partition in list(waiting):
        close(partition)
    return made


async def _run(arguments: argparse.Namespace) -> None:
    after = {int(partition): number for partition, number in json.loads(arguments.after).items()}
    made = bundles(arguments.name, lines=arguments.lines, accounts=arguments.accounts, seed=arguments.seed, after=after)
    client = await connect(os.environ[URL_VARIABLE], os.environ[PASSWORD_VARIABLE], user="metering")
    begin, cpu_begin = time.monotonic(), time.process_time()
    published = 0
    for start in range(0, len(made), BUNDLES_PER_PUBLISH):
        if arguments.rate and (wait := begin + published / arguments.rate - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        published += BUNDLES_PER_PUBLISH * LINES
        batch = made[start : start + BUNDLES_PER_PUBLISH]
        await publish_batch(client, stream=CHARGES, messages=batch, timeout_seconds=30)
    report = {"begin": begin, "end": time.monotonic(), "cpu_seconds": time.process_time() - cpu_begin}
    sys.stdout.write(json.dumps(report) + "\n")
    await client.close()


def main() -> None:
    """Publish a load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--lines", type=int, required=True)
    parser.add_argument("--accounts", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rate", type=float, default=0.0, help="lines a second; 0: as fast as can be")
    parser.add_argument("--after", required=True, help="JSON: the number of each partition's last bundle")
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
