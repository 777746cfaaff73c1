"""What calls of models cost, worked out by hand: parts of tokens, tiers, tools, surcharges, overrides."""

from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from contracts.money import Unit
from contracts.pricing import (
    Override,
    OwnPrice,
    PriceVersion,
    Rate,
    Rated,
    Surcharge,
    Tier,
    Unpriced,
    lacking_joins,
    rate,
    rate_at_most,
)
from contracts.usage import FURTHER_COUNTS, MODEL_USED, PART_OF, Counts, ModelUsed

UNITS: Final = {
    "usd": Unit(name="usd", kind="money", scale=9),
    "tokens": Unit(name="tokens", kind="cap", scale=0),
    "calls": Unit(name="calls", kind="cap", scale=0, own_key_counts=True),
}
MODEL: Final = ("openai", "m")


def mtok(quantity: str, price: str, **more: Any) -> Rate:
    return Rate(quantity, "usd", Decimal(price), 1_000_000, **more)


PLAIN: Final = (mtok("input_tokens", "2.5"), mtok("output_tokens", "10"))


def version(*rates: Rate, **more: Any) -> PriceVersion:
    return PriceVersion(id="v1", effective_at=datetime(2026, 1, 1, tzinfo=UTC), rates={MODEL: rates}, **more)


def use(input_tokens: int = 0, output_tokens: int = 0, *, tier: str | None = None, **counts: Any) -> ModelUsed:
    return ModelUsed(
        provider="openai",
        model="m",
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        service_tier=tier,
        counts=Counts(**counts) if counts else None,
    )


def nanos(rated: Rated) -> int:
    return rated.amounts["usd"]


def missing(used: ModelUsed, of: PriceVersion) -> tuple[str, ...]:
    with pytest.raises(Unpriced) as refusal:
        rate(used, price_version=of, units=UNITS)
    return refusal.value.missing


# By hand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "used", "expected"),
    [
        # 600 x 2.5 + 400 x 1.25 + 100 x 10, of a million: 1,500 + 500 + 1,000 micro-dollars.
        ([mtok("cached_input_tokens", "1.25")], use(1000, 100, cached_input_tokens=400), "0.003"),
        # Without a rate of its own what is cached is input: 1000 x 2.5 + 100 x 10.
        ([], use(1000, 100, cached_input_tokens=400), "0.0035"),
        # Anthropic's: 500 plain, 300 read at a tenth, 200 written at 1.25 times, of them 50 for an hour at double:
        # 500 x 2.5 + 300 x 0.25 + 150 x 3.125 + 50 x 5 = 1250 + 75 + 468.75 + 250.
        (
            [
                mtok("cached_input_tokens", "0.25"),
                mtok("cache_write_tokens", "3.125"),
                mtok("cache_write_1h_tokens", "5"),
            ],
            use(1000, 0, cached_input_tokens=300, cache_write_tokens=200, cache_write_1h_tokens=50),
            "0.00204375",
        ),
        # Reasoning is output, 100 x 10; at its own price 40 x 10 + 60 x 3.
        ([], use(0, 100, reasoning_tokens=60), "0.001"),
        ([mtok("reasoning_tokens", "3")], use(0, 100, reasoning_tokens=60), "0.00058"),
        # 700 text + 200 audio fresh + 50 audio cached + 50 text cached.
        (
            [
                mtok("input_audio_tokens", "40"),
                mtok("cached_input_tokens", "1.25"),
                mtok("cached_audio_tokens", "2.5"),
                mtok("output_audio_tokens", "80"),
            ],
            use(
                1000,
                30,
                input_audio_tokens=250,
                cached_input_tokens=100,
                cached_audio_tokens=50,
                output_audio_tokens=10,
            ),
            # 1750 + 8000 + 125 + 62.5 + 200 + 800
            "0.0109375",
        ),
        # Images by the piece beside tokens; a thousandth of a dollar for each call; tools.
        (
            [
                Rate("images", "usd", Decimal("0.04"), 1),
                Rate("calls", "usd", Decimal(1), 1000),
                Rate("tool_calls.web_search", "usd", Decimal(10), 1000),
                Rate("tool_calls", "usd", Decimal(0), 1),
            ],
            use(10, 10, images=3, tool_calls={"web_search": 2, "my_own": 7}),
            # 0.12 + 0.001 + 0.02 + 25 and 100 micro-dollars
            "0.141125",
        ),
        # The longest input decides for the whole call: 200,000 is not above 200,000.
        ([mtok("input_tokens", "1.25", above=((200_000, Decimal("2.5")),))], use(200_000), "0.25"),
        ([mtok("input_tokens", "1.25", above=((200_000, Decimal("2.5")),))], use(200_001), "0.5000025"),
        (
            [mtok("output_tokens", "10", above=((128_000, Decimal(12)), (200_000, Decimal(15))))],
            use(150_000, 1000),
            "0.387",
        ),
        # Half price in a batch, but for what has no price of a batch.
        (
            [
                mtok("input_tokens", "1.25", service_tier="batch"),
                mtok("output_tokens", "5", service_tier="batch"),
                Rate("tool_calls.web_search", "usd", Decimal(10), 1000),
            ],
            use(1000, 100, tier="batch", tool_calls={"web_search": 1}),
            "0.01175",
        ),
        ([mtok("input_tokens", "1.25", service_tier="batch")], use(1000, 100, tier="default"), "0.0035"),
        ([mtok("input_tokens", "1.25", service_tier="batch")], use(1000, 100), "0.0035"),
    ],
)
def test_a_call_costs_what_it_comes_to_by_hand(rates: list[Rate], used: ModelUsed, expected: str) -> None:
    places = {each.place for each in rates}
    book = version(*(each for each in PLAIN if each.place not in places), *rates)
    rated = rate(used, price_version=book, units=UNITS)
    assert nanos(rated) == int(Decimal(expected) * 10**9)
    assert sum(item.exact for item in rated.items) == Decimal(expected)
    assert all(item.exact * item.per == item.count * item.price for item in rated.items)


