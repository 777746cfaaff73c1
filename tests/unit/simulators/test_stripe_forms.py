"""Laws of Stripe's form encoding: a tree survives it, and nothing unknown passes."""

from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.simulators.stripe.forms import Params, Refused, parse

NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
TREES = st.recursive(
    st.text(max_size=8),
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3),
    max_leaves=8,
)


def encoded(tree: Any, name: str = "") -> list[tuple[str, str]]:
    pairs = enumerate(tree) if isinstance(tree, list) else tree.items()
    found = []
    for key, value in pairs:
        inner = f"{name}[{key}]" if name else str(key)
        found += [(inner, value)] if isinstance(value, str) else encoded(value, inner)
    return found


@given(tree=st.dictionaries(NAMES, TREES, max_size=4))
def test_a_tree_survives_the_encoding(tree: dict[str, Any]) -> None:
    assert parse(urlencode(encoded(tree))) == tree


@pytest.mark.parametrize("form", ["a=1&a=2", "a=1&a[b]=2", "a[b]=1&a=2", "[a]=1", "a[b=1", "a" + "[b]" * 9 + "=1"])
def test_a_contradiction_is_refused(form: str) -> None:
    with pytest.raises(Refused):
        parse(form)


def test_what_nobody_asked_for_is_unknown() -> None:
    params = Params(parse("amount=5&metadata[a]=1&other[x]=2"))
    assert (params.integer("amount", least=1), params.metadata()) == (5, {"a": "1"})
    with pytest.raises(Refused, match="unknown parameter: other") as refused:
        params.finish()
    assert refused.value.code == "parameter_unknown"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "٣", "1" * 16])
def test_an_amount_is_a_positive_integer(value: str) -> None:
    with pytest.raises(Refused) as refused:
        Params({"amount": value}).integer("amount", least=1)
    assert refused.value.param == "amount"


@pytest.mark.parametrize(
    "metadata", [{"k" * 41: "v"}, {"k": "v" * 501}, {str(n) + "k": "v" for n in range(51)}, {"k": {"x": "y"}}, "text"]
)
def test_metadata_has_stripes_limits(metadata: Any) -> None:
    with pytest.raises(Refused):
        Params({"metadata": metadata}).metadata()
