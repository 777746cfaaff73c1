"""Every NATS user tries every subject, both ways, against the generated configuration on a real server.

What it may do is written out here from the architecture's table, not taken from contracts/streams.py: who changes the
matrix changes this file too, and a new user, stream or consumer without a line here fails.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from contracts.streams import CONSUMERS, STREAMS, USERS, inbox_prefix
from infra.provision import operator
from tests.conftest import NatsAccount
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

# --- The subjects, all concrete. One partition stands for all; of the ledger's 64 consumers, all are tried. ---

NAMES: Final = ("operator", "gateway", "metering", "ledger", "billing", "keyvault", "console", "demo")
# Whoever has no user of its own yet, and principals that the ledger's HTTP side speaks for.
CALLERS: Final = (*NAMES, "stranger")
LEDGER_COMMANDS: Final = ("open_account", "grant", "place_hold", "extend_hold", "release_hold", "charge", "debit")
KEY_COMMANDS: Final = ("verify", "lease")

DURABLES: Final = {
    "USAGE": ("metering",),
    "CHARGES": tuple(f"ledger-charges-{group}" for group in range(8)),
    "PAYMENTS": ("ledger-payments",),
    "STRIPE": ("billing-stripe",),
    "LEDGER": ("metering-directory",),
    "KEYS": (),
}

# Stored by a stream: the answer to a publish that is allowed names it.
STORED: Final = {
    **{f"usage.v1.07.{source}": "USAGE" for source in CALLERS},
    "metering.v1.07.charges.rated": "CHARGES",
    "metering.v1.07.reversals.requested": "CHARGES",
    "metering.v1.07.charges.forgiven": "CHARGES",
    "metering.v1.07.prices": "CHARGES",
    "billing.v1.07.payment.granted": "PAYMENTS",
    "billing.v1.07.payment.claimed": "PAYMENTS",
    "billing.v1.stripe.received": "STRIPE",
    "ledger.v1.07.account.opened": "LEDGER",
    "ledger.v1.07.lot.granted": "LEDGER",
    "keyvault.v1.07.key.created": "KEYS",
    "keyvault.v1.07.key.disabled": "KEYS",
}
COMMANDS: Final = (
    *(f"rpc.ledger.v1.07.{command}.{caller}" for command in LEDGER_COMMANDS for caller in CALLERS),
    *(f"rpc.keyvault.v1.{command}.{caller}" for command in KEY_COMMANDS for caller in CALLERS),
)
# Answered by JetStream.
STREAM_CALLS: Final = ("INFO", "PURGE", "CREATE", "UPDATE", "DELETE", "MSG.GET", "MSG.DELETE", "SNAPSHOT", "RESTORE")
CONSUMER_CALLS: Final = ("INFO", "MSG.NEXT", "DURABLE.CREATE", "CREATE", "DELETE", "PAUSE", "UNPIN")
JETSTREAM_CALLS: Final = (
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.CREATE.MINE",
    *(f"$JS.API.STREAM.{call}.{stream}" for stream in DURABLES for call in STREAM_CALLS),
    *(f"$JS.API.CONSUMER.{call}.{stream}" for stream in DURABLES for call in ("NAMES", "LIST")),
    *(f"$JS.API.CONSUMER.CREATE.{stream}.spy" for stream in DURABLES),
    *(f"$JS.API.CONSUMER.CREATE.{stream}.spy.usage.v1.07.demo" for stream in DURABLES),
    *(
        f"$JS.API.CONSUMER.{call}.{stream}.{durable}"
        for stream, durables in DURABLES.items()
        for durable in durables
        for call in CONSUMER_CALLS
    ),
    *(f"$JS.API.DIRECT.GET.{stream}" for stream in DURABLES),
    "$JS.API.DIRECT.GET.USAGE.usage.v1.07.demo",
)
ACKNOWLEDGEMENTS: Final = tuple(
    f"$JS.ACK.{stream}.{durable}.1.1.1.1795182836660786394.0"
    for stream, durables in DURABLES.items()
    for durable in durables
)
INBOXES: Final = (*(f"_INBOX_{name}.x" for name in NAMES), "_INBOX.x", "_INBOX_stranger.x")
NOBODYS: Final = (
    # Another version, one token less, one more, another noun.
    "usage.v2.07.demo",
    "usage.v1.07",
    "usage.v1.07.demo.more",
    "usage.demo",
    "metering.v1.07",
    "billing.v1.07.refund.made",
    "billing.v1.stripe.forged",
    "ledger.v1.07.account",
    "ledger.v1.07.account.opened.twice",
    "keyvault.v1.07.secret.stored",
    "rpc.ledger.v1.07.place_hold",
    "rpc.ledger.v1.07.place_hold.gateway.more",
    "rpc.ledger.v2.07.place_hold.gateway",
    "rpc.keyvault.v1.verify",
    "rpc.keyvault.v1.verify.gateway.more",
    "rpc.metering.v1.07.ingest.gateway",
    "gateway.v1.07.model.called",
    "anything",
    # The longer form of an acknowledgement: domain, account, stream, consumer, …
    *(f"$JS.ACK._.hash.{stream}.{durables[0]}.1.1.1.1.0.x" for stream, durables in DURABLES.items() if durables),
    "$JS.FC.USAGE.metering.x",
    "$JS.SNAPSHOT.ACK.USAGE.x",
    "$JS.EVENT.ADVISORY.API",
    "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.USAGE.metering",
    "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.SERVER.PING.CONNZ",
    "$SYS.REQ.USER.INFO",
    "$SYS.REQ.ACCOUNT.W0.INFO",
    "$SYS.REQ.ACCOUNT.PING.CONNZ",
    "$SYS.ACCOUNT.W0.CONNECT",
    "$SYS._INBOX.x",
    "_R_.x",
    "_GR_.x.y.z",
    "$GNR.x",
    "$NRG.x",
    "$KV.bucket.key",
    "$O.bucket.C.x",
    "$MQTT.msgs.x",
)
PUBLISHED: Final = (*STORED, *COMMANDS, *JETSTREAM_CALLS, *ACKNOWLEDGEMENTS, *INBOXES, *NOBODYS)

WILDCARDS: Final = (
    ">",
    "*",
    "*.>",
    "*.v1.>",
    "usage.>",
    "usage.v1.*.*",
    "usage.v1.*.demo",
    "metering.>",
    "metering.v1.*.charges.rated",
    "billing.>",
    "ledger.>",
    "ledger.v1.*.account.opened",
    "keyvault.>",
    "keyvault.v1.>",
    "keyvault.v1.*.*.*",
    "keyvault.v1.*.key.*",
    "keyvault.v1.*.key.disabled",
    "rpc.>",
    "rpc.*.v1.>",
    "rpc.ledger.>",
    "rpc.ledger.v1.07.>",
    "rpc.ledger.v1.*.*.*",
    "rpc.ledger.v1.07.*.*",
    "rpc.ledger.v1.*.place_hold.*",
    "rpc.ledger.v1.*.*.gateway",
    "rpc.keyvault.>",
    "rpc.keyvault.v1.>",
    "rpc.keyvault.v1.*.*",
    "rpc.keyvault.v1.lease.*",
    *(f"_INBOX_{name}.>" for name in NAMES),
    *(f"_INBOX_{name}.*.*" for name in NAMES),
    "_INBOX.>",
    "*.x",
    "$JS.>",
    "$JS.API.>",
    "$JS.ACK.>",
    "$JS.ACK.USAGE.metering.>",
    "$JS.EVENT.>",
    "$SYS.>",
    "$SYS.REQ.>",
)
SUBSCRIBED: Final = (*PUBLISHED, *WILDCARDS)


# --- Who may do what. ---


def reads(stream: str, *durables: str) -> set[str]:
    """Pulling from one's own consumers, looking at them, acknowledging."""
    return {
        subject
        for durable in durables
        for subject in (
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}",
            f"$JS.API.CONSUMER.INFO.{stream}.{durable}",
            f"$JS.ACK.{stream}.{durable}.1.1.1.1795182836660786394.0",
        )
    }


