"""A use as the log keeps it, and what makes a report of one unacceptable."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec

from contracts.envelope import Problem
from contracts.streams import FORWARDED
from contracts.usage import ModelUsed, QuickCall

AHEAD_MAX: Final = timedelta(minutes=5)
AGE_MAX: Final = timedelta(days=35)
# What HTTP took must not be too old when the stream has it, moments later.
AGE_TOLERANCE: Final = timedelta(minutes=5)

# Only who quotes calls knows what a call was quoted with. Anybody else could choose the cheapest version.
PINNING_SOURCE: Final = "gateway"

# (partition, source, event id): whose use is one and the same.
Key = tuple[int, str, str]


class Usage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A usage event that could be read. `data` and `context` are JSON as said; `body` is all of it as written.

    `key` is unique for ever. `subject` is what the producer called the account, and `partition` that of the subject
    until the account is known to be another. `account` is empty while no account has that name. `used` is None for
    types other than ours. `question` is under what name somebody waits to hear what becomes of it. `revision` counts
    the corrections that made it what it is.
    """

    key: Key
    partition: int
    source: str
    event_id: str
    subject: str
    account: str
    type: str
    occurred_at: datetime
    body_hash: bytes
    used: ModelUsed | QuickCall | None
    data: str
    context: str | None
    body: bytes
    question: str | None = None
    revision: int = 0

    @property
    def is_mapped(self) -> bool:
        """Whether its account follows from an alias."""
        return self.account not in ("", self.subject)


class Reroute(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A use that belongs to partition `to`, and is sent there from `partition`: with its account, if that is known."""

    partition: int
    source: str
    event_id: str
    body_hash: bytes
    to: int
    account: str | None
    occurred_at: datetime
    body: bytes


def reroute(usage: Usage, *, partition: int, to: int, account: str | None) -> Reroute:
    """Send a use on, as it came."""
    return Reroute(
        partition=partition,
        source=usage.source,
        event_id=usage.event_id,
        body_hash=usage.body_hash,
        to=to,
        account=account,
        occurred_at=usage.occurred_at,
        body=usage.body,
    )


def report_problems(
    *,
    source: str,
    reporter: str,
    occurred_at: datetime | None,
    arrived_at: datetime,
    price_version: str | None = None,
) -> Sequence[Problem]:
    """What is wrong with a readable event because of who reports it, or when, or what price version it is pinned to."""
    problems = []
    if source == FORWARDED:
        problems.append(Problem("source", f"no source is called {FORWARDED}"))
    elif source != reporter:
        problems.append(Problem("source", f"the source is {source}, but {reporter} reports it"))
    if occurred_at is not None and occurred_at - arrived_at > AHEAD_MAX:
        ahead = int((occurred_at - arrived_at).total_seconds())
        problems.append(Problem("time", f"the time is {ahead} seconds ahead, more than {AHEAD_MAX.seconds} seconds"))
    if price_version is not None and source != PINNING_SOURCE:
        problems.append(Problem("data.price_version", f"only {PINNING_SOURCE} pins use to a price version"))
    return problems


def age_problems(*, occurred_at: datetime | None, arrived_at: datetime, age_max: timedelta) -> Sequence[Problem]:
    """What is wrong with use that is reported too late. Of a repeat nothing is: it was reported in time before."""
    if occurred_at is None or arrived_at - occurred_at <= age_max:
        return ()
    age = (arrived_at - occurred_at).days
    return (Problem("time", f"the time is {age} days ago, more than {age_max.days} days"),)
