"""`scrip keyring`: a new key for keyvault's key ring, and every stored secret under it. No key is ever shown."""

from pathlib import Path

import typer
from rich.console import Console

from infra import state
from infra.errors import StackError
from infra.service_api import ServiceApi
from infra.services import KEYVAULT
from services.keyvault.domain.keyring import Keyring
from services.keyvault.store import rotate_keyring_file
from services.keyvault.translate import InvalidKeyring

keyring = typer.Typer(
    name="keyring",
    help="The keys that the stored provider secrets are wrapped with: rotate, rewrap.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(keyring)


@keyring.command("rotate")
def rotate() -> None:
    """Add a new version to the key ring and make it current; then, if keyvault runs, rewrap every secret with it.

    New secrets are wrapped with it at once, without a restart. Older versions stay in the file and open what they
    wrapped: take one out only when nothing is under it any more, not even in a backup you want to restore.
    Exit code 1 if a secret could not be rewrapped.
    """
    layout = state.locate()
    ring = _rotated(layout.keyring_file)
    console = Console()
    console.print(f"version {ring.current} is current; {_listed(ring.versions)} can be opened", highlight=False)
    if state.current_run(layout) is None:
        console.print("keyvault does not run: once it does, run scrip keyring rewrap", highlight=False)
        return
    _rewrap(console, version=ring.current)


@keyring.command("rewrap")
def rewrap() -> None:
    """Wrap every secret's data key with the current version, while everything goes on. Safe to repeat.

    Exit code 1 if a secret could not be rewrapped: it stays as it was.
    """
    _rewrap(Console(), version=None)


def _rotated(path: Path) -> Keyring:
    try:
        return rotate_keyring_file(path)
    except FileNotFoundError as error:
        raise StackError(f"There is no key ring at {path}: the first `scrip up` makes it, or restore it.") from error
    except InvalidKeyring as error:
        raise StackError(f"The key ring cannot be rotated ({error}): restore {path}; it was not changed.") from error
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise StackError(f"The key ring at {path} cannot be written ({why}): it was not changed.") from error


def _rewrap(console: Console, *, version: int | None) -> None:
    """`version`: what it must be rewrapped with, if that is known."""
    keyvault = ServiceApi.running(KEYVAULT)
    try:
        done = keyvault.post("/v1/keyring/rewrap")
    except StackError as error:
        raise StackError(f"{str(error).rstrip('.')}. Nothing is lost: run `scrip keyring rewrap` again.") from error
    if version is not None and done["ring_version"] != version:
        raise StackError(
            f"Keyvault wraps with version {done['ring_version']}, not {version}: it reads another key ring, "
            "see its log and SCRIP_KEYRING_FILE."
        )
    console.print(f"{done['rewrapped']} secrets rewrapped with version {done['ring_version']}", highlight=False)
    by_version = keyvault.get("/v1/keyring")["secrets_by_version"]
    for used in sorted(by_version, key=int):
        console.print(f"  version {used}: {by_version[used]} secrets", highlight=False)
    for record in done["undecryptable"]:
        console.print(f"  could not be opened, and stays as it was: {record}", highlight=False, soft_wrap=True)
    if done["undecryptable"]:
        raise typer.Exit(1)


def _listed(versions: tuple[int, ...]) -> str:
    numbers = ", ".join(map(str, versions))
    return f"versions {numbers}" if len(versions) > 1 else f"version {numbers}"
