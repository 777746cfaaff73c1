"""The trace: 19,366 real requests, their order, their tokens, and which demo account each one belongs to."""

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Final
from zlib import crc32

TRACE_FILE: Final = Path(__file__).with_name("azure_llm_conversation_2023.csv.gz")
ACCOUNTS: Final = 200


@dataclass(frozen=True, slots=True)
class Request:
    """One row. `number` counts data rows from 1; `after_first` is the time since the first row, to the microsecond."""

    number: int
    after_first: timedelta
    input_tokens: int
    output_tokens: int


def requests(*, rows_max: int | None = None) -> list[Request]:
    """The first `rows_max` requests of the trace in its order; all of them without a limit."""
    return list(islice(_requests(), rows_max))


def account_of(number: int, *, edition: str = "") -> str:
    """`demo-<floor(200 u^2)>` with u = crc32(str(number)) / 2^32: a few accounts are busy, many are not.

    An edition is another copy of the whole job, on accounts `demo-<edition>-…`: for tests and trials.
    """
    checksum = crc32(str(number).encode())
    return f"demo-{edition + '-' if edition else ''}{ACCOUNTS * checksum * checksum >> 64}"


def accounts(rows: list[Request], *, edition: str = "") -> list[str]:
    """The accounts that occur, in the order of their numbers."""
    found = {account_of(row.number, edition=edition) for row in rows}
    return sorted(found, key=lambda account: int(account.rpartition("-")[2]))


def _requests() -> Iterator[Request]:
    first: datetime | None = None
    with gzip.open(TRACE_FILE, "rt", encoding="ascii", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            time = _time(row["TIMESTAMP"])
            first = first or time
            yield Request(
                number=number,
                after_first=time - first,
                input_tokens=int(row["ContextTokens"]),
                output_tokens=int(row["GeneratedTokens"]),
            )


def _time(text: str) -> datetime:
    """The trace has seven decimals; a tenth of a microsecond is cut off."""
    return datetime.strptime(text[:26], "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC)
