"""Laws of what one thread decides for all: what ends a hold costs as much as it has lots, however many those are."""

import copy
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import Any, Final

import pytest

from services.ledger.domain.commands import ClaimPayment, PlaceHold, ReleaseHold, ResolveHold
from services.ledger.domain.entries import Move
from tests.unit.ledger.core import Core, leg, new_hold

FEW: Final = 40
TIMES_MORE: Final = 8
# Each lot against each would be 64 times as much.
TIMES_LONGER_MAX: Final = 9


class Unchecked(Core):
    """Looking at all lots after each grant is what others do."""

    def _check(self, moves: Sequence[Move]) -> None:
        pass


@cache
def held(lots: int, *, unit: str, one_payment: bool, ends: bool) -> tuple[Core, str]:
    """A hold over so many lots, each bought by itself or all at once."""
    core, hold = Unchecked(), new_hold()
    core.open("acme", unit)
    for number in range(lots):
        reference = "payment" if one_payment else f"payment-{number}"
        core.grant("acme", unit, 10, reference=reference, ends=core.now + timedelta(hours=1) if ends else None)
    placed = PlaceHold(
        hold=hold,
        account="acme",
        legs=(leg(unit, 10 * lots - 5),),
        lifetime_seconds=86_400,
        overdue="charge_estimate",
    )
    core.do(placed)
    if ends:
        core.later(hours=2)
    if one_payment:
        claim = ClaimPayment(
            account="acme",
            payment="payment",
            claim="dispute",
            reason="dispute",
            state="final",
            unit=unit,
            claimed=10 * lots,
        )
        core.do(claim)
    return core, hold


def released(core: Core, hold: str, _unit: str) -> None:
    core.do(ReleaseHold(account="acme", hold=hold))


def settled(core: Core, hold: str, unit: str) -> None:
    core.do(core.line("acme", (unit, core.wallet("acme", unit).held // 2), hold=hold))


def estimated(core: Core, hold: str, _unit: str) -> None:
    core.later(hours=25)
    core.do(ResolveHold(account="acme", hold=hold))


def steps(end: Callable[[Core, str, str], None], lots: int, *, unit: str, one_payment: bool, ends: bool) -> int:
    """How many instructions of the interpreter it takes: the same on every machine."""
    core, hold = copy.deepcopy(held(lots, unit=unit, one_payment=one_payment, ends=ends))
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Callable[..., Any]:
        nonlocal count
        count += event == "opcode"
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        end(core, hold, unit)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("end", [released, settled, estimated])
@pytest.mark.parametrize(
    ("unit", "one_payment", "ends"),
    [("usd", False, False), ("usd", False, True), ("usd", True, False), ("tokens", True, False)],
    ids=["bought one by one", "ended", "claimed", "claimed, of a cap"],
)
def test_ending_a_hold_takes_as_long_as_it_has_lots(
    end: Callable[[Core, str, str], None], unit: str, one_payment: bool, ends: bool
) -> None:
    few = steps(end, FEW, unit=unit, one_payment=one_payment, ends=ends)
    many = steps(end, FEW * TIMES_MORE, unit=unit, one_payment=one_payment, ends=ends)
    assert many < TIMES_LONGER_MAX * few, (few, many)
