"""Makes the streams and consumers of contracts/streams.py exist, and reports where existing ones differ from it.

Nothing else creates or changes a stream. Nothing here deletes one.
"""

from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import nats
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, NotFoundError

from contracts.streams import CONSUMERS, OPERATOR, STREAMS, Consumer, Stream, inbox_prefix
from infra.errors import StackError

Value = str | int | float | bool | list[str] | None

REQUEST_SECONDS_MAX: Final = 10.0


@dataclass(frozen=True, slots=True)
class Drift:
    """A field of an existing stream or consumer that is not as contracts/streams.py says."""

    where: str
    name: str
    found: Value
    wanted: Value


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What was created, what differed, and whether that was put right."""

    created: tuple[str, ...]
    drifts: tuple[Drift, ...]
    repaired: bool


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
        why = errors[-1] if errors else error
        raise StackError(
            f"NATS at {url} lets the operator not in ({why}): is Scrip running? See `scrip status`."
        ) from error
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
    """Create what is missing, compare what exists, and with `repair` change it to what is wanted."""
    created: list[str] = []
    drifts: list[Drift] = []
    for stream in streams:
        config = stream_config(stream)
        try:
            found = (await jetstream.stream_info(stream.name)).config
        except NotFoundError:
            await _apply(stream.name, jetstream.add_stream(config))
            created.append(stream.name)
            continue
        if differences := _differences(stream.name, config, found):
            drifts += differences
            if repair:
                await _apply(stream.name, jetstream.update_stream(config))
    for consumer in consumers:
        where = f"{consumer.stream}/{consumer.durable}"
        wanted = consumer_config(consumer)
        try:
            existing = (await jetstream.consumer_info(consumer.stream, consumer.durable)).config
        except NotFoundError:
            await _apply(where, jetstream.add_consumer(consumer.stream, wanted))
            created.append(where)
            continue
        if differences := _differences(where, wanted, existing):
            drifts += differences
            if repair:
                await _apply(where, jetstream.add_consumer(consumer.stream, wanted))
    return Provisioned(created=tuple(created), drifts=tuple(drifts), repaired=repair)


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
        filter_subject=consumer.filter_subject,
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=consumer.ack_wait_seconds,
        max_ack_pending=consumer.ack_pending_max,
        # For ever: a consumer that gives up skips money in silence.
        max_deliver=-1,
    )


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


def _differences(
    where: str, wanted: StreamConfig | ConsumerConfig, found: StreamConfig | ConsumerConfig
) -> tuple[Drift, ...]:
    return tuple(
        Drift(where=where, name=name, found=getattr(found, name), wanted=value)
        for name, value in vars(wanted).items()
        # What is left to the server's default is not ours to judge.
        if value is not None and _plain(getattr(found, name)) != _plain(value)
    )


def _plain(value: Value) -> Value:
    """The server leaves out what is false."""
    return value or None


async def _apply(where: str, change: Awaitable[object]) -> None:
    try:
        await change
    except APIError as error:
        raise StackError(
            f"NATS does not make {where} what contracts/streams.py says ({error.description}): "
            "if it exists, drain and delete it, then run `scrip provision` again."
        ) from error
