"""Which idempotency keys may have been used before: most are new, and those are not looked up."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

Key = tuple[int, str, str]

# How many keys are remembered at least. A caller that got no answer asks again within seconds.
_RECENT_MIN: Final = 100_000
_WARY: Final = timedelta(seconds=10)


class Keys:
    """Remembers the keys that were accepted lately, by their hashes: one that is taken for another is looked up.

    A key that was used longer ago shows when it is written: nothing of its batch is, and it all is decided again. So
    that somebody who repeats such keys does not hold up everybody, all are looked up for a while after one did.
    """

    def __init__(self) -> None:
        self._newer: set[int] = set()
        self._older: set[int] = set()
        self._wary_until: datetime | None = None

    def accept(self, keys: Iterable[Key]) -> None:
        """Remember keys of accepted commands, whether committed or not."""
        self._newer.update([hash(key) for key in keys])
        if len(self._newer) >= _RECENT_MIN:
            self._newer, self._older = set(), self._newer

    def is_recent(self, key: Key) -> bool:
        """Whether a key was accepted lately."""
        found = hash(key)
        return found in self._newer or found in self._older

    def is_wary(self, now: datetime) -> bool:
        """Whether keys that are not recent are to be looked up, too."""
        return self._wary_until is not None and now < self._wary_until

    def be_wary(self, now: datetime) -> None:
        """Somebody has repeated what was accepted long ago."""
        self._wary_until = now + _WARY
