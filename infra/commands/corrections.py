"""`scrip corrections`: correct what was charged, see what it would come to first, and undo it."""

import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from infra.commands.usage import restore_months
from infra.errors import BadInput
from infra.listing import Row, show_rows
from infra.service_api import Archived, Json, ServiceApi, in_path
from services.kit.ids import new_uuid7

PATH: Final = "/api/v1/corrections"
POLL_SECONDS: Final = 0.3
# Of a request; its body may have 4 MiB.
STAGED_MAX: Final = 50
UNDER_WAY: Final = ("running", "undoing")

corrections = typer.Typer(
    name="corrections",
    help="Correct what was charged: void, amend, rerate, backfill, discard, undo; list, show.",
    no_args_is_help=True,
)

Reason = Annotated[str, typer.Option(help="Why. It is kept, and stands on receipts.")]
Id = Annotated[
    str | None, typer.Option("--id", help="Under one id one thing is done, once. Default: a new one, which is printed.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what it would come to.")]
Account = Annotated[str | None, typer.Option(help="Whose events these are, if several have that source and id.")]
Since = Annotated[str, typer.Option("--from", help="2026-11-01 or 2026-11-01T00:00:00Z.")]
Until = Annotated[str, typer.Option("--to", help="Not included.")]
Tree = Annotated[bool, typer.Option("--tree", help="Also of all accounts below.")]
Correction = Annotated[str, typer.Argument(help="The correction's id.")]
Archive = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where old use was archived to: what this is about and was dropped, is restored from there first.",
        file_okay=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(corrections)


@corrections.command("void")
def void_events(
    events: Annotated[list[str], typer.Argument(help="Events, as SOURCE/ID; at most 1,000.")],
    *,
    reason: Reason,
    account: Account = None,
    id: Id = None,
    archive: Archive = None,
    dry_run: DryRun = False,
) -> None:
    """Have events count for nothing, and give back what they cost."""
    asked = {"kind": "void", "events": [_named(each, account) for each in events]}
    _correct(asked, reason, id, archive=archive, dry_run=dry_run)


@corrections.command("amend")
def amend_event(
    event: Annotated[str, typer.Argument(help="The event, as SOURCE/ID.")],
    *,
    data: Annotated[str, typer.Option(help="All of the data that it is to have, as JSON; @FILE reads it from a file.")],
    reason: Reason,
    account: Account = None,
    id: Id = None,
    archive: Archive = None,
    dry_run: DryRun = False,
) -> None:
    """Give an event other data, and charge or give back the difference."""
    amended = _named(event, account) | {"data": _data(data)}
    _correct({"kind": "amend", "events": [amended]}, reason, id, archive=archive, dry_run=dry_run)


@corrections.command("rerate")
def rerate(
    account: Annotated[str, typer.Argument(help="Whose use; * is everybody's.")],
    *,
    since: Since,
    until: Until,
    reason: Reason,
    price_version: Annotated[
        str | None, typer.Option(help="The version to price it under; default: that of each use's own time.")
    ] = None,
    tree: Tree = False,
    provider: Annotated[str | None, typer.Option(help="Only calls of its models.")] = None,
    model: Annotated[str | None, typer.Option(help="Only calls of it.")] = None,
    type: Annotated[str | None, typer.Option(help="Only events of this type.")] = None,
    include_pinned: Annotated[
        bool, typer.Option("--include-pinned", help="Also what is pinned to the version it was quoted with.")
    ] = False,
    id: Id = None,
    archive: Archive = None,
    dry_run: DryRun = False,
) -> None:
    """Price the use of a period anew, and charge or give back the differences. What has no price stays as it is."""
    asked = {
        "kind": "rerate",
        "account": account,
        "tree": tree,
        "from": _time(since),
        "to": _time(until),
        "price_version": price_version,
        "provider": provider,
        "model": model,
        "type": type,
        "include_pinned": include_pinned,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    _correct(given, reason, id, archive=archive, dry_run=dry_run)


@corrections.command("backfill")
def backfill(
    account: Annotated[str, typer.Argument(help="Whose use.")],
    events: Annotated[
        Path, typer.Argument(help="CloudEvents, one per line (JSON Lines).", exists=True, dir_okay=False)
    ],
    *,
    since: Since,
    until: Until,
    reason: Reason,
    tree: Tree = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="What the period holds and is not in the file becomes void.")
    ] = False,
    id: Id = None,
    archive: Archive = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stage, and say what applying would come to.")] = False,
) -> None:
    """Log and charge events of the past, however old. Again with the same id it goes on where it was cut off."""
    metering = _metering()
    name = f"cli-{new_uuid7()}" if id is None else id
    asked: Json = {
        "kind": "backfill",
        "account": account,
        "tree": tree,
        "from": _time(since),
        "to": _time(until),
        "replace": replace,
        "reason": reason,
        "id": name,
    }
    if _answered(lambda: metering.post(PATH, asked), archive)["state"] == "staging":
        _stage(metering, _path(name), events)
    found = metering.post(f"{_path(name)}/apply", query={"dry_run": dry_run})
    _show(_finished(metering, found))
    if found["state"] == "dry_run":
        _print(Console(), f"It is staged as {name}: apply it with the same command and --id, without --dry-run.")