def trims(stream: str, *others: str) -> set[str]:
    """Removing what every consumer has acknowledged: how far the `others` are has to be known."""
    return {
        f"$JS.API.STREAM.INFO.{stream}",
        f"$JS.API.STREAM.PURGE.{stream}",
        *(f"$JS.API.CONSUMER.INFO.{stream}.{other}" for other in others),
    }


def own_inbox(name: str) -> set[str]:
    return {f"_INBOX_{name}.x", f"_INBOX_{name}.>", f"_INBOX_{name}.*.*"}


MAY_PUBLISH: Final[Mapping[str, set[str]]] = {
    "operator": {*JETSTREAM_CALLS},
    "gateway": {
        "usage.v1.07.gateway",
        "rpc.ledger.v1.07.place_hold.gateway",
        "rpc.ledger.v1.07.extend_hold.gateway",
        "rpc.ledger.v1.07.release_hold.gateway",
        "rpc.keyvault.v1.verify.gateway",
        "rpc.keyvault.v1.lease.gateway",
    },
    "metering": {
        # Its HTTP ingest publishes for every principal it has authenticated.
        *(f"usage.v1.07.{source}" for source in CALLERS),
        "metering.v1.07.charges.rated",
        *reads("USAGE", "metering"),
        *reads("LEDGER", "metering-directory"),
        *trims("USAGE"),
    },
    "ledger": {
        "ledger.v1.07.account.opened",
        "ledger.v1.07.lot.granted",
        # Its HTTP side forwards to the owner of the partition what a principal it has authenticated asks.
        *(f"rpc.ledger.v1.07.{command}.{caller}" for command in LEDGER_COMMANDS for caller in CALLERS),
        *reads("CHARGES", *(f"ledger-charges-{group}" for group in range(8))),
        *reads("PAYMENTS", "ledger-payments"),
        *trims("CHARGES"),
        *trims("PAYMENTS"),
        *trims("LEDGER", "metering-directory"),
    },
    "billing": {
        "billing.v1.07.payment.granted",
        "billing.v1.07.payment.claimed",
        "billing.v1.stripe.received",
        *reads("STRIPE", "billing-stripe"),
        *trims("STRIPE"),
    },
    "keyvault": {
        "keyvault.v1.07.key.created",
        "keyvault.v1.07.key.disabled",
        "rpc.ledger.v1.07.open_account.keyvault",
        "rpc.ledger.v1.07.grant.keyvault",
        "rpc.ledger.v1.07.debit.keyvault",
        *trims("KEYS"),
    },
    "console": set(),
    "demo": {"usage.v1.07.demo"},
}

