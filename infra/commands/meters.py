"""`scrip meters`: which meters there are, and what they answer, digit by digit."""

import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Final

import typer
from rich.console import Console

from infra.errors import BadInput
from infra.listing import show_rows
from infra.service_api import Json, Query, ServiceApi, in_path

_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

meters = typer.Typer(name="meters", help="Meters: list, show, query.", no_args_is_help=True)


class Window(StrEnum):
    """How large the windows of an answer are."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


Slug = Annotated[str, typer.Argument(help="The meter's slug or id.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(meters)


@meters.command("list")
def list_meters(
    *, deleted: Annotated[bool, typer.Option("--deleted", help="Also those that were deleted.")] = False
) -> None:
    """Show the meters, each as its newest version has it."""
    rows = [
        (
            each["slug"] + (" (deleted)" if "deletedAt" in each else ""),
            str(each["version"]),
            f"{each['aggregation']} {each.get('valueProperty', '')}",
            each["eventType"],
            ", ".join(each.get("groupBy", {})),
            each["source"],
        )
        for each in json.loads(_read("/api/v1/meters", {"pageSize": 1000, "includeDeleted": deleted}))
    ]
    names = ("meter", "version", "what", "event type", "groups", "said by")
    show_rows(Console(), names, rows, prose=("groups",), otherwise="There are no meters.")


@meters.command("show")
def show_meter(slug: Slug) -> None:
    """Show all that a meter was and is, the newest version first, as JSON."""
    for version in json.loads(_read(f"/api/v1/meters/{in_path(slug)}/versions", {})):
        Console().print_json(json.dumps(version))


@meters.command("query")
def query_meter(
    slug: Slug,
    *,
    since: Annotated[
        str | None, typer.Option("--from", help="2026-11-01 or 2026-11-01T00:00:00Z; default: the first event.")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", help="Not included; default: to the last event.")] = None,
    window: Annotated[Window | None, typer.Option(help="A row for each; default: one for all of the time.")] = None,
    zone: Annotated[str, typer.Option(help="The zone whose days and months they are, like Europe/Berlin.")] = "UTC",
    group_by: Annotated[
        list[str] | None, typer.Option(help="A group of the meter, subject, or customer_id; may be repeated.")
    ] = None,
    subject: Annotated[list[str] | None, typer.Option(help="Only what was reported of it; may be repeated.")] = None,
    account: Annotated[list[str] | None, typer.Option(help="Only the use of it; may be repeated.")] = None,
    where: Annotated[
        list[str] | None, typer.Option("--filter", help="A group and its value, model=gpt-4o; may be repeated.")
    ] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Answer as this version of the meter does.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Ask a meter. Exact at the moment of asking, straight from the log."""
    filters: dict[str, list[str]] = {}
    for each in where or ():
        name, equals, value = each.partition("=")
        if not (name and equals):
            raise BadInput(f"{each!r} is no filter: it must look like model=gpt-4o.")
        filters.setdefault(name, []).append(value)
    asked: dict[str, str | int | Sequence[str] | None] = {
        "from": _time(since),
        "to": _time(until),
        "windowSize": None if window is None else window.upper(),
        "windowTimeZone": zone,
        "groupBy": group_by,
        "subject": subject,
        "filterCustomerId": account,
        "filterGroupBy": json.dumps(filters) if filters else None,
        "version": version,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    answer = _read(f"/api/v1/meters/{in_path(slug)}/query", given)
    _show(json.loads(answer, parse_float=Decimal, parse_int=Decimal)["data"], as_csv=as_csv)


def _show(rows: Sequence[Json], *, as_csv: bool) -> None:
    """Print an answer. The groups are those of its rows, which all have the same."""
    groups = [name for name in ("subject", "customerId") if rows and rows[0].get(name) is not None]
    names = [*groups, *(rows[0]["groupBy"] if rows else ())]
    cells = [
        [
            row["windowStart"],
            row["windowEnd"],
            *(row[name] for name in groups),
            *row["groupBy"].values(),
            f"{row['value']:f}",
        ]
        for row in rows
    ]
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([["from", "to", *names, "value"], *cells])
        return
    show_rows(Console(), ("from", "to", *names, "value"), cells, numbers=("value",), otherwise="Nothing was used.")


def _time(text: str | None) -> str | None:
    return f"{text}T00:00:00Z" if text is not None and _DATE.fullmatch(text) else text


def _read(path: str, asked: Query) -> str:
    """An answer as it was written: a parser of its own would round its numbers."""
    written = io.BytesIO()
    _metering().stream(path, asked, written)
    return written.getvalue().decode()


def _metering() -> ServiceApi:
    return ServiceApi.running("metering")
