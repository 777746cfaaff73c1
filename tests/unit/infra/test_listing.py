"""Laws of lists: nothing of them is cut off, however narrow the terminal is."""

import io
from collections import Counter
from collections.abc import Sequence

import pytest
from rich.console import Console

from infra.listing import show_rows

ID = "letter_01a1feb0-3bac-7b66-b1e7-591e5f0c8d2a"
SUBJECT = "usage.v1.62." + "a-service-with-a-long-name." * 8 + "x"
REASON = "the body is not JSON: [bold]unexpected[/bold] end of data at line 1, column 4096, " * 3
NAMES = ("service", "id", "subject", "why", "again")
ROWS = (("metering", ID, "usage.v1.62.demo", "too old", ""), ("ledger", ID[:-1] + "b", SUBJECT, REASON, "by me"))


def shown(rows: Sequence[Sequence[str]] = ROWS, *, width: int, is_terminal: bool = True) -> list[str]:
    """The lines that are printed, without their colours."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=is_terminal, color_system=None)
    show_rows(console, NAMES, rows, prose=("why",), title="Letters")
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [40, 80, 120, 300])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_nothing_is_cut_off_and_no_line_is_wider_than_the_terminal(width: int, rows: Sequence[Sequence[str]]) -> None:
    lines = shown(rows, width=width)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    # What is folded stands in parts between other cells, each of which is there.
    found = Counter("".join(lines))
    wanted = Counter("".join("".join(cell.split()) for row in rows for cell in row))
    assert wanted <= found


def test_an_id_is_in_one_piece_in_an_ordinary_terminal() -> None:
    for rows in (ROWS, ROWS[:1]):
        assert sum(ID in line for line in shown(rows, width=80)) == 1


def test_what_fits_is_a_table_and_what_does_not_is_one_below_the_other() -> None:
    assert shown(ROWS[:1], width=130)[1].startswith("┏")
    plain = shown(ROWS[:1], width=92)
    assert plain[1:] == [
        f"service   {'id':{len(ID)}}  subject           why      again",
        f"metering  {ID}  usage.v1.62.demo  too old",
    ]
    narrow = shown(ROWS[:1], width=60)
    assert narrow[:-1] == [
        "Letters",
        "service  metering",
        f"id       {ID}",
        "subject  usage.v1.62.demo",
        "why      too old",
    ]


def test_a_pipe_has_a_line_for_each_row_whatever_its_width() -> None:
    _title, *lines = shown(width=80, is_terminal=False)
    assert len(lines) == 3 + len(ROWS) + 1
    for row, line in zip(ROWS, lines[3:], strict=False):
        assert all(cell.strip() in line for cell in row)


def test_that_there_are_no_rows_is_said() -> None:
    assert shown((), width=80) == ["Letters: There are none."]