MAY_SUBSCRIBE: Final[Mapping[str, set[str]]] = {
    **{name: own_inbox(name) for name in NAMES},
    "gateway": {
        *own_inbox("gateway"),
        # What keyvault says of keys, as it says it.
        "keyvault.v1.07.key.created",
        "keyvault.v1.07.key.disabled",
        "keyvault.v1.*.key.*",
        "keyvault.v1.*.key.disabled",
    },
    "ledger": {
        *own_inbox("ledger"),
        *(f"rpc.ledger.v1.07.{command}.{caller}" for command in LEDGER_COMMANDS for caller in CALLERS),
        "rpc.ledger.v1.*.*.*",
        "rpc.ledger.v1.07.*.*",
        "rpc.ledger.v1.*.place_hold.*",
        "rpc.ledger.v1.*.*.gateway",
    },
    "keyvault": {
        *own_inbox("keyvault"),
        *(f"rpc.keyvault.v1.{command}.{caller}" for command in KEY_COMMANDS for caller in CALLERS),
        "rpc.keyvault.v1.*.*",
        "rpc.keyvault.v1.lease.*",
    },
}

# Who answers what it receives, on any subject and once.
ANSWERS: Final = {"ledger": "rpc.ledger.v1.*.*.*", "keyvault": "rpc.keyvault.v1.*.*"}


