"""Which version prices a use, which versions may be added, and what a version changes."""

import json
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.pricing import PriceVersion, Rate, Rated
from contracts.usage import ModelUsed
from services.metering import translate
from services.metering.domain.prices import (
    LATE_MAX,
    IdTaken,
    InThePast,
    NoPrice,
    PriceBook,
    TimeTaken,
    difference,
    is_new,
)
from tests.unit.metering.building import NOON, USD, price_book, price_version, priced, usage

MODELS = ("gpt-4o", "gpt-4o-mini")
PRICES = st.sampled_from(["0", "0.15", "0.60", "2"])


def version_of(number: int, prices: dict[str, str]) -> PriceVersion:
    return PriceVersion(
        id=f"v{number}",
        effective_at=NOON + timedelta(days=number),
        rates={
            ("openai", model): (
                Rate(quantity="input_tokens", unit="usd", price=Decimal(price), per=1_000_000),
                Rate(quantity="output_tokens", unit="usd", price=Decimal(price), per=1_000_000),
            )
            for model, price in prices.items()
        },
    )


prices_of_models = st.dictionaries(st.sampled_from(MODELS), PRICES)
books = st.lists(prices_of_models, max_size=5).map(
    lambda all_prices: PriceBook(
        [version_of(number, prices) for number, prices in enumerate(all_prices)], units={"usd": USD}
    )
)
pins = st.none() | st.integers(0, 6).map(lambda number: f"v{number}")


def used(model: str, price_version: str | None = None) -> ModelUsed:
    return ModelUsed(provider="openai", model=model, input_tokens=10, output_tokens=1, price_version=price_version)


@given(books, st.sampled_from(MODELS), st.integers(-1, 6))
def test_pinned_use_is_rated_under_exactly_its_version(book: PriceBook, model: str, day: int) -> None:
    for number in range(6):
        price = book.price(usage(used=used(model, f"v{number}"), occurred_at=NOON + timedelta(days=day)))
        version = book.find(f"v{number}")
        if version is None:
            assert price == NoPrice(key=f"version:v{number}")
        elif ("openai", model) not in version.rates:
            assert price == NoPrice(key=f"version:v{number}/openai/{model}")
        else:
            assert isinstance(price, Rated)
            assert price.price_version == f"v{number}"


@given(books, books, st.sampled_from(MODELS), st.integers(-1, 6), pins)
def test_use_set_aside_is_found_if_and_only_if_a_later_book_prices_it(
    before: PriceBook, after: PriceBook, model: str, day: int, pin: str | None
) -> None:
    waiting = usage(used=used(model, pin), occurred_at=NOON + timedelta(days=day))
    price = before.price(waiting)
    if not isinstance(price, NoPrice):
        return
    found = any(
        (since is None or since <= waiting.occurred_at) and (until is None or waiting.occurred_at < until)
        for since, until in after.priced_times(price.key)
    )
    later = priced(after, waiting)
    if price.key.startswith("version:") and "/" in price.key:
        # Its version will never have a price for it: books only grow.
        assert not found
    elif pin is not None:
        # Found too if the version is there and lacks the model: then it waits under another key.
        assert found == (after.find(pin) is not None)
        assert isinstance(later, Rated) or later.key != price.key or not found
    else:
        assert found == isinstance(later, Rated)


def test_a_version_is_added_once_and_a_repeat_is_none() -> None:
    book = price_book(price_version())
    assert is_new(price_version(id="v2", effective_at=NOON), book=book, at=NOON, backdate=False)
    (stored,) = book.versions
    assert not is_new(stored, book=book, at=NOON, backdate=False)
    written_otherwise = price_version(usd_per_million_tokens="0.150")
    assert not is_new(written_otherwise, book=book, at=NOON, backdate=False)


@pytest.mark.parametrize(
    ("version", "refusal"),
    [
        (price_version(usd_per_million_tokens="0.16"), IdTaken),
        (replace(price_version(), effective_at=NOON), IdTaken),
        (price_version(id="v2"), TimeTaken),
        (price_version(id="v2", effective_at=NOON - LATE_MAX - timedelta(microseconds=1)), InThePast),
    ],
    ids=["other prices", "another time", "the same time", "the past"],
)
def test_a_version_that_contradicts_is_refused(version: PriceVersion, refusal: type[Exception]) -> None:
    with pytest.raises(refusal):
        is_new(version, book=price_book(), at=NOON, backdate=False)


def test_only_what_is_called_backdated_takes_effect_in_the_past() -> None:
    early = price_version(id="v2", effective_at=NOON - timedelta(days=90))
    assert is_new(early, book=price_book(), at=NOON, backdate=True)
    late = price_version(id="v2", effective_at=NOON - LATE_MAX)
    assert is_new(late, book=price_book(), at=NOON, backdate=False)


@given(prices_of_models, prices_of_models)
def test_a_difference_is_all_that_differs(old: dict[str, str], new: dict[str, str]) -> None:
    found = difference(version_of(0, old), version_of(1, new))
    assert {model for _, model in found.added} == new.keys() - old.keys()
    assert {model for _, model in found.removed} == old.keys() - new.keys()
    assert {model for _, model in found.changed} == {
        model for model in new.keys() & old.keys() if Decimal(new[model]) != Decimal(old[model])
    }
    assert found.is_empty == (old == new)
    for (_, model), (changed, _) in found.changed.items():
        assert changed.old is not None
        assert changed.new is not None
        assert (changed.old.price, changed.new.price) == (Decimal(old[model]), Decimal(new[model]))


@given(books)
def test_a_version_survives_table_and_http(book: PriceBook) -> None:
    for version in book.versions:
        stored = translate.stored_version(
            id=version.id,
            effective_at=version.effective_at,
            models=translate.models_as_json(version),
            units=book.units,
        )
        assert stored == version
    answer = translate.PriceBookRow.model_validate_json(translate.price_book_as_json(book, book.versions))
    assert [translate.read_version(row, units=book.units) for row in answer.versions] == list(book.versions)


def test_the_answer_is_what_the_gateway_reads() -> None:
    answer = json.loads(translate.price_book_as_json(price_book(), price_book().versions))
    assert answer == {
        "units": [{"name": "usd", "kind": "money", "scale": 9, "own_key_counts": False, "mirrors": None}],
        "versions": [
            {
                "id": "v1",
                "effective_at": (NOON - timedelta(days=30)).isoformat().replace("+00:00", "Z"),
                "models": [
                    {
                        "provider": "openai",
                        "model": "gpt-4o-mini",
                        "rates": [
                            {"quantity": quantity, "unit": "usd", "price": "0.15", "per": 1_000_000}
                            for quantity in ("input_tokens", "output_tokens")
                        ],
                    }
                ],
            }
        ],
    }


@given(
    books, st.datetimes(NOON.replace(tzinfo=None) - timedelta(days=2), NOON.replace(tzinfo=None) + timedelta(days=9))
)
def test_from_now_on_is_what_any_later_use_needs(book: PriceBook, naive: datetime) -> None:
    moment = naive.replace(tzinfo=NOON.tzinfo)
    shown = PriceBook(book.from_now_on(moment), units=book.units)
    for hours in range(0, 300, 7):
        at = moment + timedelta(hours=hours)
        assert shown.version_at(at) == book.version_at(at)
