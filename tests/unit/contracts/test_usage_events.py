"""Laws of the envelope: every body is an event or a named problem, and the body hash is of the content alone."""

import copy
import json
from datetime import datetime
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from contracts.accounts import check_account
from contracts.envelope import (
    DATA_DEPTH_MAX,
    DATA_MEMBERS_MAX,
    EVENT_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    MESSAGE_EVENTS_MAX,
    PROBLEMS_MAX,
    SERVER_FILLED,
    SUBJECT_LENGTH_MAX,
    InvalidEvent,
    OtherEvent,
    UsageEvent,
    binary_attributes,
    body_hash,
    events_of,
    is_account,
    message_bodies,
    read_quickly,
    read_usage_event,
    structured,
)
from contracts.usage import ModelUsed
from tests.unit.contracts.strategies import (
    Json,
    accounts,
    foreign_subjects,
    json_values,
    other_events,
    times_text,
    usage_events,
)

any_events = usage_events | other_events

EVENT: Json = {
    "specversion": "1.0",
    "id": "azure-conv-2023:17",
    "source": "demo",
    "type": "scrip.model.used.v1",
    "subject": "acme/ml",
    "time": "2025-07-01T12:00:00Z",
    "data": {"provider": "openai", "model": "gpt-4o-mini", "input_tokens": 374, "output_tokens": 44},
}
ENCODED = json.dumps(EVENT).encode()
CANONICAL = json.dumps(EVENT, sort_keys=True, separators=(",", ":")).encode()


def read(raw: Json) -> tuple[UsageEvent | OtherEvent, bytes]:
    return read_usage_event(json.dumps(raw).encode())


def hash_of(raw: Json) -> bytes:
    return read(raw)[1]


def problems_of(body: bytes) -> dict[str, str]:
    with pytest.raises(InvalidEvent) as refusal:
        read_usage_event(body)
    return {problem.field: problem.message for problem in refusal.value.problems}


def changed(**attributes: Any) -> bytes:
    return json.dumps(EVENT | attributes).encode()


def with_data(**fields: Any) -> bytes:
    return changed(data=EVENT["data"] | fields)


def shuffled(raw: Json, order: list[int]) -> Json:
    names = sorted(raw, key=lambda name: order[len(name) % len(order)])
    return {name: shuffled(raw[name], order) if isinstance(raw[name], dict) else raw[name] for name in names}


# --- reading ---


def assert_read_alike(body: bytes) -> bool:
    """Whether a body is read fast. If it is, the contract's model says the same."""
    if (quick := read_quickly(body)) is None:
        return False
    event, digest = read_usage_event(body)
    assert isinstance(event, UsageEvent)
    assert quick.body_hash == digest
    assert quick.time == event.time
    assert quick.event.data.in_full() == event.data
    for name in type(event.data).model_fields:
        assert getattr(quick.event.data, name) == getattr(event.data, name)
    assert json.loads(quick.data) == json.loads(body)["data"]
    for name in ("id", "source", "specversion", "subject", "type"):
        assert getattr(quick.event, name) == getattr(event, name)
    assert not event.model_extra
    assert event.dataschema is event.datacontenttype is None
    return True


compact = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
written_anyhow = st.sampled_from(
    [json.dumps, compact, lambda raw: compact(dict(sorted(raw.items()))), lambda raw: json.dumps(raw, indent=1)]
)


@given(any_events, written_anyhow)
def test_what_is_read_fast_says_what_the_model_says(raw: Json, write: Any) -> None:
    body = write(raw).encode()
    plain = {*EVENT} | {"data"}
    if assert_read_alike(body):
        assert {*raw} <= plain


any_paths = st.sampled_from(
    [(name,) for name in (*EVENT, "dataschema", "traceparent")]
    + [("data", name) for name in (*ModelUsed.model_fields, "other")]
)


