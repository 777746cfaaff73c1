"""Usage events from the first publish to the last balance, everything durable, beside the rival's transaction.

Starts a stack of its own in a temporary directory, asks the servers what they keep, and checks the totals of every run.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from bench import cpu, funding, per_event
from bench.measured import Measured, facts
from bench.per_event import Rate
from bench.publisher import TOKEN_VARIABLE, Load, account, expected
from contracts.streams import OPERATOR
from infra.demo.publish import PASSWORD_VARIABLE, URL_VARIABLE
from infra.demo.scratch_stack import REPOSITORY, ScratchStack

ACCOUNTS: Final = 10_000
RIVAL_EVENTS_MAX: Final = 8_000
DELAY_SECONDS: Final = 20
PARTS: Final = ("nats", "http", "delay", "growth")
# Whose cost could grow with what is there already.
GROWING: Final = ("NATS", "metering", "ledger", "PostgreSQL")


@dataclass(frozen=True, slots=True)
class Run:
    """One load through the pipeline. `cpu_seconds` and `bytes_written` are by process and by place."""

    events: int
    publish_seconds: float
    seconds: float
    cpu_seconds: Mapping[str, float]
    machine_busy: float
    bytes_written: Mapping[str, int]

    @property
    def events_per_second(self) -> float:
        return self.events / self.seconds


@dataclass(frozen=True, slots=True)
class Variant:
    """A shape of load: how many accounts share it."""

    title: str
    accounts: int


VARIANTS: Final = (Variant("10,000 accounts", ACCOUNTS), Variant("one hot account", 1))


class TotalsDiffer(Exception):
    """A run's balances are not what its events cost: its speed means nothing."""


class Bench(Measured):
    """The stack through which loads are sent."""

    def __init__(
        self, scratch: ScratchStack, *, in_flight: int, console: Console, profile: bool = False, singly: bool = False
    ) -> None:
        super().__init__(scratch, console=console)
        self._in_flight = in_flight
        self._singly = singly
        if profile:
            pids = scratch.run.processes
            console.print(f"processes to profile, with py-spy or perf: {pids}", markup=False)

    def open_accounts(self) -> None:
        """Open and fund every account of the loads: by request/reply, as HTTP would cost more than what is measured."""
        begin = time.monotonic()
        asyncio.run(funding.open_accounts(self.stack, [account(number) for number in range(ACCOUNTS)]))
        known = "SELECT count(*) FROM metering.directory"
        self.wait_for(lambda: self.count(known), ACCOUNTS, "accounts known to metering")
        self.console.print(
            f"{ACCOUNTS:,} accounts opened and funded in {time.monotonic() - begin:.0f} s", highlight=False
        )

    def run(self, load: Load, *, rate: float | None = None, over_http: bool = False) -> Run:
        """Send a load through, at a rate if it has one, wait for the last balance, check the totals."""
        balances = self.posted()
        lines = self.lines_taken()
        written = self.bytes_written()
        pids = self.scratch.run.processes
        used_before = {name: cpu.cpu_seconds(pid) for name, pid in pids.items()}
        machine = cpu.machine()
        publisher = subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.publisher", "--name", load.name, "--events", str(load.events)),
                *("--accounts", str(load.accounts), "--seed", str(load.seed), "--in-flight", str(self._in_flight)),
                *(() if rate is None else ("--rate", str(rate))),
                *(("--singly",) if self._singly else ()),
                *(("--random-ids",) if load.random_ids else ()),
                *(("--url", self.stack.service_url("metering")) if over_http else ()),
            ],
            env=dict(os.environ)
            | {URL_VARIABLE: self.stack.nats_url, PASSWORD_VARIABLE: self.stack.credentials.nats["demo"]}
            | {TOKEN_VARIABLE: self.stack.credentials.tokens[OPERATOR]},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.wait_for(self.lines_taken, lines + load.events, "charged lines", publisher)
        end = time.monotonic()
        machine_busy = cpu.busy(machine, cpu.machine())
        used = {name: cpu.cpu_seconds(pid) - used_before[name] for name, pid in pids.items()}
        output, _ = publisher.communicate(timeout=60)
        published = json.loads(output)
        self._check(load, balances)
        return Run(
            events=load.events,
            publish_seconds=published["end"] - published["begin"],
            seconds=end - published["begin"],
            cpu_seconds={"publisher": published["cpu_seconds"], **used},
            machine_busy=machine_busy,
            bytes_written={place: after - written[place] for place, after in self.bytes_written().items()},
        )

    def delays(self, name: str) -> tuple[float, float]:
        """Milliseconds from when an event of a load was due to when the ledger charged it: half and 99 % took less."""
        half, most = (
            self.count(
                f"SELECT extract(epoch FROM percentile_disc({share}) WITHIN GROUP (ORDER BY recorded_at - occurred_at))"
                f" * 1000000 FROM ledger.charge_lines WHERE event_id LIKE '{name}:%'"
            )
            for share in (0.5, 0.99)
        )
        return half / 1000, most / 1000

    def _check(self, load: Load, before: Mapping[str, int]) -> None:
        after = self.posted()
        moved = {name: before[name] - posted for name, posted in after.items() if before[name] != posted}
        wanted = expected(load)
        if moved != dict(wanted):
            raise TotalsDiffer(
                f"{load.name}: balances moved by {sum(moved.values())} nano-dollars on {len(moved)} accounts,"
                f" the events cost {sum(wanted.values())} on {len(wanted)}"
            )


