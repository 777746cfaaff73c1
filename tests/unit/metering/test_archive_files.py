"""A row that goes through a file is the row that it was, whatever is in it."""

import json
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.metering.portability import files
from services.metering.portability.files import (
    COLUMNS,
    MANIFEST,
    NAMES,
    ArchivedFile,
    BadArchive,
    FileColumn,
    check_file,
    find_months,
    make_manifest,
    next_month,
    read_file,
    read_manifest,
    remove_strays,
    write_file,
    write_manifest,
)

DAY = date(2026, 1, 5)
JANUARY = date(2026, 1, 1)

# Postgres has no NUL in a text, and UTF-8 no half of a pair.
TEXTS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
TIMES = st.datetimes(timezones=st.just(UTC))
NUMBERS = st.decimals(allow_nan=False, allow_infinity=False, places=25).map(lambda number: f"{number:f}")


def _values(column: FileColumn) -> st.SearchStrategy[Any]:
    if column.name == "partition":
        return st.just(7)
    if column.name == "amounts":
        amounts = st.lists(st.fixed_dictionaries({"unit": st.sampled_from(["usd", "tokens"]), "amount": NUMBERS}))
        found: st.SearchStrategy[Any] = amounts.map(json.dumps)
    else:
        bits = {pa.int16(): 15, pa.int32(): 31, pa.int64(): 63}.get(column.type)
        found = {
            pa.string(): TEXTS,
            pa.binary(): st.binary(max_size=40),
            pa.bool_(): st.booleans(),
        }.get(column.type, TIMES if bits is None else st.integers(-(2**bits), 2**bits - 1) if bits else st.nothing())
    return found | st.none() if column.nullable else found


ROWS = st.lists(st.tuples(*(_values(column) for column in COLUMNS)), max_size=6)


def row(number: int = 0, **changes: Any) -> tuple[Any, ...]:
    """A row, all of whose columns have something in them."""
    some = {
        pa.int16(): 7,
        pa.int32(): number,
        pa.int64(): number,
        pa.bool_(): False,
        pa.string(): f"text {number}",
        pa.binary(): b"\x00\xff",
    }
    at = datetime(2026, 1, 5, tzinfo=UTC) + timedelta(microseconds=number)
    made = {column.name: some.get(column.type, at) for column in COLUMNS}
    made |= {"amounts": json.dumps([{"unit": "usd", "amount": "0.000000001"}])}
    return tuple((made | changes)[name] for name in NAMES)


def written(directory: Path, *rows: tuple[Any, ...]) -> ArchivedFile:
    return write_file(directory, rows, day=DAY, partition=7, fingerprint="0")


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait for the disk: what a power cut leaves is not what is looked at."""
    monkeypatch.setattr(files, "_sync", lambda _descriptor: None)


@pytest.mark.usefixtures("unhurried")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(ROWS)
def test_a_row_comes_back_as_it_was(tmp_path: Path, rows: list[tuple[Any, ...]]) -> None:
    file = written(tmp_path, *rows)
    check_file(tmp_path, file)
    assert [each for page in read_file(tmp_path, file, columns=NAMES) for each in page] == rows
    sums: dict[str, Fraction] = {}
    for each in rows:
        values = dict(zip(NAMES, each, strict=True))
        for amount in () if values["amounts"] is None or values.get("superseded") else json.loads(values["amounts"]):
            sums[amount["unit"]] = sums.get(amount["unit"], Fraction(0)) + Fraction(amount["amount"])
    assert {unit: Fraction(amount) for unit, amount in file.amounts.items()} == sums
    # The same rows make the same file, under the same name.
    assert written(tmp_path, *rows) == file


def test_many_rows_are_read_in_pages_and_written_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAGE_ROWS", 10)
    monkeypatch.setattr(files, "GROUP_ROWS", 40)
    rows = [row(number) for number in range(101)]
    file = written(tmp_path, *rows)
    pages = list(read_file(tmp_path, file, columns=NAMES))
    assert [len(page) for page in pages] == [10] * 10 + [1]
    assert [each for page in pages for each in page] == rows
    assert pa.parquet.ParquetFile(tmp_path / file.name).num_row_groups == 3
    assert file.amounts == {"usd": "0.000000101"}


def test_columns_that_a_file_has_not_are_not_asked_of_it(tmp_path: Path) -> None:
    file = written(tmp_path, row())
    with pytest.raises(BadArchive, match="lacks the columns colour"):
        list(read_file(tmp_path, file, columns=["partition", "colour"]))


def test_who_dies_while_a_file_is_written_leaves_none(tmp_path: Path) -> None:
    def dying() -> Any:
        yield row()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path, dying(), day=DAY, partition=7, fingerprint="0")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_read_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = files._write_parquet  # a disk that writes other things than it was told is nobody else's

    def lossy(path: Path, rows: Any) -> None:
        honest(path, list(rows)[1:])

    monkeypatch.setattr(files, "_write_parquet", lossy)
    with pytest.raises(BadArchive, match="does not hold what was written"):
        written(tmp_path, row(1), row(2))
    assert list(tmp_path.rglob("*.parquet")) == []


def test_a_changed_file_is_found_out_even_if_its_hash_is(tmp_path: Path) -> None:
    file = written(tmp_path, row(1), row(2))
    other = written(tmp_path, row(1), row(3))
    (tmp_path / other.name).replace(tmp_path / file.name)
    with pytest.raises(BadArchive, match="is not what was written"):
        check_file(tmp_path, file)
    with pytest.raises(BadArchive, match="does not hold the rows"):
        list(read_file(tmp_path, file, columns=NAMES))
    (tmp_path / file.name).write_bytes(b"PAR1")
    with pytest.raises(BadArchive, match="cannot be read"):
        list(read_file(tmp_path, file, columns=NAMES))


def test_a_manifest_comes_back_and_names_nothing_else(tmp_path: Path) -> None:
    directory = tmp_path / "month=2026-01"
    file = written(directory, row())
    manifest = make_manifest(JANUARY, [file], schema_version="0007")
    written_hash = write_manifest(directory, manifest)
    assert read_manifest(directory) == (manifest, written_hash)
    assert find_months(tmp_path) == [JANUARY]
    stray = written(directory, row(5))
    remove_strays(directory, manifest)
    assert not (directory / stray.name).exists()
    assert (directory / file.name).exists()

    content = (directory / MANIFEST).read_text()
    for changed in (
        content[:-5],
        content.replace("scrip usage 1", "scrip usage 2"),
        content.replace("2026-01-05/", "../../"),
        content.replace('"month": "2026-01"', '"month": "2026-02"'),
        content.replace('"partition": 7', '"partition": 8'),
    ):
        assert changed != content
        (directory / MANIFEST).write_text(changed)
        with pytest.raises(BadArchive, match=r"manifest|no file of an archive"):
            read_manifest(directory)
    (directory / MANIFEST).unlink()
    assert read_manifest(directory) is None
    assert find_months(tmp_path) == []
    with pytest.raises(BadArchive, match="no directory"):
        find_months(tmp_path / "none")


def test_months_follow_each_other() -> None:
    months = [JANUARY]
    while len(months) < 25:
        months.append(next_month(months[-1]))
    assert months == [date(2026 + number // 12, number % 12 + 1, 1) for number in range(25)]
