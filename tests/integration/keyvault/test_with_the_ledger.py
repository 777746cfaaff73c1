"""Keyvault and the ledger itself: creating a key opens real accounts, with the starting grant and the caps."""

import asyncio
from collections.abc import Callable

import httpx2
import pytest

from contracts.keyvault import Verified
from services.kit.settings import ServiceSettings
from services.ledger.app import build
from services.ledger.settings import LedgerSettings
from tests.integration.keyvault.driving import Driver

pytestmark = pytest.mark.anyio


async def test_creating_keys_opens_their_accounts_and_grants_once(
    driver: Driver, service_settings: Callable[[str], ServiceSettings]
) -> None:
    settings = service_settings("ledger").model_dump() | {"catalogue_file": driver.settings.catalogue_file}
    app = build(LedgerSettings(**settings))
    headers = {"Authorization": f"Bearer {driver.tokens['operator']}"}
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=app), base_url="http://ledger", headers=headers
        ) as ledger,
        driver.running() as keyvault,
    ):
        caps = [{"unit": "tokens", "amount": "100000"}]
        first = await keyvault.create_key("acme/ana", caps=caps, key="request-1")
        await keyvault.create_key("acme/ana", caps=caps, key="request-1", expect=409)
        others = await asyncio.gather(*(keyvault.create_key("acme/ana") for _ in range(4)))

        async def available(account: str) -> dict[str, str]:
            found = (await ledger.get(f"/v1/balances/{account}")).json()
            return {wallet["unit"]: wallet["available"] for wallet in found["wallets"]}

        assert await available("acme/ana") == {"usd": "1"}
        assert await available(first["account"]) == {"tokens": "100000"}
        for other in others:
            assert await available(other["account"]) == {}
            assert isinstance(await driver.verify(other["key"]), Verified)
        listed = (await ledger.get("/v1/accounts?prefix=acme")).json()
        assert len(listed["accounts"]) == 2 + 5
