"""The spool: what it says is stored is on disk, its size is bounded, and several share it."""

import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from scrip_client.spool import ROW_BYTES, Spool, Turn

ROOM = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "spool.sqlite"


def bodies(spool: Spool) -> list[bytes]:
    return [body for _, body in spool.oldest(events_max=10_000, bytes_max=ROOM)]


def test_what_was_put_is_there_for_the_next_process_in_order(file: Path) -> None:
    first = Spool(file, bytes_max=ROOM)
    assert first.put([b"1", b"2"]) == 2
    # Nothing is closed: the process has died.
    second = Spool(file, bytes_max=ROOM)
    assert second.put([b"3"]) == 1
    assert bodies(second) == [b"1", b"2", b"3"]
    first.close()
    second.close()


def test_it_is_as_durable_as_it_says(file: Path) -> None:
    spool = Spool(file, bytes_max=ROOM)
    connection = spool.connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    spool.put([b"secret"])
    for path in file.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    spool.close()


def test_what_does_not_fit_is_not_taken_and_delivery_makes_room(file: Path) -> None:
    spool = Spool(file, bytes_max=3 * (100 + ROW_BYTES))
    body = b"x" * 100
    assert spool.put([body] * 5) == 3
    assert spool.put([b"y"]) == 0
    assert spool.bytes_used == spool.counts().bytes == 3 * (100 + ROW_BYTES)
    numbers = [number for number, _ in spool.oldest(events_max=2, bytes_max=ROOM)]
    spool.remove(numbers)
    # Delivered twice, by two who had the same turn one after the other.
    spool.remove(numbers)
    assert spool.counts().bytes == 100 + ROW_BYTES
    assert spool.put([body] * 5) == 2
    spool.close()


def test_a_refused_event_is_kept_counts_and_can_be_sent_again(file: Path) -> None:
    spool = Spool(file, bytes_max=ROOM)
    spool.put([b"good", b"bad"])
    before = spool.counts().bytes
    (_, (number, _)) = spool.oldest(events_max=2, bytes_max=ROOM)
    (apart,) = spool.set_apart({number: [{"field": "type"}]})
    assert (apart.body, list(apart.problems)) == (b"bad", [{"field": "type"}])
    assert bodies(spool) == [b"good"]
    assert spool.counts().bytes == before
    assert spool.refused(limit=10) == [apart]
    spool.send_again([number])
    assert bodies(spool) == [b"good", b"bad"]
    assert spool.refused(limit=10) == []
    assert spool.counts().bytes == before
    (_, (again, _)) = spool.oldest(events_max=2, bytes_max=ROOM)
    spool.set_apart({again: []})
    spool.discard([again])
    assert spool.counts().bytes == 4 + ROW_BYTES
    spool.close()


def test_a_batch_is_bounded_in_bytes_but_never_empty(file: Path) -> None:
    spool = Spool(file, bytes_max=ROOM)
    spool.put([b"x" * 50] * 4)
    assert len(spool.oldest(events_max=10, bytes_max=110)) == 2
    assert len(spool.oldest(events_max=10, bytes_max=1)) == 1
    assert len(spool.oldest(events_max=3, bytes_max=ROOM)) == 3
    spool.close()


def test_many_writers_lose_nothing_and_count_exactly(file: Path) -> None:
    spools = [Spool(file, bytes_max=ROOM) for _ in range(4)]

    def write(spool: Spool, name: int) -> None:
        for number in range(50):
            assert spool.put([f"{name}/{number}".encode()]) == 1

    threads = [threading.Thread(target=write, args=(spool, name)) for name, spool in enumerate(spools)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = bodies(spools[0])
    assert sorted(found) == sorted(f"{name}/{number}".encode() for name in range(4) for number in range(50))
    assert spools[0].counts().bytes == sum(map(len, found)) + len(found) * ROW_BYTES
    for spool in spools:
        spool.close()


def test_only_one_delivers_at_a_time(tmp_path: Path) -> None:
    first, second = Turn(tmp_path / "turn"), Turn(tmp_path / "turn")
    assert first.take()
    assert not second.take()
    first.give()
    assert second.take()
    assert not first.take()
    # As it ends with its process.
    second.close()
    assert first.take()
    first.give()
    first.give()
    first.close()


def test_in_memory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spool, turn = Spool(None, bytes_max=ROOM), Turn(None)
    assert spool.put([b"1"]) == 1
    assert turn.take()
    assert list(tmp_path.iterdir()) == []
    turn.close()
    spool.close()


def test_a_file_that_is_no_spool_is_not_overwritten(file: Path) -> None:
    file.write_bytes(b"something else, and long enough to be read as a header of a database" * 20)
    with pytest.raises(sqlite3.DatabaseError):
        Spool(file, bytes_max=ROOM)
    assert file.read_bytes().startswith(b"something else")
