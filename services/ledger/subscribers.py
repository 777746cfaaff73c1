"""Messages in: commands by request/reply, charge bundles from their stream. Parsed, handed to the batcher, answered."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import nats.errors
import psycopg
from faststream.nats import NatsBroker
from faststream.nats.annotations import NatsMessage
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from prometheus_client import Gauge
from pydantic import ValidationError

from contracts import ledger as words
from contracts.partition import GROUP_SIZE, group_of, partition_of, token
from contracts.streams import CHARGES, CONSUMERS, LEDGER_PAYMENTS_CONSUMER, charges_consumer
from services.kit import dead_letters, tracing
from services.kit.batcher import Batcher, Busy, Fault, Stopped
from services.kit.broker import is_inbox, pull_subscriber
from services.kit.database import Pool
from services.kit.dead_letters import letter_of
from services.kit.reader import PullReader
from services.kit.redelivery import place_of, retry_delay_seconds
from services.kit.settings import ServiceSettings
from services.kit.telemetry import FAULTS, MESSAGES, REGISTRY, get_logger
from services.ledger.domain.commands import Command, Units
from services.ledger.engine import Owners
from services.ledger.handlers import (
    BundleItem,
    CommandItem,
    Conflicting,
    Item,
    ListItem,
    NotLookedUp,
    NotOwner,
    OutOfOrder,
    Replied,
    Result,
    Taken,
    TracedCharge,
    cost_of,
)
from services.ledger.store import HeadMoved
from services.ledger.translate import (
    Invalid,
    UnreadableBundle,
    body_hash,
    model_problems,
    read_bundle,
    read_command,
    read_list,
    read_traceparents,
    refused_as,
)

log = get_logger(__name__)

CHARGES_STOPPED: Final = Gauge(
    "scrip_ledger_charges_stopped", "1 for a partition whose charges conflict.", ("partition",), registry=REGISTRY
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How large what is asked may be: bytes of a body, commands of a list."""

    body_bytes_max: int
    list_commands_max: int


# What is not the fault of one item: all of a batch are told to try again.
TRY_AGAIN: Final = (psycopg.OperationalError, psycopg.InterfaceError, TimeoutError, HeadMoved)

# Twice as many per partition are on their way or buffered, and age there.
BUNDLES_PER_PARTITION_MAX: Final = 4
# Some of each partition: fewer at once, and many small ones stand behind few commits while the ledger is half idle.
BUNDLES_AT_ONCE_MAX: Final = 256
BYTES_AT_ONCE_MAX: Final = 8 << 20
# Bundles that may be waiting for their commit while the next ones are read.
READS_IN_FLIGHT_MAX: Final = 3
GAP_SECONDS: Final = 0.05
CONFLICT_SECONDS: Final = 30.0
# Of the time until it would be delivered again.
PAYMENT_SHARE: Final = 0.8


