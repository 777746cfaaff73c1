"""Meters: what of which events is aggregated how. A meter is data, and answers from the log, of all the past."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Final, Literal

from services.metering.domain.windows import WindowSize

Aggregation = Literal["COUNT", "SUM", "MIN", "MAX", "AVG", "LATEST", "UNIQUE_COUNT"]

# Where a value stands in an event's data: the names of members, from the outside in.
Path = tuple[str, ...]

PATH_DEPTH_MAX: Final = 8
PATH_LENGTH_MAX: Final = 256
# An average is what it is, rounded to this many decimals.
AVERAGE_DECIMALS: Final = 18

# Groups that every meter has besides its own: the subject as it was reported, and, by OpenMeter's name, its account.
SUBJECT: Final = "subject"
ACCOUNT_GROUP: Final = "customer_id"

_MEMBER: Final = re.compile(
    r"""\.([A-Za-z_][A-Za-z0-9_-]{0,127})|\["([^"\\\x00-\x1f]{1,128})"\]|\['([^'\\\x00-\x1f]{1,128})'\]"""
)
_WIDE: Final = Context(prec=120, rounding=ROUND_HALF_EVEN)


class InvalidPath(ValueError):
    """A text that is not a simple JSONPath."""


class MeterTaken(Exception):
    """There is a meter of that slug."""

    def __init__(self, slug: str) -> None:
        super().__init__(f"there is a meter {slug!r} already")


class MeterChanged(Exception):
    """Somebody changed the meter at the same time."""

    def __init__(self, slug: str) -> None:
        super().__init__(f"the meter {slug!r} was changed by somebody else at the same time: read it, and try again")


Operator = Literal["eq", "ne", "in", "nin", "like", "nlike", "ilike", "nilike", "gt", "gte", "lt", "lte"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A text is compared with one value, or for `in` and `nin` with several."""

    operator: Operator
    values: Sequence[str]


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every one of them is met."""

    filters: Sequence["Filter"]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """At least one of them is met."""

    filters: Sequence["Filter"]


Filter = Comparison | AllOf | AnyOf


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """What is aggregated. `filters` are by path: an event that does not meet all of them is none of this meter's.

    `value` is None for COUNT alone. Events before `event_from` are left out.
    """

    slug: str
    aggregation: Aggregation
    event_type: str
    value: Path | None
    group_by: Mapping[str, Path] = field(default_factory=dict)
    filters: Mapping[Path, Filter] = field(default_factory=dict)
    event_from: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterQuestion:
    """What a meter is asked. None for no limit; `size` None asks for one window from first to last.

    `accounts` are those whose use it is, `subjects` those who were reported; `filters` are by the meter's groups.
    """

    since: datetime | None
    until: datetime | None
    size: WindowSize | None
    zone: tzinfo
    group_by: Sequence[str]
    subjects: Sequence[str] | None = None
    accounts: Sequence[str] | None = None
    filters: Mapping[str, Filter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Aggregate:
    """The aggregate of a window and group. `groups` are the values of what was grouped by, in that order."""

    value: Decimal
    window_start: datetime
    window_end: datetime
    groups: Sequence[str]


def read_path(text: str) -> Path:
    """The members a JSONPath names: `$.a.b`, `$["a b"]`. InvalidPath: it is none, or more than a simple one."""
    if len(text) > PATH_LENGTH_MAX:
        raise InvalidPath(f"a path has at most {PATH_LENGTH_MAX} characters, this one has {len(text)}")
    if not text.startswith("$") or len(text) == 1:
        raise InvalidPath(f"{text!r} is no path to a member: it looks like $.input_tokens")
    names: list[str] = []
    place = 1
    while place < len(text):
        found = _MEMBER.match(text, place)
        if found is None:
            raise InvalidPath(f"{text!r} is no simple path: only members are known, like $.attributes.endpoint")
        names.append(found[1] or found[2] or found[3])
        place = found.end()
    if len(names) > PATH_DEPTH_MAX:
        raise InvalidPath(f"a path goes at most {PATH_DEPTH_MAX} members deep, {text!r} goes {len(names)}")
    return tuple(names)


def average(total: Decimal, count: int) -> Decimal:
    """A sum divided by how many it is of, rounded half-even."""
    with_guard = _WIDE.divide(total, Decimal(count))
    return with_guard.quantize(Decimal(1).scaleb(-AVERAGE_DECIMALS), context=_WIDE)


def plain(value: Decimal) -> Decimal:
    """The same number without an exponent, and without zeros that say nothing."""
    text = f"{value:f}"
    return Decimal((text.rstrip("0").rstrip(".") if "." in text else text) or "0")
