"""What is wrong with what was sent, each problem with its place."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from contracts.envelope import NAME_SHOWN_MAX
from contracts.money import AmountText, UnitName


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with what was sent. `code` is a refusal's; `pointer` a JSON pointer into the body."""

    pointer: str
    code: str
    detail: str

    def __str__(self) -> str:
        return f"{self.pointer}: {self.detail}" if self.pointer else self.detail


class Invalid(ValueError):
    """What was sent cannot be taken; carries every problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)

    @classmethod
    def of(cls, pointer: str, detail: str) -> "Invalid":
        """One problem with what was sent."""
        return cls([Problem(pointer, "invalid", detail)])


def model_problems(error: ValidationError, *, is_tagged: bool = False) -> list[Problem]:
    """What pydantic found, as problems; `is_tagged`: places begin with the name of the model that was chosen."""
    problems: list[Problem] = []
    for found in error.errors(include_url=False):
        pointer = _pointer(found["loc"][1:] if is_tagged else found["loc"])
        # What is wrong with its items was said before: it counts those that are right.
        if found["type"] != "too_short" or not any(each.pointer.startswith(f"{pointer}/") for each in problems):
            problems.append(Problem(pointer, "invalid", _sentence(found)))
    return problems


def _sentence(found: ErrorDetails) -> str:
    """What is wrong in words: a pattern says nothing to who wrote the text."""
    if found["type"] != "string_pattern_mismatch":
        return found["msg"].removeprefix("Value error, ")
    why = _PATTERNS.get(
        found["ctx"]["pattern"], "has characters that are not allowed here, or is too short or too long"
    )
    return f"{found['input'][:NAME_SHOWN_MAX]!r} {why}"


_PATTERNS: Final[Mapping[str, str]] = {
    TypeAdapter(AmountText).json_schema()["pattern"]: (
        "is not an amount: that is a decimal number, as 12 or -0.05, of at most 19 digits before the point and 9 after"
    ),
    TypeAdapter(UnitName).json_schema()["pattern"]: (
        "is not the name of a unit: that is at most 32 of a-z, 0-9 and _, the first of them a letter"
    ),
}


def _pointer(location: Sequence[int | str]) -> str:
    """A place as a JSON pointer; what pydantic says besides of which command of a list it is, is no part of it."""
    parts = [
        part
        for place, part in enumerate(location)
        if not (place >= 2 and location[place - 2] == "commands" and isinstance(location[place - 1], int))
    ]
    return "".join(f"/{part}" for part in parts)


def problem_rows(problems: Iterable[Problem]) -> list[dict[str, str]]:
    """Problems as they are told and stored."""
    return [{"pointer": each.pointer, "code": each.code, "detail": each.detail} for each in problems]
