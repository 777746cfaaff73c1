"""Times: RFC 3339 text with an offset in JSON, within what Python and Postgres both hold in UTC."""

import re
from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import AwareDatetime, BeforeValidator, Field

# Near the ends of the calendar a time with an offset has no UTC form, and what is stored could not be read back.
TIME_MIN: Final = datetime(1970, 1, 1, tzinfo=UTC)
TIME_MAX: Final = datetime(2200, 1, 1, tzinfo=UTC)

_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def _check_form(value: object) -> object:
    # Left alone, pydantic reads text of digits as seconds or milliseconds, whichever looks likelier.
    if isinstance(value, datetime) or (isinstance(value, str) and _RFC3339.fullmatch(value)):
        return value
    raise ValueError("a time is RFC 3339 text with an offset, like 2025-07-01T12:00:00.000001Z")


# Lax only because a checked text is no longer JSON input to pydantic: nothing but text and datetime gets so far.
Time = Annotated[
    AwareDatetime,
    Field(
        strict=False,
        ge=TIME_MIN,
        lt=TIME_MAX,
        examples=["2025-07-01T12:00:00.000001Z"],
        json_schema_extra={
            "formatMinimum": TIME_MIN.isoformat(),
            "formatExclusiveMaximum": TIME_MAX.isoformat(),
        },
    ),
    BeforeValidator(_check_form),
]