@corrections.command("undo")
def undo(id: Correction, *, reason: Reason, archive: Archive = None, dry_run: DryRun = False) -> None:
    """Have every event be what it was before a correction. What was corrected since is left as it is."""
    metering = _metering()
    found = _answered(
        lambda: metering.post(f"{_path(id)}/undo", {"reason": reason}, query={"dry_run": dry_run}), archive
    )
    _show(_finished(metering, found))


@corrections.command("discard")
def discard(id: Correction) -> None:
    """Forget what is staged for a backfill that was not applied. Its record stays."""
    _show(_metering().remove(_path(id)))


@corrections.command("list")
def list_corrections(
    *, limit: Annotated[int, typer.Option(min=1, max=500, help="How many, the latest first.")] = 50
) -> None:
    """Show corrections, the latest first."""
    rows = [
        (
            each["id"],
            each["kind"],
            each["state"],
            each["recorded_at"],
            each["actor"],
            str(each["counts"].get("corrected", 0)),
            _amounts(each["difference"]),
            each["reason"],
        )
        for each in _metering().get(PATH, {"limit": limit})["corrections"]
    ]
    names = ("correction", "kind", "state", "asked for", "by", "events", "difference", "reason")
    show_rows(Console(), names, rows, prose=("reason",), numbers=("events",), otherwise="Nothing was corrected.")


@corrections.command("show")
def show_correction(
    id: Correction,
    *,
    events: Annotated[bool, typer.Option("--events", help="Also what it did to each event.")] = False,
) -> None:
    """Show what a correction was asked to do, how far it is, and what it came to."""
    metering = _metering()
    found = _finished(metering, metering.get(_path(id)))
    after: dict[str, str | int] = {}
    found["events"] = []
    while events:
        page = metering.get(f"{_path(id)}/events", {"limit": 500, **after})
        found["events"] += page["events"]
        if page["next_after"] is None:
            break
        after = {"after": page["next_after"]}
    _show(found)


def _correct(body: Json, reason: str, id: str | None, *, archive: Path | None, dry_run: bool) -> None:
    metering = _metering()
    asked = {**body, "reason": reason}
    if id is not None or not dry_run:
        asked["id"] = f"cli-{new_uuid7()}" if id is None else id
    found = _answered(lambda: metering.post(PATH, asked, query={"dry_run": dry_run}), archive)
    _show(_finished(metering, found))


def _answered(ask: Callable[[], Json], archive: Path | None) -> Json:
    """What is answered; where that needs months that are archived, and it is known where, once they are restored."""
    try:
        return ask()
    except Archived as error:
        if archive is None:
            raise Archived(f"{error}. With --archive DIR this command restores it first.", error.months) from error
        months = error.months
    console = Console()
    restore_months(console, archive, months)
    _print(
        console,
        f"{', '.join(months)} is in the log again. Once all is corrected, `scrip usage archive --to {archive} --drop`"
        " writes what changed, and drops it.",
    )
    return ask()


