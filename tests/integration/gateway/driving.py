"""What tests do to the gateway: run it between its neighbours, call it as a client, look at what it reported."""

import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx2
from nats.aio.client import Client
from openai import AsyncOpenAI
from pydantic import SecretStr

from contracts.accounts import root
from contracts.envelope import UsageEvent, read_usage_event
from contracts.streams import USAGE
from infra.simulators.provider.app import Settings as ProviderSettings
from infra.simulators.provider.app import build_app as build_provider
from services.gateway.app import build
from services.gateway.settings import GatewaySettings
from tests.conftest import CATALOGUE_FILE, NatsAccount
from tests.integration.gateway.stand_ins import METERING_TOKEN, Keyvault, Ledger, Metering, answering
from tests.integration.simulators.serving import serving

MODEL: Final = "gpt-4o-mini"

Json = dict[str, Any]

# An organisation for each test: what one did is not seen by the next.
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that runs, its provider, and metering's stand-in."""

    url: str
    provider_url: str
    metering: Metering
    settings: GatewaySettings
    stop: Callable[[], None]


@dataclass
class World:
    """A gateway, everything around it, and an account with a key for one test."""

    url: str
    provider_url: str
    metering: Metering
    settings: GatewaySettings
    operator: Client
    keyvault: Keyvault
    ledger: Ledger
    opened: AsyncExitStack
    stop: Callable[[], None]
    account: str
    key: str
    clients: dict[str, AsyncOpenAI] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return root(self.account)

    async def client(self, key: str | None = None) -> AsyncOpenAI:
        """The unmodified client of a key; it does not try again by itself."""
        chosen = self.key if key is None else key
        if chosen not in self.clients:
            made = AsyncOpenAI(api_key=chosen, base_url=f"{self.url}/v1", max_retries=0, timeout=30)
            self.clients[chosen] = await self.opened.enter_async_context(made)
        return self.clients[chosen]

    async def ask(self, text: str = "hello [[tokens:7]]", *, key: str | None = None, **more: Any) -> Any:
        """One call."""
        client = await self.client(key)
        arguments = {"model": MODEL, "messages": [{"role": "user", "content": text}]} | more
        return await client.chat.completions.create(**arguments)

    async def ask_raw(self, text: str = "hello [[tokens:7]]", *, key: str | None = None, **more: Any) -> Any:
        """One call, with the answer's headers."""
        client = await self.client(key)
        arguments = {"model": MODEL, "messages": [{"role": "user", "content": text}]} | more
        return await client.chat.completions.with_raw_response.create(**arguments)

    async def post(self, body: Json | bytes, **headers: str) -> httpx2.Response:
        """A request that no client would send."""
        content = body if isinstance(body, bytes) else None
        async with httpx2.AsyncClient(base_url=self.url, timeout=30) as client:
            return await client.post(
                "/v1/chat/completions",
                content=content,
                json=None if content is not None else body,
                headers={"Authorization": f"Bearer {self.key}"} | headers,
            )

    async def get(self, path: str) -> httpx2.Response:
        """What an address of the gateway answers."""
        async with httpx2.AsyncClient(base_url=self.url, timeout=30) as client:
            return await client.get(path)

    async def metric(self, name: str) -> float:
        """A metric of this process, of which there is one gateway at a time."""
        for line in (await self.get("/metrics")).text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    async def events(self) -> list[UsageEvent]:
        """The usage events in the stream."""
        jetstream = self.operator.jetstream()
        state = (await jetstream.stream_info(USAGE)).state
        found = []
        for sequence in range(max(1, state.first_seq), state.last_seq + 1):
            message = await jetstream.get_msg(USAGE, sequence)
            assert message.data is not None
            event, _ = read_usage_event(message.data)
            assert isinstance(event, UsageEvent)
            found.append(event)
        return found

    async def event(self) -> UsageEvent:
        """The one usage event."""
        (found,) = await self.events()
        return found

    async def provider_count(self) -> Json:
        """What the provider counted, and would bill."""
        async with httpx2.AsyncClient(base_url=self.provider_url) as client:
            found: Json = (await client.get("/__sim/usage")).json()["totals"]
            return found

    async def provider_requests(self) -> list[Json]:
        """The requests that the provider met."""
        async with httpx2.AsyncClient(base_url=self.provider_url) as client:
            found: list[Json] = (await client.get("/__sim/requests")).json()["requests"]
            return found


@contextmanager
def running(
    nats: NatsAccount, directory: Path, *, tokens_file: Path, on_disconnect: str = "drain", **settings: Any
) -> Iterator[Running]:
    """A gateway that runs, with the simulated provider, on real sockets. The rest comes with `world_of`."""
    with ExitStack() as opened:
        provider_url = opened.enter_context(serving(build_provider(ProviderSettings(token_seconds=0.001))))
        metering = Metering()
        metering_url = opened.enter_context(serving(metering.app()))
        chosen = GatewaySettings(
            nats_url=nats.url,
            nats_user=nats.user("gateway"),
            nats_password=SecretStr(nats.password("gateway")),
            http_port=0,
            tokens_file=tokens_file,
            catalogue_file=CATALOGUE_FILE,
            metering_url=metering_url,
            metering_token=SecretStr(METERING_TOKEN),
            spool_file=directory / "spool.db",
            **{
                "providers": {"openai": {"base_url": f"{provider_url}/v1", "on_disconnect": on_disconnect}},
                "price_refresh_seconds": 0.2,
                "ask_seconds": 1.0,
                "publish_seconds": 0.5,
                **settings,
            },
        )
        served = opened.enter_context(ExitStack())
        url = served.enter_context(serving(build(chosen)))
        deadline = time.monotonic() + 5
        while (answer := httpx2.get(f"{url}/readyz")).status_code != 200:
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.02)
        yield Running(url=url, provider_url=provider_url, metering=metering, settings=chosen, stop=served.close)


@asynccontextmanager
async def world_of(gateway: Running, nats: NatsAccount, *, ledger: bool = True) -> AsyncIterator[World]:
    """Everything around a gateway that runs. Without `ledger` nobody answers for it: a real one may."""
    organisation = f"acme{next(_numbers)}"
    httpx2.post(f"{gateway.provider_url}/__sim/reset")
    async with AsyncExitStack() as opened:
        clients = []
        for user in ("keyvault", "ledger", "operator"):
            clients.append(await nats.connect(user))
            opened.push_async_callback(clients[-1].close)
        keyvault, stand_in = Keyvault(), Ledger(organisation)
        await answering(clients[0], "rpc.keyvault.v1.*.*", keyvault)
        if ledger:
            await answering(clients[1], "rpc.ledger.v1.*.*.*", stand_in)
        account = f"{organisation}/ana/key_1"
        yield World(
            url=gateway.url,
            provider_url=gateway.provider_url,
            metering=gateway.metering,
            settings=gateway.settings,
            operator=clients[2],
            keyvault=keyvault,
            ledger=stand_in,
            opened=opened,
            stop=gateway.stop,
            account=account,
            key=keyvault.make_key(account),
        )
