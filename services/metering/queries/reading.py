"""How questions about much use read the log: in one snapshot, and by several of Postgres' processes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

# For hashes and sorts of one step of an answer.
WORK_MEMORY: Final = "32MB"

# Ends a step of a question. Steps that it keeps apart are not merged: what is computed of an event is computed once,
# and its data goes no further. The quotes matter: without them the number is cast first, Postgres cannot tell yet that
# no rows are left out, and one process alone does all of the work.
APART: Final = "OFFSET '0'"


@asynccontextmanager
async def snapshot(connection: AsyncConnection[TupleRow]) -> AsyncIterator[None]:
    """A transaction in which every statement sees the same."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        # How many groups there will be nobody knows before; hashed they take far less than all that was used, sorted.
        await connection.execute(f"SET LOCAL work_mem = '{WORK_MEMORY}'; SET LOCAL enable_sort = off")
        yield
