"""What goes out: questions to keyvault and the ledger, calls to providers, and what must be told, now or later.

Nothing here decides. A question that gets no answer is `Away`, never a yes.
"""

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeVar

import httpx2
import nats.errors
from nats.aio.client import Client
from prometheus_client import Counter
from pydantic import ValidationError

from contracts import keyvault, ledger
from contracts.partition import partition_of
from contracts.streams import USAGE, ledger_command_subject
from services.gateway import translate
from services.gateway.domain.errors import ProviderFailed, Unavailable
from services.gateway.projections import CurrentPrices, VerifiedKeys
from services.gateway.settings import GatewaySettings
from services.gateway.store import Entry, Spool, SpoolFailed
from services.kit import tracing
from services.kit.publish import Message, PublishFailed, publish, publish_batch
from services.kit.telemetry import FAULTS, REGISTRY, get_logger

log = get_logger(__name__)

PRINCIPAL: Final = "gateway"

RETRY_SECONDS: Final = 0.1
ATTEMPT_SECONDS_MAX: Final = 2.0
DRAIN_ENTRIES_MAX: Final = 200
DRAIN_SECONDS_MIN: Final = 0.2
DRAIN_SECONDS_MAX: Final = 5.0
# After an unconfirmed publish the next callers do not wait for the same stream to stay silent.
DOUBT_SECONDS: Final = 5.0
CONNECTIONS_KEPT_MAX: Final = 100
ERROR_BYTES_MAX: Final = 64 << 10

USAGE_TOLD: Final = Counter(
    "scrip_gateway_usage", "Usage events by where they went first: stream, spool, lost.", ("to",), registry=REGISTRY
)
RELEASES: Final = Counter(
    "scrip_gateway_releases", "Holds given back, by where that went first: ledger, spool, lost.", ("to",),
    registry=REGISTRY,
)  # fmt: skip

Answer = TypeVar("Answer")


class Away(Exception):
    """A service did not answer. `maybe_done`: the question may have reached it, or reach it yet."""

    def __init__(self, why: str, *, maybe_done: bool) -> None:
        super().__init__(why)
        self.maybe_done = maybe_done


# Questions ------------------------------------------------------------------------------------------------------------


class Services:
    """Request/reply with keyvault and the ledger, asked again for a while where that is safe."""

    def __init__(self, client: Client, *, seconds: float) -> None:
        self._client = client
        self._seconds = seconds

    async def verify(self, key_sha256: str) -> keyvault.Verified | keyvault.KeyRefused:
        """Whose key this is. Raises Away."""
        reply = await self._ask_keyvault(keyvault.VerifyKey(key_sha256=key_sha256))
        if isinstance(reply, keyvault.Leased):
            raise Away("keyvault answered with something else", maybe_done=True)
        return reply

    async def lease(self, account: str, *, provider: str, own: bool) -> keyvault.Leased | keyvault.KeyRefused:
        """A provider secret for one call. Raises Away."""
        reply = await self._ask_keyvault(keyvault.LeaseSecret(account=account, provider=provider, own=own))
        if isinstance(reply, keyvault.Verified):
            raise Away("keyvault answered with something else", maybe_done=True)
        return reply

    async def place_hold(self, command: ledger.PlaceHold) -> ledger.Accepted | ledger.Refused | ledger.Failed:
        """Ask the ledger, again under the same key while it is away. Raises Away."""
        return await self._until_answered(lambda: self._ask_ledger(command), unanswered=_not_decided)

    async def release_hold(self, command: ledger.ReleaseHold) -> ledger.Accepted | ledger.Refused | ledger.Failed:
        """Ask the ledger once. Raises Away; an answer that is no decision is one, too."""
        reply = await self._ask_ledger(command)
        if why := _not_decided(reply):
            raise Away(why, maybe_done=True)
        return reply

    async def _ask_keyvault(self, command: keyvault.VerifyKey | keyvault.LeaseSecret) -> keyvault.KeyReply:
        subject = keyvault.key_command_subject(command=command.command, principal=PRINCIPAL)
        body = command.model_dump_json().encode()

        async def ask() -> keyvault.KeyReply:
            return _read(keyvault.KEY_REPLIES.validate_json, await self._request(subject, body))

        return await self._until_answered(ask, unanswered=_not_answered)

    async def _ask_ledger(self, command: ledger.Command) -> ledger.Accepted | ledger.Refused | ledger.Failed:
        account = command.line.account if isinstance(command, ledger.Charge) else command.account
        subject = ledger_command_subject(partition=partition_of(account), command=command.command, principal=PRINCIPAL)
        return _read(ledger.REPLIES.validate_json, await self._request(subject, command.model_dump_json().encode()))

    async def _until_answered(
        self, ask: Callable[[], Awaitable[Answer]], *, unanswered: Callable[[Answer], str | None]
    ) -> Answer:
        deadline = time.monotonic() + self._seconds
        maybe_done = False
        while True:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    reply = await ask()
                if (why := unanswered(reply)) is None:
                    return reply
            except TimeoutError:
                why, maybe_done = "no answer in time", True
            except Away as error:
                why, maybe_done = str(error), maybe_done or error.maybe_done
            if not self._client.is_connected or time.monotonic() + RETRY_SECONDS >= deadline:
                raise Away(why, maybe_done=maybe_done)
            await asyncio.sleep(RETRY_SECONDS)

    async def _request(self, subject: str, body: bytes) -> bytes:
        if not self._client.is_connected:
            # The client would keep it, and send it when nobody waits any more.
            raise Away("NATS is away", maybe_done=False)
        try:
            return (
                await self._client.request(subject, body, timeout=ATTEMPT_SECONDS_MAX, headers=tracing.headers())
            ).data
        except nats.errors.NoRespondersError:
            raise Away("nobody answers", maybe_done=False) from None
        except (nats.errors.Error, OSError) as error:
            raise Away(f"no answer: {type(error).__name__}", maybe_done=True) from error


