"""Dying, losing and repeating, between any two steps and side by side: everything is charged once, nothing is lost."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import psycopg
import pytest
from nats.aio.msg import Msg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from contracts.envelope import message_bodies
from contracts.partition import partition_of
from contracts.streams import METERING_CONSUMER, USAGE, usage_subject
from services.kit.broker import connect_nats
from services.kit.clock import now
from services.kit.database import Writer
from services.kit.dead_letters import list_letters
from services.kit.reader import PullReader
from services.metering import handlers, store, translate
from services.metering.domain.usage import Usage
from services.metering.handlers import Known
from services.metering.subscribers import UsageSubscriber
from tests.conftest import Database
from tests.eventually import eventually
from tests.integration.metering.driving import Driver, batch_of
from tests.unit.metering.building import body, event, price_book

pytestmark = pytest.mark.anyio

ACCOUNTS: Final = [f"acme-{number}" for number in range(7)]


async def open_all(driver: Driver, writer: Writer) -> None:
    async with writer.transaction() as connection:
        for account in ACCOUNTS:
            await store.add_to_directory(connection, partition=partition_of(account), account=account, opened_at=now())


class ForgetfulReader(PullReader):
    """Loses the acknowledgements of its first batches, as a process does that is killed after the commit."""

    losses = 2

    async def ack(self, messages: Iterable[Msg]) -> None:
        if self.losses:
            self.losses -= 1
            await self.nak(messages)
        else:
            await super().ack(messages)


@asynccontextmanager
async def subscriber(
    driver: Driver, *, reader: type[PullReader] = PullReader, batch_size_max: int = 200
) -> AsyncIterator[None]:
    """A process as far as usage is concerned."""
    client = await connect_nats(driver.settings)
    writer = Writer(driver.settings.database_url, name="subscriber")
    running = UsageSubscriber(
        reader=reader(client, stream=USAGE, ack_wait_seconds=30, batch_size_max=batch_size_max),
        durable=METERING_CONSUMER,
        writer=writer,
        price_book=price_book,
        known=Known(),
        notify=lambda _rows: None,
        age_max=timedelta(days=driver.settings.metering_age_days_max),
    )
    task = asyncio.create_task(running.run())
    try:
        yield
    finally:
        running.stop()
        await asyncio.wait_for(task, 10)
        await writer.close()
        await client.close()


async def acknowledged(driver: Driver) -> bool:
    info = await driver.operator_nats.jetstream(timeout=5).consumer_info(USAGE, METERING_CONSUMER)
    return (info.num_pending, info.num_ack_pending) == (0, 0)


async def test_dying_between_commit_and_acknowledgement_charges_once(driver: Driver, writer: Writer) -> None:
    await open_all(driver, writer)
    await driver.publish(event(number) for number in range(500))
    async with subscriber(driver, reader=ForgetfulReader):
        await eventually(lambda: acknowledged(driver), seconds=15)
    counters = await driver.counters()
    assert (counters["new"], counters["charged"]) == (500, 500)
    assert counters["duplicate"] > 0
    assert len(await driver.charged()) == 500


async def test_dying_before_the_commit_loses_nothing(
    driver: Driver, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when whoever read the messages has them buffered: they are given back, or time out."""
    await open_all(driver, writer)
    await driver.publish(event(number) for number in range(500))
    ingest, attempts = handlers.ingest, 0

    async def dying(*arguments: Any, **named: Any) -> handlers.Ingested:
        nonlocal attempts
        attempts += 1
        if attempts <= 3:
            raise psycopg.OperationalError("the server closed the connection unexpectedly")
        return await ingest(*arguments, **named)

    monkeypatch.setattr(handlers, "ingest", dying)
    async with subscriber(driver):
        await eventually(lambda: acknowledged(driver), seconds=15)
    assert len(await driver.charged()) == 500
    assert (await driver.counters())["duplicate"] == 0


async def test_two_processes_at_once_charge_once_and_number_without_gaps(driver: Driver, writer: Writer) -> None:
    await open_all(driver, writer)
    deliveries = [event(number) for number in range(400)] * 3
    random.Random(3).shuffle(deliveries)
    async with subscriber(driver, batch_size_max=100), subscriber(driver, batch_size_max=130):
        for start in range(0, len(deliveries), 100):
            await driver.publish(deliveries[start : start + 100])
        await eventually(lambda: acknowledged(driver), seconds=15)
    assert {name: count for name, count in (await driver.counters()).items() if count} == {
        "new": 400,
        "charged": 400,
        "duplicate": 800,
    }
    assert len(await driver.charged()) == 400


