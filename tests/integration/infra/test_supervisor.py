"""Laws of the supervisor: what dies is started again, what keeps dying ends it, and nothing outlives it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from infra import leftovers, processes, state
from infra.errors import StackError
from infra.servers import LOOPBACK, free_port
from infra.state import Credentials, Layout, Run
from infra.supervisor import DEATHS_MAX, DEATHS_WITHIN_VARIABLE, Stack, Supervisor, unready

REPOSITORY = Path(__file__).parents[3]
DRIVE = "tests.integration.infra.drive"
READY = "Ctrl-C stops it"
WAIT_SECONDS_MAX = 90.0


class Driven:
    """A supervisor with stand-in services, in a process, a directory and on ports of its own."""

    def __init__(self, directory: Path) -> None:
        self.layout = Layout(directory / ".scrip")
        self.output = directory / "output"
        ports = {state.port_variable(name): str(free_port()) for name in state.PORTS}
        self.environment = os.environ | ports | {state.STATE_VARIABLE: str(self.layout.directory)}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", DRIVE, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env=self.environment | environment,
            )
        return self.process

    def start_and_wait(self) -> subprocess.Popen[bytes]:
        process = self.start()
        until(lambda: READY in self.text() or process.poll() is not None)
        assert process.poll() is None, self.text()
        return process

    def text(self) -> str:
        return self.output.read_text()

    def run(self) -> Run:
        run = state.current_run(self.layout)
        assert run is not None
        return run

    def runs_with_another(self, title: str, pid: int) -> bool:
        run = state.current_run(self.layout)
        return run is not None and run.processes.get(title, pid) != pid

    def end(self) -> None:
        if self.process is not None:
            processes.stop([self.process], signal.SIGTERM, seconds_each=WAIT_SECONDS_MAX)
        leftovers.clean(self.layout)


@pytest.fixture
def driven(servers_directory: Callable[[str], Path]) -> Iterator[Driven]:
    made = Driven(servers_directory("supervisor"))
    yield made
    made.end()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def gone(pids: set[int], *, within_seconds: float = 0.0) -> bool:
    return processes.gone(lambda process: process.pid in pids, within_seconds=within_seconds)


def test_what_dies_is_started_again_and_a_signal_stops_everything(driven: Driven) -> None:
    supervisor = driven.start_and_wait()
    for title in ("ledger", "NATS", "PostgreSQL"):
        before = driven.run().processes
        os.kill(before[title], signal.SIGKILL)
        until(partial(driven.runs_with_another, title, before[title]))
        after = driven.run()
        assert {name for name in before if before[name] != after.processes[name]} == {title}
        assert f"{title} was killed by SIGKILL: starting it again in 0.2 s." in driven.text()
    until(lambda: unready(f"http://{LOOPBACK}:{after.ports['ledger']}") is None)

    supervisor.send_signal(signal.SIGINT)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(WAIT_SECONDS_MAX) == 0
    assert gone(set(after.processes.values()))
    assert not driven.layout.run_file.exists()
    assert "Traceback" not in driven.text()
    # Each ended as it should, and Postgres last: it wrote that it had shut down.
    assert "database system is shut down" in (driven.layout.logs / "postgres.log").read_text()
    assert "Server Exiting" in (driven.layout.logs / "nats.log").read_text()


def test_what_keeps_dying_stops_everything_with_its_reason(driven: Driven) -> None:
    supervisor = driven.start(STAND_IN_DIES="1")
    assert supervisor.wait(WAIT_SECONDS_MAX) == 1
    assert "ended with exit code 1, for the 5th time within 60 seconds" in driven.text()
    assert "the stand-in was told to die" in driven.text()
    assert not processes.found(lambda process: str(driven.layout.directory) in process.title)


def test_deaths_that_lie_further_apart_than_is_remembered_end_nothing(driven: Driven) -> None:
    supervisor = driven.start(STAND_IN_DIES="1", **{DEATHS_WITHIN_VARIABLE: "1"})
    # Each stand-in dies more often than is borne within what is remembered.
    until(lambda: driven.text().count("ledger ended with exit code 1: starting it again") > DEATHS_MAX)
    assert supervisor.poll() is None


@pytest.mark.parametrize("text", ["0", "-1", "soon"])
def test_a_memory_of_deaths_that_is_no_number_of_seconds_is_refused(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEATHS_WITHIN_VARIABLE, text)
    with pytest.raises(StackError, match=f"{DEATHS_WITHIN_VARIABLE} must be a number of seconds, not '{text}'"):
        Supervisor(Stack(layout=Layout(tmp_path), ports={}, credentials=Credentials()), Console())


def test_a_killed_supervisor_leaves_nothing_and_the_next_start_continues(driven: Driven) -> None:
    supervisor = driven.start_and_wait()
    pids = set(driven.run().processes.values())
    assert len(pids) == 4
    credentials = state.load_credentials(driven.layout)
    supervisor.kill()
    supervisor.wait()
    assert gone(pids, within_seconds=2.0)
    assert state.current_run(driven.layout) is None

    driven.start_and_wait()
    assert state.load_credentials(driven.layout) == credentials


def test_a_directory_has_one_supervisor_and_clean_stops_it_and_removes_all(driven: Driven) -> None:
    supervisor = driven.start_and_wait()
    pids = set(driven.run().processes.values())
    second = subprocess.run(
        [sys.executable, "-m", DRIVE],
        cwd=REPOSITORY,
        env=driven.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert second.returncode == 1
    assert second.stdout.startswith(f"Scrip is already running on {driven.layout.directory} (process {supervisor.pid})")
    assert second.stdout.count("\n") == 1
    assert supervisor.poll() is None

    clean = subprocess.Popen([sys.executable, "-m", "infra.leftovers"], cwd=REPOSITORY, env=driven.environment)
    assert supervisor.wait(WAIT_SECONDS_MAX) == 0
    assert clean.wait(WAIT_SECONDS_MAX) == 0
    assert gone(pids)
    assert not driven.layout.directory.exists()


def test_the_exit_code_is_the_demos(driven: Driven) -> None:
    supervisor = driven.start("tests.integration.infra.stand_in_demo")
    assert supervisor.wait(WAIT_SECONDS_MAX) == 7
    assert "The demo ended with exit code 7." in driven.text()


def test_a_port_in_use_is_named_before_anything_is_started(driven: Driven) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        supervisor = driven.start(SCRIP_PORT_METERING=str(port))
        assert supervisor.wait(WAIT_SECONDS_MAX) == 1
    assert driven.text().startswith(f"Port {port} for the service metering is in use: ")
    assert "SCRIP_PORT_METERING=<port>" in driven.text()
    assert not driven.layout.postgres.exists()


def test_a_service_nobody_supervises_is_stopped_by_the_next_start(tmp_path: Path) -> None:
    layout = Layout(tmp_path / ".scrip")
    orphan = subprocess.Popen(["sleep", "60"], env={leftovers.CHILD_VARIABLE: str(layout.directory)})
    stranger = subprocess.Popen(["sleep", "60"], env={leftovers.CHILD_VARIABLE: str(tmp_path / "another")})
    try:
        leftovers.stop(layout)
        assert orphan.wait(5) == -signal.SIGTERM
        assert stranger.poll() is None
    finally:
        for process in (orphan, stranger):
            process.kill()
            process.wait()
