"""Where foreign words stop: deliveries and HTTP bodies become usage or letters, charges become the ledger's lines."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from typing import Annotated, Any, Final

import msgspec
from nats.aio.msg import Msg
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from contracts.envelope import (
    EVENT_BYTES_MAX,
    SERVER_FILLED,
    InvalidEvent,
    Problem,
    UsageEvent,
    read_usage_event,
)
from contracts.ledger import AccountOpened
from contracts.metering import CHARGES_RATED
from contracts.money import Unit, UnitName, format_amount
from contracts.partition import partition_of
from contracts.pricing import PriceVersion, Quantity, Rate, Rated
from contracts.streams import USAGE, charges_rated_subject, usage_subject
from contracts.times import Time
from contracts.usage import ModelName, ModelUsed, ProviderName
from services.kit.dead_letters import DeadLetter, Letter, Unreadable, letter_of
from services.kit.outbox import OutboxRow
from services.kit.publish import Message
from services.kit.redelivery import place_of
from services.metering.domain.charging import Bundle
from services.metering.domain.prices import PriceBook
from services.metering.domain.usage import Usage, place_problems, report_problems

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_REASON_LENGTH_MAX: Final = 500


# Usage in -------------------------------------------------------------------------------------------------------------


def read_delivery(message: Msg, *, received_at: datetime) -> Usage | Letter:
    """A message of the usage stream as usage, or as a dead letter that names all that is wrong with it."""
    _, _, partition_token, reporter = message.subject.split(".")
    body = message.data
    try:
        event, found_hash = read_usage_event(body)
        occurred_at = stored_at(message) if event.time is None else event.time.astimezone(UTC)
        partition = partition_of(event.subject)
        problems = (
            *report_problems(source=event.source, reporter=reporter, occurred_at=occurred_at, received_at=received_at),
            *place_problems(partition=partition, partition_token=partition_token),
        )
    except InvalidEvent as error:
        problems = (*error.problems, *_further_problems(body, reporter=reporter, received_at=received_at))
        return dead(message, problems)
    if problems:
        return dead(message, problems, partition=partition)
    return _usage(event, partition=partition, occurred_at=occurred_at, found_hash=found_hash, body=body)


def dead(message: Msg, problems: Sequence[Problem], *, partition: int | None = None) -> Letter:
    """The dead letter of a message of the usage stream."""
    return letter_of(message, reason=_reason(problems), problems=_as_members(problems), partition=partition)


def stored_at(message: Msg) -> datetime:
    """When the stream took a message: the same at every delivery."""
    return _EPOCH + timedelta(microseconds=place_of(message).stored_at_ns // 1000)


def reporter_of(subject: str) -> str:
    """Who published a usage message: the last token of its subject, which the server lets nobody else use."""
    return subject.rpartition(".")[2]


def read_report(body: bytes, *, reporter: str, received_at: datetime) -> Message:
    """An event reported over HTTP as the message to publish. Raises InvalidEvent with every problem.

    A missing `time` is filled in, and marked as ours: the body hash leaves it out, so that a retry is a repeat.
    """
    try:
        event, found_hash = read_usage_event(body)
    except InvalidEvent as error:
        more = _further_problems(body, reporter=reporter, received_at=received_at)
        raise InvalidEvent((*error.problems, *more)) from error
    occurred_at = None if event.time is None else event.time.astimezone(UTC)
    problems = list(
        report_problems(source=event.source, reporter=reporter, occurred_at=occurred_at, received_at=received_at)
    )
    if SERVER_FILLED in (event.model_extra or {}):
        problems.append(Problem(SERVER_FILLED, "this attribute is set by ingest alone"))
    if occurred_at is None:
        body = _with_time(body, received_at)
        if len(body) > EVENT_BYTES_MAX:
            problems.append(Problem("", f"with its time filled in the event has more than {EVENT_BYTES_MAX} bytes"))
    if problems:
        raise InvalidEvent(tuple(problems))
    return Message(
        subject=usage_subject(partition=partition_of(event.subject), source=event.source),
        payload=body,
        message_id=message_id(event, found_hash),
    )


def message_id(event: UsageEvent, found_hash: bytes) -> str:
    """What a stream knows a repeat by, for as long as its window lasts."""
    return sha256(f"{event.source}\n{event.id}\n".encode() + found_hash).hexdigest()[:32]


def redriven(letter: DeadLetter, *, received_at: datetime) -> Message:
    """A dead letter of the usage stream as the message to publish anew, on the subject of its account's partition.

    Without a message id: the stream may still know the first one. Raises Unreadable if it would only die again.
    """
    if letter.stream != USAGE:
        raise Unreadable(f"a message of {letter.stream} is not usage")
    reporter = reporter_of(letter.subject)
    body = letter.payload
    try:
        event, _ = read_usage_event(body)
        occurred_at = None if event.time is None else event.time.astimezone(UTC)
    except InvalidEvent as error:
        raise Unreadable(_reason(error.problems), problems=_as_members(error.problems)) from error
    problems = report_problems(source=event.source, reporter=reporter, occurred_at=occurred_at, received_at=received_at)
    if problems:
        raise Unreadable(_reason(problems), problems=_as_members(problems))
    return Message(
        subject=usage_subject(partition=partition_of(event.subject), source=reporter),
        # Its time is when it came first, not when somebody looked after it.
        payload=_with_time(body, letter.received_at) if occurred_at is None else body,
        message_id=None,
    )


def logged_usage(
    *, partition: int, source: str, event_id: str, account: str, type: str, occurred_at: datetime, data: str
) -> Usage:
    """Use that is in the log already, to be charged now. The log keeps neither its body nor the hash."""
    return Usage(
        key=(partition, source, event_id),
        partition=partition,
        source=source,
        event_id=event_id,
        account=account,
        type=type,
        occurred_at=occurred_at.astimezone(UTC),
        body_hash=b"",
        used=ModelUsed.model_validate_json(data),
        data=data,
        context=None,
        body=b"",
    )


def read_account_opened(body: bytes) -> AccountOpened:
    """A fact of the ledger. Raises Unreadable."""
    try:
        return AccountOpened.model_validate_json(body)
    except ValidationError as error:
        problems = [
            {"field": ".".join(str(part) for part in found["loc"]), "message": found["msg"]}
            for found in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise Unreadable("not a fact account.opened of the ledger", problems=problems) from error


class _DataOnly(msgspec.Struct):
    data: msgspec.Raw


_DATA_ONLY: Final = msgspec.json.Decoder(_DataOnly)


def _usage(event: UsageEvent, *, partition: int, occurred_at: datetime, found_hash: bytes, body: bytes) -> Usage:
    return Usage(
        key=(partition, event.source, event.id),
        partition=partition,
        source=event.source,
        event_id=event.id,
        account=event.subject,
        type=event.type,
        occurred_at=occurred_at,
        body_hash=found_hash,
        used=event.data,
        data=bytes(_DATA_ONLY.decode(body).data).decode(),
        context=_context(event),
        body=body,
    )


def _context(event: UsageEvent) -> str | None:
    further = dict(event.model_extra or {})
    if event.dataschema is not None:
        further["dataschema"] = event.dataschema
    return msgspec.json.encode(further, order="sorted").decode() if further else None


def _with_time(body: bytes, time: datetime) -> bytes:
    """The event with its time filled in. Of two members with one name the last one counts."""
    text = time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return body.rstrip()[:-1] + f',"time":"{text}","{SERVER_FILLED}":"time"}}'.encode()


_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)


def _further_problems(body: bytes, *, reporter: str, received_at: datetime) -> Sequence[Problem]:
    """What is wrong with who reports an unreadable event and when, as far as that can be read."""
    try:
        raw = msgspec.json.decode(body) if len(body) <= EVENT_BYTES_MAX else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()
    if not isinstance(raw, dict) or not isinstance(raw.get("source"), str):
        return ()
    try:
        occurred_at = _TIME.validate_python(raw.get("time"))
    except ValidationError:
        occurred_at = None
    return report_problems(source=raw["source"], reporter=reporter, occurred_at=occurred_at, received_at=received_at)


def _reason(problems: Sequence[Problem]) -> str:
    text = "; ".join(
        f"{problem.field}: {problem.message}" if problem.field else problem.message for problem in problems
    )
    return text if len(text) <= _REASON_LENGTH_MAX else f"{text[: _REASON_LENGTH_MAX - 1]}…"


def _as_members(problems: Sequence[Problem]) -> list[Mapping[str, str]]:
    return [{"field": problem.field, "message": problem.message} for problem in problems]


# Charges out ----------------------------------------------------------------------------------------------------------


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


def priced(usage: Usage, rated: Rated, *, units: Mapping[str, Unit]) -> Priced:
    """A charge as JSON. Prices and exact costs are plain decimals, without exponents."""
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
    )
    items = [
        _Item(item.quantity, item.count, item.unit, f"{item.price:f}", item.per, f"{item.exact:f}")
        for item in rated.items
    ]
    return Priced(
        line=msgspec.Raw(_ENCODER.encode(line)),
        items=_ENCODER.encode(items).decode(),
        amounts=_ENCODER.encode(amounts).decode(),
    )


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


# The catalogue --------------------------------------------------------------------------------------------------------


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _RateRow(_Row):
    quantity: Quantity
    unit: UnitName
    price: Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,11})(\.[0-9]{1,18})?$")]
    per: Annotated[int, Field(ge=1, le=10**12)]


class _ModelRow(_Row):
    provider: ProviderName
    model: ModelName
    rates: Annotated[list[_RateRow], Field(min_length=1, max_length=64)]


class _VersionRow(_Row):
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    effective_at: Time
    models: list[_ModelRow]


_VERSIONS: Final[TypeAdapter[list[_VersionRow]]] = TypeAdapter(list[_VersionRow])


def read_price_book(section: Any, *, units: Mapping[str, Unit]) -> PriceBook:
    """The price book of the catalogue's section `price_versions`. Raises ValueError, which names the place."""
    versions = []
    for row in _VERSIONS.validate_python(section):
        rates = {(model.provider, model.model): tuple(_rate(each) for each in model.rates) for model in row.models}
        if len(rates) != len(row.models):
            raise ValueError(f"price version {row.id} lists a model twice")
        versions.append(PriceVersion(id=row.id, effective_at=row.effective_at.astimezone(UTC), rates=rates))
    return PriceBook(versions, units=units)


def _rate(row: _RateRow) -> Rate:
    return Rate(quantity=row.quantity, unit=row.unit, price=Decimal(row.price), per=row.per)
