"""Laws of proving the ledger, cut off: one sentence, nothing is changed, nothing left behind; and of two at once."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from infra import processes
from infra.demo.scratch_stack import ScratchStack
from infra.servers import SUPERUSER
from infra.supervisor import DATABASE
from tests.e2e.conftest import Played

pytestmark = pytest.mark.timeout(300)

SECONDS_MAX: Final = 60.0
EXIT_CODES: Final = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def stack(played: Played) -> ScratchStack:
    return played.stack


@pytest.fixture
def url(stack: ScratchStack) -> str:
    """Of somebody who may lock everything, and see what all others wait for."""
    return make_conninfo(
        host="127.0.0.1",
        port=stack.run.ports["postgres"],
        dbname=DATABASE,
        user=SUPERUSER,
        password=stack.credentials.postgres[SUPERUSER],
    )


@contextmanager
def nobody_reads_the_journal(url: str) -> Iterator[None]:
    """Whoever wants to waits."""
    with psycopg.connect(url) as connection:
        connection.execute("LOCK TABLE ledger.journal IN ACCESS EXCLUSIVE MODE")
        yield


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_waiting(url: str, name: str) -> bool:
    """Whether a command has a connection that waits for the lock."""
    return "Lock" in connections(url, name)


def connections(url: str, name: str) -> list[str | None]:
    """What each of a command's connections waits for."""
    with psycopg.connect(url) as watcher:
        rows = watcher.execute("SELECT wait_event_type FROM pg_stat_activity WHERE application_name = %s", [name])
        return [row[0] for row in rows.fetchall()]


def children(process: "subprocess.Popen[bytes]") -> list[int]:
    """Those of its process group, but for itself: what a Ctrl-C in a terminal reaches."""
    return [
        each.pid
        for each in processes.found(lambda each: "spawn_main" in each.title)
        if os.getpgid(each.pid) == process.pid
    ]


def cut_off(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """As a terminal does it, to the whole group; nobody of it is left."""

    def are_all_gone() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    os.killpg(process.pid, number)
    assert process.wait(SECONDS_MAX) == EXIT_CODES[number]
    until(are_all_gone)


def check_said(log: Path, sentence: str) -> None:
    said = log.read_text()
    assert said.splitlines()[-1].startswith(sentence), said
    for unwanted in ("Traceback", "Error", "Aborted"):
        assert unwanted not in said


COMMANDS: Final = {
    ("audit",): ("scrip-audit", "The audit was interrupted: nothing was changed"),
    ("replay",): ("scrip-replay", "The replay was interrupted: no balance was changed."),
    ("replay", "--verify", "--swap"): ("scrip-replay", "The replay was interrupted: no balance was changed."),
    ("journal", "export"): ("scrip-journal", "The export was interrupted: "),
}


@pytest.mark.parametrize(
    ("command", "number"),
    list(zip(COMMANDS, [signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM], strict=True)),
)
def test_what_is_cut_off_says_in_a_sentence_that_nothing_was_changed(
    stack: ScratchStack, url: str, tmp_path: Path, *, command: tuple[str, ...], number: signal.Signals
) -> None:
    log, file = tmp_path / "out.log", tmp_path / "record.gz"
    name, sentence = COMMANDS[command]
    arguments = (*command, str(file)) if command[0] == "journal" else command
    with nobody_reads_the_journal(url):
        process = stack.start_scrip(*arguments, log_file=log)
        try:
            until(lambda: is_waiting(url, name))
            cut_off(process, number)
            until(lambda: not connections(url, name))
        finally:
            process.kill()
            process.wait()
    check_said(log, sentence)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.log"]


def test_an_audit_that_is_cut_off_leaves_no_process_behind(stack: ScratchStack, url: str, tmp_path: Path) -> None:
    """Neither while its processes begin, nor while they read."""

    def are_there() -> bool:
        return bool(children(process))

    for are_reading in (False, True):
        log = tmp_path / f"{are_reading}.log"
        process = stack.start_scrip("audit", log_file=log)
        try:
            until(are_there)
            if are_reading:
                with nobody_reads_the_journal(url):
                    until(lambda: is_waiting(url, "scrip-audit"))
                    cut_off(process, signal.SIGINT)
                    until(lambda: not connections(url, "scrip-audit"))
            else:
                cut_off(process, signal.SIGINT)
        finally:
            process.kill()
            process.wait()
        check_said(log, "The audit was interrupted: nothing was changed")


def test_of_two_replays_the_second_says_so_and_the_first_goes_on(stack: ScratchStack, url: str, tmp_path: Path) -> None:
    log = tmp_path / "first.log"
    with nobody_reads_the_journal(url):
        first = stack.start_scrip("replay", log_file=log)
        try:
            until(lambda: is_waiting(url, "scrip-replay"))
            second = stack.scrip("replay", "--swap")
        except BaseException:
            first.kill()
            raise
    assert second.returncode == 1
    assert second.stdout.splitlines()[-1].startswith("scrip: Nothing was replayed: another replay is at work.")
    assert "Traceback" not in second.stdout
    assert first.wait(SECONDS_MAX) == 0, log.read_text()
    assert "different" not in log.read_text()
    # What was cut off before is no hindrance to what comes after.
    assert stack.scrip("replay").returncode == 0


def test_an_import_that_is_cut_off_imported_nothing(tmp_path: Path) -> None:
    other = ScratchStack(tmp_path / "other")
    other.layout.directory.parent.mkdir()
    log, file = tmp_path / "import.log", tmp_path / "record.gz"
    # Nobody writes it: who reads it waits.
    os.mkfifo(file)

    def is_read() -> bool:
        try:
            opened.append(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    opened: list[int] = []
    try:
        process = other.start_scrip("journal", "import", str(file), log_file=log)
        until(is_read)
        cut_off(process, signal.SIGTERM)
        check_said(log, "The import was interrupted: nothing was imported.")
        assert not processes.found(lambda each: str(other.layout.directory) in each.title)
    finally:
        for each in opened:
            os.close(each)
        other.remove()
