"""The price of a use is that of its own time, exact to the unit's step."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.pricing import PriceVersion, Rated
from contracts.usage import TOKENS_MAX, ModelUsed
from services.kit.catalogue import load_catalogue
from services.metering.domain.prices import NoPrice, PriceBook
from services.metering.translate import InvalidVersion, VersionRow, read_price_book, read_version
from tests.unit.metering.building import NOON, USD, price_book, price_version, usage

CATALOGUE = Path(__file__).parents[3] / "infra" / "catalogue" / "catalogue.toml"
DAYS = st.lists(st.integers(0, 1000), min_size=1, max_size=6, unique=True)


def versions(days: Iterable[int]) -> list[PriceVersion]:
    return [price_version(id=f"v{day}", effective_at=NOON + timedelta(days=day)) for day in days]


@given(DAYS, st.integers(-10, 1100))
def test_the_version_is_the_latest_that_was_in_effect(days: list[int], day: int) -> None:
    book = price_book(*versions(days))
    found = book.version_at(NOON + timedelta(days=day))
    in_effect = [each for each in days if each <= day]
    assert (found.id if found else None) == (f"v{max(in_effect)}" if in_effect else None)


def test_a_version_holds_from_its_very_moment() -> None:
    book = price_book(*versions([0, 1]))
    change = NOON + timedelta(days=1)
    assert [each.id for at in (change - timedelta(microseconds=1), change) if (each := book.version_at(at))] == [
        "v0",
        "v1",
    ]


def test_late_use_costs_what_it_cost_then() -> None:
    book = price_book(
        price_version(id="old", usd_per_million_tokens="1"),
        price_version(id="new", effective_at=NOON, usd_per_million_tokens="2"),
    )
    used = ModelUsed(provider="openai", model="gpt-4o-mini", input_tokens=1_000_000, output_tokens=0)
    then = book.price(usage(used=used, occurred_at=NOON - timedelta(days=1)))
    now = book.price(usage(used=used, occurred_at=NOON))
    assert isinstance(then, Rated)
    assert isinstance(now, Rated)
    assert (then.price_version, then.amounts) == ("old", {"usd": 10**9})
    assert (now.price_version, now.amounts) == ("new", {"usd": 2 * 10**9})


@pytest.mark.parametrize(
    "missing",
    [
        usage(used=ModelUsed(provider="openai", model="gpt-unheard-of", input_tokens=1, output_tokens=1)),
        usage(used=ModelUsed(provider="groq", model="gpt-4o-mini", input_tokens=1, output_tokens=1)),
        usage(occurred_at=NOON - timedelta(days=31)),
    ],
    ids=["model", "provider", "before the first version"],
)
def test_what_has_no_price_is_never_free(missing: Any) -> None:
    price = price_book().price(missing)
    assert price == NoPrice(key=f"{missing.used.provider}/{missing.used.model}")


@given(
    input_tokens=st.integers(0, TOKENS_MAX),
    output_tokens=st.integers(0, TOKENS_MAX),
    price=st.decimals(min_value=0, max_value=1000, places=6),
)
def test_costs_are_rounded_once_half_even_to_the_step(input_tokens: int, output_tokens: int, price: Decimal) -> None:
    book = price_book(price_version(usd_per_million_tokens=f"{price:f}"))
    used = ModelUsed(provider="openai", model="gpt-4o-mini", input_tokens=input_tokens, output_tokens=output_tokens)
    rated = book.price(usage(used=used))
    assert isinstance(rated, Rated)
    exact = Fraction(price) * (input_tokens + output_tokens) * 10**9 / 1_000_000
    # Python rounds fractions half-even.
    assert rated.amounts == {"usd": round(exact)}
    assert sum(Fraction(item.exact) for item in rated.items) * 10**9 == exact


def test_the_catalogue_has_the_price_of_the_demo() -> None:
    catalogue = load_catalogue(CATALOGUE)
    book = read_price_book(catalogue.section("price_versions"), units=catalogue.units)
    used = ModelUsed(provider="openai", model="gpt-4o-mini", input_tokens=374, output_tokens=44)
    rated = book.price(usage(used=used))
    assert isinstance(rated, Rated)
    # 374 x 0.15 / 1e6 + 44 x 0.60 / 1e6 = 0.0000561 + 0.0000264
    assert rated.amounts == {"usd": 82_500}


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "v", "effective_at": "2026-01-01T00:00:00", "models": []},
        {"id": "", "effective_at": "2026-01-01T00:00:00Z", "models": []},
        {"id": "v", "effective_at": "2026-01-01T00:00:00Z", "models": [], "currency": "usd"},
        *(
            {
                "id": "v",
                "effective_at": "2026-01-01T00:00:00Z",
                "models": [{"provider": "openai", "model": "m", "rates": [rate]}],
            }
            for rate in (
                {"quantity": "input_tokens", "unit": "usd", "price": 0.15, "per": 1},
                {"quantity": "input_tokens", "unit": "usd", "price": "-1", "per": 1},
                {"quantity": "input_tokens", "unit": "usd", "price": "NaN", "per": 1},
                {"quantity": "input_tokens", "unit": "usd", "price": "1e3", "per": 1},
                {"quantity": "input_tokens", "unit": "usd", "price": "1", "per": 0},
                {"quantity": "input_tokens", "unit": "eur", "price": "1", "per": 1},
                {"quantity": "seconds", "unit": "usd", "price": "1", "per": 1},
            )
        ),
    ],
)
def test_a_price_book_with_a_mistake_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        read_price_book([wrong], units={"usd": USD})


def test_everything_wrong_with_a_version_is_said_at_once() -> None:
    rates = [
        {"quantity": "input_tokens", "unit": "eur", "price": "1", "per": 1},
        {"quantity": "input_tokens", "unit": "usd", "price": "1", "per": 3},
        {"quantity": "calls", "unit": "usd", "price": "1", "per": 1},
        {"quantity": "calls", "unit": "usd", "price": "2", "per": 1},
    ]
    models = [{"provider": "openai", "model": "m", "rates": rates}] * 2
    row = VersionRow.model_validate({"id": "v", "effective_at": "2026-01-01T00:00:00Z", "models": models})
    with pytest.raises(InvalidVersion) as refusal:
        read_version(row, units={"usd": USD})
    assert [problem.field for problem in refusal.value.problems if problem.field.startswith("models/0")] == [
        "models/0/rates/0",
        "models/0/rates/1",
        "models/0/rates/3",
    ]
    assert "models/1" in [problem.field for problem in refusal.value.problems]


def test_two_versions_never_share_an_id_or_a_time() -> None:
    first, second = versions([0, 1])
    for twin in (replace(second, id=first.id), replace(second, effective_at=first.effective_at)):
        with pytest.raises(ValueError, match="share"):
            PriceBook([first, twin], units={"usd": USD})


def test_a_model_is_listed_once_in_a_version() -> None:
    model = {
        "provider": "openai",
        "model": "m",
        "rates": [{"quantity": "calls", "unit": "usd", "price": "1", "per": 1}],
    }
    section = [{"id": "v", "effective_at": datetime.isoformat(NOON), "models": [model, model]}]
    with pytest.raises(ValueError, match="twice"):
        read_price_book(section, units={"usd": USD})


def test_the_catalogues_second_version_counts_tokens_and_calls_at_the_same_prices() -> None:
    catalogue = load_catalogue(CATALOGUE)
    book = read_price_book(catalogue.section("price_versions"), units=catalogue.units)
    first, second = book.versions
    assert second.effective_at == datetime(2026, 11, 1, tzinfo=UTC)
    for model, rates in first.rates.items():
        assert [each for each in second.rates[model] if each.unit == "usd"] == list(rates)
    for rates in second.rates.values():
        assert [(each.quantity, each.unit, each.price, each.per) for each in rates if each.unit != "usd"] == [
            ("input_tokens", "tokens", Decimal(1), 1),
            ("output_tokens", "tokens", Decimal(1), 1),
            ("calls", "calls", Decimal(1), 1),
        ]
