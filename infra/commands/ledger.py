"""The commands about the ledger: account, grant, and all that is read, over its HTTP API."""

import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from infra import state
from infra.errors import BadInput, StackError
from infra.listing import Row, show_rows
from infra.service_api import Json, ServiceApi, in_path
from infra.supervisor import Stack

NO_WALLETS: Final = "It has no wallets."

Key = Annotated[
    str | None,
    typer.Option(help="Idempotency key: the same command under the same key is carried out once. Default: a new one."),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    reading = (balance, statement, transaction, charge, holds, totals, tree, limits, export)
    for command in (account, grant, *reading):
        app.command()(command)


def account(
    path: Annotated[str, typer.Argument(help="The account's id: 1 to 4 segments, acme/ml/ana.")],
    *,
    wallet: Annotated[
        list[str] | None,
        typer.Option(help="A unit to open a wallet of; may be repeated. Without one, wallets above it pay."),
    ] = None,
    key: Key = None,
) -> None:
    """Open an account, those above it, and wallets. What is open already stays as it is."""
    body = {"account": path, "wallets": [{"unit": unit} for unit in wallet or ()]}
    reply = _command("/v1/accounts", body, key=key)
    wallets = f" with a wallet of {', '.join(wallet)}" if wallet else ""
    Console().print(f"{path} is open{wallets} ({reply['transaction']})", markup=False, highlight=False, soft_wrap=True)


def grant(
    path: Annotated[str, typer.Argument(help="The account whose wallet it goes to.")],
    amount: Annotated[str, typer.Argument(help="A decimal number: 25 or 0.50.")],
    *,
    unit: Annotated[str, typer.Option(help="The unit.")] = "usd",
    kind: Annotated[str, typer.Option(help="plan, promo, bonus, purchase or adjustment.")] = "adjustment",
    reference: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    key: Key = None,
) -> None:
    """Add a lot to a wallet; its debt is repaid first."""
    body = {"account": path, "amount": amount, "unit": unit, "kind": kind, "reference": reference}
    reply = _command("/v1/grants", body, key=key)
    said = "had been granted" if reply["replayed"] else "granted"
    Console().print(
        f"{amount} {unit} {said} to {path} ({reply['transaction']})", markup=False, highlight=False, soft_wrap=True
    )


def balance(
    path: Annotated[str, typer.Argument(help="The account.")],
    *,
    as_of: Annotated[str | None, typer.Option(help="As it was recorded at a time: 2026-07-01T12:00:00Z.")] = None,
    world_at: Annotated[str | None, typer.Option(help="What was posted by what had occurred at a time.")] = None,
) -> None:
    """Show what an account's wallets hold, lot by lot, now or in the past."""
    query = _given(as_of=as_of, world_at=world_at)
    found = ServiceApi.running("ledger").get(f"/v1/balances/{in_path(path)}", query)
    console = Console()
    if world_at:
        title = f"{found['account']} by what had occurred at {found['world_at']}"
        posted = [(wallet["unit"], wallet["posted"]) for wallet in found["wallets"]]
        show_rows(console, ("unit", "posted"), posted, title=title, otherwise=NO_WALLETS)
        return
    names = ("unit", "policy", "posted", "held", "frozen", "available", "debt", "overage", "uncapped")
    wallets = [[wallet[name] or "" for name in names] for wallet in found["wallets"]]
    show_rows(console, names, wallets, title=f"{found['account']} at {found['as_of']}", otherwise=NO_WALLETS)
    lots, coming = [], []
    of_lot = ("kind", "granted", "posted", "held", "expires_at", "reference")
    for wallet in found["wallets"]:
        lots += [[lot["lot"], wallet["unit"], *(lot[name] or "" for name in of_lot)] for lot in wallet["lots"]]
        coming += [(end["at"], wallet["unit"], f"{end['amount']} of {end['lot']} expire") for end in wallet["expiries"]]
        coming += [
            (each["at"], wallet["unit"], f"{each['amount']} are granted by {each['rule']}")
            for each in wallet["renewals"]
        ]
    if lots:
        show_rows(console, ("lot", "unit", "kind", "granted", "left", "held", "expires", "reference"), lots)
    if coming:
        show_rows(console, ("when", "unit", "what"), coming)


def statement(
    path: Annotated[str, typer.Argument(help="The account.")],
    *,
    unit: Annotated[str | None, typer.Option(help="Only this unit.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only entries of this kind: charged, lot_granted, …")] = None,
    since: Annotated[str | None, typer.Option(help="Recorded at or after: 2026-07-01T12:00:00Z.")] = None,
    until: Annotated[str | None, typer.Option(help="Recorded before.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Of a lot, a hold, a transaction, a charged event, or a lot's reference.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many entries.")] = 20,
    before: Annotated[str | None, typer.Option(help="The cursor that the page before named.")] = None,
) -> None:
    """Show the entries of an account's wallets, newest first, with the balance after each."""
    query = _given(unit=unit, kind=kind, since=since, until=until, reference=reference, before=before)
    page = ServiceApi.running("ledger").get(f"/v1/statements/{in_path(path)}", {"limit": str(limit), **query})
    of_entry = ("occurred_at", "kind", "unit", "posted", "held", "balance", "lot_kind")
    rows = [[entry[name] or "" for name in of_entry] for entry in page["entries"]]
    console = Console()
    names = ("occurred", "what", "unit", "posted", "held", "balance", "lot")
    show_rows(console, names, rows, otherwise="There are no entries.")
    if page["next_before"]:
        console.print(f"more: --before {page['next_before']}", markup=False, highlight=False, soft_wrap=True)


def transaction(transaction_id: Annotated[str, typer.Argument(help="Its id: txn_…")]) -> None:
    """Show a transaction: who or what caused it, and all its entries, both sides."""
    found = ServiceApi.running("ledger").get(f"/v1/transactions/{in_path(transaction_id)}")
    console = Console()
    for command in found["commands"]:
        said = f"asked by {command['principal']} under {command['idempotency_key']}"
        console.print(said, markup=False, highlight=False)
    if found["bundle"] is not None:
        console.print(f"bundle {found['bundle']} of charges", highlight=False)
    _show_lines(console, found["lines"], found["reversals"])
    of_entry = ("kind", "account", "unit", "posted", "held", "lot_kind")
    rows = [
        [f"{entry['batch']}/{entry['position']}", *(entry[name] or "" for name in of_entry)]
        for entry in found["entries"]
    ]
    show_rows(console, ("entry", "what", "account", "unit", "posted", "held", "lot"), rows)


def charge(
    source: Annotated[str, typer.Argument(help="Who reported the use.")],
    event: Annotated[str, typer.Argument(help="The use's event id.")],
) -> None:
    """Show what a use was charged, from which lots, and what of that was given back."""
    found = ServiceApi.running("ledger").get(f"/v1/charges/{in_path(source)}/{in_path(event)}")
    _show_lines(Console(), found["lines"], [])


def _show_lines(console: Console, lines: list[dict[str, Any]], reversals: list[dict[str, Any]]) -> None:
    """Charge lines with what was given back of them; and what was given back of others."""
    if lines:
        names = ("event", "account", "occurred", "charged", "paid by", "given back")
        show_rows(console, names, [*map(_line, lines)])
    given_back = [*reversals, *(reversal for line in lines for reversal in line["reversals"])]
    if given_back:
        names = ("given back of", "when", "amount", "to", "reason", "correction")
        show_rows(console, names, [*map(_reversal, given_back)], prose=("reason",))


def _reversal(reversal: dict[str, Any]) -> Row:
    return (
        f"{reversal['event_id']} {reversal['revision'] or ''}".rstrip(),
        reversal["recorded_at"],
        "\n".join(f"{each['amount']} {each['unit']}" for each in reversal["split"]),
        "\n".join(each["account"] for each in reversal["split"]),
        reversal["reason"] or "",
        reversal["correction"] or "",
    )


def _line(line: dict[str, Any]) -> Row:
    back = [part for reversal in line["reversals"] for part in reversal["split"]]
    return (
        f"{line['event_id']} {line['revision'] or ''}".rstrip(),
        line["account"],
        line["occurred_at"],
        "\n".join(f"{each['amount']} {each['unit']}" for each in line["amounts"]),
        "\n".join(f"{each['amount']} {each['unit']} {each['account']} {each['lot']}" for each in line["split"]),
        "\n".join(f"{each['amount']} {each['unit']} {each['lot']}" for each in back),
    )


def holds(
    path: Annotated[str, typer.Argument(help="The account; holds of those below it are listed, too.")],
    *,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many.")] = 100,
    after: Annotated[str | None, typer.Option(help="The cursor that the page before named.")] = None,
) -> None:
    """Show open holds, oldest first."""
    page = ServiceApi.running("ledger").get("/v1/holds", {"account": path, "limit": str(limit), **_given(after=after)})
    rows = [
        (
            hold["hold"],
            hold["account"],
            hold["expires_at"] or "",
            "\n".join(f"{each['held']} {each['unit']} {each['account']}" for each in hold["wallets"]),
        )
        for hold in page["holds"]
    ]
    console = Console()
    show_rows(console, ("hold", "account", "until", "held"), rows, otherwise="There are no open holds.")
    if page["next_after"]:
        console.print(f"more: --after {page['next_after']}", markup=False, highlight=False, soft_wrap=True)


def totals(path: Annotated[str, typer.Argument(help="The account.")]) -> None:
    """Show what was ever granted, charged, given back, expired and clawed back on an account's wallets."""
    found = ServiceApi.running("ledger").get(f"/v1/totals/{in_path(path)}")
    names = ("granted", "charged", "reversed", "expired", "voided", "clawed_back", "adjusted", "transferred", "posted")
    rows = [[each["unit"], *(each[name] for name in names)] for each in found["units"]]
    show_rows(Console(), ("unit", *names), rows, otherwise=NO_WALLETS)


def tree(
    root: Annotated[str, typer.Argument(help="The account at the top.")],
    *,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many accounts.")] = 100,
    after: Annotated[str | None, typer.Option(help="The account that the page before ended with.")] = None,
) -> None:
    """Show the accounts of a tree with their wallets."""
    page = ServiceApi.running("ledger").get(f"/v1/trees/{in_path(root)}", {"limit": str(limit), **_given(after=after)})
    names = ("unit", "policy", "posted", "held", "available", "debt", "overage")
    rows = [
        [account["account"], *(wallet[name] for name in names)]
        for account in page["accounts"]
        for wallet in account["wallets"] or [dict.fromkeys(names, "")]
    ]
    console = Console()
    show_rows(console, ("account", *names), rows)
    if page["next_after"]:
        console.print(f"more: --after {page['next_after']}", markup=False, highlight=False, soft_wrap=True)


def limits(
    root: Annotated[str | None, typer.Argument(help="The account at the top; without one, all.")] = None,
    *,
    share: Annotated[str, typer.Option(help="At least this share is used: 0.8 is four fifths.")] = "0.8",
    unit: Annotated[str | None, typer.Option(help="Only caps of this unit.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many accounts.")] = 100,
    after: Annotated[str | None, typer.Option(help="The account that the page before ended with.")] = None,
) -> None:
    """Show caps of which at least a share is used in the period that is running."""
    query = {"share": share, "limit": str(limit), **_given(root=root, unit=unit, after=after)}
    page = ServiceApi.running("ledger").get("/v1/limits", query)
    names = ("account", "unit", "policy", "limit", "used", "share", "held", "available", "overage", "renews_at")
    rows = [[each[name] or "" for name in names] for each in page["limits"]]
    console = Console()
    show_rows(console, names, rows)
    if page["next_after"]:
        console.print(f"more: --after {page['next_after']}", markup=False, highlight=False, soft_wrap=True)


def export(
    path: Annotated[str, typer.Argument(help="The account.")],
    *,
    below: Annotated[bool, typer.Option(help="With all accounts below it.")] = False,
    written_as: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
    to: Annotated[Path | None, typer.Option(help="A file that is not there yet. Default: standard output.")] = None,
) -> None:
    """Write the entries of an account's wallets as CSV or Parquet."""
    query = {"account": path, "below": str(below).lower(), "format": written_as}
    if to is None:
        if written_as != "csv" and sys.stdout.isatty():
            raise BadInput(f"What is written as {written_as} is no text: name a file, with --to.")
        ServiceApi.running("ledger").stream("/v1/exports/journal", query, sys.stdout.buffer)
        return
    try:
        with to.open("xb") as file, _whole(to):
            ServiceApi.running("ledger").stream("/v1/exports/journal", query, file)
    except OSError as error:
        raise StackError(f"{to} cannot be written: {error.strerror}.") from error


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Remove the file if it did not become whole: a part of an export looks like all of one."""
    try:
        yield
    except BaseException:
        file.unlink()
        raise


def _command(path: str, body: Json, *, key: str | None) -> Json:
    said = {name: value for name, value in body.items() if value is not None}
    return ServiceApi.running("ledger").post(
        path, said, headers={"Idempotency-Key": f"cli-{uuid.uuid4()}" if key is None else key}
    )


def _running_stack() -> Stack:
    layout = state.locate()
    run = state.needed_run(layout)
    return Stack(layout=layout, ports=run.ports, credentials=state.load_credentials(layout))


def _given(**options: str | None) -> dict[str, str]:
    return {name: value for name, value in options.items() if value is not None}
