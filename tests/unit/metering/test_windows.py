"""Windows tile time in every zone: each instant is in one, whatever the clocks there do."""

from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.metering.domain.windows import TooManyWindows, WindowSize, first_instant, window_bounds

MINUTE: Final = timedelta(minutes=1)
HOUR: Final = timedelta(hours=1)

# Where something is odd, and when.
ODD: Final = [
    ("Europe/Berlin", datetime(2026, 3, 29, tzinfo=UTC)),
    ("Europe/Berlin", datetime(2026, 10, 25, tzinfo=UTC)),
    ("America/New_York", datetime(2025, 11, 2, tzinfo=UTC)),
    ("Asia/Beirut", datetime(2025, 3, 29, tzinfo=UTC)),  # midnight is skipped
    ("Africa/Cairo", datetime(2024, 10, 31, tzinfo=UTC)),  # back at midnight
    ("America/Havana", datetime(2025, 11, 2, tzinfo=UTC)),  # midnight comes twice
    ("America/St_Johns", datetime(2005, 10, 30, tzinfo=UTC)),  # back one minute after midnight
    ("America/Sao_Paulo", datetime(2018, 2, 17, tzinfo=UTC)),
    ("Australia/Lord_Howe", datetime(2026, 4, 4, tzinfo=UTC)),  # half an hour
    ("Australia/Lord_Howe", datetime(2026, 10, 3, tzinfo=UTC)),
    ("Pacific/Apia", datetime(2011, 12, 30, tzinfo=UTC)),  # a day is skipped
    ("Asia/Kathmandu", datetime(2026, 6, 1, tzinfo=UTC)),  # 5:45
    ("Asia/Pyongyang", datetime(2018, 5, 4, tzinfo=UTC)),  # half an hour, once, at midnight
    ("America/Caracas", datetime(2016, 5, 1, tzinfo=UTC)),
    ("Antarctica/Troll", datetime(2026, 3, 29, tzinfo=UTC)),  # two hours
    ("Pacific/Kwajalein", datetime(1993, 8, 21, tzinfo=UTC)),
]
ZONES: Final = sorted(name for name in available_timezones() if "/" in name)


def expected_days(zone: ZoneInfo, since: datetime, until: datetime, *, month: bool) -> list[datetime]:
    """Looks at the clocks every minute: a window begins when they show a later date than ever."""
    bounds: list[datetime] = []
    instant, latest = (since - timedelta(days=35 if month else 4)).replace(second=0, microsecond=0), date.min
    while not bounds or bounds[-1] < until:
        shown = instant.astimezone(zone).date()
        label = shown.replace(day=1) if month else shown
        if label > latest:
            latest = label
            if instant <= since:
                bounds = [instant]
            else:
                bounds.append(instant)
        instant += MINUTE
    return bounds


def expected_hours(zone: ZoneInfo, since: datetime, until: datetime) -> list[datetime]:
    """Looks at the clocks every minute: a window begins when they show a whole hour, or are changed."""
    bounds: list[datetime] = []
    instant = since.replace(second=0, microsecond=0) - 2 * HOUR
    while not bounds or bounds[-1] < until:
        local, before = instant.astimezone(zone), (instant - MINUTE).astimezone(zone)
        if local.minute == 0 or local.utcoffset() != before.utcoffset():
            if instant <= since:
                bounds = [instant]
            else:
                bounds.append(instant)
        instant += MINUTE
    return bounds


def bounds_of(size: WindowSize, zone: ZoneInfo, since: datetime, until: datetime) -> list[datetime]:
    return window_bounds(size, zone=zone, since=since, until=until, windows_max=12_000)


moments = st.integers(0, 64 * 365 * 24 * 60).map(lambda minutes: datetime(1973, 1, 1, tzinfo=UTC) + minutes * MINUTE)
odd = st.sampled_from(ODD).flatmap(
    lambda each: st.tuples(
        st.just(each[0]), st.integers(-40 * 60, 60 * 60).map(lambda minutes: each[1] + timedelta(minutes=minutes))
    )
)
places = st.one_of(st.tuples(st.sampled_from(ZONES), moments), odd)


@given(place=places, minutes=st.integers(1, 4 * 24 * 60))
def test_days_begin_when_the_clocks_first_show_a_later_date(place: tuple[str, datetime], minutes: int) -> None:
    zone, since = ZoneInfo(place[0]), place[1]
    until = since + minutes * MINUTE
    assert bounds_of("DAY", zone, since, until) == expected_days(zone, since, until, month=False)


@pytest.mark.parametrize(("name", "at"), ODD)
def test_months_begin_when_the_clocks_first_show_a_later_month(name: str, at: datetime) -> None:
    zone = ZoneInfo(name)
    until = at + timedelta(days=20)
    assert bounds_of("MONTH", zone, at, until) == expected_days(zone, at, until, month=True)


@given(place=places, minutes=st.integers(1, 30 * 60))
def test_hours_begin_when_the_clocks_show_them_or_are_changed(place: tuple[str, datetime], minutes: int) -> None:
    zone, since = ZoneInfo(place[0]), place[1]
    until = since + minutes * MINUTE
    assert bounds_of("HOUR", zone, since, until) == expected_hours(zone, since, until)


@given(place=places, size=st.sampled_from(["MINUTE", "HOUR", "DAY", "MONTH"]), minutes=st.integers(1, 3_000))
@example(place=ODD[10], size="DAY", minutes=3 * 24 * 60)
def test_windows_tile_the_range(place: tuple[str, datetime], size: WindowSize, minutes: int) -> None:
    zone, since = ZoneInfo(place[0]), place[1]
    until = since + minutes * MINUTE
    bounds = bounds_of(size, zone, since, until)
    assert bounds[0] <= since < bounds[1]
    assert bounds[-2] < until <= bounds[-1]
    assert all(one < other for one, other in pairwise(bounds))
    # Asked in two parts, they are the same windows.
    for cut in bounds[1:-1][:3]:
        parts = bounds_of(size, zone, since, cut)[:-1] + bounds_of(size, zone, cut, until)
        assert parts == bounds


def test_windows_of_a_day_of_25_hours_are_25() -> None:
    zone = ZoneInfo("Europe/Berlin")
    since, until = first_instant(date(2026, 10, 25), zone=zone), first_instant(date(2026, 10, 26), zone=zone)
    assert len(bounds_of("HOUR", zone, since, until)) == 26
    assert len(bounds_of("MINUTE", zone, since, until)) == 25 * 60 + 1
    assert bounds_of("DAY", zone, since, until) == [since, until]


def test_more_windows_than_are_answered_are_refused_before_they_are_made() -> None:
    with pytest.raises(TooManyWindows, match="more than 12000 windows"):
        bounds_of("MINUTE", ZoneInfo("UTC"), datetime(1970, 1, 2, tzinfo=UTC), datetime(2199, 1, 1, tzinfo=UTC))
