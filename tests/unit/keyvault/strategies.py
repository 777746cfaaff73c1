"""Strategies: secrets, places, rings and entropy; and canaries, secrets that must turn up nowhere."""

from dataclasses import dataclass
from uuid import UUID

from hypothesis import strategies as st

from services.keyvault.domain.keyring import KEY_BYTES, Keyring
from services.keyvault.domain.sealing import REWRAP_ENTROPY_BYTES, SEAL_ENTROPY_BYTES, Place, Sealed, seal
from services.keyvault.domain.secret import Secret
from tests.unit.contracts.strategies import accounts

texts = st.text(st.characters(codec="utf-8"), max_size=200)
secrets = texts.map(Secret)
names = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=20)
providers = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,20}", fullmatch=True)
seal_entropy = st.binary(min_size=SEAL_ENTROPY_BYTES, max_size=SEAL_ENTROPY_BYTES)
rewrap_entropy = st.binary(min_size=REWRAP_ENTROPY_BYTES, max_size=REWRAP_ENTROPY_BYTES)
ring_keys = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)


@st.composite
def places(draw: st.DrawFn) -> Place:
    """Where a secret belongs."""
    of_platform = draw(st.booleans())
    return Place(
        owner="platform" if of_platform else "account",
        account="" if of_platform else draw(accounts),
        provider=draw(providers),
        name=draw(names),
        record=UUID(int=draw(st.integers(0, 2**128 - 1))),
        version=draw(st.integers(1, 2**31 - 1)),
    )


@st.composite
def rings(draw: st.DrawFn) -> Keyring:
    """A key ring of one to four keys."""
    keys = draw(st.lists(ring_keys, min_size=1, max_size=4, unique=True))
    versions = draw(st.lists(st.integers(1, 9), min_size=len(keys), max_size=len(keys), unique=True))
    return Keyring(current=draw(st.sampled_from(versions)), keys=dict(zip(versions, keys, strict=True)))


@dataclass(frozen=True, slots=True)
class Sealing:
    """A secret, where and with what it was sealed, and what came of it."""

    secret: Secret
    place: Place
    ring: Keyring
    entropy: bytes
    sealed: Sealed


@st.composite
def sealings(draw: st.DrawFn) -> Sealing:
    """A secret, sealed."""
    secret, place, ring, entropy = draw(secrets), draw(places()), draw(rings()), draw(seal_entropy)
    sealed = seal(secret, place=place, ring=ring, entropy=entropy)
    return Sealing(secret=secret, place=place, ring=ring, entropy=entropy, sealed=sealed)
