"""Starts child processes that cannot outlive their starter, finds and stops those that somehow did.

Knows nothing of what the processes do. Linux only: death signals, user namespaces and /proc.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Resolved before any fork: a forked child of a threaded process must not load libraries.
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG: Final = 1
_CLONE_NEWUSER: Final = 0x10000000

NOBODY: Final = 65534


@dataclass(frozen=True, slots=True)
class Namespace:
    """Run as `nobody` of an own user namespace: an ordinary user to itself, its starter to the file system."""


@dataclass(frozen=True, slots=True)
class SystemUser:
    """Run as another user of the system."""

    user_id: int
    group_id: int


Identity = Namespace | SystemUser | None


def spawn(
    command: Sequence[str],
    *,
    on_starters_death: signal.Signals,
    environment: Mapping[str, str] | None = None,
    log_file: Path | None = None,
    identity: Identity = None,
    directory: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own; the kernel signals it when the starter dies, however that happens.

    Without a log file it writes where we write.
    """
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if log_file else None
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=directory,
            start_new_session=True,
            preexec_fn=_preparation(identity, on_starters_death),  # noqa: PLW1509 - it makes system calls only
            user=identity.user_id if isinstance(identity, SystemUser) else None,
            group=identity.group_id if isinstance(identity, SystemUser) else None,
            extra_groups=[] if isinstance(identity, SystemUser) else None,
        )
    finally:
        if log is not None:
            os.close(log)


def run(command: Sequence[str], *, identity: Identity = None) -> subprocess.CompletedProcess[str]:
    """Run a short command to its end under `identity`; output and errors come back as one text."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        cwd="/",
        # A Ctrl-C is for us: the command comes to its end, and we stop then.
        start_new_session=True,
        preexec_fn=_preparation(identity, signal.SIGKILL),
        user=identity.user_id if isinstance(identity, SystemUser) else None,
        group=identity.group_id if isinstance(identity, SystemUser) else None,
        extra_groups=[] if isinstance(identity, SystemUser) else None,
    )


def stop(children: Iterable[subprocess.Popen[bytes]], *signals: signal.Signals, seconds_each: float) -> None:
    """Stop children together: each signal in turn to all that still run, SIGKILL at last."""
    running = [child for child in children if child.poll() is None]
    for number in signals:
        for child in running:
            child.send_signal(number)
            # One that was paused hears of it only once it goes on.
            child.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + seconds_each
        running = [child for child in running if not _ended(child, by=deadline)]
        if not running:
            return
    for child in running:
        child.kill()
        child.wait()


def ending(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit code {status}"


@dataclass(frozen=True, slots=True)
class Found:
    """A process of the system, as /proc shows it. `title` is its command line, arguments separated by spaces."""

    pid: int
    arguments: tuple[str, ...]

    @property
    def title(self) -> str:
        return " ".join(self.arguments).strip()


def found(predicate: Callable[[Found], bool]) -> list[Found]:
    """The live processes other than this one for which `predicate` holds."""
    return [process for process in _all() if process.pid != os.getpid() and predicate(process)]


def environment_holds(pid: int, variable: str, value: str) -> bool:
    """Whether a process was started with `variable=value`; False where this user may not look."""
    try:
        return f"{variable}={value}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def gone(predicate: Callable[[Found], bool], *, within_seconds: float) -> bool:
    """Wait until no such process is left; False if some still is when the time is up."""
    deadline = time.monotonic() + within_seconds
    while found(predicate):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def stop_leftovers(predicate: Callable[[Found], bool], *signals: signal.Signals, seconds_each: float) -> None:
    """Stop processes that are nobody's children any more: each signal in turn, SIGKILL at last."""
    for number in (*signals, signal.SIGKILL):
        for process in found(predicate):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
                os.kill(process.pid, signal.SIGCONT)
        if gone(predicate, within_seconds=seconds_each):
            return


def _all() -> Iterator[Found]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                raw = Path(entry.path, "cmdline").read_bytes()
            except OSError:
                continue
            if raw:  # a zombie or a kernel thread has none
                yield Found(
                    pid=int(entry.name), arguments=tuple(os.fsdecode(part) for part in raw.rstrip(b"\0").split(b"\0"))
                )


def _preparation(identity: Identity, on_starters_death: signal.Signals) -> Callable[[], None]:
    """What the child does between fork and exec."""
    if threading.current_thread() is not threading.main_thread():
        # The kernel sends the death signal when the starting *thread* ends.
        raise RuntimeError("child processes are started from the main thread only")
    starter = os.getpid()

    def prepare() -> None:
        if isinstance(identity, Namespace):
            _enter_namespace()
        # After every change of credentials, which clears it.
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(on_starters_death), 0, 0, 0)
        if os.getppid() != starter:
            os._exit(1)

    return prepare


def _ended(child: subprocess.Popen[bytes], *, by: float) -> bool:
    try:
        child.wait(max(0.0, by - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _enter_namespace() -> None:
    user, group = os.geteuid(), os.getegid()
    if _LIBC.unshare(_CLONE_NEWUSER) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {user} 1")
    _write("/proc/self/gid_map", f"{NOBODY} {group} 1")


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
