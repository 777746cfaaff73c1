"""Laws of foreign subjects: use waits for an alias, goes to its account, is charged once, whatever dies in between."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import httpx2
import pytest

from contracts.partition import PARTITION_COUNT, partition_of
from contracts.streams import USAGE, usage_subject
from services.kit.broker import connect_nats
from services.kit.clock import now
from services.kit.database import Writer, open_pool
from services.kit.publish import Message, publish
from services.metering import engine, handlers, store
from services.metering.engine import Rerouter
from services.metering.handlers import Known
from services.metering.store import Alias
from tests.conftest import Database
from tests.integration.metering.driving import Driver, Json, batch_of
from tests.unit.metering.building import event, price_book

pytestmark = pytest.mark.anyio


def subject_in(partition: int, name: str = "Müller & Söhne") -> str:
    """A subject that is no account id, of a partition."""
    return next(each for number in range(10_000) if partition_of(each := f"{name} {number}") == partition)


ACCOUNT: Final = "acme/ana"
ELSEWHERE: Final = subject_in((partition_of(ACCOUNT) + 1) % PARTITION_COUNT)
NEARBY: Final = subject_in(partition_of(ACCOUNT))


async def map_to(http: httpx2.AsyncClient, driver: Driver, subject: str, account: str = ACCOUNT) -> httpx2.Response:
    return await http.put(
        f"/api/v1/aliases/{quote(subject, safe='')}", json={"account": account}, headers=driver.headers("operator")
    )


async def logged(driver: Driver) -> list[tuple[Any, ...]]:
    return await driver.rows("SELECT partition, event_id, account, subject FROM usage_log ORDER BY event_id")


@pytest.mark.parametrize("subject", [NEARBY, ELSEWHERE], ids=["same partition", "another partition"])
async def test_use_of_an_unknown_subject_waits_and_is_charged_once_when_it_is_mapped(
    driver: Driver, subject: str
) -> None:
    async with driver.running() as http:
        await driver.open(ACCOUNT)
        await driver.until_open([ACCOUNT])
        await driver.publish(event(number, subject=subject) for number in (1, 2, 1))
        await driver.publish([event(3, subject=subject, data_model="gpt-unheard-of")])
        await driver.until_counted(new=3, unmapped=3, duplicate=1)
        listed = await http.get("/api/v1/set-aside?reason=unmapped", headers=driver.headers("operator"))
        waiting = listed.json()["set_aside"]
        assert {(each["id"], each["account"], each["key"]) for each in waiting} == {
            (f"use-{number}", None, subject) for number in (1, 2, 3)
        }
        assert await logged(driver) == []
        assert (await map_to(http, driver, subject)).status_code == 201
        sent_on = {"rerouted": 3} if subject == ELSEWHERE else {}
        await driver.until_counted(new=3, charged=2, unpriced=1, duplicate=1, **sent_on)
        # And what comes from now on goes there at once; repeats stay repeats.
        await driver.publish(event(number, subject=subject) for number in (4, 1, 4))
        sent_on = {"rerouted": 4} if subject == ELSEWHERE else {}
        await driver.until_counted(new=4, charged=3, unpriced=1, duplicate=3, **sent_on)
        assert await logged(driver) == [
            (partition_of(ACCOUNT), f"use-{number}", ACCOUNT, subject) for number in (1, 2, 3, 4)
        ]
    charged = await driver.charged()
    assert {name: line.account for name, line in charged.items()} == {f"use-{number}": ACCOUNT for number in (1, 2, 4)}


@pytest.mark.parametrize("other", [False, True], ids=["same partition", "another partition"])
async def test_use_that_waited_under_a_name_that_might_be_an_accounts_moves_to_the_account(
    driver: Driver, other: bool
) -> None:
    """`customer-7` is the id of an account as it stands, and nobody opened one."""
    wanted = (partition_of(ACCOUNT) + other) % PARTITION_COUNT
    subject = next(each for number in range(10_000) if partition_of(each := f"customer-{number}") == wanted)
    async with driver.running() as http:
        await driver.open(ACCOUNT)
        await driver.until_open([ACCOUNT])
        await driver.publish([event(1, subject=subject, region="eu"), event(2, subject=subject, type="api-calls")])
        await driver.until_counted(new=2, unattributed=2)
        before = await driver.rows("SELECT event_id, data, context, occurred_at FROM usage_log ORDER BY event_id")
        assert (await map_to(http, driver, subject)).status_code == 201
        sent_on = {"rerouted": 2} if other else {}
        await driver.until_counted(new=2, charged=1, unpriced=1, **sent_on)
        assert await logged(driver) == [(partition_of(ACCOUNT), f"use-{number}", ACCOUNT, subject) for number in (1, 2)]
        after = await driver.rows("SELECT event_id, data, context, occurred_at FROM usage_log ORDER BY event_id")
        assert after == before
        # The ledger opens an account of that name: what comes is the alias's, as before, batch after batch.
        await driver.open(subject)
        await driver.until_open([subject])
        for repeats, number in enumerate((3, 4, 5), start=1):
            await driver.publish(event(each, subject=subject, region="eu") for each in (1, number))
            sent_on = {"rerouted": 2 + repeats} if other else {}
            await driver.until_counted(new=2 + repeats, charged=1 + repeats, unpriced=1, duplicate=repeats, **sent_on)
    assert {line.account for line in (await driver.charged()).values()} == {ACCOUNT}


async def test_the_account_of_an_alias_need_not_be_open(driver: Driver) -> None:
    async with driver.running() as http:
        await map_to(http, driver, ELSEWHERE)
        await map_to(http, driver, NEARBY)
        await driver.publish([event(1, subject=ELSEWHERE), event(2, subject=NEARBY), event(3, subject=ACCOUNT)])
        await driver.until_counted(new=3, unattributed=3, rerouted=1)
        await driver.open(ACCOUNT)
        await driver.until_counted(new=3, charged=3, rerouted=1)


async def test_one_id_under_two_names_of_an_account_is_one_use_or_a_conflict(driver: Driver) -> None:
    """The identity is the account's partition, source and id, whatever the account was called."""
    async with driver.running() as http:
        await driver.open(ACCOUNT)
        await driver.until_open([ACCOUNT])
        await map_to(http, driver, ELSEWHERE)
        await driver.publish([event(1, subject=ACCOUNT)])
        await driver.until_counted(new=1, charged=1)
        await driver.publish([event(1, subject=ELSEWHERE)])
        await driver.until_counted(new=1, charged=1, rerouted=1, conflicting=1)
        (conflict,) = (await http.get("/api/v1/conflicts", headers=driver.headers("operator"))).json()["conflicts"]
        assert (conflict["id"], conflict["account"]) == ("use-1", ACCOUNT)


