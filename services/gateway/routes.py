"""HTTP in, in OpenAI's shape: chat completions and models. Everything else under /v1 is answered 404, never forwarded.

Plain ASGI: these are the hot routes, and a stream needs to know of a client that leaves.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from fastapi import APIRouter
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from services.gateway import handlers, translate
from services.gateway.domain.errors import BodyTooLarge, BodyTooSlow, ProviderFailed, Refusal, UnknownPath
from services.gateway.handlers import Gateway, Incoming
from services.gateway.translate import Headers
from services.kit import tracing
from services.kit.clock import now
from services.kit.ids import new_uuid7
from services.kit.telemetry import FAULTS, get_logger

log = get_logger(__name__)

JSON: Final = "application/json"

Work = Callable[["_Exchange"], Awaitable[None]]


def routers(gateway: Callable[[], Gateway]) -> Sequence[APIRouter]:
    """All routes of the gateway."""

    async def complete_chat(exchange: "_Exchange") -> None:
        await _complete_chat(gateway(), exchange)

    async def list_models(exchange: "_Exchange") -> None:
        await handlers.authenticate(gateway(), exchange.authorization)
        await exchange.answer(translate.models_answer(handlers.models(gateway())))

    async def get_model(exchange: "_Exchange") -> None:
        await handlers.authenticate(gateway(), exchange.authorization)
        found = handlers.model(gateway(), exchange.scope["path_params"]["model"])
        await exchange.answer(translate.model_answer(found))

    async def unknown(exchange: "_Exchange") -> None:
        raise UnknownPath(method=exchange.scope["method"], path=exchange.scope["path"][:200])

    router = APIRouter()
    router.routes += [
        Route("/v1/chat/completions", _Endpoint("/v1/chat/completions", complete_chat), methods=["POST"]),
        Route("/v1/models", _Endpoint("/v1/models", list_models), methods=["GET"]),
        Route("/v1/models/{model:path}", _Endpoint("/v1/models/{model}", get_model), methods=["GET"]),
        Route("/v1/{path:path}", _Endpoint("/v1/{path}", unknown)),
    ]
    return (router,)


class _Endpoint:
    """An ASGI application for one route: whatever is raised is answered in OpenAI's error shape."""

    def __init__(self, path: str, work: Work) -> None:
        self.path = path
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # By this requests are counted and timed.
        scope["route"] = self
        exchange = _Exchange(scope, receive, send)
        tracing.annotate({"scrip.request": exchange.request_id})
        try:
            await self._work(exchange)
        except Refusal as refusal:
            handlers.note_refusal(refusal, request_id=exchange.request_id)
            await exchange.refuse(refusal)
        except Exception as error:
            FAULTS.labels(place="gateway.http").inc()
            tracing.annotate({"error.type": type(error).__name__})
            log.error("request failed", request=exchange.request_id, path=self.path, exc_info=error)
            await exchange.refuse(
                ProviderFailed(reason="the gateway failed on this request", code="fault", status=500, produced=True)
            )
        finally:
            await exchange.close()


class _ClientGone(Exception):
    """The client left before its request was whole: there is nobody to answer."""


