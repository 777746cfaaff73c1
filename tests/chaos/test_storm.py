"""A storm of usage: every event three times in any order, by several writers, metering and NATS killed in between.

Every event is logged once and charged once, and the totals are those of a computation that shares no code with Scrip's.
"""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from functools import partial
from itertools import cycle
from typing import Final

import pytest
from rich.console import Console

from bench.funding import open_accounts
from bench.measured import Measured
from bench.publisher import Load, account, expected
from infra.demo.publish import PASSWORD_VARIABLE, URL_VARIABLE
from infra.demo.scratch_stack import REPOSITORY, ScratchStack
from tests.chaos.killing import METERING, NATS, kill_at_work, wait_for_successor
from tests.chaos.storm_writer import TIMES
from tests.chaos.test_kills import SEED

WRITERS: Final = 3
ACCOUNTS: Final = 500
WAVE: Final = 50_000
# As many as fit into five minutes, and no more than asked for.
SECONDS_MAX: Final = float(os.environ.get("SCRIP_STORM_SECONDS", "300"))
EVENTS_MAX: Final = 1_000_000
CHARGED_BY_METERING: Final = "SELECT coalesce(sum(charged), 0) FROM metering.ingest_counters"
CHARGED: Final = "SELECT coalesce(sum(lines - lines_dead), 0) FROM ledger.bundles"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_event_of_a_storm_is_counted_and_charged_once(
    stack: ScratchStack, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with capsys.disabled(), closing(Storm(stack, name="storm")) as storm:
        victims = cycle(storm.chance.sample((METERING, NATS), 2))
        # However short it is to be, both are killed in it.
        while storm.kills < 2 or (storm.events < EVENTS_MAX and time.monotonic() - began < SECONDS_MAX):
            storm.wave(WAVE, victims=(next(victims),))
            seconds = time.monotonic() - began
            sys.stderr.write(f"  {storm.events:,} events, each {TIMES} times, {seconds:.0f} s, {storm.kills} kills\n")
        storm.check()
        seconds = time.monotonic() - began
        sys.stderr.write(f"exact: {storm.events:,} events in {seconds:.0f} s, {storm.kills} kills, seed {SEED}\n")


class Storm:
    """Waves of events on a running stack, and what they must come to."""

    def __init__(self, stack: ScratchStack, *, name: str) -> None:
        self._stack = stack
        self._name = name
        self._measured = Measured(stack, console=Console(stderr=True))
        self._nanos: Counter[str] = Counter()
        self._waves = 0
        self.chance = random.Random(SEED)
        self.events = 0
        self.kills = 0
        asyncio.run(open_accounts(self._measured.stack, [account(number) for number in range(ACCOUNTS)]))
        self._before = self._measured.posted()
        self._counted = {counted: self._measured.count(counted) for counted in (CHARGED_BY_METERING, CHARGED)}

    def wave(self, events: int, *, victims: tuple[str, ...]) -> None:
        """Send events three times each, and kill each victim once while it works on them."""
        self._waves += 1
        load = Load(
            name=f"{self._name}{self._waves}", events=events, accounts=ACCOUNTS, seed=self.chance.randrange(10**6)
        )
        self._nanos += expected(load)
        self.events += events
        writers = [self._writer(load, writer) for writer in range(WRITERS)]
        try:
            for victim in victims:
                time.sleep(self.chance.uniform(0.2, 1.5))
                kill = kill_at_work(self._stack, victim)
                self.kills += 1
                wait_for_successor(self._stack, kill)
            for writer in writers:
                assert writer.wait(timeout=300) == 0, f"seed {SEED}: a writer gave up\n{self._stack.output()}"
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()

    def close(self) -> None:
        """Ask the database no more."""
        self._measured.close()

    def check(self) -> None:
        """Wait until all is counted and charged; then everything is, once."""
        for counted, already in self._counted.items():
            self._measured.wait_for(partial(self._measured.count, counted), already + self.events, counted)
        moved = {who: self._before[who] - posted for who, posted in self._measured.posted().items()}
        assert Counter({who: nanos for who, nanos in moved.items() if nanos}) == self._nanos, f"seed {SEED}"
        for table in ("seen", "usage_log"):
            there = f"SELECT count(*) FROM metering.{table} WHERE event_id LIKE '{self._name}%'"
            assert self._measured.count(there) == self.events, table
        assert self._measured.count("SELECT count(*) FROM metering.conflicts") == 0

    def _writer(self, load: Load, writer: int) -> "subprocess.Popen[bytes]":
        stack = self._measured.stack
        told = {URL_VARIABLE: stack.nats_url, PASSWORD_VARIABLE: stack.credentials.nats["demo"]}
        numbers = {"--events": load.events, "--accounts": load.accounts, "--seed": load.seed}
        options = [text for name, value in numbers.items() for text in (name, str(value))]
        options += ["--writer", str(writer), "--writers", str(WRITERS)]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.storm_writer", "--name", load.name, *options],
            env=dict(os.environ) | told,
            cwd=REPOSITORY,
        )
