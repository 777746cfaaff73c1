"""A service as a process of its own, for tests that kill it, stop it, or let it go on."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from infra.servers import free_port
from services.kit.settings import ServiceSettings

REPOSITORY: Final = Path(__file__).resolve().parents[1]


class ServiceProcess:
    """`python -m <module>` on a free port, with the settings of a test and what `further` says."""

    def __init__(self, module: str, settings: ServiceSettings, *, log_file: Path, further: Mapping[str, str]) -> None:
        self.port = free_port()
        environment = {
            "SCRIP_NATS_URL": settings.nats_url,
            "SCRIP_NATS_USER": settings.nats_user,
            "SCRIP_NATS_PASSWORD": settings.nats_password.get_secret_value(),
            "SCRIP_DATABASE_URL": settings.database_url.get_secret_value(),
            "SCRIP_HTTP_PORT": str(self.port),
            "SCRIP_TOKENS_FILE": str(settings.tokens_file),
            "SCRIP_CATALOGUE_FILE": str(settings.catalogue_file),
        }
        with log_file.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                env={**os.environ, **environment, **further},
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