def main() -> None:
    """Measure what is named, everything by default, and print."""
    arguments = _arguments()
    console = Console(width=120)
    with (
        tempfile.TemporaryDirectory(prefix="scrip-bench-") as directory,
        ScratchStack(Path(directory)) as scratch,
        closing(
            Bench(
                scratch,
                in_flight=arguments.in_flight,
                console=console,
                profile=arguments.profile,
                singly=arguments.singly,
            )
        ) as bench,
    ):
        console.print(facts(bench.durability()))
        bench.open_accounts()
        bench.run(Load(name="warm-up", events=min(arguments.events, 5_000), accounts=ACCOUNTS, seed=0))
        parts = arguments.parts or PARTS
        highest = arguments.rate
        if "nats" in parts:
            highest = nats(bench, events=arguments.events, rounds=arguments.rounds)
        if "http" in parts:
            http(bench, events=arguments.events, rounds=arguments.rounds)
        if "delay" in parts:
            if highest is None:
                highest = bench.run(Load("highest", arguments.events, ACCOUNTS, seed=1)).events_per_second
            delay(bench, events=arguments.events, rate=highest / 2)
        if "growth" in parts:
            growth(bench, events=arguments.events, loads=arguments.loads, random_ids=arguments.random_ids)


def nats(bench: Bench, *, events: int, rounds: int) -> float:
    """As fast as it goes over NATS, beside the rival; events per second on many accounts."""
    bench.console.print(
        f"The rival does this for every event, in one transaction:\n  {per_event.TAKE}\n  {per_event.WRITE}",
        markup=False,
        highlight=False,
    )
    runs: dict[str, list[Run]] = {variant.title: [] for variant in VARIANTS}
    rates: dict[str, list[Rate]] = {variant.title: [] for variant in VARIANTS}
    # Interleaved: what else the machine does meets both alike.
    for number in range(1, rounds + 1):
        for variant in VARIANTS:
            run = bench.run(Load(f"{variant.title}-{number}", events, variant.accounts, seed=number))
            runs[variant.title].append(run)
            found = bench.rival(accounts=variant.accounts, events=max(500, min(events // 10, RIVAL_EVENTS_MAX)))
            rates[variant.title] += found
            bench.console.print(
                f"round {number}, {variant.title}: {run.events_per_second:,.0f} events/s;"
                + "".join(f" {rate.client} x{rate.connections} {rate.events_per_second:,.0f}" for rate in found),
                highlight=False,
            )
    for variant in VARIANTS:
        _show(bench.console, variant.title, runs[variant.title], rates[variant.title])
    return statistics.median(run.events_per_second for run in runs[VARIANTS[0].title])


def http(bench: Bench, *, events: int, rounds: int) -> None:
    """As fast as it goes over HTTP, in batches of the most that is taken at once."""
    runs = [
        bench.run(Load(f"http-{number}", events, ACCOUNTS, seed=number), over_http=True)
        for number in range(1, rounds + 1)
    ]
    _show(bench.console, f"over HTTP, {ACCOUNTS:,} accounts", runs, [])


def delay(bench: Bench, *, events: int, rate: float) -> None:
    """From when an event was due to be sent to its charge in the ledger, at a rate that leaves room."""
    load = Load("delay", min(events, int(rate * DELAY_SECONDS)), ACCOUNTS, seed=7)
    run = bench.run(load, rate=rate)
    half, most = bench.delays(load.name)
    bench.console.print(
        f"at {load.events / run.publish_seconds:,.0f} events/s: due to charged p50 {half:,.0f} ms, p99 {most:,.0f} ms",
        highlight=False,
    )


def growth(bench: Bench, *, events: int, loads: int, random_ids: bool) -> None:
    """One load after another: what each event costs, and what metering's process holds, as the log grows."""
    before = bench.count("SELECT count(*) FROM metering.seen")
    bench.console.print("events before: events/s; CPU an event, µs; metering holds", highlight=False)
    for number in range(loads):
        run = bench.run(Load(f"growth-{number}", events, ACCOUNTS, seed=number, random_ids=random_ids))
        bench.console.print(
            f"{before + number * events:>10,}: {run.events_per_second:>6,.0f};"
            + "".join(f" {name} {run.cpu_seconds[name] / events * 1e6:.1f}" for name in GROWING)
            + f"; {bench.resident_bytes('metering') / 2**20:.0f} MiB",
            highlight=False,
        )


def _show(console: Console, title: str, runs: list[Run], rates: list[Rate]) -> None:
    ours = statistics.median(run.events_per_second for run in runs)
    speeds = sorted(run.events_per_second for run in runs)
    table = Table(title=f"{title}: median of {len(runs)} runs of {runs[0].events:,} events", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("events/s, first publish to last balance", f"{ours:,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})")
    table.add_row("events/s published", f"{statistics.median(run.events / run.publish_seconds for run in runs):,.0f}")
    for client in sorted({rate.client for rate in rates}):
        of_pool = {
            connections: statistics.median(
                rate.events_per_second for rate in rates if (rate.client, rate.connections) == (client, connections)
            )
            for connections in per_event.POOL_SIZES
        }
        connections, rival = max(of_pool.items(), key=lambda found: found[1])
        table.add_row(f"per-event transaction, {client}, best of pools: {connections}", f"{rival:,.0f}")
        table.add_row(f"ratio to {client}", f"{ours / rival:.1f}")
    for name in runs[0].cpu_seconds:
        each = statistics.median(run.cpu_seconds[name] / run.events * 1e6 for run in runs)
        share = statistics.median(run.cpu_seconds[name] / run.seconds for run in runs)
        table.add_row(f"CPU of {name}", f"{each:.1f} µs an event, {share:.0%} of a core")
    for place in runs[0].bytes_written:
        written = statistics.median(run.bytes_written[place] / run.events for run in runs)
        table.add_row(f"bytes on disk, {place}", f"{written:,.0f} an event")
    table.add_row("CPU of everything else on the machine", f"{_others(runs):.0%} of a core")
    table.add_row("bound by", _bound(runs))
    console.print(table)


def _others(runs: list[Run]) -> float:
    """What ran beside: more than a few percent, and the numbers are too low."""
    cores = os.cpu_count() or 1
    return statistics.median(run.machine_busy * cores - sum(run.cpu_seconds.values()) / run.seconds for run in runs)


def _bound(runs: list[Run]) -> str:
    busy = statistics.median(run.machine_busy for run in runs)
    if busy > 0.9:
        return f"CPU: all cores {busy:.0%} busy"
    shares = {
        name: statistics.median(run.cpu_seconds[name] / run.seconds for run in runs) for name in runs[0].cpu_seconds
    }
    name, share = max(shares.items(), key=lambda found: found[1])
    if share > 0.85 and name not in ("NATS", "PostgreSQL"):
        return f"the one thread of {name}: {share:.0%} of a core, the machine {busy:.0%} busy"
    return f"waiting (syncs, round trips): the machine {busy:.0%} busy, {name} the most with {share:.0%} of a core"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.metering", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="what to measure; everything by default")
    parser.add_argument("--events", type=int, default=100_000, help="events per run")
    parser.add_argument("--rounds", type=int, default=5, help="runs per variant")
    parser.add_argument("--loads", type=int, default=5, help="of `growth`, one after the other")
    parser.add_argument("--random-ids", action="store_true", help="of `growth`: ids as if drawn, rather than in order")
    parser.add_argument("--rate", type=float, help="the highest, if it is known; `delay` takes half of it")
    parser.add_argument("--in-flight", type=int, default=2, help="atomic batches the publisher has under way")
    parser.add_argument("--singly", action="store_true", help="over NATS, each event in a message of its own")
    parser.add_argument("--profile", action="store_true", help="print the processes' ids, for py-spy or perf")
    return parser.parse_args()


if __name__ == "__main__":
    main()
