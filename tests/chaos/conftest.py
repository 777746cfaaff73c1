"""One running stack for all rounds: a round is an edition of the demo, with ids and accounts of its own.

A supervisor gives up a service that died too often within a minute: of the long forms each module has its own stack.
"""

from collections.abc import Iterator
from typing import Literal

import pytest

from infra.demo.scratch_stack import ScratchStack


def _scope(fixture_name: str, config: pytest.Config) -> Literal["module", "session"]:
    return "module" if config.getoption("markexpr") == "soak" else "session"


@pytest.fixture(scope=_scope)
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScratchStack]:
    with ScratchStack(tmp_path_factory.mktemp("chaos")) as running:
        yield running