def _stage(metering: ServiceApi, path: str, events: Path) -> None:
    """Send the lines of a file, as they are written, in parts that are taken at once."""
    lines = [line for line in events.read_bytes().splitlines() if line.strip()]
    columns = (TextColumn("staging"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task("staging", total=len(lines))
        for start in range(0, len(lines), STAGED_MAX):
            part = lines[start : start + STAGED_MAX]
            metering.send(f"{path}/events", b"[" + b",".join(part) + b"]", after=start)
            progress.advance(task, len(part))


def _finished(metering: ServiceApi, found: Json) -> Json:
    """A correction once it is not under way any more, with a bar until then."""
    if found["state"] not in UNDER_WAY:
        return found
    shown = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console()
    )
    with shown as progress:
        task = progress.add_task(found["state"], total=found["of"])
        total = 1
        while found["state"] in UNDER_WAY:
            total = found["of"] or total
            progress.update(task, description=found["state"], completed=found["done"] or 0, total=total)
            time.sleep(POLL_SECONDS)
            found = metering.get(_path(found["id"]))
        progress.update(task, description=found["state"], completed=total, total=total)
    return found


def _show(found: Json) -> None:
    console = Console()
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found["counts"].items() if count)
    said = "would come to" if found["state"] == "dry_run" else "came to"
    _print(console, f"{found['kind']} {found['id'] or '(dry run)'} is {found['state']}: {counts or 'nothing'}")
    _print(console, f"It {said} {_amounts(found['difference']) or 'no difference'}.")
    if not found["complete"]:
        _print(console, "There is more than a dry run looks at: the rest is not in this.")
    if accounts := found.get("accounts"):
        rows = [(each["account"] or "", _amounts(each["difference"])) for each in accounts]
        show_rows(console, ("account", "difference"), rows)
    if events := found.get("events"):
        show_rows(console, ("event", "account", "version", "difference", ""), [*map(_event_row, events)])


def _event_row(each: Json) -> Row:
    became = "void" if each["to_revision"] is None else str(each["to_revision"])
    was = "–" if each["from_revision"] is None else str(each["from_revision"])
    undone = "undone" if each["undone"] else ""
    name = f"{each['source']}/{each['id']}"
    return name, each["account"] or "", f"{was} → {became}", _amounts(each["difference"]), undone


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _amounts(difference: Mapping[str, str]) -> str:
    return ", ".join(
        f"{amount if amount.startswith('-') else f'+{amount}'} {unit}" for unit, amount in difference.items()
    )


def _named(event: str, account: str | None) -> Json:
    source, slash, id = event.partition("/")
    if not (source and slash and id):
        raise BadInput(f"{event!r} names no event: it must look like demo/call-1.")
    return {"source": source, "id": id} | ({} if account is None else {"account": account})


def _data(text: str) -> Any:
    try:
        written = Path(text.removeprefix("@")).read_text(encoding="utf-8") if text.startswith("@") else text
        return json.loads(written, parse_float=_number, parse_constant=_no_number)
    except OSError as error:
        raise BadInput(f"{error.filename} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise BadInput(f"The data is not JSON: {error}.") from error


def _number(text: str) -> float:
    """A number, if sending it loses none of its digits."""
    if Decimal(repr(float(text))) != Decimal(text):
        raise BadInput(f"{text} has more digits than can be sent from here: write it as text, in quotes.")
    return float(text)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _path(id: str) -> str:
    return f"{PATH}/{in_path(id)}"


def _time(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError as error:
        raise BadInput(f"{text!r} is no time: it must look like 2026-11-01 or 2026-11-01T00:00:00Z.") from error
    return f"{text}T00:00:00Z" if "T" not in text else text


def _metering() -> ServiceApi:
    return ServiceApi.running("metering")
