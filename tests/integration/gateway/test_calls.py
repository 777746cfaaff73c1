"""Laws of a call that succeeds, seen through the unmodified openai library."""

import asyncio
import copy
from decimal import Decimal

import pytest

from contracts import ledger
from tests.integration.gateway.conftest import OwnWorld
from tests.integration.gateway.driving import MODEL, World

pytestmark = pytest.mark.anyio


async def test_a_call_is_answered_and_its_use_reported_under_its_hold(world: World) -> None:
    raw = await world.ask_raw("one two three [[tokens:7]]")
    answer = raw.parse()
    assert len(answer.choices[0].message.content.split()) == 7
    event = await world.event()
    (place,) = world.ledger.commands
    assert isinstance(place, ledger.PlaceHold)
    assert (event.source, event.subject, event.id) == ("gateway", world.account, raw.headers["x-scrip-request-id"])
    assert (event.data.input_tokens, event.data.output_tokens) == (answer.usage.prompt_tokens, 7)
    assert (event.data.hold, event.data.price_version, event.data.own_key) == (place.hold, "2024-07-18", False)
    attributes = event.data.attributes
    assert (attributes["endpoint"], attributes["status"], attributes["streamed"]) == (
        "/v1/chat/completions",
        200,
        False,
    )
    assert (attributes["ended"], attributes["key"]) == ("completed", f"key_{world.key.split('-')[2]}")
    assert "estimated" not in attributes
    assert answer._request_id == event.id


async def test_parameters_of_a_client_are_let_be_as_the_provider_does(world: World) -> None:
    # As Azure's clients and Codex say them.
    raw = await world.ask_raw("[[tokens:7]]", extra_query={"api-version": "2024-10-21"})
    assert raw.status_code == 200
    client = await world.client()
    listed = await client.models.list(extra_query={"client_version": "1.0"})
    assert MODEL in [model.id for model in listed.data]
    assert (await client.models.retrieve(MODEL, extra_query={"verbose": "1"})).id == MODEL


async def test_the_headers_say_what_it_cost_to_the_last_digit(world: World) -> None:
    raw = await world.ask_raw("[[tokens:7]]", max_tokens=10)
    # 4 input and 7 output tokens, 0.15 and 0.60 usd a million.
    assert raw.headers["x-scrip-cost"] == "0.0000048 usd"
    (place,) = world.ledger.commands
    assert isinstance(place, ledger.PlaceHold)
    assert raw.headers["x-scrip-held"] == f"{place.legs[0].at_most} usd"
    # Of 1 usd, once the call is charged.
    assert raw.headers["x-scrip-remaining"] == "0.9999952 usd"
    assert Decimal(place.legs[0].at_most) >= Decimal("0.0000048")


async def test_a_stream_is_relayed_without_the_usage_nobody_asked_for(world: World) -> None:
    chunks = [chunk async for chunk in await world.ask("[[tokens:7]]", stream=True)]
    assert len("".join(chunk.choices[0].delta.content or "" for chunk in chunks).split()) == 7
    assert all(chunk.usage is None for chunk in chunks)
    event = await world.event()
    assert (event.data.input_tokens, event.data.output_tokens) == (4, 7)
    assert "estimated" not in event.data.attributes


