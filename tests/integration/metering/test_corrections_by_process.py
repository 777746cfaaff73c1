"""Corrections of a process of its own: whoever is killed -9, each is done once; and as the command line has it."""

import asyncio
import json
import os
import random
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Final

import httpx2
import pytest
import typer
from pydantic import SecretStr
from typer.testing import CliRunner

from infra.commands import corrections, usage
from infra.errors import StackError
from infra.service_api import ServiceApi
from services.metering.settings import MeteringSettings
from tests.conftest import Database
from tests.integration.metering.correcting import add, agree, books, version
from tests.integration.metering.driving import Driver, Json
from tests.integration.metering.standing import POINTS, Standing, standing
from tests.integration.metering.test_rerating import DEAR, PERIOD, render
from tests.integration.metering.test_settling import falling
from tests.service_process import ServiceProcess
from tests.unit.metering.building import event

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

SEED: Final = int(os.environ.get("SCRIP_CHAOS_SEED") or random.SystemRandom().randrange(10**6))
FURTHER: Final = {"SCRIP_LEASE_SECONDS": "2", "SCRIP_METERING_AGE_DAYS_MAX": "36500"}
SECONDS_MAX: Final = 60.0

# Who does it: a connection of metering.
CONNECTIONS: Final = {
    "settle": "metering-settling",
    "void": "metering-pool",
    "amend": "metering-pool",
    "rerate": "metering-corrections",
    "backfill": "metering-corrections",
    "undo": "metering-corrections",
}
STEEP: Final = [{"up_to": "100", "price": "1"}, {"up_to": None, "price": "0.2"}]
PLAIN: Final = falling("plain", tiers=[{"up_to": None, "price": "0.5"}], days_before=-60) | {
    "models": version(usd=DEAR)["models"]
}
# Of a million tokens in and out, and of a render of an account that has rendered 101.
PRICES: Final = {
    "falling": (Decimal(1), Decimal(2), Decimal("0.2")),
    "plain": (Decimal(3), Decimal(1), Decimal("0.5")),
}


@pytest.fixture
async def points(database: Database) -> AsyncIterator[Standing]:
    async with standing(database) as made:
        yield made


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


@dataclass(frozen=True, slots=True)
class Archived:
    """The stack that commands find, of which they need the database alone."""

    database: Database

    def database_url(self, role: str) -> SecretStr:
        """As a role."""
        return self.database.url(role)

    def migrate(self) -> None:
        """It is."""


@asynccontextmanager
async def commands(
    process: ServiceProcess, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """The command line of who runs a process of metering: what a command prints. What goes wrong is raised."""
    made = typer.Typer()
    for each in (corrections, usage):
        each.register(made)

    async def run(*arguments: str) -> str:
        found = await asyncio.to_thread(CliRunner().invoke, made, [*arguments])
        if isinstance(found.exception, Exception):
            raise found.exception
        assert found.exit_code == 0, found.output
        return found.output

    with httpx2.Client(headers=driver.headers("operator"), timeout=20, trust_env=False) as client:
        url = f"http://127.0.0.1:{process.port}"
        monkeypatch.setattr(corrections, "_metering", lambda: ServiceApi("metering", url, client))
        yield run


@dataclass(frozen=True, slots=True)
class Rated:
    """What stands of what was reported."""

    # Of each account the prices by which it was rated last; of calls that were amended since, theirs.
    prices: Mapping[str, str] = field(default_factory=dict)
    amended: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Json] = field(default_factory=dict)
    void: frozenset[str] = frozenset()


