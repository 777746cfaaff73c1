"""Laws of taking batches: what comes steadily is left to come, nobody waits for who does not come."""

from hypothesis import given
from hypothesis import strategies as st

from contracts.partition import PARTITION_COUNT
from services.metering.subscribers import BUNDLE_EVENTS_ENOUGH, LINGER_EVENTS_MIN, lingers


@given(events=st.integers(1, LINGER_EVENTS_MIN - 1), subjects=st.integers(1, PARTITION_COUNT))
def test_of_a_few_events_the_next_are_taken_at_once(events: int, subjects: int) -> None:
    assert not lingers(events=events, subjects=subjects, is_full=False)


@given(events=st.integers(1, 10_000), subjects=st.integers(1, PARTITION_COUNT))
def test_what_waits_behind_a_full_batch_is_taken_at_once(events: int, subjects: int) -> None:
    assert not lingers(events=events, subjects=subjects, is_full=True)


@given(subjects=st.integers(1, PARTITION_COUNT), more=st.integers(0, 1_000))
def test_bundles_that_are_large_enough_are_not_waited_for(subjects: int, more: int) -> None:
    assert not lingers(events=subjects * BUNDLE_EVENTS_ENOUGH + more, subjects=subjects, is_full=False)


@given(events=st.integers(LINGER_EVENTS_MIN, PARTITION_COUNT * BUNDLE_EVENTS_ENOUGH - 1))
def test_a_steady_trickle_over_all_partitions_is_left_to_come(events: int) -> None:
    assert lingers(events=events, subjects=PARTITION_COUNT, is_full=False)
