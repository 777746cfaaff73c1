"""A stack in a directory and on ports of its own, started as a user starts it: for tests and measurements."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from infra import processes, state
from infra.servers import free_port
from infra.services import SERVICES
from infra.state import Credentials, Layout, Run
from infra.supervisor import last_lines, unready

SCRIP: Final = (sys.executable, "-m", "infra.cli")
REPOSITORY: Final = Path(__file__).resolve().parents[2]
START_SECONDS_MAX: Final = 90.0
STOP_SECONDS_MAX: Final = 60.0


class ScratchStack:
    """`scrip up` in `directory`. Its ports stay the same from start to start."""

    def __init__(self, directory: Path) -> None:
        self.layout = Layout((directory / ".scrip").resolve())
        self._ports = {name: free_port() for name in state.PORTS}
        self._output = directory / "up.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What makes `scrip` mean this stack."""
        ports = {state.port_variable(name): str(port) for name, port in self._ports.items()}
        return dict(os.environ) | ports | {state.STATE_VARIABLE: str(self.layout.directory), "COLUMNS": "160"}

    @property
    def credentials(self) -> Credentials:
        return state.load_credentials(self.layout)

    @property
    def run(self) -> Run:
        """What runs now. RuntimeError if nothing does."""
        found = state.current_run(self.layout)
        if found is None:
            raise RuntimeError(f"the stack does not run:\n{self.output()}")
        return found

    def start(self, *arguments: str) -> None:
        """Start it without the demo, and wait until every service is ready."""
        self._process = processes.spawn(
            [*SCRIP, "up", *(arguments or ("--no-demo",))],
            on_starters_death=signal.SIGTERM,
            environment=self.environment,
            log_file=self._output,
            directory=REPOSITORY,
        )
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until every service says so; RuntimeError with the supervisor's words if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while (why := self._unready()) is not None:
            if self._process is not None and self._process.poll() is not None:
                raise RuntimeError(f"the stack {processes.ending(self._process.returncode)}:\n{self.output()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the stack is not ready ({why}):\n{self.output()}")
            time.sleep(0.1)

    def stop(self) -> int:
        """Stop it as Ctrl-C does; the exit code."""
        if self._process is None:
            return 0
        processes.stop([self._process], signal.SIGINT, seconds_each=STOP_SECONDS_MAX)
        code = self._process.wait()
        self._process = None
        return code

    def remove(self) -> None:
        """Stop it and remove all it made, also outside its directory."""
        self.stop()
        self.scrip("clean")
        shutil.rmtree(self.layout.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def scrip(self, *arguments: str, timeout_seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a `scrip` command on this stack; both outputs come back as one text."""
        return subprocess.run(
            [*SCRIP, *arguments],
            env=self.environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def start_scrip(self, *arguments: str, log_file: Path) -> subprocess.Popen[bytes]:
        """Start a `scrip` command on this stack without waiting for its end."""
        return processes.spawn(
            [*SCRIP, *arguments],
            on_starters_death=signal.SIGTERM,
            environment=self.environment,
            log_file=log_file,
            directory=REPOSITORY,
        )

    def url(self, service: str) -> str:
        """Where a service's HTTP API is."""
        return f"http://127.0.0.1:{self._ports[service]}"

    def output(self) -> str:
        """The end of what the supervisor printed."""
        return last_lines(self._output, count=40)

    def _unready(self) -> str | None:
        if state.current_run(self.layout) is None:
            return "no supervisor runs"
        return next((why for service in SERVICES if (why := unready(self.url(service.name))) is not None), None)
