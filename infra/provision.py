"""Makes the streams and consumers of contracts/streams.py exist, and reports where existing ones differ from it.

Nothing else creates or changes a stream. Nothing here deletes one.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Final, TypeVar

import nats
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    ConsumerInfo,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamInfo,
)
from nats.js.errors import APIError, NotFoundError

from contracts.streams import CONSUMERS, OPERATOR, STREAMS, Consumer, Stream, inbox_prefix
from infra.errors import StackError

Value = str | int | float | bool | list[str] | Enum | None
Configuration = StreamConfig | ConsumerConfig
Info = TypeVar("Info", StreamInfo, ConsumerInfo)

REQUEST_SECONDS_MAX: Final = 10.0


@dataclass(frozen=True, slots=True)
class Drift:
    """A field of an existing stream or consumer that is not as contracts/streams.py says."""

    where: str
    name: str
    found: Value
    wanted: Value

    def __str__(self) -> str:
        return f"{self.where}: {self.name} is {in_words(self.found)}, should be {in_words(self.wanted)}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A stream or consumer that NATS did not make, or not change, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return (
            f"NATS does not make {self.where} what contracts/streams.py says ({self.reason}): "
            "if it exists, drain and delete it, then run `scrip provision` again."
        )


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What was created, what differed, what of that was put right, what NATS refused, and what is not ours."""

    created: tuple[str, ...] = ()
    drifts: tuple[Drift, ...] = ()
    repaired: frozenset[str] = frozenset()
    refusals: tuple[Refusal, ...] = ()
    strays: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[Drift, ...]:
        """The differences that still are."""
        return tuple(drift for drift in self.drifts if drift.where not in self.repaired)

    @property
    def is_complete(self) -> bool:
        """Whether every stream and consumer is there, and as contracts/streams.py says."""
        return not (self.left or self.refusals)


@asynccontextmanager
async def operator(url: str, password: str, *, user: str = OPERATOR) -> AsyncIterator[JetStreamContext]:
    """A JetStream context of the operator, the only user who may create streams."""
    errors: list[Exception] = []

    async def remember(error: Exception) -> None:
        errors.append(error)

    try:
        client = await nats.connect(
            url,
            user=user,
            password=password,
            name="scrip-operator",
            inbox_prefix=inbox_prefix(OPERATOR).encode(),
            allow_reconnect=False,
            connect_timeout=5,
            error_cb=remember,
        )
    except (nats.errors.Error, OSError, TimeoutError) as error:
        why = str(errors[-1] if errors else error) or "no answer"
        raise StackError(f"NATS at {url} does not let the operator in ({why}): is Scrip running?") from error
    try:
        yield client.jetstream(timeout=REQUEST_SECONDS_MAX)
    finally:
        await client.close()


async def provision(
    jetstream: JetStreamContext,
    *,
    repair: bool = False,
    streams: tuple[Stream, ...] = STREAMS,
    consumers: tuple[Consumer, ...] = CONSUMERS,
) -> Provisioned:
    """Create what is missing, compare what exists, and with `repair` change it to what is wanted.

    What NATS refuses is told, and keeps nothing else from being done. What is not of the contract is only named.
    """
    made = _Made()
    for stream in streams:
        config = stream_config(stream)
        existing = await _existing(jetstream.stream_info(stream.name))
        apply = jetstream.add_stream if existing is None else jetstream.update_stream
        await made.settle(stream.name, config, existing, apply=partial(apply, config), repair=repair)
    for consumer in consumers:
        wanted = consumer_config(consumer)
        found = await _existing(jetstream.consumer_info(consumer.stream, consumer.durable))
        add = partial(jetstream.add_consumer, consumer.stream, wanted)
        await made.settle(f"{consumer.stream}/{consumer.durable}", wanted, found, apply=add, repair=repair)
    return Provisioned(
        created=tuple(made.created),
        drifts=tuple(made.drifts),
        repaired=frozenset(made.repaired),
        refusals=tuple(made.refusals),
        strays=await _strays(jetstream, streams, consumers),
    )


def in_words(value: Value) -> str:
    """A value of a stream's or consumer's configuration, as one would say it."""
    match value:
        case None:
            said = "not set"
        case Enum():
            said = str(value.value)
        case bool():
            said = "yes" if value else "no"
        case list():
            said = ", ".join(map(str, value))
        case -1:
            said = "unlimited"
        case int() | float():
            said = f"{value:,.10g}"
        case _:
            said = value
    return said


