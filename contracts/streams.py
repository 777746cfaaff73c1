"""Streams, consumers and the permission matrix as data: provisioning and the NATS configuration follow from it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from contracts.partition import GROUP_COUNT, GROUP_SIZE, partitions_of, token

GIBIBYTE: Final = 1 << 30

USAGE: Final = "USAGE"
CHARGES: Final = "CHARGES"
PAYMENTS: Final = "PAYMENTS"
STRIPE: Final = "STRIPE"
LEDGER: Final = "LEDGER"
KEYS: Final = "KEYS"

# All that keyvault publishes.
KEY_FACTS: Final = "keyvault.v1.*.key.*"


@dataclass(frozen=True, slots=True)
class Stream:
    """A JetStream stream: file storage, limits retention, `discard: new`: a full stream refuses and never drops.

    `trimmed_by` removes the oldest messages that every consumer has acknowledged, down to `keep_bytes_max`. Of a stream
    without consumers those are all: who listens to it was told live.
    """

    name: str
    subjects: tuple[str, ...]
    trimmed_by: str
    bytes_max: int = GIBIBYTE
    keep_bytes_max: int = GIBIBYTE // 4
    message_bytes_max: int = 4 << 20
    # About 180 bytes of server memory per id: a courtesy to publishers, never the guarantee.
    duplicate_window_seconds: int = 20


@dataclass(frozen=True, slots=True)
class Consumer:
    """A durable pull consumer with explicit acknowledgement; it redelivers for ever."""

    stream: str
    durable: str
    service: str
    filter_subjects: tuple[str, ...]
    ack_wait_seconds: int = 30
    # At least four times what a reader asks for at once, or every fetch waits for its whole time-out.
    ack_pending_max: int = 20_000


@dataclass(frozen=True, slots=True)
class User:
    """A NATS user and what it may do beyond reading its own consumers: one row of the permission matrix.

    `answers`: requests it takes, and may reply to. `listens`: others' facts it hears as they are published, without a
    consumer; what it misses it must not need.
    """

    name: str
    publishes: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    listens: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Permissions:
    """What the server lets a user do. `responds`: it may answer requests it received, once each."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    responds: bool


STREAMS: Final = (
    Stream(
        name=USAGE,
        subjects=("usage.v1.*.*",),
        trimmed_by="metering",
        bytes_max=4 * GIBIBYTE,
        message_bytes_max=256 << 10,
    ),
    Stream(name=CHARGES, subjects=("metering.v1.*.>",), trimmed_by="ledger", bytes_max=4 * GIBIBYTE),
    Stream(name=PAYMENTS, subjects=("billing.v1.*.payment.*",), trimmed_by="ledger"),
    Stream(name=STRIPE, subjects=("billing.v1.stripe.received",), trimmed_by="billing"),
    Stream(name=LEDGER, subjects=("ledger.v1.*.*.*",), trimmed_by="ledger"),
    Stream(name=KEYS, subjects=(KEY_FACTS,), trimmed_by="keyvault"),
)


def charges_consumer(group: int) -> str:
    """The durable through which the owner of a group of partitions reads their charges, each's in number order."""
    return f"ledger-charges-{group}"


METERING_CONSUMER: Final = "metering"
METERING_DIRECTORY_CONSUMER: Final = "metering-directory"
BILLING_STRIPE_CONSUMER: Final = "billing-stripe"
LEDGER_PAYMENTS_CONSUMER: Final = "ledger-payments"

CONSUMERS: Final = (
    Consumer(
        stream=USAGE,
        durable=METERING_CONSUMER,
        service="metering",
        filter_subjects=("usage.v1.*.*",),
        # Several processes share it, each with some 15,000 in hand; what a killed one had waits that long.
        ack_wait_seconds=10,
        ack_pending_max=60_000,
    ),
    *(
        Consumer(
            stream=CHARGES,
            durable=charges_consumer(group),
            service="ledger",
            filter_subjects=tuple(f"metering.v1.{token(partition)}.>" for partition in partitions_of(group)),
            # A partition whose charges conflict keeps some of it until somebody has found out.
            ack_pending_max=1_000 * GROUP_SIZE,
            # How long a partition's charges wait after its owner died with some of them in hand.
            ack_wait_seconds=10,
        )
        for group in range(GROUP_COUNT)
    ),
    Consumer(
        stream=LEDGER,
        durable=METERING_DIRECTORY_CONSUMER,
        service="metering",
        filter_subjects=("ledger.v1.*.account.opened",),
        ack_pending_max=1_000,
    ),
    Consumer(
        stream=STRIPE,
        durable=BILLING_STRIPE_CONSUMER,
        service="billing",
        filter_subjects=("billing.v1.stripe.received",),
        ack_wait_seconds=10,
        ack_pending_max=1_000,
    ),
    Consumer(
        stream=PAYMENTS,
        durable=LEDGER_PAYMENTS_CONSUMER,
        service="ledger",
        filter_subjects=("billing.v1.*.payment.*",),
        ack_wait_seconds=10,
        ack_pending_max=1_000,
    ),
)