@given(any_paths, json_values, st.booleans())
@example(("data", "input_tokens"), -0.0, True)
@example(("data", "attributes"), {}, True)
@example(("data", "hold"), "hold_64_01980000-0000-7000-8000-000000000000", True)
@example(("data", "feature"), "a\n", True)
@example(("data", "attributes"), {"a\n": 1}, True)
@example(("id",), "a\x7f\x85", True)
@example(("subject",), "a%41", True)
@example(("time",), "2025-07-01T24:00:00Z", True)
@example(("time",), "2025-07-01T12:00:00.1234567Z", True)
@example(("time",), "2025-02-29T12:00:00.123456Z", True)
@example(("time",), "1969-12-31T23:59:59Z", True)
@example(("time",), "\u0662025-07-01T12:00:00Z", True)
def test_anything_in_any_place_is_read_alike_or_not_fast(place: tuple[str, ...], value: Any, tidy: bool) -> None:
    raw = copy.deepcopy(EVENT)
    target = raw if len(place) == 1 else raw["data"]
    target[place[-1]] = value
    assert_read_alike(json.dumps(raw, sort_keys=tidy, ensure_ascii=False).encode("utf-8", "surrogatepass"))


@given(st.data(), st.booleans(), st.binary(max_size=3) | st.sampled_from([b"-0", b"1e3", b'"a":1,', b"\t", b"null"]))
def test_a_damaged_event_is_read_alike_or_not_fast(data: st.DataObject, tidy: bool, put: bytes) -> None:
    body = CANONICAL if tidy else ENCODED
    place, cut = data.draw(st.integers(0, len(body) - 1)), data.draw(st.integers(0, 6))
    assert_read_alike(body[:place] + put + body[place + cut :])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"attributes": {"endpoint": "/v1/é", "status": 200, "cached": True}},
        {"feature": "chat", "own_key": True, "service_tier": "flex", "price_version": "2026-11-01"},
        {"hold": "hold_07_01980000-0000-7000-8000-000000000000"},
    ],
)
@pytest.mark.parametrize("time", ["2025-07-01T12:00:00.000001Z", "2025-07-01T12:00:00+00:00", None])
def test_events_as_most_are_are_read_fast(more: Json, time: str | None) -> None:
    raw = EVENT | {"data": EVENT["data"] | more} | {"time": time}
    if time is None:
        del raw["time"]
    for body in (compact(raw).encode(), json.dumps(raw, sort_keys=True, ensure_ascii=False).encode()):
        assert assert_read_alike(body)


@given(any_events)
def test_a_valid_event_is_read_as_it_was_sent(raw: Json) -> None:
    event, _ = read(raw)
    dumped = event.model_dump(mode="json", exclude_unset=True)
    assert dumped == raw | ({"time": dumped["time"]} if "time" in raw else {})
    assert event.time == (datetime.fromisoformat(raw["time"]) if "time" in raw else None)


@given(usage_events)
def test_the_model_writes_what_it_reads(raw: Json) -> None:
    event, _ = read(raw)
    again, _ = read_usage_event(event.model_dump_json(exclude_unset=True).encode())
    assert again == event


attribute_paths = st.sampled_from([(name,) for name in EVENT] + [("data", name) for name in EVENT["data"]])


@given(attribute_paths, json_values)
@example(("subject",), "\ud800")
@example(("id",), "a\x00b")
@example(("time",), "1704067200000")
@example(("time",), "9999-12-31T23:59:59-12:00")
@example(("time",), "0001-01-01T00:00:00+12:00")
@example(("data", "input_tokens"), 10**400)
@example(("data", "input_tokens"), 1.0)
@example(("data", "input_tokens"), True)
@example(("data", "input_tokens"), float("nan"))
def test_an_event_with_anything_in_any_place_is_valid_or_named_invalid(place: tuple[str, ...], value: Any) -> None:
    raw = copy.deepcopy(EVENT)
    target = raw if len(place) == 1 else raw["data"]
    target[place[-1]] = value
    try:
        read_usage_event(written(raw))
    except InvalidEvent as invalid:
        named = {problem.field for problem in invalid.problems}
        unreadable = named == {""}
        assert unreadable or any(field.startswith(".".join(place)) for field in named)


