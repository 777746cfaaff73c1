"""The JSON Schemas of contracts/: `--write` writes them, `--check` compares them with the models.

A message once sent must parse for ever, so a change that an old message would not survive is refused: what a committed
schema accepts, the model of that type and version accepts.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel

from contracts import billing, keyvault, ledger, usage
from contracts.envelope import UsageEvent
from contracts.metering import CHARGES_RATED, ChargesRated

Schema = dict[str, Any]

CONTRACTS: Final = Path(__file__).resolve().parent.parent / "contracts"
DIRECTORY: Final = CONTRACTS / "schemas"
EXAMPLES: Final = DIRECTORY / "examples"

ANY_PARTITION: Final = "{partition}"


@dataclass(frozen=True, slots=True)
class MessageType:
    """A kind of message, its version in its name. `address` is its subject with parameters; replies have none."""

    name: str
    kind: Literal["event", "command", "reply"]
    model: type[BaseModel]
    address: str = ""


def _fact(model: type[BaseModel]) -> MessageType:
    name: str = model.model_fields["type"].default
    service, noun, verb, _ = name.split(".")
    # Versions of a fact share its subject.
    return MessageType(name, "event", model, f"{service}.v1.{ANY_PARTITION}.{noun}.{verb}")


def _command(model: type[BaseModel]) -> MessageType:
    command: str = model.model_fields["command"].default
    return MessageType(
        f"rpc.ledger.{command}.v1", "command", model, f"rpc.ledger.v1.{ANY_PARTITION}.{command}.{{principal}}"
    )


def _key_command(model: type[BaseModel]) -> MessageType:
    # Keys are found by their hash: whoever asks does not know the partition.
    command: str = model.model_fields["command"].default
    return MessageType(f"rpc.keyvault.{command}.v1", "command", model, f"rpc.keyvault.v1.{command}.{{principal}}")


MESSAGES: Final = (
    MessageType(usage.MODEL_USED, "event", UsageEvent, f"usage.v1.{ANY_PARTITION}.{{source}}"),
    MessageType(CHARGES_RATED, "event", ChargesRated, f"metering.v1.{ANY_PARTITION}.charges.rated"),
    _fact(ledger.AccountOpened),
    _fact(ledger.LotGranted),
    _fact(ledger.LotExpired),
    _fact(ledger.LotVoided),
    _fact(ledger.HoldPlaced),
    _fact(ledger.HoldExtended),
    _fact(ledger.HoldSettled),
    _fact(ledger.HoldReleased),
    _fact(ledger.HoldExpired),
    _fact(ledger.UsageCharged),
    _fact(ledger.UsageChargedToOne),
    _fact(ledger.ChargeReversed),
    _fact(ledger.MoneyTransferred),
    _fact(ledger.PaymentClaimed),
    _fact(ledger.BalanceLow),
    _fact(ledger.BalanceExhausted),
    _fact(ledger.BalanceRecovered),
    _fact(ledger.HeadsSigned),
    _command(ledger.OpenAccount),
    _command(ledger.SetWallet),
    _command(ledger.Grant),
    _command(ledger.VoidGrant),
    _command(ledger.Adjust),
    _command(ledger.PlaceHold),
    _command(ledger.ExtendHold),
    _command(ledger.SettleHold),
    _command(ledger.ReleaseHold),
    _command(ledger.Charge),
    _command(ledger.Debit),
    _command(ledger.ReverseCharge),
    _command(ledger.Transfer),
    _command(ledger.ClaimPayment),
    _command(ledger.SetRule),
    _command(ledger.EndRule),
    _command(ledger.ChangePlan),
    _command(ledger.CommandList),
    MessageType("rpc.ledger.reply.accepted.v1", "reply", ledger.Accepted),
    MessageType("rpc.ledger.reply.refused.v1", "reply", ledger.Refused),
    MessageType("rpc.ledger.reply.failed.v1", "reply", ledger.Failed),
    MessageType("rpc.ledger.reply.listed.v1", "reply", ledger.Listed),
    MessageType("billing.stripe.received.v1", "event", billing.StripeReceived, billing.STRIPE_RECEIVED_SUBJECT),
    _fact(billing.PaymentReceived),
    _fact(billing.PaymentClaimed),
    _fact(keyvault.KeyCreated),
    _fact(keyvault.KeyDisabled),
    _fact(keyvault.KeyPolicyChanged),
    _key_command(keyvault.VerifyKey),
    _key_command(keyvault.LeaseSecret),
    MessageType("rpc.keyvault.reply.verified.v1", "reply", keyvault.Verified),
    MessageType("rpc.keyvault.reply.leased.v1", "reply", keyvault.Leased),
    MessageType("rpc.keyvault.reply.refused.v1", "reply", keyvault.KeyRefused),
)


def pattern_of(address: str) -> str:
    """The NATS subject pattern of an address: `usage.v1.{partition}.{source}` gives `usage.v1.*.*`."""
    return re.sub(r"\{[a-z]+\}", "*", address)


def generate() -> dict[str, Schema]:
    """The schema of every message type, by name."""
    return {message.name: _schema(message) for message in MESSAGES}


def committed(directory: Path = DIRECTORY) -> dict[str, Schema]:
    """The schemas as they stand in the repository, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))}


