"""The committed schemas are those of the models, and every example ever committed still parses."""

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Literal, get_args, get_origin

import jsonschema
import pytest
from hypothesis import given
from pydantic import BaseModel

import contracts
from contracts.envelope import read_usage_event
from contracts.keyvault import KEY_COMMANDS, KEY_REPLIES
from contracts.ledger import COMMANDS, LIST_REPLIES, REPLIES
from contracts.usage import MODEL_USED
from infra import schemas
from infra.schemas import EXAMPLES, MESSAGES, MessageType
from tests.unit.contracts.strategies import Json, usage_events

BY_NAME = {message.name: message for message in MESSAGES}
EXAMPLE_PATHS = sorted(EXAMPLES.glob("*/*.json"))


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_the_committed_schemas_are_those_of_the_models() -> None:
    assert schemas.stale(schemas.committed(), schemas.generate()) == []
    assert schemas.main(["--check"]) == 0


def test_each_schema_is_committed_as_it_is_written() -> None:
    for name, schema in schemas.generate().items():
        assert (schemas.DIRECTORY / f"{name}.json").read_text(encoding="utf-8") == schemas.text_of(schema)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_each_schema_is_a_valid_schema_that_forbids_unknown_fields(message: MessageType) -> None:
    schema = schemas.generate()[message.name]
    jsonschema.Draft202012Validator.check_schema(schema)
    for name, part in {"": schema, **schema.get("$defs", {})}.items():
        if part.get("type") == "object" and (message.name, name) != (MODEL_USED, ""):
            assert part["additionalProperties"] is False, f"{message.name} {name}"


def test_types_are_named_by_service_noun_verb_and_version() -> None:
    for message in MESSAGES:
        assert message.name.split(".")[-1].removeprefix("v").isdecimal()
        literal = message.model.model_fields.get("type")
        if literal is not None:
            assert get_args(literal.annotation) == (message.name,)
    assert len(BY_NAME) == len(MESSAGES)


def test_every_model_that_is_a_message_has_a_schema() -> None:
    modules = [importlib.import_module(f"contracts.{found.name}") for found in pkgutil.iter_modules(contracts.__path__)]
    models = {
        model
        for module in modules
        for model in vars(module).values()
        if isinstance(model, type) and issubclass(model, BaseModel)
    }
    messages = {
        model
        for model in models
        for name in ("type", "command", "status")
        if name in model.model_fields and get_origin(model.model_fields[name].annotation) is Literal
    }
    assert messages == {message.model for message in MESSAGES}
    commands = _alternatives(COMMANDS.json_schema()) | _alternatives(KEY_COMMANDS.json_schema())
    replies = _alternatives(REPLIES.json_schema()) | _alternatives(LIST_REPLIES.json_schema())
    replies |= _alternatives(KEY_REPLIES.json_schema())
    assert {message.model for message in MESSAGES if message.kind == "command"} == commands
    assert {message.model for message in MESSAGES if message.kind == "reply"} == replies


def _alternatives(union: Json) -> set[type[BaseModel]]:
    names = {alternative["$ref"].removeprefix("#/$defs/") for alternative in union["oneOf"]}
    return {message.model for message in MESSAGES if message.model.__name__ in names}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_each_type_has_an_example(message: MessageType) -> None:
    assert [path for path in EXAMPLE_PATHS if path.parent.name == message.name]


@pytest.mark.parametrize("path", EXAMPLE_PATHS, ids=named)
def test_each_example_parses_for_ever(path: Path) -> None:
    message, body = BY_NAME[path.parent.name], path.read_bytes()
    parsed = message.model.model_validate_json(body)
    of_keyvault = message.name.startswith("rpc.keyvault.")
    # A field that the model forgot would be missing here, one that it reads as another would differ.
    assert _without_times(json.loads(parsed.model_dump_json(exclude_unset=True))) == _without_times(json.loads(body))
    match message.kind:
        case "command":
            assert (KEY_COMMANDS if of_keyvault else COMMANDS).validate_json(body) == parsed
        case "reply":
            ledger_replies = LIST_REPLIES if message.name == "rpc.ledger.reply.listed.v1" else REPLIES
            assert (KEY_REPLIES if of_keyvault else ledger_replies).validate_json(body) == parsed
        case "event" if message.name == MODEL_USED:
            assert read_usage_event(body)[0] == parsed
        case "event":
            pass


@pytest.mark.parametrize("path", EXAMPLE_PATHS, ids=named)
def test_each_example_fits_its_schema(path: Path) -> None:
    _validator(path.parent.name).validate(json.loads(path.read_bytes()))


@given(usage_events)
def test_the_schema_takes_every_event_that_the_model_takes(raw: Json) -> None:
    _validator(MODEL_USED).validate(raw)


def _validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schemas.committed()[name])


def _without_times(value: object) -> object:
    # The same moment may be written in several ways.
    if isinstance(value, dict):
        return {
            name: _without_times(item) for name, item in value.items() if name != "time" and not name.endswith("_at")
        }
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return value
