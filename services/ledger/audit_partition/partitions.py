"""Partitions one after the other, in a process of their own or in this one."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any

import psycopg
from psycopg import Connection
from psycopg.rows import TupleRow

from services.ledger.audit_partition.findings import Result, Task
from services.ledger.audit_partition.journal import audited
from services.ledger.audit_partition.signatures import Commits


def audit_in_turn(tasks: Sequence[Task], turn: Any, counted: Any, told: Pipe) -> None:
    """Audit partitions, each the next that no other process has begun, and tell what was found: a Result, or an error.

    A process of its own; `turn` and `counted` are shared by all: the next task, and the entries that have been read.
    """
    # Rows come and go by the million, and none refers to itself: looking for those that do takes a tenth of the time.
    # What was known of a partition does, and is looked for when it is done, and not among all that was imported.
    gc.freeze()
    gc.disable()

    def count(entries: int) -> None:
        with counted.get_lock():
            counted.value += entries

    def mine() -> Iterator[Task]:
        while True:
            with turn.get_lock():
                number, turn.value = turn.value, turn.value + 1
            if number >= len(tasks):
                return
            yield tasks[number]

    try:
        for result in audit_partitions(mine(), count):
            told.send(result)
            gc.collect()
    except Exception as error:
        # It is raised where it is told.
        told.send(error)


def audit_partitions(tasks: Iterable[Task], count: Callable[[int], None]) -> Iterator[Result]:
    """What is to be found in each partition of a database. `count` is told how many entries more have been read."""
    connection = commits = None
    try:
        for task in tasks:
            connection = connection or connect(task.url)
            commits = commits or Commits(task.keys)
            yield audited(connection, task, commits, count)
            # Each partition is seen at a moment of its own.
            connection.rollback()
    finally:
        if connection is not None:
            connection.close()


def connect(url: str) -> Connection[TupleRow]:
    """A connection that sees one moment, and changes nothing."""
    connection = psycopg.connect(
        url,
        application_name="scrip-audit",
        # Of one that was killed the server would go on with what it was asked last.
        options="-c timezone=UTC -c search_path=ledger -c jit=off -c work_mem=32MB -c enable_nestloop=off"
        " -c client_connection_check_interval=1s",
    )
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    return connection
