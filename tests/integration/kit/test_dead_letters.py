"""Laws of dead letters: kept once with everything, listed, shown, and handed in again once."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from services.kit.auth import require
from services.kit.database import Pool
from services.kit.dead_letters import (
    DeadLetter,
    Letter,
    Unreadable,
    dead_letters_router,
    find_letter,
    list_letters,
    record,
)
from services.kit.http import Readiness, build_app

pytestmark = pytest.mark.anyio

LETTER = Letter(
    stream="USAGE",
    stream_sequence=5,
    subject="usage.v1.07.demo",
    headers={"Nats-Msg-Id": "a\x00b"},
    payload=b"\xff\x00 not json",
    reason="not JSON\x00",
    problems=[{"field": "", "message": "nul \x00 inside"}],
    partition=7,
)


async def test_a_message_delivered_again_is_recorded_once(connection: AsyncConnection[TupleRow]) -> None:
    other = replace(LETTER, stream_sequence=6)
    assert await record(connection, [LETTER, LETTER]) == 1
    assert await record(connection, [LETTER, other]) == 1
    assert await record(connection, []) == 0
    newest, oldest = await list_letters(connection, limit=10)
    assert (newest.stream_sequence, oldest.stream_sequence) == (6, 5)
    assert (oldest.payload, oldest.partition) == (LETTER.payload, 7)
    assert oldest.reason == "not JSON\ufffd"


async def test_pages_follow_each_other(connection: AsyncConnection[TupleRow]) -> None:
    for number in range(7):
        await record(connection, [replace(LETTER, stream_sequence=number)])
    await record(connection, [replace(LETTER, stream_sequence=number) for number in range(7, 10)])
    found: list[int] = []
    before = None
    while page := await list_letters(connection, limit=4, before=before):
        found += [letter.stream_sequence for letter in page]
        before = page[-1].id
    assert sorted(found) == list(range(10))


@pytest.fixture
async def client(pool: Pool, tokens_file: Path) -> AsyncIterator[httpx2.AsyncClient]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield

    redriven: list[str] = []

    async def redrive(letter: DeadLetter) -> None:
        if letter.stream_sequence == 13:
            raise Unreadable("still not JSON", problems=[{"field": "id"}])
        redriven.append(letter.id)

    router = dead_letters_router(connect=pool.connection, redrive=redrive, authorize=require("operate"))
    app = build_app(name="kit", lifespan=lifespan, readiness=Readiness(), tokens_file=tokens_file, routers=[router])
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=app),
        base_url="http://kit",
        headers={"Authorization": "Bearer token-of-operator"},
    ) as opened:
        yield opened


async def test_a_letter_is_listed_shown_and_handed_in_again_once(
    client: httpx2.AsyncClient, connection: AsyncConnection[TupleRow]
) -> None:
    for letter in (LETTER, replace(LETTER, stream_sequence=6, payload=b"text")):
        await record(connection, [letter])
    page = (await client.get("/dead-letters", params={"limit": 1})).json()
    assert [letter["stream_sequence"] for letter in page["dead_letters"]] == [6]
    rest = (await client.get("/dead-letters", params={"limit": 1, "before": page["next_before"]})).json()
    assert [letter["stream_sequence"] for letter in rest["dead_letters"]] == [5]
    assert rest["next_before"] is None
    letter_id = page["dead_letters"][0]["id"]
    shown = (await client.get(f"/dead-letters/{letter_id}")).json()
    assert (shown["payload_base64"], shown["payload_text"]) == ("dGV4dA==", "text")
    answer = await client.post(f"/dead-letters/{letter_id}/redrive")
    assert answer.status_code == 200
    assert answer.json()["redriven_by"] == "operator"
    again = await client.post(f"/dead-letters/{letter_id}/redrive")
    assert (again.status_code, again.json()["code"]) == (409, "already_redriven")
    left = (await client.get("/dead-letters")).json()["dead_letters"]
    assert [letter["stream_sequence"] for letter in left] == [5]
    everything = (await client.get("/dead-letters", params={"redriven": True})).json()["dead_letters"]
    assert len(everything) == 2


async def test_a_letter_that_is_still_unreadable_stays(
    client: httpx2.AsyncClient, connection: AsyncConnection[TupleRow]
) -> None:
    await record(connection, [replace(LETTER, stream_sequence=13)])
    (letter,) = await list_letters(connection, limit=1)
    answer = await client.post(f"/dead-letters/{letter.id}/redrive")
    assert (answer.status_code, answer.json()["errors"]) == (422, [{"field": "id"}])
    found = await find_letter(connection, letter.id)
    assert found is not None
    assert found.redriven_at is None


async def test_only_who_operates_sees_letters(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/dead-letters", headers={"Authorization": "Bearer token-of-demo"})
    assert (answer.status_code, answer.json()["scope"]) == (403, "operate")
    assert (await client.get("/dead-letters/dead_nothing")).status_code == 404
