"""Kill -9 in the middle of work: the victim is first made to stand still, so that the count of work is exact."""

import json
import os
import random
import signal
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from contracts.streams import CHARGES, USAGE
from infra.demo.scratch_stack import ScratchStack
from infra.processes import found

WORK_SECONDS_MAX: Final = 45.0
RESTART_SECONDS_MAX: Final = 60.0

METERING: Final = "metering"
LEDGER: Final = "ledger"
NATS: Final = "NATS"
POSTGRES: Final = "PostgreSQL"
PUBLISHER: Final = "publisher"
VICTIMS: Final = (METERING, LEDGER, NATS, POSTGRES, PUBLISHER)

# Who else stands still while the work is counted: those whose progress would change it.
_STILL: Final = {
    METERING: (),
    LEDGER: (),
    NATS: (METERING, LEDGER, PUBLISHER),
    POSTGRES: (METERING, LEDGER),
    PUBLISHER: (),
}


@dataclass(frozen=True, slots=True)
class Work:
    """What was sent and not acknowledged: events by the publisher, events by metering, bundles by the ledger."""

    publisher: int
    metering: int
    ledger: int

    def of(self, victim: str) -> int:
        """The work that a kill of the victim interrupts."""
        match victim:
            case "metering":
                return self.metering
            case "ledger":
                return self.ledger
            case "publisher":
                return self.publisher
            case "NATS":
                return self.publisher + self.metering + self.ledger
            case _:
                return self.metering + self.ledger


@dataclass(frozen=True, slots=True)
class Kill:
    """One that counts: work was unacknowledged."""

    victim: str
    pid: int
    work: Work

    def __str__(self) -> str:
        return (
            f"kill -9 of {self.victim} ({self.pid}): unacknowledged by the publisher {self.work.publisher},"
            f" by metering {self.work.metering} events, by the ledger {self.work.ledger} bundles"
        )


def kill_at_work(stack: ScratchStack, victim: str) -> Kill:
    """Kill as soon as the victim has work unacknowledged. AssertionError if it never has."""
    deadline = time.monotonic() + WORK_SECONDS_MAX
    while time.monotonic() < deadline:
        pid = _pid(stack, victim)
        others = [other for name in _STILL[victim] if (other := _pid(stack, name)) is not None]
        if pid is not None:
            # The server of the numbers itself cannot be asked while it stands still.
            still = others if victim == NATS else [pid, *others]
            with _standing_still(still), suppress(OSError):
                work = unacknowledged(stack)
                if work.of(victim) > 0:
                    os.kill(pid, signal.SIGKILL)
                    return Kill(victim=victim, pid=pid, work=work)
        time.sleep(random.uniform(0.001, 0.03))
    raise AssertionError(f"{victim} never had work unacknowledged within {WORK_SECONDS_MAX:.0f} s")


def wait_for_successor(stack: ScratchStack, kill: Kill) -> None:
    """Until another process has taken the killed one's place."""
    deadline = time.monotonic() + RESTART_SECONDS_MAX
    while _pid(stack, kill.victim) in (None, kill.pid):
        assert time.monotonic() < deadline, f"nobody took the place of {kill.victim}:\n{stack.output()}"
        time.sleep(0.05)


def confirmed(stack: ScratchStack) -> tuple[int, int]:
    """How many events the publisher has confirmed, and of how many."""
    progress = _progress(stack)
    return progress.get("confirmed", 0), progress.get("total", 0)


def unacknowledged(stack: ScratchStack) -> Work:
    """What NATS and the publisher say now."""
    monitor = f"{stack.url('nats_monitor')}/jsz?accounts=true&consumers=true"
    with urllib.request.urlopen(monitor, timeout=5) as answer:
        accounts = json.load(answer).get("account_details", [])
    pending = {
        stream["name"]: sum(consumer["num_ack_pending"] for consumer in stream.get("consumer_detail", []))
        for account in accounts
        for stream in account.get("stream_detail", [])
    }
    in_flight = _progress(stack).get("in_flight", 0) if _pid(stack, PUBLISHER) else 0
    return Work(publisher=in_flight, metering=pending.get(USAGE, 0), ledger=pending.get(CHARGES, 0))


def _progress(stack: ScratchStack) -> dict[str, int]:
    try:
        progress: dict[str, int] = json.loads(_publisher_file(stack).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return progress


def _publisher_file(stack: ScratchStack) -> Path:
    return stack.layout.directory / "publisher.json"


def _pid(stack: ScratchStack, name: str) -> int | None:
    if name != PUBLISHER:
        return stack.run.processes.get(name)
    ours = str(_publisher_file(stack))
    pids = [one.pid for one in found(lambda one: "infra.demo.publish" in one.arguments and ours in one.arguments)]
    return pids[0] if pids else None


@contextmanager
def _standing_still(pids: Sequence[int]) -> Iterator[None]:
    stopped = []
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                stopped.append(pid)
        _wait_until_stopped(stopped)
        yield
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _wait_until_stopped(pids: Sequence[int]) -> None:
    """A signal is not instant: a process is still until /proc says so, or until it is gone."""
    for pid in pids:
        for _ in range(200):
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                break
            if state in "TtZ":
                break
            time.sleep(0.001)
