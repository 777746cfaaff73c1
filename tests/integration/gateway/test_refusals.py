"""Laws of calls that are not served: each says why, in OpenAI's shape, and none reaches the provider."""

import asyncio
import time
from datetime import UTC, datetime

import openai
import pytest

from contracts import keyvault, ledger
from tests.eventually import eventually
from tests.integration.gateway.conftest import OwnWorld
from tests.integration.gateway.driving import MODEL, World
from tests.integration.gateway.stand_ins import OWN_SECRET

pytestmark = pytest.mark.anyio

ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}


async def nothing_was_forwarded(world: World) -> None:
    assert await world.provider_requests() == []
    assert await world.events() == []
    assert world.ledger.holds == {}


async def test_without_a_known_key_nobody_is_served(world: World) -> None:
    for key in ("sk-somebody-elses", f"sk-scrip-{'b' * 8}-{'b' * 43}", "x"):
        with pytest.raises(openai.AuthenticationError) as refused:
            await world.ask(key=key)
        assert refused.value.code == "invalid_api_key"
    response = await world.post(ASKED, Authorization="")
    assert (response.status_code, response.json()["error"]["code"]) == (401, "key_missing")
    assert response.headers["x-scrip-request-id"].startswith("req_")
    await nothing_was_forwarded(world)


async def test_a_key_that_is_no_longer_valid_says_so(world: World) -> None:
    disabled = world.keyvault.make_key(world.account)
    world.keyvault.refusals[keyvault.key_hash(disabled)] = keyvault.KeyRefused(
        code="key_disabled", message="the access key key_b is disabled"
    )
    expired = world.keyvault.make_key(world.account, expires_at=datetime(2025, 1, 1, tzinfo=UTC))
    for key, code in ((disabled, "key_disabled"), (expired, "key_expired")):
        with pytest.raises(openai.AuthenticationError) as refused:
            await world.ask(key=key)
        assert refused.value.code == code
    await nothing_was_forwarded(world)


async def test_a_call_that_is_not_covered_says_what_would_be(world: World) -> None:
    world.ledger.balance["usd"] = 50_000
    with pytest.raises(openai.APIStatusError) as refused:
        await world.ask("a", max_tokens=1000)
    error = refused.value
    assert (error.status_code, error.code) == (402, "insufficient_quota")
    assert isinstance(error.body, dict)
    assert error.body["limit_source"] == world.root
    assert error.body["remaining"] == {"amount": "0.00005", "unit": "usd"}
    assert error.body["required"]["unit"] == "usd"
    affordable = error.body["affordable_max_tokens"]
    assert affordable > 0
    await nothing_was_forwarded(world)
    await world.ask("a", max_tokens=affordable)
    world.ledger.holds.clear()
    with pytest.raises(openai.APIStatusError):
        await world.ask("a", max_tokens=affordable + 1)


async def test_nothing_left_affords_nothing(world: World) -> None:
    world.ledger.balance["usd"] = 0
    with pytest.raises(openai.APIStatusError) as refused:
        await world.ask()
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["affordable_max_tokens"] == 0


