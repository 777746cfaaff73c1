"""Laws of what the `scrip` command says of input that can be nothing: a sentence, exit code 2, and nothing is done."""

import sys
from collections.abc import Callable
from contextlib import nullcontext

import httpx2
import psycopg
import pytest

from infra import cli
from infra.commands import corrections, ledger, stack
from infra.errors import BadInput, StackError
from infra.service_api import NotFound, ServiceApi, in_path

Said = tuple[int, str]


def answering(answer: httpx2.Response, asked: list[httpx2.Request]) -> ServiceApi:
    def handle(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return answer

    client = httpx2.Client(transport=httpx2.MockTransport(handle))
    return ServiceApi("ledger", "http://ledger", client)


@pytest.fixture
def scrip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command; its exit code and what it said."""

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["scrip", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, BadInput) for status in (400, 413, 422)),
        *((status, StackError) for status in (401, 402, 409, 503)),
        (404, NotFound),
    ],
)
def test_only_what_is_at_fault_itself_is_bad_input(status: int, kind: type[StackError]) -> None:
    api = answering(httpx2.Response(status, json={"detail": "so it is"}), [])
    with pytest.raises(StackError, match="Ledger refuses: so it is") as refused:
        api.get("/v1/balances/acme")
    assert type(refused.value) is kind


def test_what_is_wrong_with_events_names_each_by_its_number_among_all_and_its_field() -> None:
    errors = [{"index": 0, "field": "id", "detail": "is missing"}, {"index": 2, "detail": "is too long"}]
    api = answering(httpx2.Response(400, json={"detail": "see errors", "errors": errors}), [])
    with pytest.raises(BadInput, match=r"refuses: event 1001, id: is missing; event 1003: is too long$"):
        api.send("/events", b"[]", after=1000)


@pytest.mark.parametrize("text", ["../../metrics", "a/../b", "..", ".", "a?b", "a#b", "a b", "a%2Fb", "ä"])
def test_what_the_user_writes_never_leads_elsewhere(text: str) -> None:
    asked: list[httpx2.Request] = []
    api = answering(httpx2.Response(200, json={}), asked)
    api.get(f"/v1/balances/{in_path(text)}", {"x": "y"})
    (request,) = asked
    sent = request.url.raw_path.decode().removeprefix("/v1/balances/").removesuffix("?x=y")
    assert httpx2.URL(f"http://ledger/{sent}").path == f"/{text}"
    assert not set(sent) & set("?#. ")


def test_an_empty_key_is_not_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script whose variable is unset would grant again each time it runs."""
    asked: list[httpx2.Request] = []
    answer = httpx2.Response(200, json={"transaction": "txn", "replayed": False})
    monkeypatch.setattr(ServiceApi, "running", lambda _service: answering(answer, asked))
    ledger.grant("acme", "5", key="")
    ledger.grant("acme", "5")
    given, made = (request.headers["Idempotency-Key"] for request in asked)
    assert given == ""
    assert made.startswith("cli-")


@pytest.mark.parametrize("data", ["{", "@/nonexistent/data.json", "@/", '{"a": NaN}', '{"a": 0.12345678901234567890}'])
def test_data_that_cannot_be_read_is_bad_input(data: str, scrip: Callable[..., Said]) -> None:
    code, said = scrip("corrections", "amend", "demo/call-1", "--reason", "a test", "--data", data)
    assert code == 2, said
    assert said.startswith("scrip: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("corrections", "void", "call-1", "--reason", "a test"),
        ("corrections", "backfill", "acme", "/", "--from", "2026-01-01", "--to", "2026-02-01", "--reason", "a test"),
        ("dead-letters", "redrive"),
        ("dead-letters", "list", "--service", "nosuch"),
        ("usage", "archive", "--to", "archive", "--before", "yesterday"),
        ("usage", "restore", "--from", "archive", "--month", "May"),
        ("statement", "acme", "--limit", "0"),
        ("nonsense",),
    ],
)
def test_bad_input_ends_with_2_and_no_traceback(arguments: tuple[str, ...], scrip: Callable[..., Said]) -> None:
    code, said = scrip(*arguments)
    assert code == 2, said
    assert said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "error", [psycopg.OperationalError("no such role\nmore"), psycopg.errors.UndefinedTable("no such table")]
)
def test_a_database_that_is_not_made_yet_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "_stack_with", lambda _server: nullcontext())
    with (
        pytest.raises(StackError, match=r"^The database cannot be asked \(no such \w+\)"),
        stack.stack_with("postgres"),
    ):
        raise error


def test_a_correction_with_an_empty_id_is_not_given_another(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[httpx2.Request] = []
    refusing = httpx2.Response(422, json={"detail": "an id has at least 1 character"})
    monkeypatch.setattr(corrections, "_metering", lambda: answering(refusing, asked))
    with pytest.raises(BadInput):
        corrections.void_events(["demo/call-1"], reason="a test", id="")
    (request,) = asked
    assert b'"id":""' in request.read().replace(b" ", b"")
