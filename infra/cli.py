"""The `scrip` command: composes the modules of infra/commands, and shows an error of ours as one sentence."""

import os
import sys
from typing import Final

import typer
from rich.console import Console

from infra.commands import (
    aliases,
    corrections,
    dead_letters,
    demo,
    evidence,
    keyring,
    ledger,
    meters,
    prices,
    stack,
    story,
    usage,
)
from infra.errors import StackError

DEBUG_VARIABLE: Final = "SCRIP_DEBUG"

COMMANDS: Final = (
    stack,
    demo,
    story,
    ledger,
    evidence,
    dead_letters,
    prices,
    meters,
    usage,
    aliases,
    corrections,
    keyring,
)

app = typer.Typer(
    name="scrip",
    help="Scrip on this machine: run it, look into it, operate it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in COMMANDS:
    module.register(app)


def main() -> None:
    """The entry point."""
    try:
        app(prog_name="scrip")
    except StackError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        Console(stderr=True).print(f"scrip: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
