"""Runs the whole stack on one machine: servers, then services, then the demo; restarts what dies; stops in order.

It keeps no business state. Everything it starts dies with it, and it copes with what a killed predecessor left.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final, Protocol

import httpx2
import psycopg
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import DBAPIError

from contracts.streams import OPERATOR, USERS
from infra import leftovers, platform_secret, processes, state
from infra.errors import ChildrenKeepDying, PortForbidden, PortInUse, ServerFailed, StackError
from infra.nats_config import Account, accounts_config
from infra.provision import Provisioned, operator, provision
from infra.servers import LOOPBACK, SUPERUSER, EmbeddedNats, EmbeddedPostgres, port_is_free
from infra.services import (
    KEYVAULT,
    OPENAI_KEY_VARIABLE,
    PROVIDER,
    SERVICES,
    SIGNING_KEY_VARIABLE,
    STRIPE,
    STRIPE_KEY_VARIABLE,
    Service,
    Surroundings,
    chosen_services,
    openai_key,
    simulators,
)
from infra.state import Credentials, Layout, Run
from services.keyvault.store import make_keyring_file
from services.kit.catalogue import InvalidCatalogue, load_catalogue
from services.kit.database_setup import bootstrap, migrate
from services.ledger.signing import InvalidSigningKey, ensure_key_files

DATABASE: Final = "scrip"
CATALOGUE_FILE: Final = Path(__file__).parent / "catalogue" / "catalogue.toml"
DEMO_MODULE: Final = "infra.demo"

# As a shell counts an end by SIGINT.
INTERRUPTED_EXIT_CODE: Final = 130

POLL_SECONDS: Final = 0.1
READY_SECONDS_MAX: Final = 60.0
SERVICE_STOP_SECONDS_MAX: Final = 15.0
DEATHS_MAX: Final = 5
DEATHS_WITHIN_SECONDS: Final = 60.0
# For tests that kill on purpose: a shorter memory of deaths.
DEATHS_WITHIN_VARIABLE: Final = "SCRIP_DEATHS_WITHIN_SECONDS"
RESTART_SECONDS_FIRST: Final = 0.2
RESTART_SECONDS_MAX: Final = 10.0
LOG_BYTES_MAX: Final = 8 << 20
LOG_LINES_SHOWN: Final = 5


class Interrupted(Exception):
    """SIGINT or SIGTERM came: stop what was started and end."""


class Managed(Protocol):
    """A process that is kept running. `start` returns once it is started; a server's waits until it answers."""

    @property
    def title(self) -> str: ...
    @property
    def log_file(self) -> Path: ...
    @property
    def process(self) -> "subprocess.Popen[bytes] | None": ...
    def start(self) -> None: ...
    def stop(self) -> None: ...


class ServiceProcess:
    """A service's process, told everything by its environment."""

    def __init__(self, service: Service, *, environment: dict[str, str], log_file: Path) -> None:
        self.title = service.name
        self.log_file = log_file
        self.process: subprocess.Popen[bytes] | None = None
        self._service = service
        self._environment = environment

    def start(self) -> None:
        self.process = processes.spawn(
            [sys.executable, "-m", self._service.module],
            # It loses nothing by it, and would wait in vain for servers that end at the same moment.
            on_starters_death=signal.SIGKILL,
            environment=self._environment,
            log_file=self.log_file,
        )

    def stop(self) -> None:
        stop_together([self])


def stop_together(services: Iterable[ServiceProcess]) -> None:
    """Stop services at once, so that the slowest one sets the time and not their sum."""
    running = [service.process for service in services if service.process is not None]
    processes.stop(running, signal.SIGTERM, seconds_each=SERVICE_STOP_SECONDS_MAX)


