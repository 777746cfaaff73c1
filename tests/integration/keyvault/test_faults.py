"""When the database is away callers are told to ask again, and everything goes on when it is back."""

import asyncio

import pytest

from contracts.keyvault import KeyRefused, Verified
from tests.eventually import eventually
from tests.integration.keyvault.driving import OPENAI, Driver, StandInLedger

pytestmark = pytest.mark.anyio


async def test_a_database_that_is_away_is_said_and_survived(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        created = await keyvault.create_key("acme")

        async def verifies() -> bool:
            return isinstance(await driver.verify(created["key"]), Verified)

        ((database,),) = await driver.rows("SELECT quote_ident(current_database())")
        await driver.superuser.execute(f"REVOKE CONNECT ON DATABASE {database} FROM keyvault")
        await driver.rows(
            # Only of this test's database: others' are on the same server.
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE usename = 'keyvault' AND datname = current_database()"
        )
        try:
            verified, stored = await asyncio.gather(
                driver.verify(created["key"]),
                keyvault.store("openai", "acme", OPENAI, expect=503),
            )
            assert isinstance(verified, KeyRefused)
            assert verified.code == "unavailable"
            assert stored["code"] == "database_away"
            ready = await keyvault.ask("GET", "/readyz", expect=503)
            assert "database" in ready["missing"]
        finally:
            await driver.superuser.execute(f"GRANT CONNECT ON DATABASE {database} TO keyvault")
        await eventually(verifies)
        await keyvault.store("openai", "acme", OPENAI)