def test_a_receipt_names_the_tier() -> None:
    book = version(
        *PLAIN,
        mtok("input_tokens", "1", service_tier="flex", above=((10, Decimal(2)),)),
    )
    (first, *_) = [
        item
        for item in rate(use(11, 1, tier="flex"), price_version=book, units=UNITS).items
        if item.quantity == "input_tokens"
    ]
    assert (first.tier, first.price) == ("flex, above 10", Decimal(2))


def test_what_has_no_rate_is_unpriced_and_never_free() -> None:
    book = version(*PLAIN)
    assert missing(use(1, 1, images=1), book) == ("images",)
    assert missing(use(1, 1, tool_calls={"web_search": 1}), book) == ("tool_calls.web_search",)
    assert missing(use(1, 1, audio_seconds=1, pages=2), book) == ("audio_seconds", "pages")
    assert missing(use(1, 1, tier="priority"), book) == ("service_tier.priority",)
    assert missing(use(0, 1), version(PLAIN[0])) == ("output_tokens",)
    # Of which there is nothing needs no price.
    assert nanos(rate(use(4, 0), price_version=version(PLAIN[0]), units=UNITS)) == 10_000
    # A price for the call says that its tokens are in it; a price that is nothing says that it is free.
    by_call = version(Rate("calls", "usd", Decimal("0.01"), 1))
    assert nanos(rate(use(5, 5, reasoning_tokens=2), price_version=by_call, units=UNITS)) == 10_000_000
    free = version(*PLAIN, Rate("images", "usd", Decimal(0), 1))
    assert nanos(rate(use(4, 0, images=9), price_version=free, units=UNITS)) == 10_000


def test_what_would_be_covered_is_what_is_not_missing() -> None:
    book = version(*PLAIN, mtok("input_tokens", "1", service_tier="flex"))
    assert book.covers(*MODEL, [], units=UNITS)
    assert book.covers(*MODEL, ["cached_input_tokens", "reasoning_tokens"], units=UNITS)
    assert book.covers(*MODEL, ["service_tier.flex"], units=UNITS)
    assert not book.covers(*MODEL, ["service_tier.priority"], units=UNITS)
    assert not book.covers(*MODEL, ["images"], units=UNITS)
    assert not book.covers("openai", "other", [], units=UNITS)


