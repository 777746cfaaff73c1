"""An export read back: what was written as CSV and as Parquet, in one form in which both can be compared."""

import csv
import io
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pyarrow.parquet

Rows = list[dict[str, str]]


def rows_of_csv(content: bytes) -> Rows:
    """The rows by the names of their columns."""
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def rows_of_parquet(content: bytes) -> Rows:
    """The rows as CSV would have them: each column by its own type, and no other."""
    table = pyarrow.parquet.ParquetFile(io.BytesIO(content)).read()
    return [{name: _text(name, value) for name, value in row.items()} for row in table.to_pylist()]


def _text(name: str, value: Any) -> str:
    match name:
        case "partition" | "batch" | "position":
            assert type(value) is int
            return str(value)
        case "posted" | "held" | "frozen":
            assert type(value) is Decimal
            return f"{value:f}".rstrip("0").rstrip(".")
        case "occurred_at" | "recorded_at":
            assert isinstance(value, datetime)
            assert value.utcoffset() is not None
            return value.astimezone(UTC).isoformat()
        case "lot" | "lot_kind" | "hold" | "details":
            return "" if value is None else str(value)
        case _:
            assert type(value) is str
            return value
