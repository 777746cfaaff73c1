"""`scrip alias` on a stand-in that keeps aliases as metering does."""

import json
from typing import Any
from urllib.parse import unquote

import httpx2
import pytest
import typer
from typer.testing import CliRunner

from infra.commands import aliases
from infra.commands.aliases import Directory
from infra.errors import StackError


class Metering:
    """Aliases, two to a page."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def directory(self) -> Directory:
        return Directory("metering", "http://stand-in", httpx2.Client(transport=httpx2.MockTransport(self.answer)))

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        raw = request.url.raw_path.decode().partition("?")[0]
        subject = unquote(raw.removeprefix("/api/v1/aliases").removeprefix("/"))
        if not subject:
            return self._page(request.url.params.get("after", ""))
        match request.method:
            case "PUT":
                return self._add(subject, str(json.loads(request.content)["account"]))
            case "DELETE" if subject == "stubborn":
                return httpx2.Response(403, json={"detail": "the principal may not"})
            case "DELETE":
                self.kept.pop(subject, None)
                return httpx2.Response(204)
            case _ if subject in self.kept:
                return httpx2.Response(200, json=self._row(subject))
        return httpx2.Response(404, json={"detail": "it is not an alias"})

    def _page(self, after: str) -> httpx2.Response:
        found = [self._row(name) for name in sorted(self.kept) if name > after]
        more = found[1]["subject"] if len(found) > 2 else None
        return httpx2.Response(200, json={"aliases": found[:2], "next_after": more})

    def _add(self, subject: str, account: str) -> httpx2.Response:
        if self.kept.setdefault(subject, account) != account:
            return httpx2.Response(409, json={"detail": f"{subject!r} stands for {self.kept[subject]}"})
        return httpx2.Response(201, json=self._row(subject))

    def _row(self, subject: str) -> dict[str, str]:
        return {
            "subject": subject,
            "account": self.kept[subject],
            "recorded_at": "2026-03-14T12:00:00Z",
            "recorded_by": "operator",
        }


@pytest.fixture
def metering(monkeypatch: pytest.MonkeyPatch) -> Metering:
    made = Metering()
    monkeypatch.setattr(aliases, "_directory", made.directory)
    return made


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    aliases.register(app)
    return CliRunner().invoke(app, ["alias", *arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("subject", ["cus_1", "a/b c?#%", "..", "ü[red]"])
def test_a_name_is_added_shown_and_forgotten(metering: Metering, subject: str) -> None:
    for _ in range(2):
        added = run("add", subject, "acme/ana")
        assert added.exit_code == 0, added.output
        assert f"{subject} stands for acme/ana since 2026-03-14T12:00:00Z (by operator)" in added.stdout
    assert metering.kept == {subject: "acme/ana"}
    assert subject in run("list").stdout
    gone = run("delete", subject)
    assert f"{subject} does not stand for acme/ana any more" in gone.stdout
    assert metering.kept == {}
    assert "There are no aliases." in run("list").stdout


def test_pages_are_the_whole(metering: Metering) -> None:
    metering.kept = dict.fromkeys("abc", "acme")
    first = run("list").stdout
    assert "more: --after b" in first
    rest = run("list", "--after", "b").stdout
    assert "c " in rest
    assert "more" not in rest


def test_what_is_refused_is_one_sentence(metering: Metering) -> None:
    metering.kept = {"cus_1": "acme", "stubborn": "acme"}
    for told, said in (
        (["add", "cus_1", "other"], "'cus_1' stands for acme"),
        (["delete", "nobody"], "nobody is no alias"),
        (["delete", "stubborn"], "may not"),
    ):
        answer = run(*told)
        assert isinstance(answer.exception, StackError)
        assert said in str(answer.exception)
    for command in ("add", "list", "delete"):
        assert "Usage" in run(command, "--help").stdout
