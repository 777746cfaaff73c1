"""Laws of sharing: everything can be held, nobody holds more than a fair share, and the youngest leases go first."""

from hypothesis import given
from hypothesis import strategies as st

from contracts.partition import PARTITION_COUNT
from services.kit.leases import fair_share, owner_name, surplus

HELD = st.dictionaries(st.integers(0, PARTITION_COUNT - 1), st.integers(1, 1000))


@given(members=st.integers(0, 200))
def test_fair_shares_cover_everything_and_no_more_than_needed(members: int) -> None:
    share = fair_share(members)
    assert share * max(members, 1) >= PARTITION_COUNT
    assert (share - 1) * max(members, 1) < PARTITION_COUNT


@given(held=HELD, members=st.integers(1, 100))
def test_the_surplus_leaves_exactly_the_share(held: dict[int, int], members: int) -> None:
    given_back = surplus(held, members=members)
    kept = set(held) - set(given_back)
    assert set(given_back) <= set(held)
    assert len(kept) == min(len(held), fair_share(members))
    assert all(held[old] <= held[young] for old in kept for young in given_back)


def test_no_two_processes_have_one_name() -> None:
    assert owner_name("ledger") != owner_name("ledger")
