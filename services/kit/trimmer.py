"""Removes from a stream what every consumer has acknowledged: streams refuse when full, so somebody must make room.

Knows consumers from the contract, never from the server: one that is missing there keeps everything. A stream to which
the contract gives none is only listened to, live: its oldest messages make room.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec
import nats.errors
from nats.aio.client import Client

from contracts.streams import CONSUMERS, STREAMS, Consumer, Stream
from services.kit.telemetry import FAULTS, get_logger

log = get_logger(__name__)

EVERY_SECONDS: Final = 30.0
TIMEOUT_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class StreamState:
    """What is stored: `messages` of `bytes_stored` in all, numbered from `first_sequence` to `last_sequence`."""

    messages: int
    bytes_stored: int
    first_sequence: int
    last_sequence: int


@dataclass(frozen=True, slots=True)
class ConsumerState:
    """How far a consumer is. Up to `ack_floor` it acknowledged all that was meant for it."""

    ack_floor: int
    pending: int
    unacknowledged: int
    reads_all: bool


class TrimFailed(Exception):
    """The server did not answer, or refused. Nothing was lost, and it is tried again."""


def trim_up_to(stream: StreamState, consumers: Sequence[ConsumerState], *, keep_bytes_max: int) -> int:
    """The last sequence number to remove: acknowledged by all, and leaving about `keep_bytes_max`. 0 for nothing.

    `stream` is older than `consumers`: what was stored in between is beyond its `last_sequence`.
    """
    if stream.bytes_stored <= keep_bytes_max or stream.messages == 0:
        return 0
    surplus = (stream.bytes_stored - keep_bytes_max) * stream.messages // stream.bytes_stored
    acknowledged = min((_acknowledged(consumer, stream) for consumer in consumers), default=stream.last_sequence)
    last = min(acknowledged, stream.first_sequence + surplus - 1, stream.last_sequence)
    return last if last >= stream.first_sequence else 0


def _acknowledged(consumer: ConsumerState, stream: StreamState) -> int:
    # The floor of one that reads only some subjects stands still while others are written to. With nothing waiting
    # and nothing under way, whatever the stream held before is not, or no longer, meant for it. (The server counts what
    # waits a moment late; that concerns the newest messages, which are kept anyway.)
    if not consumer.reads_all and consumer.pending == 0 and consumer.unacknowledged == 0:
        return max(consumer.ack_floor, stream.last_sequence)
    return consumer.ack_floor


class _Refusal(msgspec.Struct):
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct):
    error: _Refusal | None = None


class _Stored(msgspec.Struct):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0


class _StreamInfo(_Answer):
    state: _Stored = msgspec.field(default_factory=_Stored)


class _Floor(msgspec.Struct):
    stream_seq: int = 0


class _ConsumerInfo(_Answer):
    ack_floor: _Floor = msgspec.field(default_factory=_Floor)
    num_pending: int = 1
    num_ack_pending: int = 1


class _Purged(_Answer):
    purged: int = 0


Answer = TypeVar("Answer", bound=_Answer)


class Trimmer:
    """Trims the streams that the contract gives a service to trim. Several at once do no harm."""

    def __init__(
        self,
        client: Client,
        *,
        service: str,
        streams: Sequence[Stream] = STREAMS,
        consumers: Sequence[Consumer] = CONSUMERS,
        every_seconds: float = EVERY_SECONDS,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._client = client
        self._streams = [stream for stream in streams if stream.trimmed_by == service]
        self._consumers = consumers
        self._every_seconds = every_seconds
        self._timeout_seconds = timeout_seconds
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Trim every now and then until `stop`."""
        while not self._stopping.is_set():
            for stream in self._streams:
                try:
                    await self.trim(stream)
                except TrimFailed as error:
                    FAULTS.labels(place="trimmer").inc()
                    log.error("stream not trimmed", stream=stream.name, error=str(error))
            try:
                async with asyncio.timeout(self._every_seconds):
                    await self._stopping.wait()
            except TimeoutError:
                pass

    def stop(self) -> None:
        """Let `run` return."""
        self._stopping.set()

    async def trim(self, stream: Stream) -> int:
        """Trim one stream now; how many messages were removed. Raises TrimFailed."""
        state = await self._ask(f"$JS.API.STREAM.INFO.{stream.name}", _StreamInfo)
        found = StreamState(
            messages=state.state.messages,
            bytes_stored=state.state.bytes,
            first_sequence=state.state.first_seq,
            last_sequence=state.state.last_seq,
        )
        if found.bytes_stored <= stream.keep_bytes_max:
            return 0
        consumers = [
            await self._consumer(stream, consumer) for consumer in self._consumers if consumer.stream == stream.name
        ]
        last = trim_up_to(found, consumers, keep_bytes_max=stream.keep_bytes_max)
        if last == 0:
            floor = min((consumer.ack_floor for consumer in consumers), default=None)
            log.warning("stream full of what is not acknowledged", stream=stream.name, ack_floor=floor)
            return 0
        answer = await self._ask(f"$JS.API.STREAM.PURGE.{stream.name}", _Purged, {"seq": last + 1})
        log.info("stream trimmed", stream=stream.name, removed=answer.purged, up_to_sequence=last)
        return answer.purged

    async def _consumer(self, stream: Stream, consumer: Consumer) -> ConsumerState:
        info = await self._ask(f"$JS.API.CONSUMER.INFO.{stream.name}.{consumer.durable}", _ConsumerInfo)
        return ConsumerState(
            ack_floor=info.ack_floor.stream_seq,
            pending=info.num_pending,
            unacknowledged=info.num_ack_pending,
            reads_all=stream.subjects == consumer.filter_subjects,
        )

    async def _ask(self, subject: str, shape: type[Answer], question: object = None) -> Answer:
        body = b"" if question is None else msgspec.json.encode(question)
        try:
            message = await self._client.request(subject, body, timeout=self._timeout_seconds)
            answer = msgspec.json.decode(message.data, type=shape)
        except (nats.errors.Error, OSError, msgspec.DecodeError) as error:
            raise TrimFailed(f"{subject}: {type(error).__name__}: {error}") from error
        if answer.error is not None:
            raise TrimFailed(f"{subject}: {answer.error.description} ({answer.error.err_code})")
        return answer
