"""The HTTP API of a service that runs, as its operator. What goes wrong becomes a sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Self
from urllib.parse import quote

import httpx2

from contracts.streams import OPERATOR
from infra import state
from infra.errors import BadInput, StackError
from infra.servers import LOOPBACK

TIMEOUT_SECONDS: Final = 30.0

Json = dict[str, Any]
Query = Mapping[str, str | int | bool | Sequence[str]]

# The input itself is at fault, however things stand: malformed, too large, invalid.
_AT_FAULT: Final = frozenset({400, 413, 422})


class NotFound(StackError):
    """The service answers 404."""


class Archived(StackError):
    """What is asked for is about use that is archived: `months` of it, as `2026-01`, are to be restored first."""

    def __init__(self, text: str, months: Sequence[str]) -> None:
        super().__init__(text)
        self.months = months


def in_path(text: str) -> str:
    """What the user wrote, as the end of a path: it never leads elsewhere, whatever it is."""
    # Dots, too: they would lead to what is above.
    return quote(text).replace(".", "%2E")


@dataclass(frozen=True, slots=True)
class ServiceApi:
    """A running service. An answer other than success is a StackError."""

    service: str
    url: str
    client: httpx2.Client

    @classmethod
    def running(cls, service: str) -> Self:
        """That of the stack that runs on the state directory. StackError if none does."""
        layout = state.locate()
        run = state.needed_run(layout)
        token = state.load_credentials(layout).tokens[OPERATOR]
        # The proxies of the environment lead elsewhere.
        client = httpx2.Client(headers={"Authorization": f"Bearer {token}"}, timeout=TIMEOUT_SECONDS, trust_env=False)
        return cls(service, f"http://{LOOPBACK}:{run.ports[service]}", client)

    def get(self, path: str, query: Query | None = None) -> Json:
        """What stands at a path."""
        return self._answer("GET", path, params=query)

    def post(
        self,
        path: str,
        body: Json | None = None,
        *,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        """The answer to a command."""
        return self._answer("POST", path, params=query, json=body, headers=headers)

    def remove(self, path: str) -> Json:
        """The answer to DELETE."""
        return self._answer("DELETE", path)

    def send(self, path: str, body: bytes, *, after: int = 0) -> Json:
        """The answer to JSON that is sent as it is written: a list, of what comes after so many that were sent."""
        return self._answer("POST", path, after=after, content=body, headers={"Content-Type": "application/json"})

    def stream(self, path: str, query: Query, to: BinaryIO) -> None:
        """Write an answer as it comes. What was cut off is an error."""
        try:
            with self.client.stream("GET", self.url + path, params=query) as response:
                if response.is_success:
                    for part in response.iter_bytes():
                        to.write(part)
                    return
                response.read()
                answer: Json = response.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise self._away(error) from error
        raise self._refused(response.status_code, answer)

    def _answer(self, method: str, path: str, *, after: int = 0, **options: Any) -> Json:
        try:
            response = self.client.request(method, self.url + path, **options)
            answer: Json = response.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise self._away(error) from error
        if response.is_success:
            return answer
        raise self._refused(response.status_code, answer, after=after)

    def _away(self, error: Exception) -> StackError:
        return StackError(f"{self.service.capitalize()} does not answer at {self.url} ({type(error).__name__}).")

    def _refused(self, status: int, answer: Json, *, after: int = 0) -> StackError:
        problems = [f"{_place(each, after)} {each.get('detail', '')}" for each in answer.get("errors", [])]
        why = "; ".join(problems) or answer.get("detail", status)
        if status == httpx2.codes.NOT_FOUND:
            # Of what is no name at all the service has no words of its own.
            return NotFound(
                f"{self.service.capitalize()} refuses: {'there is no such thing' if why == 'Not Found' else why}"
            )
        said = f"{self.service.capitalize()} refuses: {why}"
        if answer.get("code") == "archived":
            return Archived(said, answer["months"])
        return BadInput(said) if status in _AT_FAULT else StackError(said)


def _place(problem: Json, after: int) -> str:
    """Of what a problem is: a place in what was sent, or the number of an event, and its field."""
    if "index" not in problem:
        return str(problem.get("pointer", ""))
    field = f", {problem['field']}" if problem.get("field") else ""
    return f"event {after + problem['index'] + 1}{field}:"