@pytest.mark.parametrize(
    ("surcharge", "expected"),
    [
        # The call costs 3,500 micro-dollars.
        (Surcharge("usd", percent=Decimal(20)), 4_200_000),
        (Surcharge("usd", percent=Decimal("12.5"), fixed=Decimal("0.001")), 4_937_500),
        (Surcharge("usd", percent=Decimal(-10)), 3_150_000),
        (Surcharge("usd", percent=Decimal(-100)), 0),
        (Surcharge("usd", fixed=Decimal("0.0000000005")), 3_500_000),
    ],
)
def test_a_markup_is_added_and_rounded_with_the_rest(surcharge: Surcharge, expected: int) -> None:
    rated = rate(use(1000, 100), price_version=version(*PLAIN, markup=(surcharge,)), units=UNITS)
    assert nanos(rated) == expected
    assert all(item.exact * item.per == item.count * item.price for item in rated.items)
    assert [item.quantity for item in rated.items][2:] in (["markup"], ["markup", "markup"])


def test_an_own_key_costs_its_fee_and_what_counts_such_calls() -> None:
    book = version(
        *PLAIN,
        Rate("calls", "calls", Decimal(1), 1),
        markup=(Surcharge("usd", percent=Decimal(20)),),
        own_key_fees=(Surcharge("usd", percent=Decimal(5), fixed=Decimal("0.0001")),),
    )
    own = use(1000, 100).model_copy(update={"own_key": True})
    # Five percent of 3,500 micro-dollars, and 100; no markup.
    assert rate(own, price_version=book, units=UNITS).amounts == {"calls": 1, "usd": 275_000}
    assert rate(use(1000, 100), price_version=book, units=UNITS).amounts == {"calls": 1, "usd": 4_200_000}
    with pytest.raises(Unpriced):
        rate(own.model_copy(update={"counts": Counts(images=1)}), price_version=book, units=UNITS)
    assert (
        rate(own.model_copy(update={"counts": Counts(images=1)}), price_version=version(*PLAIN), units=UNITS).amounts
        == {}
    )


def test_an_own_price_for_calls_is_added() -> None:
    own = OwnPrice(
        id="fee", type=MODEL_USED, unit="usd", kind="per_unit", tiers=(Tier(None, Decimal("0.5")),), per=1000,
        where=(("provider", "openai"),),
    )  # fmt: skip
    by_page = OwnPrice(
        id="pages", type=MODEL_USED, unit="usd", kind="package", tiers=(Tier(None, Decimal("0.01")),), per=5,
        quantity="attributes.pages",
    )  # fmt: skip
    book = version(*PLAIN, prices=(own, by_page))
    plain = use(1000, 100)
    assert nanos(rate(plain, price_version=book, units=UNITS)) == 3_500_000 + 500_000
    paged = plain.model_copy(update={"attributes": {"pages": 6}})
    assert nanos(rate(paged, price_version=book, units=UNITS)) == 3_500_000 + 500_000 + 20_000_000
    spoilt = plain.model_copy(update={"attributes": {"pages": "some"}})
    assert missing(spoilt, book) == ("prices.pages",)


def test_the_nearest_override_counts_and_an_accounts_own_before_its_plans() -> None:
    def at(price: str) -> Override:
        return Override(rates={MODEL: (mtok("input_tokens", price),)})

    book = version(
        *PLAIN,
        markup=(Surcharge("usd", percent=Decimal(100)),),
        plans={"pro": Override(rates={MODEL: (mtok("input_tokens", "1"),)}, markup=()), "free": Override()},
        members={"acme": "pro", "acme/lab": "free"},
        accounts={"acme/ana": at("3"), "acme/ana/bot": at("4")},
    )

    def cost(account: str | None) -> int:
        return nanos(rate(use(1_000_000), price_version=book, units=UNITS, account=account)) // 10**6

    # The markup doubles, unless the plan says none.
    assert [cost(each) for each in (None, "other", "acme", "acme/bob")] == [5000, 5000, 1000, 1000]
    assert [cost(each) for each in ("acme/ana", "acme/ana/x", "acme/ana/bot")] == [3000, 3000, 4000]
    assert [cost(each) for each in ("acme/lab", "acme/lab/x")] == [5000, 5000]