@given(st.dictionaries(st.text(max_size=24), json_values, max_size=4), st.booleans())
@example({"\x00": 1}, True)
@example({"x": 10**4000}, False)
@example({"constrained-str": 1.5, "bool": 1.5, "int": 1.5}, False)
@example({"self": 1, "model_config": "x", "__class__": "y"}, False)
def test_extra_attributes_are_valid_or_named_invalid(extra: Json, inside: bool) -> None:
    known = EVENT["data"] if inside else EVENT
    assume(
        not extra.keys()
        & (known.keys() | {"hold", "own_key", "feature", "attributes", "datacontenttype", "dataschema"})
    )
    raw = EVENT | {"data": EVENT["data"] | extra} if inside else EVENT | extra
    try:
        read_usage_event(written(raw))
    except InvalidEvent as invalid:
        for problem in invalid.problems:
            assert problem.message
            assert problem.field.isprintable()
            assert "\x00" not in problem.message


@given(json_values.map(lambda value: json.dumps(value).encode()))
@example(b"null")
@example(b"[]")
@example(b"")
def test_json_that_is_no_event_is_invalid(body: bytes) -> None:
    assert problems_of(body)


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"\xff\xfe")
@example(b"\xef\xbb\xbf" + ENCODED)
@example(ENCODED.decode().encode("utf-16"))
@example(b"[" * 30_000)
@example(b'{"a":' * 10_000)
@example(b"9" * 5_000)
@example(b"1e999")
@example(b"-")
@example(b'"\\ud800"')
def test_any_bytes_that_are_no_event_are_invalid(body: bytes) -> None:
    assume(body.strip() != b"{}")
    assert set(problems_of(body)) == {""}


