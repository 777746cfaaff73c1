"""The commands about the ledger: account, grant, balance, statement over its HTTP API; replay on its database."""

import uuid
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from infra import state
from infra.errors import StackError
from infra.service_api import Json, ServiceApi
from infra.supervisor import Stack
from services.ledger.audit_sql import Checked, audit
from services.ledger.replay import Replayed, ShadowMissing
from services.ledger.replay import replay as replay_journal

Key = Annotated[
    str | None,
    typer.Option(help="Idempotency key: the same command under the same key is carried out once. Default: a new one."),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (account, grant, balance, statement, replay):
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
    Console().print(f"{path} is open{wallets} ({reply['transaction']})", markup=False, highlight=False)


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
    Console().print(f"{amount} {unit} {said} to {path} ({reply['transaction']})", markup=False, highlight=False)


def balance(path: Annotated[str, typer.Argument(help="The account.")]) -> None:
    """Show what an account's wallets hold, lot by lot."""
    found = _read(f"/v1/balances/{_quoted(path)}")
    table = Table("unit", "posted", "held", "available", "debt", "overage", title=found["account"])
    lots = Table("lot", "unit", "kind", "granted", "left", "held", "reference")
    for wallet in found["wallets"]:
        table.add_row(*(wallet[name] for name in ("unit", "posted", "held", "available", "debt", "overage")))
        for lot in wallet["lots"]:
            lots.add_row(
                lot["lot"],
                wallet["unit"],
                lot["kind"],
                lot["granted"],
                lot["posted"],
                lot["held"],
                lot["reference"] or "",
            )
    console = Console()
    console.print(table)
    if lots.row_count:
        console.print(lots)


def statement(
    path: Annotated[str, typer.Argument(help="The account.")],
    *,
    unit: Annotated[str | None, typer.Option(help="Only this unit.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many entries.")] = 20,
    before: Annotated[str | None, typer.Option(help="The cursor that the page before named.")] = None,
) -> None:
    """Show the entries of an account's wallets, newest first, with the balance after each."""
    query = {"limit": str(limit), **({"unit": unit} if unit else {}), **({"before": before} if before else {})}
    page = _read(f"/v1/statements/{_quoted(path)}", query)
    table = Table("occurred", "what", "unit", "posted", "held", "balance", "lot")
    for entry in page["entries"]:
        table.add_row(
            entry["occurred_at"],
            entry["kind"],
            entry["unit"],
            entry["posted"],
            entry["held"],
            entry["balance"],
            entry["lot_kind"] or "",
        )
    console = Console()
    console.print(table)
    if page["next_before"]:
        console.print(f"more: --before {page['next_before']}", markup=False, highlight=False, soft_wrap=True)


def replay() -> None:
    """Rebuild every projection from the journal and compare, then sums in plain SQL. Exit code 1 if they differ."""
    stack = _running_stack()
    owner = stack.database_url("ledger_owner")
    console = Console()
    with Progress(
        TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("replaying", total=None)
        try:
            result = replay_journal(
                owner, on_progress=lambda done, total: progress.update(task, completed=done, total=total)
            )
        except ShadowMissing as error:
            raise StackError(f"The replay has nowhere to go: {error}. Run `scrip migrate` once.") from error
        progress.update(task, completed=result.entries, total=result.entries)
    checked = audit(owner)
    show_replayed(console, result, checked)
    raise typer.Exit(0 if result.is_equal and not any(check.breaches for check in checked) else 1)


def show_replayed(console: Console, result: Replayed, checked: tuple[Checked, ...]) -> None:
    """Print what a replay and the audit found."""
    table = Table("projection", "live rows", "replayed rows", "result")
    for each in result.tables:
        said = "equal" if not each.different else f"{each.different} rows different"
        table.add_row(each.table, str(each.live), str(each.replayed), said)
    console.print(table)
    for each in result.tables:
        for line in each.first_differences:
            console.print(f"  {each.table}: {line}", markup=False, highlight=False, soft_wrap=True)
    for line in result.heads_astray:
        console.print(f"  {line}", markup=False, highlight=False)
    console.print(f"{result.entries} entries replayed, {result.entries_per_second:.0f}/s", highlight=False)
    laws = Table("law, in plain SQL", "result")
    for check in checked:
        laws.add_row(check.law, "kept" if not check.breaches else f"broken {check.breaches} times")
    console.print(laws)
    for check in checked:
        for line in check.first:
            console.print(f"  {check.law}: {line}", markup=False, highlight=False, soft_wrap=True)


def _command(path: str, body: Json, *, key: str | None) -> Json:
    said = {name: value for name, value in body.items() if value is not None}
    return ServiceApi.running("ledger").post(path, said, headers={"Idempotency-Key": key or f"cli-{uuid.uuid4()}"})


def _read(path: str, query: dict[str, str] | None = None) -> Json:
    return ServiceApi.running("ledger").get(path, query)


def _running_stack() -> Stack:
    layout = state.locate()
    run = state.needed_run(layout)
    return Stack(layout=layout, ports=run.ports, credentials=state.load_credentials(layout))


def _quoted(account: str) -> str:
    return quote(account, safe="/")
