"""`scrip meters`: asks what it was told to ask, and shows numbers digit by digit."""

import json
from typing import Any

import httpx2
import pytest
import typer
from typer.testing import CliRunner

from infra.commands import meters
from infra.errors import StackError
from infra.service_api import ServiceApi

ANSWER = b"""{"data": [
    {"value": 12345678901234567890.000000001,
     "windowStart": "2026-11-01T00:00:00Z", "windowEnd": "2026-11-02T00:00:00Z",
     "subject": "acme", "groupBy": {"model": "gpt-4o"}},
    {"value": 1E+3, "windowStart": "2026-11-02T00:00:00Z", "windowEnd": "2026-11-03T00:00:00Z",
     "subject": "acme", "groupBy": {"model": ""}}]}"""
METER = {
    "id": "meter_1",
    "slug": "tokens",
    "version": 2,
    "aggregation": "SUM",
    "valueProperty": "$.tokens",
    "eventType": "prompt",
    "groupBy": {"model": "$.model"},
    "source": "operator",
}


class Metering:
    """Answers as metering does, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[httpx2.URL] = []

    def client(self) -> ServiceApi:
        return ServiceApi("metering", "http://stand-in", httpx2.Client(transport=httpx2.MockTransport(self.answer)))

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request.url)
        if request.url.path.endswith("/query"):
            if "colour" in str(request.url):
                error = {"pointer": "/query/groupBy", "detail": "the meter has no group colour"}
                return httpx2.Response(400, json={"detail": "1 problem", "errors": [error]})
            return httpx2.Response(200, content=ANSWER)
        if request.url.path.endswith("/versions"):
            return httpx2.Response(200, json=[METER, METER | {"version": 1}])
        return httpx2.Response(200, json=[METER, METER | {"slug": "old", "deletedAt": "2026-11-01T00:00:00Z"}])


@pytest.fixture
def metering(monkeypatch: pytest.MonkeyPatch) -> Metering:
    made = Metering()
    monkeypatch.setattr(meters, "_metering", made.client)
    return made


def run(*arguments: str) -> Any:
    app = typer.Typer()
    meters.register(app)
    return CliRunner().invoke(app, ["meters", *arguments], env={"COLUMNS": "200"})


def test_meters_are_listed_and_shown(metering: Metering) -> None:
    listed = run("list", "--deleted").stdout
    assert "tokens" in listed
    assert "old (deleted)" in listed
    assert metering.asked[0].params["includeDeleted"] == "true"
    shown = run("show", "tokens").stdout
    assert [json.loads(each)["version"] for each in shown.replace("}\n{", "}\x00{").split("\x00")] == [2, 1]


def test_a_question_is_asked_as_it_was_told(metering: Metering) -> None:
    told = ["query", "tokens", "--from", "2026-11-01", "--to", "2026-12-01T00:00:00+01:00", "--window", "day"]
    told += ["--zone", "Europe/Berlin", "--group-by", "subject", "--group-by", "model", "--subject", "acme"]
    told += ["--account", "acme", "--filter", "model=a=b", "--filter", "model=c", "--version", "3"]
    answer = run(*told)
    assert answer.exit_code == 0, answer.output
    (url,) = metering.asked
    assert url.path == "/api/v1/meters/tokens/query"
    assert url.params.multi_items() == [
        ("from", "2026-11-01T00:00:00Z"),
        ("to", "2026-12-01T00:00:00+01:00"),
        ("windowSize", "DAY"),
        ("windowTimeZone", "Europe/Berlin"),
        ("groupBy", "subject"),
        ("groupBy", "model"),
        ("subject", "acme"),
        ("filterCustomerId", "acme"),
        ("filterGroupBy", '{"model": ["a=b", "c"]}'),
        ("version", "3"),
    ]


def test_numbers_are_shown_digit_by_digit(metering: Metering) -> None:
    assert run("query", "tokens", "--csv").stdout.splitlines() == [
        "from,to,subject,model,value",
        "2026-11-01T00:00:00Z,2026-11-02T00:00:00Z,acme,gpt-4o,12345678901234567890.000000001",
        "2026-11-02T00:00:00Z,2026-11-03T00:00:00Z,acme,,1000",
    ]
    assert "12345678901234567890.000000001" in run("query", "tokens").stdout


def test_what_is_wrong_is_one_sentence(metering: Metering) -> None:
    for told, said in ((["--filter", "model"], "is no filter"), (["--group-by", "colour"], "no group colour")):
        answer = run("query", "tokens", *told)
        assert isinstance(answer.exception, StackError)
        assert said in str(answer.exception)
    assert run("query", "tokens", "--window", "week").exit_code == 2
    assert "--group-by" in run("query", "--help").stdout