class CommandSubscriber:
    """Answers the commands of the partitions owned here. The caller's name is the last token of the subject.

    More than `under_way_max` at once are refused as busy before they are read, so that to refuse takes next to nothing:
    leases are renewed in the same thread.
    """

    def __init__(
        self, client: Client, *, batcher: Batcher[Item, Result], units: Units, limits: Limits, under_way_max: int
    ) -> None:
        self._client = client
        self._under_way_max = under_way_max
        self._busy = _json(words.Failed(code="busy", message=f"{under_way_max} commands are under way: ask again"))
        self._batcher = batcher
        self._units = units
        self._limits = limits
        self._subscriptions: dict[int, Subscription] = {}
        self._answering: set[asyncio.Task[None]] = set()

    async def own(self, partitions: Iterable[int]) -> None:
        """Begin to answer for partitions."""
        for partition in partitions:
            self._subscriptions[partition] = await self._client.subscribe(
                f"rpc.ledger.v1.{token(partition)}.*.*",
                cb=self._take,
                pending_msgs_limit=-1,
                pending_bytes_limit=-1,
            )
        await self._client.flush()

    async def disown(self, partitions: Iterable[int]) -> None:
        """Answer for partitions no longer."""
        for partition in partitions:
            if (subscription := self._subscriptions.pop(partition, None)) is not None:
                await _unsubscribe(subscription)

    async def _take(self, message: Msg) -> None:
        if message.reply and not is_inbox(message.reply):
            log.error("a command wants its answer elsewhere", subject=message.subject, reply_subject=message.reply)
            return
        if len(self._answering) >= self._under_way_max:
            # Let others have their turn: the next message is there already.
            await asyncio.sleep(0)
            await self._reply(message, self._busy)
            return
        task = asyncio.create_task(self._answer(message))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, message: Msg) -> None:
        await self._reply(message, await (self._traced(message) if tracing.is_on() else self._decide(message)))

    async def _reply(self, message: Msg, body: bytes) -> None:
        if message.reply:
            try:
                await self._client.publish(message.reply, body)
            except nats.errors.Error as error:
                # The caller asks again under the same key and gets the same outcome.
                log.warning("reply not sent", subject=message.subject, error=repr(error))

    async def _traced(self, message: Msg) -> bytes:
        *_, partition, name, principal = message.subject.split(".")
        traceparent = (message.headers or {}).get(tracing.HEADER)
        with tracing.server_span(f"ledger {name}", traceparent=traceparent) as span:
            body = await self._decide(message)
            if span.recording:
                said = _OUTCOME.decode(body)
                span.set(
                    {
                        "scrip.partition": int(partition),
                        "scrip.principal": principal,
                        "scrip.outcome": said.code or said.status,
                        "scrip.transaction": said.transaction,
                    }
                )
                if said.status == "failed":
                    span.fail(said.code)
            return body

    async def _decide(self, message: Msg) -> bytes:
        try:
            item = read_command_message(message.subject, message.data, self._units, limits=self._limits)
        except Invalid as error:
            return _json(refused_as(error))
        try:
            result = await self._batcher.submit(item, cost=cost_of(item))
            if isinstance(result, NotLookedUp) and isinstance(item, CommandItem):
                result = await self._batcher.submit(replace(item, look_up=True), cost=cost_of(item))
        except Busy as error:
            return _json(words.Failed(code="busy", message=str(error)))
        except (*TRY_AGAIN, Stopped) as error:
            return _json(words.Failed(code="unavailable", message=f"not decided, ask again: {type(error).__name__}"))
        except Fault:
            return _json(words.Failed(code="fault", message="the ledger failed on this command; the fault is logged"))
        match result:
            case Replied(body):
                return body
            case _:
                return _json(words.Failed(code="unavailable", message="the partition has just got another owner"))


def read_command_message(subject: str, body: bytes, units: Units, *, limits: Limits) -> CommandItem | ListItem:
    """A request as an item. Raises Invalid."""
    *_, partition, name, principal = subject.split(".")
    if len(body) > limits.body_bytes_max:
        raise Invalid.of("", f"a command has at most {limits.body_bytes_max} bytes, this one has {len(body)}")
    try:
        command = words.COMMANDS.validate_json(body)
    except ValidationError as error:
        raise Invalid(model_problems(error, is_tagged=True)) from error
    if command.command != name:
        raise Invalid.of("/command", f"the subject says {name}")
    account = command.account
    if token(partition_of(account)) != partition:
        raise Invalid.of("/account", f"{account} lives in partition {token(partition_of(account))}, not {partition}")
    if isinstance(command, words.CommandList):
        if len(command.commands) > limits.list_commands_max:
            most = limits.list_commands_max
            raise Invalid.of("/commands", f"a list has at most {most} commands, this one has {len(command.commands)}")
        return _list_item(command, int(partition), principal, units)
    return _command_item(command, int(partition), principal, read_command(command, units, principal=principal))


def _list_item(asked: words.CommandList, partition: int, principal: str, units: Units) -> ListItem:
    commands = read_list(asked, units, principal=principal)
    return ListItem(
        partition=partition,
        principal=principal,
        commands=tuple(
            _command_item(command, partition, principal, read)
            for command, read in zip(asked.commands, commands, strict=True)
        ),
        key=asked.idempotency_key,
        body_hash=body_hash(asked),
        dry_run=asked.dry_run,
    )


