"""A use of a model as the log keeps it, and what makes a report of one unacceptable."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec

from contracts.envelope import Problem
from contracts.partition import token
from contracts.usage import ModelUsed

AHEAD_MAX: Final = timedelta(minutes=5)

# Only who quotes calls knows what a call was quoted with. Anybody else could choose the cheapest version.
PINNING_SOURCE: Final = "gateway"

# (partition, source, event id): whose use is one and the same.
Key = tuple[int, str, str]


class Usage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A usage event that could be read. `data` and `context` are JSON as the producer wrote it; `body` is all of it.

    `key` is unique for ever.
    """

    key: Key
    partition: int
    source: str
    event_id: str
    account: str
    type: str
    occurred_at: datetime
    body_hash: bytes
    used: ModelUsed
    data: str
    context: str | None
    body: bytes


def report_problems(
    *, source: str, reporter: str, occurred_at: datetime | None, received_at: datetime, price_version: str | None = None
) -> Sequence[Problem]:
    """What is wrong with a readable event because of who reports it, or when, or what price version it is pinned to."""
    problems = []
    if source != reporter:
        problems.append(Problem("source", f"the source is {source}, but {reporter} reports it"))
    if occurred_at is not None and occurred_at - received_at > AHEAD_MAX:
        ahead = int((occurred_at - received_at).total_seconds())
        problems.append(Problem("time", f"the time is {ahead} seconds ahead, more than {AHEAD_MAX.seconds} seconds"))
    if price_version is not None and source != PINNING_SOURCE:
        problems.append(Problem("data.price_version", f"only {PINNING_SOURCE} pins use to a price version"))
    return problems


def place_problems(*, partition: int, partition_token: str) -> Sequence[Problem]:
    """What is wrong with a readable event because of the subject it was published on."""
    if partition_token == token(partition):
        return ()
    return (Problem("subject", f"the account is of partition {token(partition)}, the event came on {partition_token}"),)
