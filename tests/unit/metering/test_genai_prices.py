"""Over every provider and model that genai-prices knows: what is imported costs what it says, to the last digit.

Where it does not, the use is unpriced, and why is listed here: nothing else may differ.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

import pytest
from genai_prices import Usage
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelInfo, Provider, TieredPrices

from contracts.money import Unit
from contracts.pricing import PriceVersion, Unpriced, rate
from contracts.usage import Counts, ModelUsed
from infra.commands import prices
from services.metering import translate

AT: Final = datetime(2026, 11, 20, 12, tzinfo=UTC)
USD: Final = {"usd": Unit(name="usd", kind="money", scale=9)}

# What a count is called by genai-prices.
NAMES: Final[Mapping[str, str]] = {
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cached_input_tokens": "cache_read_tokens",
    "cache_write_tokens": "cache_write_tokens",
    "cache_write_1h_tokens": "cache_write_1h_tokens",
    "input_audio_tokens": "input_audio_tokens",
    "input_image_tokens": "input_image_tokens",
    "input_video_tokens": "input_video_tokens",
    "cached_audio_tokens": "cache_audio_read_tokens",
    "cached_image_tokens": "cache_image_read_tokens",
    "reasoning_tokens": "output_reasoning_tokens",
    "citation_tokens": "output_citation_tokens",
    "output_audio_tokens": "output_audio_tokens",
    "output_image_tokens": "output_image_tokens",
    "output_video_tokens": "output_video_tokens",
    "characters": "input_characters",
    "messages": "input_text_messages",
    "pages": "input_document_pages",
    "annotated_pages": "input_annotated_document_pages",
    "web_search": "web_searches",
    "social_search": "social_searches",
    "storage_search": "storage_searches",
    "code_execution": "code_executions",
}
TOOLS: Final = ("web_search", "social_search", "storage_search", "code_execution")

EVERY_INPUT: Final = {
    "cached_input_tokens": 30_001,
    "cache_write_tokens": 20_002,
    "cache_write_1h_tokens": 10_003,
    "input_audio_tokens": 5_004,
    "input_image_tokens": 4_005,
    "input_video_tokens": 3_006,
    "cached_audio_tokens": 1_007,
    "cached_image_tokens": 1_008,
}
EVERY_OUTPUT: Final = {
    "reasoning_tokens": 1_109,
    "citation_tokens": 210,
    "output_audio_tokens": 311,
    "output_image_tokens": 412,
    "output_video_tokens": 513,
}
# Tokens of every kind, short and long: around the thresholds of 128,000, 200,000 and 272,000 tokens, and far above.
USES: Final[tuple[Mapping[str, int], ...]] = (
    {"input_tokens": 1, "output_tokens": 1},
    {"input_tokens": 1_234_567, "output_tokens": 0},
    {"input_tokens": 128_000, "output_tokens": 7_001},
    {"input_tokens": 128_001, "output_tokens": 7_001, "cached_input_tokens": 128_001},
    {"input_tokens": 200_000, "output_tokens": 3, "cached_input_tokens": 100_001, "cache_write_tokens": 77},
    {"input_tokens": 200_001, "output_tokens": 3, "cached_input_tokens": 100_001, "cache_write_tokens": 77},
    {"input_tokens": 272_001, "output_tokens": 11, "reasoning_tokens": 11},
    {"input_tokens": 100_000, "output_tokens": 5_000, **EVERY_INPUT, **EVERY_OUTPUT},
    {"input_tokens": 999_999, "output_tokens": 64_000, **EVERY_INPUT, **EVERY_OUTPUT},
    {"input_tokens": 10, "output_tokens": 10, "web_search": 3, "storage_search": 2},
    {"input_tokens": 10, "output_tokens": 10, "social_search": 3, "code_execution": 2},
    {"input_tokens": 0, "output_tokens": 0, "characters": 4_321},
    {"input_tokens": 0, "output_tokens": 0, "messages": 17},
    {"input_tokens": 0, "output_tokens": 0, "pages": 20, "annotated_pages": 6},
)


@pytest.fixture(scope="module")
def imported() -> PriceVersion:
    providers = [provider.id for provider in get_snapshot().providers]
    known = prices.read_known(providers=providers, models=(), at=AT)
    row = translate.VersionRow.model_validate(
        prices.next_version(known, base=[], units=["usd"], id="all", effective_at=AT)
    )
    return translate.read_version(row, units=USD)


def models() -> Iterator[tuple[Provider, ModelInfo]]:
    for provider in get_snapshot().providers:
        for model in provider.models:
            yield provider, model


def used(provider: Provider, model: ModelInfo, counts: Mapping[str, int], *, tier: str | None = None) -> ModelUsed:
    further: dict[str, Any] = {name: count for name, count in counts.items() if name not in TOOLS}
    plain = {name: further.pop(name) for name in ("input_tokens", "output_tokens")}
    tools = {name: count for name, count in counts.items() if name in TOOLS}
    return ModelUsed(
        provider=provider.id, model=model.id, counts=Counts(**further, tool_calls=tools), service_tier=tier, **plain
    )


def expected(
    provider: Provider, model: ModelInfo, counts: Mapping[str, int], context: dict[str, str] | None
) -> Decimal:
    usage = Usage(**{NAMES[name]: count for name, count in counts.items()})
    said = model.calc_price(usage, provider, genai_request_timestamp=AT, price_context=context)
    return said.total_price


def test_nearly_every_model_is_imported(imported: PriceVersion) -> None:
    assert len(imported.rates) > 2_000


def test_every_use_of_every_model_costs_what_the_package_says(imported: PriceVersion) -> None:
    compared = unpriced = 0
    for provider, model in models():
        if (provider.id, model.id) not in imported.rates:
            continue
        for counts in USES:
            try:
                rated = rate(used(provider, model, counts), price_version=imported, units=USD)
            except Unpriced as refusal:
                # The one difference: what has no price at all is not free.
                unpriced += 1
                said = model.get_prices(AT)
                missing = refusal.missing or ("nothing",)
                for quantity in missing:
                    name = quantity.removeprefix("tool_calls.")
                    keys = {key for key, (each, _) in prices._QUANTITIES.items() if each == quantity}
                    assert counts[name]
                    assert not any(vars(said).get(key) for key in keys), (provider.id, model.id, quantity)
                continue
            compared += 1
            exact = sum((item.exact for item in rated.items), Decimal(0))
            assert exact == expected(provider, model, counts, None), (provider.id, model.id, counts)
    assert compared > 15_000
    assert unpriced > 1_000


def test_what_is_unpriced_would_cost_nothing_more_by_the_package(imported: PriceVersion) -> None:
    for provider, model in models():
        if (provider.id, model.id) not in imported.rates:
            continue
        for counts in USES:
            use = used(provider, model, counts)
            try:
                rate(use, price_version=imported, units=USD)
            except Unpriced as refusal:
                missing = {name.removeprefix("tool_calls.") for name in refusal.missing}
                if missing & {"input_tokens", "output_tokens"}:
                    continue
                rest = {name: count for name, count in counts.items() if name not in missing}
                assert expected(provider, model, counts, None) == expected(provider, model, rest, None)


def test_every_service_tier_costs_what_the_package_says(imported: PriceVersion) -> None:
    compared = 0
    for provider, model in models():
        if (provider.id, model.id) not in imported.rates:
            continue
        for variant in model.price_variants or ():
            tier = prices._tier_of(variant)
            if tier is None or (variant.constraint is not None and not variant.constraint.active(AT)):
                continue
            outputless = False
            for counts in USES[:7]:
                try:
                    rated = rate(used(provider, model, counts, tier=tier), price_version=imported, units=USD)
                except Unpriced as refusal:
                    outputless |= "output_tokens" in refusal.missing
                    assert outputless, (provider.id, model.id, tier, counts)
                    continue
                compared += 1
                exact = sum((item.exact for item in rated.items), Decimal(0))
                assert exact == expected(provider, model, counts, variant.when), (provider.id, model.id, tier, counts)
    assert compared > 500


def test_a_tier_that_has_no_price_is_unpriced_and_not_the_standard_one(imported: PriceVersion) -> None:
    use = ModelUsed(provider="anthropic", model="claude-2", input_tokens=1, output_tokens=1, service_tier="turbo")
    with pytest.raises(Unpriced) as refusal:
        rate(use, price_version=imported, units=USD)
    assert refusal.value.missing == ("service_tier.turbo",)


def test_the_tiers_by_context_are_imported(imported: PriceVersion) -> None:
    tiered = [
        (provider.id, model.id)
        for provider, model in models()
        if any(isinstance(value, TieredPrices) for value in vars(model.get_prices(AT)).values())
    ]
    assert len(tiered) > 100
    for name in tiered:
        assert any(each.above for each in imported.rates.get(name, ())), name


def test_only_what_has_no_exact_price_is_left_out() -> None:
    providers = [provider.id for provider in get_snapshot().providers]
    known = prices.read_known(providers=providers, models=(), at=AT)
    assert set(known.left_out) == {"no price at all", "prices by the hour alone", "prices by time of day"}
    assert known.rates.keys().isdisjoint(
        {tuple(each.split("/", 1)) for names in known.left_out.values() for each in names}
    )
