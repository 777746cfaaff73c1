"""The key ring: keys that wrap data keys, by version. Several decrypt, the current one encrypts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Keyring:
    """Keys of 32 bytes by version. `current` is what is wrapped with from now on."""

    current: int
    keys: Mapping[int, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        if self.current not in self.keys:
            raise ValueError(f"the key ring has no version {self.current}, which it calls current")
        for version, key in self.keys.items():
            if version < 1:
                raise ValueError(f"versions of the key ring begin with 1, not {version}")
            if len(key) != KEY_BYTES:
                raise ValueError(f"version {version} of the key ring has {len(key)} bytes, not {KEY_BYTES}")
        if len(set(self.keys.values())) != len(self.keys):
            raise ValueError("two versions of the key ring are the same key")

    @property
    def versions(self) -> tuple[int, ...]:
        """Every version that can be opened."""
        return tuple(sorted(self.keys))


def first_keyring(key: bytes) -> Keyring:
    """A ring of one key."""
    return Keyring(current=1, keys={1: key})


def rotated(ring: Keyring, key: bytes) -> Keyring:
    """The ring with a new current key. What the others wrapped can still be opened."""
    version = max(ring.keys) + 1
    return Keyring(current=version, keys={**ring.keys, version: key})


def without(ring: Keyring, version: int) -> Keyring:
    """The ring without a key that nothing is wrapped with any more. For good: backups wrapped with it are shredded."""
    if version == ring.current:
        raise ValueError(f"version {version} is the current one: rotate first")
    return Keyring(current=ring.current, keys={each: key for each, key in ring.keys.items() if each != version})
