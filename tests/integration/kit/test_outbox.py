"""Laws of the outbox: gapless and in order per partition, whatever breaks; nothing uncommitted is relayed."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from nats.aio.client import Client

from contracts.streams import CHARGES, charges_rated_subject, usage_subject
from infra.servers import EmbeddedNats
from services.kit.clock import now
from services.kit.database import Pool, Writer
from services.kit.outbox import OutboxRow, Relay, prune, stage
from tests.conftest import NatsAccount, refresh_streams
from tests.eventually import eventually
from tests.integration.kit.test_publish import stored
from tests.integration.kit.test_reader import reconnecting

pytestmark = pytest.mark.anyio


@pytest.fixture
async def metering(nats_account: NatsAccount) -> AsyncIterator[Client]:
    client = await nats_account.connect("metering")
    yield client
    await client.close()


def rows(partition: int, numbers: Sequence[int]) -> list[OutboxRow]:
    return [
        OutboxRow(
            partition=partition,
            number=number,
            subject=charges_rated_subject(partition),
            message_id=f"{partition}-{number}",
            payload=f"{partition} {number}".encode(),
            recorded_at=now(),
        )
        for number in numbers
    ]


async def commit(writer: Writer, staged: Sequence[OutboxRow]) -> None:
    async with writer.transaction() as connection:
        await stage(connection, staged)


@asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[Relay]:
    task = asyncio.create_task(relay.run())
    yield relay
    relay.stop()
    await task


async def relayed(pool: Pool) -> dict[int, int]:
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT partition, number FROM relayed")
        return {int(partition): int(number) for partition, number in await cursor.fetchall()}


async def until_relayed(pool: Pool, expected: dict[int, int], *, seconds: float = 10.0) -> None:
    async def all_are() -> bool:
        return await relayed(pool) == expected

    await eventually(all_are, seconds=seconds)


def numbers_by_partition(bodies: Sequence[bytes]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for body in bodies:
        partition, number = map(int, body.split())
        found.setdefault(partition, []).append(number)
    return found


async def test_what_is_committed_is_relayed_in_order_told_of_or_not(
    metering: Client, operator_nats: Client, pool: Pool, writer: Writer
) -> None:
    async with running(Relay(client=metering, stream=CHARGES, pool=pool)) as relay:
        relay.own(range(4))
        for first in range(1, 200, 20):
            staged = [row for partition in range(6) for row in rows(partition, range(first, first + 20))]
            await commit(writer, staged)
            # Every other batch is only found in the table.
            if first % 40 == 1:
                relay.notify(staged)
            await asyncio.sleep(0.01)
        await until_relayed(pool, dict.fromkeys(range(4), 200))
    found = numbers_by_partition(await stored(operator_nats))
    assert found == {partition: list(range(1, 201)) for partition in range(4)}


async def test_a_relay_continues_where_the_last_one_stopped(
    metering: Client, operator_nats: Client, pool: Pool, writer: Writer
) -> None:
    await commit(writer, rows(3, range(1, 51)))
    async with running(Relay(client=metering, stream=CHARGES, pool=pool)) as relay:
        relay.own([3])
        await until_relayed(pool, {3: 50})
    await commit(writer, rows(3, range(51, 101)))
    async with running(Relay(client=metering, stream=CHARGES, pool=pool)) as relay:
        relay.own([3])
        await until_relayed(pool, {3: 100})
    assert numbers_by_partition(await stored(operator_nats)) == {3: list(range(1, 101))}


async def test_a_second_relay_of_a_partition_does_no_harm(
    metering: Client, operator_nats: Client, pool: Pool, writer: Writer
) -> None:
    async with (
        running(Relay(client=metering, stream=CHARGES, pool=pool)) as deposed,
        running(Relay(client=metering, stream=CHARGES, pool=pool)) as relay,
    ):
        deposed.own([3, 4])
        relay.own([3, 4])
        for first in range(1, 301, 30):
            staged = [*rows(3, range(first, first + 30)), *rows(4, range(first, first + 30))]
            await commit(writer, staged)
            relay.notify(staged)
            deposed.notify(staged)
        await until_relayed(pool, {3: 300, 4: 300})
    for numbers in numbers_by_partition(await stored(operator_nats)).values():
        first_times = list(dict.fromkeys(numbers))
        assert first_times == list(range(1, 301))


async def test_a_partition_stops_at_its_first_failure_and_the_others_go_on(
    metering: Client, operator_nats: Client, pool: Pool, writer: Writer
) -> None:
    bad = OutboxRow(3, 6, usage_subject(partition=3, source="demo"), "bad", b"3 6", now())
    staged = [*rows(3, range(1, 6)), bad, *rows(3, range(7, 10)), *rows(4, range(1, 10))]
    await commit(writer, staged)
    async with running(Relay(client=metering, stream=CHARGES, pool=pool)) as relay:
        relay.own([3, 4])
        await until_relayed(pool, {3: 5, 4: 9})
        await asyncio.sleep(0.3)
        assert await relayed(pool) == {3: 5, 4: 9}
        async with pool.connection() as connection:
            await connection.execute(
                "UPDATE outbox SET subject = %s WHERE partition = 3 AND number = 6", [charges_rated_subject(3)]
            )
        relay.disown([3])
        relay.own([3])
        await until_relayed(pool, {3: 9, 4: 9})
    assert numbers_by_partition(await stored(operator_nats)) == {3: list(range(1, 10)), 4: list(range(1, 10))}


async def test_a_gap_is_never_skipped(metering: Client, operator_nats: Client, pool: Pool, writer: Writer) -> None:
    await commit(writer, [*rows(3, [1, 2, 4]), *rows(4, [1])])
    async with running(Relay(client=metering, stream=CHARGES, pool=pool)) as relay:
        relay.own([3, 4])
        await until_relayed(pool, {3: 2, 4: 1})
        await asyncio.sleep(0.3)
        assert await relayed(pool) == {3: 2, 4: 1}
        await commit(writer, rows(3, [3]))
        await until_relayed(pool, {3: 4, 4: 1})
    assert numbers_by_partition(await stored(operator_nats))[3] == [1, 2, 3, 4]


async def test_nothing_is_lost_or_out_of_order_when_server_and_relay_die(
    own_nats: tuple[EmbeddedNats, NatsAccount], pool: Pool, writer: Writer
) -> None:
    server, account = own_nats
    await refresh_streams(account)
    chance = random.Random(20_261_120)
    client = await reconnecting(account, "metering")
    committed = dict.fromkeys(range(3), 0)
    kills = 0
    for round_number in range(3):
        relay = Relay(client=client, stream=CHARGES, pool=pool)
        task = asyncio.create_task(relay.run())
        relay.own(committed)
        for _ in range(20):
            staged = []
            for partition in committed:
                count = chance.randrange(1, 12)
                staged += rows(partition, range(committed[partition] + 1, committed[partition] + 1 + count))
                committed[partition] += count
            await commit(writer, staged)
            relay.notify(staged)
        unrelayed = sum(committed.values()) - sum((await relayed(pool)).values())
        if round_number == 1:
            assert server.process is not None
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            server.start()
        # More than once: `asyncio.wait_for` of Python 3.11 forgets a cancellation when what it waits for is done.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=1)
        kills += unrelayed > 0
    assert kills > 0, "no kill met rows that were not relayed"
    async with running(Relay(client=client, stream=CHARGES, pool=pool)) as relay:
        relay.own(committed)
        await until_relayed(pool, committed)
    operator = await account.connect("operator")
    for partition, numbers in numbers_by_partition(await stored(operator)).items():
        assert list(dict.fromkeys(numbers)) == list(range(1, committed[partition] + 1))
    await operator.close()
    await client.close()


async def test_only_what_is_relayed_and_old_is_pruned(pool: Pool, writer: Writer) -> None:
    old = now() - timedelta(hours=2)
    aged = [OutboxRow(3, number, "s", f"{number}", b"", old) for number in range(1, 11)]
    await commit(writer, [*aged, *rows(3, range(11, 21))])
    async with pool.connection() as connection:
        await connection.execute("INSERT INTO relayed VALUES (3, 8)")
        assert await prune(connection, partitions=[3, 4], keep_seconds=3600) == 8
        await connection.execute("UPDATE relayed SET number = 15")
        assert await prune(connection, partitions=[3, 4], keep_seconds=3600) == 2
        cursor = await connection.execute("SELECT min(number), max(number) FROM outbox")
        assert await cursor.fetchone() == (11, 20)
