"""The ledger by itself: charges, holds, reads, replay and audit, everything durable, beside the rival's transaction.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench import bundles, cpu, funding, per_event
from bench.measured import POLL_SECONDS, Measured, facts
from bench.per_event import Rate
from bench.publisher import account
from infra.demo.publish import PASSWORD_VARIABLE, URL_VARIABLE
from infra.demo.scratch_stack import REPOSITORY, ScratchStack
from infra.services import LEDGER_READER
from infra.supervisor import READY_SECONDS_MAX, ServiceProcess, unready

ACCOUNTS: Final = 10_000
RIVAL_EVENTS: Final = 5_000
CALLERS: Final = 64
HOLDS_BESIDE_CHARGES: Final = 100
# More than it can charge: what is asked besides stands behind a queue of them.
CHARGES_BESIDE_HOLDS: Final = 30_000
PARTS: Final = ("charges", "holds", "reads", "rebuild", "memory")


@dataclass(frozen=True, slots=True)
class Charged:
    """One load of charge bundles: lines, seconds to the last commit, CPU seconds by process, bytes on disk by place."""

    lines: int
    seconds: float
    cpu_seconds: Mapping[str, float]
    machine_busy: float
    bytes_written: Mapping[str, int]

    @property
    def rate(self) -> float:
        return self.lines / self.seconds


class LedgerBench(Measured):
    """The stack whose ledger is measured; its other services run, and are idle."""

    def open_accounts(self, count: int) -> None:
        """Open and fund accounts."""
        begin = time.monotonic()
        asyncio.run(funding.open_accounts(self.stack, [account(number) for number in range(count)]))
        # Until metering has heard of them all, it would take its part of what is measured.
        self.wait_for(lambda: self.count("SELECT count(*) FROM metering.directory"), count, "accounts in the directory")
        self.console.print(f"{count:,} accounts opened, funded in {time.monotonic() - begin:.0f} s", highlight=False)

    def charge(self, name: str, *, lines: int, accounts: int, seed: int) -> Charged:
        """Publish bundles of charges, wait until the last is committed, check every balance."""
        balances, taken = self.posted(), self.lines_taken()
        written, pids = self.bytes_written(), self.scratch.run.processes
        used = {process: cpu.cpu_seconds(pid) for process, pid in pids.items()}
        machine = cpu.machine()
        publisher = self._spawn(
            "bench.bundles",
            "metering",
            *("--name", name, "--lines", str(lines), "--accounts", str(accounts), "--seed", str(seed)),
            *("--after", json.dumps(self._charges_numbers())),
        )
        self.wait_for(self.lines_taken, taken + lines, "charged lines", publisher)
        end, machine_busy = time.monotonic(), cpu.busy(machine, cpu.machine())
        used = {process: cpu.cpu_seconds(pid) - used[process] for process, pid in pids.items()}
        published = json.loads(publisher.communicate(timeout=60)[0])
        moved = {who: balances[who] - posted for who, posted in self.posted().items() if balances[who] != posted}
        wanted = bundles.expected(lines=lines, accounts=accounts, seed=seed)
        if moved != dict(wanted):
            raise AssertionError(f"{name}: {sum(moved.values())} nano-dollars charged, {sum(wanted.values())} expected")
        return Charged(
            lines=lines,
            seconds=end - published["begin"],
            cpu_seconds={"publisher": published["cpu_seconds"], **used},
            machine_busy=machine_busy,
            bytes_written={place: after - written[place] for place, after in self.bytes_written().items()},
        )

    def call(self, *arguments: str) -> dict[str, Any]:
        """Run callers of holds and settlements; their report."""
        callers = self._spawn("bench.callers", "ledger", *arguments)
        report: dict[str, Any] = json.loads(callers.communicate(timeout=300)[0])
        return report

    @contextmanager
    def reader(self) -> Iterator[int]:
        """A ledger that owns no partitions runs beside the owner, and answers; its process id."""
        log_file = self.scratch.layout.logs / f"{LEDGER_READER.name}.log"
        process = ServiceProcess(
            LEDGER_READER, environment=self.stack.service_environment(LEDGER_READER), log_file=log_file
        )
        process.start()
        try:
            deadline = time.monotonic() + READY_SECONDS_MAX
            while (why := unready(self.stack.service_url(LEDGER_READER.name))) is not None:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the reading ledger is not ready: {why}")
                time.sleep(POLL_SECONDS)
            assert process.process is not None
            yield process.process.pid
        finally:
            process.stop()

    def read(self, *, of: str, rate: int, seconds: int) -> dict[str, Any]:
        """Ask a service for balances over HTTP at a rate; the report of those who ask."""
        readers = self._spawn(
            "bench.readers",
            "ledger",
            *("--url", self.stack.service_url(of), "--token", self.stack.credentials.tokens["operator"]),
            *("--rate", str(rate), "--seconds", str(seconds), "--accounts", str(ACCOUNTS)),
        )
        report: dict[str, Any] = json.loads(readers.communicate(timeout=seconds + 120)[0])
        return report

    def start_charging(
        self, name: str, *, lines: int, accounts: int, seed: int, rate: float = 0.0
    ) -> "subprocess.Popen[str]":
        """Charge in the background, as fast as can be or at a rate."""
        return self._spawn(
            "bench.bundles",
            "metering",
            *("--name", name, "--lines", str(lines), "--accounts", str(accounts), "--seed", str(seed)),
            *("--rate", str(rate), "--after", json.dumps(self._charges_numbers())),
        )

    def journal_entries(self) -> int:
        """How many entries the journal has."""
        return self.count("SELECT count(*) FROM ledger.journal")

    def _spawn(self, module: str, user: str, *arguments: str) -> "subprocess.Popen[str]":
        environment = {URL_VARIABLE: self.stack.nats_url, PASSWORD_VARIABLE: self.stack.credentials.nats[user]}
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=dict(os.environ) | environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _charges_numbers(self) -> dict[int, int]:
        return dict(self._database.execute("SELECT partition, charges_number FROM ledger.heads").fetchall())


def charges(bench: LedgerBench, *, lines: int, rounds: int) -> None:
    """Charges per second on one hot account and on 10,000, each beside the rival in the same round."""
    bench.charge("warm-up", lines=5_000, accounts=ACCOUNTS, seed=0)
    found: dict[int, list[Charged]] = {1: [], ACCOUNTS: []}
    rivals: dict[int, list[Rate]] = {1: [], ACCOUNTS: []}
    for number in range(1, rounds + 1):
        for accounts, runs in found.items():
            runs.append(bench.charge(f"{accounts}-{number}", lines=lines, accounts=accounts, seed=number))
            rates = bench.rival(accounts=accounts, events=RIVAL_EVENTS)
            rivals[accounts] += rates
            bench.console.print(
                f"round {number}, {accounts:,} accounts: {runs[-1].rate:,.0f} charges/s; "
                + ", ".join(f"{rate.client} x{rate.connections} {rate.events_per_second:,.0f}" for rate in rates),
                highlight=False,
            )
    for accounts, runs in found.items():
        _show_charges(bench.console, accounts, runs, rivals[accounts])


def _show_charges(console: Console, accounts: int, runs: list[Charged], rivals: list[Rate]) -> None:
    table = Table(title=f"charges, {'one hot account' if accounts == 1 else f'{accounts:,} accounts'}")
    table.add_column("what")
    table.add_column("median", justify="right")
    ours = statistics.median(run.rate for run in runs)
    table.add_row("charges/s", f"{ours:,.0f} ({min(r.rate for r in runs):,.0f} to {max(r.rate for r in runs):,.0f})")
    for client in ("psycopg", "pgbench"):
        by_pool: dict[int, list[float]] = {}
        for rate in rivals:
            if rate.client == client:
                by_pool.setdefault(rate.connections, []).append(rate.events_per_second)
        if by_pool:
            pool, median = max(((pool, statistics.median(each)) for pool, each in by_pool.items()), key=lambda x: x[1])
            table.add_row(f"rival through {client}, best pool", f"{median:,.0f} ({pool})")
            table.add_row("ratio", f"{ours / median:.1f}")
    run = runs[-1]
    for process, seconds in run.cpu_seconds.items():
        if seconds / run.lines >= 5e-7:
            table.add_row(f"CPU µs per charge: {process}", f"{seconds / run.lines * 1e6:.1f}")
    for place, size in run.bytes_written.items():
        table.add_row(f"bytes per charge: {place}", f"{size / run.lines:,.0f}")
    table.add_row("cores busy", f"{statistics.median(each.machine_busy for each in runs):.0%}")
    console.print(table)


def holds(bench: LedgerBench, *, seconds: int, rounds: int) -> None:
    """Hold and settle by request/reply: the most, at half of it, far above it, and a little beside many charges."""
    table = Table(title="hold + settle by request/reply, 10,000 accounts")
    for column in ("load", "pairs/s", "p50 ms", "p99 ms", "answers"):
        table.add_column(column, justify="left" if column in {"load", "answers"} else "right")
    most = [bench.call("--callers", str(CALLERS), "--seconds", str(seconds)) for _ in range(rounds)]
    highest = statistics.median(report["pairs"] / report["seconds"] for report in most)
    loads = [(f"{CALLERS} callers", report) for report in most]
    for share in (0.5, 2.0):
        report = bench.call("--rate", str(highest * share), "--seconds", str(seconds))
        loads.append((f"open loop, {share:.0%} of that", report))
    report = _while_charging(
        bench,
        "holds",
        rate=CHARGES_BESIDE_HOLDS,
        full=True,
        seconds=seconds,
        work=partial(bench.call, "--rate", str(HOLDS_BESIDE_CHARGES), "--seconds", str(seconds)),
    )
    loads.append((f"open loop, while {report['charged']:,.0f} charges/s", report))
    for title, report in loads:
        table.add_row(
            title,
            f"{report['pairs'] / report['seconds']:,.0f}",
            f"{report['p50']:.1f}",
            f"{report['p99']:.1f}",
            ", ".join(f"{name} {count:,}" for name, count in report["answers"].items()),
        )
    bench.console.print(table)


def reads(bench: LedgerBench, *, lines: int, seconds: int) -> None:
    """Balances over HTTP at 500 a second, of a ledger that only answers and of the owner, while charges run at full
    speed, at half and a fifth of it, and not at all; again with a journal ten times as long."""
    table = Table(title="balance over HTTP at 500/s")
    for column in (
        *("entries in the journal", "asked of", "charges/s meanwhile", "answered/s", "p50 ms", "p99 ms"),
        *("CPU µs per answer", "cores busy"),
    ):
        table.add_column(column, justify="left" if column == "asked of" else "right")
    with bench.reader() as reader:
        asked = {LEDGER_READER.name: reader, "ledger": bench.scratch.run.processes["ledger"]}
        for length in ("short", "long"):
            if length == "long":
                bench.charge("lengthening", lines=10 * lines, accounts=ACCOUNTS, seed=77)
            highest = bench.charge(f"highest-{length}", lines=lines, accounts=ACCOUNTS, seed=78).rate
            for of, pid in asked.items():
                for share in (0.0, 0.2, 0.5, 1.0):
                    used = cpu.cpu_seconds(pid)
                    report = _while_charging(
                        bench,
                        f"reads-{length}-{of}-{share}",
                        rate=share * highest,
                        full=share == 1.0,
                        seconds=seconds,
                        work=partial(bench.read, of=of, rate=500, seconds=seconds),
                    )
                    used = cpu.cpu_seconds(pid) - used
                    row = (
                        f"{bench.journal_entries():,}",
                        of,
                        f"{report['charged']:,.0f}",
                        f"{report['answered'] / report['seconds']:,.0f}",
                        f"{report['p50']:.1f}",
                        f"{report['p99']:.1f}",
                        # The owner charges as well.
                        f"{used / report['answered'] * 1e6:,.0f}" if pid == reader else "",
                        f"{report['busy']:.0%}",
                    )
                    bench.console.print(", ".join(row), highlight=False)
                    table.add_row(*row)
    bench.console.print(table)


def _while_charging(
    bench: LedgerBench, name: str, *, rate: float, full: bool, seconds: int, work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What those who ask report, with charges running from before their first question until after the last."""
    taken = bench.lines_taken()
    # It takes a second to start, and reading slows what it is measured beside.
    lines = int(rate * (seconds + 6))
    charging = None
    if lines:
        charging = bench.start_charging(name, lines=lines, accounts=ACCOUNTS, seed=79, rate=0.0 if full else rate)
        bench.wait_for(bench.lines_taken, taken + 1, "charged lines", charging)
    begin, before, machine = time.monotonic(), bench.lines_taken(), cpu.machine()
    report = work()
    charged = (bench.lines_taken() - before) / (time.monotonic() - begin)
    report |= {"charged": charged, "busy": cpu.busy(machine, cpu.machine())}
    if charging is not None:
        charging.communicate(timeout=300)
        # The next load numbers its bundles after these.
        bench.wait_for(bench.lines_taken, taken + lines, "charged lines")
    return report


