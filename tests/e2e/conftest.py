"""One stack for the session, its demo played once by `scrip up --exit-after-demo`, then started again to stay.

Its services trace to a file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from infra.demo.scratch_stack import ScratchStack


@dataclass(frozen=True, slots=True)
class Played:
    """A stack that was made by the first run of the demo, and what that run printed."""

    stack: ScratchStack
    first_code: int
    first_output: str
    traces: Path


@dataclass(frozen=True, slots=True)
class Api:
    """A service's HTTP API under one token."""

    url: str
    token: str = field(repr=False)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, headers=self._headers, timeout=10, trust_env=False)

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx2.post(self.url + path, json=body, headers=self._headers | named, timeout=10, trust_env=False)

    def put(self, path: str, body: object) -> httpx2.Response:
        return httpx2.put(self.url + path, json=body, headers=self._headers, timeout=10, trust_env=False)

    def json(self, path: str) -> Any:
        response = self.get(path)
        assert response.is_success, response.text
        return response.json()

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@pytest.fixture(scope="session")
def played(servers_directory: Callable[[str], Path]) -> Iterator[Played]:
    directory = servers_directory("e2e")
    stack, traces = ScratchStack(directory), directory / "traces.jsonl"
    try:
        # As a user would say it. Only these two: the services inherit it.
        with pytest.MonkeyPatch.context() as said:
            said.setenv("SCRIP_TRACES_EXPORTER", "file")
            said.setenv("SCRIP_TRACES_FILE", str(traces))
            first = stack.scrip("up", "--exit-after-demo", timeout_seconds=170)
            stack.start()
        yield Played(stack=stack, first_code=first.returncode, first_output=first.stdout, traces=traces)
    finally:
        stack.remove()


@pytest.fixture(scope="session")
def stack(played: Played) -> ScratchStack:
    return played.stack


@pytest.fixture(scope="session")
def metering(stack: ScratchStack) -> Api:
    return Api(stack.url("metering"), stack.credentials.tokens["operator"])


@pytest.fixture(scope="session")
def reporter(stack: ScratchStack) -> Api:
    """Metering's HTTP door for the source `demo`."""
    return Api(stack.url("metering"), stack.credentials.tokens["demo"])


@pytest.fixture(scope="session")
def ledger(stack: ScratchStack) -> Api:
    return Api(stack.url("ledger"), stack.credentials.tokens["operator"])