# --- Trying it. ---

# No call understands it, so that none of them changes anything; a stream stores it.
NOTHING_TO_DO: Final = b'{"batch": "none", "nothing_to_do": true}'

_VIOLATION: Final = re.compile(
    r'permissions violation for (publish|publish with reply|subscription) (?:of |to )?"([^"]+)"'
)


@dataclass
class Try:
    """A connection of a user, and what the server refused it. nats-py hands the server's words over in lower case."""

    name: str
    client: Client
    refused: list[tuple[str, str]] = field(default_factory=list)

    async def publish(self, subject: str, body: bytes = NOTHING_TO_DO, *, reply: str = "") -> bool:
        """Publish, and say whether it was allowed."""
        self.refused.clear()
        await self.client.publish(subject, body, reply=reply)
        await settled(self.client)
        return not self.refused

    def refused_subjects(self, verb: str) -> set[str]:
        return {subject for found, subject in self.refused if found == verb}


async def settled(client: Client) -> None:
    """Return once the server has dealt with everything that was sent."""
    # The ping of the first overtakes what nats-py still buffers; when its pong is there, that has been sent.
    await client.flush()
    await client.flush()


@asynccontextmanager
async def trying(account: NatsAccount, name: str) -> AsyncIterator[Try]:
    """A connection as a user of the matrix."""
    found: list[tuple[str, str]] = []

    async def remember(error: Exception) -> None:
        match = _VIOLATION.search(str(error).lower())
        found.append((match[1], match[2]) if match else ("?", str(error)))

    client = await nats.connect(
        account.url,
        user=account.user(name),
        password=account.password(name),
        inbox_prefix=inbox_prefix(name),
        error_cb=remember,
        allow_reconnect=False,
    )
    try:
        yield Try(name, client, found)
    finally:
        await client.close()


@asynccontextmanager
async def answering(account: NatsAccount) -> AsyncIterator[None]:
    """The ledger and keyvault are there and answer every request."""
    async with trying(account, "ledger") as ledger, trying(account, "keyvault") as keyvault:
        for responder in (ledger, keyvault):

            async def answer(message: Msg, responder: Try = responder) -> None:
                if message.reply:
                    await responder.client.publish(message.reply, f"answer of {responder.name}".encode())

            await responder.client.subscribe(ANSWERS[responder.name], cb=answer)
            await settled(responder.client)
        yield
        assert not ledger.refused
        assert not keyvault.refused


@pytest.fixture
async def jetstream(nats_account: NatsAccount) -> AsyncIterator[JetStreamContext]:
    async with operator(
        nats_account.url, nats_account.password("operator"), user=nats_account.user("operator")
    ) as context:
        yield context


def lower(subjects: Iterable[str]) -> set[str]:
    return {subject.lower() for subject in subjects}


def test_every_user_stream_and_consumer_has_its_expectation() -> None:
    assert {user.name for user in USERS} == set(NAMES) == set(MAY_PUBLISH) == set(MAY_SUBSCRIBE)
    assert {stream.name for stream in STREAMS} == set(DURABLES)
    assert {(each.stream, each.durable) for each in CONSUMERS} == {
        (stream, durable) for stream, durables in DURABLES.items() for durable in durables
    }
    assert set().union(*MAY_PUBLISH.values()) <= set(PUBLISHED)
    assert set().union(*MAY_SUBSCRIBE.values()) <= set(SUBSCRIBED)
    # Refusals are told apart by subjects in lower case.
    assert len(lower(SUBSCRIBED)) == len(set(SUBSCRIBED)) == len(SUBSCRIBED)


