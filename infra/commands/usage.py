"""`scrip usage`: old use as files: archived, dropped from the log, brought back. On its database, running or not."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from infra.commands.stack import stack_with
from infra.errors import BadInput, StackError
from infra.listing import Row, show_rows
from services.kit.clock import now
from services.metering.portability.archiving import ArchivedMonth, ArchiveInUse, archive_usage
from services.metering.portability.files import BadArchive
from services.metering.portability.restoring import NotTheSame, RestoredMonth, restore_usage
from services.metering.settings import ArchiveSettings

OWNER: Final = "metering_owner"

usage = typer.Typer(name="usage", help="The usage log's old months as files: archive, restore.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(usage)


@usage.command("archive")
def archive(
    *,
    to: Annotated[Path, typer.Option(help="The directory; what is in it from before is added to.", file_okay=False)],
    before: Annotated[
        str | None,
        typer.Option(
            metavar="YYYY-MM-DD",
            help="Use of days before it (UTC). Default: SCRIP_METERING_ARCHIVE_AFTER_DAYS (400) days ago.",
        ),
    ] = None,
    drop: Annotated[
        bool, typer.Option("--drop", help="Then drop months that are whole from the log: no question reaches them.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Write old use as Parquet, a file for each day and partition, and read each back. Again, it writes what is new."""
    day = _default_day() if before is None else _day(before)
    if day > now().astimezone(UTC).date():
        raise BadInput(f"{day} is yet to come: only days that are over are archived.")
    console = Console()
    with stack_with("postgres") as stack, _as_sentence(to), _progress(console, "archiving") as on_progress:
        found = archive_usage(
            stack.database_url(OWNER), to, before=day, drop=drop, dry_run=dry_run, on_progress=on_progress
        )
    show_archived(console, found, before=day, dry_run=dry_run)


@usage.command("restore")
def restore(
    *,
    source: Annotated[Path, typer.Option("--from", help="The directory that it was archived to.", file_okay=False)],
    month: Annotated[
        list[str] | None, typer.Option(metavar="YYYY-MM", help="Only this one; may be repeated. Default: all.")
    ] = None,
) -> None:
    """Bring archived use back into the log, every column as it was. What is there already stays as it is.

    Into a new, empty metering it also brings what was seen, so that no repeat is charged. Let nothing else run then.
    """
    restore_months(Console(), source, month or ())


def restore_months(console: Console, source: Path, months: Collection[str]) -> None:
    """Bring months, as `2026-01`, back from where they were archived to, and print what came back; none: all."""
    chosen = [_month(each) for each in months]
    with stack_with("postgres") as stack:
        stack.migrate()
        with _as_sentence(source), _progress(console, "restoring") as on_progress:
            found = restore_usage(stack.database_url(OWNER), source, months=chosen, on_progress=on_progress)
    show_restored(console, found)


def show_archived(console: Console, found: list[ArchivedMonth], *, before: date, dry_run: bool) -> None:
    """Print what became of months."""
    if not found:
        console.print(f"There is no use in the log from before {before}.")
        return
    rows: list[Row] = []
    for each in found:
        said = f"would be {each.state}" if dry_run and each.state != "left" else each.state
        rows.append(
            (
                f"{each.month:%Y-%m}",
                f"{each.rows:,}",
                f"{each.files:,}",
                f"{each.files_written:,}",
                f"{each.bytes:,}",
                "\n".join(f"{amount} {unit}" for unit, amount in each.amounts.items()),
                f"{said}: {each.why}" if each.why else said,
            )
        )
    names = ("month", "uses", "files", "new files", "bytes", "charged", "state")
    show_rows(console, names, rows, prose=("state",), numbers=names[1:5])


def show_restored(console: Console, found: list[RestoredMonth]) -> None:
    """Print what came back."""
    names = ("month", "uses", "restored", "seen anew", "files")
    rows: list[Row] = []
    for each in found:
        counts = (each.rows, each.rows_restored, each.keys_restored, each.files)
        rows.append((f"{each.month:%Y-%m}", *(f"{count:,}" for count in counts)))
    show_rows(console, names, rows, numbers=names[1:], otherwise="There is nothing in the archive.")


def _default_day() -> date:
    return now().astimezone(UTC).date() - timedelta(days=ArchiveSettings().metering_archive_after_days)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise BadInput(f"{text!r} is no day: it must look like 2026-01-31.") from error


def _month(text: str) -> date:
    try:
        return datetime.strptime(text, "%Y-%m").replace(tzinfo=UTC).date()
    except ValueError as error:
        raise BadInput(f"{text!r} is no month: it must look like 2026-01.") from error


@contextmanager
def _as_sentence(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StackError(f"{error.filename or directory} cannot be used: {error.strerror}.") from error
    except (BadArchive, NotTheSame, ArchiveInUse) as error:
        raise StackError(f"{str(error)[0].upper()}{str(error)[1:]}.") from error


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
