"""What the local stack keeps in `.scrip/`: its layout, the generated secrets, the lock against a second supervisor.

The directory is 0700 and every file 0600. Values that exist are kept; only missing ones are generated.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from infra.errors import AlreadyRunning, DiskFull, NotReadable, StackError, from_os_error
from services.kit.files import write_private

STATE_VARIABLE: Final = "SCRIP_STATE"
DISK_FREE_BYTES_MIN: Final = 1 << 30

PORTS: Final[Mapping[str, int]] = {
    "gateway": 8080,
    "metering": 8081,
    "ledger": 8082,
    "billing": 8083,
    "keyvault": 8084,
    "console": 8085,
    "provider": 8086,
    "stripe": 8087,
    "ledger_reader": 8088,
    "nats": 8090,
    "nats_monitor": 8091,
    "postgres": 8092,
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who calls our HTTP APIs with a bearer token."""

    name: str
    scopes: tuple[str, ...]


PRINCIPALS: Final = (
    Principal(
        "operator",
        (
            "usage:write",
            "metering:read",
            "ledger:read",
            "ledger:write",
            "keyvault:read",
            "keyvault:write",
            "billing:read",
            "billing:write",
            "operate",
        ),
    ),
    Principal("demo", ("usage:write",)),
    Principal("gateway", ("metering:read",)),
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a state directory."""

    directory: Path

    @property
    def nats(self) -> Path:
        return self.directory / "nats"

    @property
    def postgres(self) -> Path:
        return self.directory / "postgres"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def credentials_file(self) -> Path:
        """Passwords and tokens in the clear: for the supervisor, the CLI and the user."""
        return self.directory / "credentials.json"

    @property
    def tokens_file(self) -> Path:
        """Hashes of the tokens, their principals and scopes: for the services."""
        return self.directory / "service-tokens.json"

    @property
    def keyring_file(self) -> Path:
        """The keys that seal provider secrets: for keyvault alone."""
        return self.directory / "keyring.json"

    @property
    def ledger_signing_key_file(self) -> Path:
        """The private key that signs the ledger's heads: for the ledger alone."""
        return self.directory / "ledger-signing.pem"

    @property
    def ledger_public_keys_file(self) -> Path:
        """The public halves of all keys that ever signed the ledger's heads: for audits."""
        return self.directory / "ledger-signing-public.pem"

    @property
    def audit_file(self) -> Path:
        """Up to where the last audit of the ledger got, and what it found there."""
        return self.directory / "audit.json"

    @property
    def run_file(self) -> Path:
        """What runs at the moment: process ids and ports."""
        return self.directory / "run.json"

    @property
    def lock_file(self) -> Path:
        return self.directory / "lock"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Passwords by NATS user, passwords by Postgres role, tokens by principal, and what simulated Stripe signs with."""

    nats: dict[str, str] = field(default_factory=dict, repr=False)
    postgres: dict[str, str] = field(default_factory=dict, repr=False)
    tokens: dict[str, str] = field(default_factory=dict, repr=False)
    webhook_secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Run:
    """What a supervisor says of itself: its process id, its ports and its children's process ids, by name."""

    supervisor: int
    ports: dict[str, int]
    processes: dict[str, int]


def locate() -> Layout:
    """The state directory: SCRIP_STATE, or `.scrip` in the current directory."""
    return Layout(Path(os.environ.get(STATE_VARIABLE) or ".scrip").resolve())


def ports() -> dict[str, int]:
    """Every port by name: the default, or SCRIP_PORT_<NAME>."""
    chosen = {name: _port(port_variable(name), default) for name, default in PORTS.items()}
    by_number: dict[int, str] = {}
    for name, port in chosen.items():
        if port in by_number:
            raise StackError(
                f"Port {port} is given to both {by_number[port]} and {name}: change {port_variable(name)}."
            )
        by_number[port] = name
    return chosen


def current_ports(layout: Layout) -> dict[str, int]:
    """The ports of the stack that runs on this directory, or those the next one will take."""
    run = current_run(layout)
    return run.ports if run else ports()


def current_run(layout: Layout) -> Run | None:
    """What runs on this directory, or None if no supervisor does."""
    if holder(layout) is None:
        return None
    try:
        return Run(**json.loads(layout.run_file.read_text()))
    except FileNotFoundError:
        return None


def needed_run(layout: Layout) -> Run:
    """What runs on this directory. StackError if nothing does."""
    run = current_run(layout)
    if run is None:
        raise StackError(f"Scrip is not running on {layout.directory}: start it with `make run` or `scrip up`.")
    return run


def port_variable(name: str) -> str:
    """The environment variable that moves a port."""
    return f"SCRIP_PORT_{name.upper()}"


def prepare(layout: Layout) -> None:
    """Make the directory, or refuse: no permission, no space."""
    try:
        for directory in (layout.directory, layout.logs):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
        if shutil.disk_usage(layout.directory).free < DISK_FREE_BYTES_MIN:
            raise DiskFull(layout.directory)
        write_private(layout.directory / "writable", "")
        (layout.directory / "writable").unlink()
    except OSError as error:
        if known := from_os_error(error, layout.directory):
            raise known from error
        raise


@contextlib.contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """Hold the state directory for one supervisor. The kernel lets go of it however that one ends."""
    descriptor = os.open(layout.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(layout.directory, holder(layout)) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def holder(layout: Layout) -> int | None:
    """The process id of the supervisor that holds the directory, or None if nobody does."""
    try:
        with layout.lock_file.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read()
                return int(text) if text.isdigit() else None
    except FileNotFoundError:
        pass
    except PermissionError as error:
        raise NotReadable(layout.directory) from error
    return None


def load_credentials(layout: Layout) -> Credentials:
    """What was generated so far."""
    try:
        return Credentials(**json.loads(layout.credentials_file.read_text()))
    except FileNotFoundError:
        return Credentials()
    except PermissionError as error:
        raise StackError(
            f"{layout.credentials_file} cannot be read by this user: use the one that started it."
        ) from error
    except (ValueError, TypeError) as error:
        raise StackError(
            f"{layout.credentials_file} is damaged: restore it, or run `make clean` to start anew."
        ) from error


def ensure_credentials(
    layout: Layout,
    *,
    nats_users: Iterable[str],
    postgres_roles: Iterable[str],
    principals: Iterable[Principal] = PRINCIPALS,
) -> Credentials:
    """Generate what is missing, keep what is there, and write both files."""
    known = load_credentials(layout)
    wanted = tuple(principals)
    credentials = Credentials(
        nats=known.nats | {user: _secret() for user in nats_users if user not in known.nats},
        postgres=known.postgres | {role: _secret() for role in postgres_roles if role not in known.postgres},
        tokens=known.tokens | {one.name: f"scrip_{_secret()}" for one in wanted if one.name not in known.tokens},
        webhook_secret=known.webhook_secret or f"whsec_{_secret()}",
    )
    write_private(layout.credentials_file, _json(asdict(credentials)))
    hashes = [
        {
            "sha256": hashlib.sha256(credentials.tokens[one.name].encode()).hexdigest(),
            "principal": one.name,
            "scopes": list(one.scopes),
        }
        for one in wanted
    ]
    write_private(layout.tokens_file, _json(hashes))
    return credentials


def write_run(layout: Layout, run: Run) -> None:
    """Tell others what runs."""
    write_private(layout.run_file, _json(asdict(run)))


def remove(layout: Layout) -> None:
    """Remove the directory and everything in it."""
    shutil.rmtree(layout.directory)


def shown(path: Path) -> str:
    """A path as the user would write it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _secret() -> str:
    # Letters, digits, - and _ only: it goes into URLs and configuration files as it is.
    return secrets.token_urlsafe(24)


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _port(variable: str, default: int) -> int:
    text = os.environ.get(variable)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise StackError(f"{variable} is {text!r}: it must be a port number between 1 and 65535.")
    return int(text)
