"""Serves an application on a real socket in a thread of its own, and receives webhooks as a service of ours would."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import stripe
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from infra.servers import LOOPBACK
from infra.simulators.running import quieten

START_SECONDS_MAX = 40.0


@contextmanager
def serving(app: ASGIApp, *, port: int = 0) -> Iterator[str]:
    """The application's URL, for as long as it is served, in a thread of its own. Port 0: one that is free."""
    quieten()
    config = uvicorn.Config(
        app,
        host=LOOPBACK,
        port=port,
        http="httptools",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_SECONDS_MAX
    while not server.started:
        assert thread.is_alive(), "the server ended"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    try:
        yield f"http://{LOOPBACK}:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=15)
    assert not thread.is_alive()


@contextmanager
def process(name: str, *arguments: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A simulator as a process of its own, once it answers."""
    started = subprocess.Popen(
        [sys.executable, "-m", f"infra.simulators.{name}", *arguments],
        env=os.environ | {f"SCRIP_PORT_{name.upper()}": str(port)},
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: _answers(port), seconds=START_SECONDS_MAX * 4)
        yield started
    finally:
        started.kill()
        started.wait()


def until(condition: Callable[[], bool], *, seconds: float = 5.0) -> None:
    """Return once the condition holds; AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.01)


def _answers(port: int) -> bool:
    with socket.socket() as opened:
        return opened.connect_ex((LOOPBACK, port)) == 0


@dataclass
class Receiver:
    """A webhook endpoint: keeps what arrives, verified by Stripe's own library, and refuses the first few."""

    secret: str
    refuse_first: int = 0
    refuse_with: int = 500
    received: list[dict[str, Any]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    forged: int = 0

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/stripe/webhook", self._take, methods=["POST"])])

    async def _take(self, request: Request) -> Response:
        body = await request.body()
        if len(self.refused) < self.refuse_first:
            self.refused.append(time.monotonic())
            return Response(status_code=self.refuse_with)
        try:
            stripe.Webhook.construct_event(body, request.headers["stripe-signature"], self.secret, api_key="sk_test_x")
        except stripe.SignatureVerificationError:
            self.forged += 1
            return Response(status_code=400)
        self.received.append(json.loads(body))
        return Response(status_code=200)

    @property
    def types(self) -> list[str]:
        """The types of what was received, in that order."""
        return [event["type"] for event in self.received]
