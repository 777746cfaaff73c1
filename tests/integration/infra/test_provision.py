"""Laws of provisioning: it makes and repairs what it can, tells what it cannot, and never touches what is not ours."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import pytest
import typer
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, RetentionPolicy, StreamConfig
from typer.testing import CliRunner, Result

from contracts.streams import CHARGES, CONSUMERS, KEYS, LEDGER, STREAMS, STRIPE
from infra.commands import stack
from infra.provision import Provisioned, consumer_config, operator, provision, stream_config
from tests.conftest import NatsAccount

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Driven:
    """The streams of a test, and `scrip provision` on them."""

    account: NatsAccount

    def do(self, work: Callable[[JetStreamContext], Awaitable[T]]) -> T:
        """As the operator."""

        async def connected() -> T:
            account = self.account
            async with operator(account.url, account.password("operator"), user=account.user("operator")) as jetstream:
                return await work(jetstream)

        return asyncio.run(connected())

    def provision(self, *, repair: bool = False) -> Provisioned:
        return self.do(lambda jetstream: provision(jetstream, repair=repair))

    def command(self, *arguments: str) -> Result:
        app = typer.Typer()
        app.command()(stack.provision)
        return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "100"})


@pytest.fixture
def driven(nats_account: NatsAccount, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driven]:
    made = Driven(nats_account)

    @contextmanager
    def stack_with(_server: str) -> Iterator[Driven]:
        yield made

    monkeypatch.setattr(stack, "stack_with", stack_with)
    yield made
    made.do(_remove_everything)


async def _remove_everything(jetstream: JetStreamContext) -> None:
    """The next test makes the streams anew."""
    for stream in await jetstream.streams_info():
        await jetstream.delete_stream(str(stream.config.name))


def stream(name: str) -> StreamConfig:
    return stream_config(next(each for each in STREAMS if each.name == name))


async def drift(jetstream: JetStreamContext) -> None:
    """Two streams that can be repaired, and between them one that NATS will not change: it is a work queue."""
    keys = stream(KEYS)
    keys.max_msg_size, keys.subjects = 1024, ["keyvault.v1.*.key.created", "keyvault.v1.*.key.disabled"]
    await jetstream.update_stream(keys)
    await jetstream.delete_stream(STRIPE)
    stripe = stream(STRIPE)
    stripe.retention = RetentionPolicy.WORK_QUEUE
    await jetstream.add_stream(stripe)
    charges = consumer_config(next(each for each in CONSUMERS if each.stream == CHARGES))
    charges.max_ack_pending = 7
    await jetstream.add_consumer(CHARGES, charges)


def test_streams_that_are_right_are_left_alone(driven: Driven) -> None:
    assert driven.provision(repair=True) == Provisioned()
    found = driven.command()
    assert (found.exit_code, found.output.strip()) == (0, "everything is as contracts/streams.py says")


def test_what_is_missing_is_made(driven: Driven) -> None:
    driven.do(_remove_everything)
    found = driven.provision()
    assert set(found.created) == {
        *(each.name for each in STREAMS),
        *(f"{each.stream}/{each.durable}" for each in CONSUMERS),
    }
    assert found.is_complete
    assert driven.provision() == Provisioned()


def test_what_nats_refuses_keeps_nothing_else_from_being_repaired(driven: Driven) -> None:
    driven.do(drift)
    found = driven.provision(repair=True)
    assert [each.where for each in found.refusals] == [STRIPE]
    assert found.repaired == {KEYS, "CHARGES/ledger-charges-0"}
    assert found.created == ("STRIPE/billing-stripe",)
    assert not found.is_complete
    again = driven.provision()
    assert [(each.where, each.name) for each in again.drifts] == [(STRIPE, "retention")]


def test_the_command_tells_every_difference_in_words_and_ends_with_one_sentence(driven: Driven) -> None:
    driven.do(drift)
    found = driven.command()
    assert found.exit_code == 1
    said = " ".join(found.output.replace("│", " ").split())
    for words in (
        "max msg size",
        "1,024",
        "4,194,304",
        "retention",
        "workqueue",
        "limits",
        "max ack pending",
        "7",
        "8,000",
    ):
        assert words in said
    assert "<RetentionPolicy" not in said
    assert "…" not in said
    assert "created STRIPE/billing-stripe" in said
    assert found.output.strip().splitlines()[-1] == "4 differences; run scrip provision --repair"

    repaired = driven.command("--repair")
    assert repaired.exit_code == 1
    assert "refused STRIPE: " in repaired.output
    assert repaired.output.strip().splitlines()[-1].startswith("NATS refused 1 thing, all else is done: ")
    assert driven.command().output.strip().splitlines()[-1] == "1 difference; run scrip provision --repair"


def test_the_command_says_when_all_is_repaired(driven: Driven) -> None:
    keys = replace(next(each for each in STREAMS if each.name == KEYS), bytes_max=1 << 20)
    driven.do(lambda jetstream: jetstream.update_stream(stream_config(keys)))
    found = driven.command("--repair")
    assert found.exit_code == 0
    assert "repaired" in found.output
    assert found.output.strip().splitlines()[-1] == "everything is as contracts/streams.py says"


def test_what_is_not_ours_is_named_and_stays(driven: Driven) -> None:
    async def strays(jetstream: JetStreamContext) -> None:
        await jetstream.add_stream(StreamConfig(name="FOREIGN", subjects=["foreign.>"]))
        await jetstream.add_consumer("FOREIGN", ConsumerConfig(durable_name="theirs"))
        await jetstream.add_consumer(LEDGER, ConsumerConfig(durable_name="spy"))

    driven.do(strays)
    assert driven.provision(repair=True).strays == ("consumer LEDGER/spy", "stream FOREIGN")
    found = driven.command("--repair")
    assert found.exit_code == 0
    assert "not ours, left alone: stream FOREIGN" in found.output
    assert "not ours, left alone: consumer LEDGER/spy" in found.output
    assert driven.provision().strays == ("consumer LEDGER/spy", "stream FOREIGN")
