"""NATS connections, and FastStream for low-rate handlers: nothing lost, no hot retry, nothing silently forbidden."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fast_depends import ValidationError as UnfitArguments
from faststream import AckPolicy, BaseMiddleware, ContextRepo, StreamMessage
from faststream.exceptions import HandlerException, NackMessage, RejectMessage
from faststream.nats import JStream, NatsBroker, PullSub
from faststream.nats.security import NatsUserPassword
from faststream.nats.subscriber.usecases import PullStreamSubscriber
from faststream.types import BrokerMiddleware
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from contracts.streams import Consumer, inbox_prefix
from services.kit.dead_letters import Letter, Unreadable, letter_of
from services.kit.redelivery import place_of, retry_delay_seconds
from services.kit.settings import ServiceSettings
from services.kit.telemetry import FAULTS, MESSAGES, NATS_ERRORS, get_logger

log = get_logger(__name__)

PENDING_BYTES_MAX: Final = 16 << 20
RECONNECT_SECONDS: Final = 0.25
PING_SECONDS: Final = 0.8


async def connect_nats(settings: ServiceSettings, *, name: str | None = None) -> Client:
    """A plain connection, for everything hot: retries for ever, reports every error.

    Raises only if the credentials are refused.
    """
    reports = _ConnectionReports(settings.service, raise_when_refused=True)
    client = _Client()
    try:
        await client.connect(
            **_options(settings, name=name, reports=reports),
            user=settings.nats_user,
            password=settings.nats_password.get_secret_value(),
        )
    except BaseException:
        await client.close()
        raise
    reports.raise_when_refused = False
    return client


def build_broker(settings: ServiceSettings, *, dead_letter: Callable[[Letter], Awaitable[None]]) -> NatsBroker:
    """A FastStream broker for low-rate handlers. Handlers get the raw `bytes` and parse them with contracts.

    A handler that raises Unreadable has its message stored by `dead_letter` and terminated. Any other exception is a
    fault: logged, counted, and delivered again after 1, 2, 4, … 30 seconds, for ever.
    """
    return NatsBroker(
        # FastStream itself raises when the credentials are refused.
        **_options(settings, name=None, reports=_ConnectionReports(settings.service)),
        security=NatsUserPassword(settings.nats_user, settings.nats_password.get_secret_value()),
        ack_policy=AckPolicy.NACK_ON_ERROR,
        middlewares=(_fault_policy(dead_letter),),
        # Without it a body without a content type is decoded as JSON, "42" to an integer.
        decoder=_raw_body,
        logger=None,
    )


async def disconnect(broker: NatsBroker, client: Client) -> None:
    """Stop a broker, of which `client` is the connection; where NATS is away, without draining it."""
    try:
        await broker.stop()
    except NatsError as error:
        log.warning("NATS connection not drained", error=repr(error))
        await client.close()


def pull_subscriber(broker: NatsBroker, settings: ServiceSettings, *, consumer: Consumer) -> PullStreamSubscriber:
    """FastStream's subscriber on a provisioned durable, one message at a time, in order."""
    (subject,) = consumer.filter_subjects
    return broker.subscriber(
        subject,
        stream=JStream(consumer.stream, declare=False),
        durable=consumer.durable,
        pull_sub=PullSub(batch_size=1, timeout=5.0),
        # A pull subscriber does not take it from the connection.
        inbox_prefix=f"{inbox_prefix(settings.service)}.".encode(),
    )


def is_inbox(reply_subject: str, *, of: str | None = None) -> bool:
    """Whether an answer sent there reaches a caller (the user `of`) and nobody else.

    A reply subject is the caller's choice and no permission is asked for it: answered unseen, a request could have its
    answer stored by a stream, or acted on by JetStream itself.
    """
    return reply_subject.startswith(inbox_prefix("") if of is None else f"{inbox_prefix(of)}.")


class _Client(Client):
    """nats-py's client with a cheaper reading of headers: its own takes half the time of reading a message."""

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        found = {}
        for line in raw.decode("utf-8", "replace").split("\r\n"):
            name, colon, value = line.partition(":")
            if colon:
                name = name.strip()
                if name.isascii() and " " not in name and "\t" not in name:
                    found[name] = value.strip()
        return found