async def test_an_alias_is_set_once_and_changed_only_by_deleting_it(driver: Driver) -> None:
    headers = driver.headers("operator")
    async with driver.running() as http:
        first = await map_to(http, driver, "a/b c/ü?", "acme")
        assert (first.status_code, first.json()["recorded_by"]) == (201, "operator")
        assert (await map_to(http, driver, "a/b c/ü?", "acme")).json() == first.json()
        taken = await map_to(http, driver, "a/b c/ü?", "other")
        assert (taken.status_code, taken.json()["code"], taken.json()["account"]) == (409, "alias_taken", "acme")
        path = f"/api/v1/aliases/{quote('a/b c/ü?', safe='')}"
        assert (await http.get(path, headers=headers)).json() == first.json()
        for _ in range(2):
            assert (await http.delete(path, headers=headers)).status_code == 204
        assert (await http.get(path, headers=headers)).status_code == 404
        assert (await map_to(http, driver, "a/b c/ü?", "other")).status_code == 201


async def test_a_wrong_alias_is_refused_with_its_reason(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.open("acme")
        await driver.until_open(["acme"])
        for subject, account, status, code in (
            ("acme", "other", 409, "names_an_account"),
            ("other", "other", 422, "alias_of_itself"),
            ("x", "not an account", 422, "invalid_request"),
            ("a\x07b", "acme", 422, "invalid_request"),
            ("x " * 200, "acme", 422, "invalid_request"),
        ):
            answer = await map_to(http, driver, subject, account)
            assert (answer.status_code, answer.json()["code"]) == (status, code), subject
        assert (await http.get("/api/v1/aliases", headers=driver.headers("operator"))).json()["aliases"] == []
        for method in ("GET", "PUT", "DELETE"):
            answer = await http.request(method, "/api/v1/aliases/x", headers=driver.headers("demo"), json={})
            assert answer.status_code == 403
        assert (await http.get("/api/v1/aliases", headers=driver.headers("demo"))).status_code == 403


async def test_aliases_are_paged(driver: Driver) -> None:
    async with driver.running() as http:
        for number in range(5):
            await map_to(http, driver, f"customer {number}")
        seen: list[str] = []
        query = "limit=2"
        for _ in range(3):
            page = (await http.get(f"/api/v1/aliases?{query}", headers=driver.headers("operator"))).json()
            seen += [each["subject"] for each in page["aliases"]]
            query = f"limit=2&after={page['next_after']}"
        assert page["next_after"] is None
        assert sorted(seen) == [f"customer {number}" for number in range(5)]


async def test_what_was_taken_through_an_alias_stays_whatever_becomes_of_the_alias(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.open(ACCOUNT, "other")
        await driver.until_open([ACCOUNT, "other"])
        await map_to(http, driver, ELSEWHERE)
        await driver.publish([event(1, subject=ELSEWHERE)])
        await driver.until_counted(new=1, charged=1, rerouted=1)
        path = f"/api/v1/aliases/{quote(ELSEWHERE, safe='')}"
        await http.delete(path, headers=driver.headers("operator"))
        await driver.publish([event(1, subject=ELSEWHERE), event(2, subject=ELSEWHERE)])
        await driver.until_counted(new=2, charged=1, unmapped=1, rerouted=1, duplicate=1)
        await map_to(http, driver, ELSEWHERE, "other")
        await driver.until_counted(new=2, charged=2, rerouted=2, duplicate=1)
        await driver.publish([event(number, subject=ELSEWHERE) for number in (1, 2)])
        await driver.until_counted(new=2, charged=2, rerouted=2, duplicate=3)
    assert {name: line.account for name, line in (await driver.charged()).items()} == {
        "use-1": ACCOUNT,
        "use-2": "other",
    }


# Dying ----------------------------------------------------------------------------------------------------------------


async def store_alias(driver: Driver, writer: Writer, subject: str, account: str = ACCOUNT) -> None:
    async with writer.transaction() as connection:
        assert await handlers.add_alias(connection, Alias(subject, account, now(), "operator")) is True


@asynccontextmanager
async def rerouter(driver: Driver, database: Database) -> AsyncIterator[Rerouter]:
    """A process as far as sending on is concerned: it holds all partitions."""
    client = await connect_nats(driver.settings)
    writer = Writer(database.url("metering"), name="rerouter")
    pool = await open_pool(database.url("metering"), name="rerouter-pool")
    try:
        yield Rerouter(
            client=client,
            writer=writer,
            pool=pool,
            partitions=lambda: frozenset(range(PARTITION_COUNT)),
            price_book=price_book,
            notify=lambda _rows: None,
        )
    finally:
        await writer.close()
        await pool.close()
        await client.close()


async def ingest(writer: Writer, events: Sequence[Json]) -> None:
    await handlers.ingest(batch_of(events, price_book=price_book()), writer=writer, known=Known())


class Dying(Exception):
    """The process is gone."""


async def test_whoever_dies_in_between_leaves_the_rest_to_the_next(
    driver: Driver, database: Database, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two transactions of a mapping; after the stream has what is sent on, before that is noted; and so on."""
    monkeypatch.setattr(handlers.aliases, "MAPPED_ROWS_MAX", 40)
    monkeypatch.setattr(engine, "REROUTE_ROWS_MAX", 30)
    subjects = {"nearby": NEARBY, "elsewhere": ELSEWHERE, "might-be-an-account": "customer-7"}
    numbers = dict(zip(subjects.values(), (range(0, 100), range(100, 200), range(200, 300)), strict=True))
    for subject, its in numbers.items():
        await ingest(writer, [event(number, subject=subject) for number in its])
    assert (await driver.counters())["unmapped"] == 200
    assert (await driver.counters())["unattributed"] == 100
    async with writer.transaction() as connection:
        await store.add_to_directory(connection, partition=partition_of(ACCOUNT), account=ACCOUNT, opened_at=now())
    for subject in subjects.values():
        await store_alias(driver, writer, subject)

    chance = random.Random(11)
    deaths = 0

    def dying(function: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        async def instead(*arguments: Any, **named: Any) -> Any:
            nonlocal deaths
            if before and deaths < 30 and chance.random() < 0.4:
                deaths += 1
                raise Dying
            found = await function(*arguments, **named)
            if not before and deaths < 30 and chance.random() < 0.4:
                deaths += 1
                raise Dying
            return found

        return instead

    for name in ("take_waiting", "settle_alias", "log_usage", "add_reroutes", "find_reroutes"):
        monkeypatch.setattr(store, name, dying(getattr(store, name), before=chance.random() < 0.5))
    monkeypatch.setattr(store, "delete_reroutes", dying(store.delete_reroutes, before=True))

    async with rerouter(driver, database) as sending:
        for _ in range(400):
            try:
                await sending.map_waiting()
                await sending.send_on()
            except Dying:
                continue
            left = await driver.rows("SELECT count(*) FROM reroutes")
            pending = await driver.rows("SELECT count(*) FROM aliases WHERE pending")
            if left == pending == [(0,)]:
                break
    monkeypatch.undo()
    async with driver.running():
        await driver.until("SELECT count(*) FROM usage_log WHERE bundle_number IS NOT NULL", 300)
    assert deaths >= 10
    charged = await driver.charged()
    assert {line.account for line in charged.values()} == {ACCOUNT}
    assert len(charged) == 300
    counters = await driver.counters()
    assert (counters["new"], counters["charged"], counters["rerouted"]) == (300, 300, 200)
    assert counters["unmapped"] == counters["unattributed"] == counters["conflicting"] == 0
    assert {row[3] for row in await logged(driver)} == set(subjects.values())


async def test_a_new_alias_is_followed_by_whoever_runs_next(driver: Driver, writer: Writer) -> None:
    await ingest(writer, [event(1, subject=ELSEWHERE), event(2, subject=NEARBY)])
    await store_alias(driver, writer, ELSEWHERE)
    await store_alias(driver, writer, NEARBY)
    async with driver.running():
        await driver.until_counted(new=2, unattributed=2, rerouted=1)


async def test_mapping_may_race_with_use(driver: Driver, database: Database) -> None:
    """Every use is charged once, whether its batch or the alias got the partition first."""
    book, known = price_book(), Known()
    subjects = [f"racing {number}" for number in range(30)]
    ingesting, mapping = (Writer(database.url("metering"), name=name) for name in ("ingesting", "mapping"))
    chance = random.Random(5)
    async with mapping.transaction() as connection:
        await store.add_to_directory(connection, partition=partition_of(ACCOUNT), account=ACCOUNT, opened_at=now())

    async def use() -> None:
        for start in range(0, 600, 30):
            events = [event(number, subject=subjects[number % 30]) for number in range(start, start + 30)]
            await handlers.ingest(batch_of(events, price_book=book), writer=ingesting, known=known)
            await asyncio.sleep(chance.random() * 0.01)

    async def map_them() -> None:
        for subject in subjects:
            await store_alias(driver, mapping, subject)
            await handlers.charge_mapped(subject, writer=mapping, price_book=book)
            await asyncio.sleep(chance.random() * 0.01)

    await asyncio.gather(use(), map_them())
    await ingesting.close()
    await mapping.close()
    async with driver.running():
        await driver.until("SELECT count(*) FROM usage_log WHERE bundle_number IS NOT NULL", 600)
    assert len(await driver.charged()) == 600
    assert await driver.rows("SELECT 1 FROM set_aside") == []


async def test_nobody_but_metering_says_whose_use_it_is(driver: Driver) -> None:
    """A source may not publish where metering sends on; what it says in headers is not believed."""
    async with driver.running():
        await driver.open(ACCOUNT, "acme")
        await driver.until_open([ACCOUNT, "acme"])
        message = Message(
            usage_subject(partition=partition_of("acme"), source="demo"),
            payload=f"{event(1, subject='acme')}".replace("'", '"').encode(),
            message_id=None,
            headers={"Scrip-Account": ACCOUNT},
        )
        await publish(driver.demo_nats, stream=USAGE, message=message)
        await driver.until_counted(new=1, charged=1)
    (line,) = (await driver.charged()).values()
    assert line.account == "acme"
