"""Laws of the signatures over heads: they cover every head of a commit, and only the key's owner can make one."""

import stat
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.signing import (
    InvalidSigningKey,
    ensure_key_files,
    heads_of,
    heads_text,
    is_signed,
    new_key,
    read_public_keys,
    read_signer,
    signer,
)

PRIVATE = new_key()
SIGNER = signer(PRIVATE)
KEYS = {SIGNER.key_id: SIGNER.public_key}


@dataclass(frozen=True)
class At:
    """A head."""

    partition: int
    batch: int
    chain_hash: bytes


heads = st.lists(
    st.builds(At, st.integers(0, 63), st.integers(1, 2**62), st.binary(min_size=32, max_size=32)),
    min_size=1,
    unique_by=lambda head: head.partition,
)


@given(heads=heads)
def test_one_signature_covers_every_head_that_a_commit_moved(heads: list[At]) -> None:
    signed = SIGNER.sign_heads(heads)
    assert is_signed(signed.heads, signed.signature, key_id=signed.key_id, keys=KEYS)
    assert heads_of(signed.heads) == {head.partition: (head.batch, head.chain_hash) for head in heads}


@given(heads=heads)
def test_a_commit_is_named_after_its_first_head(heads: list[At]) -> None:
    first = min(heads, key=lambda head: head.partition)
    signed = SIGNER.sign_heads(heads)
    assert (signed.partition, signed.commit_id) == (first.partition, f"{first.partition:02d}-{first.batch}")


@given(heads=heads, changed=st.integers(0), change=st.sampled_from(["partition", "batch", "chain_hash"]))
def test_a_signature_is_of_no_other_heads(heads: list[At], changed: int, change: str) -> None:
    signed = SIGNER.sign_heads(heads)
    one = heads[changed % len(heads)]
    other = {
        "partition": replace(one, partition=one.partition + 1),
        "batch": replace(one, batch=one.batch + 1),
        "chain_hash": replace(one, chain_hash=bytes([one.chain_hash[0] ^ 1]) + one.chain_hash[1:]),
    }[change]
    text = heads_text([other if head is one else head for head in sorted(heads, key=lambda head: head.partition)])
    assert not is_signed(text, signed.signature, key_id=signed.key_id, keys=KEYS)


def test_a_signature_by_another_key_is_none() -> None:
    other = signer(new_key())
    signed = other.sign_heads([At(1, 1, bytes(32))])
    assert not is_signed(signed.heads, signed.signature, key_id=other.key_id, keys=KEYS)
    assert not is_signed(signed.heads, signed.signature, key_id=SIGNER.key_id, keys=KEYS)


@pytest.mark.parametrize("text", ["", "scrip ledger heads 1", "other\n01 1 00", "scrip ledger heads 1\n01 1", "\n"])
def test_what_is_no_text_about_heads_says_nothing(text: str) -> None:
    with pytest.raises(ValueError):
        heads_of(text)


def test_keys_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    private, public = tmp_path / "signing.pem", tmp_path / "verify.pem"
    ensure_key_files(private, public)
    made = private.read_text(), public.read_text()
    ensure_key_files(private, public)
    assert (private.read_text(), public.read_text()) == made
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert list(read_public_keys(public)) == [read_signer(private).key_id]


def test_a_key_that_signed_once_can_be_verified_for_ever(tmp_path: Path) -> None:
    private, public = tmp_path / "signing.pem", tmp_path / "verify.pem"
    ensure_key_files(private, public)
    before = read_signer(private)
    private.unlink()
    ensure_key_files(private, public)
    ensure_key_files(private, public, given=PRIVATE)
    assert list(read_public_keys(public)) == [before.key_id, read_signer(private).key_id, SIGNER.key_id]
    signed = before.sign_heads([At(1, 1, bytes(32))])
    assert is_signed(signed.heads, signed.signature, key_id=signed.key_id, keys=read_public_keys(public))


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    private = tmp_path / "signing.pem"
    ensure_key_files(private, tmp_path / "verify.pem")
    private.chmod(0o640)
    with pytest.raises(InvalidSigningKey, match="0600"):
        read_signer(private)


def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path) -> None:
    with pytest.raises(InvalidSigningKey) as refused:
        signer("secret nonsense")
    assert "nonsense" not in str(refused.value)
    with pytest.raises(InvalidSigningKey, match=r"missing\.pem cannot be read"):
        read_signer(tmp_path / "missing.pem")
    no_text = tmp_path / "signing.pem"
    no_text.touch(mode=0o600)
    no_text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidSigningKey, match="PEM form"):
        read_signer(no_text)


def test_a_file_of_public_keys_holds_nothing_else(tmp_path: Path) -> None:
    private, public = tmp_path / "signing.pem", tmp_path / "verify.pem"
    assert read_public_keys(public) == {}
    ensure_key_files(private, public)
    whole = public.read_bytes()
    for content in (b"nonsense", b"\xff\x00", whole[:60], whole + whole[:60], b"nonsense" + whole[20:]):
        public.write_bytes(content)
        with pytest.raises(InvalidSigningKey, match="not a public key"):
            read_public_keys(public)
        with pytest.raises(InvalidSigningKey, match="not a public key"):
            ensure_key_files(private, public, given=PRIVATE)
        assert public.read_bytes() == content
    public.write_bytes(b"\n" + whole + b"\n\n" + whole)
    assert list(read_public_keys(public)) == [read_signer(private).key_id]
    public.unlink()
    public.mkdir()
    with pytest.raises(InvalidSigningKey, match=r"verify\.pem cannot be read: Is a directory"):
        read_public_keys(public)


def test_a_signer_does_not_show_its_key() -> None:
    assert "PRIVATE" not in repr(SIGNER)
    assert PRIVATE.splitlines()[1] not in repr(SIGNER)
