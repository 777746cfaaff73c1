"""How long who plays on a stack waits for an answer: a service may be starting, its partition changing hands."""

import time
from typing import Final

import httpx2

from infra.errors import StackError

# Try again: the service is starting, its partition is changing hands, its queue is full.
_PASSING: Final = frozenset({429, 502, 503, 504})


class Patience:
    """One question, asked until it is answered, within a time."""

    def __init__(self, asked: str, *, seconds_max: float) -> None:
        """`asked`: method and URL, for who is told that there is no answer."""
        self._asked = asked
        self._seconds_max = seconds_max
        self._deadline = time.monotonic() + seconds_max

    def is_answered(self, response: httpx2.Response) -> bool:
        """Whether this is the answer; if not, ask again. StackError if it is an error, or the time is up."""
        if response.is_success:
            return True
        said = f"{response.status_code} {response.text[:300]}"
        if response.status_code not in _PASSING:
            raise StackError(f"{self._asked} was refused: {said}")
        self._go_on(said)
        return False

    def failed(self, error: httpx2.TransportError) -> None:
        """There was no response: ask again. StackError if the time is up."""
        self._go_on(str(error) or type(error).__name__)

    def _go_on(self, said: str) -> None:
        if time.monotonic() > self._deadline:
            raise StackError(
                f"{self._asked} got no answer for {self._seconds_max:.0f} seconds ({said}):"
                " see `scrip status` and the logs."
            )