def _read(parse: Callable[[bytes], Answer], body: bytes) -> Answer:
    try:
        return parse(body)
    except ValidationError as error:
        # Not the error itself: it may repeat what it could not read.
        raise Away(f"the answer is not readable: {error.error_count()} problem(s)", maybe_done=True) from None


def _not_answered(reply: keyvault.KeyReply) -> str | None:
    """Why keyvault's reply is worth another question."""
    passing = isinstance(reply, keyvault.KeyRefused) and reply.code in ("unavailable", "fault")
    return f"{reply.code}: {reply.message}" if passing and isinstance(reply, keyvault.KeyRefused) else None


def _not_decided(reply: ledger.Accepted | ledger.Refused | ledger.Failed) -> str | None:
    """Why the ledger's reply is worth another question."""
    passing = isinstance(reply, ledger.Failed) and reply.code in ("busy", "unavailable", "fault")
    return f"{reply.code}: {reply.message}" if passing and isinstance(reply, ledger.Failed) else None


class KeyVerifier:
    """Verifies access keys: what is remembered is not asked, and what many ask at once is asked once."""

    def __init__(self, services: Services, keys: VerifiedKeys) -> None:
        self._services = services
        self._keys = keys
        self._asking: dict[str, asyncio.Task[keyvault.Verified | keyvault.KeyRefused]] = {}

    async def verify(self, key_sha256: str) -> keyvault.Verified | keyvault.KeyRefused:
        """Whose key this is. Raises Away."""
        found = self._keys.find(key_sha256)
        if found is not None:
            return found
        asking = self._asking.get(key_sha256)
        if asking is None:
            asking = asyncio.create_task(self._ask(key_sha256))
            self._asking[key_sha256] = asking
            asking.add_done_callback(lambda task: self._asked(key_sha256, task))
        return await asyncio.shield(asking)

    def forget(self, verified: keyvault.Verified) -> None:
        """Something else has just been learnt of this key."""
        self._keys.forget_key(verified.key_id)

    async def _ask(self, key_sha256: str) -> keyvault.Verified | keyvault.KeyRefused:
        generation = self._keys.generation
        reply = await self._services.verify(key_sha256)
        if isinstance(reply, keyvault.Verified):
            self._keys.remember(key_sha256, reply, generation=generation)
        return reply

    def _asked(self, key_sha256: str, task: asyncio.Task[keyvault.Verified | keyvault.KeyRefused]) -> None:
        del self._asking[key_sha256]
        if not task.cancelled():
            # Whoever still waits raises it; if nobody does, it is nobody's.
            task.exception()


# Providers ------------------------------------------------------------------------------------------------------------


