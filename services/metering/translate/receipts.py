"""What the log keeps of a charge becomes a receipt: every line to the last digit, their sum, and how it was rounded."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Context, Decimal, localcontext
from typing import Final, Literal

import msgspec
from pydantic import AwareDatetime, BaseModel

from contracts.pricing import PriceVersion

# Sums of items are exact: none of them has as many digits.
_EXACT: Final = Context(prec=200)

Status = Literal["charged", "unattributed", "unpriced", "unmapped", "sent_on"]


class ReceiptItem(BaseModel):
    """One priced quantity: `exact` is `count` * `price` / `per`, not rounded. Numbers with decimals are text.

    `tier` says which of several prices it is, `price_id` of which own price. A surcharge in percent is per 100 of what
    `count` says. `adjustment` is what a volume price changes of what was counted before; `credit` and `carried` are
    what that left over from earlier events, and leaves for later ones.
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


class Receipt(BaseModel):
    """What became of one event, and what it cost. `waits_for` says what it waits for, if it is not charged yet.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptRow:
    """What is stored of an event. Of one that is not logged here most is None; `line_items` and `amounts` are JSON."""

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

    @property
    def is_here(self) -> bool:
        """Whether it is logged or waits where it was found, and was not sent on."""
        return self.type is not None or self.reason is not None


class _StoredAmount(msgspec.Struct):
    amount: str
    unit: str


_ITEMS: Final = msgspec.json.Decoder(list[dict[str, int | str]])
_AMOUNTS: Final = msgspec.json.Decoder(list[_StoredAmount])


def receipt(row: ReceiptRow, *, price_version: PriceVersion | None) -> Receipt:
    """A receipt. `price_version` is the one it names."""
    items = [ReceiptItem.model_validate(each) for each in _ITEMS.decode(row.line_items or "[]")]
    return Receipt(
        source=row.source,
        id=row.event_id,
        status=row.reason or ("charged" if row.bundle_number is not None else "sent_on"),
        waits_for=row.key,
        account=row.account,
        subject=row.subject or row.account,
        type=row.type,
        occurred_at=row.occurred_at.astimezone(UTC),
        recorded_at=None if row.recorded_at is None else row.recorded_at.astimezone(UTC),
        price_version=row.price_version,
        price_version_effective_at=None if price_version is None else price_version.effective_at,
        items=items,
        amounts=[_amount(each, items) for each in _AMOUNTS.decode(row.amounts or "[]")],
        bundle=None
        if row.bundle_number is None or row.line_number is None
        else ReceiptBundle(partition=row.partition, number=row.bundle_number, line=row.line_number),
        conflicts=row.conflicts,
    )


def _amount(of: _StoredAmount, items: Sequence[ReceiptItem]) -> ReceiptAmount:
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
