"""When the periods of a recurring grant begin, by its zone's clock. Period n lasts from its boundary to the next."""

from calendar import monthrange
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from services.ledger.domain.commands import Period, Rule

_DAYS: Final[dict[Period, int]] = {"day": 1, "week": 7}
_MONTHS: Final[dict[Period, int]] = {"month": 1, "year": 12}
PERIODS: Final[frozenset[str]] = frozenset({*_DAYS, *_MONTHS})
# Files beside the zones that are no place's clock, or differ from machine to machine.
_NO_ZONES: Final = ("localtime", "posixrules", "Factory", "posix/", "right/")


def is_zone(name: str) -> bool:
    """Whether it is the IANA name of a zone."""
    if name.startswith(_NO_ZONES):
        return False
    try:
        ZoneInfo(name)
    except (LookupError, ValueError, OSError):
        return False
    return True


def boundary(rule: Rule, n: int) -> datetime:
    """When period `n` begins, in UTC. Later for a greater `n`, always.

    A time that the clock skips is later by what is skipped; of one that it shows twice, the first counts. A month
    without the anchor's day has its last. A day that the zone skips altogether begins halfway between those around it.
    ValueError, OverflowError: the calendar does not go so far.
    """
    if n == 0:
        return rule.anchor.astimezone(UTC)
    zone = ZoneInfo(rule.zone)
    begins = _instant(rule, zone, n)
    if rule.period == "day" and rule.every == 1:
        after = _instant(rule, zone, n + 1)
        if begins >= after:
            before = _instant(rule, zone, n - 1)
            return before + (after - before) // 2
    return begins


def period_at(rule: Rule, at: datetime) -> int:
    """The number of the period that a time is in: below 0 before the anchor."""
    zone = ZoneInfo(rule.zone)
    anchor, wall = _wall(rule.anchor, zone), _wall(at, zone)
    days = _DAYS.get(rule.period)
    if days is not None:
        n = (wall - anchor).days // (days * rule.every)
    else:
        n = (_months(wall) - _months(anchor)) // (_MONTHS[rule.period] * rule.every)
    # The clock's jumps, the time of day and the lengths of months move it by one or two at most.
    while boundary(rule, n) > at:
        n -= 1
    while boundary(rule, n + 1) <= at:
        n += 1
    return n


def _instant(rule: Rule, zone: ZoneInfo, n: int) -> datetime:
    wall = _wall(rule.anchor, zone)
    days = _DAYS.get(rule.period)
    if days is not None:
        wall += timedelta(days=days * rule.every * n)
    else:
        year, month = divmod(_months(wall) + _MONTHS[rule.period] * rule.every * n, 12)
        wall = wall.replace(year=year, month=month + 1, day=min(wall.day, monthrange(year, month + 1)[1]))
    return wall.replace(tzinfo=zone).astimezone(UTC)


def _wall(at: datetime, zone: ZoneInfo) -> datetime:
    """What the clock shows."""
    return at.astimezone(zone).replace(tzinfo=None, fold=0)


def _months(wall: datetime) -> int:
    return wall.year * 12 + wall.month - 1
