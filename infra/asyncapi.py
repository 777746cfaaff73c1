"""contracts/asyncapi.json: AsyncAPI 3.0 generated from the streams, the permission matrix and the message models.

`python -m infra.asyncapi --write` writes it, `--check` says whether the committed one is stale.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from contracts.partition import PARTITION_COUNT, token
from contracts.streams import CONSUMERS, OPERATOR, STREAMS, USERS, User
from infra.schemas import CONTRACTS, MESSAGES, MessageType, pattern_of, text_of

Document = dict[str, Any]

PATH: Final = CONTRACTS / "asyncapi.json"
# Those that answer requests: each has a channel of its replies.
ANSWERING: Final = ("ledger", "keyvault")

_PARAMETERS: Final[dict[str, Document]] = {
    "partition": {
        "description": f"crc32(first segment of the account id) % {PARTITION_COUNT}, two digits.",
        "enum": [token(partition) for partition in range(PARTITION_COUNT)],
    },
    "source": {"description": "The publishing service: the authenticated principal, and the event's `source`."},
    "principal": {"description": "The caller. A user may publish its own name only, so that it cannot be forged."},
    "verb": {"description": "What happened, in the past tense."},
}


def generate() -> Document:
    """The whole document. Schemas are references to the committed files beside it."""
    channels = {_channel_name(address): _channel(address) for address in _addresses()}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Scrip",
            "version": "1",
            "description": "Every message between services: where it goes, who may send it, who reads it. Generated.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": channels | {_replies_name(service): _replies(service) for service in ANSWERING},
        "operations": dict(sorted(_operations().items())),
        "components": {
            "messages": {message.name: _message(message) for message in MESSAGES},
            "parameters": _PARAMETERS,
        },
    }


def main(arguments: Sequence[str] | None = None, *, path: Path = PATH) -> int:
    """`--check` or `--write`. Returns 1 after saying that the committed document is stale."""
    parser = argparse.ArgumentParser(prog="python -m infra.asyncapi", description=__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--check", action="store_true", help="compare the committed document with contracts/")
    choice.add_argument("--write", action="store_true", help="write the document")
    asked = parser.parse_args(arguments)
    if asked.write:
        path.write_text(text_of(generate()), encoding="utf-8")
        return 0
    if not path.exists() or json.loads(path.read_text(encoding="utf-8")) != generate():
        sys.stderr.write("contracts/asyncapi.json is stale; run python -m infra.asyncapi --write\n")
        return 1
    return 0


def overlaps(first: str, second: str) -> bool:
    """Whether a NATS subject exists that both patterns match."""
    ones, twos = first.split("."), second.split(".")
    for one, two in zip(ones, twos, strict=False):
        if ">" in (one, two):
            return True
        if "*" not in (one, two) and one != two:
            return False
    return len(ones) == len(twos)


def stream_of(address: str) -> str | None:
    """The stream that stores what is sent to an address; null for request/reply."""
    for stream in STREAMS:
        if any(overlaps(pattern_of(address), subject) for subject in stream.subjects):
            return stream.name
    return None


def senders(address: str) -> tuple[User, ...]:
    """Who may send there, by the permission matrix."""
    return tuple(user for user in USERS if user.name != OPERATOR and _matches(address, user.publishes))


def receivers(address: str) -> tuple[str, ...]:
    """The services that read there: through a durable consumer, by answering requests, or by listening."""
    stream, pattern = stream_of(address), pattern_of(address)
    reading = {
        consumer.service
        for consumer in CONSUMERS
        if consumer.stream == stream and any(overlaps(subject, pattern) for subject in consumer.filter_subjects)
    }
    hearing = {user.name for user in USERS if _matches(address, (*user.answers, *user.listens))}
    return tuple(sorted(reading | hearing))


def _matches(address: str, patterns: Sequence[str]) -> bool:
    return any(overlaps(pattern_of(address), pattern) for pattern in patterns)


def _addresses() -> list[str]:
    return [message.address for message in MESSAGES if message.address]


def _channel_name(address: str) -> str:
    """`ledger.v1.{partition}.lot.granted` gives `ledger_v1_lot_granted`."""
    parts = [part for part in address.split(".") if part != "{partition}"]
    if parts[-1] == "{principal}":
        parts.pop()
    return "_".join(part.strip("{}") for part in parts)


def _messages_at(address: str) -> list[MessageType]:
    return [message for message in MESSAGES if message.address == address]


def _channel(address: str) -> Document:
    stream, messages = stream_of(address), _messages_at(address)
    channel: Document = {"address": address}
    if not messages:
        channel["description"] = "Reserved: permitted and provisioned for, but no message is defined yet."
    channel["messages"] = {each.name: {"$ref": f"#/components/messages/{each.name}"} for each in messages}
    parameters = re.findall(r"\{([a-z]+)\}", address)
    if parameters:
        channel["parameters"] = {name: {"$ref": f"#/components/parameters/{name}"} for name in parameters}
    channel["x-stream"] = stream
    return channel


def _replies_name(service: str) -> str:
    return f"{service}_replies"


def _replies_of(service: str) -> list[MessageType]:
    return [each for each in MESSAGES if each.kind == "reply" and each.name.startswith(f"rpc.{service}.")]


def _replies(service: str) -> Document:
    return {
        "address": None,
        "description": "The caller's inbox, named in the request. One reply per request.",
        "messages": {
            message.name: {"$ref": f"#/components/messages/{message.name}"} for message in _replies_of(service)
        },
    }


def _operations() -> dict[str, Document]:
    operations: dict[str, Document] = {}
    for address in _addresses():
        channel = _channel_name(address)
        for user in senders(address):
            permitted = [pattern for pattern in user.publishes if overlaps(pattern, pattern_of(address))]
            operations[f"{user.name}_sends_{channel}"] = _operation("send", address, user.name) | {
                "x-permitted-subjects": permitted
            }
        for service in receivers(address):
            durables = [
                consumer.durable
                for consumer in CONSUMERS
                if consumer.service == service and _matches(address, consumer.filter_subjects)
            ]
            operations[f"{service}_receives_{channel}"] = _operation("receive", address, service) | {
                "x-durable-consumers": durables
            }
    return operations


def _operation(action: str, address: str, service: str) -> Document:
    channel = _channel_name(address)
    operation: Document = {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "tags": [{"name": service}],
        "messages": [{"$ref": f"#/channels/{channel}/messages/{each.name}"} for each in _messages_at(address)],
    }
    if any(message.kind == "command" for message in _messages_at(address)):
        answering = address.split(".")[1]
        replies = _replies_name(answering)
        operation["reply"] = {
            "channel": {"$ref": f"#/channels/{replies}"},
            "messages": [
                {"$ref": f"#/channels/{replies}/messages/{message.name}"} for message in _replies_of(answering)
            ],
        }
    return operation


def _message(message: MessageType) -> Document:
    is_cloud_event = message.address.startswith("usage.")
    return {
        "name": message.name,
        "title": message.model.__name__,
        "description": inspect.getdoc(message.model),
        "contentType": "application/cloudevents+json" if is_cloud_event else "application/json",
        "payload": {
            "schemaFormat": "application/schema+json;version=draft-2020-12",
            "schema": {"$ref": f"./schemas/{message.name}.json"},
        },
    }


if __name__ == "__main__":
    sys.exit(main())
