"""What the routes work on, and what its being away is answered with."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from nats.aio.client import Client
from psycopg import AsyncConnection, OperationalError
from psycopg.errors import QueryCanceled
from psycopg.rows import TupleRow
from psycopg_pool import PoolTimeout

from services.kit.database import Pool
from services.kit.dead_letters import DeadLetter
from services.kit.outbox import OutboxRow
from services.kit.problems import Problem
from services.metering.engine import PriceKeeper

RETRY_AFTER_SECONDS: Final = 2


@dataclass(frozen=True, slots=True)
class Backend:
    """What the routes work on. Made by the lifespan, before the first request."""

    nats: Client
    pool: Pool
    # Of its own: a question may take seconds, and must not hold up what is charged.
    questions: Pool
    prices: PriceKeeper
    redrive: Callable[[DeadLetter], Awaitable[None]]
    # Told that there is a new alias.
    mapped: Callable[[], None]
    # Told that there is a correction to go on with.
    correcting: Callable[[], None]
    # Told what has been committed to the outbox.
    staged: Callable[[Sequence[OutboxRow]], None]


@dataclass(frozen=True, slots=True)
class IngestLimits:
    """How old reported use may be, and how much of it may come at once."""

    age_max: timedelta
    body_bytes_max: int
    batch_events_max: int
    attributes_max: int


@asynccontextmanager
async def connection(backend: Backend) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection of the pool. Problem 503 if there is none."""
    async with away_as_problem(), backend.pool.connection() as connection:
        yield connection


@asynccontextmanager
async def asking(backend: Backend) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection for what may take long. Problem 503 if there is none, or all are taken by others who ask."""
    async with away_as_problem():
        try:
            async with backend.questions.connection() as connection:
                yield connection
        except PoolTimeout as error:
            if backend.questions.get_stats().get("pool_size", 0) == 0:
                raise
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            raise Problem(503, "busy", "others are asking: ask again", headers=headers) from error


@asynccontextmanager
async def away_as_problem() -> AsyncIterator[None]:
    """Problem 503 for a database that is away, or takes too long."""
    try:
        yield
    except QueryCanceled as error:
        raise Problem(503, "too_much", "the answer takes too long to find: ask for less at once") from error
    except (PoolTimeout, OperationalError) as error:
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        raise Problem(503, "database_away", "the database is away: ask again", headers=headers) from error
