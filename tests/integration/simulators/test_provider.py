"""Laws of the simulated provider, seen through the unmodified openai library on a real socket."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI

from infra.servers import free_port
from infra.simulators.provider.app import Settings, build_app
from tests.integration.simulators.serving import process, serving, until

KEY = "sk-sim-of-the-tests"
MODEL = "gpt-4o-mini"


@pytest.fixture
def url() -> Iterator[str]:
    with serving(build_app(Settings(token_seconds=0.001))) as address:
        yield address


@pytest.fixture
def http(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url) as opened:
        yield opened


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(api_key=KEY, base_url=f"{url}/v1", max_retries=0) as opened:
        yield opened


def usage(http: httpx2.Client, key: str | None = KEY) -> dict[str, Any]:
    """The provider's own count, of one key or of all."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    found: dict[str, Any] = http.get("/__sim/usage", headers=headers).json()
    return found


def billed(http: httpx2.Client) -> tuple[int, int, int]:
    totals = usage(http)["totals"]
    return totals["calls"], totals["input_tokens"], totals["output_tokens"]


def outcomes(http: httpx2.Client) -> list[str]:
    return [each["outcome"] for each in http.get("/__sim/requests").json()["requests"]]


def ask(client: OpenAI, text: str, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **more)


def read(stream: Any) -> tuple[int, openai.APIError | None]:
    """How many tokens a stream gives, and the error it ends with."""
    received = 0
    try:
        for chunk in stream:
            received += bool(chunk.choices[0].delta.content)
    except openai.APIError as error:
        return received, error
    return received, None


def test_an_answer_has_the_tokens_that_were_asked_for_and_says_so(client: OpenAI, http: httpx2.Client) -> None:
    answer = ask(client, "count to [[tokens:37]]")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 37, 43)
    assert len(answer.choices[0].message.content.split()) == 37
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", MODEL, "stop")
    assert answer._request_id.startswith("req_")
    assert billed(http) == (1, 6, 37)


def test_the_limit_of_the_request_ends_the_answer(client: OpenAI, http: httpx2.Client) -> None:
    answer = ask(client, "[[tokens:37]]", max_completion_tokens=5)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")
    last = list(ask(client, "[[tokens:37]]", max_tokens=4, stream=True))[-1]
    assert last.choices[0].finish_reason == "length"
    assert billed(http) == (2, 8, 9)


def test_a_stream_is_one_chunk_per_token(client: OpenAI) -> None:
    chunks = list(ask(client, "[[tokens:7]]", stream=True))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(texts) == 7
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 8 + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_carries_usage_only_if_it_was_asked_to(client: OpenAI, http: httpx2.Client) -> None:
    unasked = list(ask(client, "[[tokens:7]]", stream=True))
    assert all(chunk.usage is None and "usage" not in chunk.model_fields_set for chunk in unasked)
    asked = list(ask(client, "[[tokens:7]]", stream=True, stream_options={"include_usage": True}))
    assert len(asked) == len(unasked) + 1
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in asked[:-1])
    assert asked[-1].choices == []
    assert (asked[-1].usage.prompt_tokens, asked[-1].usage.completion_tokens) == (4, 7)
    assert billed(http) == (2, 8, 14)


def test_stream_options_without_a_stream_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stream_options"):
        ask(client, "hello", stream_options={"include_usage": True})


