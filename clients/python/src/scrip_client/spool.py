"""The spool: accepted events that are not delivered yet, and events that were refused, in a SQLite file.

Any number of processes may share a file. What `put` returned for is on disk: WAL with synchronous=FULL.
"""

import json
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

BUSY_SECONDS: Final = 10.0
# What a row costs beside its body, about.
ROW_BYTES: Final = 64

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS refused (number INTEGER PRIMARY KEY, body BLOB NOT NULL, problems TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS used (one INTEGER PRIMARY KEY CHECK (one = 1), bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO used VALUES (1, 0);
"""


@dataclass(frozen=True, slots=True)
class RefusedEvent:
    """An event that metering will not take as it is, and every problem it named."""

    number: int
    body: bytes
    problems: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Counts:
    """What is in a spool. `bytes` counts towards its limit."""

    waiting: int
    refused: int
    bytes: int


class _File:
    """A connection to a file, or to nothing but memory; guarded by a lock, and closed while the process forks.

    SQLite would believe that a child has the locks of its parent, and then lose what it writes.
    """

    def __init__(self, file: Path | None, *, busy_seconds: float) -> None:
        self._file = file
        self._busy_seconds = busy_seconds
        self.lock = threading.Lock()
        if file is not None:
            # It holds what users did: nobody else reads it. SQLite gives the files beside it the same mode.
            file.touch(mode=0o600)
        self.connection = self._opened()
        _files.add(self)

    def close(self) -> None:
        """Not to be used again."""
        with self.lock:
            _files.discard(self)
            self.connection.close()

    def set_up(self, connection: sqlite3.Connection) -> None:
        """What a new connection needs."""

    def before_fork(self) -> None:
        """Wait for what is under way, and let nothing begin."""
        self.lock.acquire()
        if self._file is not None:
            self.connection.close()

    def after_fork(self, *, in_child: bool) -> None:
        """Go on; in a child: never."""
        if not in_child:
            if self._file is not None:
                self.connection = self._opened()
            self.lock.release()

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            ":memory:" if self._file is None else self._file,
            timeout=self._busy_seconds,
            isolation_level=None,
            check_same_thread=False,
        )
        self.set_up(connection)
        return connection


_files: "weakref.WeakSet[_File]" = weakref.WeakSet()
_forking: list[_File] = []


def _before_fork() -> None:
    _forking.extend(_files)
    for file in _forking:
        file.before_fork()


def _after_fork(*, in_child: bool) -> None:
    for file in _forking:
        file.after_fork(in_child=in_child)
        if in_child:
            _files.discard(file)
    _forking.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: _after_fork(in_child=False),
    after_in_child=lambda: _after_fork(in_child=True),
)


class Spool(_File):
    """Events in the order they came. Every method may be called from any thread; they raise sqlite3.Error."""

    def __init__(self, file: Path | None, *, bytes_max: int) -> None:
        """Open the file, made if it is not there; None: in memory."""
        self._bytes_max = bytes_max
        # As of this process's last change: to be looked at without waiting for one that is under way.
        self.bytes_used = 0
        super().__init__(file, busy_seconds=BUSY_SECONDS)
        with self._transaction() as connection:
            for statement in _SCHEMA.strip().split("\n"):
                connection.execute(statement)
            (self.bytes_used,) = connection.execute("SELECT bytes FROM used").fetchone()

    def set_up(self, connection: sqlite3.Connection) -> None:
        """As durable as it says."""
        _use_wal(connection)
        connection.execute("PRAGMA synchronous = FULL")
        # Or a spool that was full once would leave that much behind in its log.
        connection.execute("PRAGMA journal_size_limit = 4194304")

    def put(self, bodies: Sequence[bytes]) -> int:
        """Store events, in one commit. How many of them: the rest do not fit."""
        with self._transaction() as connection:
            (used,) = connection.execute("SELECT bytes FROM used").fetchone()
            fitting = 0
            for body in bodies:
                if used + len(body) + ROW_BYTES > self._bytes_max:
                    break
                used += len(body) + ROW_BYTES
                fitting += 1
            connection.executemany("INSERT INTO events (body) VALUES (?)", ((body,) for body in bodies[:fitting]))
            connection.execute("UPDATE used SET bytes = ?", (used,))
        self.bytes_used = used
        return fitting

    def has_waiting(self) -> bool:
        """Some event is not delivered yet."""
        with self.lock:
            return bool(self.connection.execute("SELECT EXISTS (SELECT 1 FROM events)").fetchone()[0])

    def oldest(self, *, events_max: int, bytes_max: int) -> list[tuple[int, bytes]]:
        """The events that have waited longest, with their numbers: at least one, if there is any."""
        with self.lock:
            rows = self.connection.execute(
                "SELECT number, body FROM events ORDER BY number LIMIT ?", (events_max,)
            ).fetchall()
        size = 0
        for place, (_, body) in enumerate(rows):
            size += len(body) + 1
            if size > bytes_max and place:
                return rows[:place]
        return rows

    def remove(self, numbers: Sequence[int]) -> None:
        """These were delivered."""
        with self._transaction() as connection:
            self.bytes_used = _take(connection, "events", numbers)

    def set_apart(self, problems: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[RefusedEvent]:
        """These were refused, for these reasons: they wait no longer, and are kept."""
        apart = []
        with self._transaction() as connection:
            for number, why in problems.items():
                row = connection.execute("DELETE FROM events WHERE number = ? RETURNING body", (number,)).fetchone()
                if row is None:
                    continue
                connection.execute("INSERT INTO refused VALUES (?, ?, ?)", (number, row[0], json.dumps(list(why))))
                apart.append(RefusedEvent(number, row[0], why))
        return apart

    def refused(self, *, limit: int, after: int = 0) -> list[RefusedEvent]:
        """Refused events, by number."""
        with self.lock:
            rows = self.connection.execute(
                "SELECT number, body, problems FROM refused WHERE number > ? ORDER BY number LIMIT ?", (after, limit)
            ).fetchall()
        return [RefusedEvent(number, body, json.loads(problems)) for number, body, problems in rows]

    def discard(self, numbers: Sequence[int]) -> None:
        """Refused events that nobody needs any more."""
        with self._transaction() as connection:
            self.bytes_used = _take(connection, "refused", numbers)

    def send_again(self, numbers: Sequence[int]) -> None:
        """Refused events that will be taken now: an account id is known meanwhile, or a limit higher."""
        with self._transaction() as connection:
            for number in numbers:
                connection.execute("INSERT INTO events (body) SELECT body FROM refused WHERE number = ?", (number,))
                connection.execute("DELETE FROM refused WHERE number = ?", (number,))

    def counts(self) -> Counts:
        """What is in it."""
        with self.lock:
            row = self.connection.execute(
                "SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM refused), (SELECT bytes FROM used)"
            ).fetchone()
        return Counts(*row)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self.lock:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                # A failed COMMIT may have ended the transaction already.
                with suppress(sqlite3.Error):
                    self.connection.execute("ROLLBACK")
                raise


class Turn(_File):
    """Who delivers: of all processes and clients on a spool one at a time. It ends with the process, however that ends.

    A transaction on a file of its own. A fork ends it, too: then somebody else may deliver the same, which is safe.
    """

    def __init__(self, file: Path | None) -> None:
        super().__init__(file, busy_seconds=0)

    def take(self) -> bool:
        """Whether it is ours now."""
        with self.lock:
            try:
                self.connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                return False
        return True

    def give(self) -> None:
        """Let another one have it."""
        with self.lock:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")


def _use_wal(connection: sqlite3.Connection) -> None:
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            # While another process makes the same change SQLite does not wait by itself.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _take(connection: sqlite3.Connection, table: str, numbers: Sequence[int]) -> int:
    """Remove rows. How many bytes are used without them."""
    freed = 0
    for number in numbers:
        row = connection.execute(
            f"DELETE FROM {table} WHERE number = ? RETURNING length(body)",
            (number,),
        ).fetchone()
        freed += 0 if row is None else row[0] + ROW_BYTES
    (used,) = connection.execute("UPDATE used SET bytes = bytes - ? RETURNING bytes", (freed,)).fetchone()
    return int(used)
