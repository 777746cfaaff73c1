"""ASGI middleware (Starlette, FastAPI, …): check the limit before, track after, tell both in headers."""

import asyncio
import inspect
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from scrip_client.admission import (
    PROBLEM,
    Admission,
    Headers,
    IncomingRequest,
    Limits,
    Problem,
    Rules,
    Served,
    away,
    event_naming_hold,
    legs,
    limit_headers,
    not_recorded,
    refusal,
    remaining_after,
    request_headers,
)
from scrip_client.client import AsyncScrip
from scrip_client.errors import Away, LedgerError, NotAccepted, Refused, RequestRejected
from scrip_client.events import new_hold_id
from scrip_client.ledger import Wallet

log = logging.getLogger("scrip_client")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

Value = TypeVar("Value")

_BODY: Final = "http.response.body"
# What some servers offer in place of a body: they read the file themselves.
_FILE: Final = "http.response.pathsend"


class ScripMiddleware:
    """`app.add_middleware(ScripMiddleware, scrip=scrip, rules=Rules(...))`. The application finds `scope["scrip"]`.

    The use is on disk before the last byte is sent. A first byte waits for nothing but the hold; the headers are sent
    with it.
    """

    def __init__(self, app: App, *, scrip: AsyncScrip, rules: Rules) -> None:
        self._app = app
        self._scrip = scrip
        self._rules = rules
        self._limits = Limits(rules.limits_seconds)
        self._background: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _request(scope)
        account = await _value(self._rules.account(request)) if self._rules.apply_to(request) else None
        if not account:
            await self._app(scope, receive, send)
            return
        admitted = await self._admit(request, account)
        if isinstance(admitted, Problem):
            await _answer(send, admitted)
            return
        scope["scrip"] = admitted
        exchange = _Exchange(self, request, admitted, send)
        try:
            await self._app(scope, receive, exchange.send)
        finally:
            await exchange.end()

    async def aclose(self) -> None:
        """Wait for releases under way."""
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _admit(self, request: IncomingRequest, account: str) -> Admission | Problem:
        """Place the hold, or say why not."""
        rules = self._rules
        hold_id = new_hold_id(account)
        unheld = Admission(account=account, hold=None, hold_id=hold_id)
        if rules.when_away == "refuse" and self._scrip.is_full():
            return away("there is no room to record it")
        try:
            hold = await self._scrip.ledger.hold(
                account,
                legs(await _value(rules.estimate(request))),
                id=hold_id,
                lifetime_seconds=rules.lifetime_seconds,
                overdue=rules.overdue,
            )
        except Refused as refused:
            wallets = await self._wallets(refused.limit_source)
            problem, warnings = refusal(refused, wallets=wallets, rules=rules)
            rules.warn(warnings)
            return problem
        except (Away, RequestRejected) as error:
            log.error("a hold cannot be placed: %s", error)
            if rules.when_away == "serve":
                # If it was placed after all, the charge settles it; if not, it never will be.
                return unheld
            if not isinstance(error, Away) or error.maybe_done:
                self.later(self._release(hold_id, account))
            return away("the ledger does not answer" if isinstance(error, Away) else "the ledger does not accept us")
        return Admission(account=account, hold=hold, hold_id=hold_id)

    async def headers(self, admission: Admission) -> Headers:
        """All that is told of an admitted request."""
        found = request_headers(admission)
        if admission.hold is None:
            return found
        remaining = remaining_after(admission.hold, released=admission.released)
        limits: Mapping[str, Sequence[Wallet]] = {
            account: await self._wallets(account) for account in {each.account for each in remaining}
        }
        more, warnings = limit_headers(remaining, limits, warn_percent=self._rules.warn_percent, now=datetime.now(UTC))
        self._rules.warn(warnings)
        return found + more

    async def settle(self, request: IncomingRequest, admission: Admission, how: Served) -> bool:
        """Report the use, or release the hold. False: the use could not be recorded."""
        event = self._rules.usage(request, admission, how)
        if event is None:
            self.give_back(admission)
            return True
        named = event_naming_hold(event, admission)
        try:
            await self._scrip.report(named)
        except NotAccepted as error:
            # All there is to make good by hand what is lost.
            log.critical("use not recorded: %s: %r", error, named)
            return self._rules.when_away == "serve"
        return True

    def give_back(self, admission: Admission) -> None:
        """Release the hold, soon: nobody waits for it."""
        admission.released = True
        if admission.hold is not None:
            self.later(self._release(admission.hold_id, admission.account))

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that nobody waits for."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _release(self, hold: str, account: str) -> None:
        try:
            await self._scrip.ledger.release(hold, account=account)
        except LedgerError as error:
            log.warning("hold %s is left to its deadline: %s", hold, error)

    async def _wallets(self, account: str | None) -> Sequence[Wallet]:
        """What an account is limited to, as far as it is known."""
        if account is None:
            return ()
        known = self._limits.of(account)
        if known is None:
            try:
                known = (await self._scrip.ledger.balance(account)).wallets
            except LedgerError as error:
                log.warning("limits of %s are not told: %s", account, error)
                known = ()
            self._limits.remember(account, known)
        return known


