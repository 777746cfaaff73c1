"""Laws of sharing: everything can be held, nobody holds more than a fair share, the youngest groups go first."""

from hypothesis import given
from hypothesis import strategies as st

from contracts.partition import GROUP_SIZE, PARTITION_COUNT, group_of
from services.kit.leases import fair_share, owner_name, surplus

HELD = st.dictionaries(st.integers(0, PARTITION_COUNT - 1), st.integers(1, 1000))


@given(members=st.integers(0, 200))
def test_fair_shares_cover_everything_and_no_more_than_needed(members: int) -> None:
    share = fair_share(members)
    assert share * max(members, 1) >= PARTITION_COUNT
    assert (share - GROUP_SIZE) * max(members, 1) < PARTITION_COUNT
    assert share % GROUP_SIZE == 0


@given(held=HELD, members=st.integers(1, 100))
def test_the_surplus_leaves_exactly_the_share(held: dict[int, int], members: int) -> None:
    given_back = surplus(held, members=members)
    kept = set(held) - set(given_back)
    assert set(given_back) <= set(held)
    groups = {group_of(partition) for partition in held}
    staying = {group_of(partition) for partition in kept}
    assert not staying & {group_of(partition) for partition in given_back}, "a group goes as a whole"
    assert len(staying) == min(len(groups), fair_share(members) // GROUP_SIZE)
    youngest = {group: max(epoch for each, epoch in held.items() if group_of(each) == group) for group in groups}
    assert all(youngest[old] <= youngest[young] for old in staying for young in groups - staying)


def test_no_two_processes_have_one_name() -> None:
    assert owner_name("ledger") != owner_name("ledger")
