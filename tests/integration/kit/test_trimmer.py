"""The trimmer on a real stream, as the users whose task it is."""

from dataclasses import replace

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from contracts.streams import (
    CHARGES,
    CONSUMERS,
    KEYS,
    LEDGER,
    METERING_CONSUMER,
    METERING_DIRECTORY_CONSUMER,
    STREAMS,
    USAGE,
    Stream,
)
from infra.provision import stream_config
from services.kit.publish import Message, PublishFailed, publish_batch
from services.kit.reader import PullReader
from services.kit.trimmer import TrimFailed, Trimmer
from tests.conftest import NatsAccount
from tests.eventually import eventually

pytestmark = pytest.mark.anyio


def stream(name: str, *, keep_bytes_max: int) -> Stream:
    return replace(next(each for each in STREAMS if each.name == name), keep_bytes_max=keep_bytes_max)


async def stored(operator_nats: Client, name: str) -> int:
    return (await operator_nats.jetstream(timeout=5).stream_info(name)).state.messages


async def acknowledge(client: Client, name: str, durable: str, *, messages: int) -> None:
    reader = PullReader(client, stream=name, ack_wait_seconds=30, batch_size_max=messages)
    await reader.add(durable)
    batch: list[Msg] = []
    # A batch may be cut short when the machine is slow: the rest comes with the next one.
    while (left := messages - len(batch)) and (more := await reader.next_batch(messages_max=left, timeout_seconds=5)):
        batch += more
    assert len(batch) == messages
    await reader.ack(batch)
    await reader.close()
    await client.flush()


async def trimmed(client: Client, which: Stream, *, service: str) -> int:
    return await Trimmer(client, service=service).trim(which)


async def test_what_is_acknowledged_goes_and_the_rest_stays(nats_account: NatsAccount, operator_nats: Client) -> None:
    demo, metering = await nats_account.connect("demo"), await nats_account.connect("metering")
    messages = [Message("usage.v1.07.demo", b"x" * 100, None) for _ in range(100)]
    await publish_batch(demo, stream=USAGE, messages=messages)
    assert await trimmed(metering, stream(USAGE, keep_bytes_max=0), service="metering") == 0
    await acknowledge(metering, USAGE, METERING_CONSUMER, messages=60)
    assert await trimmed(metering, stream(USAGE, keep_bytes_max=1 << 30), service="metering") == 0

    async def trims() -> bool:
        return await trimmed(metering, stream(USAGE, keep_bytes_max=0), service="metering") == 60

    await eventually(trims)
    assert await stored(operator_nats, USAGE) == 40
    await demo.close()
    await metering.close()


async def test_consumers_with_nothing_to_read_hold_nothing_up(nats_account: NatsAccount, operator_nats: Client) -> None:
    """Charges are read by one consumer per group of partitions; most groups here never have one."""
    metering, ledger = await nats_account.connect("metering"), await nats_account.connect("ledger")
    for partition, count in (("05", 30), ("41", 20)):
        messages = [Message(f"metering.v1.{partition}.charges.rated", b"x" * 100, None) for _ in range(count)]
        await publish_batch(metering, stream=CHARGES, messages=messages)
    everything = stream(CHARGES, keep_bytes_max=0)
    assert await trimmed(ledger, everything, service="ledger") == 0
    await acknowledge(ledger, CHARGES, "ledger-charges-0", messages=30)
    # That of partition 41 has never moved: nothing says that what lies before its first message is not for it.
    assert await trimmed(ledger, everything, service="ledger") == 0
    await acknowledge(ledger, CHARGES, "ledger-charges-5", messages=20)

    async def trims() -> bool:
        return await trimmed(ledger, everything, service="ledger") == 50

    await eventually(trims)
    assert await stored(operator_nats, CHARGES) == 0
    await metering.close()
    await ledger.close()


async def test_a_stream_that_is_only_listened_to_stays_below_its_limit(
    nats_account: NatsAccount, operator_nats: Client
) -> None:
    """KEYS has no consumer. Who listens was told live, so the oldest facts make room before the stream refuses."""
    assert not [consumer for consumer in CONSUMERS if consumer.stream == KEYS]
    jetstream = operator_nats.jetstream(timeout=5)
    keyvault = await nats_account.connect("keyvault")
    small = replace(stream(KEYS, keep_bytes_max=8_000), bytes_max=16_000)
    await jetstream.update_stream(stream_config(small))
    facts = [Message("keyvault.v1.07.key.disabled", b"x" * 100, None) for _ in range(60)]
    await publish_batch(keyvault, stream=KEYS, messages=facts)
    with pytest.raises(PublishFailed):
        await publish_batch(keyvault, stream=KEYS, messages=facts)

    removed = await trimmed(keyvault, small, service="keyvault")
    assert removed > 0
    state = (await jetstream.stream_info(KEYS)).state
    assert 7_000 < state.bytes <= 8_200
    assert state.last_seq - state.first_seq + 1 == state.messages
    await publish_batch(keyvault, stream=KEYS, messages=facts[:30])
    await keyvault.close()


async def test_facts_nobody_reads_go_once_the_streams_only_reader_has_read_its_own(
    nats_account: NatsAccount, operator_nats: Client
) -> None:
    ledger, metering = await nats_account.connect("ledger"), await nats_account.connect("metering")
    facts = [Message(f"ledger.v1.07.{what}", b"x" * 100, None) for what in ("account.opened", *(["lot.granted"] * 30))]
    await publish_batch(ledger, stream=LEDGER, messages=facts)
    everything = stream(LEDGER, keep_bytes_max=0)
    assert await trimmed(ledger, everything, service="ledger") == 0
    await acknowledge(metering, LEDGER, METERING_DIRECTORY_CONSUMER, messages=1)

    async def trims() -> bool:
        return await trimmed(ledger, everything, service="ledger") == 31

    await eventually(trims)
    assert await stored(operator_nats, LEDGER) == 0
    await ledger.close()
    await metering.close()


async def test_a_consumer_that_is_missing_keeps_everything(nats_account: NatsAccount, operator_nats: Client) -> None:
    metering, ledger = await nats_account.connect("metering"), await nats_account.connect("ledger")
    messages = [Message("metering.v1.05.charges.rated", b"x" * 100, None) for _ in range(20)]
    await publish_batch(metering, stream=CHARGES, messages=messages)
    await acknowledge(ledger, CHARGES, "ledger-charges-0", messages=20)
    await operator_nats.jetstream(timeout=5).delete_consumer(CHARGES, "ledger-charges-7")
    with pytest.raises(TrimFailed, match="ledger-charges-7"):
        await trimmed(ledger, stream(CHARGES, keep_bytes_max=0), service="ledger")
    assert await stored(operator_nats, CHARGES) == 20
    await metering.close()
    await ledger.close()


async def test_a_service_trims_its_own_streams_only(nats_account: NatsAccount) -> None:
    assert {each.trimmed_by for each in STREAMS} >= {"metering", "ledger"}
    assert {each.stream for each in CONSUMERS} >= {USAGE, CHARGES}
    demo = await nats_account.connect("demo")
    with pytest.raises(TrimFailed):
        await Trimmer(demo, service="metering", timeout_seconds=0.3).trim(stream(USAGE, keep_bytes_max=0))
    await demo.close()