class Providers:
    """One pool of connections to all providers. Every wait has a bound."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self.names: Sequence[str] = tuple(settings.providers)
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(
                connect=settings.connect_seconds,
                read=None,
                write=settings.connect_seconds,
                pool=settings.connect_seconds,
            ),
            limits=httpx2.Limits(
                max_connections=settings.calls_max,
                max_keepalive_connections=CONNECTIONS_KEPT_MAX,
                keepalive_expiry=settings.keepalive_seconds,
            ),
            trust_env=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    def aborts(self, provider: str) -> bool:
        """Whether a client's leaving ends the call there."""
        return self._settings.providers[provider].on_disconnect == "abort"

    async def open(
        self, provider: str, *, body: bytes, headers: Mapping[str, str], secret: str, own: bool, within_seconds: float
    ) -> httpx2.Response:
        """Forward a call, and return when the provider begins to answer with success. ProviderFailed otherwise."""
        request = self._client.build_request(
            "POST", f"{self._settings.providers[provider].base_url}/chat/completions", content=body, headers=headers
        )
        response: httpx2.Response | None = None
        try:
            async with asyncio.timeout(within_seconds):
                response = await self._client.send(request, stream=True)
                if response.status_code == 200:
                    opened, response = response, None
                    return opened
                said = await _beginning(response, ERROR_BYTES_MAX)
                raise translate.provider_refused(
                    provider=provider,
                    status=response.status_code,
                    headers=response.headers,
                    body=said,
                    secret=secret,
                    own=own,
                )
        except TimeoutError:
            raise ProviderFailed(
                reason=f"{provider} did not begin to answer in time", code="provider_timeout"
            ) from None
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            # Not the error's own words: they may repeat a header.
            raise ProviderFailed(
                reason=f"{provider} could not be reached ({type(error).__name__})", code="provider_unreachable"
            ) from None
        finally:
            if response is not None:
                await response.aclose()


async def _beginning(response: httpx2.Response, bytes_max: int) -> bytes:
    found = bytearray()
    async for received in response.aiter_bytes():
        found += received
        if len(found) >= bytes_max:
            break
    return bytes(found[:bytes_max])


# What must be told ----------------------------------------------------------------------------------------------------


class Recorder:
    """Tells metering what was used and the ledger what is free again: at once, or from the spool until it is heard."""

    def __init__(self, client: Client, *, services: Services, spool: Spool, publish_seconds: float) -> None:
        self._client = client
        self._services = services
        self._spool = spool
        self._publish_seconds = publish_seconds
        self._doubt_until = float("-inf")
        self._wake = asyncio.Event()
        self._stopped = asyncio.Event()

    async def report(self, message: Message) -> None:
        """Return when the event is on disk: in the stream, or in the spool. Raises SpoolFailed."""
        assert message.message_id is not None
        entry = Entry(kind="usage", key=message.message_id, subject=message.subject, payload=message.payload)
        if self._client.is_connected and time.monotonic() >= self._doubt_until:
            try:
                await publish(self._client, stream=USAGE, message=message, timeout_seconds=self._publish_seconds)
            except PublishFailed as error:
                self._doubt_until = time.monotonic() + DOUBT_SECONDS
                log.warning("usage not confirmed by the stream, it goes to the spool", reason=str(error))
            except asyncio.CancelledError:
                await self._put(entry, told=USAGE_TOLD)
                raise
            except Exception as error:
                # Whatever it was: the event must not be lost over it.
                FAULTS.labels(place="gateway.publish").inc()
                log.error("usage not published, it goes to the spool", exc_info=error)
            else:
                USAGE_TOLD.labels(to="stream").inc()
                return
        await self._put(entry, told=USAGE_TOLD)

    async def release(self, *, hold: str, account: str) -> None:
        """Return when the hold is free again, or will be. Raises SpoolFailed."""
        command = translate.release_hold(hold=hold, account=account)
        try:
            _log_refusal(await self._services.release_hold(command))
        except Away as error:
            log.warning("hold not released yet, that goes to the spool", hold=hold, reason=str(error))
            await self.release_later(command)
        except asyncio.CancelledError:
            await self.release_later(command)
            raise
        else:
            RELEASES.labels(to="ledger").inc()

    async def release_later(self, command: ledger.ReleaseHold) -> None:
        """Leave a release to the spool: what it undoes may not have arrived yet. Raises SpoolFailed."""
        entry = Entry(
            kind="release", key=command.hold, subject=command.account, payload=command.model_dump_json().encode()
        )
        await self._put(entry, told=RELEASES)

    async def run(self) -> None:
        """Empty the spool until `stop`, oldest first, with growing pauses while nobody listens."""
        pause = DRAIN_SECONDS_MIN
        while not self._stopped.is_set():
            self._wake.clear()
            try:
                waiting = await self._drain()
            except (sqlite3.Error, OSError) as error:
                FAULTS.labels(place="gateway.spool").inc()
                log.error("the spool cannot be read", error=str(error))
                waiting = True
            with suppress(TimeoutError):
                async with asyncio.timeout(pause if waiting else DRAIN_SECONDS_MAX):
                    await (self._stopped if waiting else self._wake).wait()
            pause = min(pause * 2, DRAIN_SECONDS_MAX) if waiting else DRAIN_SECONDS_MIN

    def stop(self) -> None:
        """Let `run` return soon. What is in the spool stays for the next process."""
        self._stopped.set()
        self._wake.set()

    async def _put(self, entry: Entry, *, told: Counter) -> None:
        try:
            await self._spool.put(entry)
        except (SpoolFailed, sqlite3.Error) as error:
            told.labels(to="lost").inc()
            # All there is to make good by hand what is lost.
            log.critical(
                "neither told nor spooled",
                kind=entry.kind,
                subject=entry.subject,
                payload=entry.payload.decode(),
                reason=str(error),
            )
            raise SpoolFailed(str(error)) from error
        told.labels(to="spool").inc()
        self._wake.set()

    async def _drain(self) -> bool:
        """Tell what waits. Whether something still does."""
        if self._spool.broken is not None:
            await self._spool.probe()
        while self._spool.entries and not self._stopped.is_set():
            if not self._client.is_connected:
                return True
            waiting = await self._spool.oldest(DRAIN_ENTRIES_MAX)
            told = [
                *await self._publish([each for each in waiting if each[1].kind == "usage"]),
                *await self._release([each for each in waiting if each[1].kind == "release"]),
            ]
            if told:
                await self._spool.remove(told)
                log.info("told from the spool", entries=len(told), left=self._spool.entries)
            if len(told) < len(waiting):
                return True
        return False

    async def _publish(self, entries: Sequence[tuple[int, Entry]]) -> list[int]:
        if not entries:
            return []
        messages = [Message(entry.subject, entry.payload, entry.key) for _, entry in entries]
        try:
            await publish_batch(self._client, stream=USAGE, messages=messages)
        except PublishFailed as error:
            log.warning("spooled usage not confirmed yet", reason=str(error))
            return [entries[place][0] for place in error.confirmed]
        self._doubt_until = float("-inf")
        return [number for number, _ in entries]

    async def _release(self, entries: Sequence[tuple[int, Entry]]) -> list[int]:
        told = []
        for number, entry in entries:
            command = ledger.ReleaseHold.model_validate_json(entry.payload)
            try:
                _log_refusal(await self._services.release_hold(command))
            except Away as error:
                log.warning("hold not released yet", hold=command.hold, reason=str(error))
                # The next one may live in a partition that has an owner.
                continue
            told.append(number)
        return told


