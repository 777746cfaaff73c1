"""Query parameters: one that nobody reads is refused. Ignored, it would let something else be answered, or done."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError


def check_parameters(request: Request) -> None:
    """Refuse what the route does not read, and what is said twice. A dependency; no route here reads lists."""
    if not request.query_params:
        return
    known = set(_names(request.scope["route"].dependant))
    said = [name for name, _ in request.query_params.multi_items()]
    wrong = [_unknown(name, known) for name in sorted(set(said) - known)]
    wrong += [_finding(name, "repeated_parameter", "it is said twice") for name in known if said.count(name) > 1]
    if wrong:
        raise RequestValidationError(wrong)


def _names(dependant: Dependant) -> Iterator[str]:
    for each in dependant.query_params:
        yield each.alias
    for inner in dependant.dependencies:
        yield from _names(inner)


def _unknown(name: str, known: set[str]) -> Mapping[str, Any]:
    names = f"known are {', '.join(sorted(known))}" if known else "none is known"
    return _finding(name, "unknown_parameter", f"it is not known: {names}")


def _finding(name: str, code: str, said: str) -> Mapping[str, Any]:
    return {"type": code, "loc": ("query", name[:64]), "msg": said}
