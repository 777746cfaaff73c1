"""Whichever service is killed between two steps of the story: the same end."""

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Final

import pytest

from infra.demo.scratch_stack import ScratchStack
from infra.demo.story import STEPS, play
from infra.demo.story_doors import Target
from tests.chaos.test_kills import SEED
from tests.e2e.told import shown_in_readme, told

pytestmark = pytest.mark.timeout(240)

VICTIMS: Final = ("ledger", "metering", "keyvault", "billing", "gateway")
GAPS: Final = len(STEPS) - 1
RESTART_SECONDS_MAX: Final = 60.0


def test_the_story_ends_the_same_when_each_service_is_killed_between_two_steps(stack: ScratchStack) -> None:
    victims: list[str | None] = [*VICTIMS, *[None] * (GAPS - len(VICTIMS))]
    random.Random(SEED).shuffle(victims)
    tell_and_kill(stack, victims)


@pytest.mark.soak
@pytest.mark.timeout(2 * 3600)
def test_the_story_ends_the_same_when_any_service_is_killed_between_any_two_steps(stack: ScratchStack) -> None:
    for gap in range(GAPS):
        for victim in VICTIMS:
            tell_and_kill(stack, [victim if place == gap else None for place in range(GAPS)])


def tell_and_kill(stack: ScratchStack, victims: Sequence[str | None]) -> None:
    """Tell the story and kill the victims, each after its step. Then demand that it was told as ever."""
    sys.stderr.write(f"\nstory, seed {SEED}, victims {', '.join(each or '-' for each in victims)}\n")
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        step = len(lines) - 1
        if 1 <= step <= GAPS and (victim := victims[step - 1]) is not None:
            kill(stack, victim)

    try:
        play(Target.running(stack.layout), say)
    except Exception as error:
        error.add_note(f"seed {SEED}, victims {victims}\n" + "\n".join(lines) + f"\n{stack.output()}")
        raise
    finally:
        stack.wait_until_ready()
    assert told("\n".join(lines)) == shown_in_readme(), f"seed {SEED}, victims {victims}"


def kill(stack: ScratchStack, victim: str) -> None:
    """Kill -9 the process that runs now, be it barely started. Nobody waits for its successor."""
    deadline = time.monotonic() + RESTART_SECONDS_MAX
    while True:
        pid = stack.run.processes.get(victim)
        try:
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                break
        except ProcessLookupError:
            pass
        assert time.monotonic() < deadline, f"{victim} has no process:\n{stack.output()}"
        time.sleep(0.05)
