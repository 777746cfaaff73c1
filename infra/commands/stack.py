"""The commands that run and inspect the local stack: up, status, migrate, provision, clean."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import psycopg
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from contracts.streams import OPERATOR
from infra import leftovers, state, supervisor
from infra.errors import StackError
from infra.listing import show_rows
from infra.provision import Provisioned, in_words, lags, operator
from infra.state import Layout, Run
from infra.supervisor import Managed, Stack


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (up, status, migrate, provision, clean):
        app.command()(command)


def up(
    *,
    demo: Annotated[bool, typer.Option(help="Play the main job once everything is ready.")] = True,
    exit_after_demo: Annotated[bool, typer.Option("--exit-after-demo", help="Stop then, with its exit code.")] = False,
) -> None:
    """Start servers and services, play the demo, and stay until Ctrl-C."""
    module = supervisor.DEMO_MODULE if demo else None
    raise typer.Exit(supervisor.up(demo_module=module, stay=not exit_after_demo, console=Console()))


def status() -> None:
    """Show what runs, whether it is ready, and what waits in the streams. Exit code 1 if something is missing."""
    layout = state.locate()
    run = state.needed_run(layout)
    console = Console()
    stack = _running(layout, run)
    rows = [("supervisor", str(run.supervisor), "", "running")]
    complete = True
    for title, port in (("PostgreSQL", "postgres"), ("NATS", "nats")):
        pid = run.processes.get(title)
        complete &= pid is not None
        rows.append((title, str(pid or ""), str(run.ports[port]), "running" if pid else "down"))
    for service in stack.services:
        why = supervisor.unready(stack.service_url(service.name))
        complete &= why is None
        pid = run.processes.get(service.name)
        rows.append((service.name, str(pid or ""), str(run.ports[service.name]), why or "ready"))
    show_rows(console, ("what", "process", "port", "state"), rows, prose=("state",))
    _show_lags(console, stack)
    raise typer.Exit(0 if complete else 1)


def migrate() -> None:
    """Create roles and schemas and bring them to their newest version."""
    with stack_with("postgres") as stack:
        stack.migrate()
        Console().print("Schemas are up to date: " + ", ".join(service.name for service in stack.services))


def provision(
    *, repair: Annotated[bool, typer.Option("--repair", help="Change what has drifted back to the contract.")] = False
) -> None:
    """Create streams and consumers from contracts/streams.py; report drift and what is not ours.

    It goes on after what NATS refuses, and never deletes. Exit code 1 if anything is not as it should be.
    """
    with stack_with("nats") as stack:
        result = stack.provision(repair=repair)
    show_provisioned(Console(), result)
    raise typer.Exit(0 if result.is_complete else 1)


def show_provisioned(console: Console, result: Provisioned) -> None:
    """Print what was created, repaired, refused and found, and what that comes to in one sentence."""
    said = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    for name in result.created:
        said(f"created {name}")
    if result.drifts:
        table = Table(*(Column(heading, overflow="fold") for heading in ("where", "what", "is", "should be", "")))
        for drift in result.drifts:
            state_of_it = "repaired" if drift.where in result.repaired else "differs"
            words = (drift.where, drift.name.replace("_", " "), in_words(drift.found), in_words(drift.wanted))
            table.add_row(*map(Text, words), state_of_it)
        console.print(table)
    for refusal in result.refusals:
        said(f"refused {refusal.where}: {refusal.reason}")
    for stray in result.strays:
        said(f"not ours, left alone: {stray}")
    said(_conclusion(result))


def _conclusion(result: Provisioned) -> str:
    left, refused = len(result.left), len(result.refusals)
    if refused:
        things = "1 thing" if refused == 1 else f"{refused} things"
        return (
            f"NATS refused {things}, all else is done: where the data is not needed, drain and delete what it refused, "
            "then run scrip provision again"
        )
    if left:
        return f"{left} difference{'s' if left > 1 else ''}; run scrip provision --repair"
    return "everything is as contracts/streams.py says"


def clean() -> None:
    """Stop what runs on the state directory and remove all data: events, balances, credentials."""
    leftovers.clean(state.locate())


@contextmanager
def stack_with(server: str) -> Iterator[Stack]:
    """The stack with one server running: the one that runs, else started for this moment.

    A database that is not made yet, or goes away, is a StackError.
    """
    try:
        with _stack_with(server) as stack:
            yield stack
    except (psycopg.OperationalError, psycopg.errors.UndefinedTable) as error:
        why = str(error).strip().splitlines()[0]
        raise StackError(f"The database cannot be asked ({why}). If nothing ever ran here: `scrip migrate`.") from error


@contextmanager
def _stack_with(server: str) -> Iterator[Stack]:
    layout = state.locate()
    if run := state.current_run(layout):
        yield _running(layout, run)
        return
    state.prepare(layout)
    with state.locked(layout):
        stack = Stack.prepared(layout)
        managed: Managed = stack.postgres() if server == "postgres" else stack.nats()
        try:
            managed.start()
            yield stack
        finally:
            managed.stop()


def _running(layout: Layout, run: Run) -> Stack:
    return Stack(layout=layout, ports=run.ports, credentials=state.load_credentials(layout))


def _show_lags(console: Console, stack: Stack) -> None:
    """Per stream and reader; a reader with a consumer per partition is one row."""

    async def read() -> dict[tuple[str, str], tuple[int, int]]:
        async with operator(stack.nats_url, stack.credentials.nats[OPERATOR]) as jetstream:
            return dict(await lags(jetstream))

    sums: defaultdict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for (stream, durable), waiting in asyncio.run(read()).items():
        sums[stream, durable.rstrip("0123456789").rstrip("-")].append(waiting)
    rows = [
        (stream, reader, str(len(found)), str(sum(each[0] for each in found)), str(sum(each[1] for each in found)))
        for (stream, reader), found in sums.items()
    ]
    counts = ("consumers", "waiting", "unacknowledged")
    show_rows(console, ("stream", "reader", *counts), rows, numbers=counts)
