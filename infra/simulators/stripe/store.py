"""What the simulator remembers, in SQLite: objects, answers by idempotency key, deliveries and their attempts.

One connection, used by one thread. A request's changes are one transaction, so a killed process leaves no half.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infra.simulators.stripe.objects import Object

State = Literal["pending", "delivered", "given_up"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL, unseen TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS objects_by_kind ON objects (kind, number);
CREATE TABLE IF NOT EXISTS answers (
    account TEXT NOT NULL, idempotency_key TEXT NOT NULL, request TEXT NOT NULL,
    status INTEGER NOT NULL, body TEXT NOT NULL, request_id TEXT NOT NULL, PRIMARY KEY (account, idempotency_key));
CREATE TABLE IF NOT EXISTS deliveries (
    number INTEGER PRIMARY KEY AUTOINCREMENT, event TEXT NOT NULL, type TEXT NOT NULL, endpoint INTEGER NOT NULL,
    copy INTEGER NOT NULL, payload TEXT NOT NULL, due_at REAL NOT NULL, state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS attempts (
    delivery INTEGER NOT NULL REFERENCES deliveries (number), number INTEGER NOT NULL,
    at REAL NOT NULL, status INTEGER, error TEXT, PRIMARY KEY (delivery, number));
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered under an idempotency key, and to which request."""

    request: str
    status: int
    body: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event on its way to one endpoint. `copy` is 0 for the first and 1 for a duplicate."""

    number: int
    event: str
    type: str
    endpoint: int
    copy: int
    payload: str
    due_at: float
    attempts: int


class Store:
    """Without a file everything ends with the process."""

    def __init__(self, file: Path | None = None) -> None:
        self._sql = sqlite3.connect(":memory:" if file is None else file, isolation_level=None, check_same_thread=False)
        if file is not None:
            file.chmod(0o600)
            self._sql.execute("PRAGMA journal_mode = WAL")
            self._sql.execute("PRAGMA synchronous = NORMAL")
        self._sql.executescript(_SCHEMA)

    def close(self) -> None:
        self._sql.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside happens, or nothing."""
        self._sql.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._sql.execute("ROLLBACK")
            raise
        self._sql.execute("COMMIT")

    def reset(self) -> None:
        """Forget everything."""
        with self.transaction():
            for table in ("attempts", "deliveries", "answers", "objects"):
                self._sql.execute(f"DELETE FROM {table}")
            self._sql.execute("DELETE FROM sqlite_sequence")

    def add(self, subject: Object, *, unseen: Object | None = None) -> None:
        """A new object. `unseen` is what belongs to it and the API does not show."""
        self._sql.execute(
            "INSERT INTO objects (kind, id, body, unseen) VALUES (?, ?, ?, ?)",
            (subject["object"], subject["id"], json.dumps(subject), json.dumps(unseen or {})),
        )

    def put(self, subject: Object) -> None:
        """An object as it is now."""
        self._sql.execute("UPDATE objects SET body = ? WHERE id = ?", (json.dumps(subject), subject["id"]))

    def get(self, id: str, *, kind: str | None = None) -> Object | None:
        row = self._sql.execute(
            "SELECT body FROM objects WHERE id = ? AND kind = coalesce(?, kind)", (id, kind)
        ).fetchone()
        return None if row is None else json.loads(row[0])

    def unseen(self, id: str) -> Object:
        (text,) = self._sql.execute("SELECT unseen FROM objects WHERE id = ?", (id,)).fetchone()
        found: Object = json.loads(text)
        return found

    def newest_first(self, kind: str) -> list[Object]:
        rows = self._sql.execute("SELECT body FROM objects WHERE kind = ? ORDER BY number DESC", (kind,))
        return [json.loads(body) for (body,) in rows]

    def count(self, kind: str) -> int:
        (found,) = self._sql.execute("SELECT count(*) FROM objects WHERE kind = ?", (kind,)).fetchone()
        return int(found)

    def answer(self, account: str, idempotency_key: str) -> Answer | None:
        row = self._sql.execute(
            "SELECT request, status, body, request_id FROM answers WHERE account = ? AND idempotency_key = ?",
            (account, idempotency_key),
        ).fetchone()
        return None if row is None else Answer(*row)

    def keep_answer(self, account: str, idempotency_key: str, answer: Answer) -> None:
        self._sql.execute(
            "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)",
            (account, idempotency_key, answer.request, answer.status, answer.body, answer.request_id),
        )

    def add_delivery(self, event: Object, *, endpoint: int, copy: int, payload: str, due_at: float) -> None:
        self._sql.execute(
            "INSERT INTO deliveries (event, type, endpoint, copy, payload, due_at, state)"
            " VALUES (?, ?, ?, ?, ?, ?, 'pending')",
            (event["id"], event["type"], endpoint, copy, payload, due_at),
        )

    def pending_after(self, number: int) -> list[Delivery]:
        """Deliveries that are neither done nor given up, with a greater number, oldest first."""
        rows = self._sql.execute(
            "SELECT number, event, type, endpoint, copy, payload, due_at,"
            " (SELECT count(*) FROM attempts WHERE delivery = deliveries.number)"
            " FROM deliveries WHERE state = 'pending' AND number > ? ORDER BY number",
            (number,),
        )
        return [Delivery(*row) for row in rows]

    def note_attempt(
        self, delivery: int, *, at: float, status: int | None, error: str | None, state: State, due_at: float
    ) -> None:
        with self.transaction():
            self._sql.execute(
                "INSERT INTO attempts SELECT ?, count(*) + 1, ?, ?, ? FROM attempts WHERE delivery = ?",
                (delivery, at, status, error, delivery),
            )
            self._sql.execute("UPDATE deliveries SET state = ?, due_at = ? WHERE number = ?", (state, due_at, delivery))

    def give_up(self, delivery: int) -> None:
        self._sql.execute("UPDATE deliveries SET state = 'given_up' WHERE number = ?", (delivery,))

    def deliveries(self) -> list[dict[str, Any]]:
        """Every delivery with its attempts, oldest first."""
        attempts: dict[int, list[dict[str, Any]]] = {}
        for delivery, at, status, error in self._sql.execute(
            "SELECT delivery, at, status, error FROM attempts ORDER BY delivery, number"
        ):
            attempts.setdefault(delivery, []).append({"at": at, "status": status, "error": error})
        rows = self._sql.execute(
            "SELECT number, event, type, endpoint, copy, due_at, state FROM deliveries ORDER BY number"
        )
        names = ("number", "event", "type", "endpoint", "copy", "due_at", "state")
        return [dict(zip(names, row, strict=True)) | {"attempts": attempts.get(row[0], [])} for row in rows]

    def undelivered(self, event: str) -> int:
        """To how many endpoints an event has not been delivered."""
        (found,) = self._sql.execute(
            "SELECT count(*) FROM deliveries WHERE event = ? AND copy = 0 AND state != 'delivered'", (event,)
        ).fetchone()
        return int(found)
