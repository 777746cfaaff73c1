"""Charges become the lines and bundles of the ledger."""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import Final

import msgspec
from pydantic import TypeAdapter, ValidationError

from contracts.ids import HoldId, partition_of_id
from contracts.metering import CHARGES_RATED, MODEL_LENGTH_MAX, OTHER_PROVIDER
from contracts.money import Unit, format_amount, parse_amount
from contracts.pricing import PlainItems, PlainPlan, PlainRow, Rated
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
    scope: _Scope | msgspec.Raw
    price_version: str
    amounts: list[_Amount] | msgspec.Raw
    hold: str | None = None
    own_key: bool = False
    traceparent: str | None = None
    revision: int = 0


class _Reversal(msgspec.Struct, gc=False):
    """contracts.metering.ReversalLine."""

    source: str
    event_id: str
    revision: int
    account: str
    amounts: list[_Amount]
    correction: str
    reason: str


class _Bundle(msgspec.Struct, omit_defaults=True, gc=False):
    """contracts.metering.ChargesRated."""

    type: str
    partition: int
    number: int
    recorded_at: datetime
    lines: list[msgspec.Raw]
    reversals: list[msgspec.Raw] = []


class _Item(msgspec.Struct, omit_defaults=True, gc=False):
    quantity: str
    # Text if it has decimals.
    count: int | str
    unit: str
    price: str
    per: int
    exact: str
    tier: str | None = None
    price_id: str | None = None


class _Said(msgspec.Struct):
    hold: str | None = None


_ENCODER: Final = msgspec.json.Encoder()
_ITEMS: Final = msgspec.json.Decoder(list[_Item])
_AMOUNTS: Final = msgspec.json.Decoder(list[_Amount])
# Sums of items are exact: none of them has as many digits.
_EXACT: Final = Context(prec=200)
_SAID: Final = msgspec.json.Decoder(_Said)
_HOLD: Final[TypeAdapter[str]] = TypeAdapter(HoldId)
_NOT_IN_A_NAME: Final = re.compile(r"[\s\x00-\x1f]+")


def priced(usage: Usage, rated: Rated, *, units: Mapping[str, Unit], traceparent: str | None = None) -> Priced:
    """A charge as JSON. Prices and exact costs are plain decimals, without exponents.

    Items are those of money, which is rounded and paid, and of own prices. What caps count of models stands in
    `amounts`, and would double the log.
    """
    if isinstance(rated.items, PlainItems) and usage.used is not None and not usage.revision:
        return _priced_plainly(usage, rated, rated.items, units=units, traceparent=traceparent)
    amounts = [_Amount(format_amount(value, units[unit]), unit) for unit, value in rated.amounts.items()]
    used = usage.used
    line = _Line(
        source=usage.source,
        event_id=usage.event_id,
        account=usage.account,
        occurred_at=usage.occurred_at,
        scope=_scope_of(usage.type) if used is None else _Scope(used.provider, used.model, used.feature),
        price_version=rated.price_version,
        amounts=amounts,
        # A hold is settled by what was reported first.
        hold=None if usage.revision else _hold_of(usage) if used is None else used.hold,
        own_key=False if used is None else used.own_key,
        traceparent=traceparent,
        revision=usage.revision,
    )
    items = [
        _Item(
            item.quantity,
            item.count if isinstance(item.count, int) else _plain(item.count),
            item.unit,
            _plain(item.price),
            item.per,
            _plain(item.exact),
            item.tier,
            item.price_id,
        )
        for item in rated.items
        if units[item.unit].kind == "money" or item.price_id is not None
    ]
    return Priced(
        line=msgspec.Raw(_ENCODER.encode(line)),
        items=_ENCODER.encode(items).decode(),
        amounts=_ENCODER.encode(amounts).decode(),
    )


def exact_of(items: str, price_id: str) -> Decimal:
    """What the items of the log say that a use costs under an own price."""
    with localcontext(_EXACT):
        return sum((Decimal(each.exact) for each in _ITEMS.decode(items) if each.price_id == price_id), Decimal(0))


def settled(items: str, amounts: str, steps: int, *, price_id: str, unit: Unit) -> tuple[str, str]:
    """Items and amounts of the log with so much less, on account of an own price that later use has lowered."""
    less = format_amount(-steps, unit)
    adjustment = _Item("adjustment", 1, unit.name, less, 1, less, "settled", price_id)
    lowered = [
        _Amount(format_amount(parse_amount(each.amount, unit) - steps, unit), each.unit)
        if each.unit == unit.name
        else each
        for each in _AMOUNTS.decode(amounts)
    ]
    return _ENCODER.encode([*_ITEMS.decode(items), adjustment]).decode(), _ENCODER.encode(lowered).decode()


