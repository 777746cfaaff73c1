"""Laws of publishing: everything is confirmed, or named with a reason; nothing is stored twice or out of order."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence

import nats
import pytest
from nats.aio.client import Client

from contracts.streams import CHARGES, USAGE, charges_rated_subject, usage_subject
from infra.servers import EmbeddedNats
from services.kit.publish import (
    Message,
    PublishFailed,
    PublishRefused,
    PublishUnconfirmed,
    publish,
    publish_batch,
)
from tests.conftest import NatsAccount, refresh_streams

pytestmark = pytest.mark.anyio


@pytest.fixture
async def metering(nats_account: NatsAccount) -> AsyncIterator[Client]:
    client = await nats_account.connect("metering")
    yield client
    await client.close()


def numbered(*numbers: int, partition: int = 7) -> list[Message]:
    return [
        Message(charges_rated_subject(partition), b"body %d" % number, f"id-{partition}-{number}") for number in numbers
    ]


async def stored(operator: Client, stream: str = CHARGES) -> list[bytes]:
    jetstream = operator.jetstream()
    state = (await jetstream.stream_info(stream)).state
    sequences = range(state.first_seq, state.last_seq + 1) if state.messages else ()
    found = await asyncio.gather(*(jetstream.get_msg(stream, sequence) for sequence in sequences))
    return [message.data or b"" for message in found]


async def test_one_message_is_stored_once_however_often_it_is_published(
    metering: Client, operator_nats: Client
) -> None:
    (message,) = numbered(1)
    first = await publish(metering, stream=CHARGES, message=message)
    again = await publish(metering, stream=CHARGES, message=message)
    assert (first.sequence, first.duplicate) == (1, False)
    assert (again.sequence, again.duplicate) == (1, True)
    assert await stored(operator_nats) == [b"body 1"]


@pytest.mark.parametrize("count", [1, 14, 15, 999, 1000, 1001, 2500])
async def test_a_batch_of_any_size_is_stored_whole_and_every_sequence_is_told(
    metering: Client, operator_nats: Client, count: int
) -> None:
    messages = numbered(*range(count))
    published = await publish_batch(metering, stream=CHARGES, messages=messages)
    assert sorted(result.sequence for result in published) == list(range(1, count + 1))
    assert not any(result.duplicate for result in published)
    for place in {0, count // 2, count - 1}:
        found = await operator_nats.jetstream().get_msg(CHARGES, published[place].sequence)
        assert found.data == messages[place].payload


async def test_a_batch_of_many_bytes_is_split(metering: Client) -> None:
    messages = [Message(charges_rated_subject(1), b"x" * 500_000, f"big-{number}") for number in range(20)]
    assert len(await publish_batch(metering, stream=CHARGES, messages=messages)) == 20


async def test_a_batch_with_known_ids_stores_the_others_and_tells_which_were_known(
    metering: Client, operator_nats: Client
) -> None:
    await publish_batch(metering, stream=CHARGES, messages=numbered(5, 6))
    published = await publish_batch(metering, stream=CHARGES, messages=numbered(*range(40)), lanes=["one lane"] * 40)
    assert [number for number, result in enumerate(published) if result.duplicate] == [5, 6]
    assert [published[5].sequence, published[6].sequence] == [1, 2]
    expected = [5, 6, *(number for number in range(40) if number not in (5, 6))]
    assert await stored(operator_nats) == [b"body %d" % number for number in expected]


async def test_the_same_id_twice_in_a_call_collapses(metering: Client, operator_nats: Client) -> None:
    published = await publish_batch(metering, stream=CHARGES, messages=numbered(*range(20), 3, *range(20)))
    assert [result.duplicate for result in published] == [False] * 20 + [True] * 21
    assert published[20].sequence == published[3].sequence
    assert len(await stored(operator_nats)) == 20


async def test_one_id_with_two_bodies_is_not_published(metering: Client, operator_nats: Client) -> None:
    clash = Message(charges_rated_subject(7), b"another body", "id-7-1")
    with pytest.raises(ValueError, match="id-7-1"):
        await publish_batch(metering, stream=CHARGES, messages=[*numbered(1), clash])
    assert await stored(operator_nats) == []


async def test_a_batch_whose_acknowledgement_was_lost_can_be_published_again(
    metering: Client, operator_nats: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = numbered(*range(30))
    ask = metering.request

    async def answer_is_lost(*arguments: object, **options: object) -> object:
        await ask(*arguments, **options)  # type: ignore[arg-type]  # handed through as they came
        raise nats.errors.TimeoutError

    monkeypatch.setattr(metering, "request", answer_is_lost)
    with pytest.raises(PublishUnconfirmed) as failure:
        await publish_batch(metering, stream=CHARGES, messages=messages)
    assert sorted(failure.value.failed) == list(range(30))
    monkeypatch.undo()
    published = await publish_batch(metering, stream=CHARGES, messages=messages)
    assert all(result.duplicate for result in published)
    assert await stored(operator_nats) == [message.payload for message in messages]


@pytest.mark.parametrize("count", [3, 30])
async def test_what_no_stream_takes_is_refused(metering: Client, count: int) -> None:
    misdirected = [
        Message(usage_subject(partition=7, source="demo"), b"body", f"id-{number}") for number in range(count)
    ]
    with pytest.raises(PublishRefused) as failure:
        await publish_batch(metering, stream=CHARGES, messages=misdirected)
    assert sorted(failure.value.failed) == list(range(count))
    assert failure.value.confirmed == {}


async def test_a_full_stream_refuses_and_never_drops(metering: Client, operator_nats: Client) -> None:
    jetstream = operator_nats.jetstream()
    config = (await jetstream.stream_info(CHARGES)).config
    config.max_msgs = 20
    await jetstream.update_stream(config)
    await publish_batch(metering, stream=CHARGES, messages=numbered(*range(18)))
    with pytest.raises(PublishRefused, match="maximum messages exceeded") as failure:
        await publish_batch(metering, stream=CHARGES, messages=numbered(*range(18, 28)), lanes=["one lane"] * 10)
    assert sorted(failure.value.confirmed) == [0, 1]
    assert len(await stored(operator_nats)) == 20
    with pytest.raises(PublishRefused) as failure:
        await publish_batch(metering, stream=CHARGES, messages=numbered(*range(100, 130)))
    assert failure.value.confirmed == {}


async def test_nothing_follows_a_failure_in_its_lane(metering: Client, operator_nats: Client) -> None:
    good = numbered(1, 2, 3, partition=1)
    bad = Message(usage_subject(partition=2, source="demo"), b"misdirected", "bad")
    after = numbered(4, partition=2)
    messages = [good[0], bad, good[1], after[0], good[2]]
    with pytest.raises(PublishRefused) as failure:
        await publish_batch(metering, stream=CHARGES, messages=messages, lanes=[1, 2, 1, 2, 1])
    assert sorted(failure.value.confirmed) == [0, 2, 4]
    assert "not tried" in failure.value.failed[3]
    assert await stored(operator_nats) == [b"body 1", b"body 2", b"body 3"]


async def test_a_forbidden_publish_is_unconfirmed(nats_account: NatsAccount) -> None:
    console = await nats_account.connect("console")
    with pytest.raises(PublishUnconfirmed):
        await publish_batch(console, stream=USAGE, messages=numbered(1), timeout_seconds=0.2)
    await console.close()


@pytest.mark.parametrize("size", [10, 100])
async def test_nothing_confirmed_is_lost_when_the_server_is_killed(
    own_nats: tuple[EmbeddedNats, NatsAccount], size: int
) -> None:
    server, account = own_nats
    await refresh_streams(account)
    client = await nats.connect(
        account.url,
        user=account.user("metering"),
        password=account.password("metering"),
        inbox_prefix="_INBOX_metering",
        max_reconnect_attempts=-1,
        reconnect_time_wait=0,
        pending_size=16 << 20,
        error_cb=_ignore,
    )
    confirmed: set[int] = set()
    unconfirmed: list[Sequence[int]] = []
    killed = asyncio.Event()

    async def publish_all() -> None:
        for first in range(0, 40 * size, size):
            if first == 10 * size:
                killed.set()
            numbers = range(first, first + size)
            while True:
                try:
                    await publish_batch(client, stream=CHARGES, messages=numbered(*numbers), timeout_seconds=1)
                except PublishFailed as failure:
                    unconfirmed.append(numbers)
                    confirmed.update(numbers[place] for place in failure.confirmed)
                    await asyncio.sleep(0.1)
                else:
                    confirmed.update(numbers)
                    break

    publishing = asyncio.create_task(publish_all())
    await killed.wait()
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    in_flight = len(confirmed)
    await asyncio.sleep(0.05)
    server.start()
    await publishing
    assert in_flight < 40 * size
    assert unconfirmed, "the kill met no publish"
    operator = await account.connect("operator")
    bodies = await stored(operator)
    await operator.close()
    await client.close()
    assert set(bodies) == {b"body %d" % number for number in range(40 * size)}
    assert confirmed == set(range(40 * size))
    # Ids of what is still stored are known after the restart.
    assert len(bodies) == len(set(bodies))


async def _ignore(_error: Exception) -> None:
    """The connection is meant to break."""
