"""What metering does with prices beyond those of models: which version, for whom, in which order, and what waits."""

import json
import random
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.money import Unit
from contracts.pricing import Override, OwnPrice, PriceVersion, Rate, Rated, Surcharge, Tier, total_of
from contracts.usage import Counts, ModelUsed
from services.metering import translate
from services.metering.domain.prices import (
    CountedFirst,
    CountedOtherwise,
    NoPrice,
    PriceBook,
    difference,
    is_new,
    rate_in_order,
)
from services.metering.domain.usage import Usage
from tests.unit.metering.building import NOON, USD, price_version, usage

UNITS = {"usd": USD, "cents": Unit(name="cents", kind="money", scale=0)}


def own(*tiers: tuple[int | None, str], **more: Any) -> OwnPrice:
    made = tuple(Tier(None if end is None else Decimal(end), Decimal(price)) for end, price in tiers)
    values: dict[str, Any] = {"id": "renders", "type": "render", "unit": "usd", "kind": "per_unit", "quantity": "n"}
    return OwnPrice(tiers=made, **(values | more))


def version(*prices: OwnPrice, id: str = "v1", effective_at: datetime = NOON, **more: Any) -> PriceVersion:
    return replace(price_version(id=id, effective_at=effective_at), prices=prices, **more)


def book(*versions: PriceVersion) -> PriceBook:
    return PriceBook(versions, units=UNITS)


def event(number: int = 1, *, type: str = "render", data: str = '{"n": 1}', **more: Any) -> Usage:
    return usage(number, type=type, used=None, data=data, **more)


PER_UNIT = own((None, "0.25"))
GRADUATED = own((10, "1"), (None, "0.3333"), kind="graduated", period="month")


def test_an_event_of_any_type_costs_what_its_own_price_says() -> None:
    price = book(version(PER_UNIT)).price(event(data='{"n": 3, "more": [1]}'))
    assert isinstance(price, Rated)
    assert (price.price_version, price.amounts) == ("v1", {"usd": 750_000_000})
    assert [(item.quantity, item.count, item.price_id) for item in price.items] == [("n", 3, "renders")]


def test_a_number_is_what_was_written() -> None:
    price = book(version(own((None, "1")))).price(event(data='{"n": 0.1}'))
    assert isinstance(price, Rated)
    assert price.items[0].count == Decimal("0.1")


def test_what_has_no_price_waits_under_its_type() -> None:
    prices = book(version(PER_UNIT))
    assert prices.price(event(type="other thing")) == NoPrice("type:other thing")
    assert prices.price(event(occurred_at=NOON - timedelta(days=1))) == NoPrice("type:render")
    assert prices.priced_times("type:render") == [(NOON, None)]
    assert prices.priced_times("type:other thing") == []


@pytest.mark.parametrize("data", ["{}", '{"n": "many"}', '{"n": -1}', '{"n": 1e300}', '{"m": 1}'])
def test_what_cannot_be_measured_waits_and_is_not_found_again_under_that_version(data: str) -> None:
    waiting = event(data=data)
    prices = book(version(PER_UNIT))
    price = prices.price(waiting)
    assert price == NoPrice("looked_at:v1/render")
    assert prices.priced_times(price.key) == []
    # A version of before that counts each event would price it, if it held: that is worth a look.
    later = prices.extended(
        [version(own((None, "1"), quantity=None, id="all"), id="v2", effective_at=waiting.occurred_at)]
    )
    assert later.priced_times(price.key) == [(waiting.occurred_at, None)]
    assert isinstance(later.price(waiting), Rated)


