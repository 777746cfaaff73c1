"""Laws of splitting a call into batches."""

from hypothesis import given
from hypothesis import strategies as st

from services.kit.publish import BATCH_BYTES_MAX, BATCH_SIZE_MAX, Message, _chunks, _first_places


@given(sizes=st.lists(st.sampled_from([0, 1, BATCH_BYTES_MAX // 3, BATCH_BYTES_MAX, BATCH_BYTES_MAX + 1]), max_size=40))
def test_chunks_keep_the_order_and_the_limits(sizes: list[int]) -> None:
    bodies = {size: b"x" * size for size in set(sizes)}
    messages = [Message("s", bodies[size], None) for size in sizes]
    chunks = _chunks(range(len(sizes)), messages)
    assert [place for chunk in chunks for place in chunk] == list(range(len(sizes)))
    for chunk in chunks:
        assert chunk
        assert len(chunk) <= BATCH_SIZE_MAX
        assert len(chunk) == 1 or sum(sizes[place] for place in chunk) <= BATCH_BYTES_MAX


def test_a_chunk_has_at_most_as_many_messages_as_the_server_takes() -> None:
    messages = [Message("s", b"", None)] * (2 * BATCH_SIZE_MAX + 1)
    assert [len(chunk) for chunk in _chunks(range(len(messages)), messages)] == [BATCH_SIZE_MAX, BATCH_SIZE_MAX, 1]


@given(ids=st.lists(st.one_of(st.none(), st.integers(0, 5))))
def test_each_id_is_published_once_and_what_has_none_always(ids: list[int | None]) -> None:
    messages = [Message("s", f"{each}".encode(), None if each is None else f"{each}") for each in ids]
    first_of = _first_places(messages)
    for place, first in enumerate(first_of):
        assert ids[first] == ids[place]
        assert first == (place if ids[place] is None else ids.index(ids[place]))
