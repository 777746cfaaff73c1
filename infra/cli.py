"""The `scrip` command: composes the modules of infra/commands, and shows an error of ours as one sentence.

Imports the module of the command that was asked for and no other: they import all services between them.
"""

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Final

import typer
from rich.console import Console

from infra.errors import StackError

DEBUG_VARIABLE: Final = "SCRIP_DEBUG"

# In the order in which they are listed.
COMMANDS: Final[Mapping[str, Sequence[str]]] = {
    "stack": ("up", "status", "migrate", "provision", "clean"),
    "demo": ("demo",),
    "story": ("story",),
    "ledger": (
        *("account", "grant", "balance", "statement", "transaction", "charge", "holds", "totals", "tree", "limits"),
        "export",
    ),
    "evidence": ("replay", "audit", "journal"),
    "dead_letters": ("dead-letters",),
    "prices": ("prices",),
    "meters": ("meters",),
    "usage": ("usage",),
    "aliases": ("alias",),
    "corrections": ("corrections",),
    "keyring": ("keyring",),
}


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """The command line for arguments: with the commands of one module, or with all if it is none of them."""
    app = typer.Typer(
        name="scrip",
        help="Scrip on this machine: run it, look into it, operate it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    # With a callback a command has a name, even if it is the only one.
    app.callback()(_scrip)
    asked = [module for module, commands in COMMANDS.items() if arguments and arguments[0] in commands]
    for module in asked or COMMANDS:
        import_module(f"infra.commands.{module}").register(app)
    return app


def main() -> None:
    """The entry point."""
    try:
        with _interrupted_without_a_word():
            app = app_for(sys.argv[1:])
        app(prog_name="scrip")
    except StackError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        Console(stderr=True).print(f"scrip: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


@contextmanager
def _interrupted_without_a_word() -> Iterator[None]:
    """A Ctrl-C ends the process as it would any other: while modules are imported nothing has begun."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)


def _scrip() -> None:
    pass


if __name__ == "__main__":
    main()
