"""History, summaries, calls and single uses are what a computation in memory says, page by page."""

import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Any, Final
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import httpx2
import pytest

from contracts.partition import partition_of
from contracts.usage import MODEL_USED
from tests.integration.metering.driving import Driver, Json

pytestmark = pytest.mark.anyio

ACCOUNTS: Final = ("acme", "acme/ana", "acme/ana/key_1", "acme-ml", "other")
BERLIN: Final = ZoneInfo("Europe/Berlin")
SINCE: Final = datetime(2026, 10, 20, tzinfo=BERLIN).astimezone(UTC)
UNTIL: Final = datetime(2026, 11, 9, tzinfo=BERLIN).astimezone(UTC)
NANO: Final = Fraction(1, 10**9)


@dataclass(frozen=True)
class Use:
    number: int
    at: datetime
    account: str
    type: str
    data: Json
    usd: int | None

    def said(self, name: str) -> Any:
        return self.data.get("attributes", {}).get(name, self.data.get(name))


def uses(count: int = 700) -> list[Use]:
    chance = random.Random(23)
    made = []
    for number in range(count):
        said: Json = {"endpoint": chance.choice(["/chat", "/analyze"]), "status": chance.choice([200, 200, 404, 502])}
        if chance.random() < 0.8:
            said["latency_ms"] = chance.choice([chance.randrange(5), chance.randrange(3_000), 12.5])
        if chance.random() < 0.2:
            said.pop("endpoint")
        if chance.random() < 0.7:
            kind = MODEL_USED
            data: Json = {"provider": "openai", "model": chance.choice(["gpt-4o", "o4"]), "attributes": said}
            data |= {"input_tokens": chance.randrange(10**9), "output_tokens": chance.randrange(900)}
            data |= {"own_key": True} if chance.random() < 0.2 else {}
            data |= {"feature": chance.choice(["analyze", "auth"])} if chance.random() < 0.8 else {}
        else:
            # Its members are its own: they are no tokens of a model.
            kind, data = "upload", {**said, "input_tokens": "many", "own_key": 7}
        at = SINCE + timedelta(minutes=chance.randrange(-600, 21 * 24 * 60))
        charged = kind == MODEL_USED and chance.random() < 0.8
        usd = chance.randrange(10**15) if charged else None
        made.append(Use(number, at, chance.choice(ACCOUNTS), kind, data, usd))
    return made


def nanos(amount: int) -> str:
    return f"{amount // 10**9}.{amount % 10**9:09d}"


async def log(driver: Driver, found: Iterable[Use]) -> None:
    for month in ("2026-10-01", "2026-11-01"):
        await driver.connection.execute("SELECT ensure_usage_month(%s::date)", [month])
    async with (
        driver.connection.cursor() as cursor,
        cursor.copy(
            "COPY usage_log (partition, occurred_at, source, event_id, account, type, recorded_at, data,"
            " price_version, line_items, amounts, bundle_number, line_number) FROM STDIN"
        ) as copy,
    ):
        for use in found:
            amounts = None if use.usd is None else json.dumps([{"unit": "usd", "amount": nanos(use.usd)}])
            charge = (None,) * 5 if amounts is None else ("v1", "[]", amounts, use.number + 1, 1)
            key = (partition_of(use.account), use.at, "demo", f"use-{use.number}")
            await copy.write_row((*key, use.account, use.type, use.at, json.dumps(use.data), *charge))


@pytest.fixture
async def http(driver: Driver) -> AsyncIterator[httpx2.AsyncClient]:
    async with driver.running() as client:
        client.headers["Authorization"] = driver.headers("operator")["Authorization"]
        yield client


async def ask(http: httpx2.AsyncClient, what: str, **query: Any) -> httpx2.Response:
    # A summary is of a month.
    times = {} if what == "summary" else {"from": SINCE.isoformat(), "to": UNTIL.isoformat()}
    values = {"account": "acme"} | times | query
    text = urlencode(
        {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items() if value}
    )
    return await http.get(f"/api/v1/usage/{what}?{text}")


