"""The time of this machine. Domain code never calls it: a time is handed in."""

from datetime import UTC, datetime


def now() -> datetime:
    """The present in UTC, to the microsecond."""
    return datetime.now(UTC)
