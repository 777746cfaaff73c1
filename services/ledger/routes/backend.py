"""What the routes work on, how they read (on a connection, or as of one moment), and what they say of an account."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from psycopg import AsyncConnection, OperationalError
from psycopg.errors import QueryCanceled
from psycopg.rows import TupleRow
from psycopg_pool import PoolTimeout

from contracts.accounts import check_account
from services.kit.database import Pool
from services.kit.problems import Problem
from services.ledger.domain.commands import Units
from services.ledger.engine import Owners
from services.ledger.queries.present import TooMuchDue

RETRY_AFTER_SECONDS: Final = 1


@dataclass(frozen=True, slots=True)
class Backend:
    """What the routes work on. Made by the lifespan, before the first request."""

    owners: Owners
    pool: Pool
    units: Units


@asynccontextmanager
async def connected(backend: Backend) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection of the pool. Problem 503 if there is none, or if an answer takes too long."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    try:
        async with backend.pool.connection() as connection:
            yield connection
    except (QueryCanceled, TooMuchDue) as error:
        raise Problem(503, "too_much", "the answer takes too long: ask for less", headers=headers) from error
    except (PoolTimeout, OperationalError) as error:
        raise Problem(503, "database_away", "the database is away: ask again", headers=headers) from error


@asynccontextmanager
async def snapshot(backend: Backend) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection on which everything is read as of one moment."""
    async with connected(backend) as connection:
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        try:
            yield connection
        except Exception:
            await connection.rollback()
            raise
        await connection.commit()


def check(account: str) -> None:
    """Problem 422 unless it can be an account's id."""
    try:
        check_account(account)
    except ValueError as error:
        raise Problem(422, "invalid_account", str(error)) from error


def not_open(account: str, *, at: datetime | None = None) -> Problem:
    """Nobody opened the account, or not by a time."""
    when = "is not open" if at is None else f"was not open at {at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    return Problem(404, "account_not_open", f"the account {account} {when}")
