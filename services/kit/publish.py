"""Publishing to JetStream: every message is confirmed, or an exception names those that are not and why.

Many messages go as atomic batches (one fsync each under `sync_interval: always`), few go singly.
"""

import asyncio
import uuid
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import nats.errors
from nats.aio.client import Client

from services.kit.telemetry import PUBLISHED, get_logger

log = get_logger(__name__)

# The server's limit; below BATCH_SIZE_MIN singles are faster than the fixed cost of a batch.
BATCH_SIZE_MAX: Final = 1000
BATCH_SIZE_MIN: Final = 15
BATCH_BYTES_MAX: Final = 4 << 20
SINGLES_IN_FLIGHT_MAX: Final = 256

# What nats-server says when an id of the batch is known already.
_DUPLICATE_IN_BATCH: Final = 10201


@dataclass(frozen=True, slots=True)
class Message:
    """What to publish. A stream stores a `message_id` once per dedup window; null gives that up."""

    subject: str
    payload: bytes
    message_id: str | None
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """The stream's acknowledgement of one message. Of a duplicate, `sequence` is the first one's."""

    stream: str
    sequence: int
    duplicate: bool


class PublishFailed(Exception):
    """Not every message is confirmed. `confirmed` and `failed` have each message by its place in the call."""

    def __init__(self, *, stream: str, confirmed: Mapping[int, Published], failed: Mapping[int, str]) -> None:
        first, reason = next(iter(failed.items()))
        super().__init__(
            f"{len(failed)} of {len(failed) + len(confirmed)} messages to {stream} not confirmed,"
            f" the first is number {first}: {reason}"
        )
        self.stream = stream
        self.confirmed = confirmed
        self.failed = failed


class PublishRefused(PublishFailed):
    """The stream said no to all that failed: none of them is stored."""


class PublishUnconfirmed(PublishFailed):
    """No answer for some that failed: they may be stored or not. Publishing again with the same id is safe."""


async def publish(client: Client, *, stream: str, message: Message, timeout_seconds: float = 5.0) -> Published:
    """Publish one message and wait until it is stored."""
    (result,) = await publish_batch(client, stream=stream, messages=[message], timeout_seconds=timeout_seconds)
    return result


async def publish_batch(
    client: Client,
    *,
    stream: str,
    messages: Sequence[Message],
    timeout_seconds: float = 5.0,
    lanes: Sequence[Hashable] | None = None,
) -> list[Published]:
    """Publish messages and wait until all are stored; the result has one entry per message, in order.

    `lanes` names the lane of each message: messages of one lane are stored in their order, and none after one that
    failed; without it singles may overtake each other. The same id twice in a call collapses (ValueError if the
    bodies differ). Raises PublishRefused or PublishUnconfirmed; what those list as confirmed is stored.
    """
    first_of = _first_places(messages)
    places = sorted(set(first_of))
    call = _Call(client=client, stream=stream, messages=messages, timeout_seconds=timeout_seconds, lanes=lanes)
    for chunk in _chunks(places, messages):
        if len(chunk) < BATCH_SIZE_MIN or not await call.send_batch(chunk):
            await call.send_singles(chunk)
        if call.failed:
            break
    return call.finish(first_of)