def test_usage_is_left_out_and_still_counted(client: OpenAI, http: httpx2.Client) -> None:
    assert ask(client, "[[tokens:3]] [[omit-usage]]").usage is None
    chunks = list(ask(client, "[[tokens:3]] [[omit-usage]]", stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks)
    assert billed(http) == (2, 10, 6)


def test_cached_and_reasoning_tokens_are_told_apart(client: OpenAI, http: httpx2.Client) -> None:
    found = ask(client, "a b c [[tokens:4]] [[cached:5]] [[reasoning:6]]").usage
    assert (found.prompt_tokens, found.prompt_tokens_details.cached_tokens) == (9, 5)
    assert (found.completion_tokens, found.completion_tokens_details.reasoning_tokens) == (10, 6)
    (row,) = usage(http)["by_key_and_model"]
    assert (row["model"], row["cached_tokens"], row["reasoning_tokens"]) == (MODEL, 5, 6)


def test_several_choices_cost_several_times(client: OpenAI, http: httpx2.Client) -> None:
    answer = ask(client, "[[tokens:4]]", n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 12
    chunks = list(ask(client, "[[tokens:4]]", n=3, stream=True))
    assert {chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason} == {0, 1, 2}
    assert billed(http) == (2, 8, 24)


def test_the_model_that_answers_may_have_another_name(client: OpenAI, http: httpx2.Client) -> None:
    assert ask(client, "[[served-as:gpt-4o-mini-2024-07-18]]").model == "gpt-4o-mini-2024-07-18"
    assert [row["model"] for row in usage(http)["by_key_and_model"]] == [MODEL]


def test_a_key_that_is_not_accepted_gets_401(url: str) -> None:
    with (
        OpenAI(api_key="sk-another-key-altogether", base_url=f"{url}/v1", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        ask(stranger, "hello")
    assert refused.value.code == "invalid_api_key"
    assert "sk-another-key-altogether" not in str(refused.value)


def test_an_unknown_model_gets_404(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="missing-model", messages=[{"role": "user", "content": "hi"}])


def test_the_models_are_listed(client: OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_failure_is_not_billed(client: OpenAI, http: httpx2.Client) -> None:
    with pytest.raises(openai.InternalServerError):
        ask(client, "[[fail:500]]")
    with pytest.raises(openai.RateLimitError) as limited:
        ask(client, "[[fail:429]]", stream=True)
    assert limited.value.response.headers["retry-after"] == "1"
    assert billed(http) == (0, 0, 0)
    assert usage(http)["totals"]["failed"] == 2


def test_the_library_tries_a_failure_again(client: OpenAI, http: httpx2.Client) -> None:
    with pytest.raises(openai.RateLimitError):
        ask(client.with_options(max_retries=2), "[[fail:429]]")
    assert usage(http)["totals"]["failed"] == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_connection_that_dies_is_billed_for_what_was_generated(
    client: OpenAI, http: httpx2.Client, *, stream: bool
) -> None:
    # The client leaves it to its HTTP library to name what happened in the middle of a body.
    with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)):
        list(ask(client, "[[tokens:30]] [[cut:10]]", stream=stream))
    assert billed(http) == (1, 5, 10)
    assert outcomes(http) == ["cut"]


def test_an_error_in_mid_stream_is_billed_for_what_was_generated(client: OpenAI, http: httpx2.Client) -> None:
    received, error = read(ask(client, "[[tokens:30]] [[error-after:5]]", stream=True))
    assert (received, type(error)) == (5, openai.APIError)
    assert billed(http) == (1, 5, 5)


@pytest.mark.parametrize("stream", [True, False])
def test_broken_json_is_billed_like_any_other(client: OpenAI, http: httpx2.Client, *, stream: bool) -> None:
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        list(ask(client, "[[tokens:5]] [[bad-json]]", stream=stream))
    until(lambda: usage(http)["running"] == 0)
    assert billed(http) == (1, 5, 5)


@pytest.mark.parametrize("stream", [True, False])
def test_a_stall_lasts_as_long_as_it_is_told_to(client: OpenAI, *, stream: bool) -> None:
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.2), "[[stall:1]] [[on-disconnect:abort]]", stream=stream)


def test_a_stream_may_stall_in_the_middle(client: OpenAI) -> None:
    text = "[[tokens:9]] [[stall-after:3:1]] [[on-disconnect:abort]]"
    received, error = read(ask(client.with_options(timeout=0.2), text, stream=True))
    assert (received, type(error)) == (3, openai.APITimeoutError)


def leave_after(client: OpenAI, text: str, *, tokens: int) -> None:
    """Read some tokens of a stream, then hang up."""
    with ask(client, text, stream=True) as stream:
        for _, _chunk in zip(range(tokens + 1), stream, strict=False):
            pass


def test_draining_goes_on_and_bills_the_whole_answer_after_the_client_left(client: OpenAI, http: httpx2.Client) -> None:
    leave_after(client, "[[tokens:60]] [[slow:5]] [[on-disconnect:drain]]", tokens=3)
    assert usage(http)["running"] == 1
    until(lambda: usage(http)["running"] == 0)
    assert billed(http) == (1, 6, 60)
    assert outcomes(http) == ["drained"]


def test_aborting_stops_and_bills_what_was_generated_until_then(client: OpenAI, http: httpx2.Client) -> None:
    leave_after(client, "[[tokens:60]] [[slow:5]] [[on-disconnect:abort]]", tokens=3)
    until(lambda: usage(http)["running"] == 0)
    calls, input_tokens, output_tokens = billed(http)
    assert (calls, input_tokens) == (1, 6)
    assert 3 <= output_tokens < 60
    assert outcomes(http) == ["aborted"]


def test_leaving_before_the_first_token_is_free_only_where_leaving_aborts(client: OpenAI, http: httpx2.Client) -> None:
    for policy in ("abort", "drain"):
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.1), f"[[tokens:2]] [[stall:0.3]] [[on-disconnect:{policy}]]")
    until(lambda: usage(http)["running"] == 0)
    assert billed(http) == (1, 6, 2)


def test_keys_are_counted_apart_and_shown_only_as_hashes(client: OpenAI, http: httpx2.Client, url: str) -> None:
    with OpenAI(api_key="sk-sim-another", base_url=f"{url}/v1") as another:
        ask(another, "[[tokens:5]]")
    ask(client, "[[tokens:7]]")
    assert billed(http) == (1, 4, 7)
    everybody = usage(http, key=None)
    assert everybody["totals"]["output_tokens"] == 12
    assert len(everybody["by_key_and_model"]) == 2
    assert "sk-sim" not in json.dumps(everybody) + http.get("/__sim/requests").text


def test_the_count_outlives_the_process_if_it_has_a_file(tmp_path: Path) -> None:
    settings = Settings(keys=frozenset({KEY}), token_seconds=0, state=tmp_path / "provider.jsonl")
    for _ in range(2):
        with serving(build_app(settings)) as address, OpenAI(api_key=KEY, base_url=f"{address}/v1") as client:
            ask(client, "[[tokens:5]]")
            with httpx2.Client(base_url=address) as http:
                counted = billed(http)
    assert counted == (2, 8, 10)
    assert KEY not in (tmp_path / "provider.jsonl").read_text()


def test_as_a_process_it_is_told_everything_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIP_PROVIDER_KEYS", "sk-one sk-two")
    monkeypatch.setenv("SCRIP_PROVIDER_DISCONNECT", "abort")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with process("provider", "--token-seconds", "0", port=port) as started:
        with httpx2.Client(base_url=url) as http:
            assert http.get("/healthz").json()["status"] == "alive"
            assert http.get("/readyz").json()["ready"] is True
            assert http.get("/__sim/usage").json()["disconnect"] == "abort"
        with OpenAI(api_key="sk-two", base_url=f"{url}/v1") as client:
            assert ask(client, "[[tokens:2]]").usage.completion_tokens == 2
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=5) in (0, -signal.SIGTERM)
