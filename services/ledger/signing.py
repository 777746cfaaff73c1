"""Signatures over heads: one per commit, by a key that is never in the database, so that nobody there can make one.

A row of `signatures` says which commit signed it; the text that was signed is in the row of the commit's first head,
and in the fact that tells the world outside.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from services.kit.files import write_private

# Says what is signed, so that a signature made for one purpose is of no use for another.
TITLE: Final = "scrip ledger heads 1"
_PEM_BEGIN: Final = b"-----BEGIN PUBLIC KEY-----"
_PEM_END: Final = b"-----END PUBLIC KEY-----"


class InvalidSigningKey(Exception):
    """What was given as a key is none, or is readable by others than its owner."""


class SignedHead(Protocol):
    """Where a partition stands after a commit; `domain.draft.Head` is one."""

    @property
    def partition(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def chain_hash(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class SignedHeads:
    """What a commit signed: `heads` is the text. `commit_id` is `<partition>-<batch>` of its first head.

    That partition's outbox carries the fact, and its row of `signatures` the text; those of the others refer to it.
    """

    commit_id: str
    partition: int
    heads: str
    signature: bytes
    key_id: str

    @property
    def signature_text(self) -> str:
        """The signature as the fact carries it."""
        return base64.b64encode(self.signature).decode()


@dataclass(frozen=True, slots=True)
class Signer:
    """Signs heads with one key."""

    _key: Ed25519PrivateKey = field(repr=False)
    key_id: str

    @property
    def public_key(self) -> Ed25519PublicKey:
        """What shows that it signed."""
        return self._key.public_key()

    # Called by handlers.process once per commit, after everything is decided and before store.write, with the `after`
    # of each Written whose batch is not that of its `before`; not at all if there is none. What it returns goes to
    # store.write. The fact ledger.v1.<pp>.heads.signed (heads, signature_text, key_id) takes the next number in the
    # outbox of `partition`, whose `after` is replaced by one with that number: outbox numbers are not signed.
    def sign_heads(self, heads: Sequence[SignedHead]) -> SignedHeads:
        """Sign the heads that a commit moves, at least one: a function of them and the key alone."""
        first, *others = sorted(heads, key=lambda head: head.partition)
        text = heads_text((first, *others))
        return SignedHeads(
            commit_id=f"{first.partition:02d}-{first.batch}",
            partition=first.partition,
            heads=text,
            signature=self._key.sign(text.encode()),
            key_id=self.key_id,
        )


def heads_text(heads: Iterable[SignedHead]) -> str:
    """The text that is signed: its title, then a line `<partition> <batch> <hash>` for each head, by partition."""
    lines = [f"{head.partition:02d} {head.batch} {head.chain_hash.hex()}" for head in heads]
    return "\n".join((TITLE, *lines))


def heads_of(text: str) -> dict[int, tuple[int, bytes]]:
    """Batch and chain hash by partition, as a signed text says. Raises ValueError if it says nothing of the kind."""
    title, *lines = text.split("\n")
    if title != TITLE or not lines:
        raise ValueError("the text is not one about heads")
    found: dict[int, tuple[int, bytes]] = {}
    for line in lines:
        partition, batch, chain_hash = line.split(" ")
        found[int(partition)] = (int(batch), bytes.fromhex(chain_hash))
    return found


def says_head(text: str, *, partition: int, batch: int, chain_hash: bytes) -> bool:
    """Whether a text about heads says this of a partition's. Only a text that is signed is known to be one."""
    return text.startswith(TITLE + "\n") and f"\n{partition:02d} {batch} {chain_hash.hex()}\n" in f"{text}\n"


def is_signed(text: str, signature: bytes, *, key_id: str, keys: Mapping[str, Ed25519PublicKey]) -> bool:
    """Whether a text was signed by the key of that id. One that is not known has signed nothing."""
    key = keys.get(key_id)
    if key is None:
        return False
    try:
        key.verify(signature, text.encode())
    except InvalidSignature:
        return False
    return True


def signer(pem: str) -> Signer:
    """Who signs with the private key in a PEM text."""
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidSigningKey("the ledger's signing key is not an unencrypted private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidSigningKey("the ledger's signing key is not an Ed25519 key")
    return Signer(key, key_id(key.public_key()))


def read_signer(path: Path) -> Signer:
    """Who signs with the private key in a file, which nobody but its owner may read."""
    try:
        if path.stat().st_mode & 0o077:
            raise InvalidSigningKey(f"{path} may be read by others: set its mode to 0600")
        # What is no text is no key either.
        return signer(path.read_text(errors="replace"))
    except OSError as error:
        raise InvalidSigningKey(f"{path} cannot be read: {error.strerror}") from error


def key_id(key: Ed25519PublicKey) -> str:
    """A short name of a key: the first 16 hexadecimal digits of the SHA-256 of its public half."""
    return sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def new_key() -> str:
    """A new private key: PKCS8 in PEM form."""
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def read_public_keys(path: Path) -> dict[str, Ed25519PublicKey]:
    """The public keys in a file, by their ids: all that have ever signed, one after another in PEM form; no file, none.

    InvalidSigningKey if it cannot be read, or holds anything else: what a damaged file lacks would be missed as if
    somebody else had signed.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidSigningKey(f"{path} cannot be read: {error.strerror}") from error
    found = {}
    *parts, rest = content.split(_PEM_END)
    if rest.strip() or not all(part.strip().startswith(_PEM_BEGIN) for part in parts):
        raise InvalidSigningKey(f"{path} holds something that is not a public key")
    for part in parts:
        try:
            key = load_pem_public_key(part.strip() + b"\n" + _PEM_END + b"\n")
        except ValueError as error:
            raise InvalidSigningKey(f"{path} holds something that is not a public key") from error
        if not isinstance(key, Ed25519PublicKey):
            raise InvalidSigningKey(f"{path} holds a key that is not an Ed25519 key")
        found[key_id(key)] = key
    return found


def ensure_key_files(private: Path, public: Path, *, given: str | None = None) -> None:
    """Make the signing key if there is none, and see that its public half is among the public keys.

    `given` is used instead of the private file. A key that signed once stays among the public ones. InvalidSigningKey.
    """
    if given is None and not private.exists():
        write_private(private, new_key())
    chosen = read_signer(private) if given is None else signer(given)
    if chosen.key_id not in read_public_keys(public):
        known = public.read_text() if public.exists() else ""
        pem = chosen.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        write_private(public, known + pem)