class _FaultPolicy(BaseMiddleware[Any, Any]):
    """What becomes of a message whose handler raises: dead-lettered if unreadable, else delivered again later."""

    def __init__(self, msg: Any, /, *, context: ContextRepo, dead_letter: Callable[[Letter], Awaitable[None]]) -> None:
        super().__init__(msg, context=context)
        self._dead_letter = dead_letter

    async def consume_scope(self, call_next: Callable[[Any], Awaitable[Any]], msg: StreamMessage[Msg]) -> Any:
        try:
            return await call_next(msg)
        except HandlerException:
            raise
        except (Unreadable, UnfitArguments) as error:
            await self._put_aside(msg.raw_message, error)
            raise RejectMessage from error
        except Exception as error:
            raise _postponed(msg.raw_message, error) from error

    async def _put_aside(self, message: Msg, error: Unreadable | UnfitArguments) -> None:
        reason = error.reason if isinstance(error, Unreadable) else str(error)
        problems = error.problems if isinstance(error, Unreadable) else ()
        letter = letter_of(message, reason=reason, problems=problems)
        try:
            await self._dead_letter(letter)
        except Exception as fault:
            raise _postponed(message, fault) from fault
        MESSAGES.labels(consumer=place_of(message).consumer, outcome="dead").inc()
        log.warning("message dead-lettered", subject=message.subject, sequence=letter.stream_sequence, reason=reason)


def nats_check(client: Client) -> Callable[[], Awaitable[None]]:
    """A readiness check: raises unless the server answers a ping.

    The ping is never cancelled: nats-py's read loop dies of the pong of a cancelled one.
    """
    ping: asyncio.Task[None] | None = None
    of_connection = -1

    async def check() -> None:
        nonlocal ping, of_connection
        if not client.is_connected:
            raise ConnectionError("not connected")
        if ping is None or ping.done() or of_connection != client.stats["reconnects"]:
            of_connection = client.stats["reconnects"]
            ping = asyncio.create_task(client.flush(timeout=3600))
        done, _ = await asyncio.wait({ping}, timeout=PING_SECONDS)
        if not done:
            raise TimeoutError(f"no answer to a ping within {PING_SECONDS:g} s")
        ping.result()

    return check


def _options(settings: ServiceSettings, *, name: str | None, reports: "_ConnectionReports") -> dict[str, Any]:
    return {
        "servers": settings.nats_url,
        "name": name or settings.service,
        "inbox_prefix": inbox_prefix(settings.service),
        "pending_size": PENDING_BYTES_MAX,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": RECONNECT_SECONDS,
        "connect_timeout": 2,
        "ping_interval": 5,
        "max_outstanding_pings": 2,
        "error_cb": reports.error,
        "disconnected_cb": reports.disconnected,
        "reconnected_cb": reports.reconnected,
        "closed_cb": reports.closed,
    }


class _ConnectionReports:
    """The loud callbacks of one connection. The same error is logged every 5 seconds at most, and always counted."""

    def __init__(self, service: str, *, raise_when_refused: bool = False) -> None:
        self.raise_when_refused = raise_when_refused
        self._service = service
        self._last: tuple[str, float] = ("", 0.0)

    async def error(self, error: Exception) -> None:
        text = str(error) or repr(error)
        refused = "authorization violation" in text.lower()
        forbidden = "permissions violation" in text.lower()
        NATS_ERRORS.labels(kind="forbidden" if forbidden else "refused" if refused else type(error).__name__).inc()
        if text != self._last[0] or time.monotonic() - self._last[1] > 5:
            self._last = (text, time.monotonic())
            said = "NATS forbids what this service tried" if forbidden else "NATS connection error"
            log.error(said, nats_user=self._service, error=text, error_type=type(error).__name__)
        if refused and self.raise_when_refused:
            # Otherwise nats-py would try the same credentials for ever.
            raise error

    async def disconnected(self) -> None:
        log.warning("NATS connection lost")

    async def reconnected(self) -> None:
        log.info("NATS connection is back")

    async def closed(self) -> None:
        log.info("NATS connection closed")


def _postponed(message: Msg, error: Exception) -> NackMessage:
    place = place_of(message)
    delay = retry_delay_seconds(place.deliveries)
    FAULTS.labels(place=f"consumer.{place.consumer}").inc()
    MESSAGES.labels(consumer=place.consumer, outcome="postponed").inc()
    log.error(
        "handler failed, the message will be delivered again",
        subject=message.subject,
        sequence=place.stream_sequence,
        deliveries=place.deliveries,
        delay_seconds=delay,
        exc_info=error,
    )
    return NackMessage(delay=delay)


def _fault_policy(dead_letter: Callable[[Letter], Awaitable[None]]) -> BrokerMiddleware[Any, Any]:
    def build(msg: Any, /, *, context: ContextRepo) -> _FaultPolicy:
        return _FaultPolicy(msg, context=context, dead_letter=dead_letter)

    return build


async def _raw_body(message: StreamMessage[Msg]) -> bytes:
    return bytes(message.body)
