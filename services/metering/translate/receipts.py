"""What the log keeps of a charge becomes a receipt: every line to the last digit, their sum, and how it was rounded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Context, Decimal, localcontext
from typing import Final, Literal

import msgspec
from pydantic import AwareDatetime, BaseModel

from contracts.money import Unit, format_amount
from contracts.pricing import PriceVersion
from services.metering.translate.items import Amount, read_amounts

# Sums of items are exact: none of them has as many digits.
_EXACT: Final = Context(prec=200)

Status = Literal["charged", "unattributed", "unpriced", "unmapped", "sent_on", "void"]


class ReceiptItem(BaseModel):
    """One priced quantity: `exact` is `count` * `price` / `per`, not rounded. Numbers with decimals are text.

    `tier` says which of several prices it is, `price_id` of which own price. A surcharge in percent is per 100 of what
    `count` says. `adjustment` is what a volume price changes of what was counted before; `credit` and `carried` are
    what that left over from earlier events, and leaves for later ones. An `adjustment` of the tier `settled` is given
    back, since later events have lowered what this one cost; or a correction of others has, or has raised it.
    """

    quantity: str
    count: int | str
    unit: str
    price: str
    per: int
    exact: str
    tier: str | None = None
    price_id: str | None = None


class ReceiptAmount(BaseModel):
    """What was charged in a unit: `exact`, the sum of its items, and `rounding`, to the unit's step, half to even.

    Both are null where no items are kept: of units that only count.
    """

    unit: str
    amount: str
    exact: str | None
    rounding: str | None


class ReceiptBundle(BaseModel):
    """Where the ledger has it: a line of a numbered bundle of a partition."""

    partition: int
    number: int
    line: int


class ReceiptVersion(BaseModel):
    """A version of an event: as it came (0), or as a correction made it. At most one is not superseded: it counts.

    `amounts` are what it costs in all, by unit; `bundle` has its line, which of a correction is the difference.
    """

    revision: int
    superseded: bool
    recorded_at: AwareDatetime
    price_version: str | None
    amounts: dict[str, str]
    bundle: ReceiptBundle | None


class ReceiptCorrection(BaseModel):
    """What a correction did to an event: from which version to which, null for none; the difference, signed, by unit.

    `undone`: what was before is restored, as version `undone_revision` (null: it is void).
    """

    id: str
    kind: str
    reason: str
    actor: str
    recorded_at: AwareDatetime
    from_revision: int | None
    to_revision: int | None
    difference: dict[str, str]
    undone: bool
    undone_revision: int | None


class Receipt(BaseModel):
    """What became of one event, and what it cost. `waits_for` says what it waits for, if it is not charged yet.

    It is of the version that counts; of an event that is void (`void`), of the last that did. All that it was is in
    `versions`, and why in `corrections`. Where a correction gave back and charged nothing `bundle` is null.
    `conflicts`: how many reports with other contents came under its id; they are kept apart, and not charged.
    """

    source: str
    id: str
    status: Status
    waits_for: str | None
    account: str | None
    subject: str | None
    type: str | None
    occurred_at: AwareDatetime
    recorded_at: AwareDatetime | None
    price_version: str | None
    price_version_effective_at: AwareDatetime | None
    items: list[ReceiptItem]
    amounts: list[ReceiptAmount]
    bundle: ReceiptBundle | None
    conflicts: int
    revision: int = 0
    versions: list[ReceiptVersion] = []
    corrections: list[ReceiptCorrection] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptRow:
    """What is stored of an event. Of one that is not logged here most is None.

    `line_items`, `amounts`, `versions` and `corrections` are JSON.
    """

    partition: int
    source: str
    event_id: str
    occurred_at: datetime
    account: str | None
    subject: str | None
    type: str | None
    recorded_at: datetime | None
    price_version: str | None
    line_items: str | None
    amounts: str | None
    bundle_number: int | None
    line_number: int | None
    reason: Literal["unattributed", "unpriced", "unmapped"] | None
    key: str | None
    conflicts: int
    revision: int | None
    is_void: bool
    versions: str | None
    corrections: str | None

    @property
    def is_here(self) -> bool:
        """Whether it is logged or waits where it was found, and was not sent on."""
        return self.type is not None or self.reason is not None or self.is_void

    @property
    def status(self) -> Status:
        """What became of it."""
        if self.is_void:
            return "void"
        return self.reason or ("charged" if self.price_version is not None else "sent_on")


_ITEMS: Final = msgspec.json.Decoder(list[dict[str, int | str]])


class _StoredVersion(msgspec.Struct):
    revision: int
    superseded: bool
    recorded_at: datetime
    price_version: str | None
    amounts: list[Amount] | None
    bundle: int | None
    line: int | None


class _StoredCorrection(msgspec.Struct):
    id: str
    kind: str
    reason: str
    actor: str
    recorded_at: datetime
    from_revision: int | None
    to_revision: int | None
    difference: dict[str, int]
    undone: bool
    undone_revision: int | None


_VERSIONS: Final = msgspec.json.Decoder(list[_StoredVersion])
_CORRECTIONS: Final = msgspec.json.Decoder(list[_StoredCorrection])


def receipt(row: ReceiptRow, *, price_version: PriceVersion | None, units: Mapping[str, Unit]) -> Receipt:
    """A receipt. `price_version` is the one it names."""
    items = [ReceiptItem.model_validate(each) for each in _ITEMS.decode(row.line_items or "[]")]
    return Receipt(
        source=row.source,
        id=row.event_id,
        status=row.status,
        waits_for=row.key,
        account=row.account,
        subject=row.subject or row.account,
        type=row.type,
        occurred_at=row.occurred_at.astimezone(UTC),
        recorded_at=None if row.recorded_at is None else row.recorded_at.astimezone(UTC),
        price_version=row.price_version,
        price_version_effective_at=None if price_version is None else price_version.effective_at,
        items=items,
        amounts=[_amount(each, items) for each in read_amounts(row.amounts)],
        bundle=None
        if row.bundle_number is None or row.line_number is None
        else ReceiptBundle(partition=row.partition, number=row.bundle_number, line=row.line_number),
        conflicts=row.conflicts,
        revision=row.revision or 0,
        versions=[_version(each, row.partition) for each in _VERSIONS.decode(row.versions or "[]")],
        corrections=[_correction(each, units) for each in _CORRECTIONS.decode(row.corrections or "[]")],
    )


def _version(of: _StoredVersion, partition: int) -> ReceiptVersion:
    return ReceiptVersion(
        revision=of.revision,
        superseded=of.superseded,
        recorded_at=of.recorded_at.astimezone(UTC),
        price_version=of.price_version,
        amounts={each.unit: each.amount for each in of.amounts or ()},
        bundle=None
        if of.bundle is None or of.line is None
        else ReceiptBundle(partition=partition, number=of.bundle, line=of.line),
    )


def _correction(of: _StoredCorrection, units: Mapping[str, Unit]) -> ReceiptCorrection:
    return ReceiptCorrection(
        id=of.id,
        kind=of.kind,
        reason=of.reason,
        actor=of.actor,
        recorded_at=of.recorded_at.astimezone(UTC),
        from_revision=of.from_revision,
        to_revision=of.to_revision,
        difference={unit: format_amount(steps, units[unit]) for unit, steps in sorted(of.difference.items())},
        undone=of.undone,
        undone_revision=of.undone_revision,
    )


def _amount(of: Amount, items: Sequence[ReceiptItem]) -> ReceiptAmount:
    found = [Decimal(each.exact) for each in items if each.unit == of.unit]
    if not found:
        return ReceiptAmount(unit=of.unit, amount=of.amount, exact=None, rounding=None)
    with localcontext(_EXACT):
        exact = sum(found, Decimal(0))
        rounding = Decimal(of.amount) - exact
    return ReceiptAmount(unit=of.unit, amount=of.amount, exact=_plain(exact), rounding=_plain(rounding))


def _plain(value: Decimal) -> str:
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text