def usage_subject(*, partition: int, source: str) -> str:
    """Where a usage event of `source` is published."""
    return f"usage.v1.{token(partition)}.{source}"


# The last token of the subjects on which metering sends on what came elsewhere: no source has that name, and the server
# lets nobody else publish there.
FORWARDED: Final = "metering"


def charges_rated_subject(partition: int) -> str:
    """Where metering publishes a bundle of rated charges."""
    return f"metering.v1.{token(partition)}.charges.rated"


def ledger_fact_subject(*, partition: int, noun: str, verb: str) -> str:
    """Where the ledger publishes what happened."""
    return f"ledger.v1.{token(partition)}.{noun}.{verb}"


def ledger_command_subject(*, partition: int, command: str, principal: str) -> str:
    """Where the owner of a partition takes a command. The last token is the caller: no user may publish another's."""
    return f"rpc.ledger.v1.{token(partition)}.{command}.{principal}"


def inbox_prefix(user: str) -> str:
    """The only inbox a user may listen on."""
    return f"_INBOX_{user}"


# Publishing services: each may report usage under its own source and nothing else.
SOURCES: Final = ("demo",)

OPERATOR: Final = "operator"

USERS: Final = (
    # Provisions streams and consumers, reads their state. Holds no business permission.
    User(name=OPERATOR, publishes=("$JS.API.>",)),
    User(
        name="gateway",
        publishes=(
            "usage.v1.*.gateway",
            "rpc.ledger.v1.*.place_hold.gateway",
            "rpc.ledger.v1.*.extend_hold.gateway",
            "rpc.ledger.v1.*.release_hold.gateway",
            "rpc.keyvault.v1.verify.gateway",
            "rpc.keyvault.v1.lease.gateway",
        ),
        # What it remembers of a key is forgotten at once; what it misses it believes for some seconds only.
        listens=(KEY_FACTS,),
    ),
    # Its HTTP ingest publishes for every authenticated source.
    User(name="metering", publishes=("usage.v1.*.*", "metering.v1.*.charges.rated")),
    # Its HTTP side forwards commands to the partition's owner under the authenticated principal.
    User(name="ledger", publishes=("ledger.v1.*.*.*", "rpc.ledger.v1.*.*.*"), answers=("rpc.ledger.v1.*.*.*",)),
    User(name="billing", publishes=("billing.v1.*.payment.*", "billing.v1.stripe.received")),
    User(
        name="keyvault",
        publishes=(
            KEY_FACTS,
            "rpc.ledger.v1.*.open_account.keyvault",
            "rpc.ledger.v1.*.grant.keyvault",
            "rpc.ledger.v1.*.debit.keyvault",
        ),
        answers=("rpc.keyvault.v1.*.*",),
    ),
    User(name="console"),
    *(User(name=source, publishes=(f"usage.v1.*.{source}",)) for source in SOURCES),
)


def consumers_of(service: str) -> tuple[Consumer, ...]:
    """The durables a service reads."""
    return tuple(consumer for consumer in CONSUMERS if consumer.service == service)


def permissions(user: User) -> Permissions:
    """What the server must allow `user`: its row of the matrix, its consumers, the streams it trims, its inbox."""
    return Permissions(
        publish=(*user.publishes, *_reading(consumers_of(user.name)), *_trimming(user.name)),
        subscribe=(*user.answers, *user.listens, f"{inbox_prefix(user.name)}.>"),
        responds=bool(user.answers),
    )


def _reading(consumers: Iterable[Consumer]) -> Iterable[str]:
    for consumer in consumers:
        name = f"{consumer.stream}.{consumer.durable}"
        yield f"$JS.API.CONSUMER.MSG.NEXT.{name}"
        yield f"$JS.API.CONSUMER.INFO.{name}"
        yield f"$JS.ACK.{name}.>"


def _trimming(service: str) -> Iterable[str]:
    for stream in STREAMS:
        if stream.trimmed_by == service:
            yield f"$JS.API.STREAM.INFO.{stream.name}"
            yield f"$JS.API.STREAM.PURGE.{stream.name}"
            # To learn what every consumer has acknowledged.
            for consumer in CONSUMERS:
                if consumer.stream == stream.name and consumer.service != service:
                    yield f"$JS.API.CONSUMER.INFO.{stream.name}.{consumer.durable}"
