"""Whoever is killed in the middle of the demo, and in whatever order events come: the totals are exact."""

import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from infra.demo.scratch_stack import ScratchStack
from infra.demo.trace import requests
from tests.chaos.killing import (
    LEDGER,
    METERING,
    NATS,
    POSTGRES,
    PUBLISHER,
    VICTIMS,
    Kill,
    confirmed,
    kill_at_work,
    wait_for_successor,
)

pytestmark = pytest.mark.timeout(240)

SEED: Final = int(os.environ.get("SCRIP_CHAOS_SEED") or random.SystemRandom().randrange(10**6))
DEMO_SECONDS_MAX: Final = 300.0


@dataclass(frozen=True, slots=True)
class Round:
    """How a round is played. `rate` leaves time to kill in the middle."""

    name: str
    victims: tuple[str, ...]
    rows: int
    rate: int = 1500
    batch: int = 100
    times: int = 1
    shuffle: int | None = None

    @property
    def arguments(self) -> list[str]:
        shuffle = [] if self.shuffle is None else ["--shuffle", str(self.shuffle)]
        numbers = {"--rows": self.rows, "--rate": self.rate, "--batch": self.batch, "--times": self.times}
        options = [text for name, value in numbers.items() for text in (name, str(value))]
        return ["demo", "--edition", self.name, *options, *shuffle]


def test_totals_are_exact_after_a_kill_of_each_in_the_middle(
    stack: ScratchStack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = random.Random(SEED)
    victims = chosen.sample([victim for victim in VICTIMS if victim != PUBLISHER], k=len(VICTIMS) - 1)
    # It waits for nobody but NATS, and is done while others are still being started again: one of the first two.
    victims.insert(chosen.randrange(2), PUBLISHER)
    with capsys.disabled():
        play_and_kill(stack, Round(name="all", victims=tuple(victims), rows=5000, rate=400, batch=50), chosen, tmp_path)


def test_totals_are_exact_when_every_event_is_sent_three_times_in_another_order(
    stack: ScratchStack, tmp_path: Path
) -> None:
    thrice = stack.scrip("demo", "--edition", "thrice", "--rows", "3000", "--times", "3", "--shuffle", str(SEED))
    assert thrice.returncode == 0, thrice.stdout
    assert counts(thrice.stdout) == {
        "published": 9000,
        "new": 3000,
        "duplicate": 6000,
        "conflicting": 0,
        "dead-lettered": 0,
        "set aside": 0,
        "charged": 3000,
    }


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
def test_ten_kills_of_each_over_the_whole_trace(
    stack: ScratchStack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = random.Random(SEED)
    whole = len(requests())
    with capsys.disabled():
        for number in range(10):
            for victim in (METERING, LEDGER, NATS, POSTGRES, PUBLISHER):
                each = Round(name=f"{victim.lower()}{number}", victims=(victim,), rows=whole, rate=4000, batch=500)
                play_and_kill(stack, each, chosen, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_shuffles_of_the_whole_trace_sent_three_times_with_kills_of_each(
    stack: ScratchStack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = random.Random(SEED)
    whole = len(requests())
    with capsys.disabled():
        for number in range(10):
            victims = tuple(chosen.sample(VICTIMS, k=len(VICTIMS)))
            shuffle = chosen.randrange(10**6)
            name = f"shuffled{number}"
            each = Round(name, victims, rows=whole, rate=4000, batch=500, times=3, shuffle=shuffle)
            play_and_kill(stack, each, chosen, tmp_path)


def play_and_kill(stack: ScratchStack, each: Round, chosen: random.Random, directory: Path) -> list[Kill]:
    """Play the demo, kill each victim at a moment of chance, then demand exact totals, and a repeat without effect."""
    _say(f"\nround {each.name}, seed {SEED}: {each.rows} rows x {each.times}, victims {', '.join(each.victims)}")
    output = directory / f"{each.name}.log"
    begin = time.monotonic()
    demo = stack.start_scrip(*each.arguments, log_file=output)
    kills = []
    try:
        for place, victim in enumerate(each.victims):
            _wait_for_progress(stack, each, (place + chosen.uniform(0.2, 0.8)) / (len(each.victims) + 1), demo.poll)
            kills.append(kill_at_work(stack, victim))
            _say(f"  {kills[-1]}")
            wait_for_successor(stack, kills[-1])
        code = demo.wait(timeout=DEMO_SECONDS_MAX)
    finally:
        demo.kill()
        demo.wait()
    said = output.read_text()
    assert code == 0, f"seed {SEED}\n{said}\n{stack.output()}"
    assert "The three totals agree to the nano-dollar" in said
    assert counts(said)["charged"] == each.rows
    _say(f"  exact after {time.monotonic() - begin:.1f} s")
    again = stack.scrip("demo", "--edition", each.name, "--rows", str(each.rows))
    assert again.returncode == 0, f"seed {SEED}\n{again.stdout}"
    assert (counts(again.stdout)["new"], counts(again.stdout)["charged"]) == (0, 0)
    return kills


def _say(line: str) -> None:
    """To stderr: of stdout nothing comes through from a worker of xdist."""
    sys.stderr.write(line + "\n")


def counts(output: str) -> dict[str, int]:
    """The table of this run's counts, as the demo prints it."""
    rows = re.findall(r"^│ ([a-z][a-z -]*?) +│ +([\d,]+) │$", output, flags=re.MULTILINE)
    return {name: int(number.replace(",", "")) for name, number in rows if not name.startswith("events")}


def _wait_for_progress(stack: ScratchStack, each: Round, fraction: float, ended: Callable[[], int | None]) -> None:
    deadline = time.monotonic() + DEMO_SECONDS_MAX
    wanted = each.rows * each.times * fraction
    while confirmed(stack)[0] < wanted or confirmed(stack)[1] != each.rows * each.times:
        assert ended() is None, "the demo ended before the kill"
        assert time.monotonic() < deadline, "the demo made no progress"
        time.sleep(0.01)
