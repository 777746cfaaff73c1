"""`scrip demo`: play the main job on the running stack, and say whether the bill is exact."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from infra import state
from infra.demo.job import Options, Target, play
from infra.demo.report import display, show_result


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(demo)


def demo(
    *,
    times: Annotated[int, typer.Option(min=1, max=10, help="How often to send every event.")] = 1,
    shuffle: Annotated[int | None, typer.Option(metavar="SEED", help="Send in another order.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Only the first rows of the trace.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Events per atomic batch.")] = 1000,
    rate: Annotated[float | None, typer.Option(min=1, help="At most so many events per second.")] = None,
    edition: Annotated[str, typer.Option(help="Another copy of the job, with ids and accounts of its own.")] = "",
) -> None:
    """Bill the trace in infra/demo on the running stack. Exit code 1 if the totals differ. Repeats charge nothing."""
    console = Console()
    options = Options(
        edition=edition, rows_max=rows, times=times, shuffle=shuffle, batch_size=batch, rate_per_second=rate
    )
    with interruptible(console, "The demo was interrupted; the next run goes on from what is recorded."):
        with display(console) as show:
            result = asyncio.run(play(Target.running(state.locate()), options, show))
        show_result(console, result)
    raise typer.Exit(0 if result.right else 1)


@contextmanager
def interruptible(console: Console, sentence: str) -> Iterator[None]:
    """End with a sentence and exit code 130 on Ctrl-C, and on the SIGTERM of a supervisor that got one."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