async def test_a_model_without_a_price_is_refused_and_never_free(world: World) -> None:
    for model, code in (("gpt-5-unheard-of", "model_not_priced"), ("far-away", "provider_not_configured")):
        with pytest.raises(openai.NotFoundError) as refused:
            await world.ask(model=model)
        assert refused.value.code == code
    await nothing_was_forwarded(world)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        ({"messages": []}, "missing_model"),
        (ASKED | {"messages": "hello"}, "invalid_value"),
        (ASKED | {"n": 0}, "invalid_value"),
        (ASKED | {"n": 1000}, "invalid_value"),
        (ASKED | {"max_tokens": 10**12}, "invalid_value"),
        (ASKED | {"stream": "yes"}, "invalid_value"),
        (ASKED | {"stream_options": {"include_usage": True}}, "invalid_value"),
        (ASKED | {"service_tier": "priority"}, "invalid_value"),
        (ASKED | {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, "unsupported_content"),
    ],
)
async def test_what_cannot_be_quoted_is_refused(world: World, body: dict[str, object] | bytes, code: str) -> None:
    response = await world.post(body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    await nothing_was_forwarded(world)


async def test_a_body_has_a_limit(own_world: OwnWorld) -> None:
    async with own_world(body_bytes_max=1000) as world:
        response = await world.post(b" " * 2000)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


async def test_what_is_not_metered_is_not_passed_through(world: World) -> None:
    for path in ("/v1/embeddings", "/v1/responses", "/v1/chat/completions/x"):
        response = await world.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
    await nothing_was_forwarded(world)


async def test_an_account_that_is_not_open_is_refused(world: World) -> None:
    world.ledger.refusal = ledger.Refused(code="account_not_open", message="not open")
    with pytest.raises(openai.PermissionDeniedError) as refused:
        await world.ask()
    assert refused.value.code == "account_not_open"
    await nothing_was_forwarded(world)


async def test_while_the_ledger_is_away_nothing_is_allowed(world: World) -> None:
    world.ledger.silent = True
    started = time.monotonic()
    with pytest.raises(openai.InternalServerError) as refused:
        await world.ask()
    assert (refused.value.status_code, refused.value.code) == (503, "unavailable")
    assert refused.value.response.headers["retry-after"] == "1"
    assert time.monotonic() - started < 3
    await nothing_was_forwarded(world)


async def test_a_hold_whose_reply_was_lost_is_released(world: World) -> None:
    world.ledger.forget_reply_after_place = True
    with pytest.raises(openai.InternalServerError):
        await world.ask()
    await eventually(lambda: len(world.ledger.released) == 1)
    assert world.ledger.holds == {}
    assert await world.provider_requests() == []


async def test_a_busy_ledger_is_asked_again_under_the_same_key(world: World) -> None:
    world.ledger.busy = 2
    await world.ask()
    (place,) = world.ledger.commands
    assert isinstance(place, ledger.PlaceHold)
    assert (await world.event()).data.hold == place.hold


async def test_while_keyvault_is_away_nothing_is_allowed(world: World) -> None:
    world.keyvault.silent = True
    with pytest.raises(openai.InternalServerError) as refused:
        await world.ask()
    assert refused.value.status_code == 503
    await nothing_was_forwarded(world)


async def test_without_a_secret_the_hold_is_given_back(world: World) -> None:
    world.keyvault.platform = None
    with pytest.raises(openai.InternalServerError) as refused:
        await world.ask()
    assert (refused.value.status_code, refused.value.code) == (503, "no_platform_secret")
    assert len(world.ledger.released) == 1
    await nothing_was_forwarded(world)


@pytest.mark.parametrize(
    ("policy", "consent", "has_own", "code"),
    [
        ("own", False, False, "no_own_secret"),
        ("own_then_credits", False, False, "consent_missing"),
        ("own_then_credits", True, False, None),
        ("own_then_credits", False, True, None),
        ("own", False, True, None),
        ("credits", False, True, None),
    ],
)
async def test_an_own_key_falls_back_to_credits_by_consent_only(
    world: World, policy: keyvault.KeyPolicy, consent: bool, has_own: bool, code: str | None
) -> None:
    own = {"openai": OWN_SECRET} if has_own else None
    key = world.keyvault.make_key(world.account, policy=policy, consent=consent, own=own)
    if code is not None:
        with pytest.raises(openai.PermissionDeniedError) as refused:
            await world.ask(key=key)
        assert refused.value.code == code
        await nothing_was_forwarded(world)
        return
    await world.ask(key=key)
    uses_own = has_own and policy != "credits"
    assert [lease.own for lease in world.keyvault.leased] == [uses_own]
    assert (await world.event()).data.own_key == uses_own


async def test_an_own_key_is_held_only_in_units_that_count_it(world: World) -> None:
    key = world.keyvault.make_key(world.account, policy="own", own={"openai": OWN_SECRET})
    world.ledger.balance = {"usd": 0, "calls": 1}
    raw = await world.ask_raw(key=key, model="gpt-4o")
    (place,) = world.ledger.commands
    assert isinstance(place, ledger.PlaceHold)
    assert [(leg.unit, leg.at_most) for leg in place.legs] == [("calls", "1")]
    assert raw.headers["x-scrip-cost"] == "1 calls"
    # gpt-4o-mini is priced in usd alone: nothing to hold, and the use is reported all the same.
    raw = await world.ask_raw(key=key)
    assert "x-scrip-held" not in raw.headers
    assert [event.data.hold is None for event in await world.events()] == [False, True]


async def test_the_last_price_book_holds_while_metering_is_away_or_not_understood(own_world: OwnWorld) -> None:
    async with own_world() as world:
        world.metering.away = True
        await asyncio.sleep(0.5)
        await world.ask()
        assert (await world.get("/readyz")).status_code == 200
        world.metering.book["versions"][0]["models"][0]["rates"][0]["unit"] = "doubloons"
        world.metering.away = False
        await asyncio.sleep(0.5)
        await world.ask()


async def test_a_call_is_pinned_to_the_price_version_of_its_time(own_world: OwnWorld) -> None:
    async with own_world() as world:
        first = world.metering.book["versions"][0]
        world.metering.book["versions"] += [
            first | {"id": "dearer", "effective_at": "2025-01-01T00:00:00Z"},
            first | {"id": "not-yet", "effective_at": "2199-01-01T00:00:00Z"},
        ]
        await asyncio.sleep(0.6)
        await world.ask()
        assert (await world.event()).data.price_version == "dearer"