def text_of(document: Mapping[str, Any]) -> str:
    """A document as it is committed."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def incompatibilities(old: Mapping[str, Schema], new: Mapping[str, Schema]) -> list[str]:
    """Why messages of the old schemas would not survive the new ones: one sentence each; none if they would."""
    problems = []
    for name, schema in old.items():
        if name not in new:
            problems.append(f"{name}: is gone, but such messages exist; keep it and put the next version beside it")
        else:
            problems.extend(f"{name}: {problem}" for problem in _Comparison(schema, new[name]).problems())
    return problems


def stale(old: Mapping[str, Schema], new: Mapping[str, Schema]) -> list[str]:
    """The types whose committed schema is not the one their model has."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def main(arguments: Sequence[str] | None = None, *, directory: Path = DIRECTORY) -> int:
    """`--check` or `--write`. Returns 1 after saying what is stale or incompatible."""
    parser = argparse.ArgumentParser(prog="python -m infra.schemas", description=__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--check", action="store_true", help="compare the committed schemas with the models")
    choice.add_argument("--write", action="store_true", help="write the schemas, unless old messages would not survive")
    asked = parser.parse_args(arguments)
    old, new = committed(directory), generate()
    problems = incompatibilities(old, new)
    if problems:
        sys.stderr.write("\n".join(problems) + "\nNothing was written. Give a changed message a new version.\n")
        return 1
    if asked.write:
        directory.mkdir(parents=True, exist_ok=True)
        for name, schema in new.items():
            (directory / f"{name}.json").write_text(text_of(schema), encoding="utf-8")
        return 0
    for name in stale(old, new):
        sys.stderr.write(f"{name}: the committed schema is stale; run python -m infra.schemas --write\n")
    return 1 if stale(old, new) else 0


def _schema(message: MessageType) -> Schema:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:scrip:schema:{message.name}",
        **message.model.model_json_schema(mode="validation"),
    }


# What constrains nothing, and what is compared by name below. Any other keyword must be equal or gone.
_ANNOTATIONS: Final = frozenset(
    {"$schema", "$id", "$defs", "title", "description", "examples", "default", "deprecated", "discriminator"}
)
_COMPARED: Final = frozenset(
    {"type", "const", "enum", "properties", "required", "additionalProperties", "patternProperties"}
    | {"items", "prefixItems", "anyOf", "oneOf"}
)
_LOWER: Final = ("minLength", "minItems", "minProperties")
_UPPER: Final = ("maxLength", "maxItems", "maxProperties")
_RANGE: Final = frozenset({"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"})
_PLAIN: Final = _ANNOTATIONS | _COMPARED | _RANGE | set(_LOWER) | set(_UPPER)
_ABSENT: Final = object()


