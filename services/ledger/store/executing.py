"""How statements are sent: as Postgres has them."""

import re
from collections.abc import Sequence
from itertools import count
from typing import Any

from psycopg import AsyncConnection, AsyncRawCursor
from psycopg.rows import TupleRow

Connection = AsyncConnection[TupleRow]
Row = tuple[Any, ...]


async def execute(connection: Connection, statement: bytes, columns: Sequence[str]) -> AsyncRawCursor[TupleRow]:
    """Run a statement whose placeholders are Postgres's own. psycopg's are looked for each time in a long statement."""
    cursor = AsyncRawCursor(connection)
    await cursor.execute(statement, columns)
    return cursor


def numbered(text: str) -> bytes:
    """A statement that is written with `%s` for each placeholder, as Postgres has them."""
    numbers = count(1)
    return re.sub("%s", lambda _: f"${next(numbers)}", text).encode()
