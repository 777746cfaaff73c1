"""Paths are simple or refused; a question is read or all that is wrong is named; averages are rounded half-even."""

import json
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.kit.catalogue import load_catalogue
from services.metering.domain.meters import (
    AVERAGE_DECIMALS,
    AllOf,
    AnyOf,
    Comparison,
    InvalidPath,
    Meter,
    average,
    plain,
    read_path,
)
from services.metering.translate.meters import (
    CatalogueMeter,
    InvalidQuestion,
    MeterBody,
    MeterQueryBody,
    changed,
    definition_as_json,
    is_same,
    read_catalogue_meters,
    read_definition,
    read_meter,
    read_parameters,
    read_question,
)
from tests.conftest import CATALOGUE_FILE

METER: Final = Meter(slug="n", aggregation="COUNT", event_type="used", value=None, group_by={"model": ("model",)})


def test_simple_paths_are_read() -> None:
    for text, names in (
        ("$.input_tokens", ("input_tokens",)),
        ("$.attributes.latency_ms", ("attributes", "latency_ms")),
        ('$["a b"].c', ("a b", "c")),
        ("$['ä.$'][\"x\"]", ("ä.$", "x")),
        ("$.a-b", ("a-b",)),
    ):
        assert read_path(text) == names


NO_PATHS: Final = (
    *("", "$", "tokens", "$tokens", "$.", "$..a", "$.a[*]", "$.a[0]", "$.a[?(@.b)]", "$.a b", "$.a\n", '$["a', "$.1"),
    *("$.*", "$" + ".a" * 9, "$." + "a" * 300),
)


@pytest.mark.parametrize("text", NO_PATHS)
def test_what_is_no_simple_path_is_refused(text: str) -> None:
    with pytest.raises(InvalidPath):
        read_path(text)


@given(
    total=st.decimals(-(10**30), 10**30, places=18, allow_nan=False),
    count=st.integers(1, 10**9),
)
def test_an_average_is_the_quotient_rounded_half_even(total: Decimal, count: int) -> None:
    exact = Fraction(total) / count * 10**AVERAGE_DECIMALS
    assert Fraction(average(total, count)) * 10**AVERAGE_DECIMALS == round(exact)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=12, min_value=-(10**15), max_value=10**15))
def test_a_plain_number_is_the_same_number(value: Decimal) -> None:
    assert plain(value) == value
    text = f"{plain(value):f}"
    assert not ("." in text and text.endswith("0"))


names = st.one_of(
    st.sampled_from(["from", "to", "windowSize", "subject", "groupBy", "windowTimeZone", "version", "x"]),
    st.sampled_from(["filterGroupBy", "filterGroupBy[model]", "filterGroupBy[model][x]"]),
    st.sampled_from(["", "[model]", "[model][$in]", "[model][$like]", "[][]"]).map(
        lambda place: f"advancedMeterGroupByFilters{place}"
    ),
)
values = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["2026-01-01T00:00:00Z", "DAY", "Europe/Berlin", "{'model': 'a'}", "[object Object]", "1", "[" * 400]
    ),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5).map(
        json.dumps
    ),
    st.dictionaries(st.sampled_from(["model", "$eq", "x"]), st.text(max_size=5) | st.just({"$eq": "a"})).map(
        json.dumps
    ),
    st.just("(" * 3000),
    st.just("-" * 3000 + "1"),
)


@given(st.lists(st.tuples(names, values), max_size=6))
def test_any_query_string_is_a_question_or_is_refused_as_one(parameters: list[tuple[str, str]]) -> None:
    with suppress(InvalidQuestion):
        read_question(read_parameters(parameters), METER)


def test_objects_are_read_as_every_client_writes_them() -> None:
    for text in ('{"model": "a"}', "{'model': 'a'}", '{"model": ["a"]}'):
        question = read_question(read_parameters([("filterGroupBy", text)]), METER)
        assert question.filters == {"model": Comparison("in", ["a"])}
    question = read_question(read_parameters([("filterGroupBy[model]", "a"), ("filterGroupBy[model]", "b")]), METER)
    assert question.filters == {"model": Comparison("in", ["a", "b"])}
    nested: Any = {"model": {"$or": [{"$eq": "a"}, {"$gte": "b", "$lt": "c"}]}}
    question = read_question(read_parameters([("advancedMeterGroupByFilters", json.dumps(nested))]), METER)
    assert question.filters == {
        "model": AnyOf([Comparison("eq", ["a"]), AllOf([Comparison("gte", ["b"]), Comparison("lt", ["c"])])])
    }


def test_filters_are_not_nested_without_end() -> None:
    filters: Any = {"$eq": "a"}
    for depth in range(2, 7):
        filters = {"$and": [filters]}
        body = {"advancedMeterGroupByFilters": {"model": filters}}
        if depth <= 4:
            MeterQueryBody.model_validate(body)
        else:
            with pytest.raises(ValidationError, match="4 deep"):
                MeterQueryBody.model_validate(body)


def test_who_filters_by_subject_is_answered_by_subject() -> None:
    body = MeterQueryBody(subject=["a"], filter_customer_id=["acme"], group_by=["model", "model"])
    assert read_question(body, METER).group_by == ["model", "subject", "customer_id"]


def test_the_catalogues_meters_are_meters_and_survive_the_table() -> None:
    found = read_catalogue_meters(load_catalogue(CATALOGUE_FILE).section("meters"))
    assert {each.slug for each in found} >= {"calls", "input_tokens", "output_tokens"}
    for each in found:
        stored = read_definition(definition_as_json(each))
        assert is_same(stored, each)
        assert read_meter(stored) == read_meter(each)
    with pytest.raises(ValueError, match="twice"):
        read_catalogue_meters([each.model_dump() for each in (found[0], found[0])])


def test_a_change_replaces_what_openmeter_replaces_and_keeps_the_rest() -> None:
    before = CatalogueMeter.model_validate(
        {
            "slug": "n",
            "version": 1,
            "aggregation": "SUM",
            "eventType": "used",
            "valueProperty": "$.n",
            "name": "N",
            "groupBy": {"model": "$.model"},
            "filters": {"$.a": {"$eq": "1"}},
        }
    )
    after = changed(before, MeterBody.model_validate({**before.model_dump(exclude={"version", "name", "filters"})}))
    assert (after.name, after.filters) == (None, before.filters)
    assert after.group_by == before.group_by
