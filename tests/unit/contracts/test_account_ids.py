"""Laws of account ids: canonical paths, their ancestors, one id per name."""

import re
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from contracts.accounts import ACCOUNT_LENGTH_MAX, DEPTH_MAX, SEGMENT_LENGTH_MAX, AccountId, check_account, path, root
from tests.unit.contracts.strategies import accounts, names, segment_of

ACCOUNT_IDS: TypeAdapter[str] = TypeAdapter(AccountId)


@given(accounts)
def test_a_canonical_account_is_returned_unchanged(account: str) -> None:
    assert check_account(account) == account
    assert ACCOUNT_IDS.validate_python(account) == account


@given(names)
def test_a_name_has_exactly_one_id(name: str) -> None:
    segment = segment_of(name)
    if len(segment) > SEGMENT_LENGTH_MAX:
        return
    assert check_account(segment) == segment
    assert unquote(segment) == name
    others = {quote(name, safe="/é~!"), segment.lower(), "".join(f"%{byte:02X}" for byte in name.encode()), name}
    for other in others - {segment}:
        # What decodes to the same name is refused, unless it is the id of a name of its own.
        if unquote(other) == name and "/" not in other:
            with pytest.raises(ValueError):
                check_account(other)


@given(accounts, st.integers(1, DEPTH_MAX))
def test_the_path_is_the_account_and_its_ancestors_nearest_first(account: str, depth: int) -> None:
    segments = account.split("/")
    ancestors = path(account)
    assert ancestors == tuple("/".join(segments[:length]) for length in range(len(segments), 0, -1))
    assert ancestors[0] == account
    assert ancestors[-1] == root(account) == segments[0]
    assert all(check_account(each) == each and root(each) == root(account) for each in ancestors)


@given(st.one_of(st.text(), st.text("abc%2DfF0/._~-", max_size=24), st.text("/", max_size=8)))
@example("%2")
@example("a//b")
@example("\ud800")
@example("a\n")
@example("%C3")
def test_any_text_is_canonical_or_a_value_error(text: str) -> None:
    try:
        check_account(text)
    except ValueError:
        return
    segments = text.split("/")
    assert all(quote(unquote(segment, errors="strict"), safe="") == segment for segment in segments)


@given(accounts)
def test_the_published_pattern_knows_every_account(account: str) -> None:
    assert re.search(ACCOUNT_IDS.json_schema()["pattern"], account)


@pytest.mark.parametrize(
    "account",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        "a/b/c/d/e",
        ".",
        "..",
        "a/../b",
        "a b",
        "a*",
        "a>b",
        "é",
        "a\n",
        "a\x00",
        "%",
        "%4",
        "%zz",
        "%c3%a9",  # lower-case encoding
        "%41",  # 'A' needs no encoding
        "%2E%2E",
        "%FF",  # not UTF-8
        "%C0%AF",  # an overlong '/'
        "%ED%A0%80",  # a surrogate
        "a" * (SEGMENT_LENGTH_MAX + 1),
        "/".join(["a" * 120] * 4),
    ],
)
def test_what_is_not_canonical_is_refused(account: str) -> None:
    with pytest.raises(ValueError):
        check_account(account)
    with pytest.raises(ValidationError):
        ACCOUNT_IDS.validate_python(account)


def test_the_limits_themselves_are_allowed() -> None:
    longest = "/".join(["a" * SEGMENT_LENGTH_MAX] * 3 + ["a" * (ACCOUNT_LENGTH_MAX - 3 * SEGMENT_LENGTH_MAX - 3)])
    assert len(longest) == ACCOUNT_LENGTH_MAX
    assert check_account(longest) == longest
