"""Laws of quotes: a call never costs more than its quote if it stays within its bounds, and what fits is exact."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.money import Unit, format_amount
from contracts.pricing import Override, PriceVersion, Rate, Surcharge
from contracts.usage import ModelUsed
from services.gateway.domain.counting import Counted
from services.gateway.domain.errors import ModelNotPriced, NoProvider, RequestInvalid, Unavailable
from services.gateway.domain.lately import SAMPLES_MIN, OutputLately
from services.gateway.domain.prices import PriceBook, PricedModel
from services.gateway.domain.quote import Quote, affordable_max_tokens, cost, priced_tier, quote, shown
from services.gateway.domain.request import ChatRequest, chat_request

UNITS = {
    "usd": Unit("usd", "money", 9),
    "tokens": Unit("tokens", "cap", 0),
    "calls": Unit("calls", "cap", 0, own_key_counts=True),
}
AT = datetime(2025, 1, 1, tzinfo=UTC)


def version(*, inputs: str = "0.15", outputs: str = "0.60", id: str = "v1", at: datetime = AT) -> PriceVersion:
    rates = (
        Rate("input_tokens", "usd", Decimal(inputs), 1_000_000),
        Rate("output_tokens", "usd", Decimal(outputs), 1_000_000),
        Rate("input_tokens", "tokens", Decimal(1), 1),
        Rate("output_tokens", "tokens", Decimal(1), 1),
        Rate("calls", "calls", Decimal(1), 1),
    )
    return PriceVersion(id=id, effective_at=at, rates={("openai", "m"): rates, ("groq", "m"): rates})


PRICED = PricedModel(provider="openai", model="m", version=version())


def request(text: str = "hello", **more: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]} | more
    return chat_request(body, image_tokens_max=50_000)


prices = st.decimals(min_value=0, max_value=1000, places=4).map(str)


@given(text=st.text(max_size=200), limit=st.integers(1, 100_000), n=st.integers(1, 8), inputs=prices, outputs=prices)
def test_a_call_within_its_bounds_costs_no_more_than_its_quote(
    text: str, limit: int, n: int, inputs: str, outputs: str
) -> None:
    asked = request(text, max_tokens=limit, n=n)
    priced = PricedModel(provider="openai", model="m", version=version(inputs=inputs, outputs=outputs))
    quoted = quote(asked, priced, units=UNITS, own_key=False, lately=None, output_tokens_max=4096)
    used = quoted.used.model_copy(
        update={"input_tokens": quoted.used.input_tokens // 2, "output_tokens": limit * n // 2}
    )
    actual = cost(used, priced, units=UNITS)
    assert set(actual) == set(quoted.amounts) == {"usd", "tokens", "calls"}
    assert all(actual[unit] <= amount for unit, amount in quoted.amounts.items())


@given(
    limit=st.integers(1, 20_000),
    n=st.integers(1, 5),
    inputs=prices,
    outputs=prices,
    remaining=st.integers(0, 10**8),
    unit=st.sampled_from(["usd", "tokens", "calls"]),
)
def test_what_is_affordable_fits_and_one_more_does_not(
    *, limit: int, n: int, inputs: str, outputs: str, remaining: int, unit: str
) -> None:
    asked = request(max_tokens=limit, n=n)
    priced = PricedModel(provider="openai", model="m", version=version(inputs=inputs, outputs=outputs))
    quoted = quote(asked, priced, units=UNITS, own_key=False, lately=None, output_tokens_max=4096)

    def costs(tokens: int) -> int:
        return cost(quoted.used.model_copy(update={"output_tokens": tokens * n}), priced, units=UNITS)[unit]

    found = affordable_max_tokens(
        quoted, asked, priced, units=UNITS, unit=unit, remaining=format_amount(remaining, UNITS[unit])
    )
    assert 0 <= found <= limit
    assert found == 0 or costs(found) <= remaining
    assert found == limit or costs(found + 1) > remaining


def test_an_own_key_is_quoted_only_in_units_that_count_it() -> None:
    quoted = quote(request(), PRICED, units=UNITS, own_key=True, lately=None, output_tokens_max=4096)
    assert quoted.amounts == {"calls": 1}


@pytest.mark.parametrize(
    ("more", "lately", "expected"),
    [
        ({"max_completion_tokens": 7}, 100, 7),
        ({"max_tokens": 9}, None, 9),
        ({"max_tokens": 9, "max_completion_tokens": 20}, None, 20),
        ({}, 100, 100),
        ({}, 9_999, 4096),
        ({}, None, 4096),
        ({"n": 3}, 100, 300),
    ],
)
def test_output_is_bounded_by_the_first_of_what_is_known(
    more: dict[str, Any], lately: int | None, expected: int
) -> None:
    quoted = quote(request(**more), PRICED, units=UNITS, own_key=False, lately=lately, output_tokens_max=4096)
    assert quoted.used.output_tokens == expected


def test_more_tokens_than_can_be_counted_are_refused() -> None:
    asked = request(max_tokens=10_000_000, n=128)
    with pytest.raises(RequestInvalid):
        quote(asked, PRICED, units=UNITS, own_key=False, lately=None, output_tokens_max=4096)


@given(texts=st.lists(st.text(max_size=50), min_size=1, max_size=5))
def test_input_is_never_bounded_below_its_bytes(texts: list[str]) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    asked = chat_request({"model": "m", "messages": messages}, image_tokens_max=1)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    assert size < asked.input_tokens_bound <= size + 16 + 8 * len(texts)
    assert asked.input_tokens_estimate <= asked.input_tokens_bound


def test_what_a_model_reads_besides_text_is_bounded_too() -> None:
    plain = request().input_tokens_bound
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert request(tools=tools).input_tokens_bound > plain + 50

    def part(**image: str) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"} | image}]
        return {"model": "m", "messages": [{"role": "user", "content": content}]}

    assert chat_request(part(), image_tokens_max=50_000).input_tokens_bound > 50_000
    assert chat_request(part(detail="low"), image_tokens_max=50_000).input_tokens_bound < 4_000
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "x" * 100}}]}
    assert chat_request({"model": "m", "messages": [call]}, image_tokens_max=1).input_tokens_bound > 100


def test_money_is_shown_first() -> None:
    assert shown({"calls": 1, "usd": 4_800, "tokens": 11}, units=UNITS) == [
        ("0.0000048", "usd"),
        ("1", "calls"),
        ("11", "tokens"),
    ]


def test_few_calls_say_nothing_and_many_their_95th_percentile() -> None:
    lately = OutputLately()
    for number in range(1, SAMPLES_MIN):
        lately.add("acme", "m", number)
    assert lately.percentile("acme", "m") is None
    lately.add("acme", "m", 20)
    assert lately.percentile("acme", "m") == 19
    assert lately.percentile("acme", "other") is None
    for _ in range(500):
        lately.add("acme", "m", 3)
    assert lately.percentile("acme", "m") == 3


def test_the_version_of_a_time_is_the_last_that_is_in_force() -> None:
    later = datetime(2026, 1, 1, tzinfo=UTC)
    book = PriceBook(units=UNITS, versions=[version(), version(id="v2", at=later)])
    assert book.version_at(AT).id == "v1"
    assert book.version_at(later).id == "v2"
    with pytest.raises(Unavailable):
        book.version_at(datetime(2024, 1, 1, tzinfo=UTC))


def test_a_model_is_the_first_configured_providers() -> None:
    book = PriceBook(units=UNITS, versions=[version()])
    assert book.find("m", at=AT, providers=["groq", "openai"]).provider == "groq"
    assert [each.provider for each in book.models(at=AT, providers=["openai", "groq"])] == ["openai"]
    with pytest.raises(NoProvider):
        book.find("m", at=AT, providers=["other"])
    with pytest.raises(ModelNotPriced):
        book.find("unheard-of", at=AT, providers=["openai"])


# Prices beyond those of plain tokens ----------------------------------------------------------------------------------


def mtok(quantity: str, price: str, **more: Any) -> Rate:
    return Rate(quantity, "usd", Decimal(price), 1_000_000, **more)


def priced_by(*rates: Rate, account: str | None = None, **more: Any) -> PricedModel:
    made = PriceVersion(id="v1", effective_at=AT, rates={("openai", "m"): rates}, **more)
    return PricedModel(provider="openai", model="m", version=made, account=account)


def quoted_for(asked: ChatRequest, priced: PricedModel, *, own_key: bool = False) -> Quote:
    return quote(asked, priced, units=UNITS, own_key=own_key, lately=None, output_tokens_max=4096)


DEAR = (
    mtok("input_tokens", "1", above=((100, Decimal(2)), (10_000, Decimal("0.5")))),
    mtok("output_tokens", "3"),
    mtok("cached_input_tokens", "1.5"),
    mtok("reasoning_tokens", "4"),
    mtok("input_audio_tokens", "40"),
    mtok("cached_audio_tokens", "20"),
    mtok("output_audio_tokens", "80"),
    mtok("input_tokens", "2.2", service_tier="priority"),
    mtok("output_tokens", "6", service_tier="priority"),
)


@given(
    counts=st.tuples(*[st.integers(0, 400) for _ in range(6)]),
    audio=st.booleans(),
    asked_tier=st.sampled_from([None, "priority", "default"]),
    percent=st.integers(-100, 200),
)
def test_whatever_its_tokens_are_a_call_costs_no_more_than_its_quote(
    counts: tuple[int, ...], audio: bool, asked_tier: str | None, percent: int
) -> None:
    inputs, outputs, cached, reasoning, heard, spoken = counts
    markup = (Surcharge("usd", Decimal(percent), Decimal("0.01")),)
    priced = priced_by(*DEAR, markup=markup, own_key_fees=(Surcharge("usd", abs(Decimal(percent))),))
    asked = request("x" * 400, max_tokens=400, service_tier=asked_tier, **({"modalities": ["audio"]} if audio else {}))
    reported = Counted(
        input_tokens=inputs,
        output_tokens=outputs,
        estimated=False,
        cached_tokens=cached,
        reasoning_tokens=reasoning,
        input_audio_tokens=heard,
        output_audio_tokens=spoken,
    )
    for own_key in (False, True):
        quoted = quoted_for(asked, priced, own_key=own_key)
        for served in {None, quoted.used.service_tier}:
            used = quoted.used.model_copy(
                update={
                    "input_tokens": inputs,
                    "output_tokens": outputs,
                    "counts": reported.counts(audio=asked.has_audio),
                    "service_tier": served,
                }
            )
            # What the gateway says of a call can be read by everybody.
            ModelUsed.model_validate_json(used.model_dump_json())
            assert cost(used, priced, units=UNITS).get("usd", 0) <= quoted.amounts.get("usd", 0)


def test_a_call_that_has_nothing_to_do_with_audio_is_not_quoted_for_it() -> None:
    priced = priced_by(*DEAR)
    silent, spoken = quoted_for(request(), priced), quoted_for(request(audio={"voice": "alloy"}), priced)
    assert spoken.amounts["usd"] > 10 * silent.amounts["usd"]
    part = {"type": "input_audio", "input_audio": {"data": "A" * 640, "format": "wav"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [part]}]}
    assert chat_request(body, image_tokens_max=1).has_audio
    assert not request(modalities=["text"]).has_audio


def test_a_service_tier_is_served_if_it_has_a_price() -> None:
    priced = priced_by(*DEAR)
    assert priced_tier(request(service_tier="priority"), priced) == "priority"
    for tier in ("flex", "auto", "default", None):
        assert priced_tier(request(service_tier=tier), priced) is None
    dear, plain = quoted_for(request(service_tier="priority"), priced), quoted_for(request(), priced)
    assert (dear.used.service_tier, plain.used.service_tier) == ("priority", None)
    assert dear.amounts["usd"] > plain.amounts["usd"]


def test_a_quote_is_of_the_accounts_own_terms() -> None:
    cheaper = Override(rates={("openai", "m"): (mtok("output_tokens", "0"),)})
    plain = (mtok("input_tokens", "0"), mtok("output_tokens", "3"))
    prices = {"accounts": {"acme": cheaper}}
    assert quoted_for(request(), priced_by(*plain, account="acme/ana", **prices)).amounts == {"usd": 0}
    assert quoted_for(request(), priced_by(*plain, account="other", **prices)).amounts["usd"] > 0


def test_a_model_whose_output_has_no_price_is_refused_before_it_is_called() -> None:
    with pytest.raises(ModelNotPriced):
        quoted_for(request(), priced_by(mtok("input_tokens", "1")))


@given(st.tuples(*[st.integers(0, 50) for _ in range(6)]), st.booleans())
def test_what_a_provider_reports_is_made_to_fit(counts: tuple[int, ...], audio: bool) -> None:
    found = Counted(
        input_tokens=counts[0],
        output_tokens=counts[1],
        estimated=False,
        cached_tokens=counts[2],
        reasoning_tokens=counts[3],
        input_audio_tokens=counts[4],
        output_audio_tokens=counts[5],
    ).counts(audio=audio)
    if found is None:
        return
    used = ModelUsed(provider="openai", model="m", input_tokens=counts[0], output_tokens=counts[1], counts=found)
    assert used.counts == found
    assert found.cached_input_tokens == min(counts[2], counts[0])
    assert audio or (found.input_audio_tokens, found.output_audio_tokens) == (0, 0)
