"""The durable spool: what could not be told to anybody yet. A SQLite file, fsynced with every entry.

One thread of its own does all of its I/O, so that a slow disk stalls nobody else.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

from prometheus_client import Gauge

from services.kit.telemetry import REGISTRY, get_logger

log = get_logger(__name__)

Kind = Literal["usage", "release"]
Result = TypeVar("Result")

BUSY_SECONDS: Final = 2.0

SPOOLED: Final = Gauge("scrip_gateway_spool_entries", "Entries that wait in the spool.", registry=REGISTRY)
SPOOLED_BYTES: Final = Gauge("scrip_gateway_spool_bytes", "Bytes that wait in the spool.", registry=REGISTRY)

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS spool (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    subject TEXT NOT NULL,
    payload BLOB NOT NULL,
    UNIQUE (kind, key)
);
CREATE TABLE IF NOT EXISTS probe (times INTEGER NOT NULL);
"""


class SpoolFailed(Exception):
    """The entry is not stored: the spool is full, or its disk fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What waits: a usage event to publish under the message id `key`, or a command that releases the hold `key`."""

    kind: Kind
    key: str
    subject: str
    payload: bytes


class Spool:
    """Entries in the order they came. What is put is on disk when `put` returns, and once only."""

    def __init__(self, file: Path, *, bytes_max: int) -> None:
        self._file = file
        self._bytes_max = bytes_max
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")
        self._connection: sqlite3.Connection | None = None
        self.entries = 0
        self.bytes = 0
        self.broken: str | None = None

    async def open(self) -> None:
        """Open the file, made if it is not there. Raises OSError or sqlite3.Error: then nothing may start."""
        await self._run(self._open)

    async def close(self) -> None:
        """What was put stays for the next process."""
        await self._run(self._close)
        self._thread.shutdown()

    @property
    def full(self) -> bool:
        """Nothing more fits."""
        return self.bytes >= self._bytes_max

    async def put(self, entry: Entry) -> None:
        """Store an entry; one that is there already stays as it is. Raises SpoolFailed."""
        await self._run(lambda: self._put(entry))

    async def oldest(self, count: int) -> list[tuple[int, Entry]]:
        """The entries that have waited longest, by number."""
        return await self._run(lambda: self._oldest(count))

    async def remove(self, numbers: Sequence[int]) -> None:
        """These have been told."""
        await self._run(lambda: self._remove(numbers))

    async def check(self) -> None:
        """For readiness: raises what is wrong with it."""
        if self.broken is not None:
            raise SpoolFailed(self.broken)
        if self.full:
            raise SpoolFailed(f"the spool is full: it has {self.bytes} of at most {self._bytes_max} bytes")

    async def probe(self) -> None:
        """Write something, to learn whether a disk that failed works again."""
        await self._run(self._probe)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _open(self) -> None:
        # It holds what users of an account did: nobody else reads it.
        self._file.touch(mode=0o600)
        connection = sqlite3.connect(self._file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(_SCHEMA)
        self._connection = connection
        self.entries, self.bytes = connection.execute(
            "SELECT count(*), coalesce(sum(length(payload)), 0) FROM spool"
        ).fetchone()
        self._show()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.ProgrammingError("the spool is closed")
        return self._connection

    def _put(self, entry: Entry) -> None:
        if self.bytes + len(entry.payload) > self._bytes_max:
            raise SpoolFailed(f"the spool is full: it has {self.bytes} of at most {self._bytes_max} bytes")
        row = (entry.kind, entry.key, entry.subject, entry.payload)
        try:
            stored = self._opened.execute(
                "INSERT INTO spool (kind, key, subject, payload) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", row
            ).rowcount
        except sqlite3.Error as error:
            self.broken = f"the spool's file fails: {error}"
            raise SpoolFailed(self.broken) from error
        self.entries += stored
        self.bytes += stored * len(entry.payload)
        self._show()

    def _oldest(self, count: int) -> list[tuple[int, Entry]]:
        rows = self._opened.execute(
            "SELECT number, kind, key, subject, payload FROM spool ORDER BY number LIMIT ?", (count,)
        )
        return [
            (number, Entry(kind=kind, key=key, subject=subject, payload=payload))
            for number, kind, key, subject, payload in rows
        ]

    def _remove(self, numbers: Sequence[int]) -> None:
        self._opened.execute("BEGIN IMMEDIATE")
        for number in numbers:
            removed = self._opened.execute(
                "DELETE FROM spool WHERE number = ? RETURNING length(payload)", (number,)
            ).fetchall()
            self.entries -= len(removed)
            self.bytes -= sum(length for (length,) in removed)
        self._opened.execute("COMMIT")
        self._show()

    def _probe(self) -> None:
        self._opened.execute("INSERT INTO probe VALUES (1)")
        self._opened.execute("DELETE FROM probe")
        self.broken = None

    def _show(self) -> None:
        SPOOLED.set(self.entries)
        SPOOLED_BYTES.set(self.bytes)
