"""A gateway that runs between stand-ins, with the simulated provider, on real sockets and a real NATS."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NatsAccount
from tests.integration.gateway.driving import Running, World, running, world_of
from tests.servers import Servers, account_prefix

OwnWorld = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture(scope="session")
def gateway(servers: Servers, worker_index: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One gateway for all tests that need no settings of their own."""
    directory = tmp_path_factory.mktemp("gateway")
    nats = NatsAccount(servers.nats_url, servers.secret, account_prefix(worker_index))
    with running(nats, directory, tokens_file=_no_tokens(directory)) as made:
        yield made


@pytest.fixture
async def world(gateway: Running, nats_account: NatsAccount) -> AsyncIterator[World]:
    async with world_of(gateway, nats_account) as made:
        yield made


@pytest.fixture
def own_world(nats_account: NatsAccount, tmp_path: Path) -> OwnWorld:
    """A gateway for one test, with settings of its own."""

    @asynccontextmanager
    async def make(*, ledger: bool = True, **settings: Any) -> AsyncIterator[World]:
        with running(nats_account, tmp_path, tokens_file=_no_tokens(tmp_path), **settings) as gateway:
            async with world_of(gateway, nats_account, ledger=ledger) as made:
                yield made

    return make


def _no_tokens(directory: Path) -> Path:
    path = directory / "tokens.json"
    path.write_text(json.dumps([]))
    return path
