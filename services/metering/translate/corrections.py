"""Corrections as HTTP has them."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from typing import Annotated, Any, Final, Literal, Self

import msgspec
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from contracts.accounts import AccountId
from contracts.envelope import EventId, EventType, SourceName
from contracts.metering import CorrectionId, CorrectionReason
from contracts.money import Unit, format_amount
from contracts.times import Time
from contracts.usage import ModelName, PriceVersionId, ProviderName

# Of a request; of what an answer shows.
EVENTS_MAX: Final = 1_000
SHOWN_MAX: Final = 100


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class NamedEvent(_Body):
    """An event, by who reported it and its id. `account` is needed only if several have both."""

    source: SourceName
    id: EventId
    account: AccountId | None = None


class AmendedEvent(NamedEvent):
    """An event, and the data that it is to have. Everything else of it stays."""

    data: dict[str, Any]


class _Correction(_Body):
    id: Annotated[
        CorrectionId | None, Field(description="Yours: under one id one thing is done, once. Or as Idempotency-Key")
    ] = None
    reason: CorrectionReason


class VoidBody(_Correction):
    """Events that are to count for nothing; what they cost is given back. One that is void already stays so."""

    kind: Literal["void"]
    events: Annotated[list[NamedEvent], Field(min_length=1, max_length=EVENTS_MAX)]


class AmendBody(_Correction):
    """Events that are to have other data. They are priced by it under the version of their own time, or their pin."""

    kind: Literal["amend"]
    events: Annotated[list[AmendedEvent], Field(min_length=1, max_length=EVENTS_MAX)]


class _PeriodBody(_Correction):
    since: Annotated[Time, Field(alias="from")]
    until: Annotated[Time, Field(alias="to", description="Not included")]

    @model_validator(mode="after")
    def _is_a_period(self) -> Self:
        if self.since >= self.until:
            raise ValueError("`from` is before `to`")
        return self


class RerateBody(_PeriodBody):
    """A period whose use is priced anew: under `price_version`, or, without, under that of each use's own time.

    What has no price there stays as it is. So does what is pinned to the version it was quoted with, unless
    `include_pinned` says that it is priced under `price_version` too.
    """

    kind: Literal["rerate"]
    account: Annotated[AccountId | Literal["*"], Field(description="Whose use; `*` is everybody's")]
    tree: Annotated[bool, Field(description="Also of all accounts below")] = False
    price_version: PriceVersionId | None = None
    provider: ProviderName | None = None
    model: ModelName | None = None
    type: EventType | None = None
    include_pinned: bool = False

    @model_validator(mode="after")
    def _says_what_pinned_use_costs(self) -> Self:
        if self.include_pinned and self.price_version is None:
            raise ValueError("`include_pinned` needs a `price_version`")
        return self


class BackfillBody(_PeriodBody):
    """A period whose events are to be logged, however long ago: stage them, then apply the correction.

    `replace`: what the period holds of the account becomes void, unless it is staged: then it becomes what is staged.
    Without it an event that was reported before stays as it is.
    """

    kind: Literal["backfill"]
    account: AccountId
    tree: Annotated[bool, Field(description="Also of all accounts below")] = False
    replace: bool = False


class StagedView(BaseModel):
    """What became of events that were staged: how many are new, how many were staged before, and how many there are."""

    new: int
    repeated: int
    total: int


class UndoBody(_Body):
    """Why a correction is undone."""

    reason: CorrectionReason


CorrectionBody = Annotated[VoidBody | AmendBody | RerateBody | BackfillBody, Field(discriminator="kind")]


class CorrectedEvent(BaseModel):
    """What a correction did to an event: from which version to which, null for none. `difference`: signed, by unit.

    `undone`: what was before is restored, as version `undone_revision` (null: it is void).
    """

    source: str
    id: str
    account: str | None
    occurred_at: AwareDatetime
    from_revision: int | None
    to_revision: int | None
    difference: Mapping[str, str]
    undone: bool = False
    undone_revision: int | None = None


class AccountDifference(BaseModel):
    """What a correction changes for an account, by unit."""

    account: str | None
    difference: Mapping[str, str]


class CorrectionView(BaseModel):
    """A correction: what was asked for, how far it is, what it came to.

    `counts` are events by what became of them, `difference` what they cost more in all, by unit. `done` of `of` says
    how far a long one is. Of a dry run nothing is stored; `complete` says whether it looked at all there is.
    `events` and `accounts` are the first ones it did something to, null where they are asked for apart. `undone_by`
    also says who discarded a backfill. What a price has lowered is given back as `settle`, by metering itself.
    """

    id: str | None
    kind: Literal["void", "amend", "rerate", "backfill", "settle"]
    state: Literal["dry_run", "staging", "running", "done", "undoing", "undone", "discarded"]
    reason: str
    actor: str
    parameters: Mapping[str, Any]
    recorded_at: AwareDatetime | None
    finished_at: AwareDatetime | None
    counts: Mapping[str, int]
    difference: Mapping[str, str]
    done: int | None = None
    of: int | None = None
    complete: bool = True
    undone_by: str | None = None
    undo_reason: str | None = None
    undone_at: AwareDatetime | None = None
    events: list[CorrectedEvent] | None = None
    accounts: list[AccountDifference] | None = None


class _RawEvent(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"{}")


class _RawBody(msgspec.Struct):
    events: list[_RawEvent] = []


_RAW: Final = msgspec.json.Decoder(_RawBody)
_EXACT: Final = msgspec.json.Decoder(float_hook=Decimal)
_SORTED: Final = msgspec.json.Encoder(order="sorted", decimal_format="number")


def data_of(body: bytes) -> list[bytes]:
    """The data of the events of a body, as they were written: to read numbers would be to round them."""
    return [bytes(each.data) for each in _RAW.decode(body).events]


def hash_of(body: bytes) -> bytes:
    """What tells apart what was asked for: the body in canonical form, but for its id."""
    asked = _EXACT.decode(body)
    return sha256(_SORTED.encode({name: value for name, value in asked.items() if name != "id"})).digest()


def difference_text(difference: Mapping[str, int], units: Mapping[str, Unit]) -> dict[str, str]:
    """A difference in decimals."""
    return {unit: format_amount(difference[unit], units[unit]) for unit in sorted(difference) if difference[unit]}


def account_differences(
    found: Iterable[tuple[str | None, Mapping[str, int]]], units: Mapping[str, Unit]
) -> list[AccountDifference]:
    """What changes for each account, those with the largest change first."""
    sums: dict[str | None, dict[str, int]] = {}
    for account, difference in found:
        of = sums.setdefault(account, {})
        for unit, steps in difference.items():
            of[unit] = of.get(unit, 0) + steps
    ordered: Sequence[str | None] = sorted(
        (each for each in sums if any(sums[each].values())),
        key=lambda each: (-max(map(abs, sums[each].values())), each or ""),
    )
    return [
        AccountDifference(account=each, difference=difference_text(sums[each], units)) for each in ordered[:SHOWN_MAX]
    ]


def in_utc(time: datetime | None) -> datetime | None:
    """A time as it is shown."""
    return None if time is None else time.astimezone(UTC)
