"""Sealing: a secret under a fresh data key, the data key under the ring, both bound to where the secret belongs.

Opening takes the very place it was sealed for, and refuses anything else. A ciphertext has one key only (the
commitment is checked first), so that no two keys open one ciphertext to two texts.
"""

import hmac
from dataclasses import dataclass, field
from typing import Final, Literal
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.keyvault.domain.errors import SecretUndecryptable
from services.keyvault.domain.keyring import KEY_BYTES, Keyring
from services.keyvault.domain.secret import Secret

Owner = Literal["account", "platform"]

NONCE_BYTES: Final = 12
# Of `seal` and of `rewrap`.
SEAL_ENTROPY_BYTES: Final = KEY_BYTES + 2 * NONCE_BYTES
REWRAP_ENTROPY_BYTES: Final = NONCE_BYTES

_CONTENT: Final = b"scrip.keyvault.content.v1"
_WRAP: Final = b"scrip.keyvault.wrap.v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a secret belongs. A platform's secret has an empty account. Each replacement is a new version."""

    owner: Owner
    account: str
    provider: str
    name: str
    record: UUID
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What is stored of a secret. `ring_version` says which key of the ring opens `wrapped_key`."""

    ring_version: int
    wrapped_key: bytes = field(repr=False)
    commitment: bytes = field(repr=False)
    ciphertext: bytes = field(repr=False)


def seal(secret: Secret, *, place: Place, ring: Keyring, entropy: bytes) -> Sealed:
    """Seal under the ring's current key. `entropy` is fresh and used once: a data key and two nonces."""
    if len(entropy) != SEAL_ENTROPY_BYTES:
        raise ValueError(f"sealing takes {SEAL_ENTROPY_BYTES} random bytes, not {len(entropy)}")
    data_key = entropy[:KEY_BYTES]
    content_nonce, wrap_nonce = entropy[KEY_BYTES : KEY_BYTES + NONCE_BYTES], entropy[KEY_BYTES + NONCE_BYTES :]
    bound = _bound(place)
    content_key, commitment = _derived(data_key, bound)
    sealed = AESGCM(content_key).encrypt(content_nonce, secret.reveal().encode("utf-8", "surrogatepass"), bound)
    return Sealed(
        ring_version=ring.current,
        wrapped_key=_wrap(data_key, ring=ring, nonce=wrap_nonce, bound=bound),
        commitment=commitment,
        ciphertext=content_nonce + sealed,
    )


def open_sealed(sealed: Sealed, *, place: Place, ring: Keyring) -> Secret | SecretUndecryptable:
    """The secret, if this is what was sealed for this very place with a key of this ring."""
    found = _content_key(sealed, place=place, ring=ring)
    if isinstance(found, SecretUndecryptable):
        return found
    nonce, text = sealed.ciphertext[:NONCE_BYTES], sealed.ciphertext[NONCE_BYTES:]
    try:
        opened = AESGCM(found.content_key).decrypt(nonce, text, _bound(place))
    except (InvalidTag, ValueError):
        return _undecryptable(sealed, place, "its ciphertext is not what was sealed there")
    return Secret(opened.decode("utf-8", "surrogatepass"))


def rewrap(sealed: Sealed, *, place: Place, ring: Keyring, entropy: bytes) -> Sealed | SecretUndecryptable:
    """The same ciphertext with its data key wrapped by the ring's current key. The secret itself is not opened."""
    if len(entropy) != REWRAP_ENTROPY_BYTES:
        raise ValueError(f"rewrapping takes {REWRAP_ENTROPY_BYTES} random bytes, not {len(entropy)}")
    found = _content_key(sealed, place=place, ring=ring)
    if isinstance(found, SecretUndecryptable):
        return found
    return Sealed(
        ring_version=ring.current,
        wrapped_key=_wrap(found.data_key, ring=ring, nonce=entropy, bound=_bound(place)),
        commitment=sealed.commitment,
        ciphertext=sealed.ciphertext,
    )


@dataclass(frozen=True, slots=True)
class _Keys:
    data_key: bytes = field(repr=False)
    content_key: bytes = field(repr=False)


def _content_key(sealed: Sealed, *, place: Place, ring: Keyring) -> _Keys | SecretUndecryptable:
    ring_key = ring.keys.get(sealed.ring_version)
    if ring_key is None:
        return _undecryptable(sealed, place, f"the key ring has no version {sealed.ring_version}")
    bound = _bound(place)
    nonce, wrapped = sealed.wrapped_key[:NONCE_BYTES], sealed.wrapped_key[NONCE_BYTES:]
    try:
        data_key = AESGCM(ring_key).decrypt(nonce, wrapped, _wrap_bound(sealed.ring_version, bound))
    except (InvalidTag, ValueError):
        return _undecryptable(sealed, place, "its data key is not one that the ring wrapped for it")
    if len(data_key) != KEY_BYTES:
        return _undecryptable(sealed, place, "its data key is not one that the ring wrapped for it")
    content_key, commitment = _derived(data_key, bound)
    if not hmac.compare_digest(commitment, sealed.commitment):
        return _undecryptable(sealed, place, "it was sealed with another data key")
    return _Keys(data_key=data_key, content_key=content_key)


def _wrap(data_key: bytes, *, ring: Keyring, nonce: bytes, bound: bytes) -> bytes:
    return nonce + AESGCM(ring.keys[ring.current]).encrypt(nonce, data_key, _wrap_bound(ring.current, bound))


def _derived(data_key: bytes, bound: bytes) -> tuple[bytes, bytes]:
    """The key that encrypts, and a commitment to the data key that says nothing about it."""
    derived = HKDF(algorithm=SHA256(), length=2 * KEY_BYTES, salt=None, info=bound).derive(data_key)
    return derived[:KEY_BYTES], derived[KEY_BYTES:]


def _bound(place: Place) -> bytes:
    """Everything a secret is bound to. Each part has its length before it: no two places have the same bytes."""
    parts = (
        _CONTENT,
        place.owner.encode(),
        place.account.encode(),
        place.provider.encode(),
        place.name.encode(),
        place.record.bytes,
        place.version.to_bytes(8, "big"),
    )
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _wrap_bound(ring_version: int, bound: bytes) -> bytes:
    return _WRAP + ring_version.to_bytes(8, "big") + bound


def _undecryptable(sealed: Sealed, place: Place, reason: str) -> SecretUndecryptable:
    return SecretUndecryptable(
        record=str(place.record), version=place.version, ring_version=sealed.ring_version, reason=reason
    )
