"""Boundaries of recurring periods: by the clock of a zone, over month ends, leap days and the clock's jumps."""

from calendar import monthrange
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Final
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.ledger.domain.commands import Period, Rule
from services.ledger.domain.periods import boundary, is_zone, period_at

# Half an hour of daylight saving, a day that never was, a day twice, offsets of quarters, seasons of the south.
ZONES: Final = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Pacific/Apia",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
    "Africa/Casablanca",
    "America/Sao_Paulo",
    "Pacific/Kwajalein",
    "Antarctica/Troll",
)


def rule(period: Period, anchor: datetime, *, zone: str = "UTC", every: int = 1) -> Rule:
    return Rule(id="r", unit="usd", amount=1, period=period, anchor=anchor, zone=zone, every=every)


def local(text: str, zone: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone))


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    zone = draw(st.sampled_from(ZONES))
    anchors = st.datetimes(datetime(1970, 1, 2), datetime(2199, 12, 30))  # noqa: DTZ001 - wall clock
    month_ends = st.builds(
        lambda year, month, back, hour: datetime(year, month, monthrange(year, month)[1] - back, hour),  # noqa: DTZ001 - wall clock
        st.integers(1971, 2199),
        st.integers(1, 12),
        st.integers(0, 2),
        st.integers(0, 23),
    )
    return Rule(
        id="r",
        unit="usd",
        amount=1,
        period=draw(st.sampled_from(["day", "week", "month", "year"])),
        anchor=draw(anchors | month_ends).replace(tzinfo=ZoneInfo(zone), fold=draw(st.integers(0, 1))),
        zone=zone,
        every=draw(st.integers(1, 120) | st.just(1)),
    )


APIA: Final = rule("day", local("2011-12-27T10:00", "Pacific/Apia"), zone="Pacific/Apia")


@example(APIA, 3)
@example(APIA, 2)
@example(rule("day", local("1993-08-18T00:00", "Pacific/Kwajalein"), zone="Pacific/Kwajalein"), 3)
@example(rule("month", local("2024-01-31T02:30", "Europe/Berlin"), zone="Europe/Berlin"), 2)
@given(rules(), st.integers(-60, 200))
def test_boundaries_increase_and_each_begins_its_own_period(each: Rule, n: int) -> None:
    try:
        begins, ends = boundary(each, n), boundary(each, n + 1)
    except (ValueError, OverflowError):
        return
    assert begins < ends
    assert begins.utcoffset() == timedelta(0)
    assert period_at(each, begins) == n
    assert period_at(each, ends - timedelta(microseconds=1)) == n
    assert period_at(each, begins - timedelta(microseconds=1)) == n - 1
    assert boundary(each, 0) == each.anchor.astimezone(UTC)


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("hour", [0, 2, 12, 23])
def test_every_day_of_every_zone_has_its_period_over_the_years_of_its_oddities(zone: str, hour: int) -> None:
    for begin in (datetime(1993, 8, 1), datetime(2011, 12, 1), datetime(2024, 3, 1)):  # noqa: DTZ001 - wall clock
        daily = rule("day", begin.replace(hour=hour, minute=15, tzinfo=ZoneInfo(zone)), zone=zone)
        boundaries = [boundary(daily, n) for n in range(400)]
        assert all(earlier < later for earlier, later in pairwise(boundaries))
        assert [period_at(daily, each) for each in boundaries] == list(range(400))


@pytest.mark.parametrize("day", [29, 30, 31])
def test_a_month_without_the_anchors_day_has_its_last_and_the_next_has_the_day_again(day: int) -> None:
    monthly = rule("month", datetime(2023, 12, day, 9, tzinfo=UTC))
    assert [boundary(monthly, n).strftime("%m-%d") for n in range(1, 6)] == [
        f"01-{day}",
        "02-29",
        f"03-{day}",
        f"04-{min(day, 30)}",
        f"05-{day}",
    ]
    assert boundary(monthly, 14) == datetime(2025, 2, 28, 9, tzinfo=UTC)


def test_a_year_from_a_leap_day_ends_on_the_last_of_february() -> None:
    yearly = rule("year", datetime(2024, 2, 29, tzinfo=UTC))
    assert [boundary(yearly, n).strftime("%Y-%m-%d") for n in (-4, 1, 2, 3, 4, 76)] == [
        "2020-02-29",
        "2025-02-28",
        "2026-02-28",
        "2027-02-28",
        "2028-02-29",
        "2100-02-28",
    ]


def test_a_time_that_the_clock_skips_is_later_by_what_is_skipped() -> None:
    daily = rule("day", local("2025-03-29T02:30", "Europe/Berlin"), zone="Europe/Berlin")
    assert boundary(daily, 1) == local("2025-03-30T03:30", "Europe/Berlin")
    assert boundary(daily, 2) == local("2025-03-31T02:30", "Europe/Berlin")
    half = rule("day", local("2025-10-04T02:10", "Australia/Lord_Howe"), zone="Australia/Lord_Howe")
    assert boundary(half, 1) == local("2025-10-05T02:40", "Australia/Lord_Howe")


def test_of_a_time_that_the_clock_shows_twice_the_first_counts() -> None:
    daily = rule("day", local("2025-11-01T01:30", "America/New_York"), zone="America/New_York")
    assert boundary(daily, 1) == datetime(2025, 11, 2, 5, 30, tzinfo=UTC)
    assert boundary(daily, 2) == datetime(2025, 11, 3, 6, 30, tzinfo=UTC)


def test_the_first_period_begins_at_the_anchor_even_if_the_clock_shows_it_the_second_time() -> None:
    anchor = local("2025-11-02T01:30", "America/New_York").replace(fold=1)
    daily = rule("day", anchor, zone="America/New_York")
    assert boundary(daily, 0) == datetime(2025, 11, 2, 6, 30, tzinfo=UTC)
    assert period_at(daily, datetime(2025, 11, 2, 5, 30, tzinfo=UTC)) == -1


def test_the_clock_of_the_zone_counts_and_not_the_hours() -> None:
    monthly = rule("month", local("2025-01-01T00:00", "Europe/Berlin"), zone="Europe/Berlin")
    assert boundary(monthly, 6) == local("2025-07-01T00:00", "Europe/Berlin")
    assert boundary(monthly, 6) == datetime(2025, 6, 30, 22, tzinfo=UTC)
    fortnight = rule("week", local("2025-01-01T00:00", "Europe/Berlin"), zone="Europe/Berlin", every=2)
    assert boundary(fortnight, 13) == local("2025-07-02T00:00", "Europe/Berlin")


def test_a_day_that_a_zone_skips_shares_the_one_before_it() -> None:
    skipped = [boundary(APIA, n) for n in range(1, 5)]
    assert skipped == [
        local("2011-12-28T10:00", "Pacific/Apia"),
        local("2011-12-29T10:00", "Pacific/Apia"),
        local("2011-12-29T10:00", "Pacific/Apia").astimezone(UTC) + timedelta(hours=12),
        local("2011-12-31T10:00", "Pacific/Apia"),
    ]


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Etc/GMT+12", "America/Argentina/Ushuaia"])
def test_zones_are_known_by_their_names(zone: str) -> None:
    assert is_zone(zone)


@pytest.mark.parametrize(
    "zone",
    ["", "Europe", "Europe/Bonn", "../UTC", "/etc/localtime", "localtime", "right/UTC", "posixrules", "a" * 300, "\0"],
)
def test_what_is_no_zone_is_noticed(zone: str) -> None:
    assert not is_zone(zone)
