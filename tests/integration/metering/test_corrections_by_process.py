"""Corrections of a process of its own: killed -9 again and again each is done once; and as the command line has it."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import httpx2
import pytest
import typer
from typer.testing import CliRunner

from infra.commands import corrections
from infra.service_api import ServiceApi
from services.metering.settings import MeteringSettings
from tests.integration.metering.correcting import add, agree, named, version
from tests.integration.metering.driving import Driver, Json
from tests.service_process import ServiceProcess
from tests.unit.metering.building import event

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

FURTHER: Final = {"SCRIP_LEASE_SECONDS": "2", "SCRIP_METERING_AGE_DAYS_MAX": "36500"}
PERIOD: Final = {"from": "2026-03-01T00:00:00Z", "to": "2026-04-01T00:00:00Z"}
SECONDS_MAX: Final = 60.0
USES: Final = 600


@asynccontextmanager
async def metering(
    settings: MeteringSettings, log_file: Path
) -> AsyncIterator[tuple[ServiceProcess, httpx2.AsyncClient]]:
    """A process that is ready, and its HTTP API. It is killed at the end."""
    process = ServiceProcess("services.metering.app", settings, log_file=log_file, further=FURTHER)
    try:
        async with httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{process.port}", timeout=20, trust_env=False
        ) as client:
            deadline = time.monotonic() + SECONDS_MAX
            while True:
                try:
                    if (await client.get("/readyz")).status_code == 200:
                        break
                except httpx2.TransportError:
                    pass
                assert time.monotonic() < deadline, f"not ready: see {log_file}"
                await asyncio.sleep(0.05)
            yield process, client
    finally:
        process.end()


async def asked(client: httpx2.AsyncClient, driver: Driver, path: str, body: Json) -> int | None:
    """The status of an answer; None: there was none."""
    try:
        answer = await client.post(
            f"/api/v1/corrections{path}", json={"reason": "a test", **body}, headers=driver.headers("operator")
        )
    except httpx2.TransportError:
        return None
    return answer.status_code


async def test_a_correction_whose_process_is_killed_is_done_once(
    driver: Driver, metering_settings: MeteringSettings, tmp_path: Path
) -> None:
    chance = random.Random(11)
    log_file = tmp_path / "metering.log"
    void: Json = {"id": "v", "kind": "void", "events": named(*range(0, USES, 3))}
    rerate: Json = {"id": "r", "kind": "rerate", "account": "*", **PERIOD, "price_version": "dear"}
    async with metering(metering_settings, log_file) as (_, http):
        await add(http, driver, version())
        await add(http, driver, version("dear", days_before=-5, usd={"input_tokens": "3", "output_tokens": "1"}))
        accounts = [f"acme-{number}" for number in range(7)]
        await driver.open(*accounts)
        await driver.until_open(accounts)
        await driver.publish([event(number) for number in range(USES)])
        await driver.until("SELECT coalesce(sum(charged), 0)::int FROM ingest_counters", USES)
        before = await agree(http, driver)
    states: list[tuple[str, str]] = []
    kills = 0
    deadline = time.monotonic() + 2 * SECONDS_MAX
    while ("r", "done") not in states or ("v", "done") not in states:
        assert time.monotonic() < deadline, states
        async with metering(metering_settings, log_file) as (process, http):
            asking = [asyncio.create_task(asked(http, driver, "", body)) for body in (void, rerate)]
            await asyncio.sleep(chance.uniform(0.02, 0.9))
            process.end()
            kills += 1
            statuses = await asyncio.gather(*asking)
            assert {*statuses} <= {None, 200, 201, 202}
        states = [(id, state) for id, state in await driver.rows("SELECT id, state FROM corrections")]
    assert kills >= 1
    async with metering(metering_settings, log_file) as (_, http):
        for body in (void, rerate):
            assert await asked(http, driver, "", body) == 200
        corrected: dict[str, int] = dict(
            await driver.rows("SELECT correction, count(*) FROM correction_items GROUP BY correction")
        )
        assert corrected["v"] == USES // 3
        after = await agree(http, driver)
        assert sum(each["calls"] for each in after.values()) == USES - USES // 3
        # Void came last, of what had been re-rated by then; of the rest it was all there was.
        for id in ("v", "r"):
            while not await driver.rows("SELECT FROM corrections WHERE id = %s AND state = 'undone'", id):
                assert time.monotonic() < deadline + SECONDS_MAX
                await asked(http, driver, f"/{id}/undo", {})
                await asyncio.sleep(0.05)
        assert await agree(http, driver) == before


async def test_the_command_previews_does_follows_and_undoes(
    driver: Driver, metering_settings: MeteringSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = tmp_path / "events.jsonl"
    staged.write_text("\n".join(json.dumps(event(number, subject="acme-1")) for number in range(20, 90)))
    period = ("--from", "2026-03-01", "--to", "2026-04-01", "--reason", "a test")
    async with metering(metering_settings, tmp_path / "metering.log") as (process, http):
        url = f"http://127.0.0.1:{process.port}"
        client = httpx2.Client(headers=driver.headers("operator"), timeout=20, trust_env=False)
        monkeypatch.setattr(corrections, "_metering", lambda: ServiceApi("metering", url, client))

        async def run(*arguments: str) -> str:
            made = typer.Typer()
            corrections.register(made)
            made.callback()(lambda: None)
            found = await asyncio.to_thread(CliRunner().invoke, made, ["corrections", *arguments])
            assert found.exit_code == 0, (found.output, found.exception)
            return found.output

        await add(http, driver, version())
        await add(http, driver, version("dear", days_before=-5, usd={"input_tokens": "3", "output_tokens": "1"}))
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish([event(number, subject="acme-1") for number in range(5)])
        await driver.until("SELECT coalesce(sum(charged), 0)::int FROM ingest_counters", 5)
        before = await agree(http, driver)
        assert "It would come to -1 calls, -0.000103 usd." in await run(
            "void", "demo/use-1", "--reason", "a test", "--dry-run"
        )
        assert await agree(http, driver) == before
        assert "void v is done" in await run("void", "demo/use-1", "--reason", "a test", "--id", "v")
        data = json.dumps(event(2, data_input_tokens=1000)["data"])
        assert "amend a is done" in await run("amend", "demo/use-2", "--data", data, "--reason", "a test", "--id", "a")
        assert "rerate r is done: 4 events, 4 corrected" in await run(
            "rerate", "*", *period, "--price-version", "dear", "--id", "r"
        )
        backfilled = ("backfill", "acme-1", str(staged), *period, "--id", "b")
        assert "apply it with the same command" in await run(*backfilled, "--dry-run")
        assert "backfill b is done: 70 events, 70 corrected" in await run(*backfilled)
        assert "70 corrected" in await run(*backfilled)
        assert "4 events" in await run("show", "r", "--events")
        listed = await run("list")
        assert [id for id in "bravo" if f" {id} " in listed] == ["b", "r", "a", "v"]
        for id in ("b", "r", "a", "v"):
            assert "undone" in await run("undo", id, "--reason", "a mistake")
        assert await agree(http, driver) == before
        client.close()