def difference_line(
    usage: Usage, amounts: Mapping[str, int], *, price_version: str, units: Mapping[str, Unit]
) -> msgspec.Raw:
    """What a correction charges more, as a line of the use's revision."""
    used = usage.used
    line = _Line(
        source=usage.source,
        event_id=usage.event_id,
        account=usage.account,
        occurred_at=usage.occurred_at,
        scope=_scope_of(usage.type) if used is None else _Scope(used.provider, used.model, used.feature),
        price_version=price_version,
        amounts=[_Amount(format_amount(value, units[unit]), unit) for unit, value in amounts.items()],
        own_key=False if used is None else used.own_key,
        revision=usage.revision,
    )
    return msgspec.Raw(_ENCODER.encode(line))


def reversal_line(
    usage: Usage,
    amounts: Mapping[str, int],
    *,
    revision: int,
    correction: str,
    reason: str,
    units: Mapping[str, Unit],
) -> msgspec.Raw:
    """What a correction gives back of the line of a revision of a use."""
    line = _Reversal(
        source=usage.source,
        event_id=usage.event_id,
        revision=revision,
        account=usage.account,
        amounts=[_Amount(format_amount(value, units[unit]), unit) for unit, value in amounts.items()],
        correction=correction,
        reason=reason,
    )
    return msgspec.Raw(_ENCODER.encode(line))


def _priced_plainly(
    usage: Usage, rated: Rated, items: PlainItems, *, units: Mapping[str, Unit], traceparent: str | None
) -> Priced:
    """The same of a call that has tokens alone, as most have, put together of texts."""
    used = usage.used
    assert used is not None
    amounts = ",".join(
        [
            f'{{"amount":"{format_amount(value, found) if (found := units[unit]).scale else value}","unit":"{unit}"}}'
            for unit, value in rated.amounts.items()
        ]
    )
    amounts = f"[{amounts}]"
    of = items.of
    written = ",".join(
        [
            f'{said}{of[row.place]}{price}{row.exact_text(of[row.place])}"}}'
            for row, said, price in _shown_rows(items.plan)
        ]
    )
    line = _Line(
        source=usage.source,
        event_id=usage.event_id,
        account=usage.account,
        occurred_at=usage.occurred_at,
        scope=_scope_text(used.provider, used.model, used.feature),
        price_version=rated.price_version,
        amounts=msgspec.Raw(amounts),
        hold=used.hold,
        own_key=used.own_key,
        traceparent=traceparent,
    )
    return Priced(line=msgspec.Raw(_ENCODER.encode(line)), items=f"[{written}]", amounts=amounts)


@lru_cache(maxsize=1024)
def _shown_rows(plan: PlainPlan) -> tuple[tuple[PlainRow, str, str], ...]:
    """The rates whose items are shown, and what stands before and behind the count of each."""
    return tuple(
        (
            row,
            f'{{"quantity":"{row.quantity}","count":',
            f',"unit":"{row.unit}","price":"{_plain(row.price)}","per":{row.per},"exact":"',
        )
        for row in plan.rows
        if plan.units[row.unit].kind == "money"
    )


@lru_cache(maxsize=4096)
def _scope_text(provider: str, model: str, feature: str | None) -> msgspec.Raw:
    return msgspec.Raw(_ENCODER.encode(_Scope(provider, model, feature)))


@lru_cache(maxsize=1024)
def _scope_of(type: str) -> _Scope:
    """What lots see of a use that is no call of a model: its type in place of the model."""
    return _Scope(OTHER_PROVIDER, _NOT_IN_A_NAME.sub("_", type)[:MODEL_LENGTH_MAX])


def _hold_of(usage: Usage) -> str | None:
    """The hold that an event of another type names at `hold` in its data. What is no hold of its tree names none."""
    if '"hold"' not in usage.data:
        return None
    try:
        hold = _HOLD.validate_python(_SAID.decode(usage.data).hold)
    except (msgspec.DecodeError, ValidationError):
        return None
    return hold if partition_of_id(hold) == usage.partition else None


def _plain(value: Decimal) -> str:
    # What formatting with `f` says, in a third of the time for all but tiny numbers.
    text = str(value)
    return text if "E" not in text else f"{value:f}"


def outbox_row(bundle: Bundle, lines: Iterable[msgspec.Raw]) -> OutboxRow:
    """A bundle as the message to the ledger. Its bytes are kept, and repeats are identical."""
    return correction_row(
        partition=bundle.partition,
        number=bundle.number,
        recorded_at=bundle.recorded_at,
        lines=list(lines),
        reversals=[],
    )


def correction_row(
    *,
    partition: int,
    number: int,
    recorded_at: datetime,
    lines: list[msgspec.Raw],
    reversals: list[msgspec.Raw],
) -> OutboxRow:
    """A bundle of what is given back, and then charged."""
    payload = _ENCODER.encode(
        _Bundle(
            type=CHARGES_RATED,
            partition=partition,
            number=number,
            recorded_at=recorded_at,
            lines=lines,
            reversals=reversals,
        )
    )
    return OutboxRow(
        partition=partition,
        number=number,
        subject=charges_rated_subject(partition),
        message_id=f"metering.{partition}.{number}",
        payload=payload,
        recorded_at=recorded_at,
    )