def _command_item(command: words.Command, partition: int, principal: str, read: Command) -> CommandItem:
    return CommandItem(
        partition=partition,
        principal=principal,
        key=command.idempotency_key,
        body_hash=body_hash(command),
        command=read,
        dry_run=command.dry_run,
    )


class ChargesSubscriber:
    """Reads the charge bundles of the partitions owned here, in number order, and acknowledges after the commit."""

    def __init__(
        self, client: Client, *, batcher: Batcher[Item, Result], units: Units, pool: Pool, ack_wait_seconds: float
    ) -> None:
        self._batcher = batcher
        self._units = units
        self._pool = pool
        self._reader = PullReader(
            client,
            stream=CHARGES,
            ack_wait_seconds=ack_wait_seconds,
            batch_size_max=BUNDLES_PER_PARTITION_MAX * GROUP_SIZE,
        )
        self._owned: set[int] = set()
        self._in_flight = asyncio.Semaphore(READS_IN_FLIGHT_MAX)
        self._settling: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def own(self, partitions: Iterable[int]) -> None:
        """Begin to read partitions: the groups that they are of."""
        self._owned.update(partitions)
        for group in {group_of(partition) for partition in self._owned}:
            await self._reader.add(charges_consumer(group))

    async def disown(self, partitions: Iterable[int]) -> None:
        """Read no longer the groups of which no partition is owned any more; what is buffered is given back."""
        leaving = list(partitions)
        for partition in leaving:
            CHARGES_STOPPED.labels(partition=token(partition)).set(0)
        self._owned.difference_update(leaving)
        groups = {group_of(partition) for partition in leaving} - {group_of(partition) for partition in self._owned}
        await asyncio.gather(*(self._reader.remove(charges_consumer(group)) for group in groups))

    async def run(self) -> None:
        """Read until `stop`. One task runs it."""
        while not self._stopping:
            await self._in_flight.acquire()
            messages = await self._reader.next_batch(messages_max=BUNDLES_AT_ONCE_MAX, bytes_max=BYTES_AT_ONCE_MAX)
            if not messages:
                self._in_flight.release()
                continue
            # Submitted before the next are read: bundles of a partition are decided in the order of the stream.
            read_at_ns = time.time_ns()
            submitted = [(message, await self._submit(message)) for message in messages]
            task = asyncio.create_task(self._settle(submitted, read_at_ns=read_at_ns))
            self._settling.add(task)
            task.add_done_callback(self._settled)

    async def stop(self) -> None:
        """Read no more, and finish what was submitted."""
        self._stopping = True
        self._reader.stop_waiting()
        if self._settling:
            await asyncio.wait(self._settling)

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._settling.discard(task)
        self._in_flight.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            FAULTS.labels(place="ledger.charges").inc()
            log.error("charges not settled, they will be delivered again", exc_info=error)

    async def _submit(self, message: Msg) -> "asyncio.Future[Result] | None":
        """Hand a bundle to the batcher; None if it could not be: the message has been dealt with."""
        partition = int(message.subject.split(".")[2])
        # Reading takes long enough for others to wait.
        await asyncio.sleep(0)
        try:
            bundle = read_bundle(message.subject, message.data, self._units)
        except UnreadableBundle as error:
            await self._put_aside(message, str(error), partition)
            return None
        place = place_of(message)
        traceparents = read_traceparents(message.data) if tracing.is_on() else {}
        item = BundleItem(bundle, place.stream, place.stream_sequence, message.subject, traceparents)
        while True:
            try:
                return self._batcher.submit(item, cost=cost_of(item), in_bulk=True)
            except Busy:
                await asyncio.sleep(0.005)
            except Stopped:
                await self._reader.nak([message])
                return None

    async def _settle(self, submitted: "list[tuple[Msg, asyncio.Future[Result] | None]]", *, read_at_ns: int) -> None:
        taken = []
        for message, future in submitted:
            if future is None:
                continue
            try:
                result = await future
            except (*TRY_AGAIN, Stopped, Fault) as error:
                # Logged by the batcher.
                delay = min(retry_delay_seconds(place_of(message).deliveries), 5.0) if isinstance(error, Fault) else 0.2
                await self._reader.nak([message], delay_seconds=delay)
                continue
            match result:
                case Taken(repeated=repeated, traced=traced):
                    MESSAGES.labels(consumer="charges", outcome="repeated" if repeated else "acknowledged").inc()
                    taken.append(message)
                    _trace_charges(traced, read_at_ns=read_at_ns)
                case OutOfOrder(expected=expected):
                    deliveries = place_of(message).deliveries
                    if deliveries > 10:
                        log.error("a bundle is missing before this one", subject=message.subject, expected=expected)
                    await self._reader.nak([message], delay_seconds=min(GAP_SECONDS * 2 ** min(deliveries, 10), 5.0))
                case NotOwner():
                    # Its group may be read here for another partition's sake.
                    await self._reader.nak([message], delay_seconds=GAP_SECONDS)
                case Conflicting():
                    await self._stop_partition(message)
                case _:
                    raise AssertionError(f"a bundle is not answered with {result}")
        await self._reader.ack(taken)

    async def _stop_partition(self, message: Msg) -> None:
        """Not acknowledged, and not skipped: somebody has to find out which of the two is right."""
        CHARGES_STOPPED.labels(partition=message.subject.split(".")[2]).set(1)
        FAULTS.labels(place="ledger.charges_conflict").inc()
        log.critical(
            "a bundle of charges differs from the one taken under its number",
            subject=message.subject,
            sequence=place_of(message).stream_sequence,
        )
        await self._reader.nak([message], delay_seconds=CONFLICT_SECONDS)

    async def _put_aside(self, message: Msg, reason: str, partition: int) -> None:
        """It is no bundle and has no number: those behind it need not wait for it."""
        letter = letter_of(message, reason=reason, partition=partition)
        try:
            async with self._pool.connection() as connection:
                await dead_letters.record(connection, [letter])
        except (psycopg.Error, TimeoutError) as error:
            log.warning("not put aside, it will be delivered again", subject=message.subject, error=repr(error))
            await self._reader.nak([message], delay_seconds=1.0)
            return
        MESSAGES.labels(consumer="charges", outcome="dead").inc()
        log.error("message dead-lettered", subject=message.subject, reason=reason)
        await self._reader.term([message])


