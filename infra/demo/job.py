"""The main job: accounts, publishing, waiting until everything is charged, and the three totals."""

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Final, Protocol

from infra import processes, state
from infra.demo import independent
from infra.demo.events import SOURCE
from infra.demo.publish import PASSWORD_VARIABLE, URL_VARIABLE, Progress
from infra.demo.services import Counters, Ledger, Metering, NewAccount
from infra.demo.trace import accounts, requests
from infra.errors import BadInput, StackError
from infra.servers import LOOPBACK
from infra.state import Layout
from services.kit.files import write_private

ANCHOR_BEFORE_START: Final = timedelta(hours=2)
GRANTED_BEFORE_ANCHOR: Final = timedelta(hours=1)
GRANT_DOLLARS: Final = "100"
PUBLISHER_STARTS_MAX: Final = 6
POLL_SECONDS: Final = 0.1
# More than a dead reader's messages wait before they are delivered again.
WITHOUT_PROGRESS_SECONDS_MAX: Final = 75.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to play. An edition is another copy of the job, with its own ids and accounts."""

    edition: str = ""
    rows_max: int | None = None
    times: int = 1
    shuffle: int | None = None
    batch_size: int = 1000
    rate_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where the stack is, and the credentials the job needs."""

    layout: Layout
    ledger_url: str
    metering_url: str
    nats_url: str
    nats_password: str = field(repr=False)
    operator_token: str = field(repr=False)

    @classmethod
    def running(cls, layout: Layout) -> "Target":
        """The stack that runs on this directory. StackError if none does."""
        run = state.needed_run(layout)
        credentials = state.load_credentials(layout)
        return cls(
            layout=layout,
            ledger_url=f"http://{LOOPBACK}:{run.ports['ledger']}",
            metering_url=f"http://{LOOPBACK}:{run.ports['metering']}",
            nats_url=f"nats://{LOOPBACK}:{run.ports['nats']}",
            nats_password=credentials.nats[SOURCE],
            operator_token=credentials.tokens["operator"],
        )

    @property
    def memory_file(self) -> Path:
        """What the job remembers from run to run."""
        return self.layout.directory / "demo.json"

    @property
    def publisher_file(self) -> Path:
        """The publisher's last word."""
        return self.layout.directory / "publisher.json"