class Told:
    """What was reported and asked for, and what each account is to be charged by that, computed here."""

    def __init__(self) -> None:
        self.uses: list[Json] = []
        # Of backfills that are undone.
        self.unstaged: set[str] = set()
        self.rated = Rated()
        # Corrections that are not undone, the last one last, what had stood before each, and what it staged.
        self.corrected: list[tuple[str, Rated, Sequence[Json]]] = []

    def further(self) -> list[Json]:
        """Use of further accounts, each of which has to be given something back, in whatever order it comes."""
        accounts = [f"acme-{len(self.uses)}-{number}" for number in range(3)]
        self.rated = replace(self.rated, prices={**self.rated.prices, **dict.fromkeys(accounts, "falling")})
        return [use for account in accounts for use in self.use_of(account)]

    def use_of(self, account: str) -> list[Json]:
        """Some more of an account."""
        number = len(self.uses)
        made = [render(number + place, n, account=account) for place, n in enumerate((60, 40, 1))]
        made += [event(number + place, subject=account) for place in range(3, 23)]
        self.uses += made
        return made

    def calls(self, number: int) -> list[Json]:
        """The first calls that are not void."""
        return [use for use in self.uses if use["type"] != "render" and self.stands(use)][:number]

    def correct(self, id: str, rated: Rated, *, staged: Sequence[Json] = ()) -> None:
        """Note what stands after a correction."""
        self.corrected.append((id, self.rated, staged))
        self.rated = rated

    def undo(self) -> str:
        """Note that the last correction is undone. Accounts that came since stay."""
        id, before, staged = self.corrected.pop()
        self.rated = replace(before, prices={**self.rated.prices, **before.prices})
        self.unstaged.update(use["id"] for use in staged)
        return id

    def stands(self, use: Json) -> bool:
        """Whether a use counts."""
        return use["id"] not in self.rated.void and use["id"] not in self.unstaged

    def costs(self) -> dict[str, dict[str, Decimal]]:
        """By account and unit."""
        found = {}
        for account, prices in self.rated.prices.items():
            of = [use for use in self.uses if use["subject"] == account and self.stands(use)]
            renders = [use["data"]["n"] for use in of if use["type"] == "render"]
            calls = [use["id"] for use in of if use["type"] != "render"]
            usd = PRICES[prices][2] * sum(renders) + Decimal("0.25") * len(renders)
            for use in of:
                if use["type"] != "render":
                    into, out, _ = PRICES[self.rated.amended.get(use["id"], prices)]
                    data = self.rated.data.get(use["id"], use["data"])
                    usd += (into * data["input_tokens"] + out * data["output_tokens"]) / 1_000_000
            found[account] = {"usd": usd} | ({"calls": Decimal(len(calls))} if calls else {})
        return found


@dataclass(frozen=True, slots=True)
class Request:
    """A correction to be asked for, to be applied, or to be undone."""

    path: str
    body: Json

    async def ask(self, http: httpx2.AsyncClient, driver: Driver) -> None:
        """Ask for it. Whoever is killed does not answer."""
        with suppress(httpx2.TransportError):
            answer = await http.post(
                f"/api/v1/corrections{self.path}",
                json={"reason": "a test", **self.body},
                headers=driver.headers("operator"),
            )
            assert answer.status_code in (200, 201, 202), answer.text


async def report(told: Told, driver: Driver) -> None:
    """Have further use reported, of which something is soon to be given back."""
    uses = told.further()
    accounts = {use["subject"] for use in uses}
    await driver.open(*accounts)
    await driver.until_open([*accounts])
    await driver.publish(uses)


