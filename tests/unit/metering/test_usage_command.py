"""`scrip usage` says what it did, and what is wrong in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import SecretStr
from typer.testing import CliRunner

from infra.commands import usage
from infra.errors import StackError
from services.metering.portability.archiving import ArchivedMonth, ArchiveInUse
from services.metering.portability.files import BadArchive
from services.metering.portability.restoring import NotTheSame, RestoredMonth

ARCHIVED = ArchivedMonth(
    month=date(2026, 1, 1),
    rows=12_345,
    files=64,
    files_written=3,
    bytes=1_000_000,
    amounts={"usd": "5.807479500"},
    state="archived",
    why="2 uses of it still wait to be charged",
)
RESTORED = RestoredMonth(month=date(2026, 1, 1), rows=12_345, rows_restored=11, keys_restored=0, files=64)


class Calls:
    """What was asked of metering, and what is wrong with it."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.migrated = 0
        self.error: Exception | None = None

    def archive(self, url: SecretStr, directory: Path, **options: Any) -> list[ArchivedMonth]:
        self._ask(url, directory, options)
        return [ARCHIVED]

    def restore(self, url: SecretStr, directory: Path, **options: Any) -> list[RestoredMonth]:
        self._ask(url, directory, options)
        return [RESTORED]

    def _ask(self, url: SecretStr, directory: Path, options: dict[str, Any]) -> None:
        options.pop("on_progress")(1, 2)
        self.asked.append(options | {"url": url.get_secret_value(), "directory": directory})
        if self.error is not None:
            raise self.error

    # The stack.
    def database_url(self, role: str) -> SecretStr:
        return SecretStr(f"as {role}")

    def migrate(self) -> None:
        self.migrated += 1


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()

    @contextmanager
    def stack_with(server: str) -> Iterator[Calls]:
        assert server == "postgres"
        yield made

    monkeypatch.setattr(usage, "stack_with", stack_with)
    monkeypatch.setattr(usage, "archive_usage", made.archive)
    monkeypatch.setattr(usage, "restore_usage", made.restore)
    monkeypatch.setattr(usage, "now", lambda: datetime(2026, 11, 21, 23, 59, tzinfo=UTC))
    return made


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    usage.register(app)
    return CliRunner().invoke(app, ["usage", *arguments], env={"COLUMNS": "200"})


def test_the_archive_is_of_what_is_older_than_the_setting_unless_it_is_said(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIP_METERING_ARCHIVE_AFTER_DAYS", "10")
    assert run("archive", "--to", "files").exit_code == 0
    told = run("archive", "--to", "files", "--before", "2026-02-01", "--drop", "--dry-run")
    assert calls.asked == [
        {"url": "as metering_owner", "directory": Path("files"), "before": day, "drop": drop, "dry_run": drop}
        for day, drop in ((date(2026, 11, 11), False), (date(2026, 2, 1), True))
    ]
    for said in ("2026-01", "12,345", "5.807479500 usd", "would be archived: 2 uses of it still wait"):
        assert said in told.stdout


def test_what_comes_back_is_said(calls: Calls) -> None:
    told = run("restore", "--from", "files", "--month", "2026-01", "--month", "2026-02")
    assert told.exit_code == 0, told.output
    assert calls.asked[0]["months"] == [date(2026, 1, 1), date(2026, 2, 1)]
    assert calls.migrated == 1
    assert "11" in told.stdout


def test_what_is_wrong_is_one_sentence(calls: Calls) -> None:
    for told, said in (
        (["archive", "--to", "x", "--before", "soon"], "'soon' is no day"),
        (["archive", "--to", "x", "--before", "2026-11-22"], "yet to come"),
        (["restore", "--from", "x", "--month", "2026-13"], "'2026-13' is no month"),
    ):
        answer = run(*told)
        assert isinstance(answer.exception, StackError)
        assert said in str(answer.exception)
    assert calls.asked == []
    for error, said in (
        (BadArchive("the file is not what was written"), "The file is not what was written."),
        (NotTheSame("the log has it otherwise"), "The log has it otherwise."),
        (ArchiveInUse("another works"), "Another works."),
        (PermissionError(13, "Permission denied", "/somewhere"), "/somewhere cannot be used: Permission denied."),
    ):
        calls.error = error
        for command in (["archive", "--to", "x"], ["restore", "--from", "x"]):
            answer = run(*command)
            assert isinstance(answer.exception, StackError)
            assert str(answer.exception) == said
    for name in ("archive", "restore"):
        assert "Usage" in run(name, "--help").stdout
