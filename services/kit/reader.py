"""Reading JetStream in batches, fast: a callback subscription per durable, pull requests kept ahead of the work.

Loses nothing over reconnects, restarts of the server and lost requests, and never hands out what has grown too old.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from services.kit.redelivery import place_of, retry_delay_seconds
from services.kit.telemetry import FAULTS, MESSAGES, get_logger

log = get_logger(__name__)

_ACK: Final = b"+ACK"
_NAK: Final = b"-NAK"
_TERM: Final = b"+TERM"
_PROGRESS: Final = b"+WPI"

# A delivery is handed out only if this share of its ack_wait is left for the work on it.
_FRESH_SHARE: Final = 0.5
# How long after its expiry a pull request that brought nothing, not even a status, counts as lost.
_GRACE_SECONDS: Final = 1.0
_WATCHDOG_SECONDS: Final = 0.5
_DRAIN_SECONDS: Final = 2.0
# In turns, as much is read ahead as was handed out in the last so many seconds, within bounds. What is not handed out
# in time has been read in vain.
_AHEAD_SECONDS: Final = 2.5
_AHEAD_BATCHES_MAX: Final = 5
_AHEAD_BYTES_MIN: Final = 3 << 19
_AHEAD_BYTES_MAX: Final = 4 << 20
_ON_ITS_WAY_SECONDS: Final = 0.2
_ON_ITS_WAY_GAP_SECONDS: Final = 0.01


class PullReader:
    """Reads one or several durables of a stream for one task.

    Per durable up to `batch_size_max * 2` messages are on their way or buffered, in the order of the stream; a
    redelivery comes when it comes. The consumer's `ack_pending_max` must be at least four times `batch_size_max`.

    With `turn_of`, what waits beyond a batch is handed out in turns, each of all that waits with the same answer to it:
    a batch then has much of few kinds. For that up to `batch_size_max * 5` are read ahead, or some megabytes, if they
    are handed out within seconds, and a batch waits for those that are on their way, a moment at most. While the stream
    has no more than fits into a batch, all that is there is one, at once.
    """

    def __init__(
        self,
        client: Client,
        *,
        stream: str,
        ack_wait_seconds: float,
        batch_size_max: int = 1000,
        expires_seconds: float = 5.0,
        linger_seconds: float = 0.0,
        turn_of: Callable[[str], str] | None = None,
    ) -> None:
        """`linger_seconds` (0 to 0.002) waits that long for a batch to fill up; 0 takes what is there.

        `turn_of` is asked for each message's subject.
        """
        self._client = client
        self._stream = stream
        self._batch_size_max = batch_size_max
        self._expires_seconds = expires_seconds
        self._linger_seconds = linger_seconds
        self._turn_of = turn_of
        self._fresh_seconds = ack_wait_seconds * _FRESH_SHARE
        self._lanes: dict[str, _Lane] = {}
        # What is buffered, by turn: first the one whose turn it is.
        self._turns: dict[str, deque[_Delivery]] = {}
        self._handed_out: deque[tuple[float, int]] = deque()
        # Of a message, as they came lately.
        self._bytes_mean = 1024.0
        self._wake = asyncio.Event()
        self._waits = True
        self._connection = client.stats["reconnects"]
        self._draining: set[asyncio.Task[None]] = set()

    @property
    def batch_size_max(self) -> int:
        """How many messages a batch has at most, if nothing else is asked for."""
        return self._batch_size_max

    @property
    def durables(self) -> frozenset[str]:
        """What is being read."""
        return frozenset(self._lanes)

    async def add(self, durable: str) -> None:
        """Begin to read a durable. Reading it already is no error."""
        if durable in self._lanes:
            return
        lane = _Lane(durable=durable, subject=f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{durable}")
        self._lanes[durable] = lane

        async def take(message: Msg) -> None:
            if lane.removed and message.reply:
                await self._send([message], _NAK)
            else:
                self._take(lane, message)

        lane.inbox = self._client.new_inbox()
        lane.subscription = await self._client.subscribe(
            lane.inbox, cb=take, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        await self._pull(lane)

    async def remove(self, durable: str) -> None:
        """Stop reading a durable, and give back at once what is buffered of it, so that another can read it."""
        lane = self._lanes.pop(durable, None)
        if lane is None or lane.subscription is None:
            return
        # Without interest in its inbox the server drops the pull request; what is on its way still arrives.
        # Not cancelled when it takes too long: nats-py's read loop dies of the pong of a cancelled flush.
        draining = asyncio.create_task(_drain(lane.subscription))
        self._draining.add(draining)
        draining.add_done_callback(self._drained)
        await asyncio.wait({draining}, timeout=_DRAIN_SECONDS)
        lane.removed = True
        buffered = [delivery for waiting in self._turns.values() for delivery in waiting]
        self._turns.clear()
        for delivery in buffered:
            if delivery.lane is not lane:
                self._keep(delivery)
        await self._send([delivery.message for delivery in buffered if delivery.lane is lane], _NAK)

    async def close(self) -> None:
        """Stop reading everything."""
        for durable in list(self._lanes):
            await self.remove(durable)

    def stop_waiting(self) -> None:
        """From now on `next_batch` hands out what is there, or nothing, at once."""
        self._waits = False
        self._wake.set()

    async def next_batch(
        self, *, messages_max: int | None = None, bytes_max: int | None = None, timeout_seconds: float = 1.0
    ) -> list[Msg]:
        """The next messages, as they came; empty if none comes in time.

        Bounded by number (default `batch_size_max`) and bytes of payload (one message is handed out in any case).
        """
        deadline = time.monotonic() + timeout_seconds
        limit = messages_max or self._batch_size_max
        await self._pull_all()
        while True:
            if self._turn_of is not None:
                await self._let_come()
            batch = self._hand_out(limit, bytes_max)
            if batch:
                break
            left = deadline - time.monotonic()
            if left <= 0 or not self._waits:
                return []
            self._wake.clear()
            try:
                async with asyncio.timeout(min(left, _WATCHDOG_SECONDS)):
                    await self._wake.wait()
            except TimeoutError:
                pass
            if self._turns and self._linger_seconds:
                await asyncio.sleep(self._linger_seconds)
            await self._pull_all()
        await self._pull_all()
        return batch

    async def ack(self, messages: Iterable[Msg]) -> None:
        """Acknowledge, after the commit. One that is lost means one more delivery, which must do no harm."""
        await self._send(messages, _ACK)

    async def nak(self, messages: Iterable[Msg], *, delay_seconds: float = 0.0) -> None:
        """Ask for the messages to be delivered again, after `delay_seconds`."""
        body = _NAK
        if delay_seconds > 0:
            body = b"-NAK " + msgspec.json.encode({"delay": int(delay_seconds * 1_000_000_000)})
        await self._send(messages, body)

    async def term(self, messages: Iterable[Msg]) -> None:
        """Say that the messages must never be delivered again: they are stored as dead letters."""
        await self._send(messages, _TERM)

    async def in_progress(self, messages: Iterable[Msg]) -> None:
        """Ask for another ack_wait: the work goes on."""
        await self._send(messages, _PROGRESS)

    def _drained(self, task: asyncio.Task[None]) -> None:
        self._draining.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("subscription not drained", stream=self._stream, error=repr(error))

    async def _send(self, messages: Iterable[Msg], body: bytes) -> None:
        try:
            for message in messages:
                await self._client.publish(message.reply, body)
        except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError) as error:
            FAULTS.labels(place="reader.acknowledge").inc()
            log.warning("acknowledgements lost, the messages will be delivered again", error=repr(error))

    def _take(self, lane: "_Lane", message: Msg) -> None:
        """The callback of a lane's subscription: a delivery, or a status of its pull request."""
        lane.heard_at = time.monotonic()
        if message.reply:
            lane.outstanding -= 1
            lane.failures = 0
            lane.buffered += 1
            lane.newest = message
            self._bytes_mean += (len(message.data) - self._bytes_mean) / 16
            self._keep(_Delivery(lane, message, lane.heard_at))
        else:
            self._take_status(lane, message.headers or {})
        self._wake.set()

    def _keep(self, delivery: "_Delivery") -> None:
        turn = "" if self._turn_of is None else self._turn_of(delivery.message.subject)
        if (waiting := self._turns.get(turn)) is None:
            waiting = self._turns[turn] = deque()
        waiting.append(delivery)

    def _take_status(self, lane: "_Lane", headers: dict[str, str]) -> None:
        status = headers.get("Status", "")
        description = headers.get("Description", "")
        if status == "100":
            return
        lane.outstanding = max(0, lane.outstanding - int(headers.get("Nats-Pending-Messages", lane.outstanding)))
        if status == "408" or (status == "404" and description == "No Messages"):
            return
        if status == "409" and description in ("Server Shutdown", "Leadership Change"):
            log.info("pull request ended", durable=lane.durable, reason=description)
        else:
            # 503: no such consumer, or nobody answers for it. 409: it was deleted, or a limit of it is exceeded.
            FAULTS.labels(place=f"reader.{lane.durable}").inc()
            log.error(
                "pull request refused", stream=self._stream, durable=lane.durable, status=status, reason=description
            )
        lane.failures += 1
        lane.pause_until = time.monotonic() + min(retry_delay_seconds(lane.failures) / 4, 5.0)

    def _hand_out(self, limit: int, bytes_max: int | None) -> list[Msg]:
        batch: list[Msg] = []
        size = 0
        present = time.monotonic()
        oldest = present - self._fresh_seconds
        is_full = False
        while self._turns and not is_full:
            turn, waiting = next(iter(self._turns.items()))
            while waiting and not is_full:
                lane, message, received_at = waiting[0]
                if received_at < oldest:
                    # The server is about to deliver it again, perhaps to somebody else.
                    MESSAGES.labels(consumer=lane.durable, outcome="stale").inc()
                else:
                    size += len(message.data)
                    if bytes_max is not None and batch and size > bytes_max:
                        is_full = True
                        break
                    batch.append(message)
                    is_full = len(batch) == limit
                waiting.popleft()
                lane.buffered -= 1
            # What is left of it is behind all others now.
            del self._turns[turn]
            if waiting:
                self._turns[turn] = waiting
        self._handed_out.append((present, size))
        while self._handed_out[0][0] < present - _AHEAD_SECONDS:
            self._handed_out.popleft()
        return batch

    async def _let_come(self) -> None:
        """Wait a moment for what was asked for, while the stream has more than is here, and it keeps coming."""
        until = time.monotonic() + _ON_ITS_WAY_SECONDS
        while self._waits and time.monotonic() < until and any(lane.is_behind() for lane in self._lanes.values()):
            self._wake.clear()
            try:
                async with asyncio.timeout(_ON_ITS_WAY_GAP_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                # Others read it, or too many are unacknowledged.
                for lane in self._lanes.values():
                    lane.newest = None

    def _ahead(self) -> int:
        """How many messages of a durable may be on their way or buffered."""
        if self._turn_of is None:
            return self._batch_size_max * 2
        size = sum([handed_out for _, handed_out in self._handed_out])
        size = max(_AHEAD_BYTES_MIN, min(_AHEAD_BYTES_MAX, size))
        return max(2, min(self._batch_size_max * _AHEAD_BATCHES_MAX, int(size / max(self._bytes_mean, 1))))

    async def _pull_all(self) -> None:
        if self._client.stats["reconnects"] != self._connection:
            self._connection = self._client.stats["reconnects"]
            for lane in self._lanes.values():
                lane.outstanding = 0
        for lane in list(self._lanes.values()):
            await self._pull(lane)

    async def _pull(self, lane: "_Lane") -> None:
        now = time.monotonic()
        if lane.outstanding > 0 and now - lane.heard_at > self._expires_seconds + _GRACE_SECONDS:
            log.warning("pull request lost", stream=self._stream, durable=lane.durable, messages=lane.outstanding)
            lane.outstanding = 0
        ahead = self._ahead()
        want = ahead - max(lane.outstanding, 0) - lane.buffered
        idle = lane.outstanding <= 0 and lane.buffered == 0
        if not (idle or want >= ahead // 2) or now < lane.pause_until or not self._client.is_connected:
            return
        lane.outstanding = max(lane.outstanding, 0) + want
        lane.heard_at = now
        request = msgspec.json.encode({"batch": want, "expires": int(self._expires_seconds * 1_000_000_000)})
        await self._client.publish(lane.subject, request, reply=lane.inbox)


async def _drain(subscription: Subscription) -> None:
    await subscription.drain()  # type: ignore[no-untyped-call]  # nats-py has no annotation here


class _Lane:
    """One durable: what was asked for and has not come, what has come and is not handed out."""

    __slots__ = (
        "buffered",
        "durable",
        "failures",
        "heard_at",
        "inbox",
        "newest",
        "outstanding",
        "pause_until",
        "removed",
        "subject",
        "subscription",
    )

    def __init__(self, *, durable: str, subject: str) -> None:
        self.durable = durable
        self.subject = subject
        self.inbox = ""
        self.subscription: Subscription | None = None
        self.outstanding = 0
        self.buffered = 0
        self.failures = 0
        self.heard_at = 0.0
        self.newest: Msg | None = None
        self.pause_until = 0.0
        self.removed = False

    def is_behind(self) -> bool:
        """Whether more is on its way: it was asked for, and the stream had it when it sent the newest that came."""
        return self.outstanding > 0 and self.newest is not None and place_of(self.newest).pending > 0


class _Delivery(NamedTuple):
    lane: _Lane
    message: Msg
    received_at: float
