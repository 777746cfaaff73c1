"""One running stack for all rounds of a module: a round is an edition of the demo, with ids and accounts of its own.

The next module has its own: a supervisor gives up a service that died too often within a minute.
"""

from collections.abc import Iterator

import pytest

from infra.demo.scratch_stack import ScratchStack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScratchStack]:
    with ScratchStack(tmp_path_factory.mktemp("chaos")) as running:
        yield running
