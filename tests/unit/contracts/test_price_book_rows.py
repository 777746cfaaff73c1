"""The price book in JSON: what is stored stays readable and equal; what cannot be meant is refused, with its place."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

import msgspec
import pytest

from contracts.money import Unit
from contracts.pricebook import InvalidVersion, PriceBookRow, VersionRow, read_version, unit_as_row, version_as_row
from contracts.pricing import PriceVersion, Rate

Json = dict[str, Any]

UNITS: Final = {
    "usd": Unit(name="usd", kind="money", scale=9),
    "calls": Unit(name="calls", kind="cap", scale=0, own_key_counts=True),
}
# As versions were written before there was more than this to say.
BEFORE: Final[Json] = {
    "id": "2024-07-18",
    "effective_at": "2024-07-18T00:00:00Z",
    "models": [
        {
            "provider": "openai",
            "model": "gpt-4o-mini",
            "rates": [
                {"quantity": "input_tokens", "unit": "usd", "price": "0.15", "per": 1000000},
                {"quantity": "calls", "unit": "calls", "price": "1", "per": 1},
            ],
        }
    ],
}


def everything() -> Json:
    """A version that says all there is to say."""
    rates = [
        {"quantity": "input_tokens", "unit": "usd", "price": "1.25", "per": 1000000,
         "above": [{"tokens": 200000, "price": "2.5"}]},
        {"quantity": "output_tokens", "unit": "usd", "price": "10", "per": 1000000},
        {"quantity": "cached_input_tokens", "unit": "usd", "price": "0.3", "per": 1000000},
        {"quantity": "input_tokens", "unit": "usd", "price": "0.6", "per": 1000000, "service_tier": "batch"},
        {"quantity": "tool_calls.web_search", "unit": "usd", "price": "35", "per": 1000},
    ]  # fmt: skip
    dearer = {"quantity": "input_tokens", "unit": "usd", "price": "3", "per": 1000000}
    tiers = [{"up_to": "100", "price": "1"}, {"up_to": None, "price": "0.5"}]
    return {
        "id": "v2",
        "effective_at": "2026-01-01T00:00:00Z",
        "models": [{"provider": "google", "model": "gemini", "rates": rates}],
        "prices": [
            {"id": "renders", "type": "render", "unit": "usd", "kind": "graduated", "tiers": tiers, "quantity": "n",
             "period": "month", "free": "10", "minimum": "2", "where": {"size": "large"}},
            {"id": "fee", "type": "scrip.model.used.v1", "unit": "calls", "kind": "per_unit", "price": "1"},
        ],
        "markup": [{"unit": "usd", "percent": "20", "fixed": "0.001"}],
        "own_key_fees": [{"unit": "usd", "percent": "5"}],
        "plans": [{"plan": "pro", "accounts": ["acme", "other"], "markup": []}],
        "accounts": [
            {"account": "acme/ana", "models": [{"provider": "google", "model": "gemini", "rates": [dearer]}],
             "prices": [{"id": "renders", "type": "render", "unit": "usd", "kind": "per_unit", "price": "0.1",
                         "quantity": "n", "period": "month", "where": {"size": "large"}}],
             "own_key_fees": [{"unit": "usd", "fixed": "0.5"}]},
        ],
    }  # fmt: skip


def read(row: Json) -> PriceVersion:
    return read_version(VersionRow.model_validate_json(json.dumps(row)), units=UNITS)


def written(version: PriceVersion) -> Json:
    found: Json = json.loads(msgspec.json.encode(version_as_row(version)))
    return found


def test_what_was_written_before_reads_and_writes_as_it_did() -> None:
    version = read(BEFORE)
    assert version == PriceVersion(
        id="2024-07-18",
        effective_at=datetime(2024, 7, 18, tzinfo=UTC),
        rates={
            ("openai", "gpt-4o-mini"): (
                Rate("input_tokens", "usd", Decimal("0.15"), 1_000_000),
                Rate("calls", "calls", Decimal(1), 1),
            )
        },
    )
    assert written(version) == BEFORE


def test_everything_that_can_be_said_is_read_and_written() -> None:
    version = read(everything())
    assert written(version) == everything()
    assert read(written(version)) == version
    assert version.members == {"acme": "pro", "other": "pro"}


def test_a_reader_takes_what_it_does_not_know_for_nothing() -> None:
    book = {
        "units": [unit_as_row(unit) | {"colour": "red"} for unit in UNITS.values()],
        "versions": [BEFORE | {"x": 1}],
    }
    found = PriceBookRow.model_validate_json(json.dumps(book), extra="ignore")
    assert read_version(found.versions[0], units=UNITS) == read(BEFORE)


def rates(row: Json) -> list[Json]:
    found: list[Json] = row["models"][0]["rates"]
    return found


WRONG: Final[dict[str, tuple[Callable[[Json], object], str]]] = {
    "an unknown unit": (lambda row: rates(row)[0].update(unit="eur"), "models/0/rates/0"),
    "two rates at one place": (lambda row: rates(row).append(dict(rates(row)[3])), "models/0/rates/5"),
    "falling thresholds": (
        lambda row: rates(row)[0]["above"].append({"tokens": 5, "price": "1"}),
        "models/0/rates/0",
    ),
    "a joint rate is missing": (
        lambda row: rates(row).append({"quantity": "input_audio_tokens", "unit": "usd", "price": "40", "per": 1000000}),
        "models/0",
    ),
    "a price and tiers": (lambda row: row["prices"][0].update(price="1"), "prices/0"),
    "neither": (lambda row: row["prices"][1].pop("price"), "prices/1"),
    "an own price twice": (lambda row: row["prices"].append(dict(row["prices"][1])), "prices"),
    "tiers without an end": (lambda row: row["prices"][0]["tiers"].pop(), "prices/0"),
    "a period for calls of models": (lambda row: row["prices"][1].update(period="day"), "prices/1"),
    "two markups for a unit": (lambda row: row["markup"].append({"unit": "usd"}), "markup"),
    "a discount of more than all": (lambda row: row["markup"][0].update(percent="-101"), "markup/0"),
    "a fee that pays": (lambda row: row["own_key_fees"][0].update(percent="-1"), "own_key_fees/0"),
    "an account on two plans": (
        lambda row: row["plans"].append({"plan": "free", "accounts": ["acme"]}),
        "plans",
    ),
    "an account twice": (lambda row: row["accounts"].append({"account": "acme/ana"}), "accounts"),
    "an override of what has no price": (
        lambda row: row["accounts"][0]["models"][0].update(model="other"),
        "accounts/acme/ana",
    ),
    "an override of another rate": (
        lambda row: row["accounts"][0]["models"][0]["rates"][0].update(quantity="images", per=1),
        "accounts/acme/ana",
    ),
    "an own price that counts otherwise": (
        lambda row: row["accounts"][0]["prices"][0].update(period="day"),
        "accounts/acme/ana",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_meant_is_refused_with_its_place(wrong: str) -> None:
    change, place = WRONG[wrong]
    row = everything()
    change(row)
    with pytest.raises(InvalidVersion) as refusal:
        read(row)
    assert place in [problem.field for problem in refusal.value.problems]


def test_all_that_is_wrong_is_named_at_once() -> None:
    row = everything()
    for wrong in ("two rates at one place", "neither", "two markups for a unit"):
        WRONG[wrong][0](row)
    with pytest.raises(InvalidVersion) as refusal:
        read(row)
    assert [problem.field for problem in refusal.value.problems] == ["models/0/rates/5", "prices/1", "markup"]


@pytest.mark.parametrize(
    "quantity", ["tokens", "tool_calls.", "tool_calls.Web", "input", "cached_input_tokens.x", "", "calls "]
)
def test_an_unknown_quantity_is_refused(quantity: str) -> None:
    row = everything()
    rates(row)[4]["quantity"] = quantity
    with pytest.raises(ValueError, match="quantity"):
        read(row)