class Show(Protocol):
    """Where progress goes."""

    def opened(self, done: int, total: int) -> None: ...
    def moved(self, *, total: int, published: int, accounted: int, charged: int, chargeable: int) -> None: ...
    def said(self, sentence: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Totals:
    """Dollars by account, three ways."""

    journal: Mapping[str, Decimal]
    movement: Mapping[str, Decimal]
    independent: Mapping[str, Decimal]

    @property
    def agree(self) -> bool:
        """Not only in sum: account by account."""
        return self.journal == self.movement == self.independent

    def difference(self) -> str:
        """The first account on which they differ, in words."""
        for account in sorted({*self.journal, *self.movement, *self.independent}):
            found = [each.get(account) for each in (self.journal, self.movement, self.independent)]
            if len(set(found)) > 1:
                return f"{account}: journal {found[0]}, movement of the balance {found[1]}, independent {found[2]}"
        return "no account differs"


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did. `charged` are lines; `seconds` run from the first publish to the last charge."""

    published: int
    new: int
    duplicate: int
    conflicting: int
    dead: int
    set_aside: int
    charged: int
    seconds: float
    totals: Totals
    stuck: str | None

    @property
    def right(self) -> bool:
        return self.stuck is None and self.totals.agree


@dataclass(slots=True)
class _Memory:
    """The anchor, and up to which row every edition was ever sent."""

    anchor: datetime
    rows: dict[str, int]


async def play(target: Target, options: Options, show: Show) -> Result:
    """Play the job. StackError, a sentence, if the stack does not let it."""
    if re.fullmatch(r"[a-z0-9]{0,20}", options.edition) is None:
        raise BadInput("An edition is a name of at most 20 lower-case letters and digits.")
    rows = requests(rows_max=options.rows_max)
    memory = _remembered(target)
    names = accounts(rows, edition=options.edition)
    async with (
        Ledger(target.ledger_url, target.operator_token) as ledger,
        Metering(target.metering_url, target.operator_token) as metering,
    ):
        async for done in ledger.open_and_grant(_new(name, memory.anchor) for name in names):
            show.opened(done, len(names))
        memory.rows[options.edition] = max(memory.rows.get(options.edition, 0), len(rows))
        _remember(target, memory)
        return await _Run(
            target=target,
            options=options,
            show=show,
            memory=memory,
            ledger=ledger,
            metering=metering,
            published=Progress(total=len(rows) * options.times),
        ).play()


@dataclass(slots=True)
class _Run:
    """One run: the publisher beside the watching of what comes out."""

    target: Target
    options: Options
    show: Show
    memory: _Memory
    ledger: Ledger
    metering: Metering
    published: Progress

    async def play(self) -> Result:
        before, charged_before = await self.metering.counters(SOURCE), await self._charged_lines()
        begin = time.monotonic()
        publisher = asyncio.create_task(self._publish())
        try:
            end, stuck, totals = await self._watch(publisher, before, charged_before)
        finally:
            publisher.cancel()
            with suppress(asyncio.CancelledError):
                await publisher
        counters = (await self.metering.counters(SOURCE)).since(before)
        return Result(
            published=self.published.confirmed,
            new=counters.new,
            duplicate=counters.duplicate + self.published.duplicates,
            conflicting=counters.conflicting,
            dead=counters.dead,
            set_aside=counters.unattributed + counters.unpriced,
            charged=await self._charged_lines() - charged_before,
            seconds=end - begin,
            totals=totals,
            stuck=stuck,
        )

    async def _watch(
        self, publisher: asyncio.Task[None], before: Counters, charged_before: int
    ) -> tuple[float, str | None, Totals]:
        """Until the totals agree or nothing moves any more: the time of the last move, why it is stuck, the totals."""
        last: tuple[int, int, int] | None = None
        changed = time.monotonic()
        doubted = False
        while True:
            if publisher.done():
                publisher.result()
            asked = time.monotonic()
            counters = (await self.metering.counters(SOURCE)).since(before)
            charged = await self._charged_lines() - charged_before
            stored = self.published.confirmed - self.published.duplicates
            accounted = counters.accounted + self.published.duplicates
            self.show.moved(
                total=self.published.total,
                published=self.published.confirmed,
                accounted=accounted,
                charged=charged,
                # What is not accounted for yet may be a repeat.
                chargeable=counters.new + max(0, self.published.total - accounted),
            )
            if (now := (self.published.confirmed, counters.accounted, charged)) != last:
                last, changed = now, time.monotonic()
            settled = publisher.done() and counters.accounted >= stored and charged >= counters.charged
            if settled:
                if (totals := await self._totals()).agree:
                    return changed, None, totals
                if not doubted:
                    doubted = True
                    self.show.said(
                        f"The totals do not agree yet ({totals.difference()}): waiting for what may still come."
                    )
            if time.monotonic() - changed > WITHOUT_PROGRESS_SECONDS_MAX:
                return changed, None if settled else _stuck(self.published, counters, charged), await self._totals()
            # Where asking has become expensive, ask less often.
            await asyncio.sleep(max(POLL_SECONDS, 3 * (time.monotonic() - asked)))

    async def _charged_lines(self) -> int:
        edition = self.options.edition
        return await self.ledger.charged_lines(f"demo-{edition}-" if edition else "demo-")

    async def _publish(self) -> None:
        """Run the publisher; one that was killed is started again, from the beginning."""
        for start in range(PUBLISHER_STARTS_MAX):
            status = await self._publish_once()
            if status == 0:
                return
            if status > 0 or start + 1 == PUBLISHER_STARTS_MAX:
                raise StackError(f"The publisher {processes.ending(status)}: see what it said above.")
            self.show.said(
                f"The publisher {processes.ending(status)}, with {self.published.in_flight} events unacknowledged and"
                f" {self.published.confirmed} confirmed: starting it again, from the beginning."
            )

    async def _publish_once(self) -> int:
        process = await asyncio.create_subprocess_exec(
            *self._publisher_command(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            # A Ctrl-C is for us: we end it.
            start_new_session=True,
            env=dict(os.environ) | {URL_VARIABLE: self.target.nats_url, PASSWORD_VARIABLE: self.target.nats_password},
        )
        try:
            if process.stdout is not None:
                async for line in process.stdout:
                    # A killed process leaves half a line.
                    with suppress(ValueError):
                        self.published = Progress(**json.loads(line))
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def _publisher_command(self) -> list[str]:
        given = self.options
        command = [sys.executable, "-m", "infra.demo.publish", "--anchor", self.memory.anchor.isoformat()]
        optional = {
            "--edition": given.edition or None,
            "--rows": given.rows_max,
            "--shuffle": given.shuffle,
            "--rate": given.rate_per_second,
        }
        for name, value in optional.items():
            command += [] if value is None else [name, str(value)]
        status = str(self.target.publisher_file)
        return [*command, "--times", str(given.times), "--batch", str(given.batch_size), "--status", status]

    async def _totals(self) -> Totals:
        edition = self.options.edition
        rows = self.memory.rows[edition]
        names = accounts(requests(rows_max=rows), edition=edition)
        found = dict(zip(names, await self.ledger.charged(names), strict=True))
        bill = independent.bill(rows_max=rows).amounts
        return Totals(
            journal={name: each.journal for name, each in found.items()},
            movement={name: each.granted - each.posted for name, each in found.items()},
            independent={f"demo-{edition}-{name[5:]}" if edition else name: cost for name, cost in bill.items()},
        )


def _new(name: str, anchor: datetime) -> NewAccount:
    return NewAccount(name, GRANT_DOLLARS, anchor - GRANTED_BEFORE_ANCHOR, f"scrip-demo:{name}")


def _stuck(published: Progress, counters: Counters, charged: int) -> str:
    return (
        f"Nothing has moved for {WITHOUT_PROGRESS_SECONDS_MAX:.0f} seconds: of {published.total} events"
        f" {published.confirmed} are published, metering has accounted for {counters.accounted},"
        f" {counters.charged} are rated and {charged} charged. See `scrip status` and the logs."
    )


def _remembered(target: Target) -> _Memory:
    """What earlier runs left, or the memory of a first run, whose anchor follows from the present."""
    try:
        found = json.loads(target.memory_file.read_text())
        return _Memory(anchor=datetime.fromisoformat(found["anchor"]), rows=dict(found["rows"]))
    except FileNotFoundError:
        memory = _Memory(anchor=datetime.now(UTC) - ANCHOR_BEFORE_START, rows={})
        # Before anything is sent: events of another anchor under the same ids would be conflicts.
        _remember(target, memory)
        return memory
    except (ValueError, KeyError, TypeError) as error:
        raise StackError(f"{target.memory_file} is damaged: restore it, or run `make clean` to start anew.") from error


def _remember(target: Target, memory: _Memory) -> None:
    content = {"anchor": memory.anchor.isoformat(), "rows": memory.rows}
    write_private(target.memory_file, json.dumps(content, indent=2) + "\n")
