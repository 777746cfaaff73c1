"""Laws of calls that go wrong: nothing is held for nothing, and what was produced is reported."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import openai
import pytest

from contracts.envelope import UsageEvent
from infra.servers import free_port
from tests.eventually import eventually
from tests.integration.gateway.conftest import OwnWorld
from tests.integration.gateway.driving import MODEL, World
from tests.integration.gateway.stand_ins import PLATFORM_SECRET

pytestmark = pytest.mark.anyio


async def read(stream: Any) -> tuple[int, openai.APIError | None]:
    """How many pieces of text a stream gives, and the error it ends with."""
    pieces = 0
    try:
        async for chunk in stream:
            pieces += bool(chunk.choices and chunk.choices[0].delta.content)
    except openai.APIError as error:
        return pieces, error
    return pieces, None


def tokens(event: UsageEvent) -> tuple[int, int, bool]:
    return event.data.input_tokens, event.data.output_tokens, bool(event.data.attributes.get("estimated"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("directive", "status", "code"),
    [
        ("[[fail:500]]", 502, "provider_failed"),
        ("[[fail:503]]", 502, "provider_failed"),
        ("[[fail:401]]", 502, "provider_key_rejected"),
        ("[[fail:403]]", 502, "provider_key_rejected"),
        ("[[fail:429]]", 429, "rate_limit_exceeded"),
        ("[[fail:400]]", 400, "provider_refused"),
        ("[[nonsense]]", 400, "directive"),
    ],
)
async def test_a_provider_that_refuses_costs_nothing(
    world: World, directive: str, status: int, code: str, stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as failed:
        await world.ask(directive, stream=stream)
    assert (failed.value.status_code, failed.value.code) == (status, code)
    assert world.ledger.holds == {}
    assert len(world.ledger.released) == 1
    assert await world.events() == []
    if status == 429:
        assert failed.value.response.headers["retry-after-ms"] == "20"


async def test_a_provider_that_is_not_there_costs_nothing(own_world: OwnWorld) -> None:
    nowhere = {"openai": {"base_url": f"http://127.0.0.1:{free_port()}/v1"}}
    async with own_world(providers=nowhere) as world:
        with pytest.raises(openai.InternalServerError) as failed:
            await world.ask()
        assert (failed.value.status_code, failed.value.code) == (502, "provider_unreachable")
        assert (world.ledger.holds, len(world.ledger.released)) == ({}, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_does_not_begin_in_time_costs_nothing(own_world: OwnWorld, stream: bool) -> None:
    async with own_world(first_byte_seconds=0.3, call_seconds=0.6) as world:
        with pytest.raises(openai.InternalServerError) as failed:
            await world.ask("[[stall:3]]", stream=stream)
        assert (failed.value.status_code, failed.value.code) == (502, "provider_timeout")
        assert (world.ledger.holds, len(world.ledger.released)) == ({}, 1)


async def test_usage_that_a_provider_omits_is_counted_and_flagged(world: World) -> None:
    await world.ask("[[tokens:12]] [[omit-usage]]")
    await read(await world.ask("[[tokens:12]] [[omit-usage]]", stream=True))
    whole, streamed = await world.events()
    assert tokens(streamed)[1:] == (12, True)
    assert whole.data.attributes["estimated"] is True
    # A text in one piece is a token for every 4 bytes.
    assert 12 <= whole.data.output_tokens <= 24
    assert tokens(whole)[0] == tokens(streamed)[0] > 0


async def test_a_stream_that_is_cut_is_charged_as_far_as_it_came(world: World) -> None:
    pieces, error = await read(await world.ask("[[tokens:20]] [[cut:8]]", stream=True))
    assert pieces == 8
    assert error is not None
    assert error.code == "provider_failed"
    event = await world.event()
    assert tokens(event)[1:] == (8, True)
    assert event.data.attributes["ended"] == "provider_broke_off"
    assert world.ledger.released == []
    assert (await world.provider_count())["output_tokens"] == 8


async def test_an_error_in_a_stream_is_passed_on_and_what_came_before_charged(world: World) -> None:
    pieces, error = await read(await world.ask("[[tokens:20]] [[error-after:5]]", stream=True))
    assert pieces == 5
    assert error is not None
    assert "had an error while processing" in error.message
    assert tokens(await world.event())[1:] == (5, True)


async def test_a_stream_that_stops_coming_is_ended(own_world: OwnWorld) -> None:
    async with own_world(between_seconds=0.3) as world:
        pieces, error = await read(await world.ask("[[tokens:9]] [[stall-after:4:5]]", stream=True))
        assert pieces == 4
        assert error is not None
        assert tokens(await world.event())[1:] == (4, True)


async def test_an_answer_that_is_cut_is_charged_and_not_to_be_asked_for_again(world: World) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        await world.ask("[[tokens:40]] [[cut:20]]")
    assert failed.value.status_code == 502
    assert failed.value.response.headers["x-should-retry"] == "false"
    event = await world.event()
    assert event.data.attributes["estimated"] is True
    assert event.data.input_tokens > 0
    assert world.ledger.released == []


async def test_an_answer_that_is_not_json_is_charged_and_said(world: World) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        await world.ask("[[tokens:40]] [[bad-json]]")
    assert failed.value.status_code == 502
    assert len(await world.events()) == 1


async def test_a_client_that_leaves_pays_for_what_the_provider_goes_on_to_produce(world: World) -> None:
    stream = await world.ask("[[tokens:60]] [[slow:5]]", stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()

    async def reported() -> bool:
        return len(await world.events()) == 1

    await eventually(reported)
    event = await world.event()
    assert tokens(event) == ((await world.provider_count())["input_tokens"], 60, False)
    assert event.data.attributes["ended"] == "client_left"
    assert (await world.provider_count())["output_tokens"] == 60


async def test_where_leaving_stops_the_provider_the_gateway_leaves_too(own_world: OwnWorld) -> None:
    async with own_world(on_disconnect="abort") as world:
        stream = await world.ask("[[tokens:500]] [[slow:10]] [[on-disconnect:abort]]", stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()

        async def reported() -> bool:
            return len(await world.events()) == 1

        await eventually(reported, seconds=3)
        event = await world.event()
        assert event.data.attributes["ended"] == "client_left"
        assert event.data.attributes["estimated"] is True
        (request,) = await world.provider_requests()
        assert request["outcome"] == "aborted"
        assert 1 <= event.data.output_tokens <= request["output_tokens"] < 100


async def leave(asking: Coroutine[Any, Any, Any], *, once: Callable[[], bool | Awaitable[bool]]) -> None:
    """Ask, and hang up once the call has come so far."""
    task = asyncio.create_task(asking)
    await eventually(once)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_client_that_leaves_an_answer_in_one_piece_pays_for_it(world: World) -> None:
    async def forwarded() -> bool:
        return len(await world.provider_requests()) == 1

    await leave(world.ask("[[tokens:10]] [[stall:1.5]]"), once=forwarded)

    async def reported() -> bool:
        return len(await world.events()) == 1

    await eventually(reported)
    assert tokens(await world.event())[1:] == (10, False)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_its_call_is_forwarded_pays_nothing(world: World, stream: bool) -> None:
    world.ledger.delay_seconds = 1.0
    await leave(world.ask(stream=stream), once=lambda: bool(world.ledger.commands))
    await eventually(lambda: len(world.ledger.released) == 1)
    assert await world.provider_requests() == []
    assert await world.events() == []


async def test_the_provider_secret_is_in_no_error_and_no_log(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    said = []
    for directive in ("[[fail:401]]", "[[fail:500]]", "[[cut:1]]", "[[nonsense]]"):
        with pytest.raises(openai.APIStatusError) as failed:
            await world.ask(directive)
        said.append(str(failed.value.body))
    world.keyvault.platform = "sk-not-accepted-0123456789CANARY9876"
    with pytest.raises(openai.APIStatusError) as failed:
        await world.ask()
    said.append(str(failed.value.body))
    logged = capfd.readouterr()
    spool = b"".join(path.read_bytes() for path in world.settings.spool_file.parent.glob("spool.db*"))
    for text in (*said, logged.out, logged.err, (await world.get("/metrics")).text, spool.decode("latin-1")):
        assert "CANARY" not in text
        assert PLATFORM_SECRET[:12] not in text
        assert world.key not in text


async def test_a_request_is_forwarded_as_it_was_read(world: World) -> None:
    """A name given twice must not mean one thing here and another at the provider."""
    body = b'{"model": "unpriced", "model": "' + MODEL.encode() + b'", "messages": [{"role": "user", "content": "a"}]}'
    assert (await world.post(body)).status_code == 200
    (request,) = await world.provider_requests()
    assert request["model"] == MODEL


async def test_many_calls_at_once_each_settle_once(world: World) -> None:
    async def one(number: int) -> None:
        directive = ("", "[[omit-usage]]", "[[cut:3]]", "[[fail:500]]")[number % 4]
        try:
            answer = await world.ask(f"{number} [[tokens:6]] {directive}", stream=number % 2 == 0)
            if number % 2 == 0:
                await read(answer)
        except openai.APIStatusError:
            pass

    await asyncio.gather(*(one(number) for number in range(40)))
    events = await world.events()
    named = {event.data.hold for event in events} | set(world.ledger.released)
    assert len(events) + len(world.ledger.released) == 40
    assert len(named) == 40

    async def nothing_runs() -> bool:
        text = (await world.get("/metrics")).text
        held = [line for line in text.splitlines() if line.startswith("scrip_gateway_held{")]
        return "scrip_gateway_running_calls 0.0" in text and all(abs(float(line.split()[-1])) < 1e-9 for line in held)

    await eventually(nothing_runs)
