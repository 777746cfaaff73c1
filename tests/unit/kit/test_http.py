"""Laws of the HTTP side: every error is problem+json, nothing is done without a token of the right scope."""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import httpx2
import pytest
from fastapi import Depends, FastAPI, Query, Request
from fastapi.routing import APIRouter
from fastapi.testclient import TestClient
from pydantic import AfterValidator, BaseModel, Field

from services.kit.auth import InvalidTokens, Principal, TokenStore, require
from services.kit.http import Readiness, build_app
from services.kit.problems import Problem
from services.kit.query import OwnQueryRouter

router = APIRouter()


class Body(BaseModel):
    """Something with limits."""

    name: str
    number: Annotated[int, Field(gt=0)]


class Void(BaseModel):
    kind: Literal["void"]
    events: list[Annotated[str, AfterValidator(str.upper)] | int]


class Settle(BaseModel):
    kind: Literal["settle"]
    until: date | int


@router.post("/corrections")
async def correct(body: Annotated[Void | Settle, Field(discriminator="kind")]) -> str:
    return body.kind


@router.post("/things/{thing_id}")
async def make_thing(thing_id: int, body: Body, principal: Annotated[Principal, Depends(require("write"))]) -> str:
    return f"{principal.name} {thing_id} {body.name}"


@router.post("/refused")
async def refuse() -> None:
    raise Problem(402, "insufficient_funds", "5 are left, 6 are needed", members={"remaining": "5"})


@router.post("/things/{thing_id}/void")
async def void_thing(
    thing_id: int,
    principal: Annotated[Principal, Depends(require("write"))],
    dry_run: bool = False,
    why: Annotated[str, Query(alias="reason")] = "",
) -> str:
    return f"{thing_id} {'would be' if dry_run else 'is'} void {why}"


open_router = OwnQueryRouter()


@open_router.get("/own")
async def read_own(request: Request) -> list[str]:
    return list(request.query_params)


@router.post("/broken")
async def break_down() -> None:
    raise RuntimeError("password=hunter2")


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield


def write_tokens(path: Path, **tokens: list[str]) -> None:
    path.write_text(
        json.dumps(
            [
                {"principal": name, "sha256": hashlib.sha256(f"secret-{name}".encode()).hexdigest(), "scopes": scopes}
                for name, scopes in tokens.items()
            ]
        )
    )
    # However coarse the clock of the file system is.
    os.utime(path, ns=(time.time_ns(), time.time_ns() + path.stat().st_size))


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.json"
    write_tokens(path, writer=["write", "read"], reader=["read"])
    return path


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
def client(tokens_file: Path, readiness: Readiness) -> Iterator[TestClient]:
    app = build_app(
        name="kit",
        lifespan=lifespan,
        readiness=readiness,
        tokens_file=tokens_file,
        routers=[router, open_router],
        body_bytes_max=1000,
    )
    with TestClient(app, raise_server_exceptions=False) as opened:
        yield opened


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer secret-{name}"}


def problem_of(answer: httpx2.Response) -> dict[str, object]:
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, object] = answer.json()
    assert body["status"] == answer.status_code
    assert {"type", "title", "code", "detail"} <= set(body)
    return body


def test_a_parameter_that_nobody_reads_is_named_and_nothing_is_done(client: TestClient) -> None:
    answer = client.post("/things/7/void?dryrun=true&reason=x", headers=bearer("writer"))
    assert (answer.status_code, problem_of(answer)["errors"]) == (
        422,
        [
            {
                "pointer": "/query/dryrun",
                "code": "unknown_parameter",
                "detail": "there is no such parameter here: known are dry_run, reason",
            }
        ],
    )
    answer = client.post("/things/7/void?dry_run=true&reason=x", headers=bearer("writer"))
    assert (answer.status_code, answer.json()) == (200, "7 would be void x")


def test_a_parameter_that_is_said_twice_is_named(client: TestClient) -> None:
    answer = client.post("/things/7/void?dry_run=true&dry_run=false", headers=bearer("writer"))
    assert (answer.status_code, problem_of(answer)["errors"]) == (
        422,
        [{"pointer": "/query/dry_run", "code": "repeated_parameter", "detail": "it is said twice"}],
    )


def test_routes_that_read_their_query_themselves_are_given_all_of_it(client: TestClient) -> None:
    answer = client.get("/own?any[thing]=1&any=2")
    assert (answer.status_code, answer.json()) == (200, ["any[thing]", "any"])


def test_who_watches_may_add_what_he_likes(client: TestClient, readiness: Readiness) -> None:
    readiness.started()
    for path in ("/healthz", "/readyz", "/metrics"):
        assert client.get(f"{path}?now=1").status_code == 200, path


