"""Laws of files that nobody else may read."""

import os
from pathlib import Path

import pytest

from services.kit.files import write_private


def test_a_private_file_is_for_its_owner_alone_whatever_was_there(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o644)
    left_by_a_crash = tmp_path / "secret.new"
    left_by_a_crash.write_text("half")
    left_by_a_crash.chmod(0o666)
    write_private(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_private_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    write_private(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "the disk is full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_private_file_keeps_its_owner_when_root_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_private(path, "old")
    os.chown(path, 12_345, 12_345)
    write_private(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (12_345, 12_345)