def stream_config(stream: Stream) -> StreamConfig:
    """How a stream of the contract is configured."""
    return StreamConfig(
        name=stream.name,
        subjects=list(stream.subjects),
        storage=StorageType.FILE,
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.NEW,
        max_bytes=stream.bytes_max,
        max_msgs=-1,
        max_age=0,
        max_msg_size=stream.message_bytes_max,
        duplicate_window=stream.duplicate_window_seconds,
        num_replicas=1,
        # The group commit of JetStream: one fsync for a batch instead of one for each message.
        allow_atomic=True,
    )


def consumer_config(consumer: Consumer) -> ConsumerConfig:
    """How a consumer of the contract is configured."""
    return ConsumerConfig(
        durable_name=consumer.durable,
        **_filter(consumer.filter_subjects),
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=consumer.ack_wait_seconds,
        max_ack_pending=consumer.ack_pending_max,
        # For ever: a consumer that gives up skips money in silence.
        max_deliver=-1,
    )


def _filter(subjects: tuple[str, ...]) -> dict[str, Any]:
    """NATS tells one as one."""
    return {"filter_subject": subjects[0]} if len(subjects) == 1 else {"filter_subjects": list(subjects)}


async def lags(jetstream: JetStreamContext) -> Mapping[tuple[str, str], tuple[int, int]]:
    """Per (stream, durable): messages not delivered yet, and messages delivered but not acknowledged."""
    result: dict[tuple[str, str], tuple[int, int]] = {}
    for consumer in CONSUMERS:
        try:
            info = await jetstream.consumer_info(consumer.stream, consumer.durable)
        except NotFoundError:
            continue
        result[consumer.stream, consumer.durable] = (info.num_pending or 0, info.num_ack_pending or 0)
    return result


@dataclass(slots=True)
class _Made:
    """What has been done so far."""

    created: list[str] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    async def settle(
        self,
        where: str,
        wanted: Configuration,
        existing: Configuration | None,
        *,
        apply: Callable[[], Awaitable[object]],
        repair: bool,
    ) -> None:
        """Make one stream or consumer, or compare it and put it right."""
        differences = () if existing is None else _differences(where, wanted, existing)
        self.drifts += differences
        if existing is not None and not (differences and repair):
            return
        try:
            await apply()
        except APIError as error:
            self.refusals.append(Refusal(where, error.description or repr(error)))
        else:
            (self.created if existing is None else self.repaired).append(where)


async def _existing(asked: Coroutine[Any, Any, StreamInfo | ConsumerInfo]) -> Configuration | None:
    try:
        return (await asked).config
    except NotFoundError:
        return None


async def _strays(
    jetstream: JetStreamContext, streams: tuple[Stream, ...], consumers: tuple[Consumer, ...]
) -> tuple[str, ...]:
    """The streams that the contract does not name, and in those it names the consumers it does not."""
    ours = {stream.name: {one.durable for one in consumers if one.stream == stream.name} for stream in streams}
    names = [stream.config.name async for stream in _all(jetstream.streams_info)]
    found = [f"stream {name}" for name in names if name not in ours]
    for name, durables in ours.items():
        try:
            found += [
                f"consumer {name}/{each.name}"
                async for each in _all(partial(jetstream.consumers_info, name))
                if each.name not in durables
            ]
        except NotFoundError:
            continue
    return tuple(sorted(found))


async def _all(page_from: Callable[[int], Awaitable[list[Info]]]) -> AsyncIterator[Info]:
    """The server lists so many at once."""
    offset = 0
    while page := await page_from(offset):
        for each in page:
            yield each
        offset += len(page)


def _differences(where: str, wanted: Configuration, found: Configuration) -> tuple[Drift, ...]:
    return tuple(
        Drift(where=where, name=name, found=getattr(found, name), wanted=value)
        for name, value in vars(wanted).items()
        # What is left to the server's default is not ours to judge.
        if value is not None and _plain(getattr(found, name)) != _plain(value)
    )


def _plain(value: Value) -> Value:
    """The server leaves out what is false."""
    return value or None