async def begin(what: str, told: Told, http: httpx2.AsyncClient, driver: Driver) -> Request | None:
    """Have there be one more of a kind to be done; what is to be asked for, if it is not done by itself."""
    id, rated = f"{what}-{len(told.uses)}-{len(told.rated.void)}-{len(told.corrected)}", told.rated
    match what:
        case "settle":
            await report(told, driver)
            return None
        case "void":
            calls = [use["id"] for use in told.calls(3)]
            told.correct(id, replace(rated, void=rated.void.union(calls)))
            return Request("", {"id": id, "kind": "void", "events": [{"source": "demo", "id": call} for call in calls]})
        case "amend":
            data = {use["id"]: {**use["data"], "input_tokens": len(told.uses) + 7} for use in told.calls(3)}
            amended = dict.fromkeys(data, "falling")
            told.correct(id, replace(rated, data={**rated.data, **data}, amended={**rated.amended, **amended}))
            events = [{"source": "demo", "id": call, "data": each} for call, each in data.items()]
            return Request("", {"id": id, "kind": "amend", "events": events})
        case "rerate":
            # While it is settled what is charged now.
            await report(told, driver)
            await driver.until("SELECT count(*)::int FROM seen", len(told.uses))
            prices = "falling" if "plain" in told.rated.prices.values() else "plain"
            told.correct(id, replace(told.rated, prices=dict.fromkeys(told.rated.prices, prices), amended={}))
            return Request("", {"id": id, "kind": "rerate", "account": "*", **PERIOD, "price_version": prices})
        case "backfill":
            account = list(rated.prices)[-1]
            gone = {use["id"] for use in told.uses if use["subject"] == account}
            staged = told.use_of(account)
            prices_now = {**rated.prices, account: "falling"}
            told.correct(id, replace(rated, void=rated.void | gone, prices=prices_now), staged=staged)
            asked = {"id": id, "kind": "backfill", "account": account, **PERIOD, "replace": True}
            await Request("", asked).ask(http, driver)
            answer = await http.post(
                f"/api/v1/corrections/{id}/events", json=staged, headers=driver.headers("operator")
            )
            assert answer.status_code == 200, answer.text
            return Request(f"/{id}/apply", {})
        case _:
            return Request(f"/{told.undo()}/undo", {})


async def exact(http: httpx2.AsyncClient, driver: Driver, told: Told) -> None:
    """Wait until nothing is under way, and demand what was computed, in the books and in metering's own answers."""
    await driver.until("SELECT count(*)::int FROM seen", len(told.uses))
    await driver.until("SELECT sum(new - charged - voided)::int FROM ingest_counters", 0)
    await driver.until("SELECT count(*)::int FROM corrections WHERE state IN ('running', 'undoing')", 0)
    await driver.until("SELECT count(*)::int FROM price_counters WHERE credit < 0", 0)
    assert await agree(http, driver) == told.costs()


async def kill_in_turn(
    kills: Sequence[tuple[str, str]], driver: Driver, settings: MeteringSettings, points: Standing, directory: Path
) -> None:
    """Kill in the middle of each a process of its own, and demand exact totals of the next."""
    sys.stderr.write(f"seed {SEED}: {kills}\n")
    chance, told = random.Random(SEED), Told()
    log_file = directory / "metering.log"
    request: Request | None = None
    for number, (what, point) in enumerate([*kills, (None, None)]):
        async with metering(settings, log_file) as (process, http):
            # What the one before had begun has ended before there is another process, or ends under its eyes.
            await points.end()
            if number == 0:
                await add(http, driver, falling("falling", tiers=STEEP))
                await add(http, driver, PLAIN)
                await report(told, driver)
            if request is not None:
                await request.ask(http, driver)
            await exact(http, driver, told)
            if what is None or point is None:
                return
            await points.begin(connection=CONNECTIONS[what], point=point)
            request = await begin(what, told, http, driver)
            asking = [] if request is None else [asyncio.create_task(request.ask(http, driver))]
            await points.until_reached()
            process.end()
            await asyncio.gather(*asking)
        await points.pass_others()
        if chance.random() < 0.5:
            await points.end()


