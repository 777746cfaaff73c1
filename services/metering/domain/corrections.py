"""Corrections: what the ledger is told when a use turns out to have cost something else, and how counts move with it.

Of every use the ledger has, in each unit, what its current version costs; nothing, while it is void or waits.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from typing import Final, Literal

from contracts.pricing import Counter
from services.metering.domain.prices import CounterKey, Counts, Share, steps_of

Kind = Literal["void", "amend", "rerate", "backfill", "settle"]
State = Literal["staging", "running", "done", "undoing", "undone", "discarded"]

# Steps by unit.
Amounts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class GivenBack:
    """What was given back of the line of a revision."""

    revision: int
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a use. `amounts` is what the use costs in all, None while it waits.

    `charged` is what its own line took, and `given_back` what was given back of earlier lines between the version
    before and this one.
    """

    revision: int
    amounts: Amounts | None
    charged: Amounts = field(default_factory=dict)
    given_back: Sequence[GivenBack] = ()


@dataclass(frozen=True, slots=True)
class History:
    """All versions of a use, the latest last. If it is void none of them counts."""

    versions: Sequence[Version]
    is_void: bool = False

    @property
    def amounts(self) -> Amounts:
        """What the use costs now: what the ledger has of it."""
        return {} if self.is_void or not self.versions else self.versions[-1].amounts or {}


@dataclass(frozen=True, slots=True)
class Posting:
    """What the ledger is to be told, so that it has what a use costs from now on: first `given_back`, then `charged`.

    `noted` is for the next version: all that was given back since the one before, by a void also.
    """

    charged: Amounts
    given_back: Sequence[GivenBack]
    noted: Sequence[GivenBack]

    @property
    def difference(self) -> dict[str, int]:
        """What it changes, by unit."""
        found = dict(self.charged)
        for each in self.given_back:
            for unit, steps in each.amounts.items():
                found[unit] = found.get(unit, 0) - steps
        return found


def left_of(versions: Iterable[Version]) -> dict[int, dict[str, int]]:
    """What has not been given back, by the revision whose line took it, and unit."""
    left: dict[int, dict[str, int]] = {}
    for version in versions:
        for each in version.given_back:
            for unit, steps in each.amounts.items():
                left[each.revision][unit] -= steps
        if version.charged:
            left[version.revision] = dict(version.charged)
    return {revision: rest for revision, by in left.items() if (rest := {unit: n for unit, n in by.items() if n})}


def post(history: History, target: Amounts) -> Posting:
    """The difference between what the ledger has of a use and `target`. It is given back from the latest line first."""
    left = left_of(history.versions)
    everything = [GivenBack(revision, left[revision]) for revision in sorted(left, reverse=True)]
    if history.is_void:
        # The void gave it back.
        return Posting(charged=_above_zero(target), given_back=(), noted=everything)
    has: dict[str, int] = {}
    for by_unit in left.values():
        for unit, steps in by_unit.items():
            has[unit] = has.get(unit, 0) + steps
    charged = _above_zero({unit: steps - has.get(unit, 0) for unit, steps in target.items()})
    surplus = _above_zero({unit: steps - target.get(unit, 0) for unit, steps in has.items()})
    given_back = []
    for each in everything:
        back = {}
        for unit, steps in each.amounts.items():
            if (part := min(steps, surplus.get(unit, 0))) > 0:
                back[unit] = part
                surplus[unit] -= part
        if back:
            given_back.append(GivenBack(each.revision, back))
    return Posting(charged=charged, given_back=given_back, noted=given_back)


def _above_zero(amounts: Amounts) -> dict[str, int]:
    return {unit: steps for unit, steps in amounts.items() if steps > 0}


# Counts of periods ----------------------------------------------------------------------------------------------------

Counters = Mapping[CounterKey, Counter]
NOT_COUNTED: Final = Counter()
# Wide enough that nothing is cut off.
_EXACT: Final = Context(prec=200)


def take_out(counters: Counters, counts: Counts, amounts: Amounts) -> dict[CounterKey, Counter]:
    """Where counters stand that counted a use which costs `amounts`, once it has never been.

    What is charged under a price in a period, and the counter's `credit`, are always what all that is counted costs.
    So the credit takes up what the use was charged beyond, or below, what the count costs less without it: above 0,
    that is owed, and is charged with what comes next in the period.
    """
    return _moved(counters, counts, amounts, by=-1)


def put_in(counters: Counters, counts: Counts, amounts: Amounts) -> dict[CounterKey, Counter]:
    """Where counters stand once they count a use that costs `amounts`, whatever they would say it costs."""
    return _moved(counters, counts, amounts, by=1)


def _moved(counters: Counters, counts: Counts, amounts: Amounts, *, by: int) -> dict[CounterKey, Counter]:
    moved: dict[CounterKey, Counter] = {}
    # Of several prices in one unit the first has what the others leave: theirs is what the count says.
    taken = dict(amounts)
    for unit, steps in counts.fixed.items():
        taken[unit] = taken.get(unit, 0) - steps
    for share in reversed(counts.shares):
        before = counters.get(share.key, NOT_COUNTED)
        quantity = before.quantity + by * share.quantity
        unit = share.price.unit
        more = steps_of(share.price, quantity, unit=share.unit) - steps_of(
            share.price, before.quantity, unit=share.unit
        )
        is_first = next(each for each in counts.shares if each.price.unit == unit) is share
        part = taken.get(unit, 0) if is_first else by * more
        taken[unit] = taken.get(unit, 0) - part
        moved[share.key] = Counter(quantity=quantity, credit=before.credit + more - by * part)
    return moved


def part_of(share: Share, counts: Counts, amounts: Amounts, *, exact: Decimal) -> int:
    """What a use that costs `amounts` was charged under one of the prices that count it, in steps, at most.

    `exact` is what its items say of that price. No more than that can be given back to it on account of the price.
    """
    unit = share.unit.name
    with localcontext(_EXACT):
        # Both what all had cost before and after it were rounded: that is at most a step.
        priced = int((exact * 10**share.unit.scale).to_integral_value(ROUND_FLOOR)) + 1
    return max(min(amounts.get(unit, 0) - counts.fixed.get(unit, 0), priced), 0)


@dataclass(frozen=True, slots=True)
class CounterMove:
    """By how much a counter moved with the correction of a use. Undone, it moves back.

    `at` is what was counted then: once that is something else, how it moves back is to be worked out anew. None of what
    prices changed, which moves back as it came, whatever was counted since.
    """

    key: CounterKey
    by: Counter
    at: Decimal | None = None


def moves(before: Counters, after: Counters) -> list[CounterMove]:
    """By how much counters moved."""
    found = []
    for key in sorted(after):
        old, new = before.get(key, NOT_COUNTED), after[key]
        by = Counter(quantity=new.quantity - old.quantity, credit=new.credit - old.credit)
        if by != NOT_COUNTED:
            found.append(CounterMove(key, by, at=new.quantity))
    return found


def moved_back(counters: Counters, moved: Iterable[CounterMove]) -> dict[CounterKey, Counter]:
    """Where counters stand once moves are undone."""
    found: dict[CounterKey, Counter] = {}
    for each in moved:
        now = found.get(each.key) or counters.get(each.key, NOT_COUNTED)
        found[each.key] = Counter(quantity=now.quantity - each.by.quantity, credit=now.credit - each.by.credit)
    return found
