"""What can go wrong with the local stack, each as one sentence that says what to do.

StackError
├── BadInput            what was asked for can be nothing, however things stand: exit code 2
├── AlreadyRunning      another supervisor holds this state directory
├── BinaryMissing       the environment lacks a server's binary
├── ChildrenKeepDying   a process died too often within a minute
├── DiskFull
├── NoDirectory
├── NotReadable
├── NotWritable
├── PortForbidden
├── PortInUse
└── ServerFailed        a server did not start; carries the end of its log
"""

import errno
from pathlib import Path
from typing import ClassVar


class StackError(Exception):
    """Its text is one sentence for the user; the CLI shows nothing else, and ends with its exit code."""

    exit_code: ClassVar[int] = 1


class BadInput(StackError):
    exit_code = 2


class AlreadyRunning(StackError):
    def __init__(self, directory: Path, pid: int | None) -> None:
        who = f"process {pid}" if pid else "another process"
        super().__init__(
            f"Scrip is already running on {directory} ({who}): "
            "stop it first, or choose another directory with SCRIP_STATE."
        )


class BinaryMissing(StackError):
    def __init__(self, what: str, distribution: str) -> None:
        super().__init__(
            f"The {what} binary of the package {distribution} is missing: run `make distclean`, then `make run`."
        )


class ChildrenKeepDying(StackError):
    pass


class DiskFull(StackError):
    def __init__(self, directory: Path) -> None:
        super().__init__(f"The disk holding {directory} is full: free at least 1 GiB there and start again.")


class NoDirectory(StackError):
    def __init__(self, directory: Path) -> None:
        super().__init__(f"{directory} is a file, or lies below one: choose another directory with SCRIP_STATE.")


class NotReadable(StackError):
    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"{directory} belongs to another user: run this as that user, or choose another with SCRIP_STATE."
        )


class NotWritable(StackError):
    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"{directory} cannot be written by this user: "
            "change its owner, or choose another directory with SCRIP_STATE."
        )


class PortForbidden(StackError):
    def __init__(self, port: int, what: str, variable: str) -> None:
        super().__init__(f"This user may not listen on port {port} for {what}: choose another with {variable}=<port>.")


class PortInUse(StackError):
    def __init__(self, port: int, what: str, variable: str) -> None:
        super().__init__(
            f"Port {port} for {what} is in use: stop what listens there, or choose another with {variable}=<port>."
        )


class ServerFailed(StackError):
    pass


def from_os_error(error: OSError, directory: Path) -> StackError | None:
    """The sentence for an operating system's refusal, or None if it is none of the known ones."""
    match error.errno:
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return NotWritable(directory)
        case errno.ENOSPC | errno.EDQUOT:
            return DiskFull(directory)
        case errno.EEXIST | errno.ENOTDIR:
            return NoDirectory(directory)
        case _:
            return None