def test_a_missing_quantity_waits_by_name_until_a_version_has_it() -> None:
    used = ModelUsed(
        provider="openai", model="gpt-4o-mini", input_tokens=10, output_tokens=1, counts=Counts(images=2, pages=1)
    )
    prices = book(version())
    waiting = usage(used=used)
    price = prices.price(waiting)
    assert price == NoPrice("openai/gpt-4o-mini images,pages")
    assert prices.priced_times(price.key) == []
    rates = dict(prices.versions[0].rates)
    key = ("openai", "gpt-4o-mini")
    one = replace(version(id="v2", effective_at=NOON + timedelta(hours=1)), rates={
        key: (*rates[key], Rate("images", "usd", Decimal("0.01"), 1))
    })  # fmt: skip
    both = replace(one, id="v3", effective_at=NOON + timedelta(hours=2), rates={
        key: (*one.rates[key], Rate("pages", "usd", Decimal("0.02"), 1))
    })  # fmt: skip
    later = prices.extended([one, both])
    assert later.priced_times(price.key) == [(both.effective_at, None)]
    assert later.price(replace_time(waiting, one.effective_at)) == NoPrice("openai/gpt-4o-mini pages")
    assert isinstance(later.price(replace_time(waiting, both.effective_at)), Rated)


def replace_time(of: Usage, time: datetime) -> Usage:
    return usage(used=of.used, occurred_at=time)


def test_terms_are_those_of_the_account() -> None:
    cheaper = Override(prices=(own((None, "0.1")),), markup=(Surcharge("usd", percent=Decimal(-50)),))
    prices = book(version(PER_UNIT, accounts={"acme-1": cheaper}))

    def cost(account: str, **more: Any) -> int:
        price = prices.price(event(account=account) if not more else usage(account=account, **more))
        assert isinstance(price, Rated)
        return price.amounts["usd"]

    assert (cost("acme-1"), cost("acme-1/ana"), cost("acme-2")) == (100_000_000, 100_000_000, 250_000_000)
    used = ModelUsed(provider="openai", model="gpt-4o-mini", input_tokens=1_000_000, output_tokens=0)
    assert (cost("acme-1", used=used), cost("acme-2", used=used)) == (75_000_000, 150_000_000)


def test_what_depends_on_a_period_is_counted_first() -> None:
    prices = book(version(GRADUATED, effective_at=NOON - timedelta(days=30)))
    one = event()
    price = prices.price(one)
    assert price == CountedFirst([(one.partition, one.account, "renders", NOON.replace(day=1, hour=0))])
    rated = prices.price(one, counted={})
    assert isinstance(rated, Rated)
    assert rated.amounts == {"usd": 10**9}


@given(st.lists(st.integers(0, 15), min_size=1, max_size=30), st.integers(0, 2**32), st.integers(1, 7))
def test_any_order_and_batching_of_a_period_comes_to_the_same(used: list[int], seed: int, size: int) -> None:
    prices = book(
        version(GRADUATED, own((None, "0.7"), id="each", unit="cents"), effective_at=NOON - timedelta(days=30))
    )
    events = [event(number, account="acme", data=json.dumps({"n": n})) for number, n in enumerate(used)]
    shuffled = list(events)
    random.Random(seed).shuffle(shuffled)

    def charged(order: list[Usage], batch: int) -> dict[str, int]:
        counters: dict[Any, Any] = {}
        totals = {"usd": 0, "cents": 0}
        for start in range(0, len(order), batch):
            rated, moved = rate_in_order(order[start : start + batch], book=prices, counters=counters)
            counters |= moved
            for price in rated.values():
                assert isinstance(price, Rated)
                for unit, amount in price.amounts.items():
                    totals[unit] += amount
        ((_, counter),) = counters.items()
        assert counter.quantity == sum(used)
        return totals

    found = charged(events, len(events))
    assert charged(shuffled, size) == found
    exact = total_of(GRADUATED, Decimal(sum(used))) * 10**9
    assert abs(found["usd"] - exact) * 2 <= 1


def test_events_of_two_months_are_counted_apart() -> None:
    prices = book(version(GRADUATED, effective_at=NOON - timedelta(days=60)))
    march, february = (
        event(number, account="acme", data='{"n": 10}', occurred_at=at)
        for number, at in ((1, NOON), (2, NOON - timedelta(days=30)))
    )
    rated, moved = rate_in_order([march, february], book=prices, counters={})
    assert {price.amounts["usd"] for price in rated.values() if isinstance(price, Rated)} == {10 * 10**9}
    assert sorted(key[3].month for key in moved) == [2, 3]