def rebuild(bench: LedgerBench, *, lines: int) -> None:
    """Replay and audit of all there is."""
    bench.charge("to-rebuild", lines=lines, accounts=ACCOUNTS, seed=99)
    entries = bench.journal_entries()
    for command in ("replay", "audit"):
        begin = time.monotonic()
        done = bench.scratch.scrip(command, timeout_seconds=900)
        seconds = time.monotonic() - begin
        bench.console.print(done.stdout[-1500:], markup=False, highlight=False)
        bench.console.print(
            f"scrip {command}: exit {done.returncode}, {entries:,} entries in {seconds:.1f} s,"
            f" {entries / seconds:,.0f} entries/s with start and comparison",
            highlight=False,
        )


def memory(bench: LedgerBench, *, accounts: int) -> None:
    """The ledger's memory while ever more accounts are touched, each once."""
    step = accounts // 10 // funding.TREE_ACCOUNTS
    for number in range(1, 11):
        roots = [f"memory-{each}" for each in range((number - 1) * step, number * step)]
        asyncio.run(funding.open_trees(bench.stack, roots))
        bench.console.print(
            f"{number * step * funding.TREE_ACCOUNTS:,} accounts touched:"
            f" {bench.resident_bytes('ledger') / 2**20:,.0f} MiB",
            highlight=False,
        )


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}; without any: all")
    parser.add_argument("--lines", type=int, default=200_000, help="charge lines of a load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10, help="of each load of callers and readers")
    parser.add_argument("--touched", type=int, default=1_000_000, help="accounts touched to see memory stay flat")
    parser.add_argument("--profile", action="store_true", help="print the processes to profile")
    arguments = parser.parse_args()
    console = Console(width=120)
    parts = arguments.parts or PARTS
    with tempfile.TemporaryDirectory(prefix="scrip-bench-") as directory, ScratchStack(Path(directory)) as scratch:
        bench = LedgerBench(scratch, console=console)
        console.print(facts(bench.durability()))
        if arguments.profile:
            console.print(f"processes: {scratch.run.processes}", markup=False)
        console.print(
            f"The rival, for every event, in one transaction:\n  {per_event.TAKE}\n  {per_event.WRITE}",
            markup=False,
            highlight=False,
        )
        bench.open_accounts(ACCOUNTS)
        if "charges" in parts:
            charges(bench, lines=arguments.lines, rounds=arguments.rounds)
        if "holds" in parts:
            holds(bench, seconds=arguments.seconds, rounds=arguments.rounds)
        if "reads" in parts:
            reads(bench, lines=arguments.lines, seconds=arguments.seconds)
        if "rebuild" in parts:
            rebuild(bench, lines=arguments.lines)
        if "memory" in parts:
            memory(bench, accounts=arguments.touched)


if __name__ == "__main__":
    main()