class _Comparison:
    """Whether everything that one JSON Schema accepts is accepted by another: in doubt it is not.

    Knows the keywords that pydantic writes. A pattern cannot be compared with another, so it may only go away.
    """

    def __init__(self, old: Schema, new: Schema) -> None:
        self._old, self._new = old, new
        # Pairs of definitions being compared: one that meets itself again adds nothing.
        self._comparing: set[tuple[str, str]] = set()

    def problems(self) -> list[str]:
        """One sentence for each thing an old message would not survive."""
        return list(self._accepts(self._old, self._new, ""))

    def _accepts(self, old: Schema | bool, new: Schema | bool, place: str) -> Iterator[str]:
        if old is False or new is True:
            return
        if new is False:
            yield f"{place or 'the message'} is no longer allowed"
            return
        old = {} if old is True else old
        pair = (str(old.get("$ref")), str(new.get("$ref")))
        if pair in self._comparing:
            return
        entered = {pair} if "$ref" in old and "$ref" in new else set[tuple[str, str]]()
        self._comparing |= entered
        yield from self._accepts_resolved(_resolved(old, self._old), _resolved(new, self._new), place)
        self._comparing -= entered

    def _accepts_resolved(self, old: Schema, new: Schema, place: str) -> Iterator[str]:
        news = _alternatives(new)
        for alternative in _alternatives(old):
            attempts = [
                (
                    list(self._accepts_plain(alternative, candidate, place)),
                    _type_names(alternative) != _type_names(candidate),
                )
                for candidate in news
            ]
            best, _ = min(attempts, key=lambda attempt: (bool(attempt[0]), attempt[1], len(attempt[0])))
            if len(news) > 1 and best:
                yield f"{place or 'the message'}: no alternative takes what was {_shown(alternative)} ({best[0]})"
            else:
                yield from best

    def _accepts_plain(self, old: Schema, new: Schema, place: str) -> Iterator[str]:
        if "$ref" in old or "$ref" in new or "anyOf" in old or "oneOf" in old or "anyOf" in new or "oneOf" in new:
            yield from self._accepts(old, new, place)
            return
        where = place or "the message"
        yield from _values(old, new, where)
        yield from _types(old, new, where)
        yield from _bounds(old, new, where)
        for keyword in sorted(new.keys() - _PLAIN):
            if new[keyword] != old.get(keyword, _ABSENT):
                yield f"{where}: {keyword} {new[keyword]!r} is new or another, and may refuse what was accepted"
        yield from self._objects(old, new, place)
        yield from self._arrays(old, new, where)

    def _objects(self, old: Schema, new: Schema, place: str) -> Iterator[str]:
        if not new.keys() & {"properties", "required", "additionalProperties", "patternProperties"}:
            return
        required_before = set(old.get("required", ()))
        for name in new.get("required", ()):
            if name not in required_before:
                yield f"{_within(place, name)} is required now; old messages may lack it"
        old_properties, new_properties = old.get("properties", {}), new.get("properties", {})
        for name, schema in old_properties.items():
            yield from self._accepts(schema, _property(new, name), _within(place, name))
            unstated = name not in required_before and name in new_properties
            if unstated and _default(schema) != _default(new_properties[name]):
                yield f"{_within(place, name)}: its default changed, and with it what old messages without it say"
        for name in sorted(new_properties.keys() - old_properties.keys()):
            # Until now it fell under the rule for names that are not listed.
            yield from self._accepts(_property(old, name), new_properties[name], _within(place, name))
        yield from self._other_names(old, new, place)

    def _other_names(self, old: Schema, new: Schema, place: str) -> Iterator[str]:
        old_patterns, new_patterns = old.get("patternProperties", {}), new.get("patternProperties", {})
        others, others_now = old.get("additionalProperties", True), new.get("additionalProperties", True)
        yield from self._accepts(others, others_now, _within(place, "*"))
        for pattern, schema in old_patterns.items():
            yield from self._accepts(schema, new_patterns.get(pattern, others_now), _within(place, f"<{pattern}>"))
        for pattern in sorted(new_patterns.keys() - old_patterns.keys()):
            for schema in (others, *old_patterns.values()):
                yield from self._accepts(schema, new_patterns[pattern], _within(place, f"<{pattern}>"))

    def _arrays(self, old: Schema, new: Schema, where: str) -> Iterator[str]:
        firsts, firsts_now = old.get("prefixItems", []), new.get("prefixItems", [])
        if len(firsts) != len(firsts_now):
            yield f"{where}: the number of its fixed items changed"
            return
        for position, (schema, schema_now) in enumerate(zip(firsts, firsts_now, strict=True)):
            yield from self._accepts(schema, schema_now, f"{where}[{position}]")
        yield from self._accepts(old.get("items", True), new.get("items", True), f"{where}[]")