@pytest.mark.parametrize("name", NAMES)
async def test_a_user_publishes_what_is_listed_and_nothing_else(
    nats_account: NatsAccount, jetstream: JetStreamContext, name: str
) -> None:
    answers: dict[str, bytes] = {}

    async def remember(message: Msg) -> None:
        answers[PUBLISHED[int(message.subject.rsplit(".", 1)[1])]] = message.data

    async with answering(nats_account), trying(nats_account, name) as user:
        await user.client.subscribe(f"_INBOX_{name}.answers.*", cb=remember)
        for index, subject in enumerate(PUBLISHED):
            await user.client.publish(subject, NOTHING_TO_DO, reply=f"_INBOX_{name}.answers.{index}")
        await settled(user.client)

        allowed = {subject for subject in PUBLISHED if subject.lower() not in user.refused_subjects("publish")}
        assert allowed == MAY_PUBLISH[name]
        assert [each for each in user.refused if each[0] != "publish"] == []

        # What is allowed also works: it is stored, or answered, and nobody else's answer came.
        with suppress(AssertionError):
            await eventually(lambda: set(answers) >= allowed, seconds=20)
        assert set(answers) == allowed
    for subject, body in answers.items():
        if subject in STORED:
            assert json.loads(body)["stream"] == STORED[subject]
        elif subject in COMMANDS:
            assert body == f"answer of {subject.split('.')[1]}".encode()
    for stream in DURABLES:
        state = (await jetstream.stream_info(stream, subjects_filter=">")).state
        assert set(state.subjects or {}) == {each for each in MAY_PUBLISH[name] if STORED.get(each) == stream}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("queue", ["", "workers"])
async def test_a_user_listens_to_what_is_listed_and_to_nothing_else(
    nats_account: NatsAccount, name: str, queue: str
) -> None:
    async with trying(nats_account, name) as user:
        for subject in SUBSCRIBED:
            await user.client.subscribe(subject, queue=queue, cb=ignore)
        await settled(user.client)
        refused = user.refused_subjects("subscription")
        assert {subject for subject in SUBSCRIBED if subject.lower() not in refused} == MAY_SUBSCRIBE[name]
        assert [each for each in user.refused if each[0] != "subscription"] == []


async def ignore(_message: Msg) -> None:
    """What comes is of no interest."""


@pytest.mark.parametrize(
    ("user", "secret"),
    [(None, None), ("ledger", ""), ("ledger", "wrong"), ("SYS", ""), ("sys", "sys"), ("nobody", "x")],
)
async def test_nobody_gets_in_without_the_password_of_a_user(
    nats_account: NatsAccount, user: str | None, secret: str | None
) -> None:
    name = nats_account.user(user) if user == "ledger" else user
    server = urlsplit(nats_account.url)
    reader, writer = await asyncio.open_connection(server.hostname, server.port)
    try:
        assert (await reader.readline()).startswith(b"INFO ")
        login = {"verbose": False, "pedantic": False, **({"user": name, "pass": secret} if name else {})}
        writer.write(f"CONNECT {json.dumps(login)}\r\nPING\r\n".encode())
        assert await reader.readline() == b"-ERR 'Authorization Violation'\r\n"
    finally:
        writer.close()
        await writer.wait_closed()


async def test_a_responder_answers_what_it_was_asked_once(nats_account: NatsAccount) -> None:
    async with trying(nats_account, "ledger") as ledger, trying(nats_account, "gateway") as gateway:
        answers: asyncio.Queue[Msg] = asyncio.Queue()
        requests: asyncio.Queue[Msg] = asyncio.Queue()
        await gateway.client.subscribe("_INBOX_gateway.>", cb=answers.put)
        await ledger.client.subscribe("rpc.ledger.v1.07.*.*", cb=requests.put)
        await asyncio.gather(settled(gateway.client), settled(ledger.client))

        assert not await ledger.publish("_INBOX_gateway.answer")
        assert await gateway.publish("rpc.ledger.v1.07.place_hold.gateway", reply="_INBOX_gateway.answer")
        reply = (await requests.get()).reply
        assert not await ledger.publish("_INBOX_gateway.another")
        assert await ledger.publish(reply, b"first")
        assert not await ledger.publish(reply, b"second")
        assert (await answers.get()).data == b"first"
        assert answers.empty()


async def test_others_do_not_answer(nats_account: NatsAccount) -> None:
    """Only who answers commands has the right to answer, whatever it learns of others' inboxes."""
    for name in set(NAMES) - set(ANSWERS):
        async with trying(nats_account, name) as user:
            for other in NAMES:
                assert not await user.publish(f"_INBOX_{other}.answers.1")


