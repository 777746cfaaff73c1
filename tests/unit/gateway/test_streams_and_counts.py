"""Laws of reading a provider: events whole however they are cut, counts that never fall below what was seen."""

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.gateway import translate
from services.gateway.domain.counting import Reported, Seen, counted
from services.gateway.domain.sse import EventSplitter, data_of

EVENTS = [b'data: {"a": 1}\n\n', b": comment\n\n", b"event: x\r\ndata: 1\r\ndata: 2\r\n\r\n", b"data: [DONE]\n\n"]


@given(cuts=st.lists(st.integers(0, len(b"".join(EVENTS))), max_size=12))
def test_events_are_whole_however_the_stream_is_cut(cuts: list[int]) -> None:
    whole = b"".join(EVENTS)
    places = sorted({0, len(whole), *cuts})
    splitter = EventSplitter()
    found = [event for start, end in pairwise(places) for event in splitter.feed(whole[start:end])]
    assert found == EVENTS
    assert splitter.rest() == b""


def test_the_data_of_an_event_are_its_data_lines_and_nothing_else_of_it() -> None:
    assert [data_of(event) for event in EVENTS] == [b'{"a": 1}', b"", b"1\n2", b"[DONE]"]


def test_a_piece_of_a_stream_is_counted_by_what_it_says() -> None:
    def piece(**choice: object) -> translate.Piece:
        found = translate.read_piece(json.dumps({"model": "m-1", "choices": [choice]}).encode())
        assert found is not None
        return found

    assert piece(delta={"role": "assistant", "content": ""}).texts == []
    assert piece(delta={"content": "häh"}).texts == [4]
    assert piece(delta={"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}).texts == [3]
    assert piece(delta={"reasoning_content": "hm"}).texts == [2]
    assert piece(delta={}, finish_reason="stop").texts == []
    assert piece(message={"content": "abc"}).model == "m-1"


def test_usage_that_makes_no_sense_is_no_usage() -> None:
    senseless: list[object] = [None, {}, {"prompt_tokens": -1, "completion_tokens": 1}, {"prompt_tokens": 1.5}, "5", 1]
    for usage in senseless:
        found = translate.read_piece(json.dumps({"choices": [], "usage": usage}).encode())
        assert found is not None
        assert found.reported is None
    details = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 5}}
    found = translate.read_piece(json.dumps({"choices": [], "usage": details}).encode())
    assert found is not None
    assert found.reported == Reported(input_tokens=9, output_tokens=4, cached_tokens=5)


def test_what_kinds_of_tokens_there_were_and_at_which_tier_is_read() -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 5, "audio_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1, "audio_tokens": 3},
    }
    found = translate.read_piece(json.dumps({"choices": [], "usage": usage, "service_tier": "flex"}).encode())
    assert found is not None
    assert found.reported == Reported(
        input_tokens=9,
        output_tokens=4,
        cached_tokens=5,
        reasoning_tokens=1,
        input_audio_tokens=2,
        output_audio_tokens=3,
    )
    assert found.service_tier == "flex"


def test_what_is_not_json_is_not_a_piece() -> None:
    for data in (b"", b"{", b"[1]", b'{"choices": 5}', b"\xff", b'{"a":' * 5_000):
        assert translate.read_piece(data) is None


@given(sizes=st.lists(st.integers(1, 200), max_size=50), reported=st.integers(0, 100))
def test_what_was_seen_is_the_least_that_a_broken_answer_counts(sizes: list[int], reported: int) -> None:
    seen = Seen(began=True)
    for size in sizes:
        seen.add(size)
    unreported = counted(seen, input_tokens_estimate=7, complete=True)
    assert (unreported.input_tokens, unreported.estimated) == (7, True)
    assert unreported.output_tokens >= len(sizes)
    seen.reported = Reported(input_tokens=3, output_tokens=reported)
    whole = counted(seen, input_tokens_estimate=7, complete=True)
    assert (whole.input_tokens, whole.output_tokens, whole.estimated) == (3, reported, False)
    broken = counted(seen, input_tokens_estimate=7, complete=False)
    assert (broken.output_tokens, broken.estimated) == (max(reported, unreported.output_tokens), True)