def _resolved(schema: Schema, document: Schema) -> Schema:
    while "$ref" in schema:
        target: Schema = document["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        schema = {**target, **{keyword: value for keyword, value in schema.items() if keyword != "$ref"}}
    return schema


def _alternatives(schema: Schema) -> list[Schema]:
    listed = schema.get("anyOf") or schema.get("oneOf")
    if not listed:
        return [schema]
    beside = {key: value for key, value in schema.items() if key not in _ANNOTATIONS | {"anyOf", "oneOf"}}
    return [{**beside, **alternative} for alternative in listed]


def _property(schema: Schema, name: str) -> Schema | bool:
    listed: Schema | None = schema.get("properties", {}).get(name)
    if listed is not None:
        return listed
    for pattern, found in schema.get("patternProperties", {}).items():
        if re.search(pattern, name):
            by_pattern: Schema | bool = found
            return by_pattern
    others: Schema | bool = schema.get("additionalProperties", True)
    return others


def _default(schema: Schema | bool) -> object:
    return schema.get("default", _ABSENT) if isinstance(schema, dict) else _ABSENT


def _listed(schema: Schema) -> list[str] | None:
    if "const" in schema:
        return [json.dumps(schema["const"])]
    if "enum" in schema:
        return [json.dumps(value) for value in schema["enum"]]
    return None


def _values(old: Schema, new: Schema, where: str) -> Iterator[str]:
    before, now = _listed(old), _listed(new)
    if now is not None:
        if before is None:
            yield f"{where}: only {', '.join(now)} is allowed now"
        else:
            yield from (f"{where}: the value {value} is no longer allowed" for value in before if value not in now)


def _types(old: Schema, new: Schema, where: str) -> Iterator[str]:
    before, now = _type_names(old), _type_names(new)
    if now is not None and (before is None or not before <= now):
        yield f"{where}: its type was {_named(before)} and is {_named(now)}"


def _type_names(schema: Schema) -> set[str] | None:
    if "type" not in schema:
        return None
    named = schema["type"]
    names = {named} if isinstance(named, str) else set(named)
    return names | {"integer"} if "number" in names else names


def _named(names: set[str] | None) -> str:
    return "anything" if names is None else " or ".join(sorted(names))


def _bounds(old: Schema, new: Schema, where: str) -> Iterator[str]:
    for keyword in _LOWER:
        if new.get(keyword, 0) > old.get(keyword, 0):
            yield f"{where}: {keyword} rose to {new[keyword]}"
    for keyword in _UPPER:
        if new.get(keyword, math.inf) < old.get(keyword, math.inf):
            yield f"{where}: {keyword} fell to {new[keyword]}"
    if _floor(new) > _floor(old):
        yield f"{where}: its minimum rose to {_floor(new)[0]}"
    if _ceiling(new) < _ceiling(old):
        yield f"{where}: its maximum fell to {_ceiling(new)[0]}"


def _floor(schema: Schema) -> tuple[float, bool]:
    """The least value and whether it is excluded itself: a larger pair is a tighter bound."""
    return max((schema.get("minimum", -math.inf), False), (schema.get("exclusiveMinimum", -math.inf), True))


def _ceiling(schema: Schema) -> tuple[float, bool]:
    """The largest value and whether it is allowed itself: a smaller pair is a tighter bound."""
    return min((schema.get("maximum", math.inf), True), (schema.get("exclusiveMaximum", math.inf), False))


def _within(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _shown(schema: Schema) -> str:
    listed = _listed(schema)
    return ", ".join(listed) if listed is not None else _named(_type_names(schema))


if __name__ == "__main__":
    sys.exit(main())
