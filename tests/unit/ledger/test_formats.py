"""Laws of choosing a format: what is named counts, else the weights of Accept, else CSV."""

import pytest

from services.kit.problems import Problem
from services.ledger.queries.exports import FORMATS
from services.ledger.routes.formats import export_format

PARQUET = "application/vnd.apache.parquet"


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", "csv"),
        ("*/*", "csv"),
        ("text/html", "csv"),
        (PARQUET, "parquet"),
        (f"{PARQUET}, text/csv", "parquet"),
        (f"text/csv, {PARQUET}", "csv"),
        (f"text/csv;q=0.5, {PARQUET}", "parquet"),
        (f"{PARQUET};q=0.9, TEXT/CSV ; Q=1.000", "csv"),
        (f"{PARQUET};q=0.001, */*;q=0", "parquet"),
        # Not at all, however much the range is liked.
        ("text/csv;q=0, */*", "parquet"),
        ("text/*;q=0.3, application/*;q=0.4", "parquet"),
        # By its own name rather than by a range.
        (f"*/*, {PARQUET}", "parquet"),
        (f"text/*;q=0.8, {PARQUET};q=0.7, text/csv;q=0.1", "parquet"),
        # What is no weight says nothing.
        (f"{PARQUET};q=2, text/csv;q=0.1", "csv"),
        (f"{PARQUET};q=x", "csv"),
    ],
)
def test_the_format_that_accept_likes_best_is_chosen(accept: str, chosen: str) -> None:
    assert export_format(None, accept) is FORMATS[chosen]


def test_what_is_named_counts_whatever_accept_says() -> None:
    assert export_format("parquet", "text/csv") is FORMATS["parquet"]
    with pytest.raises(Problem, match="no format"):
        export_format("xlsx", "text/csv")
