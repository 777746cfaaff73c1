"""Laws of FastStream handlers: a fault is retried with a growing delay, what is unreadable is kept and never blocks."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import nats
import pytest
import structlog.testing
from faststream.nats import NatsBroker
from nats.aio.client import Client
from pydantic import SecretStr

from contracts.streams import (
    LEDGER,
    METERING_DIRECTORY_CONSUMER,
    consumers_of,
    ledger_fact_subject,
)
from infra.servers import EmbeddedNats
from services.kit.broker import build_broker, connect_nats, nats_check, pull_subscriber
from services.kit.dead_letters import Letter, Unreadable
from services.kit.publish import Message, publish_batch
from services.kit.redelivery import retry_delay_seconds
from services.kit.settings import ServiceSettings
from tests.conftest import NatsAccount, refresh_streams, settings_of
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

DIRECTORY = next(consumer for consumer in consumers_of("metering") if consumer.durable == METERING_DIRECTORY_CONSUMER)


def settings_in(account: NatsAccount, service: str) -> ServiceSettings:
    return settings_of(
        service, nats_account=account, database_url=SecretStr("postgresql://unused"), tokens_file=Path("unused")
    )


async def tell(account: NatsAccount, *bodies: bytes) -> None:
    client = await account.connect("ledger")
    subject = ledger_fact_subject(partition=7, noun="account", verb="opened")
    await publish_batch(
        client,
        stream=LEDGER,
        messages=[Message(subject, body, f"id-{number}") for number, body in enumerate(bodies)],
        lanes=["one"] * len(bodies),
    )
    await client.close()


@asynccontextmanager
async def handling(
    account: NatsAccount, handle: Callable[[bytes], None], letters: list[Letter]
) -> AsyncIterator[NatsBroker]:
    settings = settings_in(account, "metering")

    async def keep(letter: Letter) -> None:
        letters.append(letter)

    broker = build_broker(settings, dead_letter=keep)

    @pull_subscriber(broker, settings, consumer=DIRECTORY)
    async def on_opened(body: bytes) -> None:
        handle(body)

    await broker.start()
    yield broker
    await broker.stop()


async def settled(operator: Client) -> None:
    async def acknowledged() -> bool:
        info = await operator.jetstream().consumer_info(LEDGER, METERING_DIRECTORY_CONSUMER)
        return (info.num_pending, info.num_ack_pending) == (0, 0)

    await eventually(acknowledged)


async def test_handlers_get_raw_bodies_in_order_and_they_are_acknowledged(
    nats_account: NatsAccount, operator_nats: Client
) -> None:
    await tell(nats_account, b"42", b"not json", b'{"a": 1}')
    seen: list[bytes] = []
    async with handling(nats_account, seen.append, []):
        await eventually(lambda: len(seen) == 3)
        await settled(operator_nats)
    assert seen == [b"42", b"not json", b'{"a": 1}']


async def test_a_fault_is_retried_with_a_growing_delay_and_never_given_up(
    nats_account: NatsAccount, operator_nats: Client
) -> None:
    tries: list[float] = []
    letters: list[Letter] = []

    def handle(_body: bytes) -> None:
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise RuntimeError("the database is away")

    await tell(nats_account, b"{}")
    with structlog.testing.capture_logs() as logs:
        async with handling(nats_account, handle, letters):
            await eventually(lambda: len(tries) == 3)
            await settled(operator_nats)
    assert 0.9 < tries[1] - tries[0] < 1.9
    assert 1.9 < tries[2] - tries[1] < 3.0
    assert letters == []
    assert [line["delay_seconds"] for line in logs if "delivered again" in line["event"]] == [1.0, 2.0]
    assert [retry_delay_seconds(count) for count in (1, 2, 3, 4, 5, 6, 7, 10_000)] == [1, 2, 4, 8, 16, 30, 30, 30]


async def test_what_is_unreadable_is_kept_with_its_reason_and_blocks_nothing(
    nats_account: NatsAccount, operator_nats: Client
) -> None:
    seen: list[bytes] = []
    letters: list[Letter] = []

    def handle(body: bytes) -> None:
        if body == b"bad":
            raise Unreadable("not a fact", problems=[{"field": "account"}])
        seen.append(body)

    await tell(nats_account, b"1", b"bad", b"2")
    async with handling(nats_account, handle, letters):
        await eventually(lambda: len(seen) == 2)
        await settled(operator_nats)
    assert seen == [b"1", b"2"]
    (letter,) = letters
    assert (letter.reason, letter.problems) == ("not a fact", [{"field": "account"}])
    assert (letter.stream, letter.stream_sequence, letter.payload) == (LEDGER, 2, b"bad")
    assert letter.headers["Nats-Msg-Id"] == "id-1"


async def test_a_letter_that_cannot_be_kept_is_not_lost(nats_account: NatsAccount) -> None:
    settings = settings_in(nats_account, "metering")
    kept: list[Letter] = []
    attempts = 0

    async def keep(letter: Letter) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ConnectionError("the database is away")
        kept.append(letter)

    broker = build_broker(settings, dead_letter=keep)

    @pull_subscriber(broker, settings, consumer=DIRECTORY)
    async def on_opened(_body: bytes) -> None:
        raise Unreadable("never readable")

    await tell(nats_account, b"bad")
    await broker.start()
    await eventually(lambda: len(kept) == 1)
    await broker.stop()


async def test_handlers_go_on_after_the_server_was_killed(own_nats: tuple[EmbeddedNats, NatsAccount]) -> None:
    server, account = own_nats
    await refresh_streams(account)
    seen: list[bytes] = []
    await tell(account, b"1")
    async with handling(account, seen.append, []):
        await eventually(lambda: seen == [b"1"])
        assert server.process is not None
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        await asyncio.sleep(0.3)
        server.start()
        client = await account.connect("ledger")
        subject = ledger_fact_subject(partition=7, noun="account", verb="opened")
        await publish_batch(client, stream=LEDGER, messages=[Message(subject, b"2", "another")])
        await client.close()
        await eventually(lambda: b"2" in seen, seconds=15)


async def test_what_is_forbidden_is_logged_loudly(nats_account: NatsAccount) -> None:
    client = await connect_nats(settings_in(nats_account, "console"))
    with structlog.testing.capture_logs() as logs:
        await client.publish("usage.v1.07.console", b"not mine to publish")
        await client.flush()
        await eventually(lambda: any("forbids" in line["event"] for line in logs))
    await client.close()
    assert any("usage.v1.07.console" in str(line.get("error")) for line in logs)


async def test_wrong_credentials_fail_at_once(nats_account: NatsAccount) -> None:
    settings = settings_in(nats_account, "console").model_copy(update={"nats_password": SecretStr("wrong")})
    with pytest.raises(nats.errors.Error, match="Authorization"):
        async with asyncio.timeout(3):
            await connect_nats(settings)


@contextmanager
def standing_still(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Within this the process does nothing. It is told to stop, and does so a moment later."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, "it does not stop"
            time.sleep(0.001)
        yield
    finally:
        # Stopped, it would not even end.
        os.kill(process.pid, signal.SIGCONT)


async def test_the_ping_tells_a_hung_server_and_recovers(own_nats: tuple[EmbeddedNats, NatsAccount]) -> None:
    server, account = own_nats
    client = await connect_nats(settings_in(account, "console"))
    try:
        check = nats_check(client)
        await check()
        assert server.process is not None
        with standing_still(server.process):
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                await check()
            hung_seconds = time.monotonic() - started
        assert hung_seconds < 5
        await check()
        await check()
        server.stop()
        await eventually(lambda: not client.is_connected)
        with pytest.raises(ConnectionError):
            await check()
        server.start()
        await eventually(lambda: client.is_connected)
        await check()
    finally:
        await client.close()
