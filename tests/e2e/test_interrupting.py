"""Laws of a demo that is cut off: it ends in one sentence, and the next run completes what it began."""

import signal
import time
from pathlib import Path
from typing import Final

import pytest

from infra.demo.scratch_stack import ScratchStack
from tests.e2e.conftest import Played

OPTIONS: Final = ("demo", "--edition", "cutoff", "--rows", "1000")
SENTENCE: Final = "The demo was interrupted; the next run goes on from what is recorded."


@pytest.fixture
def stack(played: Played) -> ScratchStack:
    return played.stack


# What Ctrl-C sends, and what the supervisor of `scrip up` passes on.
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_an_interrupted_demo_ends_in_one_sentence_and_the_next_run_completes_it(
    stack: ScratchStack, tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "demo.log"
    demo = stack.start_scrip(*OPTIONS, "--batch", "10", "--rate", "100", log_file=log)
    try:
        deadline = time.monotonic() + 30
        while "published" not in log.read_text():
            assert demo.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        demo.send_signal(number)
        assert demo.wait(15) == 130
    finally:
        demo.kill()
        demo.wait()
    said = log.read_text()
    assert said.splitlines()[-1] == SENTENCE
    for unwanted in ("Traceback", "publisher", "Errno", "Aborted"):
        assert unwanted not in said
    completed = stack.scrip(*OPTIONS)
    assert completed.returncode == 0, completed.stdout
    assert "agree to the nano-dollar" in completed.stdout
