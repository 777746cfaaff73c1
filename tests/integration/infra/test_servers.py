"""Laws of the embedded servers: durable, private, never orphaned, and clear about what stops them."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psycopg
import pytest

from infra import processes
from infra.errors import PortInUse, ServerFailed
from infra.servers import ISOLATION_VARIABLE, LOOPBACK, EmbeddedNats, EmbeddedPostgres, free_port, port_is_free

ROOT = os.geteuid() == 0
REPOSITORY = Path(__file__).parents[3]

STARTER = """
import sys, time
from pathlib import Path
from infra.servers import EmbeddedNats, EmbeddedPostgres
directory = Path(sys.argv[1])
postgres = EmbeddedPostgres(directory / "postgres", password="secret")
nats = EmbeddedNats(directory / "nats")
postgres.start(), nats.start()
print(postgres.process.pid, nats.process.pid, flush=True)
time.sleep(60)
"""


def postgres(directory: Path, *, port: int | None = None, password: str = "secret") -> EmbeddedPostgres:
    return EmbeddedPostgres(directory / "postgres", password=password, port=port, shared_buffers_mebibytes=16)


def nats(directory: Path, *, port: int | None = None, monitor_port: int = 0) -> EmbeddedNats:
    return EmbeddedNats(directory / "nats", port=port, monitor_port=monitor_port)


def pid(server: EmbeddedPostgres | EmbeddedNats) -> int:
    assert server.process is not None
    return server.process.pid


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_postgres_keeps_what_was_committed_and_is_set_to_keep_it(tmp_path: Path) -> None:
    with postgres(tmp_path) as server, psycopg.connect(server.url()) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
        rows = connection.execute(
            "SELECT name, setting FROM pg_settings WHERE name IN "
            "('fsync', 'synchronous_commit', 'full_page_writes', 'data_checksums', 'password_encryption')"
        ).fetchall()
        version = connection.info.server_version
    assert dict(rows) == {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "data_checksums": "on",
        "password_encryption": "scram-sha-256",
    }
    assert version >= 180000
    with postgres(tmp_path) as server, psycopg.connect(server.url()) as connection:
        assert connection.execute("SELECT number FROM kept").fetchone() == (7,)


def test_postgres_lets_nobody_in_without_the_password(tmp_path: Path) -> None:
    with postgres(tmp_path) as server, pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(server.url(password="wrong"))


def test_the_superusers_password_stays_in_no_file(tmp_path: Path) -> None:
    with postgres(tmp_path, password="quite-secret"):
        pass
    files = [path for path in (tmp_path / "postgres").rglob("*") if path.is_file()]
    assert not [path for path in files if b"quite-secret" in path.read_bytes()]


def test_servers_are_told_nothing_that_services_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A superuser of the database can read what its server was started with."""
    monkeypatch.setenv("SCRIP_LEDGER_SIGNING_KEY", "a private key")
    with postgres(tmp_path) as database, nats(tmp_path) as broker:
        for server in (database, broker):
            assert b"SCRIP_" not in Path(f"/proc/{pid(server)}/environ").read_bytes()


def test_several_servers_run_side_by_side_on_free_ports(tmp_path: Path) -> None:
    with nats(tmp_path / "a") as one, nats(tmp_path / "b") as other:
        assert one.port != other.port
        assert not port_is_free(one.port)
    assert port_is_free(one.port)


def test_a_port_is_given_once_and_never_to_a_connection() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == 200
    with socket.socket() as outgoing:
        outgoing.bind((LOOPBACK, 0))
        assert max(ports) < outgoing.getsockname()[1]


@pytest.mark.parametrize(
    "isolation", ["", pytest.param("user", marks=pytest.mark.skipif(not ROOT, reason="only root becomes another user"))]
)
def test_servers_die_with_their_starter(tmp_path: Path, isolation: str) -> None:
    tmp_path.chmod(0o700)
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {ISOLATION_VARIABLE: isolation},
    )
    try:
        assert starter.stdout is not None
        with starter.stdout:
            pids = {int(number) for number in starter.stdout.readline().split()}
        assert len(pids) == 2
        starter.kill()
        starter.wait()
        assert processes.gone(lambda process: process.pid in pids, within_seconds=2.0)
        with postgres(tmp_path) as server, psycopg.connect(server.url()):
            pass
    finally:
        starter.kill()
        postgres(tmp_path).remove()


def test_servers_that_were_left_running_are_stopped_by_the_next_start(tmp_path: Path) -> None:
    left_postgres, left_nats = postgres(tmp_path), nats(tmp_path)
    left_postgres.start()
    left_nats.start()
    # A paused one does not even hear that its starter died.
    os.kill(pid(left_nats), signal.SIGSTOP)
    with postgres(tmp_path) as server, nats(tmp_path), psycopg.connect(server.url()):
        for left in (left_postgres, left_nats):
            assert left.process is not None
            assert left.process.wait(1) is not None


