"""Every kind of report that must not be taken, and the place its problem is named at."""

import json
from datetime import UTC, datetime, timedelta
from typing import Final

from tests.unit.metering.building import Json, body, event


def _ahead() -> str:
    return (datetime.now(UTC) + timedelta(days=1)).isoformat()


def _without(name: str) -> bytes:
    return json.dumps({each: value for each, value in event().items() if each != name}).encode()


def _deep(levels: int) -> Json:
    return {"deep": _deep(levels - 1)} if levels > 1 else {}


_REQUIRED: Final = ("specversion", "id", "source", "type", "subject", "data")

# Name, body, place. All are reported by `demo`.
BAD: Final[tuple[tuple[str, bytes, str], ...]] = (
    ("not JSON", b"{", ""),
    ("nothing", b" ", ""),
    ("not UTF-8", b'{"id": "\xff"}', ""),
    ("not an object", b'"use"', ""),
    ("null", b"null", ""),
    ("nested too deeply", b"[" * 20_000 + b"]" * 20_000, ""),
    ("too long", body(data_feature="f" * 70_000), ""),
    *((f"null for {name}", json.dumps({**event(), name: None}).encode(), name) for name in _REQUIRED),
    *((f"no {name}", _without(name), name) for name in _REQUIRED),
    ("no tokens", body(data={"provider": "openai", "model": "gpt-4o-mini"}), "data.input_tokens"),
    ("an unknown type", body(type="scrip.model.used.v9"), "type"),
    ("an unknown field", body(data_cost="1.00"), "data.cost"),
    ("a unit of its own", body(data_unit="usd"), "data.unit"),
    ("a float", body(data_input_tokens=1.5), "data.input_tokens"),
    ("a float without fraction", body(data_input_tokens=1.0), "data.input_tokens"),
    ("a number as text", body(data_input_tokens="12"), "data.input_tokens"),
    ("a negative number", body(data_output_tokens=-1), "data.output_tokens"),
    ("an absurd number", body(data_input_tokens=10**30), "data.input_tokens"),
    ("true for a number", body(data_input_tokens=True), "data.input_tokens"),
    ("an empty id", body(id=""), "id"),
    ("an id with a NUL", body(id="use\x00"), "id"),
    ("an id of a thousand characters", body(id="u" * 1000), "id"),
    ("an empty subject", body(subject=""), "subject"),
    ("a subject with a line break", body(subject="acme\nml"), "subject"),
    ("a subject that is too long", body(subject="acme ml" * 50), "subject"),
    ("a source of another", body(source="gateway"), "source"),
    ("a source that is no name", body(source="Demo!"), "source"),
    ("a time too far ahead", body(time=_ahead()), "time"),
    ("a time without a zone", body(time="2026-01-01T00:00:00"), "time"),
    ("a time as a number", body(time=1767225600), "time"),
    ("a time before time", body(time="0001-01-01T00:00:00Z"), "time"),
    ("a NUL in an attribute", body(data_attributes={"endpoint": "/v1\x00"}), "data.attributes.endpoint"),
    ("half a character", body(data_attributes={"endpoint": "\ud800"}), ""),
    ("an object as an extension", body(extra={"deep": 1}), "extra"),
    ("data in base64", json.dumps({**event(), "data_base64": "aGVsbG8="}).encode(), "data_base64"),
    ("a hold that is no id", body(data_hold="hold-1"), "data.hold"),
    ("data of another type that is a list", body(type="api-calls", data=[1]), "data"),
    ("data of another type that is too deep", body(type="api-calls", data=_deep(9)), "data" + ".deep" * 8),
    (
        "data of another type with too much in it",
        body(type="api-calls", data=dict.fromkeys(map(str, range(257)))),
        "data",
    ),
    ("data of another type with a NUL", body(type="api-calls", data={"path": "/v1\x00"}), "data.path"),
    ("a number of another type beyond bounds", body(type="api-calls", data={"size": 10**64}), "data.size"),
    ("metering as the source", body(source="metering"), "source"),
)
