"""`scrip alias`: which accounts the names stand for that publishers call them by."""

from typing import Annotated

import httpx2
import typer
from rich.console import Console

from infra.errors import StackError
from infra.listing import show_rows
from infra.service_api import Json, NotFound, ServiceApi, in_path

alias = typer.Typer(
    name="alias", help="What publishers call accounts that have another id: add, list, delete.", no_args_is_help=True
)

Subject = Annotated[str, typer.Argument(help="What events say in `subject`.")]


class Directory(ServiceApi):
    """The aliases of a running metering."""

    __slots__ = ()

    def add(self, subject: str, account: str) -> Json:
        """The alias, also if it was there already."""
        return self._answer("PUT", _path(subject), json={"account": account})

    def find(self, subject: str) -> Json | None:
        """An alias, or None."""
        try:
            return self.get(_path(subject))
        except NotFound:
            return None

    def delete(self, subject: str) -> None:
        """Forget it."""
        try:
            response = self.client.delete(self.url + _path(subject))
            answer: Json = {} if response.is_success else response.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise self._away(error) from error
        if not response.is_success:
            raise self._refused(response.status_code, answer)

    def page(self, *, limit: int, after: str | None) -> Json:
        """Aliases, and where the next page begins."""
        return self.get("/api/v1/aliases", {"limit": limit} | ({"after": after} if after is not None else {}))


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(alias)


@alias.command("add")
def add_alias(
    subject: Subject, account: Annotated[str, typer.Argument(help="The account; it may open later.")]
) -> None:
    """Have a name stand for an account. Use that waited under it is charged soon, and all that comes.

    A name that stands for another account is deleted first. Once more changes nothing.
    """
    found = _directory().add(subject, account)
    _say(f"{found['subject']} stands for {found['account']} since {found['recorded_at']} (by {found['recorded_by']})")


@alias.command("list")
def list_aliases(
    *,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many.")] = 100,
    after: Annotated[str | None, typer.Option(help="The cursor that the page before named.")] = None,
) -> None:
    """Show names and the accounts they stand for."""
    page = _directory().page(limit=limit, after=after)
    rows = [(each["subject"], each["account"], each["recorded_at"], each["recorded_by"]) for each in page["aliases"]]
    show_rows(Console(), ("subject", "account", "since", "by"), rows, otherwise="There are no aliases.")
    if page["next_after"]:
        _say(f"more: --after {page['next_after']}")


@alias.command("delete")
def delete_alias(subject: Subject) -> None:
    """Forget a name. What was charged through it stays as it is; what comes under it waits."""
    directory = _directory()
    found = directory.find(subject)
    if found is None:
        raise StackError(f"{subject} is no alias: see `scrip alias list`.")
    directory.delete(subject)
    _say(f"{subject} does not stand for {found['account']} any more")


def _directory() -> Directory:
    return Directory.running("metering")


def _path(subject: str) -> str:
    return f"/api/v1/aliases/{in_path(subject)}"


def _say(sentence: str) -> None:
    Console().print(sentence, markup=False, highlight=False, soft_wrap=True)