def test_postgres_starts_again_after_its_main_process_was_killed(tmp_path: Path) -> None:
    server = postgres(tmp_path)
    server.start()
    os.kill(pid(server), signal.SIGKILL)
    with postgres(tmp_path) as again, psycopg.connect(again.url()):
        pass
    server.stop()


def test_a_stale_pid_file_that_names_a_stranger_stops_nobody(tmp_path: Path) -> None:
    with postgres(tmp_path):
        pass
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        data = tmp_path / "postgres" / "data"
        (data / "postmaster.pid").write_text(f"{stranger.pid}\n{data}\n1\n5432\n\n127.0.0.1\n\nready\n")
        with postgres(tmp_path) as server, psycopg.connect(server.url()):
            assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_an_interrupted_first_start_is_begun_anew(tmp_path: Path) -> None:
    half_made = tmp_path / "postgres" / "data.new"
    half_made.mkdir(parents=True)
    (half_made / "PG_VERSION").write_text("18\n")
    with postgres(tmp_path) as server, psycopg.connect(server.url()):
        pass


def test_a_port_in_use_is_named_with_the_way_out(tmp_path: Path, listener: int) -> None:
    with pytest.raises(PortInUse, match=f"Port {listener} for PostgreSQL .* SCRIP_PORT_POSTGRES="):
        postgres(tmp_path, port=listener).start()
    with pytest.raises(PortInUse, match=f"Port {listener} for NATS .* SCRIP_PORT_NATS="):
        nats(tmp_path, port=listener).start()
    with pytest.raises(PortInUse, match=f"Port {listener} for NATS monitoring .* SCRIP_PORT_NATS_MONITOR="):
        nats(tmp_path, monitor_port=listener).start()


def test_another_nats_on_the_port_is_not_taken_for_ours(tmp_path: Path) -> None:
    with nats(tmp_path / "theirs") as theirs, pytest.raises(PortInUse):
        nats(tmp_path / "ours", port=theirs.port).start()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match=r"unknown field .*: see .*server\.log\."):
        EmbeddedNats(tmp_path / "nats", accounts="nonsense: 1\n").start()
    with postgres(tmp_path):
        pass
    (tmp_path / "postgres" / "data" / "PG_VERSION").write_text("17\n")
    with pytest.raises(ServerFailed, match="incompatible"):
        postgres(tmp_path).start()


def test_nats_syncs_every_acknowledged_message(tmp_path: Path) -> None:
    monitor_port = free_port()
    with nats(tmp_path, monitor_port=monitor_port):
        config = httpx2.get(f"http://{LOOPBACK}:{monitor_port}/jsz", trust_env=False).json()["config"]
    assert config["sync_always"] is True


@pytest.mark.skipif(not ROOT, reason="an ordinary user runs it as itself")
def test_as_root_postgres_is_not_root_to_itself(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with postgres(tmp_path) as server:
        inside, outside, _count = Path(f"/proc/{pid(server)}/uid_map").read_text().split()
        if inside == outside:
            pytest.skip("user namespaces are forbidden here: it has a user of its own")
        assert (inside, outside) == (str(processes.NOBODY), "0")
        assert (tmp_path / "postgres" / "data" / "PG_VERSION").exists()


@pytest.mark.skipif(not ROOT, reason="only root becomes another user")
@pytest.mark.parametrize("because", ["it is forbidden", "it cannot reach the directory"])
def test_without_a_namespace_postgres_gets_a_user_and_a_home_that_remove_takes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, because: str
) -> None:
    tmp_path.chmod(0o700)
    if because == "it is forbidden":
        monkeypatch.setenv(ISOLATION_VARIABLE, "user")
    else:
        os.chown(tmp_path, 12345, 12345)
    server = postgres(tmp_path)
    with server, psycopg.connect(server.url()) as connection:
        row = connection.execute("SELECT current_setting('data_directory')").fetchone()
        assert row is not None
        home = Path(row[0]).parent
        user = Path(f"/proc/{pid(server)}").owner()
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    # Once made, the home is used whatever the environment says later.
    monkeypatch.delenv(ISOLATION_VARIABLE, raising=False)
    with postgres(tmp_path) as server, psycopg.connect(server.url()) as connection:
        assert connection.execute("SELECT number FROM kept").fetchone() == (7,)
    assert user.startswith("scrip-") or shutil.which("useradd") is None
    postgres(tmp_path).remove()
    assert not home.exists()
    assert user not in {entry.pw_name for entry in pwd.getpwall()} or user == "nobody"


def test_stopping_is_quick(tmp_path: Path) -> None:
    with postgres(tmp_path) as server, nats(tmp_path):
        psycopg.connect(server.url()).close()
        began = time.monotonic()
    assert time.monotonic() - began < 2.0
