"""What tests do with real services: run them, open accounts, and look at what was logged and charged."""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import httpx2
import psycopg
from psycopg.rows import TupleRow

from infra.servers import LOOPBACK
from services.kit.settings import ServiceSettings
from services.ledger.app import build as build_ledger
from services.ledger.settings import LedgerSettings
from services.metering.app import build as build_metering
from services.metering.settings import MeteringSettings
from tests.integration.simulators.serving import serving

REPOSITORY: Final = Path(__file__).resolve().parent.parent.parent
SOURCES: Final = REPOSITORY / "clients" / "python" / "src"

START_SECONDS_MAX: Final = 40.0
WAIT_SECONDS_MAX: Final = 20.0


@dataclass(frozen=True, slots=True)
class Services:
    """Metering and the ledger of one test, and where they are whenever they run."""

    settings_of: Callable[[str], ServiceSettings]
    connection: psycopg.Connection[TupleRow]
    tokens: Mapping[str, str]
    metering_port: int
    ledger_port: int
    ledger_http: httpx2.Client
    keys: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def metering_url(self) -> str:
        return f"http://{LOOPBACK}:{self.metering_port}"

    @property
    def ledger_url(self) -> str:
        return f"http://{LOOPBACK}:{self.ledger_port}"

    @contextmanager
    def metering(self) -> Iterator[None]:
        """Metering runs."""
        with serving(
            build_metering(MeteringSettings(**self.settings_of("metering").model_dump())), port=self.metering_port
        ):
            yield

    @contextmanager
    def ledger(self) -> Iterator[None]:
        """The ledger runs, and owns its partitions."""
        with serving(build_ledger(LedgerSettings(**self.settings_of("ledger").model_dump())), port=self.ledger_port):
            yield

    def open(self, account: str, wallets: Mapping[str, str]) -> None:
        """Open an account with wallets, by unit, and grant each its amount. Metering knows of it when it runs."""
        self.command("/v1/accounts", {"account": account, "wallets": [{"unit": unit} for unit in wallets]})
        for unit, amount in wallets.items():
            if Decimal(amount):
                self.command("/v1/grants", {"account": account, "unit": unit, "amount": amount})

    def command(self, path: str, body: Mapping[str, Any]) -> Any:
        """A command that must be accepted; asked again until the partition has an owner."""
        key = f"test-{next(self.keys)}"
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while True:
            answer = self.ledger_http.post(path, json=dict(body), headers={"Idempotency-Key": key})
            if answer.status_code != 503 or time.monotonic() > deadline:
                assert answer.status_code == 200, answer.text
                return answer.json()
            time.sleep(0.05)

    def wallet(self, account: str, unit: str) -> Mapping[str, str]:
        """What an account has of a unit."""
        answer = self.ledger_http.get(f"/v1/balances/{account}")
        assert answer.status_code == 200, answer.text
        (found,) = (each for each in answer.json()["wallets"] if each["unit"] == unit)
        assert isinstance(found, dict)
        return found

    def until_wallet(self, account: str, unit: str, **wanted: str) -> None:
        """Wait until a wallet has these amounts."""
        until(lambda: {name: self.wallet(account, unit)[name] for name in wanted} == wanted, what=str(wanted))

    def logged(self) -> set[str]:
        """The ids of what was logged."""
        return {str(row[0]) for row in self.connection.execute("SELECT event_id FROM usage_log").fetchall()}

    def until_logged(self, count: int) -> None:
        """Wait until so many uses are logged."""
        until(lambda: len(self.logged()) == count, what=f"{count} logged, not {len(self.logged())}")

    def counters(self) -> dict[str, int]:
        """The counters over all sources, those that are not zero."""
        names = ("new", "duplicate", "conflicting", "dead", "unattributed", "unpriced", "charged")
        sums = ", ".join(f"coalesce(sum({name}), 0)::bigint" for name in names)
        row = self.connection.execute(f"SELECT {sums} FROM ingest_counters".encode()).fetchone()
        assert row is not None
        return {name: int(value) for name, value in zip(names, row, strict=True) if value}


@contextmanager
def reporting(*arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that reports: tests/clients/reporter.py."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.clients.reporter", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{SOURCES}{os.pathsep}{REPOSITORY}"},
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def until(condition: Callable[[], bool], *, seconds: float = WAIT_SECONDS_MAX, what: str = "it") -> None:
    """Return once the condition holds; AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)


def answers(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as opened:
        return opened.connect_ex((LOOPBACK, port)) == 0