async def test_who_is_killed_in_the_middle_of_a_correction_has_done_it_once_or_not_at_all(
    driver: Driver, metering_settings: MeteringSettings, points: Standing, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    kills = [
        (what, chance.choice(POINTS))
        for what in ("settle", "rerate", chance.choice(("void", "amend", "backfill", "undo")))
    ]
    await kill_in_turn(kills, driver, metering_settings, points, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_who_is_killed_at_any_point_of_any_correction_has_done_it_once_or_not_at_all(
    driver: Driver, metering_settings: MeteringSettings, points: Standing, tmp_path: Path
) -> None:
    kinds = ("settle", "void", "amend", "undo", "rerate", "backfill", "undo", "undo", "rerate", "undo")
    kills = [(what, point) for point in POINTS for what in kinds]
    await kill_in_turn(kills, driver, metering_settings, points, tmp_path)


async def test_the_command_previews_does_follows_and_undoes(
    driver: Driver, metering_settings: MeteringSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = tmp_path / "events.jsonl"
    staged.write_text("\n".join(json.dumps(event(number, subject="acme-1")) for number in range(20, 90)))
    period = ("--from", "2026-03-01", "--to", "2026-04-01", "--reason", "a test")
    async with (
        metering(metering_settings, tmp_path / "metering.log") as (process, http),
        commands(process, driver, monkeypatch) as command,
    ):

        async def run(*arguments: str) -> str:
            return await command("corrections", *arguments)

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


async def test_the_command_corrects_what_is_archived_and_what_changed_is_archived_anew(
    driver: Driver,
    metering_settings: MeteringSettings,
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(usage, "stack_with", lambda _: nullcontext(Archived(database)))
    january = [event(number, subject="acme-1", time=f"2026-01-{14 + number}T12:00:00Z") for number in range(3)]
    kept, copied = tmp_path / "usage", tmp_path / "copied"
    archive = ("usage", "archive", "--to", str(kept), "--before", "2026-03-01", "--drop")
    void = ("corrections", "void", "demo/use-1", "--reason", "a test", "--id", "v")
    at = ("--archive", str(kept))
    counted = "SELECT count(*)::int FROM usage_log WHERE occurred_at < '2026-02-01'"
    async with (
        metering(metering_settings, tmp_path / "metering.log") as (process, http),
        commands(process, driver, monkeypatch) as command,
    ):
        await driver.open("acme-1")
        await add(http, driver, version(days_before=80))
        await driver.until_open(["acme-1"])
        await driver.publish(january)
        await driver.until("SELECT coalesce(sum(charged), 0)::int FROM ingest_counters", 3)
        before = await books(driver)
        await command(*archive)
        assert await driver.rows(counted) == [(0,)]
        with pytest.raises(StackError, match=r"restore --from DIR --month 2026-01.*--archive DIR"):
            await command(*void)
        with pytest.raises(StackError, match="is no directory"):
            await command(*void, "--archive", str(tmp_path / "elsewhere"))
        assert "It would come to -1 calls" in await command(*void, *at, "--dry-run")
        # It is in the log now, and may go again: nothing of it was changed.
        files = {path.name for path in kept.rglob("*.parquet")}
        await command(*archive)
        assert {path.name for path in kept.rglob("*.parquet")} == files
        shutil.copytree(kept, copied)
        said = await command(*void, *at)
        assert "2026-01 is in the log again" in said
        assert "void v is done: 1 events, 1 corrected" in said
        assert await driver.rows(counted) == [(3,)]
        after = await books(driver)
        assert after["acme-1"]["calls"] == before["acme-1"]["calls"] - 1
        # Asked again it is what it came to, wherever the month is; what was archived before is taken for nothing.
        with pytest.raises(StackError, match="was charged or corrected since"):
            await command("usage", "restore", "--from", str(copied))
        await command(*archive)
        assert await driver.rows(counted) == [(0,)]
        assert "1 corrected" in await command(*void)
        now = {path.name for path in kept.rglob("*.parquet")}
        assert (len(now), len(now - files)) == (3, 1)
        with pytest.raises(StackError, match="is not what 2026-01 was archived to"):
            await command("corrections", "undo", "v", "--reason", "a mistake", "--archive", str(copied))
        assert "undo" in await command("corrections", "undo", "v", "--reason", "a mistake", *at)
        assert await books(driver) == before
