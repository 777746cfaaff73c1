"""Dead letters: input that cannot be read, kept with its reason until somebody re-drives it. Nothing is ever dropped.

A service records them in the transaction of the batch that met them, in the table `dead_letters` of its own schema.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from nats.aio.msg import Msg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow, class_row
from psycopg.types.json import Jsonb
from pydantic import AwareDatetime, Base64Bytes, BaseModel, Field
from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    Column,
    Index,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import JSONB

from services.kit.auth import Principal
from services.kit.clock import now
from services.kit.ids import new_uuid7
from services.kit.problems import Problem
from services.kit.redelivery import place_of

PAGE_SIZE_MAX = 200


class Unreadable(Exception):
    """Input that no retry will make readable. `problems` are single findings, safe to show."""

    def __init__(self, reason: str, *, problems: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Letter:
    """A message to put aside, and why."""

    stream: str
    stream_sequence: int
    subject: str
    headers: Mapping[str, str]
    payload: bytes
    reason: str
    problems: Sequence[Mapping[str, Any]] = ()
    partition: int | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A letter as it is stored."""

    id: str
    partition: int | None
    received_at: datetime
    stream: str
    stream_sequence: int
    subject: str
    headers: dict[str, str]
    payload: bytes
    reason: str
    problems: list[dict[str, Any]]
    redriven_at: datetime | None
    redriven_by: str | None


def letter_of(
    message: Msg, *, reason: str, problems: Sequence[Mapping[str, Any]] = (), partition: int | None = None
) -> Letter:
    """The letter of a delivered message."""
    place = place_of(message)
    return Letter(
        stream=place.stream,
        stream_sequence=place.stream_sequence,
        subject=message.subject,
        headers=dict(message.headers or {}),
        payload=bytes(message.data),
        reason=reason,
        problems=problems,
        partition=partition,
    )


