"""The provider's own count: for every request what it really generated, and so would bill. Knows keys by hash only."""

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

# Beyond, the oldest requests are no longer listed; they stay in the sums.
LISTED_MAX: Final = 10_000

Outcome = Literal[
    "running",
    "completed",
    "drained",  # the client left, generation went on to its end
    "aborted",  # the client left, generation stopped
    "cut",  # the connection broke, or an error was sent, by directive
    "failed",  # refused by directive: nothing generated
    "stopped",  # the provider itself was stopped
]


@dataclass(slots=True, kw_only=True)
class Served:
    """One request to generate. The counts are what is billed; they grow while it runs."""

    id: str
    key: str
    model: str
    stream: bool
    started_at: float
    client_request_id: str | None = None
    began: bool = False
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    usage_reported: bool = False
    outcome: Outcome = "running"


@dataclass(slots=True)
class Sums:
    """Calls that began to generate, and their tokens. Cached tokens are part of the input, reasoning of the output."""

    calls: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    failed: int = 0

    def add(self, served: Served) -> None:
        self.calls += served.began
        self.failed += served.outcome == "failed"
        for name in ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens"):
            setattr(self, name, getattr(self, name) + getattr(served, name))


class Count:
    """All requests since the last reset. With a file, every finished one is a line of JSON in it."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._running: dict[str, Served] = {}
        self._finished: deque[Served] = deque(maxlen=LISTED_MAX)
        self._sums: dict[tuple[str, str], Sums] = {}
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                self._note(_read(line))

    def start(self, served: Served) -> None:
        self._running[served.id] = served

    def finish(self, served: Served, outcome: Outcome) -> None:
        """A request is over; it counts only once, however often this is said."""
        if self._running.pop(served.id, None) is None:
            return
        served.outcome = outcome
        self._note(served)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(served)) + "\n")

    def reset(self) -> None:
        """Forget what is finished. What still runs will count when it ends."""
        self._finished.clear()
        self._sums.clear()
        if self._file is not None:
            self._file.write_text("", encoding="utf-8")

    def usage(self, key: str | None = None) -> dict[str, Any]:
        """Sums per key and model, and over all; of one key only if one is named. What runs counts as far as it is."""
        rows = {each: Sums(**asdict(sums)) for each, sums in self._sums.items()}
        for served in self._running.values():
            rows.setdefault((served.key, served.model), Sums()).add(served)
        chosen = {each: sums for each, sums in sorted(rows.items()) if key in (None, each[0])}
        return {
            "running": sum(key in (None, served.key) for served in self._running.values()),
            "totals": asdict(_added(chosen.values())),
            "by_key_and_model": [{"key": each[0], "model": each[1], **asdict(sums)} for each, sums in chosen.items()],
        }

    def requests(self, key: str | None = None) -> list[dict[str, Any]]:
        """Each request, oldest first; the running ones last."""
        return [asdict(each) for each in (*self._finished, *self._running.values()) if key in (None, each.key)]

    def _note(self, served: Served) -> None:
        self._finished.append(served)
        self._sums.setdefault((served.key, served.model), Sums()).add(served)


def _added(rows: Iterable[Sums]) -> Sums:
    total = Sums()
    for row in rows:
        for field in fields(Sums):
            setattr(total, field.name, getattr(total, field.name) + getattr(row, field.name))
    return total


def _read(line: str) -> Served:
    return Served(**json.loads(line))