def subscribe_payments(broker: NatsBroker, settings: ServiceSettings, *, owners: Owners) -> None:
    """Have `broker` hand what billing says about payments to the owners of their partitions, one at a time.

    Acknowledged once accepted. What is refused is dead-lettered; what was not decided is delivered again, later.
    """
    consumer = next(each for each in CONSUMERS if each.durable == LEDGER_PAYMENTS_CONSUMER)

    @pull_subscriber(broker, settings, consumer=consumer)
    async def payment_said(body: bytes, message: NatsMessage) -> None:
        subject = message.raw_message.subject
        await owners.take_payment_fact(subject, body, seconds_max=consumer.ack_wait_seconds * PAYMENT_SHARE)


async def _unsubscribe(subscription: Subscription) -> None:
    with suppress(nats.errors.ConnectionClosedError, nats.errors.BadSubscriptionError):
        await subscription.unsubscribe()


class _Outcome(msgspec.Struct):
    """What the span of a command is told of its reply."""

    status: str = ""
    code: str = ""
    transaction: str = ""


_OUTCOME: Final = msgspec.json.Decoder(_Outcome)


def _trace_charges(traced: Sequence[TracedCharge], *, read_at_ns: int) -> None:
    """A span for each traced line of a bundle that is committed: from its reading until now."""
    for charge in traced:
        span = tracing.message_span("charge", traceparent=charge.traceparent, started_at_ns=read_at_ns)
        if span is None:
            continue
        line = charge.line
        span.set(
            {
                "scrip.account": line.account,
                "scrip.source": line.source,
                "scrip.event": line.event_id,
                "scrip.partition": partition_of(line.account),
                "scrip.outcome": charge.outcome,
            }
        )
        if charge.outcome == "charged":
            span.set(
                {
                    "scrip.transaction": charge.transaction,
                    "scrip.batch": charge.batch,
                    "scrip.position": charge.position,
                }
            )
        span.end()


def _json(reply: words.Refused | words.Failed) -> bytes:
    return reply.model_dump_json(exclude_none=True).encode()
