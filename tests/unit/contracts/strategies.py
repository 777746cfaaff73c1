"""Strategies: canonical accounts, units, amounts, ids, and usage events as a producer would send them."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote
from uuid import UUID

from hypothesis import strategies as st

from contracts.accounts import ACCOUNT_LENGTH_MAX, DEPTH_MAX, SEGMENT_LENGTH_MAX
from contracts.ids import make_id, uuid7
from contracts.money import Unit
from contracts.partition import PARTITION_COUNT
from contracts.usage import BESIDE, TOKENS_MAX

Json = dict[str, Any]

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=24).filter(lambda name: name not in (".", ".."))


def segment_of(name: str) -> str:
    """The segment that stands for a product's own id."""
    return quote(name, safe="")


segments = names.map(segment_of).filter(lambda segment: len(segment) <= SEGMENT_LENGTH_MAX)
accounts = (
    st.lists(segments, min_size=1, max_size=DEPTH_MAX)
    .map("/".join)
    .filter(lambda account: len(account) <= ACCOUNT_LENGTH_MAX)
)

units = st.builds(
    Unit,
    name=st.just("unit"),
    kind=st.sampled_from(["money", "cap"]),
    scale=st.integers(0, 9),
    own_key_counts=st.booleans(),
)

partitions = st.integers(0, PARTITION_COUNT - 1)
uuids7: st.SearchStrategy[UUID] = st.builds(
    lambda milliseconds, entropy: uuid7(milliseconds=milliseconds, entropy=entropy),
    st.integers(0, 2**48 - 1),
    st.binary(min_size=10, max_size=10),
)
hold_ids = st.builds(lambda partition, uuid: make_id("hold", partition=partition, uuid=uuid), partitions, uuids7)

_offsets = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
times = st.builds(
    lambda time, zone: time.replace(tzinfo=UTC).astimezone(zone),
    st.datetimes(datetime(1970, 1, 2), datetime(2199, 12, 30)),  # noqa: DTZ001 - hypothesis wants naive bounds
    _offsets,
)
times_text = st.one_of(
    times.map(datetime.isoformat), times.map(lambda time: f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z")
)

_texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
_words = st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True)
_providers = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,20}", fullmatch=True)
_models = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=40)
_attribute_values = st.one_of(_texts, st.integers(-(2**53) + 1, 2**53 - 1), st.booleans())
_extension_values = st.one_of(_texts, st.integers(-(2**31), 2**31 - 1), st.booleans(), st.none())
_extension_names = st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).filter(
    lambda name: (
        name not in ("specversion", "id", "source", "type", "subject", "time", "datacontenttype")
        and name not in ("dataschema", "data", "scripfilled", "traceparent", "tracestate")
    )
)

usage_data: st.SearchStrategy[Json] = st.fixed_dictionaries(
    {
        "provider": _providers,
        "model": _models,
        "input_tokens": st.integers(0, TOKENS_MAX),
        "output_tokens": st.integers(0, TOKENS_MAX),
    },
    optional={
        "hold": hold_ids | st.none(),
        "own_key": st.booleans(),
        "feature": _words | st.none(),
        "service_tier": st.none() | st.sampled_from(["batch", "flex", "priority"]),
        "counts": st.none()
        | st.fixed_dictionaries(
            {},
            optional={
                **{name: st.integers(0, TOKENS_MAX) for name in BESIDE},
                "tool_calls": st.dictionaries(_words, st.integers(0, TOKENS_MAX), max_size=3),
            },
        ),
        "attributes": st.dictionaries(_words, _attribute_values, max_size=4),
    },
)
_known: st.SearchStrategy[Json] = st.fixed_dictionaries(
    {
        "specversion": st.just("1.0"),
        "id": st.text(st.characters(codec="utf-8", min_codepoint=0x20), min_size=1, max_size=40),
        "source": st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True),
        "type": st.just("scrip.model.used.v1"),
        "subject": accounts,
        "data": usage_data,
    },
    optional={
        "time": times_text,
        "datacontenttype": st.just("application/json"),
        "dataschema": _texts,
    },
)
usage_events: st.SearchStrategy[Json] = st.builds(
    lambda known, extensions: known | extensions,
    _known,
    st.dictionaries(_extension_names, _extension_values, max_size=3),
)

# What publishers call accounts that have another id.
foreign_subjects = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=40)
_other_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(-1e15, 1e15).map(lambda x: round(x, 6))
    | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=10,
)
other_events: st.SearchStrategy[Json] = st.builds(
    lambda known, type, subject, data: known | {"type": type, "subject": subject, "data": data},
    usage_events,
    st.text(st.characters(codec="utf-8", min_codepoint=0x20), min_size=1, max_size=40).filter(
        lambda type: not type.startswith("scrip.")
    ),
    accounts | foreign_subjects,
    st.none() | st.dictionaries(_texts, _other_values, max_size=6),
)

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 10**4000])
    | st.floats()
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