async def test_many_handlers_on_the_same_events_charge_once_and_never_deadlock(
    driver: Driver, database: Database, writer: Writer
) -> None:
    await open_all(driver, writer)
    book = price_book()

    async def ingest_all(seed: int) -> int:
        own = Writer(database.url("metering"), name=f"handler-{seed}")
        chance, new = random.Random(seed), 0
        for start in range(0, 300, 60):
            events = [event(number) for number in range(start, start + 60)] * 2
            chance.shuffle(events)
            new += (await handlers.ingest(batch_of(events, price_book=book), writer=own, known=Known())).counts.new
        await own.close()
        return new

    assert sum(await asyncio.gather(*(ingest_all(seed) for seed in range(4)))) == 300
    assert len(await driver.charged()) == 300
    assert (await driver.counters())["duplicate"] == 4 * 600 - 300


async def test_whoever_holds_a_head_claims_its_keys_and_waits_for_nobody(
    driver: Driver, database: Database, writer: Writer
) -> None:
    """A batch has claimed nothing while it waits for a head: else the two would wait for each other."""
    await open_all(driver, writer)
    batch = batch_of([event(number) for number in range(20)], price_book=price_book())
    own = Writer(database.url("metering"), name="waiting")
    async with writer.transaction() as connection:
        await store.lock_heads(connection, {usage.partition for usage in batch.firsts})
        waiting = asyncio.create_task(handlers.ingest(batch, writer=own, known=Known()))
        await eventually(lambda: waits_for_a_lock(driver, "waiting"))
        await connection.execute("SET LOCAL lock_timeout = '2s'")
        assert await store.claim(connection, batch.firsts) == {}
    assert (await waiting).counts.duplicate == 20
    await own.close()


async def waits_for_a_lock(driver: Driver, name: str) -> bool:
    waiting = "SELECT FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted AND application_name = %s"
    return bool(await driver.rows(waiting, name))


async def test_of_a_batch_that_is_partly_known_the_rest_is_claimed(driver: Driver, writer: Writer) -> None:
    await open_all(driver, writer)
    book, known = price_book(), Known()
    odd = [event(number, id=f"use\\{number} \\N") for number in range(5)]
    before = batch_of([*(event(number) for number in range(0, 40, 3)), *odd[:2]], price_book=book)
    assert (await handlers.ingest(before, writer=writer, known=known)).counts.new == 16
    after = batch_of([*(event(number) for number in range(40)), *odd], price_book=book)
    counts = (await handlers.ingest(after, writer=writer, known=known)).counts
    assert (counts.new, counts.duplicate, counts.charged) == (29, 16, 29)
    seen = await driver.rows("SELECT source, event_id, body_hash FROM seen")
    assert sorted(seen) == sorted((usage.source, usage.event_id, usage.body_hash) for usage in after.firsts)


async def test_losing_the_database_again_and_again_charges_once(
    driver: Driver, database: Database, writer: Writer
) -> None:
    await open_all(driver, writer)
    superuser = database.superuser_url.get_secret_value()
    async with (
        subscriber(driver, batch_size_max=50),
        await psycopg.AsyncConnection.connect(superuser, autocommit=True) as admin,
    ):
        killed = 0
        for start in range(0, 1_000, 100):
            await driver.publish(event(number) for number in range(start, start + 100))
            for _ in range(3):
                cursor = await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'subscriber' AND datname = %s AND state <> 'idle'",
                    [database.name],
                )
                killed += len(await cursor.fetchall())
                await asyncio.sleep(0.01)
        await eventually(lambda: acknowledged(driver), seconds=20)
    assert killed > 0
    assert len(await driver.charged()) == 1_000
    assert (await driver.counters())["new"] == 1_000


