"""Real services for clients: metering and the ledger on sockets of their own, that can be taken away and come back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import httpx2
import psycopg
import pytest

from infra.servers import free_port
from services.kit.settings import ServiceSettings
from tests.clients.running import Services
from tests.conftest import Database


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Where a spool may be made."""
    return tmp_path / "spool.sqlite"


@pytest.fixture
def services(
    service_settings: Callable[[str], ServiceSettings], database: Database, tokens: Mapping[str, str]
) -> Iterator[Services]:
    """Nothing runs yet."""
    with ExitStack() as opened:
        url = database.url("metering").get_secret_value()
        connection = opened.enter_context(psycopg.connect(url, autocommit=True))
        ledger_port = free_port()
        headers = {"Authorization": f"Bearer {tokens['operator']}"}
        ledger = opened.enter_context(
            httpx2.Client(base_url=f"http://127.0.0.1:{ledger_port}", headers=headers, timeout=20, trust_env=False)
        )
        yield Services(
            settings_of=service_settings,
            connection=connection,
            tokens=tokens,
            metering_port=free_port(),
            ledger_port=ledger_port,
            ledger_http=ledger,
        )