@given(st.integers(0, len(ENCODED) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_a_damaged_event_is_valid_or_invalid_and_nothing_else(place: int, put: bytes, cut: int) -> None:
    body = ENCODED[:place] + put + ENCODED[place + cut :]
    try:
        event, digest = read_usage_event(body)
    except InvalidEvent:
        return
    assert digest == body_hash(json.loads(body))
    assert event.source == json.loads(body)["source"]


@pytest.mark.parametrize(
    "body",
    [
        ENCODED[:-1] + b',"nested":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        ENCODED[:-1] + b',"nested":' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
        ENCODED[:-1] + b',"nested":' + b"[" * 150 + b"]" * 150 + b"}",
        ENCODED[:-1] + b',"long":' + b"9" * 4_301 + b"}",
        ENCODED[:-1] + b',"long":' + b"9" * 60_000 + b"}",
        ENCODED.replace(b"374", b"9" * 5_000),
        ENCODED.replace(b"374", b"374.0"),
        ENCODED.replace(b"374", b"1e3"),
        ENCODED.replace(b"374", b"0374"),
    ],
)
def test_deep_nesting_endless_numbers_and_floats_are_invalid(body: bytes) -> None:
    assert problems_of(body)


def test_of_a_name_given_twice_the_last_counts_for_the_event_and_for_its_hash() -> None:
    twice = ENCODED[:-1] + b', "id": "other", "x": "1", "x": "2"}'
    event, digest = read_usage_event(twice)
    assert (event.id, event.model_extra) == ("other", {"x": "2"})
    assert digest == hash_of(EVENT | {"id": "other", "x": "2"})


def test_every_problem_is_named_at_once() -> None:
    body = changed(
        specversion="0.3",
        source="De mo",
        subject="a\x07b",
        time="yesterday",
        region=1.5,
        Region="eu",
        data={"provider": "openai", "model": "", "input_tokens": -1, "output_tokens": 1.5, "total": 3},
    )
    assert set(problems_of(body)) == {
        "specversion",
        "source",
        "subject",
        "time",
        "region",
        "Region",
        "data.model",
        "data.input_tokens",
        "data.output_tokens",
        "data.total",
    }


@pytest.mark.parametrize("kind", ["scrip.model.used.v2", "scrip.", 1, None])
def test_an_unknown_type_of_ours_says_which_are_known(kind: Any) -> None:
    assert problems_of(changed(type=kind))["type"] == "unknown event type: of scrip.* known is scrip.model.used.v1"


def test_an_event_of_any_other_type_has_any_object_as_its_data() -> None:
    event, _ = read(EVENT | {"type": "api-calls", "data": {"path": "/v1", "took": 1.5, "tags": [None, {"a": True}]}})
    assert isinstance(event, OtherEvent)
    for nothing in ({"data": None}, {}):
        raw = {name: value for name, value in EVENT.items() if name != "data"} | nothing | {"type": "api-calls"}
        assert read(raw)[0].data is None
    wrongs: list[Any] = ["{}", 1, [{}], True]
    for wrong in wrongs:
        assert set(problems_of(changed(type="api-calls", data=wrong))) == {"data"}


def nested(levels: int) -> Json:
    return {"a": nested(levels - 1)} if levels > 1 else {}


def test_data_of_other_types_has_bounds() -> None:
    def with_other(**data: Any) -> bytes:
        return changed(type="api-calls", data=data)

    read_usage_event(with_other(a=nested(DATA_DEPTH_MAX - 1)))
    assert set(problems_of(with_other(a=nested(DATA_DEPTH_MAX)))) == {"data" + ".a" * DATA_DEPTH_MAX}
    assert set(problems_of(with_other(a=[[[[[[[[[]]]]]]]]]))) == {"data.a.0.0.0.0.0.0.0"}
    full = {f"m{number}": number for number in range(DATA_MEMBERS_MAX // 2 - 1)}
    read_usage_event(with_other(one=full, two=full))
    assert "at most 256 members" in problems_of(with_other(one=full, two=full, three=1))["data"]
    read_usage_event(with_other(number=10**64 - 1))
    for beyond in (b"1" + b"0" * 64, b"-1" + b"0" * 64, b"1e64", b"1e-65", b"0." + b"0" * 64 + b"1"):
        assert set(problems_of(with_other(number=7).replace(b"7}", beyond + b"}"))) == {"data.number"}
    assert set(problems_of(with_other(number=7).replace(b"7}", b"1e99999999999999999999}"))) == {""}
    assert set(problems_of(with_other(**{"a\x00": 1, "b": ["\x00"]}))) == {"data", "data.b.0"}


# --- subjects ---


@given(accounts | foreign_subjects)
def test_a_subject_is_any_text_and_an_account_if_it_is_the_id_of_one(subject: str) -> None:
    assert read(EVENT | {"subject": subject})[0].subject == subject
    try:
        check_account(subject)
    except ValueError:
        assert not is_account(subject)
    else:
        assert is_account(subject)


@pytest.mark.parametrize(
    "subject", ["", "a\x00", "a\nb", "\x7f", "a\x9f", "x " * (SUBJECT_LENGTH_MAX // 2) + "x", "a" * 401, 1]
)
def test_a_subject_has_a_length_and_no_control_characters(subject: Any) -> None:
    assert set(problems_of(changed(subject=subject))) == {"subject"}


# --- binary mode ---


def in_headers(raw: Json) -> list[tuple[str, str]]:
    """The headers of an event whose attributes are all text."""
    said = {name: quote(value, safe="") for name, value in raw.items() if name not in ("data", "datacontenttype")}
    return [("Content-Type", "application/json; charset=utf-8"), *((f"ce-{name}", text) for name, text in said.items())]


@given(any_events, st.booleans())
def test_an_event_is_the_same_in_binary_and_in_structured_mode(raw: Json, in_quotes: bool) -> None:
    raw = {name: value for name, value in raw.items() if name == "data" or isinstance(value, str)}
    headers = in_headers(raw)
    if in_quotes:
        headers = [(name, f'"{value}"' if name.startswith("ce-") else value) for name, value in headers]
    attributes = binary_attributes(headers)
    assert attributes is not None
    data = json.dumps(raw["data"]).encode()
    event, digest = read_usage_event(structured(attributes, data))
    plain, plain_digest = read({name: value for name, value in raw.items() if name != "datacontenttype"})
    assert (event, digest) == (plain, plain_digest)
    assert hash_of(raw) == digest


def test_without_a_body_binary_mode_has_no_data() -> None:
    raw = {name: value for name, value in EVENT.items() if name != "data"} | {"type": "api-calls"}
    attributes = binary_attributes(in_headers(raw))
    assert attributes is not None
    assert read_usage_event(structured(attributes, b" "))[1] == hash_of(raw)


@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
@example(b'{}, "id": "another"')
@example(b"{}} {")
def test_data_in_binary_mode_says_nothing_but_data(data: bytes) -> None:
    attributes = binary_attributes(in_headers({name: value for name, value in EVENT.items() if name != "data"}))
    assert attributes is not None
    attributes["type"] = "api-calls"
    wrong: set[str] = set()
    try:
        event, _ = read_usage_event(structured(attributes, data))
        assert (event.id, event.subject, event.model_extra) == (EVENT["id"], EVENT["subject"], {})
    except InvalidEvent as invalid:
        wrong = {problem.field.split(".")[0] for problem in invalid.problems}
    assert wrong <= {"data"}


@pytest.mark.parametrize(
    ("headers", "places"),
    [
        ([("ce-id", "1"), ("Ce-Id", "2")], {"id"}),
        ([("ce-id", "%ff"), ("ce-data", "{}")], {"id", "data"}),
    ],
)
def test_what_is_wrong_with_headers_is_named(headers: list[tuple[str, str]], places: set[str]) -> None:
    with pytest.raises(InvalidEvent) as refusal:
        binary_attributes(headers)
    assert {problem.field for problem in refusal.value.problems} == places


@pytest.mark.parametrize(
    "headers",
    [[], [("Content-Type", "application/json")], [("content-type", "application/cloudevents+json"), ("ce-id", "1")]],
)
def test_a_message_without_ce_headers_or_of_cloudevents_is_structured(headers: list[tuple[str, str]]) -> None:
    assert binary_attributes(headers) is None


def test_data_that_is_said_to_be_no_json_is_refused() -> None:
    attributes = binary_attributes([*in_headers({"id": "1"})[1:], ("content-type", "text/xml")])
    assert attributes is not None
    with pytest.raises(InvalidEvent, match="datacontenttype"):
        read_usage_event(structured(attributes, b"{}"))


@pytest.mark.parametrize("kind", ["scrip.model.used.v1", "api-calls"])
@pytest.mark.parametrize("value", ["aGVsbG8=", "A" * 2000, None, 1])
def test_data_in_base64_is_told_what_to_send_instead(kind: str, value: Any) -> None:
    said = "data in base64 is not supported: send the use as a JSON object in `data`"
    assert problems_of(changed(type=kind, data_base64=value)) == {"data_base64": said}
    in_binary_mode = binary_attributes(in_headers({**EVENT, "type": kind, "data_base64": "aGVsbG8="}))
    assert in_binary_mode is not None
    assert problems_of(structured(in_binary_mode, b"{}"))["data_base64"] == said


def test_a_name_that_no_attribute_has_is_told_in_a_sentence() -> None:
    said = "an attribute has a name of 1 to 20 characters, all of them a-z or 0-9"
    assert problems_of(changed(tenantId="x", **{"n" * 21: 1})) == {"tenantId": said, "n" * 21: said}


def test_a_value_of_several_possible_types_is_one_problem() -> None:
    problems = problems_of(with_data(attributes={"bool": 1.5, "text": None}))
    assert set(problems) == {"data.attributes.bool", "data.attributes.text"}


def test_the_problems_of_one_event_are_limited() -> None:
    problems = problems_of(json.dumps(EVENT | {f"X{number}": 1 for number in range(1000)}).encode())
    assert len(problems) == PROBLEMS_MAX + 1
    assert problems[""] == "and 900 more problems"
    long = problems_of(json.dumps(EVENT | {"X" * 10_000: 1}).encode())
    assert all(len(field) < 100 for field in long)


def test_an_event_has_a_largest_size() -> None:
    padding = EVENT_BYTES_MAX - len(ENCODED)
    read_usage_event(ENCODED + b" " * padding)
    assert "at most" in problems_of(ENCODED + b" " * (padding + 1))[""]


@pytest.mark.parametrize(
    "time",
    [
        "2025-07-01T12:00:00",  # no offset
        "2025-07-01",
        "1751371200",  # seconds as text
        "1751371200000",
        1751371200,
        "2025-07-01T12:00Z",
        "2025-07-01T24:00:00Z",
        "2025-13-01T00:00:00Z",
        "2025-07-01T12:00:00+0200",
        "1969-12-31T23:59:59Z",
        "2200-01-01T00:00:00Z",
        "9999-12-31T23:59:59-12:00",  # has no UTC form
        "",
    ],
)
def test_a_time_is_rfc_3339_with_an_offset_and_of_our_age(time: Any) -> None:
    assert set(problems_of(changed(time=time))) == {"time"}


# --- the body hash ---


@given(any_events, st.lists(st.integers(0, 100), min_size=3, max_size=8), st.sampled_from([None, 0, 1, 4]))
def test_the_hash_does_not_depend_on_order_white_space_or_escapes(
    raw: Json, order: list[int], indent: int | None
) -> None:
    digest = hash_of(raw)
    assert len(digest) == 32
    for ascii_only in (True, False):
        body = json.dumps(shuffled(raw, order), indent=indent, ensure_ascii=ascii_only).encode()
        assert read_usage_event(body)[1] == digest


@given(any_events, times_text)
def test_what_ingest_filled_in_is_no_content(raw: Json, time: str) -> None:
    sent = {name: value for name, value in raw.items() if name != "time"}
    assert hash_of(sent | {"time": time, SERVER_FILLED: "time"}) == hash_of(sent)
    assert hash_of(sent | {"time": time}) != hash_of(sent)


@given(usage_events, st.text("0123456789abcdef-", min_size=1, max_size=55))
def test_the_trace_an_event_took_is_no_content(raw: Json, trace: str) -> None:
    assert hash_of(raw | {"traceparent": trace, "tracestate": f"vendor={trace}"}) == hash_of(raw)


@given(any_events)
def test_that_data_is_json_is_known_and_no_content(raw: Json) -> None:
    without = {name: value for name, value in raw.items() if name != "datacontenttype"}
    assert hash_of(without | {"datacontenttype": "application/json"}) == hash_of(without)


@given(any_events, any_events)
def test_another_content_has_another_hash(one: Json, other: Json) -> None:
    one, other = one | {"datacontenttype": None}, other | {"datacontenttype": None}
    assert (hash_of(one) == hash_of(other)) == (canonical(one) == canonical(other))


@given(usage_events, st.data())
def test_any_single_change_changes_the_hash(raw: Json, data: st.DataObject) -> None:
    other = data.draw(usage_events)
    place = data.draw(st.sampled_from(sorted(raw.keys() - {"datacontenttype"})))
    mutated = {name: value for name, value in raw.items() if name != place}
    assert body_hash(mutated) != hash_of(raw)
    if place in other and canonical(other[place]) != canonical(raw[place]):
        assert hash_of(raw | {place: other[place]}) != hash_of(raw)
    for name, value in raw["data"].items():
        changed_data = raw["data"] | {name: other["data"].get(name)}
        if canonical(changed_data[name]) != canonical(value):
            assert body_hash(raw | {"data": changed_data}) != hash_of(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"time": "2025-07-01T12:00:01Z"},
        {"time": "2025-07-01T14:00:00+02:00"},  # the same moment, but not what was sent
        {"subject": "acme"},
        {"data": EVENT["data"] | {"input_tokens": 375}},
        {"data": EVENT["data"] | {"own_key": False}},  # said is not the same as left out
        {"attempt": 1},
        {"attempt": True},
        {"attempt": "1"},
        {"type": "api-calls"},
    ],
)
def test_changes_that_look_small_are_changes(change: Json) -> None:
    assert hash_of(EVENT | change) != hash_of(EVENT)
    others = [{"attempt": other} for other in (1, True, "1") if canonical(other) != canonical(change.get("attempt"))]
    if "attempt" in change:
        assert all(hash_of(EVENT | other) != hash_of(EVENT | change) for other in others)


def test_a_number_is_what_was_written() -> None:
    written_ways = [b"1", b"1.0", b"1.00", b"1e0", b"1E0", b"0.1", b"0.1000000000000000055511151231257827"]
    hashes = [
        read_usage_event(changed(type="api-calls", data={"n": 7}).replace(b"7}", way + b"}"))[1] for way in written_ways
    ]
    # How an exponent is spelled is no content.
    assert len(set(hashes)) == len(written_ways) - 2
    assert hashes[0] == hashes[3] == hashes[4]


def test_the_hash_never_changes() -> None:
    # It stands beside every event ever seen; another canonical form would turn repeats into conflicts.
    assert hash_of(EVENT).hex() == "21ee47578a1c095c396d227de2eb74fa065a1e4a40eeadd611f8809af17995d2"


def canonical(value: Any) -> str:
    """What tells JSON values apart: in Python, True equals 1."""
    return json.dumps(value, sort_keys=True)


def written(value: Any) -> bytes:
    """JSON by an encoder that also writes what JSON forbids: NaN and lone surrogates."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@given(st.lists(any_events.map(lambda raw: json.dumps(raw, ensure_ascii=False).encode()), max_size=20))
def test_events_come_out_of_messages_as_they_went_in(bodies: list[bytes]) -> None:
    messages = list(message_bodies(bodies))
    assert [event for message in messages for event in events_of(message)] == bodies


@pytest.mark.parametrize("length", [1, 17, 1_000, EVENT_BYTES_MAX - 1, EVENT_BYTES_MAX])
@pytest.mark.parametrize("count", [1, 2, 3, 63, MESSAGE_EVENTS_MAX, MESSAGE_EVENTS_MAX + 1])
def test_a_message_has_as_many_events_as_it_may(length: int, count: int) -> None:
    body = b'"%s"' % (b"x" * (length - 2)) if length > 1 else b"1"
    messages = list(message_bodies([body] * count))
    held = [len(events_of(message)) for message in messages]
    assert sum(held) == count
    assert all(len(message) <= MESSAGE_BYTES_MAX for message in messages)
    for message, events in zip(messages[:-1], held[:-1], strict=True):
        # One more, its comma, and brackets if there are none yet.
        assert events == MESSAGE_EVENTS_MAX or len(message) + len(body) + 3 > MESSAGE_BYTES_MAX


@pytest.mark.parametrize("body", [b"", b"[]", b"[", b"[{}, {]", b"{}", b'"[{}]"', b"[{}] {}", b"[" * 5_000])
def test_what_is_no_array_of_events_is_one_body(body: bytes) -> None:
    assert events_of(body) == [body]
