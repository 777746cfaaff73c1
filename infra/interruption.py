"""Commands that are told to end: they clean up, and say in one sentence what became of what they did."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final

import typer
from rich.console import Console

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal told the command to end. Who waits for a server knows what a KeyboardInterrupt is, and takes it back."""


@dataclass(slots=True)
class Standing:
    """What is to be said if the command is interrupted now."""

    sentence: str


@contextmanager
def interruptible(console: Console, sentence: str) -> Iterator[Standing]:
    """End with a sentence, and the exit code by which a shell knows the signal. Told again, it still cleans up."""
    standing = Standing(sentence)
    told: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if not told:
            told.append(number)
            raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield standing
    except BaseException:
        # Whatever it is, what was cut off is why.
        if not told:
            raise
        console.print(standing.sentence, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(128 + told[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
