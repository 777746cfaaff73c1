"""One running stack for all short rounds: a round is an edition of the demo, with ids and accounts of its own.

Of the long forms, which leave much behind, each module has its own.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from infra.demo.scratch_stack import ScratchStack
from infra.supervisor import DEATHS_WITHIN_VARIABLE


def _scope(fixture_name: str, config: pytest.Config) -> Literal["module", "session"]:
    return "module" if config.getoption("markexpr") == "soak" else "session"


@pytest.fixture(scope=_scope)
def shared_stack(servers_directory: Callable[[str], Path]) -> Iterator[ScratchStack]:
    made = ScratchStack(servers_directory("chaos"))
    try:
        with pytest.MonkeyPatch.context() as said:
            # The supervisor cannot know that the deaths are ours, and would give up who died five times in a minute.
            said.setenv(DEATHS_WITHIN_VARIABLE, "1")
            made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture
def stack(shared_stack: ScratchStack) -> ScratchStack:
    """Nobody of it is still coming back from the kills of another test."""
    shared_stack.wait_until_ready()
    return shared_stack
