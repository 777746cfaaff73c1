"""Fixtures: real servers, and what tests are handed of them.

servers             Postgres and NATS of this run, started by the first test that asks (SCRIP_TEST_DOCKER=1: containers)
postgres_admin_url  the superuser's URL of that Postgres
database            a database of its own, with all services' schemas migrated
empty_database      a database of its own without schemas: `bootstrap` and `migrate` are the test's
nats_account        this worker's NATS account, with streams and consumers fresh as contracts/streams.py says
operator_nats       a connection to that account as the operator, who may read and change streams
service_settings    settings of a service on `database` and `nats_account`
tokens              bearer tokens by principal, known to services started with `service_settings`
own_nats            a NATS server for one test, to be killed; `own_postgres` likewise
servers_directory   makes directories for servers and stacks of tests, which are removed when the run ends
Async tests are marked `pytest.mark.anyio` and run on uvloop, as the services do.
"""

import asyncio
import gc
import hashlib
import itertools
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import nats
import psycopg
import pytest
from nats.aio.client import Client
from psycopg import sql
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from contracts.streams import CONSUMERS, OPERATOR, STREAMS, inbox_prefix
from infra.provision import consumer_config, operator, stream_config
from infra.servers import EmbeddedNats, EmbeddedPostgres, free_port
from services.kit.database_setup import bootstrap, migrate
from services.kit.settings import ServiceSettings
from services.kit.telemetry import configure_logging
from tests import hypothesis_profiles
from tests.servers import ACCOUNTS_SPARE, Servers, account_prefix, accounts, password, running, stop

REPOSITORY: Final = Path(__file__).resolve().parent.parent
CATALOGUE_FILE: Final = REPOSITORY / "infra" / "catalogue" / "catalogue.toml"

# Every service that has a schema.
SERVICES: Final = tuple(
    sorted(versions.parent.parent.name for versions in (REPOSITORY / "services").glob("*/migrations/versions"))
)

SCOPES: Final = ("usage:write", "metering:read", "ledger:read", "ledger:write", "operate")

_RUN_DIRECTORY: Final = "SCRIP_TEST_RUN_DIRECTORY"
_RUN_PID: Final = "SCRIP_TEST_RUN_PID"

_MEMORY: Final = Path("/dev/shm")
_MEMORY_BYTES_MIN: Final = 4 << 30

# Rights on the database itself and the roles' search paths, as `bootstrap` gave them to the template.
_NOT_COPIED: Final = (
    sql.SQL(
        "UPDATE pg_database SET datacl = (SELECT datacl FROM pg_database WHERE datname = %(template)s)"
        " WHERE datname = %(name)s"
    ),
    sql.SQL(
        "INSERT INTO pg_db_role_setting SELECT made.oid, setrole, setconfig FROM pg_db_role_setting"
        " JOIN pg_database template ON template.oid = setdatabase AND template.datname = %(template)s"
        " JOIN pg_database made ON made.datname = %(name)s"
    ),
)

_database_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        # Inherited by xdist's workers.
        where = _where_servers_write(long=config.getoption("markexpr") == "soak")
        os.environ[_RUN_DIRECTORY] = str(where / f"scrip-tests-{secrets.token_hex(6)}")
        os.environ[_RUN_PID] = str(os.getpid())
    configure_logging(service="tests")
    hypothesis_profiles.load()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        directory = Path(os.environ.pop(_RUN_DIRECTORY))
        stop(directory)
        shutil.rmtree(directory, ignore_errors=True)


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: the garbage collector need not look through it in every test."""
    gc.collect()
    gc.freeze()


def _where_servers_write(*, long: bool) -> Path:
    """In memory if there is enough: half of a short run would be waiting for a disk that nobody cuts the power of."""
    try:
        found = os.statvfs(_MEMORY)
    except OSError:
        return Path(tempfile.gettempdir())
    enough = found.f_bavail * found.f_frsize >= _MEMORY_BYTES_MIN and os.access(_MEMORY, os.W_OK)
    return _MEMORY if enough and not long else Path(tempfile.gettempdir())


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Tests that run a whole stack go to one worker, so that they share one."""
    return _OneStack(config, log)


