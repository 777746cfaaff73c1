"""Charges become the lines and bundles of the ledger."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Final

import msgspec

from contracts.metering import CHARGES_RATED
from contracts.money import Unit, format_amount
from contracts.pricing import Rated
from contracts.streams import charges_rated_subject
from services.kit.outbox import OutboxRow
from services.metering.domain.charging import Bundle
from services.metering.domain.usage import Usage


class Priced(msgspec.Struct, frozen=True, gc=False):
    """A charge as JSON: its line in the bundle, and what the log keeps of it."""

    line: msgspec.Raw
    items: str
    amounts: str


class _Amount(msgspec.Struct, gc=False):
    amount: str
    unit: str


class _Scope(msgspec.Struct, omit_defaults=True, gc=False):
    provider: str
    model: str
    feature: str | None = None


class _Line(msgspec.Struct, omit_defaults=True, gc=False):
    """contracts.metering.ChargeLine, written without building the model."""

    source: str
    event_id: str
    account: str
    occurred_at: datetime
    scope: _Scope
    price_version: str
    amounts: list[_Amount]
    hold: str | None = None
    own_key: bool = False
    traceparent: str | None = None


class _Bundle(msgspec.Struct, gc=False):
    """contracts.metering.ChargesRated."""

    type: str
    partition: int
    number: int
    recorded_at: datetime
    lines: list[msgspec.Raw]


class _Item(msgspec.Struct, gc=False):
    quantity: str
    count: int
    unit: str
    price: str
    per: int
    exact: str


_ENCODER: Final = msgspec.json.Encoder()


def priced(usage: Usage, rated: Rated, *, units: Mapping[str, Unit], traceparent: str | None = None) -> Priced:
    """A charge as JSON. Prices and exact costs are plain decimals, without exponents.

    Items are those of money, which is rounded and paid. What caps count stands in `amounts`, and would double the log.
    """
    amounts = [_Amount(format_amount(value, units[unit]), unit) for unit, value in rated.amounts.items()]
    used = usage.used
    line = _Line(
        source=usage.source,
        event_id=usage.event_id,
        account=usage.account,
        occurred_at=usage.occurred_at,
        scope=_Scope(used.provider, used.model, used.feature),
        price_version=rated.price_version,
        amounts=amounts,
        hold=used.hold,
        own_key=used.own_key,
        traceparent=traceparent,
    )
    items = [
        _Item(item.quantity, item.count, item.unit, _plain(item.price), item.per, _plain(item.exact))
        for item in rated.items
        if units[item.unit].kind == "money"
    ]
    return Priced(
        line=msgspec.Raw(_ENCODER.encode(line)),
        items=_ENCODER.encode(items).decode(),
        amounts=_ENCODER.encode(amounts).decode(),
    )


def _plain(value: Decimal) -> str:
    # What formatting with `f` says, in a third of the time for all but tiny numbers.
    text = str(value)
    return text if "E" not in text else f"{value:f}"


def outbox_row(bundle: Bundle, lines: Iterable[msgspec.Raw]) -> OutboxRow:
    """A bundle as the message to the ledger. Its bytes are kept, and repeats are identical."""
    payload = _ENCODER.encode(
        _Bundle(
            type=CHARGES_RATED,
            partition=bundle.partition,
            number=bundle.number,
            recorded_at=bundle.recorded_at,
            lines=list(lines),
        )
    )
    return OutboxRow(
        partition=bundle.partition,
        number=bundle.number,
        subject=charges_rated_subject(bundle.partition),
        message_id=f"metering.{bundle.partition}.{bundle.number}",
        payload=payload,
        recorded_at=bundle.recorded_at,
    )
