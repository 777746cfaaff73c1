"""Use of an account that is not open yet: logged, set aside, and charged once when the account is opened."""

import asyncio
import random
from datetime import UTC, datetime

import pytest
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from contracts.partition import partition_of
from services.kit.database import Writer
from services.metering import handlers
from services.metering.handlers import Known
from tests.conftest import Database
from tests.integration.metering.driving import Driver, account_opened, batch_of
from tests.unit.metering.building import event, price_book

pytestmark = pytest.mark.anyio


async def test_use_of_an_unknown_account_is_charged_once_when_it_is_opened(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.publish(event(number, subject="late") for number in range(50))
        await driver.publish([event(99, subject="late", data_model="gpt-unheard-of")])
        await driver.publish([event(98, subject="later")])
        await driver.until_counted(new=52, unattributed=52)
        answer = await http.get("/api/v1/set-aside?key=late&limit=30", headers=driver.headers("operator"))
        page = answer.json()
        rest = await http.get(
            f"/api/v1/set-aside?key=late&limit=30&after={page['next_after']}", headers=driver.headers("operator")
        )
        assert len(page["set_aside"]) == 30
        assert len(rest.json()["set_aside"]) == 21
        assert rest.json()["next_after"] is None
        await driver.open("late", "late", "late")
        await driver.until_counted(new=52, charged=50, unpriced=1, unattributed=1)
        await driver.publish(event(number, subject="late") for number in range(50))
        await driver.publish([event(60, subject="late")])
        await driver.until_counted(new=53, charged=51, unpriced=1, unattributed=1, duplicate=50)
    charged = await driver.charged()
    assert sorted(charged) == sorted(f"use-{number}" for number in [*range(50), 60])
    waiting = await driver.rows("SELECT event_id, reason, key FROM set_aside ORDER BY event_id")
    assert waiting == [("use-98", "unattributed", "later"), ("use-99", "unpriced", "openai/gpt-unheard-of")]
    ((unlinked,),) = await driver.rows("SELECT count(*) FROM usage_log WHERE bundle_number IS NULL")
    assert unlinked == 2


async def test_a_child_is_not_open_because_its_parent_is(driver: Driver) -> None:
    async with driver.running():
        await driver.open("acme")
        await driver.until_open(["acme"])
        await driver.publish([event(1, subject="acme/ml"), event(2, subject="acme")])
        await driver.until_counted(new=2, charged=1, unattributed=1)


async def test_more_than_one_bundle_may_have_waited(
    driver: Driver, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And more than one transaction takes; the one that dies in between leaves the rest to the repeat."""
    monkeypatch.setattr(handlers.waiting, "SET_ASIDE_ROWS_MAX", 1_200)
    book, fact = price_book(), account_opened("late")
    await handlers.ingest(
        batch_of((event(number, subject="late") for number in range(3_000)), price_book=book),
        writer=writer,
        known=Known(),
    )

    transactions = 0

    class Dying(Exception):
        pass

    class DyingWriter(Writer):
        def transaction(self):  # type: ignore[no-untyped-def]  # the real one's, once
            nonlocal transactions
            transactions += 1
            if transactions == 2:
                raise Dying
            return writer.transaction()

    with pytest.raises(Dying):
        await handlers.open_account(
            fact, writer=DyingWriter(driver.settings.database_url, name="dying"), price_book=book
        )
    assert (await driver.counters())["charged"] == 1_200
    await handlers.open_account(fact, writer=writer, price_book=book)
    await handlers.open_account(fact, writer=writer, price_book=book)
    assert len(await driver.charged()) == 3_000
    assert (await driver.counters())["unattributed"] == 0
    assert [len(bundle.lines) for bundle in await driver.bundles()] == [1_000, 200, 1_000, 200, 600]


async def test_opening_may_race_with_use(database: Database, driver: Driver) -> None:
    """Every use is charged once, whether its batch or the opening got the partition first."""
    book = price_book()
    accounts = [f"racing-{number}" for number in range(40)]
    known = Known()
    ingesting, opening = (Writer(database.url("metering"), name=name) for name in ("ingesting", "opening"))
    chance = random.Random(7)

    async def use() -> None:
        for start in range(0, 800, 40):
            events = [event(number, subject=accounts[number % 40]) for number in range(start, start + 40)]
            await handlers.ingest(batch_of(events, price_book=book), writer=ingesting, known=known)
            await asyncio.sleep(chance.random() * 0.01)

    async def open_them() -> None:
        for account in accounts:
            await handlers.open_account(account_opened(account), writer=opening, price_book=book)
            await asyncio.sleep(chance.random() * 0.01)

    await asyncio.gather(use(), open_them())
    await ingesting.close()
    await opening.close()
    assert len(await driver.charged()) == 800
    assert {name: count for name, count in (await driver.counters()).items() if count} == {"new": 800, "charged": 800}
    assert await driver.rows("SELECT 1 FROM set_aside") == []


async def test_the_directory_is_looked_at_under_the_lock_of_the_head(
    database: Database, driver: Driver, connection: AsyncConnection[TupleRow]
) -> None:
    """An opening that has the partition and has not committed: the batch waits for it, and charges."""
    book, partition = price_book(), partition_of("late")
    ingesting = Writer(database.url("metering"), name="ingesting")
    async with connection.transaction():
        await connection.execute("SELECT 1 FROM heads WHERE partition = %s FOR UPDATE", [partition])
        await connection.execute("INSERT INTO directory VALUES (%s, 'late', %s)", [partition, datetime.now(UTC)])
        ingest = asyncio.create_task(
            handlers.ingest(batch_of([event(1, subject="late")], price_book=book), writer=ingesting, known=Known())
        )
        await asyncio.sleep(0.3)
        assert not ingest.done()
    assert (await ingest).counts.charged == 1
    await ingesting.close()


async def test_a_fact_that_cannot_be_read_is_dead_lettered_and_blocks_nothing(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.publish_fact(b"{}", account="late")
        await driver.open("late")
        await driver.until_open(["late"])
        listed = (await http.get("/dead-letters", headers=driver.headers("operator"))).json()["dead_letters"]
        assert [letter["stream"] for letter in listed] == ["LEDGER"]
        answer = await http.post(f"/dead-letters/{listed[0]['id']}/redrive", headers=driver.headers("operator"))
        assert answer.status_code == 422
        assert await driver.counters() == dict.fromkeys(await driver.counters(), 0)
