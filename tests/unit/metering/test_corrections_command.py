"""`scrip corrections`: asks for what it was told to ask, follows what is under way, and shows what it came to."""

import json
import os
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from infra.commands import corrections
from infra.errors import StackError
from infra.service_api import Archived, ServiceApi

PERIOD = ("--from", "2026-11-01", "--to", "2026-12-01T00:00:00Z", "--reason", "a wrong price")


class Metering:
    """Answers as metering does, and remembers what it was asked. What is begun is done when it is asked for again."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        # Months that are not in its log.
        self.archived: list[str] = []

    def client(self) -> ServiceApi:
        return ServiceApi("metering", "http://stand-in", httpx2.Client(transport=httpx2.MockTransport(self.answer)))

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content) if request.content else None
        path = str(request.url).removeprefix("http://stand-in/api/v1/corrections")
        self.asked.append((request.method, path, body))
        if self.archived and request.method == "POST":
            refused = {"code": "archived", "detail": "use of 2026-01 is archived", "months": self.archived}
            return httpx2.Response(409, json=refused)
        if path.endswith("/events"):
            return httpx2.Response(200, json={"new": 1, "repeated": 0, "total": 1})
        if "/events?" in path:
            return httpx2.Response(200, json={"events": [self.event()], "next_after": None})
        if request.method == "GET" and path.startswith("?"):
            return httpx2.Response(200, json={"corrections": [self.correction("done")], "next_after": None})
        if "dry_run=true" in path:
            return httpx2.Response(200, json=self.correction("dry_run", id=None, complete=False))
        state = "done"
        if request.method == "POST":
            kind = body["kind"] if body and "kind" in body else ""
            state = {"backfill": "staging", "void": "done", "amend": "done"}.get(kind, "running")
        return httpx2.Response(200, json=self.correction(state))

    def event(self) -> dict[str, Any]:
        return {
            "source": "demo", "id": "call-1", "account": "acme", "occurred_at": "2026-11-01T00:00:00Z",
            "from_revision": 0, "to_revision": None, "difference": {"usd": "-0.1"}, "undone": True,
        }  # fmt: skip

    def correction(self, state: str, **more: Any) -> dict[str, Any]:
        return {
            "id": "fix-1", "kind": "void", "state": state, "reason": "a wrong price", "actor": "operator",
            "recorded_at": "2026-11-01T00:00:00Z", "counts": {"events": 1, "corrected": 1, "too_many": 0},
            "difference": {"usd": "-0.1", "calls": "2"}, "done": 0, "of": 10, "complete": True,
            "events": [self.event()], "accounts": [{"account": "acme", "difference": {"usd": "-0.1"}}], **more,
        }  # fmt: skip


@pytest.fixture
def metering(monkeypatch: pytest.MonkeyPatch) -> Metering:
    made = Metering()
    monkeypatch.setattr(corrections, "_metering", made.client)
    monkeypatch.setattr(corrections, "POLL_SECONDS", 0.0)
    return made


def run(*arguments: str) -> Any:
    app = typer.Typer()
    corrections.register(app)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["corrections", *arguments])


def test_what_is_void_is_named_by_source_and_id(metering: Metering) -> None:
    shown = run("void", "demo/call-1", "demo/a/b", "--reason", "a test", "--id", "fix-1", "--account", "acme")
    assert shown.exit_code == 0, shown.output
    ((method, path, body),) = metering.asked
    assert (method, path) == ("POST", "?dry_run=false")
    assert body == {
        "kind": "void",
        "id": "fix-1",
        "reason": "a test",
        "events": [
            {"source": "demo", "id": "call-1", "account": "acme"},
            {"source": "demo", "id": "a/b", "account": "acme"},
        ],
    }
    assert "void fix-1 is done: 1 events, 1 corrected" in shown.output
    assert "It came to -0.1 usd, +2 calls." in shown.output
    assert "undone" in shown.output


def test_what_is_staged_is_discarded_by_its_id(metering: Metering) -> None:
    shown = run("discard", "a:b")
    assert shown.exit_code == 0, shown.output
    assert metering.asked == [("DELETE", "/a%3Ab", None)]


def test_a_dry_run_needs_no_id_and_says_that_it_is_one(metering: Metering) -> None:
    shown = run("rerate", "*", *PERIOD, "--price-version", "v2", "--dry-run").output
    ((_, path, body),) = metering.asked
    assert path == "?dry_run=true"
    assert "id" not in body
    assert (body["account"], body["from"], body["to"]) == ("*", "2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")
    assert "would come to" in shown
    assert "more than a dry run looks at" in shown


def test_what_is_under_way_is_followed_to_its_end(metering: Metering) -> None:
    shown = run("rerate", "acme", *PERIOD, "--tree", "--include-pinned", "--price-version", "v2")
    assert shown.exit_code == 0, shown.output
    assert [(method, path) for method, path, _ in metering.asked] == [("POST", "?dry_run=false"), ("GET", "/fix-1")]
    assert metering.asked[0][2]["id"].startswith("cli-")
    assert run("undo", "fix-1", "--reason", "a mistake").exit_code == 0
    assert metering.asked[2] == ("POST", "/fix-1/undo?dry_run=false", {"reason": "a mistake"})


def test_a_backfill_is_staged_as_it_is_written_and_then_applied(
    metering: Metering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corrections, "STAGED_MAX", 2)
    file = tmp_path / "events.jsonl"
    file.write_text('{"id": "1"}\n\n{"id": "2"}\n{"id": "3"}')
    shown = run("backfill", "acme", str(file), *PERIOD, "--replace", "--id", "b-1")
    assert shown.exit_code == 0, shown.output
    assert [(path, body) for _, path, body in metering.asked[1:4]] == [
        ("/b-1/events", [{"id": "1"}, {"id": "2"}]),
        ("/b-1/events", [{"id": "3"}]),
        ("/b-1/apply?dry_run=false", None),
    ]
    assert metering.asked[0][2]["replace"] is True


def test_amended_data_are_sent_to_the_last_digit_or_not_at_all(metering: Metering, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text('{"n": 0.1}')
    assert run("amend", "demo/call-1", "--data", f"@{file}", "--reason", "a test").exit_code == 0
    assert metering.asked[0][2]["events"][0]["data"] == {"n": 0.1}
    for data in ('{"n": 0.1000000000000000000001}', "no JSON"):
        assert isinstance(run("amend", "demo/call-1", "--data", data, "--reason", "a test").exception, StackError)
    assert isinstance(run("void", "call-1", "--reason", "a test").exception, StackError)
    wrong = run("rerate", "acme", "--from", "soon", "--to", "2026-12-01", "--reason", "a test")
    assert isinstance(wrong.exception, StackError)
    assert len(metering.asked) == 1


@pytest.mark.parametrize(
    "asked",
    [
        ("void", "demo/call-1"),
        ("void", "demo/call-1", "--dry-run"),
        ("amend", "demo/call-1", "--data", "{}"),
        ("rerate", "acme", "--from", "2026-01-01", "--to", "2026-02-01"),
        ("backfill", "acme", os.devnull, "--from", "2026-01-01", "--to", "2026-02-01"),
        ("undo", "fix-1"),
    ],
)
def test_what_is_archived_is_restored_first_if_it_is_said_where_it_is(
    metering: Metering, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...]
) -> None:
    restored: list[tuple[Path, list[str]]] = []

    def restore(_: Console, source: Path, months: list[str]) -> None:
        restored.append((source, months))
        metering.archived = []

    monkeypatch.setattr(corrections, "restore_months", restore)
    metering.archived = ["2026-01"]
    refused = run(*asked, "--reason", "a test").exception
    assert isinstance(refused, Archived)
    assert "With --archive DIR" in str(refused)
    assert len(metering.asked) == 1
    shown = run(*asked, "--reason", "a test", "--archive", "usage")
    assert shown.exit_code == 0, shown.output
    assert restored == [(Path("usage"), ["2026-01"])]
    assert "2026-01 is in the log again" in shown.output
    # The very same is asked for again.
    assert metering.asked[1] == metering.asked[2]


def test_corrections_are_listed_and_shown(metering: Metering) -> None:
    assert "fix-1" in run("list").output
    shown = run("show", "fix-1", "--events").output
    assert "demo/call-1" in shown
    assert [path for _, path, _ in metering.asked] == ["?limit=50", "/fix-1", "/fix-1/events?limit=500"]