class _Exchange:
    """One request and its answer. A Listener, once the answer is a stream."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.started_at = time.monotonic()
        self.request_id = f"req_{new_uuid7()}"
        self.headers = _headers(scope)
        self.left = False
        self.started = False
        self.send_seconds: float | None = None
        self._receive = receive
        self._send = send
        self._watching: asyncio.Task[None] | None = None
        self._waiting: asyncio.Timeout | None = None

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")

    @property
    def address(self) -> str | None:
        client = self.scope.get("client")
        return client[0] if client else None

    async def body(self, *, bytes_max: int, seconds: float) -> bytes:
        """The whole body. BodyTooLarge, BodyTooSlow, _ClientGone."""
        announced = self.headers.get("content-length", "0")
        if not announced.isdigit() or int(announced) > bytes_max:
            raise BodyTooLarge(bytes_max=bytes_max)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > bytes_max:
                        raise BodyTooLarge(bytes_max=bytes_max)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise BodyTooSlow from None

    def watch(self) -> None:
        """From now on notice when the client leaves."""
        self._watching = asyncio.create_task(self._watch())

    def ends(self, waiting: asyncio.Timeout | None) -> None:
        """Have a wait ended at once if the client leaves; None: no longer."""
        self._waiting = waiting
        if self.left:
            self._end_waiting()

    async def start(self, status: int, headers: Headers) -> None:
        """Tell the status and the headers."""
        self.started = True
        await self._tell({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, *, more: bool) -> None:
        """Tell a part of the body."""
        await self._tell({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(self, body: bytes) -> None:
        """A whole answer."""
        await self.start(200, translate.answer_headers(self.request_id, content_type=JSON, length=len(body)))
        await self.write(body, more=False)

    async def refuse(self, refusal: Refusal) -> None:
        """A refusal: as an answer, or as the last event of a stream that has begun."""
        if self.started:
            await self.write(translate.error_event(refusal), more=False)
            return
        status, headers, body = translate.error_answer(refusal, request_id=self.request_id)
        await self.start(status, headers)
        await self.write(body, more=False)

    async def close(self) -> None:
        """Watch no longer."""
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching

    async def _tell(self, message: dict[str, Any]) -> None:
        if self.left:
            return
        try:
            # Only a client that does not read what it is sent makes this wait.
            async with asyncio.timeout(self.send_seconds):
                await self._send(message)
        except TimeoutError:
            log.warning("client does not read its answer, taken for gone", request=self.request_id)
            self.left = True
        except OSError:
            self.left = True

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self._end_waiting()

    def _end_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())


async def _complete_chat(gateway: Gateway, exchange: _Exchange) -> None:
    settings = gateway.settings
    exchange.send_seconds = settings.send_seconds
    # Before the body is read: nobody unknown has megabytes read.
    verified = await handlers.authenticate(gateway, exchange.authorization)
    waited_from = time.monotonic()
    try:
        body = await exchange.body(bytes_max=settings.body_bytes_max, seconds=settings.body_seconds)
    except _ClientGone:
        return
    waited = time.monotonic() - waited_from
    incoming = Incoming(
        request_id=exchange.request_id,
        headers=exchange.headers,
        address=exchange.address,
        body=body,
        at=now(),
        # The client's time to send is not ours.
        started=exchange.started_at + waited,
    )
    exchange.watch()
    await handlers.complete_chat(gateway, verified, incoming, exchange)


def _headers(scope: Scope) -> Mapping[str, str]:
    """The last of each name."""
    return {name.decode("latin-1").lower(): _text(value) for name, value in scope["headers"]}


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


# Descriptions ---------------------------------------------------------------------------------------------------------


def _responses(*statuses: int) -> dict[str, Any]:
    descriptions = {
        400: "The request, or a header of it, cannot be served as it stands",
        401: "The access key is missing, unknown, disabled or expired",
        402: "A wallet has not got what the call may cost: `limit_source`, `required`, `remaining`,"
        " `affordable_max_tokens`",
        403: "The account has no own key, has not agreed to pay with credits, or is not open",
        404: "The model has no price, or there is nothing of that name",
        413: "The body is too large",
        429: "The provider asks for fewer calls",
        502: "The provider failed",
        503: "It cannot be decided now; nothing was forwarded",
    }
    answered = {"200": {"description": "As OpenAI answers"}}
    return answered | {str(status): {"description": descriptions[status]} for status in statuses}


_SECURITY: Final[Any] = [{"accessKey": []}]
_COSTS: Final = ("X-Scrip-Request-Id", "X-Scrip-Held", "X-Scrip-Cost", "X-Scrip-Remaining")

SECURITY: Final = {"accessKey": {"type": "http", "scheme": "bearer", "description": "An access key: sk-scrip-…"}}

PATHS: Final[Mapping[str, Any]] = {
    "/v1/chat/completions": {
        "post": {
            "tags": ["openai"],
            "summary": "A chat completion, streamed or not, as OpenAI's API has it",
            "description": "Admitted by a hold on the key's wallets, forwarded, and charged by what the provider used."
            f" Answers carry {', '.join(_COSTS)}; a stream ends with its cost in a comment.",
            "security": _SECURITY,
            "parameters": [
                {"name": name, "in": "header", "schema": {"type": "string", "maxLength": 512}, "description": text}
                for name, text in (
                    ("X-Scrip-Conversation", "An attribute of the usage event"),
                    ("X-Scrip-Source", "An attribute of the usage event: chat, agent, …"),
                    ("X-Scrip-Feature", "The feature that was used"),
                )
            ],
            "requestBody": {
                "required": True,
                "content": {
                    JSON: {
                        "schema": {
                            "type": "object",
                            "required": ["model", "messages"],
                            "properties": {
                                "model": {"type": "string"},
                                "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
                                "stream": {"type": "boolean"},
                                "max_completion_tokens": {"type": "integer", "minimum": 1},
                                "n": {"type": "integer", "minimum": 1},
                            },
                        }
                    }
                },
            },
            "responses": _responses(400, 401, 402, 403, 404, 413, 429, 502, 503),
        }
    },
    "/v1/models": {
        "get": {
            "tags": ["openai"],
            "summary": "The models that can be called: those with a price",
            "security": _SECURITY,
            "responses": _responses(401, 503),
        }
    },
    "/v1/models/{model}": {
        "get": {
            "tags": ["openai"],
            "summary": "One model",
            "security": _SECURITY,
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
            "responses": _responses(401, 404, 503),
        }
    },
}
