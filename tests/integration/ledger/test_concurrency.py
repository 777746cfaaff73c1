"""Law of admission under concurrency: through several processes, exactly as many holds are admitted as are covered."""

import asyncio
from pathlib import Path
from typing import Final

import httpx2
import pytest

from contracts import ledger as words
from services.kit.ids import new_hold_id
from services.ledger.replay import replay
from services.ledger.settings import LedgerSettings
from tests.builders import hold_leg, place_hold
from tests.conftest import Database
from tests.integration.ledger.driving import Driver
from tests.integration.ledger.processes import LedgerProcess, ledgers
from tests.integration.ledger.test_owners import until_owned

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

HOLDS: Final = 1_000
COVERED: Final = 100
CONNECTIONS: Final = 100


async def test_of_a_thousand_holds_at_once_exactly_those_that_are_covered_are_admitted(
    driver: Driver, ledger_settings: LedgerSettings, database: Database, tmp_path: Path
) -> None:
    with ledgers(ledger_settings, count=3, directory=tmp_path) as processes:
        await until_owned(driver, owners=3)
        await driver.funded("acme", str(COVERED))
        commands = [
            place_hold(new_hold_id("acme"), hold_leg("usd", "1"), key=f"hold-{number}") for number in range(HOLDS)
        ]
        headers = {"Authorization": f"Bearer {driver.tokens['operator']}"}
        limits = httpx2.Limits(max_connections=CONNECTIONS)
        async with httpx2.AsyncClient(headers=headers, limits=limits, timeout=60) as client:
            # Every fourth by request/reply to the owner, the others over HTTP to each process in turn.
            codes = await asyncio.gather(
                *(
                    by_message(driver, command) if number % 4 == 3 else by_http(client, processes[number % 4], command)
                    for number, command in enumerate(commands)
                )
            )
        assert codes.count("accepted") == COVERED
        assert codes.count("insufficient_funds") == HOLDS - COVERED
        assert await driver.rows("SELECT posted, held FROM wallets") == [(COVERED * 10**9, COVERED * 10**9)]
        assert await driver.rows("SELECT count(*) FROM holds WHERE status = 'placed'") == [(COVERED,)]
    found = await asyncio.to_thread(replay, database.url("ledger_owner"))
    assert found.is_equal, found


async def by_message(driver: Driver, command: words.PlaceHold) -> str:
    """Ask the owner; the code of what it answers."""
    reply = await driver.command(command)
    return "accepted" if isinstance(reply, words.Accepted) else reply.code


async def by_http(client: httpx2.AsyncClient, process: LedgerProcess, command: words.PlaceHold) -> str:
    """Ask a process, which asks the owner, again while it is too busy."""
    body = command.model_dump_json(exclude={"idempotency_key"})
    headers = {"Idempotency-Key": command.idempotency_key, "Content-Type": "application/json"}
    for _ in range(200):
        answer = await client.post(f"{process.url}/v1/holds", content=body, headers=headers)
        if answer.status_code != 503:
            return "accepted" if answer.status_code == 200 else str(answer.json()["code"])
        await asyncio.sleep(0.1)
    raise AssertionError("the ledger is never less busy")
