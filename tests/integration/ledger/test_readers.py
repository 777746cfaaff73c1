"""Laws of a ledger that owns no partitions: it reads what the owner reads, hands on commands, and never decides."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest

from services.kit.ids import new_hold_id
from services.ledger.settings import LedgerSettings
from tests.eventually import eventually
from tests.integration.ledger.driving import Driver
from tests.integration.ledger.processes import LedgerProcess, ledgers
from tests.integration.ledger.test_owners import until_owned

pytestmark = pytest.mark.anyio

READS = (
    "/v1/accounts",
    "/v1/trees/acme",
    "/v1/balances/acme",
    "/v1/balances/acme/ana",
    "/v1/statements/acme",
    "/v1/holds?account=acme",
    "/v1/totals?unit=usd",
    "/v1/totals/acme",
    "/v1/exports/journal?account=acme",
    "/v1/balances/nobody",
    "/dead-letters",
)


def http(process: LedgerProcess, driver: Driver) -> httpx2.AsyncClient:
    headers = {"Authorization": f"Bearer {driver.tokens['operator']}"}
    return httpx2.AsyncClient(base_url=process.url, headers=headers, timeout=20)


async def until_ready(client: httpx2.AsyncClient) -> None:
    async def ready() -> bool:
        try:
            return (await client.get("/readyz")).status_code == httpx2.codes.OK
        except httpx2.TransportError:
            return False

    # Processes that have just been started share few processors with whatever else runs.
    await eventually(ready, seconds=60)


async def command(client: httpx2.AsyncClient, path: str, key: str, **body: Any) -> httpx2.Response:
    return await client.post(path, json=body, headers={"Idempotency-Key": key})


def without_time(answer: httpx2.Response) -> Any:
    if not answer.headers["content-type"].startswith("application/json"):
        return answer.text
    return {name: value for name, value in answer.json().items() if name != "as_of"}


async def test_a_ledger_that_only_answers_reads_what_the_owner_reads_and_hands_it_commands(
    driver: Driver, ledger_settings: LedgerSettings, tmp_path: Path
) -> None:
    reading = ledger_settings.model_copy(update={"ledger_owns": False})
    (tmp_path / "reader").mkdir()
    with (
        ledgers(ledger_settings, count=2, directory=tmp_path) as owners,
        ledgers(reading, count=1, directory=tmp_path / "reader") as (reader,),
    ):
        async with http(reader, driver) as asked, http(owners[0], driver) as owner:
            await until_ready(asked)
            await until_ready(owner)
            await until_owned(driver, owners=2)
            wallets = [{"unit": "usd"}]
            for path, key, body in (
                ("/v1/accounts", "a", {"account": "acme", "wallets": wallets}),
                ("/v1/accounts", "b", {"account": "acme/ana"}),
                ("/v1/grants", "g", {"account": "acme", "unit": "usd", "amount": "10"}),
                (
                    "/v1/holds",
                    "h",
                    {
                        "account": "acme/ana",
                        "hold": new_hold_id("acme"),
                        "legs": [{"unit": "usd", "at_most": "2", "at_least": "2"}],
                        "lifetime_seconds": 600,
                    },
                ),
            ):
                done = await command(asked, path, key, **body)
                assert done.status_code == httpx2.codes.OK, done.text
                # It is the owner's: asked there under the same key, it is the outcome that is replayed.
                again = await command(owner, path, key, **body)
                assert again.json() == {**done.json(), "replayed": True}
            nine = [{"amount": "9", "unit": "usd"}]
            refused = await command(asked, "/v1/debits", "d", account="acme", debit="d", amounts=nine)
            assert (refused.status_code, refused.json()["code"]) == (402, "insufficient_funds")
            for path in READS:
                ours, theirs = await asked.get(path), await owner.get(path)
                assert (ours.status_code, without_time(ours)) == (theirs.status_code, without_time(theirs)), path
            (usd,) = (await asked.get("/v1/balances/acme")).json()["wallets"]
            assert (usd["posted"], usd["held"], usd["available"]) == ("10", "2", "8")
            assert (await asked.get("/metrics")).status_code == httpx2.codes.OK
        # Who owns, or might, says so: there are the two, and no third.
        pids = {int(row[0].split(":")[1]) for row in await driver.rows("SELECT owner FROM members")}
        assert pids == {each.process.pid for each in owners}


async def test_without_an_owner_a_command_is_refused_for_now_and_reads_go_on(
    driver: Driver, ledger_settings: LedgerSettings, tmp_path: Path
) -> None:
    reading = ledger_settings.model_copy(update={"ledger_owns": False})
    (tmp_path / "reader").mkdir()
    with ledgers(reading, count=1, directory=tmp_path / "reader") as (reader,):
        with ledgers(ledger_settings, count=1, directory=tmp_path):
            await until_owned(driver, owners=1)
            await driver.funded("acme", "10")
        stored = await driver.dump()
        async with http(reader, driver) as asked:
            await until_ready(asked)
            answer = await command(asked, "/v1/grants", "g", account="acme", unit="usd", amount="1")
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
            assert answer.headers["retry-after"] == "1"
            # The dead owner's leases run out, and nobody takes them.
            taken = "SELECT count(*) FROM leases WHERE expires_at > clock_timestamp()"
            await driver.until(taken, 0)
            await asyncio.sleep(ledger_settings.lease_seconds)
            assert await driver.rows(taken) == [(0,)]
            (usd,) = (await asked.get("/v1/balances/acme")).json()["wallets"]
            assert usd["posted"] == "10"
            assert await driver.dump() == stored
