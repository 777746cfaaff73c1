"""What the gateway remembers of what others own, in memory: verified keys, the price book, recent output lengths."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from contracts.keyvault import Verified
from services.gateway.domain.errors import Unavailable
from services.gateway.domain.prices import PriceBook


@dataclass(frozen=True, slots=True)
class _Remembered:
    verified: Verified
    until: float


class VerifiedKeys:
    """Keys verified a moment ago, by hash. What a fact says is no longer so is forgotten at once."""

    def __init__(self, *, seconds: float, count_max: int = 50_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._count_max = count_max
        self._clock = clock
        self._found: dict[str, _Remembered] = {}
        self.generation = 0

    def find(self, key_sha256: str) -> Verified | None:
        """What was verified no longer ago than it may be."""
        found = self._found.get(key_sha256)
        if found is None:
            return None
        if found.until <= self._clock():
            del self._found[key_sha256]
            return None
        return found.verified

    def remember(self, key_sha256: str, verified: Verified, *, generation: int) -> None:
        """Remember an answer that was asked for in `generation`: one that a fact has overtaken is not kept."""
        if generation != self.generation or not self._seconds:
            return
        if len(self._found) >= self._count_max:
            del self._found[next(iter(self._found))]
        self._found[key_sha256] = _Remembered(verified, self._clock() + self._seconds)

    def forget_key(self, key_id: str) -> None:
        """The key was disabled."""
        self._forget(lambda verified: verified.key_id == key_id)

    def forget_below(self, account: str) -> None:
        """The policy or the secrets of an account changed: they hold for all below it."""
        self._forget(lambda verified: f"{verified.account}/".startswith(f"{account}/"))

    def forget_all(self) -> None:
        """Something happened, and it is not known what."""
        self._forget(lambda _: True)

    def _forget(self, concerned: Callable[[Verified], bool]) -> None:
        self.generation += 1
        for key_sha256 in [each for each, found in self._found.items() if concerned(found.verified)]:
            del self._found[key_sha256]


class CurrentPrices:
    """The last price book that metering told."""

    def __init__(self) -> None:
        self._book: PriceBook | None = None

    def replace(self, book: PriceBook) -> None:
        """From now on this one."""
        self._book = book

    def book(self) -> PriceBook:
        """The price book. Unavailable until there is a first one."""
        if self._book is None:
            raise Unavailable(reason="the price book is not known yet", retry_after_seconds=2)
        return self._book

    async def check(self) -> None:
        """For readiness."""
        self.book()
