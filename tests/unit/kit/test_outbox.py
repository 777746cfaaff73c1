"""The law of a relay's memory: whatever it is told, in whatever order, it holds the next numbers without a gap."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from services.kit.outbox import OutboxRow, _Lane


@given(relayed=st.integers(0, 20), told=st.lists(st.integers(1, 40)), reached=st.integers(0, 40))
def test_a_lane_never_holds_a_gap_and_knows_when_it_lacks_something(
    relayed: int, told: list[int], reached: int
) -> None:
    lane = _Lane(relayed=relayed, incomplete=False)
    for number in told:
        lane.push(OutboxRow(1, number, "s", "i", b"", datetime.now(UTC)))
    held = [row.number for row in lane.rows]
    assert held == list(range(relayed + 1, relayed + 1 + len(held)))
    assert lane.incomplete or {number for number in told if number > relayed} == set(held)
    lane.advance(reached)
    assert lane.relayed == max(relayed, reached)
    assert all(row.number > reached for row in lane.rows)
