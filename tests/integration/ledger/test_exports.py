"""Laws of exports: one set of rows whatever the format, as it was when it began, a bounded part of it in memory."""

import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from contracts import ledger as words
from infra.cli import app_for
from infra.commands import ledger as commands
from infra.errors import StackError
from services.kit.ids import new_hold_id
from services.ledger.queries import exports
from services.ledger.queries.exports import Row, as_csv, as_parquet
from tests.builders import charge_line, hold_leg, place_hold
from tests.integration.ledger.driving import Driver
from tests.integration.ledger.exporting import rows_of_csv, rows_of_parquet

pytestmark = pytest.mark.anyio

PARQUET = "application/vnd.apache.parquet"
BEGIN = datetime(2026, 7, 1, tzinfo=UTC)


async def filled(driver: Driver) -> None:
    """Two accounts with entries of most sorts, in units with and without decimals."""
    await driver.funded("acme", "10.000000001")
    await driver.funded("acme/key", "12", unit="tokens")
    hold = new_hold_id("acme")
    await driver.accepted(place_hold(hold, hold_leg("usd", "4"), account="acme/key"))
    line = charge_line('event, "1"', account="acme/key", usd="3.5", hold=hold)
    await driver.accepted(words.Charge(idempotency_key="charge", line=line))


async def test_csv_and_parquet_have_the_same_rows_in_the_same_order(driver: Driver) -> None:
    async with driver.running() as http:
        await filled(driver)

        async def export(accept: str | None = None, **query: str) -> httpx2.Response:
            headers = {} if accept is None else {"Accept": accept}
            asked = {"account": "acme", "below": "true", **query}
            answer = await http.get("/v1/exports/journal", params=asked, headers=headers)
            assert answer.status_code == 200, answer.text
            return answer

        rows = rows_of_csv((await export(format="csv")).content)
        assert {row["kind"] for row in rows} >= {"wallet_opened", "lot_granted", "hold_placed", "charged"}
        assert {row["unit"] for row in rows} == {"usd", "tokens"}
        assert [row["posted"] for row in rows if row["kind"] == "lot_granted"] == ["10.000000001", "12"]
        by_name = await export(format="parquet")
        assert by_name.headers["content-type"] == PARQUET
        assert rows_of_parquet(by_name.content) == rows
        for accept, content_type in (
            (PARQUET, PARQUET),
            (f"application/json, {PARQUET.upper()}, text/csv;q=0.9", PARQUET),
            ("text/csv", "text/csv"),
            ("*/*", "text/csv"),
        ):
            answer = await export(accept)
            assert answer.headers["content-type"].split(";")[0] == content_type, accept
        # What the query names counts, whatever the header says.
        assert (await export(PARQUET, format="csv")).headers["content-type"].startswith("text/csv")


async def test_a_format_that_there_is_not_is_refused_with_those_there_are(driver: Driver) -> None:
    async with driver.running() as http:
        for named in ("xlsx", "CSV", ""):
            answer = await http.get("/v1/exports/journal", params={"account": "acme", "format": named})
            assert (answer.status_code, answer.json()["code"]) == (400, "unknown_format")
            assert "csv or parquet" in answer.json()["detail"]
        parameters = (await http.get("/openapi.json")).json()["paths"]["/v1/exports/journal"]["get"]["parameters"]
        (described,) = (each["schema"] for each in parameters if each["name"] == "format")
        assert described["enum"] == ["csv", "parquet"]


def entries(first: int, count: int) -> list[Row]:
    return [
        (
            7,
            number,
            1,
            f"txn_07_{number}",
            "charged",
            "acme",
            "usd",
            f"lot_07_{number // 100}",
            "purchase",
            None,
            f"-{number + 1}",
            "0",
            "0",
            BEGIN + timedelta(microseconds=number),
            BEGIN,
            None,
        )
        for number in range(first, first + count)
    ]


async def test_a_file_is_written_as_the_journal_is_read_and_a_bounded_part_is_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exports, "GROUP_ROWS", 400)
    pages, page_rows = 60, 100
    read = 0

    async def journal() -> AsyncIterator[list[Row]]:
        nonlocal read
        for page in range(pages):
            read += page_rows
            yield entries(page * page_rows, page_rows)

    parts: list[bytes] = []
    rows_read: list[int] = []
    async for part in as_parquet(journal()):
        parts.append(part)
        rows_read.append(read)
    assert rows_read == [*range(400, 6_001, 400), 6_000]
    file = pq.ParquetFile(io.BytesIO(b"".join(parts)))
    assert [file.metadata.row_group(place).num_rows for place in range(file.num_row_groups)] == [400] * 15
    # Each part is one group; the last says where they are.
    sizes = [len(part) for part in parts[:-1]]
    assert max(sizes) < 2 * min(sizes)
    rows = rows_of_parquet(b"".join(parts))
    assert rows == rows_of_csv(b"".join([part async for part in as_csv(journal())]))
    assert len(rows) == pages * page_rows
    # Nothing is read of a file that was cut off.
    with pytest.raises(pa.ArrowInvalid):
        pq.ParquetFile(io.BytesIO(b"".join(parts[:-1])))


async def test_nothing_to_export_is_a_file_without_rows() -> None:
    async def nothing() -> AsyncIterator[list[Row]]:
        return
        yield

    content = b"".join([part async for part in as_parquet(nothing())])
    assert rows_of_parquet(content) == []
    assert pq.read_schema(io.BytesIO(content)).equals(exports.EXPORTED)


def test_scrip_writes_an_export_in_the_format_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []

    class Answering:
        @classmethod
        def running(cls, _service: str) -> "Answering":
            return cls()

        def stream(self, _path: str, query: dict[str, str], to: Any) -> None:
            asked.append(query)
            to.write(b"PAR1")

    monkeypatch.setattr(commands, "ServiceApi", Answering)
    file = tmp_path / "journal.parquet"
    for arguments in (["--format", "parquet", "--to", str(file)], ["--below"]):
        result = CliRunner().invoke(app_for(()), ["export", "acme", *arguments])
        assert result.exit_code == 0, result.output
    assert file.read_bytes() == b"PAR1"
    assert [(each["format"], each["below"]) for each in asked] == [("parquet", "false"), ("csv", "true")]


def test_of_an_export_that_was_cut_off_no_part_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CutOff:
        @classmethod
        def running(cls, _service: str) -> "CutOff":
            return cls()

        def stream(self, _path: str, _query: dict[str, str], to: Any) -> None:
            to.write(b"PAR1")
            raise StackError("Ledger does not answer.")

    monkeypatch.setattr(commands, "ServiceApi", CutOff)
    file = tmp_path / "journal.csv"
    result = CliRunner().invoke(app_for(()), ["export", "acme", "--to", str(file)])
    assert isinstance(result.exception, StackError)
    assert not file.exists()
