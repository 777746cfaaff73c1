"""Query parameters: one that nobody reads is refused. Passed over, it would let something else be answered, or done."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError

UNKNOWN_PARAMETER: Final = "unknown_parameter"
REPEATED_PARAMETER: Final = "repeated_parameter"


class OwnQueryRouter(APIRouter):
    """A router whose routes read their queries themselves: what they do not know is theirs to refuse, or to let be.

    Only as a whole router of an application: within another one it is checked like that.
    """


async def check_parameters(request: Request) -> None:
    """A dependency: refuse what the route does not read, and what is said twice; no route reads lists."""
    if request.scope["query_string"]:
        said = [name for name, _ in request.query_params.multi_items()]
        check_names(said, known=frozenset(_names(request.scope["route"].dependant)))


def check_names(said: Sequence[str], *, known: Set[str]) -> None:
    """RequestValidationError with every parameter that is not known, and every one that is said twice."""
    wrong = [_unknown(name, known) for name in sorted(set(said) - known)]
    wrong += [_finding(name, REPEATED_PARAMETER, "it is said twice") for name in sorted(known) if said.count(name) > 1]
    if wrong:
        raise RequestValidationError(wrong)


def _names(dependant: Dependant) -> Iterator[str]:
    for each in dependant.query_params:
        yield each.alias
    for inner in dependant.dependencies:
        yield from _names(inner)


def _unknown(name: str, known: Set[str]) -> Mapping[str, Any]:
    names = f"known are {', '.join(sorted(known))}" if known else "none is known"
    return _finding(name, UNKNOWN_PARAMETER, f"there is no such parameter here: {names}")


def _finding(name: str, code: str, said: str) -> Mapping[str, Any]:
    return {"type": code, "loc": ("query", name[:64]), "msg": said}
