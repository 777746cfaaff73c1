"""What metering publishes: bundles of rated charges and of what is given back, numbered without gaps per partition."""

from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from contracts.accounts import AccountId
from contracts.envelope import EventId, SourceName, Traceparent
from contracts.ids import HoldId
from contracts.money import Amount
from contracts.partition import Partition
from contracts.times import Time
from contracts.usage import AttributeName, ModelName, PriceVersionId, ProviderName

CHARGES_RATED: Final = "metering.charges.rated.v1"
LINES_MAX = 1_000
REVISION_MAX = 2**31 - 1

CorrectionId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$", examples=["rerate-2025-07"])]
CorrectionReason = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00]+$")]


# Of a use that is no call of a model the type of its event stands in place of the model, white space as `_`, cut off.
OTHER_PROVIDER: Final = "event"
MODEL_LENGTH_MAX: Final = 128


class Scope(BaseModel):
    """What was used, for lots that are valid only there. Of a use that is no call of a model `provider` is `event`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    provider: ProviderName
    model: ModelName
    feature: AttributeName | None = None


class ChargeLine(BaseModel):
    """What one usage event cost. (source, event_id, revision) is charged once; a revision above 0 is a later rating.

    A correction that charges more does so as the next revision of the event, with the difference only and without a
    hold. One that is not `final` leaves the hold it names open: more lines of it are to come.
    `traceparent` says of which trace the charge is a step; it is no part of what is charged.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    source: SourceName
    event_id: EventId
    revision: Annotated[int, Field(ge=0, le=REVISION_MAX)] = 0
    account: AccountId
    occurred_at: Time
    hold: HoldId | None = None
    scope: Scope
    price_version: PriceVersionId
    own_key: bool = False
    amounts: Annotated[tuple[Amount, ...], Field(max_length=16)]
    # Not written when it is: readers of before know no such field.
    final: bool = Field(default=True, exclude_if=lambda value: value)
    # Not written when there is none: readers of before know no such field.
    traceparent: Traceparent | None = Field(default=None, exclude_if=lambda value: value is None)


class ReversalLine(BaseModel):
    """Gives back what a charge line took, to the very lots it took it from: the named amounts of it, each above 0.

    (source, event_id, revision) names the line that was charged, by any bundle before this one or by a command; no
    more is given back of it in all than it took. `correction` says which correction wants it.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    source: SourceName
    event_id: EventId
    revision: Annotated[int, Field(ge=0, le=REVISION_MAX)] = 0
    account: AccountId
    amounts: Annotated[tuple[Amount, ...], Field(min_length=1, max_length=16)]
    correction: CorrectionId
    reason: CorrectionReason | None = Field(default=None, exclude_if=lambda value: value is None)


class ChargesRated(BaseModel):
    """A bundle of one partition: what is given back, in order, then what is charged, in order.

    The ledger takes the next number or an identical repeat. One of both there always is.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    type: Literal["metering.charges.rated.v1"] = CHARGES_RATED
    partition: Partition
    number: Annotated[int, Field(ge=1)]
    recorded_at: Time
    lines: Annotated[tuple[ChargeLine, ...], Field(max_length=LINES_MAX)]
    # Done before the lines. Not written when there are none: readers of before know no such field.
    reversals: Annotated[tuple[ReversalLine, ...], Field(max_length=LINES_MAX)] = Field(
        default=(), exclude_if=lambda value: not value
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.lines and not self.reversals:
            raise ValueError("a bundle has lines or reversals")
        if len(set(self.reversals)) < len(self.reversals):
            raise ValueError("no two reversals of a bundle are alike")
        return self
