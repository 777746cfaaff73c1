"""One running stack for all rounds: a round is an edition of the demo, with ids and accounts of its own."""

from collections.abc import Iterator

import pytest

from infra.demo.scratch_stack import ScratchStack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScratchStack]:
    with ScratchStack(tmp_path_factory.mktemp("chaos")) as running:
        yield running