async def test_who_listens_does_not_answer_what_it_hears(nats_account: NatsAccount) -> None:
    async with trying(nats_account, "keyvault") as keyvault, trying(nats_account, "gateway") as gateway:
        heard: asyncio.Queue[Msg] = asyncio.Queue()
        await gateway.client.subscribe("keyvault.v1.*.key.*", cb=heard.put)
        await settled(gateway.client)
        assert await keyvault.publish("keyvault.v1.07.key.disabled", reply="_INBOX_keyvault.answer")
        assert (await asyncio.wait_for(heard.get(), 5)).subject == "keyvault.v1.07.key.disabled"
        assert not await gateway.publish("_INBOX_keyvault.answer")


# --- Subjects that a request names for its answer: what the server enforces, and what it does not. ---


async def store(user: Try, subject: str, body: bytes) -> None:
    """Publish to a stream, and see it stored."""
    assert "seq" in json.loads((await user.client.request(subject, body)).data)


async def pull(user: Try, consumer: str, *, reply: str) -> None:
    """Ask for the next message to be delivered onto `reply`."""
    body = json.dumps({"batch": 1, "expires": 20_000_000_000}).encode()
    assert await user.publish(f"$JS.API.CONSUMER.MSG.NEXT.{consumer}", body, reply=reply)


async def pull_nothing(user: Try, consumer: str, *, reply: str) -> None:
    """Ask for a message of a consumer for which there is none: a status that says so is delivered onto `reply`."""
    body = json.dumps({"batch": 1, "no_wait": True}).encode()
    assert await user.publish(f"$JS.API.CONSUMER.MSG.NEXT.{consumer}", body, reply=reply)


async def test_the_subject_for_an_answer_may_be_any_but_an_acknowledgement(
    nats_account: NatsAccount, jetstream: JetStreamContext
) -> None:
    """The server checks the subject one publishes on, and of the one named for the answer only that it is not its own
    ($JS.ACK, _R_, _GR_). A trace (Nats-Trace-Dest) is checked like a publish.
    """
    async with trying(nats_account, "demo") as demo:
        for reserved in (ACKNOWLEDGEMENTS[0], "_R_.x.y", "_GR_.abcdefgh.ijklmn.x"):
            assert not await demo.publish("usage.v1.07.demo", reply=reserved), reserved
        for other in ("rpc.ledger.v1.07.grant.operator", "ledger.v1.07.account.opened", "_INBOX_ledger.x"):
            assert await demo.publish("usage.v1.07.demo", reply=other), other
            demo.refused.clear()
            await demo.client.publish("usage.v1.07.demo", NOTHING_TO_DO, headers={"Nats-Trace-Dest": other})
            await settled(demo.client)
            assert demo.refused == [("publish", other.lower())]

    async def receipt() -> bool:
        return bool((await jetstream.stream_info("LEDGER")).state.messages)

    await eventually(receipt)


async def test_a_message_pulled_onto_a_command_subject_keeps_its_own_subject(nats_account: NatsAccount) -> None:
    """Metering, which may not publish `rpc.>`, can have JetStream deliver a usage event of its own wording there: the
    server delivers a pull wherever the request says. What arrives carries the subject it was stored under, so a
    responder that takes command and principal from the message's subject (never from its subscription) is not fooled.
    """
    arrived: asyncio.Queue[Msg] = asyncio.Queue()
    async with trying(nats_account, "ledger") as ledger, trying(nats_account, "metering") as metering:
        await ledger.client.subscribe("rpc.ledger.v1.*.*.*", cb=arrived.put)
        await settled(ledger.client)
        await store(metering, "usage.v1.07.metering", b'{"command": "grant"}')
        await pull(metering, "USAGE.metering", reply="rpc.ledger.v1.07.grant.operator")
        message = await asyncio.wait_for(arrived.get(), 20)
        assert message.data == b'{"command": "grant"}'
        assert message.subject == "usage.v1.07.metering"

        # A status has no body; the receipt of a publish and the answer to a call have the server's own.
        await pull_nothing(metering, "LEDGER.metering-directory", reply="rpc.ledger.v1.07.grant.operator")
        status = await asyncio.wait_for(arrived.get(), 20)
        assert (status.subject, status.data) == ("rpc.ledger.v1.07.grant.operator", b"")
        assert await metering.publish("usage.v1.07.demo", reply="rpc.ledger.v1.07.grant.operator")
        receipt = await asyncio.wait_for(arrived.get(), 20)
        assert receipt.subject == "rpc.ledger.v1.07.grant.operator"
        assert set(json.loads(receipt.data)) == {"stream", "seq"}


