"""Problem details for HTTP APIs (RFC 9457): the one shape in which an error leaves a service."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse


@dataclass(eq=False)
class Problem(Exception):
    """An answer other than success. `code` is stable and for programs, `detail` a sentence with values for people.

    `errors` are single findings, each with a JSON `pointer` to its place where there is one; `members` are extra
    members of the object, numbers of a refusal for instance.
    """

    status: int
    code: str
    detail: str
    errors: Sequence[Mapping[str, Any]] = ()
    members: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.detail}"


def problem_response(problem: Problem) -> JSONResponse:
    """The problem as `application/problem+json`."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "code": problem.code,
        "detail": problem.detail,
        **problem.members,
    }
    if problem.errors:
        body["errors"] = [dict(error) for error in problem.errors]
    return JSONResponse(
        body, status_code=problem.status, headers=dict(problem.headers), media_type="application/problem+json"
    )
