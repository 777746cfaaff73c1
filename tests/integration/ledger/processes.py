"""Ledger processes of their own: to be killed, stopped, and continued."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.ledger.settings import LedgerSettings
from tests.service_process import ServiceProcess


class LedgerProcess(ServiceProcess):
    """A ledger."""

    def __init__(self, settings: LedgerSettings, *, log_file: Path) -> None:
        further = {
            "SCRIP_LEASE_SECONDS": str(settings.lease_seconds),
            "SCRIP_LEDGER_OWNS": str(settings.ledger_owns),
        }
        super().__init__("services.ledger.app", settings, log_file=log_file, further=further)


@contextmanager
def ledgers(settings: LedgerSettings, *, count: int, directory: Path) -> Iterator[list[LedgerProcess]]:
    """Several at once."""
    running = [LedgerProcess(settings, log_file=directory / f"ledger-{number}.log") for number in range(count)]
    try:
        yield running
    finally:
        for each in running:
            each.end()