@dataclass(frozen=True, slots=True)
class Stack:
    """Everything that is known of a stack before it runs: where it lies, its ports, its credentials, its services."""

    layout: Layout
    ports: dict[str, int]
    credentials: Credentials
    services: tuple[Service, ...] = SERVICES

    @classmethod
    def prepared(cls, layout: Layout, *, services: tuple[Service, ...] = SERVICES) -> "Stack":
        """Make the directory and the missing credentials. The caller holds the directory's lock."""
        roles = [SUPERUSER, *_roles(services)]
        credentials = state.ensure_credentials(layout, nats_users=[user.name for user in USERS], postgres_roles=roles)
        make_keyring_file(layout.keyring_file)
        try:
            ensure_key_files(
                layout.ledger_signing_key_file,
                layout.ledger_public_keys_file,
                given=os.environ.get(SIGNING_KEY_VARIABLE),
            )
        except InvalidSigningKey as error:
            raise StackError(f"The ledger cannot sign: {error}.") from error
        return cls(layout=layout, ports=state.ports(), credentials=credentials, services=services)

    def postgres(self) -> EmbeddedPostgres:
        return EmbeddedPostgres(
            self.layout.postgres,
            password=self.credentials.postgres[SUPERUSER],
            port=self.ports["postgres"],
            log_file=self.layout.logs / "postgres.log",
        )

    def nats(self) -> EmbeddedNats:
        return EmbeddedNats(
            self.layout.nats,
            accounts=accounts_config([Account(name="SCRIP", passwords=self.credentials.nats)]),
            port=self.ports["nats"],
            monitor_port=self.ports["nats_monitor"],
            log_file=self.layout.logs / "nats.log",
        )

    @property
    def nats_url(self) -> str:
        return f"nats://{LOOPBACK}:{self.ports['nats']}"

    def service_url(self, name: str) -> str:
        return f"http://{LOOPBACK}:{self.ports[name]}"

    def database_url(self, role: str) -> SecretStr:
        database = "postgres" if role == SUPERUSER else DATABASE
        password = self.credentials.postgres[role]
        return SecretStr(f"postgresql://{role}:{password}@{LOOPBACK}:{self.ports['postgres']}/{database}")

    def service_environment(self, service: Service) -> dict[str, str]:
        """What a service's settings are read from, on top of our own environment."""
        told = self.child_environment()
        if service.has_nats:
            told |= {
                "SCRIP_SERVICE": service.role,
                "SCRIP_NATS_URL": self.nats_url,
                "SCRIP_NATS_USER": service.role,
                "SCRIP_NATS_PASSWORD": self.credentials.nats[service.role],
                "SCRIP_HTTP_PORT": str(self.ports[service.name]),
                "SCRIP_TOKENS_FILE": str(self.layout.tokens_file),
                "SCRIP_CATALOGUE_FILE": str(CATALOGUE_FILE),
            }
        if service.has_schema:
            told["SCRIP_DATABASE_URL"] = self.database_url(service.role).get_secret_value()
        return told | service.told(Surroundings(self.layout, self.ports, self.credentials))

    def child_environment(self) -> dict[str, str]:
        """Our own, without what signs: who is to have that is told it."""
        directory = str(self.layout.directory)
        ours = {name: value for name, value in os.environ.items() if name != SIGNING_KEY_VARIABLE}
        return ours | {leftovers.CHILD_VARIABLE: directory, state.STATE_VARIABLE: directory}

    def migrate(self) -> None:
        """Create roles and schemas, and bring every service's schema to its newest version. Postgres must run."""
        passwords = {role: SecretStr(self.credentials.postgres[role]) for role in _roles(self.services)}
        try:
            bootstrap(self.database_url(SUPERUSER), database=DATABASE, passwords=passwords)
            for service in self.services:
                if service.has_schema and service.beside is None:
                    migrate(service=service.name, owner_url=self.database_url(_owner(service)))
        except (psycopg.Error, DBAPIError) as error:
            why = str(error).strip().splitlines()[0]
            raise StackError(f"The schemas could not be brought up to date ({why}): nothing was started.") from error

    def provision(self, *, repair: bool) -> Provisioned:
        """Create and compare streams and consumers. NATS must run."""

        async def connected() -> Provisioned:
            async with operator(self.nats_url, self.credentials.nats[OPERATOR]) as jetstream:
                return await provision(jetstream, repair=repair)

        return asyncio.run(connected())


@dataclass(slots=True)
class _Kept:
    """A managed process and what is remembered of its deaths."""

    managed: Managed
    deaths: deque[float] = field(default_factory=deque)
    start_at: float | None = None


