"""Laws of what is said of an audit: its last sentence is about all that was found, wherever it was found."""

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from infra.commands.evidence import note_audited, show_audited
from infra.errors import StackError
from services.ledger.audit import Audited, Evidence
from services.ledger.audit_partition import Finding
from services.ledger.audit_sql import Checked

FINDING = Finding(7, 3, 1, "its hash is another")


@pytest.mark.parametrize(
    ("findings", "checked", "forged", "said"),
    [
        ((), (), (), "nothing is wrong"),
        ((), (Checked("a law", 0, ()),), (), "nothing is wrong"),
        ((FINDING,), (), (), "1 thing is wrong"),
        ((), (Checked("a law", 2, ("row 1", "row 2")),), (), "2 things are wrong"),
        ((), (), ("message 9 is not signed",), "1 thing is wrong"),
        ((FINDING,), (Checked("a law", 2, ("row 1",)),), ("message 9 is not signed",), "4 things are wrong"),
    ],
)
def test_nothing_is_wrong_is_said_only_if_nothing_is(
    findings: Sequence[Finding], checked: Sequence[Checked], forged: Sequence[str], said: str
) -> None:
    found = Audited(
        entries=10,
        lines=0,
        signatures=1,
        seconds=1.0,
        found=len(findings),
        findings=tuple(findings),
        reached={},
    )
    shown = io.StringIO()
    show_audited(Console(file=shown, width=200), found, checked, forged)
    assert shown.getvalue().splitlines()[-1] == f"10 entries audited, 10/s: {said}"


def test_where_an_audit_got_that_cannot_be_noted_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "audit.json").mkdir()
    with pytest.raises(StackError, match=r"was not noted: .*audit\.json cannot be written: Is a directory"):
        note_audited(tmp_path / "audit.json", Evidence())
