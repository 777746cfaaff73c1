"""HTTP: an application whose every error is problem+json, with health, readiness, metrics, and a limit on bodies."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.kit import tracing
from services.kit.auth import TokenStore
from services.kit.problems import Problem, problem_response
from services.kit.query import OwnQueryRouter, check_parameters
from services.kit.settings import ServiceSettings
from services.kit.telemetry import FAULTS, HTTP_REQUESTS, HTTP_SECONDS, REGISTRY, get_logger

log = get_logger(__name__)

BODY_BYTES_MAX: Final = 4 << 20

# Together less than 2 s: how old an answer of readiness may be, and how long a check may take.
_CHECK_CACHE_SECONDS: Final = 0.5
_CHECK_DEADLINE_SECONDS: Final = 1.0

# Asked every few seconds, by whoever watches.
_UNTRACED: Final = frozenset({"/healthz", "/readyz", "/metrics"})


# Of every route, besides what it says of itself: FastAPI would promise an error shape of its own.
_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    "default": {
        "description": "A problem (RFC 9457): `code` says which, `detail` why, `errors` where",
        "content": {
            "application/problem+json": {
                "schema": {
                    "type": "object",
                    "required": ["type", "title", "status", "code", "detail"],
                    "properties": {
                        "type": {"type": "string"},
                        "title": {"type": "string"},
                        "status": {"type": "integer"},
                        "code": {"type": "string"},
                        "detail": {"type": "string"},
                        "errors": {"type": "array", "items": {"type": "object"}},
                    },
                }
            }
        },
    }
}


class Readiness:
    """What a service needs in order to work: named checks, each of which raises when it is missing.

    Made with the application, filled by its lifespan. Before `started` is called nothing is ready.
    """

    def __init__(self) -> None:
        self._checks: dict[str, Callable[[], Awaitable[None]]] = {}
        self._started = False
        self._missing: dict[str, str] = {}
        self._checked_at = float("-inf")
        self._lock = asyncio.Lock()

    def add(self, name: str, check: Callable[[], Awaitable[None]]) -> None:
        """Add a check: it returns, or raises what is wrong."""
        self._checks[name] = check

    def started(self) -> None:
        """Everything has been constructed and every check added."""
        self._started = True

    async def missing(self) -> dict[str, str]:
        """What is missing and why, by name; empty when ready."""
        if not self._started:
            return {"start": "the service is starting"}
        async with self._lock:
            if time.monotonic() - self._checked_at > _CHECK_CACHE_SECONDS:
                found = await asyncio.gather(*(self._run(name) for name in self._checks))
                self._missing = {name: reason for name, reason in found if reason is not None}
                self._checked_at = time.monotonic()
            return self._missing

    async def _run(self, name: str) -> tuple[str, str | None]:
        # Not awaited itself: a check that does not heed cancellation must not hold up the answer.
        task = asyncio.ensure_future(self._checks[name]())
        done, _ = await asyncio.wait({task}, timeout=_CHECK_DEADLINE_SECONDS)
        if not done:
            task.cancel()
            return name, f"no answer within {_CHECK_DEADLINE_SECONDS:g} s"
        error = task.exception()
        return name, None if error is None else f"{type(error).__name__}: {error}"


def build_app(
    *,
    name: str,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    readiness: Readiness,
    tokens_file: Path,
    routers: Sequence[APIRouter] = (),
    body_bytes_max: int = BODY_BYTES_MAX,
) -> FastAPI:
    """The HTTP application of a service. Does no I/O: the tokens file is read when the first request needs it.

    A query parameter that a route does not read is refused, but for an OwnQueryRouter's, and for health and metrics:
    who watches may add what he likes.
    """

    @asynccontextmanager
    async def traced(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with lifespan(app):
                yield
        finally:
            # Here: a signal that ends the process leaves no other moment.
            await tracing.flush_traces()

    app = FastAPI(
        title=f"Scrip {name}",
        lifespan=traced,
        docs_url="/docs",
        redoc_url=None,
        responses=_PROBLEMS,
        # It has tracing of its own, which tells paths, queries and the words of errors.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.tokens = TokenStore(tokens_file)
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_fault)
    app.add_middleware(BodyLimit, bytes_max=body_bytes_max)
    app.add_middleware(RequestMetrics)
    app.add_middleware(RequestSpans)
    app.include_router(_operations(name, readiness))
    for router in routers:
        reads_by_itself = isinstance(router, OwnQueryRouter)
        app.include_router(router, dependencies=[] if reads_by_itself else [Depends(check_parameters)])
    return app


def serve(app: FastAPI, settings: ServiceSettings) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is running within `shutdown_seconds`, and end the lifespan."""
    # A batch makes thousands of objects without cycles: at the default threshold the collector walks all caches for
    # each of them, a sixth of the ledger's time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    uvicorn.run(
        app,
        host=settings.http_host,
        port=settings.http_port,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )


class BodyTooLarge(HTTPException):
    """Raised while a body is read. An HTTPException, because FastAPI takes any other for a body it cannot parse."""

    def __init__(self, bytes_max: int) -> None:
        super().__init__(413, f"the body has more than {bytes_max} bytes")


class BodyLimit:
    """Answers 413 to a body above the limit, announced or not."""

    def __init__(self, app: ASGIApp, *, bytes_max: int) -> None:
        self._app = app
        self._bytes_max = bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._bytes_max:
            await _too_large(BodyTooLarge(self._bytes_max))(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._bytes_max:
                raise BodyTooLarge(self._bytes_max)
            return message

        await self._app(scope, limited, send)


class RequestMetrics:
    """Counts and times requests by route, never by path: paths hold ids."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            HTTP_REQUESTS.labels(method=scope["method"], route=route, status=status).inc()
            HTTP_SECONDS.labels(method=scope["method"], route=route).observe(time.monotonic() - started)


class RequestSpans:
    """A span per request, if tracing is on: a step of the trace that its `traceparent` names. Named by route."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not tracing.is_on() or scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"]
        with tracing.server_span(method, traceparent=_traceparent(scope)) as span:
            try:
                await self._app(scope, receive, noted)
            finally:
                route = getattr(scope.get("route"), "path", "none")
                span.rename(f"{method} {route}")
                span.set({"http.request.method": method, "http.route": route, "http.response.status_code": status})
                if status >= 500:
                    span.fail(str(status))


def _traceparent(scope: Scope) -> str | None:
    """What the request says of its trace; None also if it says it twice."""
    said = [value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"]
    return said[0] if len(said) == 1 else None


def _operations(name: str, readiness: Readiness) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/healthz")
    async def health() -> dict[str, str]:
        """The process runs and answers."""
        return {"service": name, "status": "alive"}

    @router.get("/readyz")
    async def ready() -> JSONResponse:
        """The service can do its work; otherwise 503 and what is missing."""
        missing = await readiness.missing()
        return JSONResponse(
            {"service": name, "ready": not missing, "missing": missing}, status_code=503 if missing else 200
        )

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics of this process."""
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    return router


async def _on_problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem_response(error)


async def _on_invalid_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    findings = [
        {
            "pointer": _pointer(found["loc"], body=error.body, is_missing=found["type"] == "missing"),
            "code": found["type"],
            "detail": found["msg"].removeprefix("Value error, "),
        }
        for found in error.errors()
    ]
    return problem_response(
        Problem(422, "invalid_request", f"the request has {len(findings)} problem(s)", errors=findings)
    )


async def _on_http_exception(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyTooLarge):
        return _too_large(error)
    phrase = HTTPStatus(error.status_code).phrase
    return problem_response(
        Problem(error.status_code, phrase.lower().replace(" ", "_"), error.detail, headers=dict(error.headers or {}))
    )


def _too_large(error: BodyTooLarge) -> Response:
    return problem_response(Problem(413, "body_too_large", error.detail))


async def _on_fault(request: Request, error: Exception) -> Response:
    FAULTS.labels(place="http").inc()
    log.error("request failed", method=request.method, path=request.url.path, exc_info=error)
    return problem_response(Problem(500, "fault", "the service failed on this request; the fault is logged"))


def _pointer(location: Sequence[Any], *, body: Any, is_missing: bool) -> str:
    """A place as a JSON pointer whose first token is where to look: body, query, path, header.

    What pydantic says besides, which of several models it tried, is no part of a body's place.
    """
    where, *parts = location
    if where == "body" and isinstance(body, dict | list):
        missing = parts[-1:] if is_missing else []
        parts = [*_there(parts[: len(parts) - len(missing)], body), *missing]
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in (where, *parts))


def _there(parts: Sequence[Any], body: Any) -> Iterator[Any]:
    """Those of the parts of a place that lead further into a body."""
    for part in parts:
        if part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int):
            body = body[part]
            yield part