async def test_a_message_pulled_onto_another_stream_is_not_what_its_readers_asked_for(
    nats_account: NatsAccount, jetstream: JetStreamContext
) -> None:
    """A usage event that metering has delivered onto the ledger's facts is stored there, but under its own subject,
    which no consumer of that stream reads. The server's receipts do get to readers: they put them aside as unreadable.
    """
    async with trying(nats_account, "metering") as metering:
        await store(metering, "usage.v1.07.demo", b'{"account": "acme"}')
        await pull(metering, "USAGE.metering", reply="ledger.v1.07.account.opened")

        async def forged() -> bool:
            return bool((await jetstream.stream_info("LEDGER")).state.messages)

        await eventually(forged)
        stored = await jetstream.get_msg("LEDGER", seq=1)
        assert (stored.subject, stored.data) == ("usage.v1.07.demo", b'{"account": "acme"}')
        assert (await jetstream.consumer_info("LEDGER", "metering-directory")).num_pending == 0

        assert await metering.publish("usage.v1.07.demo", reply="ledger.v1.07.account.opened")

        async def receipt() -> bool:
            return bool((await jetstream.consumer_info("LEDGER", "metering-directory")).num_pending)

        await eventually(receipt)


async def test_a_reader_can_have_jetstream_call_itself_which_permissions_do_not_prevent(
    nats_account: NatsAccount, jetstream: JetStreamContext
) -> None:
    """A known limit of NATS permissions, kept here so that we notice when it moves.

    The status of a pull that finds nothing has no body and goes onto any subject, by the server's own hand: onto
    `$JS.API.STREAM.PURGE.<any>` or `…DELETE.<any>` it is that very call. So a user with one consumer (metering, ledger,
    billing) can remove any stream's messages, any consumer, any stream. It cannot make one or read one: calls with a
    body are not reachable, for a message keeps its own subject, and receipts and answers are not what a call
    understands. A user without a consumer (gateway, keyvault, console, publishing services) reaches none of them.
    No permission closes it. JetStream in an account of its own would: from a services' account that imports single
    calls of it, a status reaches those only; purging would have to be left to users without a consumer. Services are
    trusted not to; publishing services need not be.
    """

    async def purged() -> bool:
        return (await jetstream.stream_info("USAGE")).state.messages == 0

    async with trying(nats_account, "demo") as demo, trying(nats_account, "gateway") as gateway:
        calls = ("STREAM.PURGE.USAGE", "STREAM.DELETE.USAGE", "CONSUMER.DELETE.USAGE.metering")
        for call in calls:
            assert await demo.publish("usage.v1.07.demo", reply=f"$JS.API.{call}")
            assert await gateway.publish("usage.v1.07.gateway", reply=f"$JS.API.{call}")
            # Nobody is there to answer it.
            assert await gateway.publish("rpc.ledger.v1.07.place_hold.gateway", reply=f"$JS.API.{call}")
        await asyncio.sleep(0.2)
        state = (await jetstream.stream_info("USAGE")).state
        assert (state.messages, state.consumer_count) == (2 * len(calls), 1)

    async with trying(nats_account, "billing") as billing:
        await pull_nothing(billing, "STRIPE.billing-stripe", reply="$JS.API.STREAM.PURGE.USAGE")
        await eventually(purged)
