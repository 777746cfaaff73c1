"""CPU time as /proc has it: of a process with all below it, and of the whole machine."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    parent: int
    ticks: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Time of all cores since the machine started, in ticks."""

    busy: int
    whole: int


def cpu_seconds(pid: int) -> float:
    """What a process and all below it have used, also what those below it used that have ended."""
    processes = list(_processes())
    tree = {pid}
    grown = True
    while grown:
        found = {process.pid for process in processes if process.parent in tree}
        grown = not found <= tree
        tree |= found
    return sum(process.ticks for process in processes if process.pid in tree) / TICKS_PER_SECOND


def machine() -> Machine:
    """What all cores did so far."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return Machine(busy=sum(fields) - idle, whole=sum(fields))


def busy(before: Machine, after: Machine) -> float:
    """The part of all cores' time that was used in between."""
    whole = after.whole - before.whole
    return (after.busy - before.busy) / whole if whole else 0.0


def _processes() -> Iterator[_Process]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_text()
            except OSError:
                continue
            # The name, in parentheses, may hold anything.
            fields = stat.rpartition(")")[2].split()
            ticks = sum(int(fields[place]) for place in (11, 12, 13, 14))
            yield _Process(pid=int(entry.name), parent=int(fields[1]), ticks=ticks)
