"""How lists are shown: whole, whatever the terminal is. Nothing is cut off, for ids are there to be used."""

from collections.abc import Collection, Sequence
from typing import Final

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

PROSE_WIDTH_MIN: Final = 24
# What a column takes besides what stands in it: a blank on each side and a line; or what keeps it from the next.
_LINED: Final = 3
_PLAIN: Final = 2

Row = Sequence[str]


def show_rows(
    console: Console,
    names: Sequence[str],
    rows: Sequence[Row],
    *,
    prose: Collection[str] = (),
    numbers: Collection[str] = (),
    title: str | None = None,
    otherwise: str = "There are none.",
) -> None:
    """Print rows as a table if it fits, with lines or without, else one below the other, without what is empty.

    Only columns of `prose` are folded for it; those of `numbers` stand at the right. What is no terminal, a pipe, has
    the table, as wide as it needs to be: a row is a line there. `otherwise` is said if there are no rows.
    """
    if not rows:
        console.print(*map(Text, [f"{title}:"] if title else []), Text(otherwise))
        return
    widths = [max(map(_width, column)) for column in zip(names, *rows, strict=True)]
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, sum(widths) + _LINED * len(widths) + 1))
    least = sum(
        min(width, PROSE_WIDTH_MIN) if name in prose else width for name, width in zip(names, widths, strict=True)
    )
    columns = [
        Column(name, no_wrap=name not in prose, overflow="fold", justify="right" if name in numbers else "left")
        for name in names
    ]
    shown_title = None if title is None else Text(title)
    if least + _LINED * len(widths) + 1 <= console.width:
        table = Table(*columns, title=shown_title)
    elif least + _PLAIN * (len(widths) - 1) <= console.width:
        table = Table(*columns, title=shown_title, box=None, pad_edge=False, padding=(0, _PLAIN, 0, 0))
    else:
        _show_records(console, names, rows, title=title)
        return
    for row in rows:
        # Text: what came from outside is never taken for markup.
        table.add_row(*map(Text, row))
    console.print(table)


def _show_records(console: Console, names: Sequence[str], rows: Sequence[Row], *, title: str | None) -> None:
    if title is not None:
        console.print(Text(title))
    for row in rows:
        record = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
        for name, value in zip(names, row, strict=True):
            if value:
                record.add_row(name, Text(value))
        console.print(record)
        console.print()


def _width(text: str) -> int:
    return max((Text(line).cell_len for line in text.splitlines()), default=0)
