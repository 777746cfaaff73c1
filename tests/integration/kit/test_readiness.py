"""The law of readiness: false within 2 seconds of losing either server, by name, and true again later."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from infra.servers import EmbeddedNats, EmbeddedPostgres
from services.kit.broker import connect_nats, nats_check
from services.kit.database import database_check, open_pool
from services.kit.http import Readiness, build_app
from tests.conftest import NatsAccount, settings_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("loss", [signal.SIGKILL, signal.SIGSTOP])
async def test_readiness_is_false_within_two_seconds_of_losing_nats_or_postgres(
    own_nats: tuple[EmbeddedNats, NatsAccount],
    own_postgres: EmbeddedPostgres,
    tokens_file: Path,
    loss: signal.Signals,
) -> None:
    nats_server, account = own_nats
    settings = settings_of(
        "ledger", nats_account=account, database_url=SecretStr(own_postgres.url()), tokens_file=tokens_file
    )
    readiness = Readiness()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        client = await connect_nats(settings)
        pool = await open_pool(settings.database_url, name="readiness")
        readiness.add("nats", nats_check(client))
        readiness.add("postgres", database_check(pool))
        readiness.started()
        yield
        await pool.close()
        await client.close()

    app = build_app(name="ledger", lifespan=lifespan, readiness=readiness, tokens_file=tokens_file)

    async def missing() -> set[str]:
        answer = await http.get("/readyz")
        assert answer.status_code == (503 if answer.json()["missing"] else 200)
        return set(answer.json()["missing"])

    async def until_missing(expected: set[str], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (found := await missing()) != expected:
            assert time.monotonic() < deadline, f"missing {found}, not {expected}"
            await asyncio.sleep(0.05)

    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://ledger") as http:
        assert await missing() == {"start"}
        async with app.router.lifespan_context(app):
            for server, name in ((nats_server, "nats"), (own_postgres, "postgres")):
                await until_missing(set(), seconds=10)
                assert server.process is not None
                send_all(server.process.pid, loss)
                try:
                    await until_missing({name}, seconds=2)
                finally:
                    if loss == signal.SIGSTOP:
                        send_all(server.process.pid, signal.SIGCONT)
                if loss == signal.SIGKILL:
                    server.process.wait()
                    server.start()
            await until_missing(set(), seconds=10)


def send_all(process: int, kind: signal.Signals) -> None:
    """A signal to a server and its children; Postgres serves each connection in one."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    for each in (process, *map(int, children)):
        os.kill(each, kind)
