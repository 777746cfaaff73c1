"""Laws of sealing: what was sealed opens where it was sealed, and nothing else opens anywhere."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal
from uuid import UUID

from hypothesis import assume, given
from hypothesis import strategies as st

from services.keyvault.domain.errors import SecretUndecryptable
from services.keyvault.domain.keyring import Keyring, first_keyring, rotated, without
from services.keyvault.domain.sealing import NONCE_BYTES, Place, Sealed, open_sealed, rewrap, seal
from tests.unit.keyvault.strategies import Sealing, places, rewrap_entropy, ring_keys, seal_entropy, sealings

Part = Literal["wrapped_key", "commitment", "ciphertext"]
PARTS: tuple[Part, ...] = ("wrapped_key", "commitment", "ciphertext")

parts = st.sampled_from(PARTS)


def part_of(sealed: Sealed, part: Part) -> bytes:
    found: bytes = getattr(sealed, part)
    return found


def with_part(sealed: Sealed, part: Part, data: bytes) -> Sealed:
    found = {each: part_of(sealed, each) for each in PARTS} | {part: data}
    return Sealed(
        ring_version=sealed.ring_version,
        wrapped_key=found["wrapped_key"],
        commitment=found["commitment"],
        ciphertext=found["ciphertext"],
    )


def flipped(data: bytes, position: int) -> bytes:
    """The bytes with one bit changed."""
    place = position % (8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def is_refused(sealed: Sealed, *, place: Place, ring: Keyring) -> bool:
    opened = open_sealed(sealed, place=place, ring=ring)
    return isinstance(opened, SecretUndecryptable) and opened.record == str(place.record)


@given(sealings())
def test_what_was_sealed_opens_where_it_was_sealed(case: Sealing) -> None:
    assert open_sealed(case.sealed, place=case.place, ring=case.ring) == case.secret
    assert case.sealed.ring_version == case.ring.current


@given(sealings())
def test_nothing_stored_shows_the_secret_or_its_keys(case: Sealing) -> None:
    stored = b"".join(part_of(case.sealed, part) for part in PARTS)
    assert len(case.secret) < 4 or case.secret.reveal().encode() not in stored
    assert case.entropy[:32] not in stored
    assert not any(key in stored for key in case.ring.keys.values())


@given(sealings(), places(), st.sampled_from(["owner", "account", "provider", "name", "record", "version"]))
def test_a_sealed_secret_opens_nowhere_else(case: Sealing, other: Place, field: str) -> None:
    elsewhere = replace(case.place, **{field: getattr(other, field)})
    assume(elsewhere != case.place)
    assert is_refused(case.sealed, place=elsewhere, ring=case.ring)


@given(sealings())
def test_two_fields_that_read_alike_together_are_another_place(case: Sealing) -> None:
    place = Place(owner="account", account="acme", provider="openai", name="x", record=UUID(int=1), version=1)
    shifted = replace(place, account="acmeo", provider="penai")
    sealed = seal(case.secret, place=place, ring=case.ring, entropy=case.entropy)
    assert is_refused(sealed, place=shifted, ring=case.ring)


@given(sealings(), parts, st.integers(0, 10_000))
def test_one_changed_bit_refuses(case: Sealing, part: Part, position: int) -> None:
    changed = with_part(case.sealed, part, flipped(part_of(case.sealed, part), position))
    assert is_refused(changed, place=case.place, ring=case.ring)


@given(sealings(), parts, st.integers(0, 60))
def test_what_was_cut_or_made_longer_refuses(case: Sealing, part: Part, length: int) -> None:
    stored = part_of(case.sealed, part)
    for changed in (stored[: min(length, len(stored) - 1)], stored + bytes(length + 1)):
        assert is_refused(with_part(case.sealed, part, changed), place=case.place, ring=case.ring)


@given(sealings(), sealings(), st.sets(parts, min_size=1))
def test_parts_of_another_row_open_nothing(case: Sealing, other: Sealing, taken: Iterable[Part]) -> None:
    assume(case.place != other.place and case.entropy[:32] != other.entropy[:32])
    mixed = case.sealed
    sealed_elsewhere = seal(other.secret, place=other.place, ring=case.ring, entropy=other.entropy)
    for part in taken:
        mixed = with_part(mixed, part, part_of(sealed_elsewhere, part))
    assert is_refused(mixed, place=case.place, ring=case.ring)


@given(sealings(), st.integers(1, 12))
def test_another_version_of_the_ring_does_not_open_it(case: Sealing, version: int) -> None:
    assume(version != case.sealed.ring_version)
    assert is_refused(replace(case.sealed, ring_version=version), place=case.place, ring=case.ring)


@given(sealings(), ring_keys)
def test_another_key_under_the_same_version_does_not_open_it(case: Sealing, key: bytes) -> None:
    version = case.sealed.ring_version
    assume(key != case.ring.keys[version])
    assert is_refused(case.sealed, place=case.place, ring=Keyring(current=version, keys={version: key}))


@given(sealings(), seal_entropy)
def test_a_ciphertext_has_one_key(case: Sealing, other_entropy: bytes) -> None:
    # Whoever holds the ring wraps a second data key for the same row: the commitment tells them apart.
    assume(case.entropy[:32] != other_entropy[:32])
    other = seal(case.secret, place=case.place, ring=case.ring, entropy=other_entropy)
    changed = with_part(case.sealed, "wrapped_key", other.wrapped_key)
    assert is_refused(changed, place=case.place, ring=case.ring)


@given(sealings(), ring_keys, rewrap_entropy)
def test_rewrapping_changes_the_wrapping_and_nothing_else(case: Sealing, next_key: bytes, fresh: bytes) -> None:
    old_key = case.ring.keys[case.ring.current]
    assume(next_key != old_key)
    ring = first_keyring(old_key)
    sealed = seal(case.secret, place=case.place, ring=ring, entropy=case.entropy)
    newer = rotated(ring, next_key)
    wrapped = rewrap(sealed, place=case.place, ring=newer, entropy=fresh)
    assert isinstance(wrapped, Sealed)
    assert wrapped.ring_version == newer.current == 2
    assert (wrapped.ciphertext, wrapped.commitment) == (sealed.ciphertext, sealed.commitment)
    assert wrapped.wrapped_key[:NONCE_BYTES] == fresh
    assert open_sealed(wrapped, place=case.place, ring=without(newer, 1)) == case.secret
    assert is_refused(wrapped, place=case.place, ring=ring)
    assert is_refused(sealed, place=case.place, ring=without(newer, 1))


@given(sealings(), places(), rewrap_entropy)
def test_what_cannot_be_opened_is_not_rewrapped(case: Sealing, other: Place, fresh: bytes) -> None:
    assume(case.place != other)
    assert isinstance(rewrap(case.sealed, place=other, ring=case.ring, entropy=fresh), SecretUndecryptable)


@given(sealings())
def test_a_refusal_says_nothing_of_secret_or_keys(case: Sealing) -> None:
    changed = with_part(case.sealed, "commitment", bytes(32))
    opened = open_sealed(changed, place=case.place, ring=case.ring)
    assert isinstance(opened, SecretUndecryptable)
    assert str(opened) == (
        f"the secret {case.place.record} (version {case.place.version}) cannot be opened:"
        " it was sealed with another data key"
    )
    for shown in (repr(opened), repr(case.sealed), repr(case.ring)):
        assert not any(repr(key)[2:-1] in shown for key in case.ring.keys.values())
    assert repr(case.sealed) == f"Sealed(ring_version={case.sealed.ring_version})"
