"""Which rows a question is about: those of an account, and those of the accounts below it."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from contracts.partition import partition_of

Connection = AsyncConnection[TupleRow]

# The least that two times differ by.
TICK: Final = timedelta(microseconds=1)
# Of the UUID at the end of an id.
UUID_LENGTH: Final = 36


# What counts in a wallet's posted: not what is kept aside of it.
_COUNTS: Final = "lot_kind IS NULL OR lot_kind NOT IN ('overage', 'uncapped')"
SUM_OF_POSTED: Final = f"coalesce(sum(posted) FILTER (WHERE {_COUNTS}), 0)::bigint"


# As the index journal_statement has it.
OF_ACCOUNT: Final = """partition = %(partition)s AND account = %(account)s
AND left(account, 1) <> '@' AND unit IS NOT NULL"""


def bounds_below(account: str) -> dict[str, str]:
    """Between which two texts the accounts below one are, byte for byte: "0" is the character after "/"."""
    return {"below": f"{account}/", "beside": f"{account}0"}


def text_array(texts: Iterable[str]) -> str:
    """An array of texts as Postgres reads it. Made here in a fraction of the time that its adapter takes."""
    return "{" + ",".join('"' + text.replace("\\", r"\\").replace('"', r"\"") + '"' for text in texts) + "}"


async def is_open(connection: Connection, account: str) -> bool:
    """Somebody opened the account."""
    cursor = await connection.execute(
        "SELECT 1 FROM accounts WHERE partition = %s AND account = %s", [partition_of(account), account]
    )
    return await cursor.fetchone() is not None
