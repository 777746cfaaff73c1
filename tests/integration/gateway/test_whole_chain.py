"""Laws of the whole path, every service of it real: what the provider counted is charged, once, and no more held."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from infra.simulators.provider.app import Settings as ProviderSettings
from infra.simulators.provider.app import build_app as build_provider
from services.gateway.app import build as build_gateway
from services.gateway.settings import GatewaySettings
from services.keyvault.app import build as build_keyvault
from services.keyvault.settings import KeyvaultSettings
from services.keyvault.store import make_keyring_file
from services.kit.settings import ServiceSettings
from services.ledger.app import build as build_ledger
from services.ledger.settings import LedgerSettings
from services.metering.app import build as build_metering
from services.metering.settings import MeteringSettings
from tests.integration.simulators.serving import serving

pytestmark = pytest.mark.anyio

MODEL: Final = "gpt-4o-mini"
HOLDER: Final = "acme/ana"
PLATFORM_SECRET: Final = "sk-sim-platform-0123456789abcdef"
OWN_SECRET: Final = "sk-sim-own-0123456789abcdef"
SCOPES: Final[Mapping[str, tuple[str, ...]]] = {
    "operator": ("keyvault:read", "keyvault:write", "ledger:read", "ledger:write", "metering:read", "operate"),
    "gateway": ("metering:read",),
}

Json = dict[str, Any]


@pytest.fixture
def tokens() -> Mapping[str, str]:
    return {principal: f"token-of-{principal}" for principal in SCOPES}


@pytest.fixture
def tokens_file(tmp_path: Path, tokens: Mapping[str, str]) -> Path:
    entries = [
        {"principal": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), "scopes": list(SCOPES[name])}
        for name, token in tokens.items()
    ]
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(entries))
    return path


@dataclass(frozen=True, slots=True)
class Chain:
    """Where everything is."""

    gateway: str
    ledger: httpx2.AsyncClient
    keyvault: httpx2.AsyncClient
    provider: httpx2.AsyncClient
    opened: AsyncExitStack

    async def new_key(self, account: str = HOLDER) -> Json:
        """An access key, with the starting grant of its holder."""
        made = await self.keyvault.post("/v1/access-keys", json={"account": account, "name": "tests"})
        assert made.status_code == 201, made.text
        found: Json = made.json()
        return found

    async def client(self, key: str) -> AsyncOpenAI:
        """The unmodified client."""
        made = AsyncOpenAI(api_key=key, base_url=f"{self.gateway}/v1", max_retries=0)
        return await self.opened.enter_async_context(made)

    async def usd(self, account: str = HOLDER) -> tuple[Decimal, Decimal]:
        """Posted and held."""
        wallets = (await self.ledger.get(f"/v1/balances/{account}")).json()["wallets"]
        (wallet,) = (each for each in wallets if each["unit"] == "usd")
        return Decimal(wallet["posted"]), Decimal(wallet["held"])

    async def settled(self, posted: Decimal) -> None:
        """Wait until nothing is held, and exactly so much is left."""
        deadline = time.monotonic() + 10
        while (found := await self.usd()) != (posted, Decimal(0)):
            assert time.monotonic() < deadline, f"{found}, not {posted} and nothing held"
            await asyncio.sleep(0.05)


@pytest.fixture
async def chain(
    service_settings: Callable[[str], ServiceSettings], tmp_path: Path, tokens: Mapping[str, str]
) -> AsyncIterator[Chain]:
    make_keyring_file(tmp_path / "keyring.json")
    with ExitStack() as served:
        provider_url = served.enter_context(serving(build_provider(ProviderSettings(token_seconds=0.001))))
        ledger_url = served.enter_context(
            serving(build_ledger(LedgerSettings(**service_settings("ledger").model_dump())))
        )
        metering_url = served.enter_context(
            serving(build_metering(MeteringSettings(**service_settings("metering").model_dump())))
        )
        keyvault_url = served.enter_context(
            serving(
                build_keyvault(
                    KeyvaultSettings(
                        **service_settings("keyvault").model_dump(), keyring_file=tmp_path / "keyring.json"
                    )
                )
            )
        )
        gateway_url = served.enter_context(
            serving(
                build_gateway(
                    GatewaySettings(
                        **service_settings("gateway").model_dump()
                        | {
                            "metering_url": metering_url,
                            "metering_token": tokens["gateway"],
                            "spool_file": tmp_path / "spool.db",
                            "providers": {"openai": {"base_url": f"{provider_url}/v1"}},
                            "price_refresh_seconds": 0.2,
                        }
                    )
                )
            )
        )
        async with AsyncExitStack() as opened:
            ledger, keyvault, provider, gateway = [
                await opened.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=20))
                for url in (ledger_url, keyvault_url, provider_url, gateway_url)
            ]
            for each in (ledger, keyvault):
                each.headers["Authorization"] = f"Bearer {tokens['operator']}"
            for each in (ledger, keyvault, gateway):
                for _ in range(100):
                    if (await each.get("/readyz")).status_code == 200:
                        break
                    await asyncio.sleep(0.05)
            stored = await keyvault.put("/v1/platform-secrets/openai", json={"secret": PLATFORM_SECRET})
            assert stored.is_success, stored.text
            yield Chain(gateway_url, ledger, keyvault, provider, opened)


def ask(client: AsyncOpenAI, text: str, **more: Any) -> Any:
    return client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": text}], **more
    )


async def test_what_the_provider_counts_is_what_is_charged(chain: Chain) -> None:
    client = await chain.client((await chain.new_key())["key"])
    costs = []
    for text in ("[[tokens:5]]", "a b c [[tokens:40]]", "[[tokens:9]] [[reasoning:30]]"):
        raw = await ask(client, text)
        amount, unit = raw.headers["x-scrip-cost"].split(",")[0].split()
        assert unit == "usd"
        costs.append(Decimal(amount))
        left = Decimal(raw.headers["x-scrip-remaining"].split()[0])
        await chain.settled(left)
    assert left == 1 - sum(costs)

    async def streamed(number: int) -> None:
        raw = await ask(client, f"{number} [[tokens:{number}]]", stream=True)
        async for _ in raw.parse():
            pass

    await asyncio.gather(*(streamed(number) for number in range(1, 21)))
    with pytest.raises(openai.APIStatusError):
        await ask(client, "[[fail:500]]")
    count = (await chain.provider.get("/__sim/usage")).json()["totals"]
    assert count["calls"] == 23
    charged = count["input_tokens"] * Decimal("0.15") + count["output_tokens"] * Decimal("0.60")
    await chain.settled(1 - charged / 1_000_000)


async def test_an_own_key_is_used_and_costs_no_credits(chain: Chain) -> None:
    made = await chain.new_key()
    client = await chain.client(made["key"])
    await ask(client, "[[tokens:5]]")
    stored = await chain.keyvault.put(f"/v1/secrets/openai/{HOLDER}", json={"secret": OWN_SECRET})
    assert stored.is_success, stored.text
    chosen = await chain.keyvault.put(f"/v1/policies/{HOLDER}", json={"policy": "own"})
    assert chosen.is_success, chosen.text
    paid = (1_000_000 - 4 * Decimal("0.15") - 5 * Decimal("0.60")) / 1_000_000
    await chain.settled(paid)

    async def own_calls() -> int:
        rows = (await chain.provider.get("/__sim/usage")).json()["by_key_and_model"]
        own = hashlib.sha256(OWN_SECRET.encode()).hexdigest()
        return sum(row["calls"] for row in rows if row["key"] == own)

    try:
        raw = await ask(client, "[[tokens:5]]")
    except openai.InternalServerError:
        # It had not heard of the change, until keyvault refused the lease.
        raw = await ask(client, "[[tokens:5]]")
    assert "usd" not in raw.headers.get("x-scrip-cost", "")
    assert await own_calls() == 1
    await chain.settled(paid)


async def test_a_key_that_is_disabled_is_refused_within_moments(chain: Chain) -> None:
    made = await chain.new_key()
    client = await chain.client(made["key"])
    await ask(client, "[[tokens:5]]")
    disabled = await chain.keyvault.post(f"/v1/access-keys/{made['key_id']}/disable", json={"reason": "leaked"})
    assert disabled.is_success, disabled.text
    # At once: whoever remembers the key gets no secret for it.
    with pytest.raises(openai.AuthenticationError) as refused:
        await ask(client, "[[tokens:5]]")
    assert refused.value.code == "key_disabled"
    await chain.settled((1_000_000 - 4 * Decimal("0.15") - 5 * Decimal("0.60")) / 1_000_000)


async def test_a_disabled_key_is_forgotten_long_before_it_would_be_asked_about_again(chain: Chain) -> None:
    """A lease is refused in any case; that the first call does not even get a hold shows that the gateway has heard."""
    made = await chain.new_key()
    client = await chain.client(made["key"])
    await ask(client, "[[tokens:5]]")
    await chain.settled((1_000_000 - 4 * Decimal("0.15") - 5 * Decimal("0.60")) / 1_000_000)

    async def entries() -> int:
        return len((await chain.ledger.get(f"/v1/statements/{HOLDER}")).json()["entries"])

    disabled = await chain.keyvault.post(f"/v1/access-keys/{made['key_id']}/disable", json={"reason": "leaked"})
    assert disabled.is_success, disabled.text
    before = await entries()
    await asyncio.sleep(0.5)
    with pytest.raises(openai.AuthenticationError) as refused:
        await ask(client, "[[tokens:5]]")
    assert refused.value.code == "key_disabled"
    assert await entries() == before


async def test_out_of_credits_says_what_would_fit(chain: Chain) -> None:
    client = await chain.client((await chain.new_key())["key"])
    with pytest.raises(openai.APIStatusError) as refused:
        await ask(client, "a", max_tokens=5_000_000)
    assert refused.value.status_code == 402
    body = refused.value.body
    assert isinstance(body, dict)
    assert body["limit_source"] == HOLDER
    assert body["remaining"] == {"amount": "1", "unit": "usd"}
    raw = await ask(client, "a [[tokens:2]]", max_tokens=body["affordable_max_tokens"] - 100)
    assert raw.status_code == 200
