"""Usage event types and their data: what publishing services tell metering."""

from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from contracts.ids import HoldId

MODEL_USED: Final = "scrip.model.used.v1"

# More than any call of any model; a larger number is a mistake of the producer.
TOKENS_MAX = 10**9
ATTRIBUTES_MAX = 32

ModelName = Annotated[str, Field(pattern=r"^[^\s\x00-\x1f]{1,128}$", examples=["gpt-4o-mini"])]
ProviderName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$", examples=["openai"])]
TokenCount = Annotated[int, Field(ge=0, le=TOKENS_MAX)]
AttributeName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
# What every JSON reader holds exactly (RFC 7493).
AttributeNumber = Annotated[int, Field(ge=-(2**53) + 1, le=2**53 - 1)]
AttributeText = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]
PriceVersionId = Annotated[str, Field(pattern=r"^[^\s\x00-\x1f]{1,64}$", examples=["2024-07-18"])]


# What a provider calls a tool that it bills for: `web_search`, `code_execution`.
ToolName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$", examples=["web_search"])]
ServiceTier = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$", examples=["batch", "flex", "priority"])]

TOOLS_MAX: Final = 16

# What each further count is a part of. What is here under no name stands beside the tokens: it is part of nothing.
PART_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "cached_input_tokens": ("input_tokens",),
    "cache_write_tokens": ("input_tokens",),
    "cache_write_1h_tokens": ("cache_write_tokens",),
    "input_audio_tokens": ("input_tokens",),
    "input_image_tokens": ("input_tokens",),
    "input_video_tokens": ("input_tokens",),
    "cached_audio_tokens": ("cached_input_tokens", "input_audio_tokens"),
    "cached_image_tokens": ("cached_input_tokens", "input_image_tokens"),
    "reasoning_tokens": ("output_tokens",),
    "output_audio_tokens": ("output_tokens",),
    "output_image_tokens": ("output_tokens",),
    "output_video_tokens": ("output_tokens",),
    "citation_tokens": ("output_tokens",),
    "annotated_pages": ("pages",),
}
BESIDE: Final = ("images", "audio_seconds", "characters", "pages", "messages")
FURTHER_COUNTS: Final = (*PART_OF, *BESIDE)

# Those that are part of another count, and not of the tokens alone.
_PARTS_OF_PARTS: Final = frozenset(part for part, wholes in PART_OF.items() if {*wholes} & {*PART_OF, *BESIDE})


class Counts(BaseModel):
    """What else a provider counted of a call. A part is never more than what it is a part of.

    Part of the call's `input_tokens` are those read from a cache (`cached_input_tokens`), those written to one
    (`cache_write_tokens`, and of these for an hour `cache_write_1h_tokens`), and those of audio, images and video
    (`input_audio_tokens`, …; of both cache and audio: `cached_audio_tokens`). What is written to a cache counts as
    text. Part of its `output_tokens` are `reasoning_tokens`, `citation_tokens`, and those of audio, images and video;
    they exclude each other. Beside the tokens stand `images`, `audio_seconds`, `characters`, `pages` (of them
    `annotated_pages`), `messages`, and `tool_calls` by the tool's name: only of tools that the provider bills.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    cached_input_tokens: TokenCount = 0
    cache_write_tokens: TokenCount = 0
    cache_write_1h_tokens: TokenCount = 0
    input_audio_tokens: TokenCount = 0
    input_image_tokens: TokenCount = 0
    input_video_tokens: TokenCount = 0
    cached_audio_tokens: TokenCount = 0
    cached_image_tokens: TokenCount = 0
    reasoning_tokens: TokenCount = 0
    output_audio_tokens: TokenCount = 0
    output_image_tokens: TokenCount = 0
    output_video_tokens: TokenCount = 0
    citation_tokens: TokenCount = 0
    images: TokenCount = 0
    audio_seconds: TokenCount = 0
    characters: TokenCount = 0
    pages: TokenCount = 0
    annotated_pages: TokenCount = 0
    messages: TokenCount = 0
    tool_calls: Annotated[dict[ToolName, TokenCount], Field(max_length=TOOLS_MAX)] = {}

    @property
    def input_parts(self) -> int:
        """How many of the input tokens are of some part, each counted once."""
        audio = self.input_audio_tokens - self.cached_audio_tokens
        images = self.input_image_tokens - self.cached_image_tokens
        return self.cached_input_tokens + self.cache_write_tokens + audio + images + self.input_video_tokens

    @property
    def output_parts(self) -> int:
        """How many of the output tokens are of some part."""
        media = self.output_audio_tokens + self.output_image_tokens + self.output_video_tokens
        return self.reasoning_tokens + self.citation_tokens + media

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if _PARTS_OF_PARTS.isdisjoint(self.model_fields_set):
            return self
        for part, wholes in PART_OF.items():
            for whole in wholes:
                if whole in PART_OF or whole in BESIDE:
                    _check_part(part, getattr(self, part), whole, getattr(self, whole))
        cached = self.cached_audio_tokens + self.cached_image_tokens
        _check_part(
            "cached_audio_tokens and cached_image_tokens", cached, "cached_input_tokens", self.cached_input_tokens
        )
        return self


def _check_part(part: str, count: int, whole: str, total: int) -> None:
    if count > total:
        raise ValueError(f"{part} ({count}) is part of {whole}, and more than that ({total})")


class ModelUsed(BaseModel):
    """One call of a model. Tokens are what the provider counted, all of them; `counts` says what they were besides.

    `hold` is what the call was admitted under, `service_tier` the one it was served at (`batch` among them).
    `price_version` pins the price book version that the call was quoted with; without it that of its time holds.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    provider: ProviderName
    model: ModelName
    input_tokens: TokenCount
    output_tokens: TokenCount
    hold: HoldId | None = None
    own_key: bool = False
    price_version: PriceVersionId | None = None
    feature: AttributeName | None = None
    attributes: Annotated[
        dict[AttributeName, AttributeText | AttributeNumber | bool], Field(max_length=ATTRIBUTES_MAX)
    ] = {}
    counts: Counts | None = None
    service_tier: ServiceTier | None = None

    @field_validator("counts", mode="after")
    @classmethod
    def _counts_fit(cls, counts: Counts | None, info: ValidationInfo) -> Counts | None:
        # Not asked where there are no counts. Where the tokens themselves are wrong, that has been said.
        if counts is not None and "input_tokens" in info.data and "output_tokens" in info.data:
            _check_part("the sum of its parts", counts.input_parts, "input_tokens", info.data["input_tokens"])
            _check_part("the sum of its parts", counts.output_parts, "output_tokens", info.data["output_tokens"])
        return counts


_Count = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,63}\Z")]
_Text = Annotated[str, msgspec.Meta(max_length=512)]
_Number = Annotated[int, msgspec.Meta(ge=-(2**53) + 1, le=2**53 - 1)]


class QuickCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """ModelUsed, as most calls are and as it is read fast. The same names have the same values; it has no `counts`.

    In the order of names, which is that of the canonical form.
    """

    attributes: Annotated[dict[_Name, _Text | _Number | bool], msgspec.Meta(max_length=ATTRIBUTES_MAX)] = {}
    feature: str | None = None
    hold: str | None = None
    input_tokens: _Count
    model: str
    output_tokens: _Count
    own_key: bool = False
    price_version: str | None = None
    provider: str
    service_tier: str | None = None

    @property
    def counts(self) -> Literal[None]:
        """One that has some is read as ModelUsed."""
        return None

    def in_full(self) -> ModelUsed:
        """As the model of the contract."""
        return ModelUsed.model_validate_json(msgspec.json.encode(self))
