"""What an account used is summed exactly, by what is asked for, page by page; a bad question hears what is wrong."""

import random
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final
from urllib.parse import urlencode

import httpx2
import pytest

from contracts.partition import partition_of
from contracts.pricing import Rated
from services.kit.catalogue import load_catalogue
from services.kit.clock import now
from services.kit.database import Writer
from services.metering import handlers, store, translate
from services.metering.handlers import Known
from tests.integration.metering.driving import Driver, Json, batch_of
from tests.unit.metering.building import NOON, event

pytestmark = pytest.mark.anyio

ACCOUNTS: Final = ("acme", "acme/ml", "acme/ml/ana", "acme-ml", "other")
MODELS: Final = ("gpt-4o-mini", "gpt-4o", "gpt-unheard-of")
SINCE: Final = datetime(2026, 11, 1, tzinfo=UTC)


def events() -> list[Json]:
    chance = random.Random(5)
    return [
        event(
            number,
            subject=chance.choice(ACCOUNTS),
            time=(SINCE + timedelta(hours=chance.randrange(0, 24 * 5))).isoformat(),
            data_model=chance.choice(MODELS),
            data_input_tokens=chance.randrange(1, 5000),
            data_output_tokens=chance.randrange(1, 900),
            data_own_key=chance.random() < 0.2,
        )
        for number in range(600)
    ]


def catalogue_book(driver: Driver) -> Any:
    catalogue = load_catalogue(driver.settings.catalogue_file)
    return translate.read_price_book(catalogue.section("price_versions"), units=catalogue.units)


async def log(driver: Driver, writer: Writer, found: list[Json]) -> None:
    async with writer.transaction() as connection:
        for account in ACCOUNTS:
            await store.add_to_directory(connection, partition=partition_of(account), account=account, opened_at=now())
    await handlers.ingest(batch_of(found, price_book=catalogue_book(driver)), writer=writer, known=Known())


async def ask(http: httpx2.AsyncClient, driver: Driver, **query: Any) -> httpx2.Response:
    values = {"account": "acme", "from": SINCE.isoformat(), "to": (SINCE + timedelta(days=5)).isoformat()} | query
    text = urlencode({name: value for name, value in values.items() if value is not None})
    return await http.get(f"/api/v1/usage?{text}", headers=driver.headers("operator"))


def expected(driver: Driver, found: list[Json], *, account: str, tree: bool, group_by: list[str]) -> dict[Any, Any]:
    """The same sums, in memory."""
    book = catalogue_book(driver)
    sums: dict[Any, Any] = defaultdict(lambda: defaultdict(Decimal))
    for each in found:
        own = each["subject"] == account or (tree and each["subject"].startswith(f"{account}/"))
        at = datetime.fromisoformat(each["time"])
        if not own or not SINCE <= at < SINCE + timedelta(days=5):
            continue
        values = {
            "account": each["subject"],
            "day": at.date().isoformat(),
            "model": each["data"]["model"],
            "provider": "openai",
        }
        row = sums[tuple(values[name] for name in group_by)]
        row["events"] += 1
        row["input_tokens"] += each["data"]["input_tokens"]
        row["output_tokens"] += each["data"]["output_tokens"]
        row["own_key_events"] += each["data"]["own_key"]
        (usage,) = batch_of([each], price_book=book).usages
        price = book.price(usage)
        if isinstance(price, Rated):
            row["charged_events"] += 1
            for unit, amount in price.amounts.items():
                row[unit] += Decimal(amount).scaleb(-book.units[unit].scale)
    return {key: {name: value for name, value in row.items() if value} for key, row in sums.items()}


def flat(row: Json, group_by: list[str]) -> tuple[Any, dict[str, Decimal]]:
    numbers = {
        name: Decimal(row[name])
        for name in ("events", "input_tokens", "output_tokens", "own_key_events", "charged_events")
    }
    numbers |= {unit: Decimal(amount) for unit, amount in row["amounts"].items()}
    assert all("E" not in amount for amount in row["amounts"].values())
    return tuple(row[name] for name in group_by), {name: value for name, value in numbers.items() if value}


async def test_sums_are_exact_by_whatever_they_are_grouped(driver: Driver, writer: Writer) -> None:
    found = events()
    await log(driver, writer, found)
    async with driver.running() as http:
        for group_by in (["model", "day"], ["day"], ["account", "provider", "model"], [], ["day", "account"]):
            for account in ("acme", "acme/ml"):
                for tree in (False, True):
                    answer = await ask(
                        http, driver, account=account, tree=str(tree).lower(), group_by=",".join(group_by)
                    )
                    assert answer.status_code == 200, answer.text
                    rows = dict(flat(row, group_by) for row in answer.json()["usage"])
                    assert rows == expected(driver, found, account=account, tree=tree, group_by=group_by)
                    assert list(rows) == sorted(rows)
        assert (await ask(http, driver, account="nobody")).json() == {"usage": [], "next_after": None}


async def test_pages_are_the_whole_in_order(driver: Driver, writer: Writer) -> None:
    await log(driver, writer, events())
    async with driver.running() as http:
        query = {"tree": "true", "group_by": "account,day,model"}
        whole = (await ask(http, driver, **query)).json()["usage"]
        rows: list[Json] = []
        after = None
        while True:
            page = (await ask(http, driver, **query, limit=7, after=after)).json()
            rows += page["usage"]
            after = page["next_after"]
            if after is None:
                break
        assert len(whole) > 20
        assert rows == whole
        assert (await ask(http, driver, group_by="day", after="bad")).status_code == 422
        first = (await ask(http, driver, **query, limit=1)).json()["next_after"]
        assert (await ask(http, driver, group_by="day", after=first)).status_code == 422


async def test_all_that_is_wrong_with_a_question_is_named(driver: Driver) -> None:
    async with driver.running() as http:
        wrong = {"account": "/acme", "from": "yesterday", "to": None, "group_by": "model,colour,model"}
        answer = await ask(http, driver, **wrong)
        assert answer.status_code == 400
        pointers = [each["pointer"] for each in answer.json()["errors"]]
        assert pointers == ["/query/account", "/query/from", "/query/to", "/query/group_by", "/query/group_by"]
        for to in (SINCE, SINCE - timedelta(days=1), SINCE + timedelta(days=93)):
            answer = await ask(http, driver, to=to.isoformat())
            assert [each["pointer"] for each in answer.json()["errors"]] == ["/query/to"]
        assert (await ask(http, driver, to=(SINCE + timedelta(days=92)).isoformat())).status_code == 200
        missing = await http.get("/api/v1/usage", headers=driver.headers("operator"))
        assert [each["pointer"] for each in missing.json()["errors"]] == [
            "/query/account",
            "/query/from",
            "/query/to",
        ]
        assert (await http.get("/api/v1/usage", headers=driver.headers("demo"))).status_code == 403
        assert (await ask(http, driver, account="%")).status_code == 400
    assert NOON < SINCE
