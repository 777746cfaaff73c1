"""`scrip dead-letters`: see the input that could not be taken, and hand it in again once it can be."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.errors import BadInput, StackError
from infra.listing import Row, show_rows
from infra.service_api import NotFound, ServiceApi, in_path

SERVICES: Final = ("metering", "ledger")
PAGE_SIZE: Final = 200

Letter = Mapping[str, Any]

dead_letters = typer.Typer(
    name="dead-letters",
    help="Input that could not be taken: list it, look at it, hand it in again.",
    no_args_is_help=True,
)

OfService = Annotated[str | None, typer.Option("--service", help=f"Only of one service: {' or '.join(SERVICES)}.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(dead_letters)


class Desk(ServiceApi):
    """The dead letters of one running service."""

    __slots__ = ()

    def letters(self, *, redriven: bool) -> Iterator[Letter]:
        """All letters, newest first; with `redriven` also those that were handed in again."""
        query: dict[str, str | int | bool] = {"limit": PAGE_SIZE, "redriven": redriven}
        while True:
            page = self.get("/dead-letters", query)
            yield from page["dead_letters"]
            if page["next_before"] is None:
                return
            query["before"] = page["next_before"]

    def find(self, letter_id: str) -> Letter | None:
        """One letter with its body, or None if this service has none of that id."""
        try:
            return self.get(f"/dead-letters/{in_path(letter_id)}")
        except NotFound:
            return None

    def redrive(self, letter_id: str) -> str | None:
        """Hand a letter in again; why not, if the service refuses."""
        try:
            self.post(f"/dead-letters/{in_path(letter_id)}/redrive")
        except StackError as refusal:
            return str(refusal)
        return None


@dead_letters.command("list")
def list_letters(
    *,
    service: OfService = None,
    redriven: Annotated[bool, typer.Option("--redriven", help="Also those that were handed in again.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many of each service at most.")] = 50,
) -> None:
    """List dead letters, newest first."""
    rows: list[Row] = []
    more = False
    for desk in _desks(service):
        for number, letter in enumerate(desk.letters(redriven=redriven)):
            if number == limit:
                more = True
                break
            again = f"{letter['redriven_at']} by {letter['redriven_by']}" if letter["redriven_at"] else ""
            received = f"{letter['received_at'][:19]}Z"
            rows.append((desk.service, letter["id"], received, letter["subject"], letter["reason"], again))
    console = Console()
    names = ("service", "id", "received", "subject", "why", "handed in again")
    show_rows(console, names, rows, prose=("subject", "why"), otherwise="There are no dead letters.")
    if more:
        console.print("There are more: see --limit.")


@dead_letters.command("show")
def show_letter(letter_id: Annotated[str, typer.Argument(help="The id that `list` shows.")]) -> None:
    """Show one dead letter: why, and its body."""
    desk, letter = _find(_desks(None), letter_id)
    table = Table(show_header=False, box=None)
    rows: dict[str, object] = {
        "service": desk.service,
        **{name: letter[name] for name in ("id", "received_at", "stream", "stream_sequence", "subject", "reason")},
        **{f"  {each.get('field') or 'event'}": each.get("message", "") for each in letter["problems"]},
        "redriven_at": letter["redriven_at"] or "not yet",
        "redriven_by": letter["redriven_by"] or "",
        "body": letter["payload_text"] if letter["payload_text"] is not None else letter["payload_base64"],
    }
    for name, value in rows.items():
        table.add_row(name, Text(str(value), overflow="fold"))
    Console().print(table)


@dead_letters.command("redrive")
def redrive_letters(
    letter_ids: Annotated[list[str] | None, typer.Argument(help="The ids that `list` shows.")] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All that were not handed in again yet.")] = False,
    service: OfService = None,
) -> None:
    """Hand dead letters in again. Exit code 1 if some are refused: they stay as they are."""
    if every == bool(letter_ids):
        raise BadInput("Name the dead letters to hand in again, or give --all.")
    desks = _desks(service)
    if every:
        chosen = [(desk, str(letter["id"])) for desk in desks for letter in list(desk.letters(redriven=False))]
    else:
        chosen = [(_find(desks, letter_id)[0], letter_id) for letter_id in letter_ids or ()]
    console = Console()
    refused = 0
    for desk, letter_id in chosen:
        why_not = desk.redrive(letter_id)
        refused += why_not is not None
        console.print(f"{letter_id}: {why_not or 'handed in again'}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(chosen) - refused} of {len(chosen)} handed in again")
    raise typer.Exit(1 if refused else 0)


def _desks(service: str | None) -> Sequence[Desk]:
    if service is not None and service not in SERVICES:
        raise BadInput(f"{service} has no dead letters: it must be {' or '.join(SERVICES)}.")
    return [Desk.running(name) for name in SERVICES if service in (None, name)]


def _find(desks: Sequence[Desk], letter_id: str) -> tuple[Desk, Letter]:
    for desk in desks:
        if (letter := desk.find(letter_id)) is not None:
            return desk, letter
    raise StackError(f"No service has a dead letter {letter_id!r}: see `scrip dead-letters list`.")