def test_an_own_price_never_counts_something_else_under_its_id() -> None:
    prices = book(version(GRADUATED))
    later = NOON + timedelta(days=1)
    for other in (replace(GRADUATED, quantity="m"), replace(GRADUATED, period="day"), replace(GRADUATED, type="x")):
        with pytest.raises(CountedOtherwise) as refusal:
            is_new(version(other, id="v2", effective_at=later), book=prices, at=NOON, backdate=False)
        assert refusal.value.code == "counted_otherwise"
    cheaper = replace(GRADUATED, tiers=(Tier(None, Decimal(0)),))
    assert is_new(version(cheaper, id="v2", effective_at=later), book=prices, at=NOON, backdate=False)


def test_a_difference_names_what_changes_beside_rates() -> None:
    old = version(PER_UNIT, members={"acme": "pro"}, plans={"pro": Override()})
    assert difference(old, replace(old, id="v2")).is_empty
    new = replace(
        old,
        prices=(own((None, "0.3")),),
        markup=(Surcharge("usd", percent=Decimal(1)),),
        members={"acme": "pro", "other": "pro"},
        accounts={"acme": Override(markup=())},
    )
    found = difference(old, new)
    assert found.others == ["accounts/acme", "markup", "plans/pro", "prices/renders"]
    assert not found.is_empty
    assert difference(None, new).others == ["accounts/acme", "markup", "plans/pro", "prices/renders"]


def test_a_version_prices_only_in_units_that_exist() -> None:
    for wrong in (
        version(own((None, "1"), unit="eur")),
        version(markup=(Surcharge("eur"),)),
        version(accounts={"acme": Override(own_key_fees=(Surcharge("eur"),))}),
    ):
        with pytest.raises(ValueError, match="unknown units"):
            book(wrong)


def test_a_stored_version_is_the_one_that_was_stored() -> None:
    made = version(GRADUATED, markup=(Surcharge("usd", Decimal("2.5")),), plans={"pro": Override(markup=())},
                   members={"acme": "pro"})  # fmt: skip
    stored = translate.stored_version(
        id=made.id,
        effective_at=made.effective_at,
        models=translate.models_as_json(made),
        further=translate.further_as_json(made),
        units=UNITS,
    )
    assert stored == made
    plain = version()
    assert translate.further_as_json(plain) is None
    assert (
        translate.stored_version(
            id=plain.id, effective_at=plain.effective_at, models=translate.models_as_json(plain), units=UNITS
        )
        == plain
    )


def test_a_line_of_another_type_names_it_in_its_scope_and_settles_its_hold() -> None:
    one = event(type="my render/done", account="acme")
    hold = f"hold_{one.partition:02d}_01980000-0000-7000-8000-000000000000"
    elsewhere = f"hold_{(one.partition + 1) % 64:02d}_01980000-0000-7000-8000-000000000000"

    def line(data: str) -> dict[str, Any]:
        named = event(type="my render/done", account="acme", data=data)
        rated = book(version(own((None, "0.25"), type="my render/done"))).price(named)
        assert isinstance(rated, Rated)
        found: dict[str, Any] = json.loads(bytes(translate.priced(named, rated, units=UNITS).line))
        return found

    made = line('{"n": 2}')
    assert made["scope"] == {"provider": "event", "model": "my_render/done"}
    assert made["amounts"] == [{"amount": "0.5", "unit": "usd"}]
    assert "hold" not in made
    assert line(json.dumps({"n": 1, "hold": hold}))["hold"] == hold
    for wrong in (elsewhere, "hold", 5, None):
        assert "hold" not in line(json.dumps({"n": 1, "hold": wrong}))


def test_what_is_kept_of_a_plain_call_is_what_was_kept_before() -> None:
    one = usage()
    rated = book(version()).price(one)
    assert isinstance(rated, Rated)
    assert json.loads(translate.priced(one, rated, units=UNITS).items) == [
        {"quantity": "input_tokens", "count": 101, "unit": "usd", "price": "0.15", "per": 1000000,
         "exact": "0.00001515"},
        {"quantity": "output_tokens", "count": 1, "unit": "usd", "price": "0.15", "per": 1000000,
         "exact": "0.00000015"},
    ]  # fmt: skip