class _OneStack(LoadScopeScheduling):
    # By path: the node id's suffix by which xdist tells its groups is lost on pytest 9.
    def _split_scope(self, nodeid: str) -> str:
        return "stack" if nodeid.startswith(("tests/e2e/", "tests/chaos/")) else nodeid


@dataclass(frozen=True, slots=True)
class Database:
    """A database of a test."""

    admin_url: str = field(repr=False)
    name: str
    secret: str = field(repr=False)

    def url(self, role: str) -> SecretStr:
        """The URL for a role: `ledger`, `ledger_owner`."""
        return SecretStr(
            make_conninfo(self.admin_url, dbname=self.name, user=role, password=password(self.secret, role))
        )

    @property
    def superuser_url(self) -> SecretStr:
        return SecretStr(make_conninfo(self.admin_url, dbname=self.name))

    def passwords(self, *services: str) -> dict[str, SecretStr]:
        """What `bootstrap` is given for these services."""
        roles = [role for service in services for role in (service, f"{service}_owner")]
        return {role: SecretStr(password(self.secret, role)) for role in roles}


@dataclass(frozen=True, slots=True)
class NatsAccount:
    """A NATS account of a test, and how its users log in."""

    url: str
    secret: str = field(repr=False)
    user_prefix: str

    def user(self, name: str) -> str:
        return self.user_prefix + name

    def password(self, name: str) -> str:
        return password(self.secret, name)

    async def connect(self, name: str) -> Client:
        """A plain connection as a user of the permission matrix."""
        return await nats.connect(
            self.url, user=self.user(name), password=self.password(name), inbox_prefix=inbox_prefix(name)
        )


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def servers() -> Servers:
    return running(
        Path(os.environ[_RUN_DIRECTORY]),
        run_pid=int(os.environ[_RUN_PID]),
        account_count=int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) + ACCOUNTS_SPARE,
    )


@pytest.fixture(scope="session")
def worker_index() -> int:
    """0, 1, …: the xdist worker this is."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


@pytest.fixture(scope="session")
def postgres_admin_url(servers: Servers) -> str:
    return servers.postgres_admin_url


@pytest.fixture(scope="session")
def database_template(servers: Servers, worker_index: int) -> Iterator[str]:
    """The name of a database with every service's schema, to copy from."""
    template = Database(servers.postgres_admin_url, f"scrip_template_{worker_index}", servers.secret)
    bootstrap(SecretStr(servers.postgres_admin_url), database=template.name, passwords=template.passwords(*SERVICES))
    for service in SERVICES:
        migrate(service=service, owner_url=template.url(f"{service}_owner"))
    yield template.name
    _drop_database(template)


@pytest.fixture
def empty_database(servers: Servers, worker_index: int) -> Iterator[Database]:
    name = f"scrip_test_{worker_index}_{next(_database_numbers)}"
    database = Database(servers.postgres_admin_url, name, servers.secret)
    yield database
    _drop_database(database)


@pytest.fixture
def database(empty_database: Database, database_template: str) -> Database:
    names = {"name": empty_database.name, "template": database_template}
    with psycopg.connect(empty_database.admin_url, autocommit=True) as admin:
        statement = sql.SQL("CREATE DATABASE {name} TEMPLATE {template}")
        admin.execute(statement.format(**{name: sql.Identifier(value) for name, value in names.items()}))
        for statement in _NOT_COPIED:
            admin.execute(statement, names)
    return empty_database


@pytest.fixture
def nats_account(servers: Servers, worker_index: int) -> NatsAccount:
    account = NatsAccount(servers.nats_url, servers.secret, account_prefix(worker_index))
    asyncio.run(refresh_streams(account))
    return account