async def pages(http: httpx2.AsyncClient, what: str, name: str, **query: Any) -> list[Json]:
    rows: list[Json] = []
    after = None
    for _ in range(1_000):
        answer = await ask(http, what, **query, after=after)
        assert answer.status_code == 200, answer.text
        rows += answer.json()[name]
        after = answer.json()["next_after"]
        if after is None:
            return rows
    raise AssertionError("there is no end")


def of(found: Iterable[Use], account: str, *, tree: bool) -> list[Use]:
    return [use for use in found if account in ("*", use.account) or (tree and use.account.startswith(f"{account}/"))]


def sums(found: list[Use]) -> Json:
    models = [use for use in found if use.type == MODEL_USED]
    return {
        "events": len(found),
        "accounts": len({use.account for use in found}),
        "input_tokens": sum(use.data["input_tokens"] for use in models),
        "output_tokens": sum(use.data["output_tokens"] for use in models),
        "own_key_events": sum(use.data.get("own_key", False) for use in models),
        "charged_events": sum(use.usd is not None for use in found),
        "usd": sum(use.usd or 0 for use in found),
    }


def summed(row: Json) -> Json:
    found: Json = {name: row[name] for name in sums([]) if name != "usd"}
    return found | {"usd": int(Fraction(row["amounts"].get("usd", "0")) / NANO)}


async def test_history_has_every_window_and_sums_to_the_total(driver: Driver, http: httpx2.AsyncClient) -> None:
    found = uses()
    await log(driver, found)
    for account, tree in (("acme", False), ("acme", True), ("*", False), ("nobody", False)):
        for size, windows in (("day", 20), ("month", 2), ("hour", 20 * 24 + 1)):
            rows = await pages(http, "history", "history", account=account, tree=tree, size=size, zone="Europe/Berlin")
            assert len(rows) == windows
            times = [
                (datetime.fromisoformat(row["window_start"]), datetime.fromisoformat(row["window_end"])) for row in rows
            ]
            assert all(newer[0] == older[1] for newer, older in pairwise(times))
            asked = of((use for use in found if SINCE <= use.at < UNTIL), account, tree=tree)
            for row, (start, end) in zip(rows, times, strict=True):
                assert summed(row) == sums([use for use in asked if start <= use.at < end])
            assert sum(row["events"] for row in rows) == len(asked)


async def test_a_summary_is_per_account_and_month(driver: Driver, http: httpx2.AsyncClient) -> None:
    found = uses()
    await log(driver, found)
    for account, tree in (("*", False), ("acme", True), ("acme", False), ("nobody", True)):
        for month in ("2026-10", "2026-11", "2026-12"):
            rows = await pages(
                http, "summary", "summaries", account=account, tree=tree, month=month, zone="Europe/Berlin", limit=2
            )
            asked = [
                use for use in of(found, account, tree=tree) if use.at.astimezone(BERLIN).isoformat().startswith(month)
            ]
            assert [row["account"] for row in rows] == sorted({use.account for use in asked})
            for row in rows:
                own = [use for use in asked if use.account == row["account"]]
                assert summed(row) == sums(own)
                assert row["month"] == month
                assert row["features"] == Counter(use.data.get("feature", "") for use in own)
                assert row["failed_events"] == sum(use.said("status") >= 400 for use in own)
                times = [Fraction(use.said("latency_ms")) for use in own if use.said("latency_ms") is not None]
                average = sum(times, Fraction()) / len(times)
                assert abs(Fraction(row["latency_ms_average"]) - average) <= Fraction(1, 2000)