class Supervisor:
    """Starts, watches and stops. Every method runs in the main thread: see processes.spawn."""

    def __init__(self, stack: Stack, console: Console) -> None:
        self._stack = stack
        self._console = console
        self._kept: list[_Kept] = []
        self._deaths_within_seconds = _deaths_within_seconds()
        self._interrupted = False

    def run(self, *, demo_module: str | None, stay: bool) -> int:
        """Bring everything up, play the demo if there is one, stay until a signal. The exit code is the demo's."""
        code = INTERRUPTED_EXIT_CODE
        with self._signals(), self._stopping(), suppress(Interrupted):
            self._start_all()
            code = self._demo(demo_module) if demo_module else 0
            if stay:
                self._show()
                while True:
                    self._pause()
        self._console.print("Scrip has stopped.", markup=False)
        return code

    def interrupt(self) -> None:
        """Ask for an orderly end. Safe in a signal handler, and as often as wanted."""
        self._interrupted = True

    def _start_all(self) -> None:
        stack = self._stack
        _check_catalogue()
        leftovers.stop(stack.layout)
        for name, title in (("nats", "NATS"), ("nats_monitor", "NATS monitoring"), ("postgres", "PostgreSQL")):
            self._require_free(name, title)
        for service in stack.services:
            self._require_free(service.name, f"the service {service.name}")
        self._start(stack.postgres())
        self._start(stack.nats())
        stack.migrate()
        provisioned = stack.provision(repair=False)
        if provisioned.refusals:
            raise StackError(str(provisioned.refusals[0]))
        for drift in provisioned.drifts:
            self._console.print(str(drift), markup=False)
        if provisioned.drifts:
            self._console.print("Streams have drifted: run `scrip provision --repair`.", markup=False)
        for service in stack.services:
            self._start(
                ServiceProcess(
                    service,
                    environment=stack.service_environment(service),
                    log_file=stack.layout.logs / f"{service.name}.log",
                )
            )
        self._console.print("PostgreSQL and NATS run; waiting for the services …", markup=False)
        for service in stack.services:
            self._await_ready(service)
        self._say_who_stands_in()
        if KEYVAULT in (service.name for service in stack.services):
            platform_secret.store(
                keyvault_url=stack.service_url(KEYVAULT),
                token=stack.credentials.tokens["operator"],
                provider="openai",
                secret=openai_key(),
            )

    def _say_who_stands_in(self) -> None:
        running = {service.name for service in self._stack.services}
        for simulator, variable in ((PROVIDER, OPENAI_KEY_VARIABLE), (STRIPE, STRIPE_KEY_VARIABLE)):
            if simulator.name in running:
                url = self._stack.service_url(simulator.name)
                self._console.print(
                    f"No {variable} is set: a simulated {simulator.name} stands in, at {url}.", markup=False
                )

    def _require_free(self, name: str, title: str) -> None:
        port = self._stack.ports[name]
        try:
            free = port_is_free(port)
        except PermissionError as error:
            raise PortForbidden(port, title, state.port_variable(name)) from error
        if not free:
            raise PortInUse(port, title, state.port_variable(name))

    def _start(self, managed: Managed) -> None:
        self._check_interrupted()
        rotate(managed.log_file)
        self._kept.append(_Kept(managed))
        managed.start()
        self._write_run_file()

    def _await_ready(self, service: Service) -> None:
        deadline = time.monotonic() + READY_SECONDS_MAX
        while (why := unready(self._stack.service_url(service.name))) is not None:
            if time.monotonic() > deadline:
                log = self._stack.layout.logs / f"{service.name}.log"
                raise ServerFailed(
                    f"{service.name} was not ready within {READY_SECONDS_MAX:.0f} seconds ({why}): see {log}."
                )
            self._pause()

    def _demo(self, module: str) -> int:
        """The demo is a process of its own, on our terminal; meanwhile everything else is watched as ever."""
        process = processes.spawn(
            [sys.executable, "-m", module],
            on_starters_death=signal.SIGKILL,
            environment=self._stack.child_environment(),
        )
        try:
            while process.poll() is None:
                self._pause()
        finally:
            processes.stop([process], signal.SIGTERM, seconds_each=5.0)
        if process.returncode != 0:
            self._console.print(f"The demo {processes.ending(process.returncode)}.", style="bold red", markup=False)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def _pause(self) -> None:
        """A moment of waiting, in which the dead are restarted and a signal ends everything."""
        self._check_interrupted()
        for kept in self._kept:
            self._keep_running(kept)
        time.sleep(POLL_SECONDS)

    def _keep_running(self, kept: _Kept) -> None:
        now = time.monotonic()
        managed = kept.managed
        if kept.start_at is None:
            if managed.process is not None and managed.process.poll() is not None:
                self._bury(kept, now, processes.ending(managed.process.returncode))
        elif now >= kept.start_at:
            kept.start_at = None
            try:
                managed.start()
            except StackError as error:
                self._bury(kept, now, f"did not start again ({str(error).rstrip('.')})")
            else:
                self._write_run_file()

    def _bury(self, kept: _Kept, now: float, how: str) -> None:
        title = kept.managed.title
        kept.deaths.append(now)
        while kept.deaths[0] < now - self._deaths_within_seconds:
            kept.deaths.popleft()
        if len(kept.deaths) >= DEATHS_MAX:
            raise ChildrenKeepDying(
                f"{title} {how}, for the {len(kept.deaths)}th time within {self._deaths_within_seconds:g} seconds, "
                f"so everything was stopped: see {kept.managed.log_file}, which ends with\n"
                + last_lines(kept.managed.log_file)
            )
        delay = min(RESTART_SECONDS_FIRST * 2 ** (len(kept.deaths) - 1), RESTART_SECONDS_MAX)
        kept.start_at = now + delay
        self._console.print(f"{title} {how}: starting it again in {delay:.1f} s.", style="yellow", markup=False)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Stop services, then NATS, then Postgres, whatever happened; each is tried even if another's stop failed."""
        try:
            yield
        finally:
            with ExitStack() as last_first:
                last_first.callback(self._stack.layout.run_file.unlink, missing_ok=True)
                for kept in self._kept:
                    if not isinstance(kept.managed, ServiceProcess):
                        last_first.callback(kept.managed.stop)
                services = [kept.managed for kept in self._kept if isinstance(kept.managed, ServiceProcess)]
                last_first.callback(stop_together, services)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self.interrupt()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _check_interrupted(self) -> None:
        if self._interrupted:
            raise Interrupted

    def _write_run_file(self) -> None:
        pids = {
            kept.managed.title: kept.managed.process.pid
            for kept in self._kept
            if kept.managed.process is not None and kept.managed.process.poll() is None
        }
        run = Run(supervisor=os.getpid(), ports=self._stack.ports, processes=pids)
        state.write_run(self._stack.layout, run)

    def _show(self) -> None:
        stack = self._stack
        table = Table("what", "where", "credentials", title="Scrip is running", title_justify="left")
        for service in stack.services:
            table.add_row(service.name, stack.service_url(service.name), service.credentials)
        table.add_row("NATS", stack.nats_url, "user and password: nats.<user>")
        table.add_row("NATS monitoring", stack.service_url("nats_monitor"), "none")
        table.add_row(
            "PostgreSQL", f"{LOOPBACK}:{stack.ports['postgres']}/{DATABASE}", "role and password: postgres.<role>"
        )
        self._console.print(table)
        self._console.print(
            f"Credentials lie in {state.shown(stack.layout.credentials_file)}", soft_wrap=True, markup=False
        )
        self._console.print(f"Logs lie in {state.shown(stack.layout.logs)}", soft_wrap=True, markup=False)
        self._console.print("Ctrl-C stops it; the next start continues from here.", markup=False)