async def test_a_stream_keeps_the_usage_that_was_asked_for(world: World) -> None:
    stream = await world.ask("[[tokens:7]]", stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (4, 7)


async def test_a_stream_ends_with_its_cost_in_a_comment(world: World) -> None:
    response = await world.post(
        {"model": MODEL, "messages": [{"role": "user", "content": "[[tokens:7]]"}], "stream": True}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    held, remaining = (Decimal(response.headers[f"x-scrip-{name}"].split()[0]) for name in ("held", "remaining"))
    assert held + remaining == 1
    *_, comment, done, end = response.text.split("\n\n")
    assert (comment, done, end) == (": scrip cost=0.0000048 unit=usd", "data: [DONE]", "")


async def test_the_provider_counts_what_was_reported(world: World) -> None:
    for text, more in (
        ("a b c [[tokens:5]]", {}),
        ("[[tokens:9]] [[reasoning:4]]", {"stream": True}),
        ("[[tokens:20]]", {"n": 3}),
        ("[[tokens:3]] [[cached:2]]", {"stream": True, "n": 2}),
        ("[[tokens:30]]", {"max_tokens": 6}),
    ):
        answer = await world.ask(text, **more)
        if "stream" in more:
            async for _ in answer:
                pass
    events = await world.events()
    count = await world.provider_count()
    assert len(events) == count["calls"] == 5
    assert sum(event.data.input_tokens for event in events) == count["input_tokens"]
    assert sum(event.data.output_tokens for event in events) == count["output_tokens"]
    assert len({event.id for event in events}) == 5
    assert len({event.data.hold for event in events}) == 5


async def test_labels_come_with_the_use_and_bad_ones_are_refused(world: World) -> None:
    headers = {"X-Scrip-Conversation": "c-7", "X-Scrip-Feature": "chat", "X-Scrip-Attribute-Order-Id": "o 1"}
    await world.ask(extra_headers=headers)
    event = await world.event()
    assert event.data.feature == "chat"
    assert (event.data.attributes["conversation"], event.data.attributes["order_id"]) == ("c-7", "o 1")
    assert event.data.attributes["client_network"] == "127.0.0.0/24"
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
    for bad in ({"X-Scrip-Attribute-Status": "200"}, {"X-Scrip-Feature": "No Feature"}):
        response = await world.post(body, **bad)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_attribute")
    assert len(await world.events()) == 1


async def test_models_are_those_that_can_be_called(world: World) -> None:
    client = await world.client()
    listed = [model.id async for model in client.models.list()]
    assert listed == ["gpt-4o", "gpt-4o-mini"]
    assert (await client.models.retrieve("gpt-4o")).owned_by == "openai"


async def test_a_key_is_verified_once_in_a_while(world: World) -> None:
    for _ in range(3):
        await world.ask()
    assert world.keyvault.verified == 1


async def test_the_provider_hears_nothing_of_who_called(world: World) -> None:
    await world.ask(extra_headers={"X-Scrip-Conversation": "c-7", "OpenAI-Organization": "org-of-somebody-else"})
    (request,) = await world.provider_requests()
    assert request["client_request_id"] == (await world.event()).id


async def test_what_is_cached_and_who_calls_and_at_which_tier_has_its_own_price(own_world: OwnWorld) -> None:
    async with own_world() as world:
        first = copy.deepcopy(world.metering.book["versions"][0])
        rates = first["models"][0]["rates"]
        rates += [
            {"quantity": "cached_input_tokens", "unit": "usd", "price": "0.05", "per": 1_000_000},
            {"quantity": "reasoning_tokens", "unit": "usd", "price": "0.90", "per": 1_000_000},
            {"quantity": "input_tokens", "unit": "usd", "price": "0.30", "per": 1_000_000, "service_tier": "priority"},
        ]
        organisation = world.account.partition("/")[0]
        mine = {"account": organisation, "markup": [{"unit": "usd", "percent": "100"}]}
        changed = {"id": "v2", "effective_at": "2025-01-01T00:00:00Z", "accounts": [mine]}
        world.metering.book["versions"].append(first | changed)
        await asyncio.sleep(0.6)
        text = "a b c d e f [[cached:4]] [[tokens:10]] [[reasoning:6]]"
        response = await world.post(
            {"model": MODEL, "messages": [{"role": "user", "content": text}], "service_tier": "priority"}
        )
        assert response.status_code == 200, response.text
        used = (await world.event()).data
        assert used.counts is not None
        assert (used.counts.cached_input_tokens, used.counts.reasoning_tokens) == (4, 6)
        # Asked for, and not served: the provider says that it was the default tier.
        assert used.service_tier is None
        plain = (used.input_tokens - 4) * Decimal("0.15") + (used.output_tokens - 6) * Decimal("0.60")
        expected = 2 * (plain + 4 * Decimal("0.05") + 6 * Decimal("0.90")) / 1_000_000
        assert Decimal(response.headers["x-scrip-cost"].split()[0]) == expected
        assert Decimal(response.headers["x-scrip-held"].split()[0]) > expected
