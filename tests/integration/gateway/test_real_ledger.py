"""Laws that need the real ledger: calls at once are admitted as far as the balance reaches, and nothing stays held."""

import asyncio
from collections import Counter
from decimal import Decimal
from typing import Any

import openai
import pytest

from contracts import ledger as words
from tests.integration.gateway.conftest import OwnWorld
from tests.integration.ledger.conftest import driver, ledger_nats, ledger_settings, metering_nats, superuser
from tests.integration.ledger.driving import Driver

__all__ = ["driver", "ledger_nats", "ledger_settings", "metering_nats", "superuser"]

pytestmark = pytest.mark.anyio


async def held_and_available(driver: Driver, account: str) -> tuple[str, str]:
    """In usd."""
    (row,) = await driver.rows("SELECT held, posted - held FROM wallets WHERE account = %s AND unit = 'usd'", account)
    return f"{Decimal(row[0]).scaleb(-9).normalize():f}", f"{Decimal(row[1]).scaleb(-9).normalize():f}"


async def opened(driver: Driver, account: str, *, usd: str) -> None:
    """An account below an organisation that has some usd."""
    await driver.funded(account.partition("/")[0], usd)
    await driver.accepted(words.OpenAccount(idempotency_key=driver.key(), account=account))


async def test_of_fifty_calls_at_once_on_a_balance_for_ten_at_most_ten_are_admitted(
    own_world: OwnWorld, driver: Driver
) -> None:
    asked: dict[str, Any] = {"text": "[[tokens:4]] [[stall:0.5]]", "max_tokens": 1000}
    async with driver.running(), own_world(ledger=False) as world:
        rich = f"rich-{world.root}/ana/key_1"
        await opened(driver, rich, usd="1")
        raw = await world.ask_raw(key=world.keyvault.make_key(rich), **asked)
        price = Decimal(raw.headers["x-scrip-held"].split()[0])
        await opened(driver, world.account, usd=f"{price * 10 + price / 2:f}")

        async def one() -> tuple[int, str | None]:
            try:
                await world.ask(**asked)
            except openai.APIStatusError as error:
                body = error.body if isinstance(error.body, dict) else {}
                return error.status_code, body.get("limit_source")
            return 200, None

        answers = await asyncio.gather(*(one() for _ in range(50)))
        assert Counter(answers) == {(200, None): 10, (402, world.root): 40}
        events = [event for event in await world.events() if event.subject == world.account]
        # Metering is not here to charge them: each is still held, and named by one event.
        assert len({event.data.hold for event in events}) == len(events) == 10
        assert (await held_and_available(driver, world.root))[0] == f"{(price * 10).normalize():f}"


async def test_what_failed_is_not_held(own_world: OwnWorld, driver: Driver) -> None:
    async with driver.running(), own_world(ledger=False) as world:
        await opened(driver, world.account, usd="1")

        async def fail() -> None:
            with pytest.raises(openai.APIStatusError):
                await world.ask("[[fail:500]]")

        await asyncio.gather(*(fail() for _ in range(20)))
        assert await held_and_available(driver, world.root) == ("0", "1")
        assert await world.events() == []


async def test_an_account_the_ledger_does_not_know_is_refused(own_world: OwnWorld, driver: Driver) -> None:
    async with driver.running(), own_world(ledger=False) as world:
        with pytest.raises(openai.PermissionDeniedError) as refused:
            await world.ask()
        assert refused.value.code == "account_not_open"
