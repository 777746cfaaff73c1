"""Laws of a service process: it serves, logs JSON, finishes what is running when told to stop, and stops in time."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2

APP = """
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fastapi import FastAPI
from fastapi.routing import APIRouter
from services.kit.http import Readiness, build_app, serve
from services.kit.settings import ServiceSettings
from services.kit.telemetry import configure_logging, get_logger

router = APIRouter()
readiness = Readiness()

@router.get("/slow")
async def slow(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "done"

@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    readiness.started()
    yield
    get_logger("app").info("lifespan ended")

settings = ServiceSettings()
configure_logging(service=settings.service)
app = build_app(
    name="kit", lifespan=lifespan, readiness=readiness, tokens_file=settings.tokens_file, routers=[router]
)
serve(app, settings)
"""


def test_a_service_finishes_what_runs_but_does_not_wait_for_ever(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "SCRIP_SERVICE": "kit",
        "SCRIP_NATS_USER": "kit",
        "SCRIP_NATS_PASSWORD": "hunter2",
        "SCRIP_DATABASE_URL": "postgresql://hunter2",
        "SCRIP_HTTP_PORT": str(port),
        "SCRIP_TOKENS_FILE": str(tmp_path / "none"),
        "SCRIP_CATALOGUE_FILE": str(tmp_path / "none"),
        "SCRIP_SHUTDOWN_SECONDS": "2",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", APP], env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url)
        answers: list[int] = []

        def ask(seconds: float) -> None:
            try:
                answers.append(httpx2.get(f"{url}/slow", params={"seconds": seconds}, timeout=20).status_code)
            except httpx2.HTTPError:
                answers.append(0)

        callers = [threading.Thread(target=ask, args=(seconds,)) for seconds in (1, 15)]
        for caller in callers:
            caller.start()
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        stopped_at = time.monotonic()
        _, log = process.communicate(timeout=10)
        assert time.monotonic() - stopped_at < 5
        for caller in callers:
            caller.join()
    finally:
        process.kill()
        process.wait()
    assert 200 in answers
    lines = [json.loads(line) for line in log.splitlines()]
    assert any(line["event"] == "lifespan ended" for line in lines)
    assert {line["service"] for line in lines} == {"kit"}
    assert "hunter2" not in log


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if httpx2.get(f"{url}/readyz").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the service did not become ready")
