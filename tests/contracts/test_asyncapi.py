"""contracts/asyncapi.json is fresh, well-formed AsyncAPI 3.0, and says what the permission matrix says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from contracts.partition import PARTITION_COUNT
from contracts.streams import CONSUMERS, OPERATOR, STREAMS, USERS
from infra import asyncapi
from infra.schemas import CONTRACTS, MESSAGES, pattern_of

Json = dict[str, Any]

DOCUMENT: Json = json.loads(asyncapi.PATH.read_text(encoding="utf-8"))


def follow(reference: str) -> Any:
    """What a reference means: a place in the document, or a committed schema."""
    file, _, pointer = reference.partition("#")
    found: Any = json.loads((CONTRACTS / file).read_text(encoding="utf-8")) if file else DOCUMENT
    for part in filter(None, pointer.split("/")):
        found = found[part.replace("~1", "/").replace("~0", "~")]
    return found


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [found for item in value.values() for found in references(item)]
    if isinstance(value, list):
        return [found for item in value for found in references(item)]
    return []


def test_the_committed_document_is_fresh() -> None:
    assert asyncapi.main(["--check"]) == 0
    assert asyncapi.generate() == DOCUMENT


def test_a_stale_or_missing_document_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "asyncapi.json"
    assert asyncapi.main(["--check"], path=path) == 1
    assert "stale" in capsys.readouterr().err
    assert asyncapi.main(["--write"], path=path) == 0
    assert asyncapi.main(["--check"], path=path) == 0


def test_it_has_the_shape_of_asyncapi_3() -> None:
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert set(DOCUMENT) == {"asyncapi", "info", "defaultContentType", "channels", "operations", "components"}
    assert {"title", "version"} <= set(DOCUMENT["info"])
    for parts in (DOCUMENT["channels"], DOCUMENT["operations"], *DOCUMENT["components"].values()):
        assert all(re.fullmatch(r"[\w.-]+", name) for name in parts)
    for channel in DOCUMENT["channels"].values():
        assert {"address", "messages"} <= set(channel)
        declared = set(channel.get("parameters", {}))
        assert set(re.findall(r"\{(\w+)\}", channel["address"] or "")) == declared
    for operation in DOCUMENT["operations"].values():
        assert operation["action"] in ("send", "receive")
        of_channel = [message["$ref"] for message in operation["messages"]]
        assert all(each.startswith(f"{operation['channel']['$ref']}/messages/") for each in of_channel)
    for message in DOCUMENT["components"]["messages"].values():
        assert {"name", "title", "description", "contentType", "payload"} == set(message)
        assert set(message["payload"]) == {"schemaFormat", "schema"}


def test_every_reference_leads_somewhere() -> None:
    found = references(DOCUMENT)
    assert found
    for reference in found:
        assert follow(reference)


def test_each_message_has_its_own_schema() -> None:
    for message in MESSAGES:
        described = DOCUMENT["components"]["messages"][message.name]
        assert follow(described["payload"]["schema"]["$ref"])["$id"] == f"urn:scrip:schema:{message.name}"
        assert described["title"] == message.model.__name__


def test_all_partitions_are_listed() -> None:
    listed = DOCUMENT["components"]["parameters"]["partition"]["enum"]
    assert listed == [f"{partition:02d}" for partition in range(PARTITION_COUNT)]


def test_every_subject_of_streams_users_and_consumers_has_a_channel() -> None:
    addresses = [pattern_of(channel["address"]) for channel in DOCUMENT["channels"].values() if channel["address"]]
    known = [
        *(subject for stream in STREAMS for subject in stream.subjects),
        *(subject for consumer in CONSUMERS for subject in consumer.filter_subjects),
        *(subject for user in USERS if user.name != OPERATOR for subject in (*user.publishes, *user.answers)),
    ]
    for subject in known:
        assert any(asyncapi.overlaps(subject, address) for address in addresses), subject
    assert len(addresses) == len(set(addresses))


def test_the_operations_are_the_permission_matrix() -> None:
    names = set(DOCUMENT["operations"])
    assert "gateway_sends_rpc_ledger_v1_place_hold" in names
    assert "gateway_sends_rpc_ledger_v1_grant" not in names
    assert "metering_receives_usage_v1_source" in names
    assert "metering_receives_ledger_v1_account_opened" in names
    assert "ledger_receives_metering_v1_charges_rated" in names
    assert not [name for name in names if name.startswith(OPERATOR)]
    for name, operation in DOCUMENT["operations"].items():
        address = follow(operation["channel"]["$ref"])["address"]
        service = operation["tags"][0]["name"]
        assert name.startswith(f"{service}_{operation['action']}s_")
        if operation["action"] == "send":
            assert service in {user.name for user in asyncapi.senders(address)}
            (user,) = (user for user in USERS if user.name == service)
            assert set(operation["x-permitted-subjects"]) <= set(user.publishes)
        else:
            assert service in asyncapi.receivers(address)


def test_every_command_is_answered_by_every_kind_of_reply() -> None:
    commands = {message.name for message in MESSAGES if message.kind == "command"}
    for operation in DOCUMENT["operations"].values():
        sent = {reference["$ref"].rsplit("/", 1)[1] for reference in operation["messages"]}
        if sent & commands:
            service = min(sent).split(".")[1]
            replies = {
                message.name
                for message in MESSAGES
                if message.kind == "reply" and message.name.startswith(f"rpc.{service}.")
            }
            assert {reference["$ref"].rsplit("/", 1)[1] for reference in operation["reply"]["messages"]} == replies
        else:
            assert "reply" not in operation


def test_channels_name_the_stream_that_stores_them() -> None:
    for name, channel in DOCUMENT["channels"].items():
        if name.startswith("rpc_"):
            assert channel["x-stream"] is None
        elif channel["address"]:
            assert channel["x-stream"] in {stream.name for stream in STREAMS}
