"""Runs a simulator as a process of its own: on loopback only, until SIGTERM or SIGINT."""

import hashlib
import logging
from typing import Any, Final

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from infra.servers import LOOPBACK
from services.kit.telemetry import configure_logging

_SHUTDOWN_SECONDS: Final = 2


def serve(app: ASGIApp, *, name: str, port: int, log_level: str = "info") -> None:
    """Serve until a signal. The application's lifespan is what starts and stops the rest."""
    configure_logging(service=name, level=log_level)
    quieten()
    uvicorn.run(
        app,
        host=LOOPBACK,
        port=port,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )


def quieten() -> None:
    """Keep out of the logs each webhook that is sent, and each connection that a simulator broke on purpose."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_is_no_cut)


def operations(name: str) -> list[Route]:
    """Health and readiness, as a service of ours answers them. A simulator needs nothing, so it is ready at once."""

    async def health(_request: Request) -> JSONResponse:
        return JSONResponse({"service": name, "status": "alive"})

    async def ready(_request: Request) -> JSONResponse:
        return JSONResponse({"service": name, "ready": True, "missing": {}})

    return [Route("/healthz", health), Route("/readyz", ready)]


async def json_object(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body; empty for none. Anything else is a ValueError or a TypeError."""
    body = await request.body()
    found = await request.json() if body.strip() else {}
    if not isinstance(found, dict):
        raise TypeError("the body is no JSON object")
    return found


def fingerprint(key: str) -> str:
    """What a key is shown and kept as: its SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()


def _is_no_cut(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("ASGI callable returned without completing response")
