"""Usage event types and their data: what publishing services tell metering."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

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


class ModelUsed(BaseModel):
    """One call of a model. Tokens are what the provider counted; `hold` is what the call was admitted under.

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
