"""What becomes of a batch, by what metering answered; and how long to wait before the next try. Only computes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

RETRY_SECONDS_MIN: Final = 0.2
RETRY_SECONDS_MAX: Final = 30.0
# Longer than that nobody means.
RETRY_AFTER_SECONDS_MAX: Final = 3600.0

_TRY_AGAIN: Final = frozenset({408, 425, 429})
_REFUSED: Final = frozenset({400, 413, 422})
_PROBLEM: Final = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Delivered:
    """Metering has all of it on disk."""


@dataclass(frozen=True, slots=True)
class Later:
    """Nothing is known to have been taken: the same again, after a while. `seconds`: at least so long."""

    why: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BadEvents:
    """Nothing was taken, because of some events: their problems, by place in the batch."""

    problems: Mapping[int, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class BadBatch:
    """Nothing was taken, and it is not said because of which events: halves tell."""

    problem: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NoGzip:
    """Metering may not read compressed bodies: the same again, plain."""


Outcome = Delivered | Later | BadEvents | BadBatch | NoGzip


def outcome(
    status: int, headers: Mapping[str, str], body: bytes, *, events: int, gzipped: bool, now: datetime
) -> Outcome:
    """What an answer to a batch of so many events means."""
    if 200 <= status < 300:
        return Delivered()
    said = _problem(headers, body)
    code = said.get("code", "")
    why = f"{status} {code}".strip()
    if status in _REFUSED and code == "invalid_events":
        return _bad_events(said, events)
    if gzipped and status in (400, 411, 415):
        return NoGzip()
    # Only what is told in metering's own words is a verdict on events: a proxy in between may answer anything. One that
    # says "too large" of several may be helped.
    if (status in _REFUSED and code) or (status == 413 and events > 1):
        return BadBatch(said)
    if status in _TRY_AGAIN or status >= 500:
        return Later(why, _retry_after(headers.get("retry-after"), now))
    return Later(f"{why}: the address or the token is wrong")


def retry_seconds(failures: int, *, at_least: float, chance: float) -> float:
    """How long to wait after so many failures in a row: twice as long each time, less up to a half by `chance`."""
    longest = min(RETRY_SECONDS_MIN * 2.0 ** min(failures - 1, 16), RETRY_SECONDS_MAX)
    # Beyond what was asked for, too: others were asked for the same.
    return max(longest * (1 - chance / 2), at_least * (1 + chance / 10))


def _problem(headers: Mapping[str, str], body: bytes) -> Mapping[str, Any]:
    if not headers.get("content-type", "").startswith(_PROBLEM):
        return {}
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _bad_events(said: Mapping[str, Any], events: int) -> Outcome:
    problems: dict[int, list[Mapping[str, Any]]] = {}
    errors = said.get("errors")
    for error in errors if isinstance(errors, list) else []:
        index = error.get("index") if isinstance(error, dict) else None
        if isinstance(index, int) and 0 <= index < events:
            problems.setdefault(index, []).append({name: value for name, value in error.items() if name != "index"})
    return BadEvents(problems) if problems else BadBatch(said)


def _retry_after(text: str | None, now: datetime) -> float:
    """Seconds, told as such or as a date."""
    if text is None:
        return 0.0
    if text.strip().isdigit():
        return min(float(text), RETRY_AFTER_SECONDS_MAX)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return min(max((at - now).total_seconds(), 0.0), RETRY_AFTER_SECONDS_MAX)
