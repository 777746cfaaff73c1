"""Who the story talks to: the services and both simulators over TCP, asked again while a service restarts."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx2
from openai import DefaultHttpxClient, OpenAI
from pydantic import SecretStr

from infra import state
from infra.demo.patience import Patience
from infra.errors import StackError
from infra.services import OPENAI_KEY_VARIABLE, PROVIDER, STRIPE, STRIPE_KEY_VARIABLE
from infra.state import Layout, Run
from infra.supervisor import Stack

RETRY_SECONDS: Final = 0.1
ANSWER_SECONDS_MAX: Final = 10.0
WITHOUT_ANSWER_SECONDS_MAX: Final = 45.0
# Until what was done at one end is seen at the other: longer than a killed service takes to return.
SETTLE_SECONDS_MAX: Final = 45.0
# The client waits half a second, then twice as long each time, at most eight.
CALL_RETRIES: Final = 10
CALL_SECONDS_MAX: Final = 60.0

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Target:
    """The stack that the story is played on."""

    run: Run
    ledger_owner_url: SecretStr
    operator_token: str = field(repr=False)

    @classmethod
    def running(cls, layout: Layout) -> "Target":
        """The stack that runs on this directory. StackError if none does."""
        run = state.needed_run(layout)
        credentials = state.load_credentials(layout)
        stack = Stack(layout=layout, ports=run.ports, credentials=credentials)
        return cls(
            run=run,
            ledger_owner_url=stack.database_url("ledger_owner"),
            operator_token=credentials.tokens["operator"],
        )

    @property
    def real(self) -> list[str]:
        """The variables that hold a real key: its simulator does not run."""
        simulators = ((PROVIDER, OPENAI_KEY_VARIABLE), (STRIPE, STRIPE_KEY_VARIABLE))
        return [variable for simulator, variable in simulators if simulator.name not in self.run.processes]

    def url(self, name: str) -> str:
        """Where a service or a simulator answers."""
        return f"http://127.0.0.1:{self.run.ports[name]}"


class Door:
    """One HTTP API under one token."""

    def __init__(self, url: str, token: str | None) -> None:
        self._url = url
        self._client = httpx2.Client(
            base_url=url,
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=ANSWER_SECONDS_MAX,
            trust_env=False,
        )

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def get(self, path: str, **query: str) -> Any:
        """What it answers. StackError unless it is a success."""
        return self._send("GET", path, query=query)

    def put(self, path: str, body: object) -> Any:
        """Replace something; the same again changes nothing."""
        return self._send("PUT", path, body=body)

    def post(self, path: str, body: object, *, key: str | None = None) -> Any:
        """Command something, under an idempotency key where there is one."""
        return self._send("POST", path, body=body, headers={} if key is None else {"Idempotency-Key": key})

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        patience = Patience(f"{method} {self._url}{path}", seconds_max=WITHOUT_ANSWER_SECONDS_MAX)
        while True:
            try:
                response = self._client.request(method, path, json=body, params=query, headers=headers)
            except httpx2.TransportError as error:
                patience.failed(error)
            else:
                if patience.is_answered(response):
                    return response.json() if response.content else None
            time.sleep(RETRY_SECONDS)


class Doors:
    """All of them, and the gateway's, which is entered with the unmodified client of OpenAI's."""

    def __init__(self, target: Target) -> None:
        token = target.operator_token
        self.keyvault = Door(target.url("keyvault"), token)
        self.billing = Door(target.url("billing"), token)
        self.ledger = Door(target.url("ledger"), token)
        self.metering = Door(target.url("metering"), token)
        self.provider = Door(target.url("provider"), None)
        self.stripe = Door(target.url("stripe"), None)
        self._gateway_url = target.url("gateway")
        self._clients: dict[str, OpenAI] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for door in (self.keyvault, self.billing, self.ledger, self.metering, self.provider, self.stripe):
            door.close()
        for client in self._clients.values():
            client.close()

    def openai(self, key: str) -> OpenAI:
        """OpenAI's client at the gateway, under an access key."""
        if key not in self._clients:
            self._clients[key] = OpenAI(
                api_key=key,
                base_url=f"{self._gateway_url}/v1",
                max_retries=CALL_RETRIES,
                timeout=CALL_SECONDS_MAX,
                http_client=DefaultHttpxClient(trust_env=False),
            )
        return self._clients[key]


def eventually(read: Callable[[], Value], holds: Callable[[Value], bool], *, what: str) -> Value:
    """What is read as soon as it holds. StackError with the last reading if it does not in time."""
    deadline = time.monotonic() + SETTLE_SECONDS_MAX
    while not holds(found := read()):
        if time.monotonic() > deadline:
            raise StackError(f"{what} within {SETTLE_SECONDS_MAX:.0f} seconds, found instead: {found}")
        time.sleep(RETRY_SECONDS)
    return found