def test_a_good_request_is_answered(client: TestClient) -> None:
    answer = client.post("/things/7", json={"name": "x", "number": 1}, headers=bearer("writer"))
    assert (answer.status_code, answer.json()) == (200, "writer 7 x")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("nobody"),
        {"Authorization": "Basic secret-writer"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer " + hashlib.sha256(b"secret-writer").hexdigest()},
    ],
)
def test_without_a_known_token_nothing_is_done(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post("/things/7", json={"name": "x", "number": 1}, headers=headers)
    assert problem_of(answer)["code"] == "unauthenticated"
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert "secret" not in answer.text


def test_without_the_scope_the_answer_names_it(client: TestClient) -> None:
    answer = client.post("/things/7", json={"name": "x", "number": 1}, headers=bearer("reader"))
    assert (answer.status_code, problem_of(answer)["scope"]) == (403, "write")


def test_all_problems_of_a_request_are_named_with_their_place(client: TestClient) -> None:
    answer = client.post("/things/x", json={"number": 0}, headers=bearer("writer"))
    assert answer.status_code == 422
    errors = problem_of(answer)["errors"]
    assert isinstance(errors, list)
    assert {error["pointer"] for error in errors} == {"/path/thing_id", "/body/name", "/body/number"}


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({"kind": "void"}, {"/body/events"}),
        ({"kind": "void", "events": ["e1", [2], {"void": 1}]}, {"/body/events/1", "/body/events/2"}),
        ({"kind": "settle", "until": "soon"}, {"/body/until"}),
        ({"kind": "settle"}, {"/body/until"}),
        ({"kind": "undo"}, {"/body"}),
        ([], {"/body"}),
    ],
)
def test_a_place_in_a_body_leads_to_what_was_sent_whatever_it_was_tried_as(
    client: TestClient, body: object, pointers: set[str]
) -> None:
    errors = problem_of(client.post("/corrections", json=body))["errors"]
    assert isinstance(errors, list)
    assert {error["pointer"] for error in errors} == pointers


def test_what_is_not_json_is_a_problem_of_the_body(client: TestClient) -> None:
    answer = client.post(
        "/things/1", content=b"{nope", headers={**bearer("writer"), "Content-Type": "application/json"}
    )
    assert (answer.status_code, problem_of(answer)["code"]) == (422, "invalid_request")


def test_a_refusal_carries_its_numbers(client: TestClient) -> None:
    answer = client.post("/refused")
    assert answer.status_code == 402
    assert problem_of(answer)["remaining"] == "5"


def test_a_fault_reveals_nothing(client: TestClient) -> None:
    answer = client.post("/broken")
    assert (answer.status_code, problem_of(answer)["code"]) == (500, "fault")
    assert "hunter2" not in answer.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/refused", 405)])
def test_what_the_router_refuses_is_a_problem_too(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, problem_of(answer)["status"]) == (status, status)


def test_a_body_above_the_limit_is_refused_announced_or_not(client: TestClient) -> None:
    def in_pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    announced = client.post("/things/1", content=b"x" * 1001, headers=bearer("writer"))
    streamed = client.post("/things/1", content=in_pieces(), headers=bearer("writer"))
    for answer in (announced, streamed):
        assert (answer.status_code, problem_of(answer)["code"]) == (413, "body_too_large")


def test_tokens_change_with_their_file_and_a_broken_file_changes_nothing(client: TestClient, tokens_file: Path) -> None:
    def status_of(name: str) -> int:
        return client.post("/things/7", json={"name": "x", "number": 1}, headers=bearer(name)).status_code

    assert (status_of("writer"), status_of("newcomer")) == (200, 401)
    write_tokens(tokens_file, newcomer=["write"])
    assert (status_of("writer"), status_of("newcomer")) == (401, 200)
    tokens_file.write_text("[{")
    assert status_of("newcomer") == 200
    tokens_file.unlink()
    assert status_of("newcomer") == 200


@pytest.mark.parametrize(
    "text", ["{", "{}", '[{"principal": "a"}]', '[{"principal":"a","sha256":"S3CRET","scopes":[]}]']
)
def test_an_unusable_tokens_file_is_refused_without_repeating_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(InvalidTokens) as refusal:
        TokenStore(path).load()
    assert "S3CRET" not in str(refusal.value)


def test_health_readiness_and_metrics_need_no_token(client: TestClient, readiness: Readiness) -> None:
    assert client.get("/healthz").json()["status"] == "alive"
    assert (client.get("/readyz").status_code, client.get("/readyz").json()["missing"]) == (
        503,
        {"start": "the service is starting"},
    )
    readiness.started()
    assert client.get("/readyz").json() == {"service": "kit", "ready": True, "missing": {}}
    client.post("/things/12345", headers=bearer("writer"))
    text = client.get("/metrics").text
    assert 'route="/things/{thing_id}",status="422"' in text
    assert "12345" not in text


def test_what_is_missing_is_named_and_a_check_that_hangs_holds_nothing_up() -> None:
    async def law() -> None:
        readiness = Readiness()

        async def works() -> None:
            return

        async def fails() -> None:
            raise ConnectionError("not connected")

        async def hangs() -> None:
            await asyncio.shield(asyncio.sleep(5))

        readiness.add("good", works)
        readiness.add("nats", fails)
        readiness.add("postgres", hangs)
        readiness.started()
        started = time.monotonic()
        assert await readiness.missing() == {
            "nats": "ConnectionError: not connected",
            "postgres": "no answer within 1 s",
        }
        assert time.monotonic() - started < 1.5

    asyncio.run(law())
