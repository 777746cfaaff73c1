"""`scrip dead-letters` on a stand-in that keeps letters as the services do."""

from typing import Any

import httpx2
import pytest
import typer
from typer.testing import CliRunner

from infra.commands import dead_letters
from infra.commands.dead_letters import Desk


class Service:
    """A service's dead letters, two to a page. Those that are hopeless are refused."""

    def __init__(self, name: str, *letters: str) -> None:
        self.name = name
        self.letters: dict[str, dict[str, Any]] = {
            letter: {
                "id": letter,
                "received_at": "2026-03-14T12:00:00Z",
                "stream": "USAGE",
                "stream_sequence": 1,
                "subject": "usage.v1.00.demo",
                "reason": "[red]not JSON",
                "problems": [{"field": "", "message": "not JSON"}],
                "redriven_at": None,
                "redriven_by": None,
                "payload_text": "{",
                "payload_base64": "ew==",
            }
            for letter in letters
        }

    def desk(self) -> Desk:
        return Desk(self.name, "http://stand-in", httpx2.Client(transport=httpx2.MockTransport(self.answer)))

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        place = request.url.path.split("/")
        if len(place) == 2:
            return httpx2.Response(200, json=self._page(request.url.params))
        letter = self.letters.get(place[2])
        if letter is None:
            return httpx2.Response(404, json={"detail": "there is none"})
        if request.method == "POST":
            if "hopeless" in letter["id"]:
                return httpx2.Response(422, json={"detail": "still not JSON"})
            letter |= {"redriven_at": "2026-03-14T13:00:00Z", "redriven_by": "operator"}
        return httpx2.Response(200, json=letter)

    def _page(self, query: httpx2.QueryParams) -> dict[str, Any]:
        found = [
            letter
            for letter in self.letters.values()
            if (query["redriven"] == "true" or letter["redriven_at"] is None)
            and ("before" not in query or letter["id"] < query["before"])
        ]
        found.sort(key=lambda letter: str(letter["id"]), reverse=True)
        return {"dead_letters": found[:2], "next_before": found[1]["id"] if len(found) > 2 else None}


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    made = [Service("metering", "dead_1", "dead_2", "dead_3_hopeless"), Service("ledger", "dead_4")]
    monkeypatch.setattr(
        dead_letters,
        "_desks",
        lambda service: [each.desk() for each in made if service in (None, each.name)],
    )
    return made


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.callback()(lambda: None)
    dead_letters.register(app)
    result = CliRunner().invoke(app, ["dead-letters", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.mark.usefixtures("services")
def test_all_letters_of_all_services_are_listed() -> None:
    code, said = run("list")
    assert code == 0
    assert [letter for letter in ("dead_1", "dead_2", "dead_3_hopeless", "dead_4") if letter in said] == [
        "dead_1",
        "dead_2",
        "dead_3_hopeless",
        "dead_4",
    ]
    # What came from outside is no markup.
    assert "[red]not JSON" in said
    assert "dead_1" not in run("list", "--service", "ledger")[1]
    assert "There are more" in run("list", "--limit", "1")[1]


@pytest.mark.usefixtures("services")
def test_one_letter_is_shown_with_its_body() -> None:
    code, said = run("show", "dead_4")
    assert code == 0
    assert "ledger" in said
    assert "{" in said
    assert run("show", "dead_9")[0] == 1


def test_all_are_handed_in_again_and_the_hopeless_one_stays(services: list[Service]) -> None:
    code, said = run("redrive", "--all")
    assert code == 1
    assert "3 of 4 handed in again" in said
    assert "still not JSON" in said
    left = [letter["id"] for each in services for letter in each.letters.values() if letter["redriven_at"] is None]
    assert left == ["dead_3_hopeless"]
    assert run("redrive", "dead_1")[0] == 0


@pytest.mark.usefixtures("services")
def test_nothing_is_handed_in_again_by_accident() -> None:
    assert run("redrive")[0] == 1
    assert run("redrive", "dead_1", "--all")[0] == 1
