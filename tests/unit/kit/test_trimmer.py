"""A stream is trimmed of what everybody has acknowledged, and of nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from services.kit.trimmer import ConsumerState, StreamState, trim_up_to

STREAM = StreamState(messages=1_000, bytes_stored=100_000, first_sequence=501, last_sequence=1_500)


def consumer(floor: int, *, pending: int = 5, unacknowledged: int = 5, reads_all: bool = True) -> ConsumerState:
    return ConsumerState(ack_floor=floor, pending=pending, unacknowledged=unacknowledged, reads_all=reads_all)


def test_what_is_to_be_kept_is_kept() -> None:
    assert trim_up_to(STREAM, [consumer(1_500)], keep_bytes_max=100_000) == 0
    assert trim_up_to(STREAM, [consumer(1_500)], keep_bytes_max=40_000) == 500 + 600


def test_the_slowest_consumer_decides() -> None:
    assert trim_up_to(STREAM, [consumer(1_400), consumer(600)], keep_bytes_max=1) == 600
    assert trim_up_to(STREAM, [consumer(1_400), consumer(500)], keep_bytes_max=1) == 0
    assert trim_up_to(STREAM, [consumer(1_400), consumer(0)], keep_bytes_max=1) == 0


def test_one_with_nothing_to_do_holds_nothing_up() -> None:
    idle = consumer(0, pending=0, unacknowledged=0, reads_all=False)
    assert trim_up_to(STREAM, [consumer(700, reads_all=False), idle], keep_bytes_max=1) == 700
    assert trim_up_to(STREAM, [idle], keep_bytes_max=0) == 1_500
    # But one that reads everything has acknowledged what its floor says.
    assert trim_up_to(STREAM, [consumer(0, pending=0, unacknowledged=0)], keep_bytes_max=0) == 0


def test_a_stream_without_consumers_keeps_what_is_to_be_kept_and_no_more() -> None:
    assert trim_up_to(STREAM, [], keep_bytes_max=0) == 1_500
    assert trim_up_to(STREAM, [], keep_bytes_max=40_000) == 500 + 600
    assert trim_up_to(STREAM, [], keep_bytes_max=100_000) == 0


consumers = st.lists(
    st.builds(
        ConsumerState,
        ack_floor=st.integers(0, 1_600),
        pending=st.integers(0, 2),
        unacknowledged=st.integers(0, 2),
        reads_all=st.booleans(),
    ),
    max_size=5,
)


@given(consumers, st.integers(0, 1_000), st.integers(0, 100_000), st.integers(0, 120_000))
def test_nothing_unacknowledged_is_ever_removed(
    found: list[ConsumerState], messages: int, size: int, keep_bytes_max: int
) -> None:
    stream = StreamState(messages=messages, bytes_stored=size, first_sequence=501, last_sequence=500 + messages)
    last = trim_up_to(stream, found, keep_bytes_max=keep_bytes_max)
    assert last == 0 or stream.first_sequence <= last <= stream.last_sequence
    for each in found:
        if each.reads_all or each.pending or each.unacknowledged:
            assert last <= each.ack_floor
    if last and size:
        removed = (last - stream.first_sequence + 1) * size // messages
        assert size - removed >= keep_bytes_max
