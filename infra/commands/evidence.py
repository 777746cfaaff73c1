"""The commands that prove the ledger: replay, audit, and its journal as a file. On its database, running or not."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import nats.errors
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from nats.js.errors import Error as JetStreamError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from contracts.partition import PARTITION_COUNT
from contracts.streams import OPERATOR
from infra import state
from infra.commands.stack import stack_with
from infra.errors import StackError
from infra.interruption import interruptible
from infra.provision import operator
from infra.state import Layout
from infra.supervisor import CATALOGUE_FILE, Stack
from services.kit.catalogue import load_catalogue
from services.ledger.audit import (
    Audited,
    Evidence,
    EvidenceUnreadable,
    ProcessEnded,
    audit,
    read_evidence,
    read_published,
    unknown_signers,
    write_evidence,
)
from services.ledger.audit_sql import Checked
from services.ledger.audit_sql import audit as audit_tables
from services.ledger.portability import BadFile, InUse, Manifest, NotEmpty, export_journal, import_journal
from services.ledger.replay import Replayed, ShadowInUse, ShadowMissing
from services.ledger.replay import replay as replay_journal
from services.ledger.signing import InvalidSigningKey, read_public_keys

OWNER: Final = "ledger_owner"
READER: Final = "ledger"

REPLAY_CUT_OFF: Final = "The replay was interrupted: no balance was changed. The next begins anew."
SWAP_CUT_OFF: Final = (
    "The replay was interrupted as it replaced what differs: it is replaced whole, or not at all. `scrip replay` tells."
)
AUDIT_CUT_OFF: Final = "The audit was interrupted: nothing was changed, and where the last one got stays noted."
IMPORT_CUT_OFF: Final = "The import was interrupted: nothing was imported. The next begins anew."
IMPORT_ENDING_CUT_OFF: Final = (
    "The import was interrupted as it ended: the record is there whole, or not at all, as `scrip journal import` tells."
    " If it is, its balances are not: run `scrip replay --swap`."
)
IMPORT_NOT_REPLAYED: Final = (
    "The import was interrupted: the record is there whole, its balances are not. Run `scrip replay --swap`."
)

journal = typer.Typer(help="The ledger's record as a file.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="A gzip of JSON lines.", dir_okay=False)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(replay)
    app.command(name="audit")(audit_ledger)
    app.add_typer(journal, name="journal")


def replay(
    *,
    verify: Annotated[
        bool, typer.Option("--verify", help="Entry by entry, as the service adds them: slower, and no code is shared.")
    ] = False,
    swap: Annotated[
        bool, typer.Option("--swap", help="Replace what differs by what was rebuilt. Nothing is decided meanwhile.")
    ] = False,
) -> None:
    """Rebuild every projection from the journal and compare, byte by byte. Exit code 1 if they differ."""
    console = Console()
    with interruptible(console, REPLAY_CUT_OFF) as standing, stack_with("postgres") as stack:

        def ending() -> None:
            if swap:
                standing.sentence = SWAP_CUT_OFF

        result = _replay(stack, console, verify=verify, swap=swap, on_rebuilt=ending)
    show_replayed(console, result)
    raise typer.Exit(0 if result.is_equal or (swap and not result.heads_astray) else 1)


def audit_ledger(
    *,
    since_last: Annotated[
        bool, typer.Option("--since-last", help="Only what came after the last audit that found nothing.")
    ] = False,
) -> None:
    """Check the journal's chain, its signatures and every law at every transaction. Exit code 1 if anything is wrong.

    Compared with where the last audit got, and with what was published as signed: an end that was cut off is noticed.
    """
    console = Console()
    layout = state.locate()
    with interruptible(console, AUDIT_CUT_OFF) as standing, stack_with("postgres") as stack:
        try:
            keys = read_public_keys(layout.ledger_public_keys_file)
            evidence = read_evidence(layout.audit_file)
        except (InvalidSigningKey, EvidenceUnreadable) as error:
            raise StackError(f"The audit cannot begin: {error}.") from error
        forged: tuple[str, ...] = ()
        if state.current_run(layout) is None:
            console.print(
                "NATS does not run: what was published as signed is known as of the last audit", highlight=False
            )
        else:
            evidence, forged = asyncio.run(_published(stack, evidence, keys))
        caps = frozenset(unit.name for unit in load_catalogue(CATALOGUE_FILE).units.values() if unit.kind == "cap")
        url = stack.database_url(READER)

        def tell(done: int, total: int) -> None:
            on_progress(done, total)
            standing.sentence = f"{AUDIT_CUT_OFF} It had read {done} of {total} entries."

        try:
            with _progress(console, "auditing") as on_progress:
                found = audit(url, keys=keys, caps=caps, evidence=evidence, since_last=since_last, on_progress=tell)
        except ProcessEnded as error:
            raise StackError(f"Not all was audited, so nothing is known: {error}.") from error
        strangers = [] if found.is_clean else unknown_signers(url, keys)
        checked = () if since_last else audit_tables(url)
    show_audited(console, found, checked, forged)
    _show_unknown_signers(console, layout, strangers)
    if not found.is_clean or forged or any(check.breaches for check in checked):
        raise typer.Exit(1)
    audited = {**evidence.audited, **found.reached}
    note_audited(layout.audit_file, Evidence(audited, evidence.published, evidence.sequence))


@journal.command(name="export")
def export_record(
    file: File,
    *,
    partition: Annotated[
        int | None, typer.Option(min=0, max=PARTITION_COUNT - 1, help="Only this one. Default: all.")
    ] = None,
) -> None:
    """Write everything that was ever decided to a file, with sums by which it is known to be whole."""
    console = Console()
    cut_off = f"The export was interrupted: {file} was not written. The next begins anew."
    with interruptible(console, cut_off) as standing, stack_with("postgres") as stack:
        try:
            with _progress(console, "exporting") as on_progress:
                manifest = export_journal(
                    stack.database_url(READER), file, partition=partition, on_progress=on_progress
                )
        except OSError as error:
            raise StackError(f"{file} cannot be written: {error.strerror}.") from error
        standing.sentence = f"The export was interrupted when {file} was whole."
    show_manifest(console, manifest)


@journal.command(name="import")
def import_record(file: File) -> None:
    """Read a file into a ledger in which nothing has happened yet, and rebuild its balances. Scrip must be stopped."""
    console = Console()
    with interruptible(console, IMPORT_CUT_OFF) as standing, stack_with("postgres") as stack:
        try:
            keys = read_public_keys(stack.layout.ledger_public_keys_file)
        except InvalidSigningKey as error:
            raise StackError(f"Nothing was imported: {error}.") from error
        stack.migrate()

        def tell(done: int, total: int) -> None:
            on_progress(done, total)
            if done == total:
                standing.sentence = IMPORT_ENDING_CUT_OFF

        try:
            with _progress(console, "importing") as on_progress:
                manifest = import_journal(stack.database_url(OWNER), file, on_progress=tell)
        except OSError as error:
            raise StackError(f"{file} cannot be read: {error.strerror}.") from error
        except BadFile as error:
            raise StackError(f"{file} is refused, and nothing was imported: {error}.") from error
        except (NotEmpty, InUse) as error:
            raise StackError(f"Nothing was imported: {error}.") from error
        standing.sentence = IMPORT_NOT_REPLAYED
        show_manifest(console, manifest)
        _replay(stack, console, verify=False, swap=True)
        result = _replay(stack, console, verify=False, swap=False)
        strangers = unknown_signers(stack.database_url(READER), keys)
    show_replayed(console, result)
    _show_unknown_signers(console, stack.layout, strangers)
    raise typer.Exit(0 if result.is_equal else 1)


def note_audited(path: Path, evidence: Evidence) -> None:
    """Keep where a clean audit got. StackError if that cannot be written: what was audited is as clean."""
    try:
        write_evidence(path, evidence)
    except OSError as error:
        raise StackError(f"Where the audit got was not noted: {path} cannot be written: {error.strerror}.") from error


def show_replayed(console: Console, result: Replayed) -> None:
    """Print what a replay found."""
    table = Table("projection", "live rows", "replayed rows", "result")
    for each in result.tables:
        said = "equal" if not each.different else f"{each.different} rows different"
        if each.different and result.swapped:
            said += ", replaced"
        table.add_row(each.table, str(each.live), str(each.replayed), said)
    console.print(table)
    for each in result.tables:
        _show_lines(console, [f"{each.table}: {line}" for line in each.first_differences])
    _show_lines(console, result.heads_astray)
    console.print(f"{result.entries} entries replayed, {result.entries_per_second:.0f}/s", highlight=False)


def show_audited(console: Console, found: Audited, checked: Sequence[Checked], forged: Sequence[str]) -> None:
    """Print what an audit found."""
    table = Table("audited", "count")
    for name, count in (
        ("partitions", len(found.reached)),
        ("entries", found.entries),
        ("charge lines", found.lines),
        ("signatures", found.signatures),
    ):
        table.add_row(name, str(count))
    console.print(table)
    if checked:
        laws = Table("law, in plain SQL", "result")
        for check in checked:
            laws.add_row(check.law, "kept" if not check.breaches else f"broken {check.breaches} times")
        console.print(laws)
    for check in checked:
        _show_lines(console, [f"{check.law}: {line}" for line in check.first])
    _show_lines(console, forged)
    _show_lines(console, [str(finding) for finding in found.findings])
    if found.found > len(found.findings):
        _show_lines(console, [f"and {found.found - len(found.findings)} more"])
    wrong = found.found + len(forged) + sum(check.breaches for check in checked)
    said = f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong" if wrong else "nothing is wrong"
    console.print(f"{found.entries} entries audited, {found.entries_per_second:.0f}/s: {said}", highlight=False)


def show_manifest(console: Console, manifest: Manifest) -> None:
    """Print what a file holds."""
    table = Table("table", "rows")
    for name, count in manifest.rows.items():
        table.add_row(name, str(count))
    console.print(table)
    console.print(f"{len(manifest.heads)} partition{'' if len(manifest.heads) == 1 else 's'}", highlight=False)


def _show_unknown_signers(console: Console, layout: Layout, keys: Sequence[str]) -> None:
    for key in keys:
        said = f"It is signed by the key {key}, which is not in {layout.ledger_public_keys_file}: an audit needs it."
        console.print(f"{said} The ledger that it comes from has it in its own.", highlight=False, soft_wrap=True)


async def _published(
    stack: Stack, evidence: Evidence, keys: Mapping[str, Ed25519PublicKey]
) -> tuple[Evidence, tuple[str, ...]]:
    try:
        async with operator(stack.nats_url, stack.credentials.nats[OPERATOR]) as jetstream:
            return await read_published(jetstream, evidence, keys=keys)
    except (nats.errors.Error, JetStreamError, TimeoutError) as error:
        raise StackError(f"What was published as signed could not be read: {error!r}.") from error


def _replay(
    stack: Stack, console: Console, *, verify: bool, swap: bool, on_rebuilt: Callable[[], None] = lambda: None
) -> Replayed:
    """`on_rebuilt`: from here on it replaces what differs."""

    def tell(done: int, total: int) -> None:
        on_progress(done, total)
        if done == total:
            on_rebuilt()

    try:
        with _progress(console, "replaying") as on_progress:
            return replay_journal(stack.database_url(OWNER), on_progress=tell, by_evolve=verify, swap=swap)
    except ShadowMissing as error:
        raise StackError(f"The replay has nowhere to go: {error}. Run `scrip migrate` once.") from error
    except ShadowInUse as error:
        raise StackError(f"Nothing was replayed: {error}. Wait for its end.") from error


class _Rate(ProgressColumn):
    """How many a second, over all of it."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text(f"{task.completed / seconds:,.0f}/s" if seconds else "")


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _show_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