Failing = Callable[[Exception, int], None]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Make logging the use `use-13` fail, a number of times."""
    log_usage = store.log_usage

    def fail(error: Exception, times: int) -> None:
        left = times

        async def logging(connection: AsyncConnection[TupleRow], usages: Sequence[Usage], **named: Any) -> None:
            nonlocal left
            if left and any(usage.event_id == "use-13" for usage in usages):
                left -= 1
                raise error
            await log_usage(connection, usages, **named)

        monkeypatch.setattr(store, "log_usage", logging)

    return fail


async def test_what_postgres_cannot_store_is_dead_lettered_alone(
    driver: Driver, writer: Writer, failing: Failing
) -> None:
    await open_all(driver, writer)
    failing(psycopg.DataError("unsupported Unicode escape sequence"), 1_000)
    await driver.publish(event(number) for number in range(100))
    async with subscriber(driver):
        await eventually(lambda: acknowledged(driver), seconds=15)
    assert {name: count for name, count in (await driver.counters()).items() if count} == {
        "new": 99,
        "charged": 99,
        "dead": 1,
    }
    (letter,) = await list_letters(driver.connection, limit=10)
    assert "unsupported Unicode escape sequence" in letter.reason


async def publish_as_one(driver: Driver, numbers: Iterable[int]) -> None:
    """Events of one account in one message."""
    bodies = (body(number, subject="acme-1") for number in numbers)
    subject = usage_subject(partition=partition_of("acme-1"), source="demo")
    for payload in message_bodies(bodies):
        await driver.publish_raw(payload, subject=subject)


async def test_what_postgres_cannot_store_of_a_message_is_dead_lettered_alone(
    driver: Driver, writer: Writer, failing: Failing
) -> None:
    await open_all(driver, writer)
    failing(psycopg.DataError("unsupported Unicode escape sequence"), 1_000)
    await publish_as_one(driver, range(100))
    await driver.publish(event(number) for number in range(100, 120))
    async with subscriber(driver):
        await eventually(lambda: acknowledged(driver), seconds=15)
    # On a slow machine halves that succeeded are delivered again while others are tried.
    counted = {name: count for name, count in (await driver.counters()).items() if count and name != "duplicate"}
    assert counted == {"new": 119, "charged": 119, "dead": 1}
    (letter,) = await list_letters(driver.connection, limit=10)
    assert letter.payload == body(13, subject="acme-1")
    assert len(await driver.charged()) == 119


async def test_an_event_that_fails_holds_up_none_of_its_message_and_is_tried_again(
    driver: Driver, writer: Writer, failing: Failing
) -> None:
    await open_all(driver, writer)
    # Its message, then alone: with the message delivered again it works.
    failing(RuntimeError("a mistake of ours"), 2)
    await publish_as_one(driver, range(100))
    async with subscriber(driver):
        await driver.until_counted(new=99, charged=99)
        await eventually(lambda: acknowledged(driver), seconds=15)
    assert {name: count for name, count in (await driver.counters()).items() if count} == {
        "new": 100,
        "charged": 100,
        "duplicate": 99,
    }
    assert len(await driver.charged()) == 100


async def test_what_we_fail_to_read_is_dead_lettered_alone(
    driver: Driver, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced = translate.priced

    def failing_once(usage: Usage, *arguments: Any, **named: Any) -> translate.Priced:
        if usage.event_id == "use-13":
            raise ZeroDivisionError("a mistake of ours")
        return priced(usage, *arguments, **named)

    monkeypatch.setattr(translate, "priced", failing_once)
    await open_all(driver, writer)
    await driver.publish(event(number) for number in range(100))
    async with subscriber(driver):
        await eventually(lambda: acknowledged(driver), seconds=15)
    assert len(await driver.charged()) == 99
    (letter,) = await list_letters(driver.connection, limit=10)
    assert "a mistake of ours" in letter.reason


async def test_an_event_that_fails_for_no_known_reason_holds_up_nobody_and_is_tried_again(
    driver: Driver, writer: Writer, failing: Failing
) -> None:
    await open_all(driver, writer)
    # All of it, a half, a quarter, …, alone: then it works.
    failing(RuntimeError("a mistake of ours"), 8)
    await driver.publish(event(number) for number in range(100))
    async with subscriber(driver):
        await driver.until_counted(new=99, charged=99)
        await eventually(lambda: acknowledged(driver), seconds=15)
    assert len(await driver.charged()) == 100


async def test_stopping_gives_back_what_is_not_ingested(driver: Driver, writer: Writer) -> None:
    await open_all(driver, writer)
    await driver.publish(event(number) for number in range(900))
    for _ in range(3):
        async with subscriber(driver, batch_size_max=50):
            await asyncio.sleep(0.02)
    async with subscriber(driver):
        await eventually(lambda: acknowledged(driver), seconds=15)
    assert len(await driver.charged()) == 900
