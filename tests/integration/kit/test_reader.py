"""Laws of reading in batches: in order, nothing lost over failures, nothing stale, nothing kept from others."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig

from contracts.partition import GROUP_SIZE, PARTITION_COUNT, group_of
from contracts.streams import CHARGES, charges_consumer, charges_rated_subject
from infra.servers import EmbeddedNats
from services.kit import reader as reading
from services.kit.publish import Message, publish_batch
from services.kit.reader import PullReader
from services.kit.redelivery import place_of
from tests.conftest import NatsAccount, refresh_streams
from tests.eventually import eventually

pytestmark = pytest.mark.anyio


@pytest.fixture
async def ledger(nats_account: NatsAccount) -> AsyncIterator[Client]:
    client = await nats_account.connect("ledger")
    yield client
    await client.close()


@pytest.fixture
async def publish_charges(nats_account: NatsAccount) -> AsyncIterator[Callable[..., object]]:
    client = await nats_account.connect("metering")

    async def publish(numbers: Sequence[int], *, partition: int = 7, payload: bytes = b"") -> None:
        await publish_batch(client, stream=CHARGES, messages=numbered(numbers, partition=partition, payload=payload))

    yield publish
    await client.close()


def numbered(numbers: Sequence[int], *, partition: int = 7, payload: bytes = b"") -> list[Message]:
    return [
        Message(charges_rated_subject(partition), b"%d " % number + payload, f"{partition}-{number}")
        for number in numbers
    ]


def number_of(message: Msg) -> int:
    return int(message.data.split(b" ")[0])


async def read_all(reader: PullReader, count: int, *, seconds: float = 5.0) -> list[Msg]:
    """Read and acknowledge `count` messages."""
    found: list[Msg] = []
    async with asyncio.timeout(seconds):
        while len(found) < count:
            batch = await reader.next_batch()
            await reader.ack(batch)
            found += batch
    return found


async def test_everything_is_read_in_order_and_acknowledged(
    ledger: Client, operator_nats: Client, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    await publish_charges(range(3000))
    reader = PullReader(ledger, stream=CHARGES, ack_wait_seconds=30, batch_size_max=200)
    await reader.add(charges_consumer(group_of(7)))
    assert [number_of(message) for message in await read_all(reader, 3000)] == list(range(3000))
    assert await reader.next_batch(timeout_seconds=0.1) == []
    await ledger.flush()
    info = await operator_nats.jetstream().consumer_info(CHARGES, charges_consumer(group_of(7)))
    assert (info.num_ack_pending, info.num_pending) == (0, 0)
    # The pull request in waiting serves what is published later.
    await publish_charges(range(3000, 3010))
    assert [number_of(message) for message in await read_all(reader, 10)] == list(range(3000, 3010))
    await reader.close()


async def test_a_batch_is_bounded_by_number_and_bytes(
    ledger: Client, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    await publish_charges(range(30), payload=b"x" * 1000)
    reader = PullReader(ledger, stream=CHARGES, ack_wait_seconds=30)
    await reader.add(charges_consumer(group_of(7)))
    assert len(await reader.next_batch(messages_max=1, bytes_max=10)) == 1
    await asyncio.sleep(0.1)
    assert len(await reader.next_batch(messages_max=5)) == 5
    assert len(await reader.next_batch(bytes_max=7100)) == 7
    await reader.close()


async def test_a_refused_message_comes_again_after_its_delay_and_a_terminated_one_never(
    ledger: Client, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    await publish_charges(range(3))
    reader = PullReader(ledger, stream=CHARGES, ack_wait_seconds=30)
    await reader.add(charges_consumer(group_of(7)))
    first = [*(await reader.next_batch())]
    while len(first) < 3:
        first += await reader.next_batch()
    await reader.term(first[:1])
    await reader.nak(first[1:2])
    await reader.nak(first[2:], delay_seconds=0.4)
    refused_at = time.monotonic()
    (soon,) = await reader.next_batch()
    assert (number_of(soon), place_of(soon).deliveries) == (1, 2)
    (later,) = await reader.next_batch()
    assert number_of(later) == 2
    assert time.monotonic() - refused_at > 0.35
    assert await reader.next_batch(timeout_seconds=0.2) == []
    await reader.close()


async def test_several_durables_are_read_together_each_in_order(
    ledger: Client, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    partitions = range(0, PARTITION_COUNT, GROUP_SIZE)
    reader = PullReader(ledger, stream=CHARGES, ack_wait_seconds=30, batch_size_max=50)
    for partition in partitions:
        await reader.add(charges_consumer(group_of(partition)))
    await asyncio.gather(*(publish_charges(range(300), partition=partition) for partition in partitions))
    found = await read_all(reader, 300 * len(partitions))
    for partition in partitions:
        of_partition = [message for message in found if message.subject == charges_rated_subject(partition)]
        assert [number_of(message) for message in of_partition] == list(range(300))
    await reader.close()


@pytest.fixture
async def in_turns(operator_nats: Client) -> AsyncIterator[PullReader]:
    """Reads all partitions by one durable, in turns of partitions. It may not acknowledge."""
    config = ConsumerConfig(durable_name="everything", ack_wait=30, max_ack_pending=400)
    await operator_nats.jetstream().add_consumer(CHARGES, config)
    reader = PullReader(
        operator_nats, stream=CHARGES, ack_wait_seconds=30, batch_size_max=100, turn_of=lambda subject: subject
    )
    yield reader
    await reader.close()


async def publish_interleaved(publish_charges: Callable[..., asyncio.Future[None]], counts: Sequence[int]) -> None:
    """So many messages of each partition, beginning with number 0, spread over all."""
    for number in range(max(counts)):
        await asyncio.gather(
            *(
                publish_charges([number], partition=partition)
                for partition, count in enumerate(counts)
                if number < count
            )
        )


async def test_what_is_more_than_a_batch_is_handed_out_in_turns_each_in_order(
    in_turns: PullReader, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    await publish_interleaved(publish_charges, [30] * 10)
    await in_turns.add("everything")
    await asyncio.sleep(0.3)
    first = await in_turns.next_batch()
    # All are here, 30 of each.
    assert len(first) == 100
    assert len({message.subject for message in first}) == 4
    found = first
    while len(found) < 300:
        found = [*found, *await in_turns.next_batch()]
    for partition in range(10):
        of_partition = [message for message in found if message.subject == charges_rated_subject(partition)]
        assert [number_of(message) for message in of_partition] == list(range(30))


async def test_what_fits_into_a_batch_is_one_at_once_whatever_it_is(
    in_turns: PullReader, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    await publish_interleaved(publish_charges, [3] * 10)
    await in_turns.add("everything")
    await asyncio.sleep(0.3)
    began = time.monotonic()
    batch = await in_turns.next_batch()
    assert len(batch) == 30
    assert time.monotonic() - began < 0.005


async def test_no_turn_comes_twice_while_another_waits(
    in_turns: PullReader, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    await publish_charges(range(190), partition=0)
    for partition in range(1, 9):
        await publish_charges([0], partition=partition)
    await in_turns.add("everything")
    await asyncio.sleep(0.3)
    first, second = await in_turns.next_batch(), await in_turns.next_batch()
    assert {message.subject for message in first} == {charges_rated_subject(0)}
    assert {message.subject for message in second[:8]} == {
        charges_rated_subject(partition) for partition in range(1, 9)
    }
    assert [number_of(message) for message in [*first, *second[8:]]] == list(range(190))


async def test_a_batch_waits_for_what_is_on_its_way(
    in_turns: PullReader, publish_charges: Callable[..., asyncio.Future[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_ON_ITS_WAY_GAP_SECONDS", 1.0)
    monkeypatch.setattr(reading, "_ON_ITS_WAY_SECONDS", 5.0)
    await publish_interleaved(publish_charges, [9] * 10)
    await in_turns.add("everything")
    assert len(await in_turns.next_batch()) == 90


async def test_what_does_not_come_although_the_stream_has_it_holds_up_a_batch_for_a_moment_only(
    nats_account: NatsAccount, operator_nats: Client, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    await operator_nats.jetstream().add_consumer(
        CHARGES, ConsumerConfig(durable_name="narrow", ack_wait=30, max_ack_pending=50)
    )
    await publish_charges(range(120))
    narrow = PullReader(operator_nats, stream=CHARGES, ack_wait_seconds=30, batch_size_max=40, turn_of=str)
    await narrow.add("narrow")
    await asyncio.sleep(0.3)
    began = time.monotonic()
    first, second = await narrow.next_batch(), await narrow.next_batch()
    assert (len(first), len(second)) == (40, 10)
    assert time.monotonic() - began < 0.1
    await narrow.close()


async def test_what_is_buffered_of_a_removed_durable_is_given_back_at_once(
    ledger: Client, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    await publish_charges(range(100))
    await publish_charges(range(10), partition=8)
    reader = PullReader(ledger, stream=CHARGES, ack_wait_seconds=30)
    await reader.add(charges_consumer(group_of(7)))
    await reader.add(charges_consumer(group_of(8)))
    await asyncio.sleep(0.2)
    await reader.remove(charges_consumer(group_of(7)))
    await reader.remove(charges_consumer(group_of(7)))
    assert reader.durables == {charges_consumer(group_of(8))}
    other = PullReader(ledger, stream=CHARGES, ack_wait_seconds=30)
    await other.add(charges_consumer(group_of(7)))
    assert {number_of(message) for message in await read_all(other, 100, seconds=2)} == set(range(100))
    assert {message.subject for message in await read_all(reader, 10)} == {charges_rated_subject(8)}
    await publish_charges(range(100, 110))
    assert len(await read_all(other, 10)) == 10
    assert await reader.next_batch(timeout_seconds=0.1) == []
    await reader.close()
    await other.close()


async def test_what_was_buffered_too_long_is_not_handed_out(
    nats_account: NatsAccount, operator_nats: Client, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    await operator_nats.jetstream().add_consumer(
        CHARGES, ConsumerConfig(durable_name="impatient", ack_wait=1, max_ack_pending=100)
    )
    await publish_charges(range(10))
    reader = PullReader(operator_nats, stream=CHARGES, ack_wait_seconds=1)
    await reader.add("impatient")
    await asyncio.sleep(0.8)
    # Too late to be worked on in time, too early to have been delivered again.
    assert await reader.next_batch(timeout_seconds=0.1) == []
    found = await read_all(reader, 10, seconds=2)
    assert {place_of(message).deliveries for message in found} == {2}
    await reader.close()


async def test_who_stops_waits_for_nothing_any_more(
    ledger: Client, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    reader = PullReader(ledger, stream=CHARGES, ack_wait_seconds=30)
    await reader.add(charges_consumer(group_of(7)))
    waiting = asyncio.create_task(reader.next_batch(timeout_seconds=100))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    reader.stop_waiting()
    async with asyncio.timeout(10):
        assert await waiting == []
        assert await reader.next_batch(timeout_seconds=100) == []
    # What has come is handed out all the same.
    await publish_charges(range(3))
    found: list[Msg] = []

    async def came() -> bool:
        found.extend(await reader.next_batch(timeout_seconds=100))
        return bool(found)

    await eventually(came)
    assert number_of(found[0]) == 0


async def test_a_lost_pull_request_is_noticed(
    ledger: Client, publish_charges: Callable[..., asyncio.Future[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = ledger.publish

    async def vanish(subject: str, payload: bytes = b"", reply: str = "") -> None:
        if not subject.startswith("$JS.API.CONSUMER.MSG.NEXT"):
            await publish(subject, payload, reply=reply)

    reader = PullReader(ledger, stream=CHARGES, ack_wait_seconds=30, expires_seconds=0.2)
    with monkeypatch.context() as lossy:
        lossy.setattr(ledger, "publish", vanish)
        await reader.add(charges_consumer(group_of(7)))
    await publish_charges(range(5))
    assert len(await read_all(reader, 5, seconds=4)) == 5
    await reader.close()


async def test_reading_goes_on_after_the_consumer_was_deleted_and_made_again(
    ledger: Client, operator_nats: Client, publish_charges: Callable[..., asyncio.Future[None]]
) -> None:
    reader = PullReader(ledger, stream=CHARGES, ack_wait_seconds=30)
    await reader.add(charges_consumer(group_of(7)))
    jetstream = operator_nats.jetstream()
    config = (await jetstream.consumer_info(CHARGES, charges_consumer(group_of(7)))).config
    await jetstream.delete_consumer(CHARGES, charges_consumer(group_of(7)))
    assert await reader.next_batch(timeout_seconds=1.0) == []
    await jetstream.add_consumer(CHARGES, config)
    await publish_charges(range(5))
    assert len(await read_all(reader, 5, seconds=5)) == 5
    await reader.close()


async def test_nothing_is_lost_when_the_server_is_killed_while_reading(
    own_nats: tuple[EmbeddedNats, NatsAccount],
) -> None:
    server, account = own_nats
    await refresh_streams(account)
    publisher, client = await account.connect("metering"), await reconnecting(account, "ledger")
    total = 4000
    for partition in (7, 8):
        await publish_batch(publisher, stream=CHARGES, messages=numbered(range(total // 2), partition=partition))
    await publisher.close()
    reader = PullReader(client, stream=CHARGES, ack_wait_seconds=30, batch_size_max=100)
    await reader.add(charges_consumer(group_of(7)))
    await reader.add(charges_consumer(group_of(8)))
    found: dict[str, list[int]] = {charges_rated_subject(7): [], charges_rated_subject(8): []}
    distinct: set[tuple[str, int]] = set()
    killed = False
    in_flight = 0
    async with asyncio.timeout(15):
        while len(distinct) < total:
            batch = await reader.next_batch(messages_max=100)
            if not killed and len(distinct) >= total // 4:
                killed = True
                in_flight = len(batch)
                assert server.process is not None
                os.kill(server.process.pid, signal.SIGKILL)
                server.process.wait()
                await asyncio.sleep(0.1)
                server.start()
                await reader.nak(batch)
                continue
            for message in batch:
                found[message.subject].append(number_of(message))
                distinct.add((message.subject, number_of(message)))
            await reader.ack(batch)
    assert in_flight > 0, "the kill met nothing unacknowledged"
    assert {len(set(numbers)) for numbers in found.values()} == {total // 2}
    await reader.close()
    await client.close()


async def reconnecting(account: NatsAccount, user: str) -> Client:
    return await nats.connect(
        account.url,
        user=account.user(user),
        password=account.password(user),
        inbox_prefix=f"_INBOX_{user}",
        max_reconnect_attempts=-1,
        reconnect_time_wait=0,
        error_cb=_ignore,
    )


async def _ignore(_error: Exception) -> None:
    """The connection is meant to break."""
