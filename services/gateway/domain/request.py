"""A chat completion request: what of it decides cost, and how many tokens its input may have at most.

A token of a byte-level tokenizer is at least one byte of text, so bytes bound tokens from above. The estimate, for
calls whose provider reports no usage, is a token for every 4 bytes. Both add a few tokens for each message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from services.gateway.domain.errors import RequestInvalid

CHOICES_MAX: Final = 128
OUTPUT_TOKENS_MAX: Final = 10_000_000

# What surrounds each message, and the whole, in the form that a model reads.
TOKENS_PER_MESSAGE_MAX: Final = 8
TOKENS_PER_MESSAGE: Final = 3
TOKENS_PER_REQUEST_MAX: Final = 16
BYTES_PER_TOKEN: Final = 4
# Compressed speech has 1 kB a second and is read at 10 tokens a second; base64 is longer still.
AUDIO_BYTES_PER_TOKEN_MIN: Final = 64
# The most that an image costs at the lowest of the resolutions.
IMAGE_TOKENS_LOW: Final = 3_000

# Parts of a request, beside its messages, that a model reads.
_READ: Final = ("tools", "functions", "response_format", "tool_choice", "function_call", "prediction")
# Served at another price than the price book's.
_TIERS: Final = ("auto", "default")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """`body` is what is forwarded. `output_tokens_max` is per choice, as the client limits it."""

    body: Mapping[str, Any]
    model: str
    stream: bool
    usage_wanted: bool
    choices: int
    output_tokens_max: int | None
    input_tokens_bound: int
    input_tokens_estimate: int
    dearer_tier: str | None
    has_audio: bool = False


def chat_request(body: Mapping[str, Any], *, image_tokens_max: int) -> ChatRequest:
    """Read a request. RequestInvalid names what cannot be served; what else is wrong with it the provider says."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise RequestInvalid(reason="you must provide a model parameter", param="model", code="missing_model")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise RequestInvalid(reason="'messages' must be an array with at least one message", param="messages")
    stream = _boolean(body, "stream")
    tier = body.get("service_tier")
    bound, estimate = _input(messages, image_tokens_max=image_tokens_max)
    other = sum(len(_json(body[name])) for name in _READ if body.get(name) is not None)
    return ChatRequest(
        body=body,
        model=model,
        stream=stream,
        usage_wanted=_usage_wanted(body, stream=stream),
        choices=_count(body, "n", at_most=CHOICES_MAX) or 1,
        output_tokens_max=_output_limit(body),
        input_tokens_bound=TOKENS_PER_REQUEST_MAX + bound + other,
        input_tokens_estimate=estimate + -(-other // BYTES_PER_TOKEN),
        dearer_tier=None if tier is None or tier in _TIERS else str(tier),
        has_audio=_has_audio(body, messages),
    )


def _has_audio(body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a call may have tokens of audio: it speaks, or is spoken to, or was before."""
    parts = (part for message in messages if isinstance(message.get("content"), list) for part in message["content"])
    return (
        body.get("modalities") not in (None, ["text"])
        or body.get("audio") is not None
        or any(message.get("audio") is not None for message in messages)
        or any(isinstance(part, dict) and part.get("type") == "input_audio" for part in parts)
    )


def _output_limit(body: Mapping[str, Any]) -> int | None:
    names = ("max_completion_tokens", "max_tokens")
    limits = [found for name in names if (found := _count(body, name, at_most=OUTPUT_TOKENS_MAX)) is not None]
    # Which of two a provider goes by is its own affair.
    return max(limits, default=None)


def _usage_wanted(body: Mapping[str, Any], *, stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise RequestInvalid(reason="'stream_options' must be an object", param="stream_options")
    if not stream:
        raise RequestInvalid(
            reason="the 'stream_options' parameter is only allowed when 'stream' is enabled", param="stream_options"
        )
    return options.get("include_usage") is True


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestInvalid(reason=f"'{name}' must be a boolean", param=name)
    return value is True


def _count(body: Mapping[str, Any], name: str, *, at_most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
        raise RequestInvalid(reason=f"'{name}' must be an integer between 1 and {at_most}", param=name)
    return value


def _input(messages: Sequence[Mapping[str, Any]], *, image_tokens_max: int) -> tuple[int, int]:
    """The most tokens that messages can have, and about how many they have."""
    bound = estimate = 0
    for number, message in enumerate(messages):
        text_bytes, others = _content(message.get("content"), number=number, image_tokens_max=image_tokens_max)
        rest = {name: value for name, value in message.items() if name not in ("role", "content")}
        if rest:
            text_bytes += len(_json(rest))
        bound += TOKENS_PER_MESSAGE_MAX + text_bytes + others
        estimate += TOKENS_PER_MESSAGE + -(-text_bytes // BYTES_PER_TOKEN) + others
    return bound, estimate


def _content(content: object, *, number: int, image_tokens_max: int) -> tuple[int, int]:
    """The bytes of text in the content of a message, and the most tokens of what in it is not text."""
    if content is None:
        return 0, 0
    if isinstance(content, str):
        return _bytes(content), 0
    if not isinstance(content, list):
        raise RequestInvalid(reason="a message's content must be text or an array of parts", param="messages")
    text_bytes = others = 0
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        where = f"messages[{number}].content[{place}]"
        if kind in ("text", "refusal"):
            text_bytes += _bytes(part.get(kind), where)
        elif kind == "image_url":
            image = part.get("image_url")
            low = isinstance(image, dict) and image.get("detail") == "low"
            others += min(IMAGE_TOKENS_LOW, image_tokens_max) if low else image_tokens_max
        elif kind == "input_audio":
            audio = part.get("input_audio")
            data = audio.get("data") if isinstance(audio, dict) else None
            others += -(-_bytes(data, where) // AUDIO_BYTES_PER_TOKEN_MIN)
        else:
            # What it costs cannot be bounded from here: a file may be any number of pages.
            raise RequestInvalid(
                reason=f"a content part of the type {kind!r} is not served: text, image_url and input_audio are",
                param=where,
                code="unsupported_content",
            )
    return text_bytes, others


def _bytes(text: object, where: str = "messages") -> int:
    if not isinstance(text, str):
        raise RequestInvalid(reason=f"{where} must have text", param=where)
    return len(text.encode("utf-8", "surrogatepass"))


def _json(value: object) -> bytes:
    return msgspec.json.encode(value)