@pytest.fixture
async def operator_nats(nats_account: NatsAccount) -> AsyncIterator[Client]:
    client = await nats_account.connect(OPERATOR)
    yield client
    await client.close()


@pytest.fixture
def tokens() -> Mapping[str, str]:
    """Tokens of `operator`, who may everything, and of `demo`, who reports usage."""
    return {"operator": "token-of-operator", "demo": "token-of-demo"}


@pytest.fixture
def tokens_file(tmp_path: Path, tokens: Mapping[str, str]) -> Path:
    scopes = {"operator": SCOPES, "demo": ("usage:write",)}
    path = tmp_path / "tokens.json"
    path.write_text(
        json.dumps(
            [
                {
                    "principal": principal,
                    "sha256": hashlib.sha256(token.encode()).hexdigest(),
                    "scopes": list(scopes[principal]),
                }
                for principal, token in tokens.items()
            ]
        )
    )
    return path


@pytest.fixture
def service_settings(
    database: Database, nats_account: NatsAccount, tokens_file: Path
) -> Callable[[str], ServiceSettings]:
    """Settings of the service of that name. A service with settings of its own makes them from `model_dump()`."""

    def settings(service: str) -> ServiceSettings:
        return settings_of(
            service, nats_account=nats_account, database_url=database.url(service), tokens_file=tokens_file
        )

    return settings


@pytest.fixture(scope="session")
def servers_directory() -> Callable[[str], Path]:
    """Directories for what servers write, named after what they are for. They are gone when the run has ended."""
    run = Path(os.environ[_RUN_DIRECTORY])

    def make(name: str) -> Path:
        run.mkdir(mode=0o700, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=run))

    return make


@pytest.fixture
def own_nats(servers_directory: Callable[[str], Path]) -> Iterator[tuple[EmbeddedNats, NatsAccount]]:
    """A server on a port that stays its own over restarts, and its only account. No streams are made in it."""
    secret, directory = "own", servers_directory("own-nats")
    server = EmbeddedNats(directory, accounts=accounts(count=1, secret=secret), port=free_port())
    with server:
        yield server, NatsAccount(server.url, secret, account_prefix(0))
    shutil.rmtree(directory)


@pytest.fixture
def own_postgres(servers_directory: Callable[[str], Path]) -> Iterator[EmbeddedPostgres]:
    """A server on a port that stays its own over restarts."""
    directory = servers_directory("own-postgres")
    server = EmbeddedPostgres(directory, password="own", port=free_port(), shared_buffers_mebibytes=16)
    try:
        with server:
            yield server
    finally:
        server.remove()


def settings_of(
    service: str, *, nats_account: NatsAccount, database_url: SecretStr, tokens_file: Path
) -> ServiceSettings:
    """Settings as the supervisor would hand them to a service."""
    return ServiceSettings(
        service=service,
        nats_url=nats_account.url,
        nats_user=nats_account.user(service),
        nats_password=SecretStr(nats_account.password(service)),
        database_url=database_url,
        http_port=0,
        tokens_file=tokens_file,
        catalogue_file=CATALOGUE_FILE,
        lease_seconds=1.0,
    )


async def refresh_streams(account: NatsAccount) -> None:
    """Make every stream that was used anew, empty, with its consumers, as the contract says."""
    async with operator(account.url, account.password(OPERATOR), user=account.user(OPERATOR)) as jetstream:
        found = {stream.config.name: stream.state for stream in await jetstream.streams_info()}
        for stream in STREAMS:
            consumers = [consumer for consumer in CONSUMERS if consumer.stream == stream.name]
            state = found.get(stream.name)
            if state is not None and state.last_seq == 0 and state.consumer_count == len(consumers):
                continue
            if state is not None:
                await jetstream.delete_stream(stream.name)
            await jetstream.add_stream(stream_config(stream))
            await asyncio.gather(
                *(jetstream.add_consumer(stream.name, consumer_config(consumer)) for consumer in consumers)
            )


def _drop_database(database: Database) -> None:
    with psycopg.connect(database.admin_url, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(database.name)))
