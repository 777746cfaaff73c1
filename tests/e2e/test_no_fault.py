"""Whatever stands in a path, in a query or in a body: a problem that says what is wrong, never a fault.

And no service is forbidden what it needs, which would otherwise only be a line in its log.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

import httpx2
import pytest

from infra.demo.scratch_stack import ScratchStack
from infra.services import SERVICES

pytestmark = pytest.mark.timeout(200)

Json = dict[str, Any]


def _cursor(place: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


# What a text may be: nothing Postgres can store, larger than any number of its, a place of another page, too much.
TEXTS: Final = (
    "\x00",
    "a\x00b",
    "\ud800".encode("utf-8", "surrogatepass"),
    "-1",
    str(10**30),
    "1e400",
    "'; --",
    "%",
    "../..",
    "x" * 5000,
    _cursor([]),
    _cursor(["a\x00", "b\x00"]),
    _cursor([1, "\x00", ""]),
    _cursor([1, "\x00", "", ""]),
    _cursor(["a", "b"]),
    _cursor([1, "a", "b"]),
    _cursor([1, "a", "b", "c"]),
    _cursor([10**12, "a", "b"]),
    _cursor([10**12, "a", "b", "c"]),
    _cursor([10**40, "a", "b", "c"]),
    _cursor({"batch": 10**25, "position": 0, "posted": {}}),
    _cursor({"batch": 10**12, "position": 10**12, "posted": {"usd": 10**30, "\x00": 1}}),
    _cursor({"batch": 1, "position": 1, "posted": {"zzz": 1}}),
)
BODIES: Final = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'"\\ud800"',
    b'{"account":"\\ud800","amount":1e400,"key":"\\u0000","secret":"\\u0000","reason":"\\ud800","model":"\\ud800"}',
    b'{"account":"a\\u0000","package":"\\u0000","id":"\\u0000","quantity":1e999,"messages":[{"content":"\\ud800"}]}',
)
PAGE: Final = {"account": "acme", "unit": "usd", "from": "2026-01-01T00:00:00Z", "to": "2026-01-02T00:00:00Z"}


@pytest.mark.parametrize("service", [each.name for each in SERVICES])
def test_no_text_in_a_path_or_a_query_is_a_fault(stack: ScratchStack, service: str) -> None:
    with _door(stack, service) as door:
        for method, path, operation in _operations(door):
            asked = [each for each in operation.get("parameters", []) if each["in"] in ("path", "query")]
            for one in asked:
                for text in TEXTS:
                    _never_a_fault(door, method, *_question(path, asked, {one["name"]: text}))


@pytest.mark.parametrize("service", [each.name for each in SERVICES])
def test_no_body_is_a_fault_and_none_of_these_is_taken(stack: ScratchStack, service: str) -> None:
    with _door(stack, service) as door:
        for method, path, operation in _operations(door):
            if "requestBody" not in operation:
                continue
            asked = [each for each in operation.get("parameters", []) if each["in"] == "path"]
            for body in BODIES:
                for kind in ("application/json", "application/cloudevents-batch+json", "text/plain"):
                    answer = _never_a_fault(
                        door, method, *_question(path, asked, {}), content=body, headers={"content-type": kind}
                    )
                    assert not answer.is_success, f"{method} {path} took {body[:80]!r}"


@pytest.mark.parametrize("service", [each.name for each in SERVICES])
def test_no_service_tries_what_nats_forbids_it(stack: ScratchStack, service: str) -> None:
    log = (stack.layout.logs / f"{service}.log").read_text()
    assert "Application startup complete" in log
    forbidden = [line for line in log.splitlines() if "NATS forbids" in line]
    assert not forbidden, forbidden[0]


def _door(stack: ScratchStack, service: str) -> httpx2.Client:
    token = stack.credentials.tokens["operator"]
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": "no-fault"}
    return httpx2.Client(base_url=stack.url(service), headers=headers, timeout=20, trust_env=False)


def _operations(door: httpx2.Client) -> Iterator[tuple[str, str, Json]]:
    paths = door.get("/openapi.json").json()["paths"]
    assert paths
    for path, operations in paths.items():
        for method, operation in operations.items():
            yield method.upper(), path, operation


def _question(path: str, asked: list[Json], bad: Mapping[str, str | bytes]) -> tuple[str, str]:
    """The path and the query, with `bad` in its places and something usual in the others."""
    said = {each["name"]: PAGE.get(each["name"], "x") for each in asked if each["in"] == "path" or each.get("required")}
    said |= PAGE if path.endswith("/usage") else {}
    texts = {name: quote(text, safe="") for name, text in (said | dict(bad)).items()}
    for name in [each["name"] for each in asked if each["in"] == "path"]:
        path = path.replace(f"{{{name}}}", texts.pop(name))
    return path, "&".join(f"{name}={text}" for name, text in texts.items())


def _never_a_fault(door: httpx2.Client, method: str, path: str, query: str, **sent: Any) -> httpx2.Response:
    answer = door.request(method, f"{path}?{query}" if query else path, **sent)
    what = f"{method} {path[:120]}?{query[:200]} {str(sent)[:200]}: {answer.status_code} {answer.text[:300]}"
    assert answer.status_code < 500, what
    if not answer.is_success:
        kind = answer.headers.get("content-type", "")
        assert kind == "application/problem+json" or "error" in answer.json(), what
    return answer