async def test_percentiles_are_values_that_occurred(driver: Driver, http: httpx2.AsyncClient) -> None:
    found = uses()
    await log(driver, found)
    for groups in (["endpoint", "status"], ["status"], [], ["account", "endpoint", "model"]):
        rows = await pages(http, "calls", "calls", account="acme", tree=True, group_by=",".join(groups) or " ", limit=3)
        expected: dict[tuple[str, ...], list[Use]] = {}
        for use in of((use for use in found if SINCE <= use.at < UNTIL), "acme", tree=True):
            said = {"account": use.account, "endpoint": use.said("endpoint"), "status": use.said("status")}
            said["model"] = use.data.get("model")
            expected.setdefault(tuple(str(said[name] or "") for name in groups), []).append(use)
        assert [tuple(row[name] for name in groups) for row in rows] == sorted(expected)
        for row in rows:
            own = expected[tuple(row[name] for name in groups)]
            assert row["calls"] == len(own)
            assert row["failed_calls"] == sum(use.said("status") >= 400 for use in own)
            times = sorted(use.said("latency_ms") for use in own if use.said("latency_ms") is not None)
            if not times:
                assert row["latency_ms"] is None
                continue
            # The nearest rank.
            wanted = {f"p{share}": times[ceil(Fraction(share * len(times), 100)) - 1] for share in (50, 90, 95, 99)}
            wanted |= {"min": times[0], "max": times[-1]}
            assert {name: Fraction(row["latency_ms"][name]) for name in wanted} == wanted
            assert row["latency_ms"]["calls"] == len(times)


async def test_single_uses_come_once_each_the_latest_first(driver: Driver, http: httpx2.AsyncClient) -> None:
    found = uses(300)
    await log(driver, found)
    rows = await pages(http, "events", "uses", account="acme", tree=True, limit=7)
    asked = of((use for use in found if SINCE <= use.at < UNTIL), "acme", tree=True)
    asked.sort(key=lambda use: (use.at, f"use-{use.number}"), reverse=True)
    assert [(row["id"], row["account"], row["data"]) for row in rows] == [
        (f"use-{use.number}", use.account, use.data) for use in asked
    ]
    assert all((row["price_version"] is None) == (row["amounts"] == {}) for row in rows)


async def test_use_is_broken_down_by_what_events_say(driver: Driver, http: httpx2.AsyncClient) -> None:
    found = uses(300)
    await log(driver, found)
    query = {"account": "*", "from": SINCE.isoformat(), "to": UNTIL.isoformat()}
    query["group_by"] = "type,provider,model,feature,own_key,endpoint,status"
    rows = (await http.get(f"/api/v1/usage?{urlencode(query)}")).json()["usage"]
    expected = Counter(
        (
            use.type,
            use.data.get("provider", ""),
            use.data.get("model", ""),
            use.data.get("feature", ""),
            str(use.data.get("own_key", False)).lower(),
            use.said("endpoint") or "",
            str(use.said("status")),
        )
        for use in found
        if SINCE <= use.at < UNTIL
    )
    assert {tuple(row[name] for name in query["group_by"].split(",")): row["events"] for row in rows} == expected


async def test_all_that_is_wrong_with_a_question_is_named(http: httpx2.AsyncClient) -> None:
    for what, query, pointers in (
        ("history", {"account": "/", "zone": "Mars/Olympus", "from": "now"}, ["account", "from", "zone"]),
        ("history", {"from": "2010-01-01T00:00:00Z"}, ["to"]),
        ("history", {"from": "2020-01-01T00:00:00Z", "size": "hour"}, ["size"]),
        ("summary", {"account": None, "month": "2026-13", "zone": "x"}, ["zone", "month", "account"]),
        ("summary", {}, ["month"]),
        ("calls", {"group_by": "endpoint,colour,endpoint"}, ["group_by", "group_by"]),
        ("events", {"to": "2026-01-01T00:00:00Z"}, ["to"]),
    ):
        answer = await ask(http, what, **query)
        assert answer.status_code == 400, answer.text
        assert [each["pointer"] for each in answer.json()["errors"]] == [f"/query/{name}" for name in pointers]
    for what, query in (("history", {}), ("summary", {"month": "2026-11"}), ("calls", {}), ("events", {})):
        for place in ("bad", "WyIiXQ==", "WyJ4IiwgIngiLCAieCIsICJ4Il0="):
            if what != "summary" or place != "WyIiXQ==":
                assert (await ask(http, what, **query, after=place)).status_code == 422, (what, place)
    assert (await http.get("/api/v1/usage/history", headers={"Authorization": "Bearer no"})).status_code == 401