@dataclass(slots=True)
class _Sent:
    """What was sent so far."""

    start: Message | None = None
    headers_sent: bool = False
    bytes: int = 0
    done: bool = False


class _Exchange:
    """One request's answer, on its way out."""

    def __init__(self, middleware: ScripMiddleware, request: IncomingRequest, admission: Admission, send: Send) -> None:
        self._middleware = middleware
        self._request = request
        self._admission = admission
        self._send = send
        self._sent = _Sent()

    async def send(self, message: Message) -> None:
        """What the application sends."""
        sent = self._sent
        if message["type"] == "http.response.start":
            # Sent with the first byte: of an answer in one piece the use is recorded before anything is said.
            sent.start = message
            return
        if message["type"] not in (_BODY, _FILE) or sent.start is None:
            await self._send(message)
            return
        sent.bytes += len(message.get("body", b""))
        is_last = message["type"] == _FILE or not message.get("more_body", False)
        if is_last and not sent.done:
            sent.done = True
            recorded = await self._settle("completed")
            if not recorded and not sent.headers_sent:
                sent.headers_sent = True
                await _answer(self._send, not_recorded(self._admission.id))
                return
        await self._send_start()
        await self._send(message)

    async def end(self) -> None:
        """The application has returned, or raised: what has not ended ends now."""
        if self._sent.done:
            return
        self._sent.done = True
        if self._sent.headers_sent:
            await self._settle("broke_off")
        else:
            self._middleware.give_back(self._admission)

    async def _settle(self, ended: str) -> bool:
        assert self._sent.start is not None
        how = Served(
            status=self._sent.start["status"],
            latency_ms=int((time.monotonic() - self._admission.started) * 1000),
            response_bytes=self._sent.bytes,
            ended="completed" if ended == "completed" else "broke_off",
        )
        # A client that leaves cancels us: its use is recorded all the same.
        task = asyncio.ensure_future(self._middleware.settle(self._request, self._admission, how))
        return await asyncio.shield(task)

    async def _send_start(self) -> None:
        if self._sent.headers_sent or self._sent.start is None:
            return
        self._sent.headers_sent = True
        start = self._sent.start
        told = await self._middleware.headers(self._admission)
        start["headers"] = [*start.get("headers", ()), *_encoded(told)]
        await self._send(start)


async def _value(found: Value | Awaitable[Value]) -> Value:
    return await found if inspect.isawaitable(found) else found


async def _answer(send: Send, problem: Problem) -> None:
    body = json.dumps(problem.body()).encode()
    headers: Headers = [("Content-Type", PROBLEM), ("Content-Length", str(len(body))), *problem.headers]
    await send({"type": "http.response.start", "status": problem.status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})


def _request(scope: Scope) -> IncomingRequest:
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    return IncomingRequest(method=scope["method"], path=_path(scope), headers=headers, native=scope)


def _path(scope: Scope) -> str:
    """The path as the application's routes see it: without what a server or a mount has put before it."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _encoded(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers]
