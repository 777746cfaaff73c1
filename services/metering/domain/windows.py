"""Windows of time in a zone: half-open stretches of instants that tile time, whatever the clocks there do.

A day or month begins at the first instant at which the clocks show its date or a later one: a midnight that comes
twice begins a day once, one that is skipped begins it where the clocks jump, and a date that is skipped has no window.
An hour or minute begins when the clocks show it; a change of the clocks by no whole number of them cuts it.
"""

from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Final, Literal, assert_never

WindowSize = Literal["MINUTE", "HOUR", "DAY", "MONTH"]

_STEPS: Final = {"MINUTE": timedelta(minutes=1), "HOUR": timedelta(hours=1)}
_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)


class TooManyWindows(ValueError):
    """A range has more windows than can be asked for at once."""

    def __init__(self, windows_max: int) -> None:
        super().__init__(f"there are more than {windows_max} windows from first to last: ask for larger ones, or less")
        self.windows_max = windows_max


def window_bounds(
    size: WindowSize, *, zone: tzinfo, since: datetime, until: datetime, windows_max: int
) -> list[datetime]:
    """Where the windows that [since, until) has a part of begin, in UTC, and where the last one ends. TooManyWindows.

    `since` is before `until`. The first window may begin before `since`, the last one end after `until`.
    """
    match size:
        case "MINUTE" | "HOUR":
            return _of_hours(_STEPS[size], zone=zone, since=since, until=until, windows_max=windows_max)
        case "DAY":
            return _of_days(_next_day, zone=zone, since=since, until=until, windows_max=windows_max)
        case "MONTH":
            return _of_days(_next_month, zone=zone, since=since, until=until, windows_max=windows_max)
        case never:
            assert_never(never)


def first_instant(day: date, *, zone: tzinfo) -> datetime:
    """The first instant, in UTC, at which the clocks of a zone show a date or a later one."""
    midnight = datetime.combine(day, time.min)
    before = midnight.replace(tzinfo=zone, fold=0).astimezone(UTC)
    after = midnight.replace(tzinfo=zone, fold=1).astimezone(UTC)
    if before <= after:
        # Plain; or it comes twice, and this is the first time.
        return before
    # It is skipped: the clock jumps over it at an instant between the two readings.
    return _change(after, before, zone=zone)


def _of_days(
    following: Callable[[date], date],
    *,
    zone: tzinfo,
    since: datetime,
    until: datetime,
    windows_max: int,
) -> list[datetime]:
    # From well before: clocks that were put back show a date again whose window is over.
    day = since.astimezone(zone).date() - 2 * _DAY
    if following is _next_month:
        day = day.replace(day=1)
    bounds = [first_instant(day, zone=zone)]
    while bounds[-1] < until:
        day = following(day)
        begin = first_instant(day, zone=zone)
        if begin <= since:
            bounds = [begin]
        elif begin > bounds[-1]:
            bounds.append(begin)
        if len(bounds) > windows_max + 1:
            raise TooManyWindows(windows_max)
    return bounds


def _next_day(day: date) -> date:
    return day + _DAY


def _next_month(day: date) -> date:
    return date(day.year + day.month // 12, day.month % 12 + 1, 1)


def _of_hours(step: timedelta, *, zone: tzinfo, since: datetime, until: datetime, windows_max: int) -> list[datetime]:
    begin = _floor(since, step, offset=_offset(since, zone=zone))
    if _offset(begin, zone=zone) != _offset(since, zone=zone):
        begin = _change(begin, since, zone=zone)
    bounds = [begin.astimezone(UTC)]
    while bounds[-1] < until:
        bounds.append(_following(bounds[-1], step, zone=zone))
        if len(bounds) > windows_max + 1:
            raise TooManyWindows(windows_max)
    return bounds


def _following(begin: datetime, step: timedelta, *, zone: tzinfo) -> datetime:
    offset = _offset(begin, zone=zone)
    end = _floor(begin, step, offset=offset) + step
    last = end - _SECOND
    return end if last <= begin or _offset(last, zone=zone) == offset else _change(begin, last, zone=zone)


def _floor(instant: datetime, step: timedelta, *, offset: timedelta) -> datetime:
    """When the clock, at this offset, last showed a whole step."""
    shown = instant.astimezone(UTC) + offset
    return shown - (shown - datetime(1900, 1, 1, tzinfo=UTC)) % step - offset


def _offset(instant: datetime, *, zone: tzinfo) -> timedelta:
    return instant.astimezone(zone).utcoffset() or timedelta()


def _change(low: datetime, high: datetime, *, zone: tzinfo) -> datetime:
    """The instant in (low, high] at which the offset becomes what it is at `high`. Changes are on whole seconds."""
    target = _offset(high, zone=zone)
    low, high = low.astimezone(UTC).replace(microsecond=0), high.astimezone(UTC).replace(microsecond=0)
    while high - low > _SECOND:
        middle = low + (high - low) // 2
        middle -= timedelta(microseconds=middle.microsecond)
        if _offset(middle, zone=zone) == target:
            high = middle
        else:
            low = middle
    return high
