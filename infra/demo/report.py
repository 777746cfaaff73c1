"""What the main job prints: progress bars on a terminal, plain lines elsewhere, and the tables at the end."""

import time
from collections.abc import Mapping
from decimal import Decimal
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from infra.demo.job import Result

LARGEST_SHOWN: Final = 10
LINE_EVERY_SECONDS: Final = 2.0


class Bars:
    """Progress on a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def opened(self, done: int, total: int) -> None:
        self._show("accounts", done, total)

    def moved(self, *, total: int, published: int, accounted: int, charged: int, chargeable: int) -> None:
        self._show("published", published, total)
        self._show("metered", accounted, total)
        self._show("charged", charged, chargeable)

    def said(self, sentence: str) -> None:
        self._progress.console.print(sentence, style="yellow", markup=False)

    def _show(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=min(done, total), total=total)


class Lines:
    """Progress elsewhere: a line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return

    def opened(self, done: int, total: int) -> None:
        if done == total:
            self.said(f"{total} accounts are open and granted.")

    def moved(self, *, total: int, published: int, accounted: int, charged: int, chargeable: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_EVERY_SECONDS
            self.said(f"published {published} of {total}, metered {accounted}, charged {charged} of {chargeable}")

    def said(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def display(console: Console) -> Bars | Lines:
    """The one that suits the console."""
    return Bars(console) if console.is_terminal else Lines(console)


def show_result(console: Console, result: Result) -> None:
    """The counts, the largest accounts, the three totals, and the verdict."""
    console.print(_counts(result))
    console.print(_largest(result))
    console.print(_totals(result))
    if result.stuck is not None:
        console.print(result.stuck, style="bold red", markup=False)
    if not result.totals.agree:
        console.print(
            f"The three totals differ. The first account: {result.totals.difference()}. Is anything but the demo's use"
            " reported for it?",
            style="bold red",
            markup=False,
        )
    if result.right:
        console.print("The three totals agree to the nano-dollar, account by account.", style="green", markup=False)


def _counts(result: Result) -> Table:
    table = Table(title="This run", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "published": result.published,
        "new": result.new,
        "duplicate": result.duplicate,
        "conflicting": result.conflicting,
        "dead-lettered": result.dead,
        "set aside": result.set_aside,
        "charged": result.charged,
    }
    for name, count in rows.items():
        table.add_row(name, f"{count:,}")
    if result.charged:
        table.add_row("events/s, publish to balance", f"{result.charged / result.seconds:,.0f}")
    return table


def _largest(result: Result) -> Table:
    table = Table("account", title=f"The {LARGEST_SHOWN} largest accounts", title_justify="left")
    table.add_column("charged, usd", justify="right")
    amounts = result.totals.journal
    for account in sorted(amounts, key=lambda name: (-amounts[name], name))[:LARGEST_SHOWN]:
        table.add_row(account, _dollars(amounts[account]))
    table.add_row("all", _dollars(_sum(amounts)), style="bold")
    return table


def _totals(result: Result) -> Table:
    table = Table("total of", title="Three totals", title_justify="left")
    table.add_column("usd", justify="right")
    table.add_row("the journal's charges", _dollars(_sum(result.totals.journal)))
    table.add_row("the balances' movement", _dollars(_sum(result.totals.movement)))
    table.add_row("an independent computation", _dollars(_sum(result.totals.independent)))
    return table


def _sum(amounts: Mapping[str, Decimal]) -> Decimal:
    return sum(amounts.values(), Decimal(0))


def _dollars(amount: Decimal) -> str:
    return f"{amount:.9f}"
