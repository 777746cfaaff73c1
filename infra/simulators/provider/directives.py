"""What a request asks of the simulated provider, decided before anything is generated. Pure.

Directives `[[name:value]]` in the last user message steer it; infra/simulators/README.md lists them.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

Disconnect = Literal["drain", "abort"]

# Each a common English word, and so one token to most tokenisers, too.
_VOCABULARY_TEXT = (
    "the account has been charged for every call that was made today and nothing more than what it really used "
    "so the balance is right again while we wait here until another payment comes in from your side of the world"
)
VOCABULARY: Final = tuple(_VOCABULARY_TEXT.split())

TOKENS_PER_MESSAGE: Final = 3
TOKENS_WITHOUT_DIRECTIVE_MIN: Final = 8
TOKENS_WITHOUT_DIRECTIVE_MAX: Final = 64
OUTPUT_TOKENS_MAX: Final = 16_384
CHOICES_MAX: Final = 8
SECONDS_MAX: Final = 600.0
STATUSES: Final = (400, 401, 403, 404, 408, 409, 422, 429, 500, 502, 503, 504)

_DIRECTIVE = re.compile(r"\[\[([a-z-]+)((?::[^\[\]]*)?)\]\]")


@dataclass(eq=False)
class Refused(Exception):
    """The provider does not serve this request. `type`, `code` and `param` as OpenAI's error object has them."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None

    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Directives:
    """What the last user message says in double brackets; everything absent means: behave well."""

    tokens: int | None = None
    cached: int = 0
    reasoning: int = 0
    fail: int | None = None
    stall_seconds: float = 0.0
    stall_after: tuple[int, float] | None = None
    cut_after: int | None = None
    error_after: int | None = None
    token_seconds: float | None = None
    omit_usage: bool = False
    bad_json: bool = False
    disconnect: Disconnect | None = None
    served_as: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One answer: what it costs and what it says. Token counts of the output are per choice."""

    model: str
    stream: bool
    include_usage: bool
    choices: int
    input_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    visible_tokens: int
    finish_reason: Literal["stop", "length"]
    first_word: int
    directives: Directives

    def word(self, index: int) -> str:
        """The text of one token of the answer."""
        word = VOCABULARY[(self.first_word + index) % len(VOCABULARY)]
        return word if index == 0 else f" {word}"


def plan(request: Mapping[str, Any]) -> Plan:
    """Decide the whole answer from the request alone, so that the same request always costs the same.

    Input: 3 per message and one per word of its text. Output: the directive's number, or 8 to 64 by a hash of the
    last user message; reasoning comes first and counts as output; the request's limit bounds both together.
    """
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise Refused(400, "you must provide a model parameter")
    if model.startswith("missing-"):
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise Refused(404, message, code="model_not_found")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise Refused(400, "'messages' must be an array with at least one message.", param="messages")
    stream, include_usage = _streaming(request)
    last = next((_text(message) for message in reversed(messages) if message.get("role") == "user"), "")
    directives = parse(last)
    number = int.from_bytes(hashlib.sha256(last.encode()).digest()[:8])
    spread = TOKENS_WITHOUT_DIRECTIVE_MAX - TOKENS_WITHOUT_DIRECTIVE_MIN + 1
    wanted = directives.tokens if directives.tokens is not None else TOKENS_WITHOUT_DIRECTIVE_MIN + number % spread
    limit = min(_positive(request, name) or OUTPUT_TOKENS_MAX for name in ("max_tokens", "max_completion_tokens"))
    limit = min(limit, OUTPUT_TOKENS_MAX)
    reasoning = min(directives.reasoning, limit)
    visible = min(wanted, limit - reasoning)
    input_tokens = sum(TOKENS_PER_MESSAGE + len(_text(message).split()) for message in messages)
    return Plan(
        model=model,
        stream=stream,
        include_usage=include_usage,
        choices=_choices(request),
        input_tokens=input_tokens,
        cached_tokens=min(directives.cached, input_tokens),
        reasoning_tokens=reasoning,
        visible_tokens=visible,
        finish_reason="length" if reasoning + visible < directives.reasoning + wanted else "stop",
        first_word=number % len(VOCABULARY),
        directives=directives,
    )


def parse(text: str) -> Directives:
    """The directives in a text. Refused names the one that is not understood: a typo must not pass for behaviour."""
    found: dict[str, Any] = {}
    for name, rest in _DIRECTIVE.findall(text):
        values = rest.split(":")[1:]
        try:
            field, value = _read(name, values)
        except (KeyError, TypeError, ValueError) as error:
            whole = f"[[{':'.join([name, *values])}]]"
            raise Refused(400, f"The simulated provider does not understand {whole}.", code="directive") from error
        found[field] = value
    return Directives(**found)


def _read(name: str, values: Sequence[str]) -> tuple[str, object]:
    field, reader = _READERS[name]
    return field, reader(*values)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise ValueError(text)
    return int(text)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= SECONDS_MAX:
        raise ValueError(text)
    return seconds


def _status(text: str) -> int:
    if int(text) not in STATUSES:
        raise ValueError(text)
    return int(text)


def _policy(text: str) -> str:
    if text not in ("drain", "abort"):
        raise ValueError(text)
    return text


# By name: the field, and what reads the values. The wrong number of values is a TypeError.
_READERS: Final[Mapping[str, tuple[str, Callable[..., object]]]] = {
    "tokens": ("tokens", _count),
    "cached": ("cached", _count),
    "reasoning": ("reasoning", _count),
    "fail": ("fail", _status),
    "stall": ("stall_seconds", _seconds),
    "stall-after": ("stall_after", lambda count, seconds: (_count(count), _seconds(seconds))),
    "cut": ("cut_after", _count),
    "error-after": ("error_after", _count),
    "slow": ("token_seconds", lambda milliseconds: _seconds(milliseconds) / 1000),
    "omit-usage": ("omit_usage", lambda: True),
    "bad-json": ("bad_json", lambda: True),
    "on-disconnect": ("disconnect", _policy),
    "served-as": ("served_as", str),
}


def _streaming(request: Mapping[str, Any]) -> tuple[bool, bool]:
    stream = request.get("stream") or False
    if not isinstance(stream, bool):
        raise Refused(400, "'stream' must be a boolean.", param="stream")
    options = request.get("stream_options")
    if options is None:
        return stream, False
    if not stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise Refused(400, message, param="stream_options")
    if not isinstance(options, dict):
        raise Refused(400, "'stream_options' must be an object.", param="stream_options")
    return stream, options.get("include_usage") is True


def _choices(request: Mapping[str, Any]) -> int:
    choices = _positive(request, "n") or 1
    if choices > CHOICES_MAX:
        raise Refused(400, f"'n' must be at most {CHOICES_MAX}.", param="n")
    return choices


def _positive(request: Mapping[str, Any], name: str) -> int | None:
    value = request.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Refused(400, f"'{name}' must be an integer of at least 1.", param=name)
    return value


def _text(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content is a string or a list of parts."""
    content = message.get("content")
    match content:
        case str():
            return content
        case list():
            texts = (part.get("text") for part in content if isinstance(part, dict))
            return " ".join(text for text in texts if isinstance(text, str))
        case _:
            return ""