def up(*, demo_module: str | None, stay: bool, console: Console, services: tuple[Service, ...] | None = None) -> int:
    """Run the stack of the current state directory. Returns the exit code of the whole.

    `services`: all of ours and the simulators that are needed, unless others are named.
    """
    if services is None:
        services = (*simulators(), *chosen_services())
    layout = state.locate()
    state.prepare(layout)
    with state.locked(layout):
        return Supervisor(Stack.prepared(layout, services=services), console).run(demo_module=demo_module, stay=stay)


def unready(url: str) -> str | None:
    """Why a service is not ready, or None if it is."""
    try:
        response = httpx2.get(f"{url}/readyz", timeout=2.0, trust_env=False)
    except httpx2.HTTPError as error:
        return f"{url} does not answer: {error}"
    return (
        None
        if response.status_code == httpx2.codes.OK
        else f"/readyz says {response.status_code}: {response.text[:200]}"
    )


def rotate(log_file: Path) -> None:
    """Keep one predecessor of a log that has grown long."""
    if log_file.exists() and log_file.stat().st_size > LOG_BYTES_MAX:
        log_file.replace(log_file.with_name(f"{log_file.name}.1"))


def last_lines(log_file: Path, *, count: int = LOG_LINES_SHOWN) -> str:
    """The end of a log."""
    if not log_file.exists():
        return "(nothing)"
    with log_file.open("rb") as file:
        file.seek(max(0, log_file.stat().st_size - 16_384))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-count:]) or "(nothing)"


def _deaths_within_seconds() -> float:
    text = os.environ.get(DEATHS_WITHIN_VARIABLE) or f"{DEATHS_WITHIN_SECONDS:g}"
    if not text.isdecimal() or int(text) == 0:
        raise StackError(f"{DEATHS_WITHIN_VARIABLE} must be a number of seconds, not {text!r}.")
    return float(text)


def _check_catalogue() -> None:
    """Every service would refuse to start on a catalogue that cannot be used: say so once, beforehand."""
    try:
        load_catalogue(CATALOGUE_FILE)
    except (InvalidCatalogue, OSError) as error:
        raise StackError(f"The catalogue cannot be used ({error}): correct {CATALOGUE_FILE}.") from error


def _roles(services: Iterable[Service]) -> list[str]:
    return [
        role
        for service in services
        if service.has_schema and service.beside is None
        for role in (service.role, _owner(service))
    ]


def _owner(service: Service) -> str:
    return f"{service.role}_owner"
