"""Laws of the simulated provider's answers: decided by the request alone, and bounded by its limits."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.simulators.provider.directives import TOKENS_PER_MESSAGE, Plan, Refused, parse, plan


def request(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], **more}


def planned(text: str, **more: Any) -> Plan:
    return plan(request(text, **more))


@given(text=st.text(), limit=st.integers(min_value=1, max_value=200))
def test_the_same_request_gets_the_same_answer_within_its_limit(text: str, limit: int) -> None:
    try:
        first = planned(text, max_tokens=limit)
    except Refused:
        return
    assert first == planned(text, max_tokens=limit)
    assert first.reasoning_tokens + first.visible_tokens <= limit
    assert first.input_tokens == TOKENS_PER_MESSAGE + len(text.split())
    assert (first.finish_reason == "length") == (planned(text).visible_tokens > first.visible_tokens)


def test_input_is_three_tokens_a_message_and_one_a_word() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is it"}, {"type": "image_url", "image_url": {}}]},
    ]
    assert plan({"model": "m", "messages": messages}).input_tokens == 2 * TOKENS_PER_MESSAGE + 5


def test_only_the_last_user_message_steers() -> None:
    messages = [
        {"role": "user", "content": "[[tokens:5]] [[fail:500]]"},
        {"role": "assistant", "content": "[[tokens:6]]"},
        {"role": "user", "content": "[[tokens:7]]"},
        {"role": "assistant", "content": "[[tokens:8]]"},
    ]
    found = plan({"model": "m", "messages": messages})
    assert (found.visible_tokens, found.directives.fail) == (7, None)


def test_reasoning_comes_first_and_is_bounded_with_the_rest() -> None:
    found = planned("[[tokens:10]] [[reasoning:4]]", max_completion_tokens=6)
    assert (found.reasoning_tokens, found.visible_tokens, found.finish_reason) == (4, 2, "length")
    assert planned("[[cached:99]] a").cached_tokens == TOKENS_PER_MESSAGE + 2


@pytest.mark.parametrize(
    "typo",
    ["[[token:3]]", "[[tokens:]]", "[[tokens: 3]]", "[[cut:1:2]]", "[[tokens:-1]]", "[[fail:200]]", "[[slow:fast]]"],
)
def test_a_directive_that_is_not_understood_is_refused(typo: str) -> None:
    with pytest.raises(Refused, match="does not understand"):
        parse(f"hello {typo}")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"model": "m"}, 400),
        ({"model": "m", "messages": []}, 400),
        (request("a", max_tokens=0), 400),
        (request("a", n=100), 400),
        (request("a", stream="yes"), 400),
        (request("a", stream_options={"include_usage": True}), 400),
        (request("a") | {"model": "missing-model"}, 404),
    ],
)
def test_what_openai_refuses_is_refused(body: dict[str, Any], status: int) -> None:
    with pytest.raises(Refused) as refused:
        plan(body)
    assert refused.value.status == status