def dead_letters_table(metadata: MetaData) -> Table:
    """The table `dead_letters`. `fingerprint` makes one row of a message however often it is delivered."""
    return Table(
        "dead_letters",
        metadata,
        Column("id", Text, primary_key=True),
        Column("fingerprint", LargeBinary, nullable=False),
        Column("partition", SmallInteger),
        Column("received_at", TIMESTAMP(timezone=True), nullable=False),
        Column("stream", Text, nullable=False),
        Column("stream_sequence", BigInteger, nullable=False),
        Column("subject", Text, nullable=False),
        Column("headers", JSONB, nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("reason", Text, nullable=False),
        Column("problems", JSONB, nullable=False),
        Column("redriven_at", TIMESTAMP(timezone=True)),
        Column("redriven_by", Text),
        UniqueConstraint("fingerprint", name="dead_letters_fingerprint"),
        Index("dead_letters_received_at", "received_at", "id"),
    )


async def record(connection: AsyncConnection[TupleRow], letters: Sequence[Letter]) -> int:
    """Store letters, each once; the number that were new. Never commits."""
    if not letters:
        return 0
    received_at = now()
    cursor = await connection.execute(
        """
        INSERT INTO dead_letters (id, fingerprint, partition, received_at, stream, stream_sequence, subject, headers,
                                  payload, reason, problems)
        SELECT id, fingerprint, partition, %(received_at)s, stream, stream_sequence, subject, headers,
               payload, reason, problems
        FROM unnest(%(id)s::text[], %(fingerprint)s::bytea[], %(partition)s::smallint[], %(stream)s::text[],
                    %(stream_sequence)s::bigint[], %(subject)s::text[], %(headers)s::jsonb[], %(payload)s::bytea[],
                    %(reason)s::text[], %(problems)s::jsonb[])
             AS letter (id, fingerprint, partition, stream, stream_sequence, subject, headers, payload, reason,
                        problems)
        ON CONFLICT (fingerprint) DO NOTHING
        """,
        {
            "received_at": received_at,
            "id": [f"dead_{new_uuid7()}" for _ in letters],
            "fingerprint": [_fingerprint(letter) for letter in letters],
            "partition": [letter.partition for letter in letters],
            "stream": [letter.stream for letter in letters],
            "stream_sequence": [letter.stream_sequence for letter in letters],
            "subject": [letter.subject for letter in letters],
            "headers": [_jsonb(letter.headers) for letter in letters],
            "payload": [letter.payload for letter in letters],
            "reason": [_storable(letter.reason) for letter in letters],
            "problems": [_jsonb([dict(problem) for problem in letter.problems]) for letter in letters],
        },
    )
    return cursor.rowcount


async def list_letters(
    connection: AsyncConnection[TupleRow], *, limit: int, before: str | None = None, redriven: bool = False
) -> list[DeadLetter]:
    """A page of letters, newest first; the next page is before the last id of this one. `redriven` shows those, too."""
    async with connection.cursor(row_factory=class_row(DeadLetter)) as cursor:
        await cursor.execute(
            f"""
            SELECT {_COLUMNS} FROM dead_letters
            WHERE (%(before)s::text IS NULL
                   OR (received_at, id) < (SELECT received_at, id FROM dead_letters WHERE id = %(before)s))
              AND (%(redriven)s OR redriven_at IS NULL)
            ORDER BY received_at DESC, id DESC LIMIT %(limit)s
            """,
            {"before": before, "redriven": redriven, "limit": limit},
        )
        return await cursor.fetchall()


async def find_letter(
    connection: AsyncConnection[TupleRow], letter_id: str, *, lock: bool = False
) -> DeadLetter | None:
    """One letter. `lock` keeps others from re-driving it until the transaction ends."""
    async with connection.cursor(row_factory=class_row(DeadLetter)) as cursor:
        await cursor.execute(
            f"SELECT {_COLUMNS} FROM dead_letters WHERE id = %s {'FOR NO KEY UPDATE' if lock else ''}", [letter_id]
        )
        return await cursor.fetchone()


async def mark_redriven(connection: AsyncConnection[TupleRow], letter_id: str, *, by: str) -> None:
    """Note that a letter has been handed in again. Never commits."""
    await connection.execute(
        "UPDATE dead_letters SET redriven_at = %s, redriven_by = %s WHERE id = %s", [now(), by, letter_id]
    )


class DeadLetterSummary(BaseModel):
    """A letter without its body."""

    id: str
    partition: int | None
    received_at: AwareDatetime
    stream: str
    stream_sequence: int
    subject: str
    reason: str
    problems: list[dict[str, Any]]
    redriven_at: AwareDatetime | None
    redriven_by: str | None


class DeadLetterDetail(DeadLetterSummary):
    """A letter with its headers and body."""

    headers: dict[str, str]
    payload_base64: Base64Bytes
    payload_text: str | None


class DeadLetterPage(BaseModel):
    """Letters, newest first. `next_before` asks for the next page; null on the last one."""

    dead_letters: list[DeadLetterSummary]
    next_before: str | None


# Postgres has no text with a NUL in it.
_LetterId = Annotated[str, Field(max_length=64, pattern=r"^[^\x00]*$")]


def dead_letters_router(
    *,
    connect: Callable[[], AbstractAsyncContextManager[AsyncConnection[TupleRow]]],
    redrive: Callable[[DeadLetter], Awaitable[None]],
    authorize: Callable[..., Awaitable[Principal]],
) -> APIRouter:
    """Routes to list, show and re-drive. `connect` lends a connection (a pool's `connection`).

    `redrive` hands the letter in again; it may run twice for one letter (a crash in between), as any delivery may. It
    publishes under another message id than the first time, or the stream takes it for a duplicate. If it raises
    Unreadable the letter stays as it was.
    """
    router = APIRouter(tags=["dead letters"])
    # Not Annotated: the dependency is this function's argument, which FastAPI could not resolve from a string.
    operator = Depends(authorize)

    @router.get("/dead-letters", dependencies=[operator])
    async def list_dead_letters(
        limit: Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)] = 50,
        before: _LetterId | None = None,
        redriven: bool = False,
    ) -> DeadLetterPage:
        async with connect() as connection:
            found = await list_letters(connection, limit=limit + 1, before=before, redriven=redriven)
        page = found[:limit]
        return DeadLetterPage(
            dead_letters=[DeadLetterSummary.model_validate(letter, from_attributes=True) for letter in page],
            next_before=page[-1].id if len(found) > limit else None,
        )

    @router.get("/dead-letters/{letter_id}", dependencies=[operator])
    async def show_dead_letter(letter_id: _LetterId) -> DeadLetterDetail:
        async with connect() as connection:
            return _detail(_known(await find_letter(connection, letter_id), letter_id))

    @router.post("/dead-letters/{letter_id}/redrive")
    async def redrive_dead_letter(letter_id: _LetterId, principal: Principal = operator) -> DeadLetterDetail:
        async with connect() as connection, connection.transaction():
            letter = _known(await find_letter(connection, letter_id, lock=True), letter_id)
            if letter.redriven_at is not None:
                raise Problem(
                    409,
                    "already_redriven",
                    f"{letter_id} was re-driven at {letter.redriven_at.isoformat()} by {letter.redriven_by}",
                )
            try:
                await redrive(letter)
            except Unreadable as error:
                raise Problem(422, "still_unreadable", error.reason, errors=error.problems) from error
            await mark_redriven(connection, letter_id, by=principal.name)
            return _detail(_known(await find_letter(connection, letter_id), letter_id))

    return router


_COLUMNS = (
    "id, partition, received_at, stream, stream_sequence, subject, headers, payload, reason, problems,"
    " redriven_at, redriven_by"
)


def _known(letter: DeadLetter | None, letter_id: str) -> DeadLetter:
    if letter is None:
        raise Problem(404, "not_found", f"there is no dead letter {letter_id!r}")
    return letter


def _detail(letter: DeadLetter) -> DeadLetterDetail:
    summary = DeadLetterSummary.model_validate(letter, from_attributes=True)
    try:
        text = letter.payload.decode()
    except UnicodeDecodeError:
        text = None
    return DeadLetterDetail.model_construct(
        **summary.model_dump(), headers=letter.headers, payload_base64=letter.payload, payload_text=text
    )


def _fingerprint(letter: Letter) -> bytes:
    digest = hashlib.sha256()
    for part in (letter.stream, str(letter.stream_sequence), letter.subject):
        digest.update(len(part.encode()).to_bytes(8, "big") + part.encode())
    digest.update(letter.payload)
    return digest.digest()


def _storable(text: str) -> str:
    """Postgres has no NUL in text."""
    return text.replace("\x00", "\ufffd")


def _jsonb(value: object) -> Jsonb:
    return Jsonb(json.loads(_storable(json.dumps(value, default=str)).replace("\\u0000", "\\ufffd")))
