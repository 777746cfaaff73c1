"""Laws of what must be told: while nobody listens it waits on disk, through the death of the process; told once."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from contracts import ledger
from contracts.streams import STREAMS, USAGE
from infra.provision import operator, stream_config
from infra.servers import EmbeddedNats
from services.gateway.store import Entry, Spool, SpoolFailed
from tests.conftest import NatsAccount, refresh_streams
from tests.eventually import eventually
from tests.integration.gateway.conftest import OwnWorld
from tests.integration.gateway.driving import World, running, world_of

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def on_own_nats(
    own_nats: tuple[EmbeddedNats, NatsAccount], directory: Path, tokens_file: Path, **settings: Any
) -> AsyncIterator[World]:
    account = own_nats[1]
    await refresh_streams(account)
    with running(account, directory, tokens_file=tokens_file, **settings) as gateway:
        async with world_of(gateway, account) as world:
            yield world


async def without_stream(world: World) -> None:
    """From now on the server takes no usage."""
    await world.operator.jetstream().delete_stream(USAGE)


async def with_stream(world: World) -> None:
    """From now on it does again."""
    await world.operator.jetstream().add_stream(stream_config(next(each for each in STREAMS if each.name == USAGE)))


async def test_a_call_ends_well_while_nats_is_away_and_its_use_is_told_later(
    own_nats: tuple[EmbeddedNats, NatsAccount], tmp_path: Path, tokens_file: Path
) -> None:
    async with on_own_nats(own_nats, tmp_path, tokens_file) as world:
        stream = await world.ask("[[tokens:100]] [[slow:10]]", stream=True)
        await anext(stream)
        await asyncio.to_thread(own_nats[0].stop)
        assert len([chunk async for chunk in stream]) >= 100
        await eventually_spooled(world, 1)
        with pytest.raises(openai.InternalServerError) as refused:
            await world.ask()
        assert refused.value.status_code == 503
        own_nats[0].start()
        await eventually_spooled(world, 0)

        async def told() -> bool:
            return len(await world.events()) == 1

        await eventually(told, seconds=10)
        assert (await world.event()).data.output_tokens == 100


async def test_use_that_the_stream_does_not_take_survives_the_process(
    own_nats: tuple[EmbeddedNats, NatsAccount], tmp_path: Path, tokens_file: Path
) -> None:
    async with on_own_nats(own_nats, tmp_path, tokens_file) as world:
        await without_stream(world)
        for _ in range(3):
            await world.ask()
        await eventually_spooled(world, 3)
    async with operator(own_nats[1].url, own_nats[1].password("operator"), user=own_nats[1].user("operator")) as made:
        await made.add_stream(stream_config(next(each for each in STREAMS if each.name == USAGE)))
    async with on_own_nats(own_nats, tmp_path, tokens_file) as world:
        await eventually_spooled(world, 0)
        assert len(await world.events()) == 3


async def test_a_release_waits_for_the_ledger(own_world: OwnWorld) -> None:
    async with own_world() as world:
        stream = asyncio.create_task(world.ask("[[stall:0.3]] [[error-after:0]]"))
        await eventually(lambda: bool(world.ledger.commands))
        world.ledger.silent = True
        with pytest.raises(openai.InternalServerError):
            await stream
        assert len(world.ledger.holds) == 1
        world.ledger.silent = False
        await eventually(lambda: world.ledger.holds == {}, seconds=8)


async def test_a_full_spool_admits_nobody_and_loses_nothing_in_silence(
    own_nats: tuple[EmbeddedNats, NatsAccount],
    tmp_path: Path,
    tokens_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with on_own_nats(own_nats, tmp_path, tokens_file, spool_bytes_max=1_000) as world:
        await without_stream(world)
        await world.ask()
        stream = await world.ask("[[tokens:3]]", stream=True)
        with pytest.raises(openai.APIError) as failed:
            _ = [chunk async for chunk in stream]
        assert failed.value.code == "usage_not_recorded"
        assert '"neither told nor spooled"' in capfd.readouterr().err
        with pytest.raises(openai.InternalServerError) as lost:
            await world.ask()
        assert lost.value.code == "usage_not_recorded"
        await with_stream(world)
        await eventually_spooled(world, 0)
        await world.ask()


async def test_what_is_put_is_there_after_the_file_was_opened_anew(tmp_path: Path) -> None:
    def entry(key: str, payload: bytes = b"x") -> Entry:
        return Entry(kind="usage", key=key, subject="usage.v1.07.gateway", payload=payload)

    spool = Spool(tmp_path / "spool.db", bytes_max=10)
    await spool.open()
    for key in ("a", "b", "a"):
        await spool.put(entry(key))
    await spool.close()
    spool = Spool(tmp_path / "spool.db", bytes_max=10)
    await spool.open()
    assert [each.key for _, each in await spool.oldest(9)] == ["a", "b"]
    assert (spool.entries, spool.bytes, spool.full) == (2, 2, False)
    with pytest.raises(SpoolFailed, match="full"):
        await spool.put(entry("c", b"123456789"))
    await spool.remove([number for number, _ in await spool.oldest(1)])
    assert [each.key for _, each in await spool.oldest(9)] == ["b"]
    assert (tmp_path / "spool.db").stat().st_mode & 0o777 == 0o600
    await spool.close()


async def test_a_disk_that_fails_is_noticed_and_tried_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", bytes_max=1_000)
    await spool.open()
    with sqlite3.connect(tmp_path / "spool.db") as other:
        other.execute("ALTER TABLE spool RENAME TO away")
    entry = Entry(kind="usage", key="a", subject="usage.v1.07.gateway", payload=b"x")
    with pytest.raises(SpoolFailed):
        await spool.put(entry)
    with pytest.raises(SpoolFailed):
        await spool.check()
    other.execute("ALTER TABLE away RENAME TO spool")
    other.close()
    await spool.probe()
    await spool.check()
    await spool.put(entry)
    await spool.close()


async def test_the_end_of_the_process_waits_for_calls_and_reports_those_it_cuts(own_world: OwnWorld) -> None:
    """`serving` gives running calls one second."""
    async with own_world() as world:
        long = await world.ask("[[tokens:900]] [[slow:10]]", stream=True)
        short = await world.ask("[[tokens:20]] [[slow:10]]", stream=True)
        await anext(long)
        await anext(short)

        async def read(stream: Any) -> None:
            with suppress(httpx2.HTTPError, openai.APIError):
                async for _ in stream:
                    pass

        reading = [asyncio.create_task(read(stream)) for stream in (long, short)]
        started = time.monotonic()
        await asyncio.to_thread(world.stop)
        assert time.monotonic() - started < 6
        await asyncio.gather(*reading)
        events = sorted(await world.events(), key=lambda event: event.data.output_tokens)
        assert [event.data.attributes["ended"] for event in events] == ["completed", "gateway_stopped"]
        assert events[0].data.output_tokens == 20
        assert 20 < events[1].data.output_tokens < 900
        assert events[1].data.attributes["estimated"] is True
        assert [type(command) for command in world.ledger.commands] == [ledger.PlaceHold] * 2


async def eventually_spooled(world: World, entries: int) -> None:
    async def spooled() -> bool:
        return await world.metric("scrip_gateway_spool_entries") == entries

    await eventually(spooled, seconds=10)
