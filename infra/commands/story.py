"""`scrip story`: an account, its keys, its calls and its credits, played step by step on the running stack."""

import typer
from rich.console import Console

from infra import state
from infra.commands.demo import interruptible


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(story)


def story() -> None:
    """Tell the story of an account, on both simulators. Exit code 1 names the step that differs. Every time anew."""
    # `scrip --help` imports every command, and would be half a second slower: it has OpenAI's client.
    from infra.demo.story import play  # noqa: PLC0415 - see above
    from infra.demo.story_doors import Target  # noqa: PLC0415 - see above

    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with interruptible(console, "The story was interrupted; every telling begins anew."):
        play(Target.running(state.locate()), say)
