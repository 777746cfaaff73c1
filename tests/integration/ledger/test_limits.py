"""Laws of limits: a full queue refuses at once, loses nothing, and recovers; contracts say what the ledger accepts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import httpx2
import pytest

from contracts import ledger as words
from services.ledger.domain import opening, rules
from services.ledger.handlers.items import COMMAND_COST
from services.ledger.replay import replay
from tests.builders import charge_line, charges_rated, grant
from tests.conftest import Database
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio

QUEUE: Final = 8
BEYOND: Final = 5
WAITS_FOR_HEADS: Final = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'heads'::regclass"


@asynccontextmanager
async def stalled(driver: Driver) -> AsyncIterator[None]:
    """Meanwhile no batch commits: somebody else holds the heads. For less than a transaction may last."""
    async with asyncio.timeout(4), driver.superuser.transaction():
        await driver.superuser.execute("LOCK TABLE heads IN EXCLUSIVE MODE")
        yield


async def test_a_full_queue_refuses_at_once_loses_nothing_and_recovers(driver: Driver, database: Database) -> None:
    limits = {"queue_cost_max": QUEUE * COMMAND_COST, "batch_cost_max": 3 * COMMAND_COST}
    driver = replace(driver, settings=driver.settings.model_copy(update=limits))
    async with driver.running() as http:
        await driver.funded("acme", "100")

        async def post(key: int) -> httpx2.Response:
            body = {"account": "acme", "unit": "usd", "amount": "1"}
            return await http.post("/v1/grants", json=body, headers={"Idempotency-Key": f"k{key}"})

        async def posted() -> str:
            ((usd,),) = [(await http.get("/v1/balances/acme")).json()["wallets"]]
            return str(usd["posted"])

        together = words.CommandList(
            commands=tuple(grant("acme", "1", key=f"t{number}") for number in range(3)),
            all_or_nothing=True,
            idempotency_key="together",
        )
        before = await driver.dump()
        async with stalled(driver):
            deciding = asyncio.create_task(post(0))
            await driver.until(WAITS_FOR_HEADS, 1)
            asked = {asyncio.create_task(post(number)): number for number in range(1, QUEUE + BEYOND + 1)}
            refused: set[asyncio.Task[httpx2.Response]] = set()
            while len(refused) < BEYOND:
                done, _ = await asyncio.wait(asked.keys() - refused, return_when=asyncio.FIRST_COMPLETED)
                refused |= done
            for task in refused:
                answer = task.result()
                assert (answer.status_code, answer.json()["code"]) == (503, "busy")
                assert answer.headers["content-type"] == "application/problem+json"
                assert int(answer.headers["retry-after"]) >= 1
                assert f"of at most {QUEUE * COMMAND_COST}" in answer.json()["detail"]
            # Over request/reply it is the same, of a list as a whole.
            for failed in (await driver.command(grant("acme", "1", key="asked")), await driver.commands(together)):
                assert isinstance(failed, words.Failed)
                assert failed.code == "busy"
            # Charges wait on their stream, and reading goes on.
            await driver.publish(charges_rated(charge_line("e1", usd="2"), charge_line("e2", usd="2")))
            assert await posted() == "100"
            assert await driver.dump() == before
            waiting = asked.keys() - refused
            assert not any(task.done() for task in (deciding, *waiting))

        answers = await asyncio.gather(deciding, *waiting)
        assert [(answer.status_code, answer.json()["replayed"]) for answer in answers] == [(200, False)] * (1 + QUEUE)
        await driver.until("SELECT max(charges_number) FROM heads", 1)
        assert await posted() == str(100 + 1 + QUEUE - 4)
        # What was refused left nothing behind: asked again, it is done for the first time.
        for task in refused:
            again = await post(asked[task])
            assert (again.status_code, again.json()["replayed"]) == (200, False)
        assert not (await driver.accepted(grant("acme", "1", key="asked"))).replayed
        assert isinstance(await driver.commands(together), words.Listed)
        assert await posted() == str(100 + 1 + QUEUE - 4 + BEYOND + 1 + 3)
    assert replay(database.url("ledger_owner")).is_equal


def test_a_command_may_say_as_much_as_the_ledger_accepts() -> None:
    assert words.THRESHOLDS_MAX == opening.THRESHOLDS_MAX
    assert words.EVERY_MAX == rules.EVERY_MAX
    assert words.RULES_MAX == rules.RULES_MAX
