"""The record of a stack that runs: audited, exported, and taken to another ledger, which replays it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.demo.scratch_stack import ScratchStack
from tests.e2e.conftest import Api
from tests.integration.ledger.exporting import rows_of_csv, rows_of_parquet

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[ScratchStack]:
    """A stack that has never run."""
    made = ScratchStack(tmp_path / "other")
    made.layout.directory.parent.mkdir()
    try:
        yield made
    finally:
        made.remove()


def said(stack: ScratchStack, *arguments: str) -> str:
    """What a `scrip` command prints; it must succeed."""
    done = stack.scrip(*arguments)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_an_audit_of_all_that_was_charged_and_signed_finds_nothing_wrong(stack: ScratchStack) -> None:
    found = said(stack, "audit")
    assert "nothing is wrong" in found
    assert "broken" not in found
    counts = re.findall(r"^│ (?:entries|charge lines|signatures) +│ +(\d+)", found, re.MULTILINE)
    assert len(counts) == 3
    assert min(map(int, counts)) > 0


@pytest.mark.soak
def test_a_record_taken_to_another_ledger_makes_the_same_balances_and_the_same_chain(
    stack: ScratchStack, other: ScratchStack, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.jsonl.gz", tmp_path / "second.jsonl.gz"
    said(stack, "journal", "export", str(first))
    # It rebuilds every projection, and compares what it made: the second of two replays.
    imported = said(other, "journal", "import", str(first))
    assert "different" not in imported.split("entries replayed")[1]
    assert "an audit needs it" in imported
    said(other, "journal", "export", str(second))
    assert second.read_bytes() == first.read_bytes()


def test_an_account_is_exported_as_parquet_with_the_rows_of_csv(
    stack: ScratchStack, ledger: Api, tmp_path: Path
) -> None:
    file = tmp_path / "journal.parquet"
    said(stack, "export", "demo-199", "--below", "--format", "parquet", "--to", str(file))
    rows = rows_of_csv(ledger.get("/v1/exports/journal?account=demo-199&below=true").content)
    assert {row["kind"] for row in rows} >= {"wallet_opened", "lot_granted", "charged"}
    assert rows_of_parquet(file.read_bytes()) == rows
