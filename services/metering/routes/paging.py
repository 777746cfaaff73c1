"""Pages: where one ends and the next begins."""

import base64
import binascii
from typing import Annotated, Final, TypeVar

import msgspec
from fastapi import Query

from contracts.partition import PARTITION_COUNT
from services.kit.problems import Problem

PAGE_SIZE_MAX: Final = 500

Limit = Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)]
# Postgres has no text with a NUL in it.
Text = Annotated[str, Query(max_length=600, pattern=r"^[^\x00]*$")]

Place = TypeVar("Place", tuple[int, str], tuple[int, str, str], tuple[int, str, str, str], list[str])


def cursor(place: Place) -> str:
    """A place in a listing, as clients hand it back."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode()


def read_cursor(text: str, shape: type[Place]) -> Place:
    """The place that a cursor names. Problem 422."""
    try:
        place = msgspec.json.decode(base64.urlsafe_b64decode(text), type=shape)
    except (binascii.Error, msgspec.DecodeError, UnicodeError, ValueError) as error:
        raise not_a_place() from error
    if not all(_can_be_asked_for(part) for part in place):
        raise not_a_place()
    return place


def _can_be_asked_for(part: str | int) -> bool:
    """Postgres has no text with a NUL in it; the only numbers of places are partitions."""
    return "\x00" not in part if isinstance(part, str) else 0 <= part < PARTITION_COUNT


def not_a_place() -> Problem:
    """What a cursor that no page named is answered with."""
    return Problem(422, "invalid_cursor", "`after` is not a place that an earlier page named")
