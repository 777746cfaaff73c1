"""Laws of the key ring and its file."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import assume, given

from services.keyvault.domain.keyring import Keyring, first_keyring, rotated, without
from services.keyvault.store import KeyringFile, make_keyring_file, rotate_keyring_file
from services.keyvault.translate import InvalidKeyring, keyring_text, read_keyring
from tests.unit.keyvault.strategies import ring_keys, rings


@given(rings())
def test_a_ring_is_read_as_it_was_written(ring: Keyring) -> None:
    assert read_keyring(keyring_text(ring), name="ring") == ring


@given(rings(), ring_keys)
def test_rotating_adds_a_current_key_and_keeps_the_others(ring: Keyring, key: bytes) -> None:
    assume(key not in ring.keys.values())
    newer = rotated(ring, key)
    assert newer.keys[newer.current] == key
    assert newer.current > max(ring.versions)
    assert {version: newer.keys[version] for version in ring.versions} == ring.keys
    assert without(newer, ring.current).versions == tuple(
        version for version in newer.versions if version != ring.current
    )
    with pytest.raises(ValueError, match="rotate first"):
        without(newer, newer.current)


@given(rings())
def test_a_ring_does_not_show_its_keys(ring: Keyring) -> None:
    assert not any(repr(key)[2:-1] in repr(ring) or key.hex() in repr(ring) for key in ring.keys.values())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b'{"current": 1, "keys": {}}',
        b'{"current": 2, "keys": {"1": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}',
        b'{"current": 1, "keys": {"1": "Y2FuYXJ5LWtleQ=="}}',
        b'{"current": 1, "keys": {"1": "not base64: canary-key"}}',
        b'{"current": 0, "keys": {"0": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}',
        b'{"current": 1, "keys": {"one": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}',
        b'{"current": 1, "keys": {"1": "%(key)b", "2": "%(key)b"}}' % {b"key": b"A" * 43 + b"="},
        b'{"current": 1, "keys": {"1": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}, "x": 1}',
        b"\xff\xfe",
    ],
)
def test_a_file_that_is_no_ring_is_refused_without_its_contents(text: bytes) -> None:
    with pytest.raises(InvalidKeyring) as raised:
        read_keyring(text, name="keyring.json")
    assert "keyring.json" in str(raised.value)
    for part in ("canary", "Y2Fu", "AAAA"):
        assert part not in str(raised.value)
    assert raised.value.__cause__ is None


def test_the_file_is_made_once_and_rotated_in_place(tmp_path: Path) -> None:
    path = tmp_path / "keyring.json"
    made = make_keyring_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert make_keyring_file(path) == made
    rotated_ring = rotate_keyring_file(path)
    assert (rotated_ring.current, rotated_ring.versions) == (2, (1, 2))
    assert rotated_ring.keys[1] == made.keys[1]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["keyring.json"]


def test_rotations_at_once_lose_no_version(tmp_path: Path) -> None:
    """A version that another overwrote may already have wrapped a secret: nobody could open it any more."""
    path = tmp_path / "keyring.json"
    make_keyring_file(path)
    with ThreadPoolExecutor(max_workers=8) as threads:
        rings = list(threads.map(lambda _: rotate_keyring_file(path), range(16)))
    last = read_keyring(path.read_bytes(), name="ring")
    assert last.versions == tuple(range(1, 18))
    for ring in rings:
        assert all(last.keys[version] == key for version, key in ring.keys.items())


def test_what_a_crash_left_half_written_is_neither_read_nor_kept_open(tmp_path: Path) -> None:
    path = tmp_path / "keyring.json"
    made = make_keyring_file(path)
    half_written = tmp_path / "keyring.json.new"
    half_written.write_text("{")
    half_written.chmod(0o666)
    assert read_keyring(path.read_bytes(), name="ring") == made
    rotate_keyring_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["keyring.json"]


def test_a_rotation_that_cannot_be_written_leaves_the_ring_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keyring.json"
    made = make_keyring_file(path)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("services.keyvault.store.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        rotate_keyring_file(path)
    assert read_keyring(path.read_bytes(), name="ring") == made


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keyring.json"
    first = make_keyring_file(path)
    keyring = KeyringFile(path)
    assert keyring.read() == first
    assert keyring.read() is keyring.read()
    second = rotate_keyring_file(path)
    assert keyring.read() == second
    path.write_bytes(b"{}")
    with pytest.raises(InvalidKeyring):
        keyring.read()
    assert keyring.last_good == second


def test_keys_have_32_bytes() -> None:
    with pytest.raises(ValueError, match="31 bytes"):
        first_keyring(os.urandom(31))
