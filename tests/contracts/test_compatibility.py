"""The checker itself: it refuses each change that an old message would not survive, and no other."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, create_model

from infra import schemas
from infra.schemas import incompatibilities

Json = dict[str, Any]
Change = Callable[[Json], object]

CHARGES = "metering.charges.rated.v1"
USED = "scrip.model.used.v1"
GRANT = "rpc.ledger.grant.v1"
REFUSED = "rpc.ledger.reply.refused.v1"


def problems_after(name: str, change: Change) -> list[str]:
    old = schemas.generate()
    new = copy.deepcopy(old)
    change(new[name])
    return incompatibilities(old, new)


def line(schema: Json) -> Json:
    found: Json = schema["$defs"]["ChargeLine"]
    return found


def data(schema: Json) -> Json:
    found: Json = schema["$defs"]["ModelUsed"]
    return found


BREAKING: dict[str, tuple[str, Change]] = {
    "a property is gone": (CHARGES, lambda schema: schema["properties"].pop("recorded_at")),
    "a nested property is gone": (CHARGES, lambda schema: line(schema)["properties"].pop("hold")),
    "a property got another name": (
        GRANT,
        lambda schema: schema["properties"].update(sum=schema["properties"].pop("amount")),
    ),
    "a new field is required": (
        CHARGES,
        lambda schema: (
            line(schema)["properties"].update(region={"type": "string"}),
            line(schema)["required"].append("region"),
        ),
    ),
    "an optional field is required": (CHARGES, lambda schema: line(schema)["required"].append("own_key")),
    "a type was narrowed": (USED, lambda schema: data(schema)["properties"]["own_key"].update(type="null")),
    "null is no longer allowed": (USED, lambda schema: data(schema)["properties"]["hold"]["anyOf"].pop()),
    "a type of several is gone": (
        USED,
        lambda schema: list(data(schema)["properties"]["attributes"]["patternProperties"].values())[0]["anyOf"].pop(1),  # noqa: RUF015 - it has one
    ),
    "a number became text": (
        USED,
        lambda schema: data(schema)["properties"].update(input_tokens={"type": "string"}),
    ),
    "an enum member is gone": (GRANT, lambda schema: schema["properties"]["kind"]["enum"].remove("bonus")),
    "an enum became one value": (
        GRANT,
        lambda schema: schema["properties"].update(kind={"const": "plan", "type": "string", "default": "adjustment"}),
    ),
    "a constant changed": (USED, lambda schema: schema["properties"]["specversion"].update(const="1.1")),
    "text became an enum": (REFUSED, lambda schema: schema["properties"]["code"].update(enum=["insufficient_funds"])),
    "a maximum fell": (USED, lambda schema: data(schema)["properties"]["input_tokens"].update(maximum=10**6)),
    "a minimum rose": (USED, lambda schema: data(schema)["properties"]["input_tokens"].update(minimum=1)),
    "a bound became exclusive": (
        USED,
        lambda schema: data(schema)["properties"]["input_tokens"].update(exclusiveMinimum=0),
    ),
    "an exclusive bound fell": (CHARGES, lambda schema: schema["properties"]["partition"].update(exclusiveMaximum=32)),
    "a text got shorter": (USED, lambda schema: schema["properties"]["id"].update(maxLength=255)),
    "a text may not be empty": (REFUSED, lambda schema: schema["properties"]["message"].update(minLength=1)),
    "fewer items": (CHARGES, lambda schema: schema["properties"]["lines"].update(maxItems=999)),
    "more items needed": (CHARGES, lambda schema: line(schema)["properties"]["amounts"].update(minItems=1)),
    "fewer attributes": (USED, lambda schema: data(schema)["properties"]["attributes"].update(maxProperties=31)),
    "a pattern changed": (USED, lambda schema: schema["properties"]["source"].update(pattern="^[a-z]+$")),
    "a pattern is new": (REFUSED, lambda schema: schema["properties"]["code"].update(pattern="^[a-z_]+$")),
    "a format is new": (REFUSED, lambda schema: schema["properties"]["message"].update(format="date-time")),
    "items must differ": (CHARGES, lambda schema: schema["properties"]["lines"].update(uniqueItems=True)),
    "a default changed its meaning": (
        GRANT,
        lambda schema: schema["properties"]["kind"].update(default="plan"),
    ),
    "unknown names are no longer allowed": (USED, lambda schema: schema.update(additionalProperties=False)),
    "unknown names are narrowed": (USED, lambda schema: schema.update(additionalProperties={"type": "string"})),
    "an extension attribute became a field of its own type": (
        USED,
        lambda schema: schema["properties"].update(region={"type": "string"}),
    ),
    "names of attributes changed": (
        USED,
        lambda schema: data(schema)["properties"]["attributes"].update(
            patternProperties={"^[a-z]+$": {"type": "string"}}, additionalProperties=False
        ),
    ),
    "another definition": (
        CHARGES,
        lambda schema: schema["properties"]["lines"].update(items={"$ref": "#/$defs/Scope"}),
    ),
    "a definition beside an alternative that keeps it": (
        REFUSED,
        lambda schema: schema["$defs"]["Amount"]["properties"]["amount"].update(maxLength=3),
    ),
    "nothing is allowed in a place": (CHARGES, lambda schema: line(schema)["properties"].update(hold=False)),
}

HARMLESS: dict[str, tuple[str, Change]] = {
    "nothing": (USED, lambda schema: schema.copy()),
    "an optional field is new": (
        CHARGES,
        lambda schema: line(schema)["properties"].update(region={"type": "string", "default": "eu"}),
    ),
    "a required field became optional": (CHARGES, lambda schema: line(schema)["required"].remove("price_version")),
    "null is allowed too": (
        CHARGES,
        lambda schema: line(schema)["properties"].update(
            price_version={"anyOf": [line(schema)["properties"]["price_version"], {"type": "null"}]}
        ),
    ),
    "an enum member is new": (GRANT, lambda schema: schema["properties"]["kind"]["enum"].append("gift")),
    "a constant became an enum": (
        USED,
        lambda schema: schema["properties"].update(specversion={"enum": ["1.0", "1.1"], "type": "string"}),
    ),
    "an enum became text": (GRANT, lambda schema: schema["properties"]["kind"].pop("enum")),
    "an integer became a number": (
        USED,
        lambda schema: data(schema)["properties"]["input_tokens"].update(type="number"),
    ),
    "wider bounds": (
        USED,
        lambda schema: data(schema)["properties"]["input_tokens"].update(minimum=-1, maximum=10**12),
    ),
    "a bound is gone": (USED, lambda schema: data(schema)["properties"]["input_tokens"].pop("maximum")),
    "a pattern is gone": (USED, lambda schema: schema["properties"]["source"].pop("pattern")),
    "longer texts": (USED, lambda schema: schema["properties"]["id"].update(maxLength=512)),
    "more items": (CHARGES, lambda schema: schema["properties"]["lines"].update(maxItems=2000)),
    "another description": (CHARGES, lambda schema: schema.update(description="…", title="…", examples=[1])),
    "unknown names are allowed now": (CHARGES, lambda schema: schema.pop("additionalProperties")),
    "a definition has another name": (
        CHARGES,
        lambda schema: (
            schema["$defs"].update(Line=schema["$defs"].pop("ChargeLine")),
            schema["properties"]["lines"].update(items={"$ref": "#/$defs/Line"}),
        ),
    ),
}


@pytest.mark.parametrize(("name", "change"), BREAKING.values(), ids=BREAKING.keys())
def test_what_an_old_message_would_not_survive_is_refused(name: str, change: Change) -> None:
    problems = problems_after(name, change)
    assert problems
    assert all(problem.startswith(f"{name}: ") for problem in problems)


@pytest.mark.parametrize(("name", "change"), HARMLESS.values(), ids=HARMLESS.keys())
def test_what_every_old_message_survives_is_allowed(name: str, change: Change) -> None:
    assert problems_after(name, change) == []


def test_a_type_stays_for_ever_and_a_new_version_stands_beside_it() -> None:
    old = schemas.generate()
    new = {name.replace(USED, "scrip.model.used.v2"): schema for name, schema in old.items()}
    assert [problem.split(":")[0] for problem in incompatibilities(old, new)] == [USED]
    assert incompatibilities(old, old | new) == []


def test_a_problem_names_its_place() -> None:
    assert problems_after(CHARGES, lambda schema: line(schema)["properties"].pop("hold")) == [
        f"{CHARGES}: lines[].hold is no longer allowed"
    ]


def test_a_definition_that_refers_to_itself_is_compared_once() -> None:
    tree: Json = {
        "$ref": "#/$defs/Tree",
        "$defs": {"Tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/Tree"}, "leaf": {"maximum": 9}}}},
    }
    narrower = copy.deepcopy(tree)
    narrower["$defs"]["Tree"]["properties"]["leaf"]["maximum"] = 8
    assert incompatibilities({"t": tree}, {"t": tree}) == []
    assert incompatibilities({"t": tree}, {"t": narrower}) == ["t: leaf: its maximum fell to 8"]


def test_writing_refuses_and_leaves_everything_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert schemas.main(["--write"], directory=tmp_path) == 0
    assert schemas.committed(tmp_path) == schemas.generate()
    wider = schemas.committed(tmp_path)[CHARGES]
    wider["properties"]["note"] = {"type": "string"}
    (tmp_path / f"{CHARGES}.json").write_text(json.dumps(wider))
    (tmp_path / f"{USED}.json").unlink()
    assert schemas.main(["--write"], directory=tmp_path) == 1
    assert "note" in capsys.readouterr().err
    assert not (tmp_path / f"{USED}.json").exists()
    assert "note" in (tmp_path / f"{CHARGES}.json").read_text()


def test_checking_names_what_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schemas.main(["--write"], directory=tmp_path)
    (tmp_path / f"{USED}.json").unlink()
    assert schemas.main(["--check"], directory=tmp_path) == 1
    assert USED in capsys.readouterr().err
    assert not (tmp_path / f"{USED}.json").exists()


# --- against real models: what the checker allows, jsonschema must accept ---

_KINDS: list[tuple[Any, list[Any]]] = [
    (int, [0, -5, 10**6]),
    (Annotated[int, Field(ge=0)], [0, 10**6]),
    (Annotated[int, Field(ge=0, le=9)], [0, 9]),
    (Annotated[int, Field(gt=0, lt=9)], [1, 8]),
    (str, ["", "abc"]),
    (Annotated[str, Field(min_length=1, max_length=3)], ["a", "abc"]),
    (Annotated[str, Field(pattern="^a")], ["a", "abc"]),
    (Literal["a", "b"], ["a", "b"]),
    (Literal["a"], ["a"]),
    (int | str, [1, "a"]),
    (int | None, [1, None]),
    (bool, [True]),
    (tuple[int, ...], [[], [1, 2]]),
    (Annotated[tuple[int, ...], Field(max_length=1)], [[], [1]]),
    (dict[str, int], [{}, {"a": 1}]),
    (dict[str, int | str], [{}, {"a": "b"}]),
]
_fields = st.dictionaries(
    st.sampled_from(["one", "two", "three"]),
    st.tuples(st.sampled_from(range(len(_KINDS))), st.booleans()),
    max_size=3,
)


def _model(fields: dict[str, tuple[int, bool]], *, closed: bool) -> Json:
    listed: Any = {
        name: (_KINDS[kind][0], ... if required else _KINDS[kind][1][0]) for name, (kind, required) in fields.items()
    }
    message = create_model("Message", **listed)
    schema: Json = message.model_json_schema()
    schema["additionalProperties"] = not closed
    return schema


@given(_fields, _fields, st.booleans(), st.booleans(), st.data())
def test_what_is_allowed_really_survives(
    old_fields: dict[str, tuple[int, bool]],
    new_fields: dict[str, tuple[int, bool]],
    was_closed: bool,
    closed: bool,
    data: st.DataObject,
) -> None:
    old, new = _model(old_fields, closed=was_closed), _model(new_fields, closed=closed)
    if incompatibilities({"m": old}, {"m": new}):
        return
    message = {
        name: data.draw(st.sampled_from(_KINDS[kind][1]))
        for name, (kind, required) in old_fields.items()
        if required or data.draw(st.booleans())
    }
    if not was_closed:
        message |= data.draw(
            st.dictionaries(st.sampled_from(["one", "two", "more"]), st.none() | st.text(), max_size=2)
        )
    if jsonschema.Draft202012Validator(old).is_valid(message):
        jsonschema.Draft202012Validator(new).validate(message)


@given(_fields, st.booleans())
def test_every_schema_survives_itself(fields: dict[str, tuple[int, bool]], closed: bool) -> None:
    schema = _model(fields, closed=closed)
    assert incompatibilities({"m": schema}, {"m": copy.deepcopy(schema)}) == []