def _log_refusal(reply: ledger.Accepted | ledger.Refused | ledger.Failed) -> None:
    """A release that is refused has nothing left to do: the hold has ended some other way."""
    if isinstance(reply, ledger.Failed):
        FAULTS.labels(place="gateway.release").inc()
        log.error("the ledger cannot read a release", code=reply.code, reason=reply.message)
    elif isinstance(reply, ledger.Refused) and reply.code not in ("hold_settled", "hold_released", "hold_expired"):
        log.error("release refused", code=reply.code, reason=reply.message)


class PriceReader:
    """Asks metering for its price book every few seconds, and keeps the last one while metering is away."""

    def __init__(self, settings: GatewaySettings, prices: CurrentPrices) -> None:
        self._settings = settings
        self._prices = prices
        self._problem: str | None = None
        self._body: bytes | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Read until `stop`."""
        async with httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._settings.metering_token.get_secret_value()}"},
            timeout=self._settings.price_refresh_seconds,
            trust_env=False,
        ) as client:
            while not self._stopping.is_set():
                await self._read(client)
                # In a hurry for the first one: nothing is served without.
                seconds = self._settings.price_refresh_seconds if self._problem is None else 0.5
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._stopping.wait()

    def stop(self) -> None:
        """Let `run` return soon."""
        self._stopping.set()

    async def _read(self, client: httpx2.AsyncClient) -> None:
        try:
            response = await client.get(f"{self._settings.metering_url}/api/v1/price-book")
            response.raise_for_status()
            if response.content != self._body:
                # A book of thousands of models takes a while to read. Nobody who calls waits for that.
                self._prices.replace(await asyncio.to_thread(translate.read_price_book, response.content))
                self._body = response.content
        except (httpx2.HTTPError, translate.UnreadablePrices) as error:
            problem = f"{type(error).__name__}: {error}"
            if problem != self._problem:
                log.warning("the price book was not read, the last one stays in force", reason=problem)
            self._problem = problem
        else:
            self._problem = None


def unavailable(who: str, error: Away) -> Unavailable:
    """A service being away as what the client is told."""
    return Unavailable(reason=f"{who} is away ({error})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """Everything outside that a call needs."""

    services: Services
    keys: KeyVerifier
    providers: Providers
    recorder: Recorder
    spool: Spool
    prices: CurrentPrices
