"""The servers of a test run: one Postgres and one NATS for all xdist workers, started by the first test that needs one.

They belong to a process of their own, the keeper, which stops them when the test run ends, however it ends.
"""

import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import psycopg
from psycopg import sql

from contracts.streams import USERS
from infra.nats_config import Account, accounts_config
from infra.servers import SUPERUSER, EmbeddedNats, EmbeddedPostgres

# Workers that xdist starts in place of crashed ones get new numbers.
ACCOUNTS_SPARE: Final = 4
START_SECONDS_MAX: Final = 60.0
STOP_SECONDS_MAX: Final = 20.0

POSTGRES_IMAGE: Final = "postgres:18"
NATS_IMAGE: Final = "nats:2.15"


@dataclass(frozen=True, slots=True)
class Servers:
    """Where the servers are, and the secret all their passwords are made of."""

    postgres_admin_url: str
    nats_url: str
    secret: str
    keeper: int


def password(secret: str, name: str) -> str:
    """The password of a NATS user or a Postgres role in tests."""
    return f"{secret}-{name}"


def account_prefix(index: int) -> str:
    """User names are unique in a NATS server: those of the worker's account begin with this."""
    return f"w{index}-"


def accounts(*, count: int, secret: str) -> str:
    """NATS configuration with `count` accounts, each with all users of the matrix."""
    passwords = {user.name: password(secret, user.name) for user in USERS}
    return accounts_config(
        [Account(name=f"W{index}", passwords=passwords, user_prefix=account_prefix(index)) for index in range(count)]
    )


def running(directory: Path, *, run_pid: int, account_count: int) -> Servers:
    """The servers of the test run whose process is `run_pid`; starts them if nobody has yet."""
    directory.mkdir(mode=0o700, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _read(directory)
        if found is None:
            _start_keeper(directory, run_pid=run_pid, account_count=account_count)
            found = _read(directory)
    if found is None:
        raise RuntimeError(f"the test servers did not start:\n{(directory / 'keeper.log').read_text()}")
    return found


def stop(directory: Path) -> None:
    """Stop the servers, if they were started."""
    found = _read(directory)
    if found is None:
        return
    keeper = os.pidfd_open(found.keeper)
    try:
        signal.pidfd_send_signal(keeper, signal.SIGTERM)
        _wait_for_end(keeper, seconds=STOP_SECONDS_MAX)
    finally:
        os.close(keeper)
        shutil.rmtree(directory, ignore_errors=True)


def keep(directory: Path, *, run_pid: int, account_count: int) -> None:
    """The keeper: start the servers, say where they are, stop them on SIGTERM or when the test run is gone."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(0)

    run = os.pidfd_open(run_pid)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    secret = secrets.token_hex(12)
    start = _containers if os.environ.get("SCRIP_TEST_DOCKER") == "1" else _embedded
    with start(directory, secret=secret, account_count=account_count) as (postgres_admin_url, nats_url):
        found = Servers(postgres_admin_url=postgres_admin_url, nats_url=nats_url, secret=secret, keeper=os.getpid())
        half_written = directory / "servers.new"
        half_written.write_text(json.dumps(asdict(found)))
        half_written.rename(directory / "servers.json")
        _wait_for_end(run, seconds=None)
    # Nobody is left to do it.
    shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _embedded(directory: Path, *, secret: str, account_count: int) -> Iterator[tuple[str, str]]:
    postgres = EmbeddedPostgres(directory / "postgres", password=secret, shared_buffers_mebibytes=64)
    nats = EmbeddedNats(directory / "nats", accounts=accounts(count=account_count, secret=secret))
    try:
        with postgres, nats:
            _let_in_cheaply(postgres, password=secret)
            yield postgres.url(), nats.url
    finally:
        postgres.remove()


def _let_in_cheaply(postgres: EmbeddedPostgres, *, password: str) -> None:
    """Ten thousand connections log in during a run: for most of that time one would compute a password's digest."""
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET scram_iterations = 1")
        admin.execute("SELECT pg_reload_conf()")
        admin.execute("SET scram_iterations = 1")
        admin.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(SUPERUSER), sql.Literal(password)))


@contextmanager
def _containers(_directory: Path, *, secret: str, account_count: int) -> Iterator[tuple[str, str]]:
    # Only here: without Docker nothing of it need be importable.
    from testcontainers.community.nats import NatsContainer  # noqa: PLC0415  # see above
    from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415  # see above

    configuration = (
        'listen: "0.0.0.0:4222"\nmax_payload: 8388608\n'
        'jetstream { store_dir: "/data", sync_interval: always, max_file_store: 274877906944 }\n'
        f"{accounts(count=account_count, secret=secret)}"
    )
    nats = (
        NatsContainer(NATS_IMAGE)
        .with_copy_into_container(configuration.encode(), "/scrip.conf")
        .with_command("-c /scrip.conf")
    )
    postgres = PostgresContainer(
        POSTGRES_IMAGE, username="postgres", password=secret, dbname="postgres", driver=None
    ).with_command("postgres -c max_connections=200")
    with postgres, nats:
        yield postgres.get_connection_url(), nats.nats_uri()


def _start_keeper(directory: Path, *, run_pid: int, account_count: int) -> None:
    with (directory / "keeper.log").open("w") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.servers", str(directory), str(run_pid), str(account_count)],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS_MAX
    while keeper.poll() is None and time.monotonic() < deadline:
        if _read(directory) is not None:
            # Not ours to wait for: it outlives this worker.
            keeper.returncode = 0
            return
        time.sleep(0.02)
    keeper.kill()
    keeper.wait()


def _read(directory: Path) -> Servers | None:
    try:
        return Servers(**json.loads((directory / "servers.json").read_text()))
    except FileNotFoundError:
        return None


def _wait_for_end(process: int, *, seconds: float | None) -> None:
    """Wait until the process behind a pidfd has ended."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.poll(None if seconds is None else seconds * 1000)


def main(arguments: Sequence[str]) -> None:
    directory, run_pid, account_count = arguments
    keep(Path(directory), run_pid=int(run_pid), account_count=int(account_count))


if __name__ == "__main__":
    main(sys.argv[1:])
