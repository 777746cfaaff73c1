"""Stripe's form encoding, `line_items[0][price_data][currency]=usd`, and reading parameters from it strictly. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlsplit

METADATA_KEYS_MAX: Final = 50
METADATA_KEY_LENGTH_MAX: Final = 40
METADATA_VALUE_LENGTH_MAX: Final = 500

T = TypeVar("T")

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_DEPTH_MAX = 8


@dataclass(eq=False)
class Refused(Exception):
    """An answer other than success, as Stripe's error object says it.

    `executed` tells whether work had begun: only then is the answer kept under the idempotency key.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    type: str = "invalid_request_error"
    executed: bool = False

    def body(self) -> dict[str, Any]:
        """Stripe's error object, without the members that say nothing."""
        members = {"code": self.code, "message": self.message, "param": self.param, "type": self.type}
        return {"error": {name: value for name, value in members.items() if value is not None}}


def parse(encoded: str) -> dict[str, Any]:
    """The tree of a form or query: objects, lists and texts. Refused if names contradict one another."""
    tree: dict[str, Any] = {}
    for name, value in parse_qsl(encoded, keep_blank_values=True):
        found = _NAME.fullmatch(name)
        if found is None:
            raise Refused(400, f"Invalid parameter name: {name}", param=name)
        path = [found[1], *re.findall(r"\[([^\[\]]*)\]", found[2])]
        if len(path) > _DEPTH_MAX:
            raise Refused(400, f"Parameter nested too deeply: {name}", param=name)
        _put(tree, path, value, name=name)
    return {name: _lists(value) for name, value in tree.items()}


class Params:
    """Parameters of one object. Whatever is not asked for is unknown, and `finish` refuses it."""

    def __init__(self, tree: dict[str, Any], *, within: str = "") -> None:
        self._tree = tree
        self._within = within
        self._known: set[str] = set()

    def text(self, name: str, *, length_max: int = 5000) -> str | None:
        """A text; an empty one means none."""
        value = self._take(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise Refused(400, f"Invalid string: {value}", param=self._name(name))
        if len(value) > length_max:
            message = f"Invalid string: {value[:20]}…; must be at most {length_max} characters"
            raise Refused(400, message, param=self._name(name))
        return value

    def required(self, name: str) -> str:
        return self._present(name, self.text(name))

    def integer(self, name: str, *, least: int) -> int | None:
        value = self.text(name)
        if value is None:
            return None
        if not re.fullmatch(r"-?\d{1,15}", value, re.ASCII):
            message = f"Invalid integer: {value}"
            raise Refused(400, message, param=self._name(name), code="parameter_invalid_integer")
        if int(value) < least:
            message = f"This value must be greater than or equal to {least}."
            raise Refused(400, message, param=self._name(name), code="parameter_invalid_integer")
        return int(value)

    def required_integer(self, name: str, *, least: int) -> int:
        return self._present(name, self.integer(name, least=least))

    def one_of(self, name: str, choices: Iterable[str]) -> str | None:
        value = self.text(name)
        if value is not None and value not in choices:
            message = f"Invalid {self._name(name)}: must be one of {', '.join(choices)}"
            raise Refused(400, message, param=self._name(name))
        return value

    def url(self, name: str) -> str | None:
        value = self.text(name)
        if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
            raise Refused(400, "Not a valid URL", param=self._name(name), code="url_invalid")
        return value

    def required_url(self, name: str) -> str:
        return self._present(name, self.url(name))

    def texts(self, name: str) -> list[str]:
        value = self._take(name)
        if value is None or value == "":
            return []
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return value
        raise Refused(400, "Invalid array", param=self._name(name))

    def metadata(self) -> dict[str, str]:
        """Stripe's metadata, within its limits."""
        value = self._take("metadata")
        if value is None or value == "":
            return {}
        name = self._name("metadata")
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise Refused(400, "Metadata values must be strings", param=name)
        found = {key: each for key, each in value.items() if each}
        if len(found) > METADATA_KEYS_MAX:
            raise Refused(400, f"Metadata can have up to {METADATA_KEYS_MAX} keys", param=name)
        for key, each in found.items():
            if len(key) > METADATA_KEY_LENGTH_MAX or len(each) > METADATA_VALUE_LENGTH_MAX:
                message = (
                    f"Metadata keys can have up to {METADATA_KEY_LENGTH_MAX} characters and values up to "
                    f"{METADATA_VALUE_LENGTH_MAX}: {key[:METADATA_KEY_LENGTH_MAX]} has more"
                )
                raise Refused(400, message, param=f"{name}[{key[:METADATA_KEY_LENGTH_MAX]}]")
        return found

    def inner(self, name: str) -> "Params | None":
        """The parameters of an object within this one."""
        value = self._take(name)
        if value is None or value == "":
            return None
        if not isinstance(value, dict):
            raise Refused(400, "Invalid object", param=self._name(name))
        return Params(value, within=self._name(name))

    def required_inner(self, name: str) -> "Params":
        return self._present(name, self.inner(name))

    def items(self, name: str) -> "list[Params]":
        """The parameters of each object of a list."""
        value = self._take(name)
        if value is None or value == "":
            return []
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise Refused(400, "Invalid array", param=self._name(name))
        return [Params(each, within=f"{self._name(name)}[{index}]") for index, each in enumerate(value)]

    def finish(self) -> None:
        """Refuse what nobody asked for: better than to let it do nothing."""
        for name in self._tree:
            if name not in self._known:
                message = f"Received unknown parameter: {self._name(name)} (this simulator knows a part of Stripe's)"
                raise Refused(400, message, param=self._name(name), code="parameter_unknown")

    def _take(self, name: str) -> Any:
        self._known.add(name)
        return self._tree.get(name)

    def _name(self, name: str) -> str:
        return f"{self._within}[{name}]" if self._within else name

    def _present(self, name: str, value: T | None) -> T:
        if value is None:
            message = f"Missing required param: {self._name(name)}."
            raise Refused(400, message, param=self._name(name), code="parameter_missing")
        return value


def _put(tree: dict[str, Any], path: list[str], value: str, *, name: str) -> None:
    *outer, last = path
    for part in outer:
        tree = tree.setdefault(part or str(len(tree)), {})
        if not isinstance(tree, dict):
            raise Refused(400, f"Parameter given as a value and as an object: {name}", param=name)
    last = last or str(len(tree))
    if last in tree:
        raise Refused(400, f"Parameter given twice: {name}", param=name)
    tree[last] = value


def _lists(value: Any) -> Any:
    """The same with every object whose names are 0, 1, … as a list."""
    if not isinstance(value, dict):
        return value
    found = {name: _lists(each) for name, each in value.items()}
    if found and all(name.isascii() and name.isdigit() and len(name) < 6 for name in found):
        return [found[name] for name in sorted(found, key=int)]
    return found
