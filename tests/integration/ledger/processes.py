"""Ledger processes of their own: to be killed, stopped, and continued."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from infra.servers import free_port
from services.ledger.settings import LedgerSettings

REPOSITORY: Final = Path(__file__).resolve().parents[3]


class LedgerProcess:
    """`python -m services.ledger.app` on a free port."""

    def __init__(self, settings: LedgerSettings, *, log_file: Path) -> None:
        self.port = free_port()
        environment = {
            "SCRIP_NATS_URL": settings.nats_url,
            "SCRIP_NATS_USER": settings.nats_user,
            "SCRIP_NATS_PASSWORD": settings.nats_password.get_secret_value(),
            "SCRIP_DATABASE_URL": settings.database_url.get_secret_value(),
            "SCRIP_HTTP_PORT": str(self.port),
            "SCRIP_TOKENS_FILE": str(settings.tokens_file),
            "SCRIP_CATALOGUE_FILE": str(settings.catalogue_file),
            "SCRIP_LEASE_SECONDS": str(settings.lease_seconds),
            "SCRIP_LEDGER_OWNS": str(settings.ledger_owns),
        }
        with log_file.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.ledger.app"],
                env=dict(os.environ) | environment,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def url(self) -> str:
        """Its HTTP API."""
        return f"http://127.0.0.1:{self.port}"

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process."""
        self.process.send_signal(number)

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self.process.kill()
        self.process.wait()


@contextmanager
def ledgers(settings: LedgerSettings, *, count: int, directory: Path) -> Iterator[list[LedgerProcess]]:
    """Several at once."""
    running = [LedgerProcess(settings, log_file=directory / f"ledger-{number}.log") for number in range(count)]
    try:
        yield running
    finally:
        for each in running:
            each.end()
