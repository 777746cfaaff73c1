"""Messages in: verify and lease by request/reply. Any number of keyvaults share them, as one queue group."""

import asyncio
from contextlib import suppress
from typing import Final, assert_never

import nats.errors
import psycopg
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from psycopg_pool import PoolTimeout

from contracts.keyvault import LEASED_TO, KeyRefused, Leased, LeaseSecret, Verified, VerifyKey, key_command_subject
from services.keyvault import handlers, translate
from services.keyvault.handlers import Vault
from services.kit import tracing
from services.kit.broker import is_inbox
from services.kit.telemetry import FAULTS, get_logger

log = get_logger(__name__)

QUEUE: Final = "keyvault"
COMMAND_BYTES_MAX: Final = 4 << 10
# Beyond, a caller is told to try again rather than left to wait.
ANSWERING_MAX: Final = 1_000

_DATABASE_AWAY: Final = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, OSError)


class KeySubscriber:
    """Answers the gateway. The caller's name is the last token of the subject."""

    def __init__(self, client: Client, *, vault: Vault) -> None:
        self._client = client
        self._vault = vault
        self._subscription: Subscription | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to answer."""
        self._subscription = await self._client.subscribe(
            key_command_subject(command="*", principal="*"),
            queue=QUEUE,
            cb=self._take,
            pending_msgs_limit=-1,
            pending_bytes_limit=-1,
        )
        await self._client.flush()

    async def stop(self) -> None:
        """Take no more, and answer what was taken."""
        if self._subscription is not None:
            with suppress(nats.errors.ConnectionClosedError, nats.errors.BadSubscriptionError):
                await self._subscription.unsubscribe()
        if self._answering:
            await asyncio.wait(self._answering)

    async def _take(self, message: Msg) -> None:
        if not is_inbox(message.reply):
            log.error("a command wants its answer elsewhere", subject=message.subject, reply_subject=message.reply)
            return
        if len(self._answering) >= ANSWERING_MAX:
            await self._send(message, _written(KeyRefused(code="unavailable", message="too many at once: ask again")))
            return
        task = asyncio.create_task(self._answer(message))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, message: Msg) -> None:
        await self._send(message, _written(await (self._traced(message) if tracing.is_on() else self._decide(message))))

    async def _traced(self, message: Msg) -> Verified | Leased | KeyRefused:
        *_, name, principal = message.subject.split(".")
        traceparent = (message.headers or {}).get(tracing.HEADER)
        with tracing.server_span(f"keyvault {name}", traceparent=traceparent) as span:
            reply = await self._decide(message)
            outcome = reply.code if isinstance(reply, KeyRefused) else reply.status
            span.set({"scrip.principal": principal, "scrip.outcome": outcome})
            if isinstance(reply, Verified):
                span.set({"scrip.account": reply.account, "scrip.key": reply.key_id})
            if isinstance(reply, KeyRefused) and reply.code in ("unavailable", "fault"):
                span.fail(reply.code)
            return reply

    async def _decide(self, message: Msg) -> Verified | Leased | KeyRefused:
        *_, name, principal = message.subject.split(".")
        if len(message.data) > COMMAND_BYTES_MAX:
            return KeyRefused(code="invalid", message=f"a command has at most {COMMAND_BYTES_MAX} bytes")
        command = translate.read_key_command(message.data, name=name)
        if isinstance(command, LeaseSecret) and not _may_be_leased_to(principal, reply_subject=message.reply):
            log.error("a lease was asked for by or for somebody else", principal=principal, reply_subject=message.reply)
            command = KeyRefused(code="not_permitted", message=f"secrets are leased to {LEASED_TO} only")
        try:
            return await self._carry_out(command, principal=principal)
        except _DATABASE_AWAY as error:
            FAULTS.labels(place="keyvault.database").inc()
            log.error("not answered, the database is away", command=name, error=repr(error))
            return KeyRefused(code="unavailable", message="the database is away: ask again")
        except Exception:
            FAULTS.labels(place="keyvault.command").inc()
            log.exception("command failed", command=name, principal=principal)
            return KeyRefused(code="fault", message="keyvault failed on this command; the fault is logged")

    async def _carry_out(
        self, command: VerifyKey | LeaseSecret | KeyRefused, *, principal: str
    ) -> Verified | Leased | KeyRefused:
        match command:
            case KeyRefused():
                return command
            case VerifyKey(key_sha256=key_sha256):
                verified = await handlers.verify_key(self._vault, bytes.fromhex(key_sha256))
                return verified if isinstance(verified, Verified) else translate.refused(verified)
            case LeaseSecret():
                leased = await handlers.lease_secret(self._vault, command, principal=principal)
                return leased if isinstance(leased, Leased) else translate.refused(leased)
            case _:
                assert_never(command)

    async def _send(self, message: Msg, body: bytes) -> None:
        try:
            await self._client.publish(message.reply, body)
        except nats.errors.Error as error:
            log.warning("reply not sent", subject=message.subject, error=repr(error))


def _may_be_leased_to(principal: str, *, reply_subject: str) -> bool:
    """NATS lets nobody else ask. But an answer goes where the request says: to the gateway's own inbox, or nowhere."""
    return principal == LEASED_TO and is_inbox(reply_subject, of=LEASED_TO)


def _written(reply: Verified | Leased | KeyRefused) -> bytes:
    return reply.wire() if isinstance(reply, Leased) else reply.model_dump_json(exclude_none=True).encode()