class _Refusal(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    """What a stream answers."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    count: int = 0
    error: _Refusal | None = None


_ACK = msgspec.json.Decoder(_Ack)


class _Call:
    """The state of one `publish_batch`: what is confirmed, what failed, and whether an answer is missing."""

    def __init__(
        self,
        *,
        client: Client,
        stream: str,
        messages: Sequence[Message],
        timeout_seconds: float,
        lanes: Sequence[Hashable] | None,
    ) -> None:
        self._client = client
        self._stream = stream
        self._messages = messages
        self._timeout_seconds = timeout_seconds
        self._lanes = lanes
        self._confirmed: dict[int, Published] = {}
        self._unanswered = False
        self.failed: dict[int, str] = {}

    async def send_batch(self, places: Sequence[int]) -> bool:
        """Send an atomic batch. False: it was refused, nothing is stored; singles will tell which message is to blame.

        One known id, one forbidden subject, one lost part is enough for that.
        """
        batch = uuid.uuid4().hex
        last = len(places)
        try:
            for number, place in enumerate(places[:-1], start=1):
                message = self._messages[place]
                headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number), **_headers(message)}
                await self._client.publish(message.subject, message.payload, headers=headers)
            ack = await self._request(
                self._messages[places[-1]],
                {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(last), "Nats-Batch-Commit": "1"},
            )
        except nats.errors.NoRespondersError:
            self._fail(places, f"no stream takes {self._messages[places[-1]].subject}")
            return True
        except (nats.errors.Error, OSError) as error:
            self._unconfirmed(places, error)
            return True
        if ack.error is None:
            # A batch is stored without anything in between.
            first = ack.seq - last + 1
            for offset, place in enumerate(places):
                self._confirmed[place] = Published(stream=ack.stream, sequence=first + offset, duplicate=False)
            return True
        if ack.error.err_code != _DUPLICATE_IN_BATCH:
            log.warning("batch refused, its messages go singly", stream=self._stream, reason=_reason(ack.error))
        return False

    async def send_singles(self, places: Sequence[int]) -> None:
        """Send one by one, lanes side by side."""
        by_lane: dict[Hashable, list[int]] = {}
        for place in places:
            by_lane.setdefault(self._lanes[place] if self._lanes else place, []).append(place)
        window = asyncio.Semaphore(SINGLES_IN_FLIGHT_MAX)

        async def send(of_lane: Sequence[int]) -> None:
            async with window:
                for done, place in enumerate(of_lane):
                    if not await self._send_single(place):
                        self._fail(of_lane[done + 1 :], "not tried: one before it in its lane failed")
                        return

        await asyncio.gather(*(send(of_lane) for of_lane in by_lane.values()))

    def finish(self, first_of: Sequence[int]) -> list[Published]:
        """The results in the caller's order, or the exception that names what failed."""
        confirmed: dict[int, Published] = {}
        failed: dict[int, str] = {}
        for place, first in enumerate(first_of):
            if first in self._confirmed:
                found = self._confirmed[first]
                confirmed[place] = found if place == first else Published(found.stream, found.sequence, True)
            else:
                failed[place] = self.failed.get(first, "not tried: an earlier part of the call failed")
        self._count(confirmed, failed)
        if failed:
            kind = PublishUnconfirmed if self._unanswered else PublishRefused
            raise kind(stream=self._stream, confirmed=confirmed, failed=failed)
        return [confirmed[place] for place in range(len(first_of))]

    async def _send_single(self, place: int) -> bool:
        try:
            ack = await self._request(self._messages[place], {})
        except nats.errors.NoRespondersError:
            self._fail([place], f"no stream takes {self._messages[place].subject}")
        except (nats.errors.Error, OSError) as error:
            self._unconfirmed([place], error)
        else:
            if ack.error is None:
                self._confirmed[place] = Published(ack.stream, ack.seq, ack.duplicate)
                return True
            self._fail([place], _reason(ack.error))
        return False

    async def _request(self, message: Message, headers: Mapping[str, str]) -> _Ack:
        answer = await self._client.request(
            message.subject,
            message.payload,
            timeout=self._timeout_seconds,
            # Otherwise another stream that takes the subject would confirm it. In a batch one message has it: those
            # before it that another stream took are missing.
            headers={**_headers(message), **headers, "Nats-Expected-Stream": self._stream},
        )
        return _ACK.decode(answer.data)

    def _unconfirmed(self, places: Sequence[int], error: Exception) -> None:
        self._unanswered = True
        self._fail(places, f"no acknowledgement: {type(error).__name__}: {error}")

    def _fail(self, places: Sequence[int], reason: str) -> None:
        for place in places:
            self.failed[place] = reason

    def _count(self, confirmed: Mapping[int, Published], failed: Mapping[int, str]) -> None:
        duplicates = sum(found.duplicate for found in confirmed.values())
        lost = "unconfirmed" if self._unanswered else "refused"
        counts = {"stored": len(confirmed) - duplicates, "duplicate": duplicates, lost: len(failed)}
        for outcome, count in counts.items():
            if count:
                PUBLISHED.labels(stream=self._stream, outcome=outcome).inc(count)


def _headers(message: Message) -> dict[str, str]:
    headers = dict(message.headers) if message.headers else {}
    if message.message_id is not None:
        headers["Nats-Msg-Id"] = message.message_id
    return headers


def _first_places(messages: Sequence[Message]) -> list[int]:
    """For each message the place of the first one with its id."""
    first_by_id: dict[str, int] = {}
    first_of = []
    for place, message in enumerate(messages):
        if message.message_id is None:
            first_of.append(place)
            continue
        first = first_by_id.setdefault(message.message_id, place)
        if (messages[first].payload, messages[first].subject) != (message.payload, message.subject):
            raise ValueError(f"two messages of one call have the id {message.message_id!r} and different contents")
        first_of.append(first)
    return first_of


def _chunks(places: Sequence[int], messages: Sequence[Message]) -> list[list[int]]:
    chunks: list[list[int]] = []
    size = BATCH_BYTES_MAX
    for place in places:
        payload_bytes = len(messages[place].payload)
        if not chunks or len(chunks[-1]) == BATCH_SIZE_MAX or size + payload_bytes > BATCH_BYTES_MAX:
            chunks.append([])
            size = 0
        chunks[-1].append(place)
        size += payload_bytes
    return chunks


def _reason(refusal: _Refusal) -> str:
    return f"{refusal.description} ({refusal.err_code})"