@pytest.mark.parametrize(
    "counts",
    [
        {"cached_input_tokens": 101},
        {"cached_input_tokens": 60, "cache_write_tokens": 41},
        {"cache_write_tokens": 5, "cache_write_1h_tokens": 6},
        {"cached_input_tokens": 5, "cached_audio_tokens": 5},
        {"input_audio_tokens": 5, "cached_audio_tokens": 5},
        {"reasoning_tokens": 51},
        {"reasoning_tokens": 30, "output_audio_tokens": 21},
        {"pages": 1, "annotated_pages": 2},
        {"cached_input_tokens": 5, "input_audio_tokens": 9, "input_image_tokens": 9, "cached_audio_tokens": 3,
         "cached_image_tokens": 3},
        {"cached_input_tokens": -1},
        {"tool_calls": {"web_search": -1}},
        {"tool_calls": {"Web Search": 1}},
        {"thoughts": 1},
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(counts: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelUsed.model_validate(
            {"provider": "openai", "model": "m", "input_tokens": 100, "output_tokens": 50, "counts": counts}
        )


def test_an_event_of_before_says_what_it_said() -> None:
    body = b'{"provider": "openai", "model": "m", "input_tokens": 3, "output_tokens": 4}'
    found = ModelUsed.model_validate_json(body)
    assert (found.counts, found.service_tier) == (None, None)
    assert found.model_dump(exclude_defaults=True) == {
        "provider": "openai",
        "model": "m",
        "input_tokens": 3,
        "output_tokens": 4,
    }


# Laws -----------------------------------------------------------------------------------------------------------------

counts_that_fit = st.builds(
    lambda text, audio, cached_audio, image, cached_image, video, cached, write, hour: {
        "input_audio_tokens": audio + cached_audio,
        "cached_audio_tokens": cached_audio,
        "input_image_tokens": image + cached_image,
        "cached_image_tokens": cached_image,
        "input_video_tokens": video,
        "cached_input_tokens": cached + cached_audio + cached_image,
        "cache_write_tokens": write + hour,
        "cache_write_1h_tokens": hour,
        "input_tokens": text + audio + cached_audio + image + cached_image + video + cached + write + hour,
    },
    *[st.integers(0, 1000) for _ in range(9)],
)
outputs_that_fit = st.builds(
    lambda text, reasoning, citation, audio, image, video: {
        "reasoning_tokens": reasoning,
        "citation_tokens": citation,
        "output_audio_tokens": audio,
        "output_image_tokens": image,
        "output_video_tokens": video,
        "output_tokens": text + reasoning + citation + audio + image + video,
    },
    *[st.integers(0, 1000) for _ in range(6)],
)
amounts = st.decimals(0, 100, places=4)


@st.composite
def uses(draw: st.DrawFn) -> ModelUsed:
    counts = {**draw(counts_that_fit), **draw(outputs_that_fit)}
    plain = {name: counts.pop(name) for name in ("input_tokens", "output_tokens")}
    return use(**plain, **counts)


@st.composite
def rate_cards(draw: st.DrawFn) -> tuple[Rate, ...]:
    """Rates for input and output, and for some of their parts: with what is part of two of them, too."""
    parts = set(draw(st.lists(st.sampled_from([name for name in PART_OF if name != "annotated_pages"]), unique=True)))
    for part, wholes in PART_OF.items():
        if len(wholes) > 1 and parts.issuperset(wholes):
            parts.add(part)
    names = ["input_tokens", "output_tokens", *sorted(parts)]
    return tuple(
        mtok(
            name,
            str(draw(amounts)),
            above=tuple((each, draw(amounts)) for each in sorted(draw(st.sets(st.integers(0, 9000), max_size=2)))),
        )
        for name in names
    )


@given(uses())
def test_counts_that_fit_are_accepted(used: ModelUsed) -> None:
    assert used.counts is not None
    assert used.counts.input_parts <= used.input_tokens
    assert used.counts.output_parts <= used.output_tokens


@given(uses(), rate_cards())
def test_every_token_is_priced_exactly_once(used: ModelUsed, rates: tuple[Rate, ...]) -> None:
    items = rate(used, price_version=version(*rates), units=UNITS).items
    assert all(item.count >= 0 for item in items)
    of_input = sum(int(item.count) for item in items if "input_tokens" in (item.quantity, *wholes(item.quantity)))
    of_output = sum(int(item.count) for item in items if "output_tokens" in (item.quantity, *wholes(item.quantity)))
    assert (of_input, of_output) == (used.input_tokens, used.output_tokens)


def wholes(name: str) -> set[str]:
    nearest = PART_OF.get(name, ())
    return {*nearest, *(further for each in nearest for further in wholes(each))}


@given(uses(), rate_cards(), st.booleans())
def test_a_part_at_the_price_of_its_whole_changes_nothing(used: ModelUsed, rates: tuple[Rate, ...], tier: bool) -> None:
    by_name = {each.quantity: each for each in rates}
    same = [
        Rate(name, "usd", by_name[whole].price, 1_000_000, by_name[whole].above)
        for name in PART_OF
        if name != "annotated_pages"
        for whole in wholes(name) & {"input_tokens", "output_tokens"}
    ]
    plain = version(by_name["input_tokens"], by_name["output_tokens"])
    detailed = version(by_name["input_tokens"], by_name["output_tokens"], *same)
    assert (
        rate(used, price_version=plain, units=UNITS).amounts == rate(used, price_version=detailed, units=UNITS).amounts
    )


@given(
    uses(),
    rate_cards(),
    st.decimals(-100, 300, places=2),
    amounts,
    st.tuples(st.integers(0, 3000), st.integers(0, 3000)),
)
def test_no_call_costs_more_than_its_quote(
    used: ModelUsed, rates: tuple[Rate, ...], percent: Decimal, fixed: Decimal, more: tuple[int, int]
) -> None:
    book = version(*rates, markup=(Surcharge("usd", percent, fixed),))
    bound = use(used.input_tokens + more[0], used.output_tokens + more[1])
    quoted = rate_at_most(bound, price_version=book, units=UNITS, parts=FURTHER_COUNTS)
    actual = rate(used, price_version=book, units=UNITS).amounts
    assert quoted.keys() == actual.keys()
    assert quoted["usd"] >= actual["usd"]


def test_a_plain_call_is_quoted_at_what_it_costs() -> None:
    book = version(*PLAIN, Rate("calls", "calls", Decimal(1), 1), markup=(Surcharge("usd", Decimal(7)),))
    used = use(1000, 100)
    assert rate_at_most(used, price_version=book, units=UNITS) == rate(used, price_version=book, units=UNITS).amounts
    with pytest.raises(Unpriced):
        rate_at_most(used, price_version=version(PLAIN[0]), units=UNITS)


@given(uses(), rate_cards(), st.lists(st.decimals(0, 50, places=3), min_size=1, max_size=3))
def test_a_call_is_rounded_once_per_unit(used: ModelUsed, rates: tuple[Rate, ...], percents: list[Decimal]) -> None:
    book = version(*rates, markup=(Surcharge("usd", percents[0], Decimal("0.0000000003")),))
    rated = rate(used, price_version=book, units=UNITS)
    exact = sum((Fraction(item.exact) for item in rated.items), Fraction(0)) * 10**9
    assert abs(nanos(rated) - exact) <= Fraction(1, 2)
    assert all(Fraction(item.exact) * item.per == Fraction(item.count) * Fraction(item.price) for item in rated.items)


def test_what_is_part_of_two_needs_a_rate_where_both_have_one() -> None:
    lacking = [*PLAIN, mtok("cached_input_tokens", "1"), mtok("input_audio_tokens", "40")]
    assert len(lacking_joins(lacking)) == 1
    assert lacking_joins([*lacking, mtok("cached_audio_tokens", "2")]) == []
    assert lacking_joins(PLAIN) == []


@pytest.mark.parametrize(
    "made",
    [
        lambda: mtok("input_tokens", "1", above=((5, Decimal(1)), (5, Decimal(2)))),
        lambda: mtok("input_tokens", "1", above=((9, Decimal(1)), (5, Decimal(2)))),
        lambda: mtok("input_tokens", "1", above=((5, Decimal(-1)),)),
        lambda: Surcharge("usd", percent=Decimal("-100.1")),
        lambda: Surcharge("usd", percent=Decimal("NaN")),
        lambda: Surcharge("usd", percent=Decimal("1.1234567")),
        lambda: Surcharge("usd", fixed=Decimal(-1)),
    ],
)
def test_what_could_not_be_computed_with_is_refused(made: Any) -> None:
    with pytest.raises(ValueError):
        made()
