"""What the statements of all subjects are sent on, and how a time is copied."""

from datetime import datetime
from functools import lru_cache

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

Connection = AsyncConnection[TupleRow]


@lru_cache(maxsize=16_384)
def time_text(time: datetime) -> str:
    """A time as it is copied: of a use, twice in a batch."""
    return str(time)
