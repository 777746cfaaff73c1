"""Where foreign words stop: deliveries and HTTP bodies become usage or letters, charges become the ledger's lines."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from typing import Annotated, Any, Final, Literal

import msgspec
from nats.aio.msg import Msg
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from contracts.envelope import (
    EVENT_BYTES_MAX,
    SERVER_FILLED,
    TRACEPARENT,
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
from services.metering.domain.prices import Difference, PriceBook
from services.metering.domain.usage import Usage, place_problems, report_problems

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_REASON_LENGTH_MAX: Final = 500
# Of a price version.
MODELS_MAX: Final = 5_000


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
            *_report_problems(event, reporter=reporter, occurred_at=occurred_at, received_at=received_at),
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
    problems = list(_report_problems(event, reporter=reporter, occurred_at=occurred_at, received_at=received_at))
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
    problems = _report_problems(event, reporter=reporter, occurred_at=occurred_at, received_at=received_at)
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


def traceparent_of(usage: Usage) -> str | None:
    """Of which trace its report was a step."""
    if usage.context is None or TRACEPARENT not in usage.context:
        return None
    found = msgspec.json.decode(usage.context).get(TRACEPARENT)
    return found if isinstance(found, str) else None


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


def _report_problems(
    event: UsageEvent, *, reporter: str, occurred_at: datetime | None, received_at: datetime
) -> Sequence[Problem]:
    return report_problems(
        source=event.source,
        reporter=reporter,
        occurred_at=occurred_at,
        received_at=received_at,
        price_version=event.data.price_version,
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
    data = raw.get("data")
    pinned = data.get("price_version") if isinstance(data, dict) else None
    return report_problems(
        source=raw["source"],
        reporter=reporter,
        occurred_at=occurred_at,
        received_at=received_at,
        price_version=pinned if isinstance(pinned, str) else None,
    )


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


# The price book -------------------------------------------------------------------------------------------------------


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RateRow(_Row):
    """`price` of `unit` for every `per` of a quantity. The price is a decimal string, `per` a power of ten."""

    quantity: Quantity
    unit: UnitName
    price: Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,11})(\.[0-9]{1,18})?$", examples=["0.15"])]
    per: Annotated[int, Field(ge=1, le=10**12, examples=[1_000_000])]


class ModelRow(_Row):
    """What a model costs."""

    provider: ProviderName
    model: ModelName
    rates: Annotated[list[RateRow], Field(min_length=1, max_length=64)]


class VersionRow(_Row):
    """A state of the price book: all models that have a price from `effective_at` on."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", examples=["2026-11-01"])]
    effective_at: Time
    models: Annotated[list[ModelRow], Field(max_length=MODELS_MAX)]


class UnitRow(_Row):
    """A unit. `scale` is the number of decimals of its step; `mirrors`: a cap that counts what is paid in that unit."""

    name: UnitName
    kind: Literal["money", "cap"]
    scale: int
    own_key_counts: bool
    mirrors: UnitName | None


class PriceBookRow(_Row):
    """Units, and price versions in the order in which they take effect."""

    units: list[UnitRow]
    versions: list[VersionRow]


class RatesDifference(_Row):
    """A rate that is another one now: null where there was or will be none."""

    quantity: Quantity
    unit: UnitName
    old: RateRow | None
    new: RateRow | None


class ModelDifference(_Row):
    """A model whose rates change."""

    provider: ProviderName
    model: ModelName
    rates: list[RatesDifference]


class VersionDifference(_Row):
    """What a version changes against `compared_with`, the version it takes over from (null: there is none).

    `stored`: whether it is stored now. `unchanged`: it had been stored before, with the same contents.
    """

    id: str
    effective_at: Time
    stored: bool
    unchanged: bool
    compared_with: str | None
    added: list[ModelRow]
    removed: list[ModelRow]
    changed: list[ModelDifference]


class InvalidVersion(ValueError):
    """A price version that cannot be read; carries every problem found. Their fields are places, `models/0/rates/1`."""

    def __init__(self, id: str, problems: Sequence[Problem]) -> None:
        super().__init__(
            f"price version {id} cannot be used: " + "; ".join(f"{each.field}: {each.message}" for each in problems)
        )
        self.problems = problems


_VERSIONS: Final[TypeAdapter[list[VersionRow]]] = TypeAdapter(list[VersionRow])
_MODELS: Final[TypeAdapter[list[ModelRow]]] = TypeAdapter(list[ModelRow])


def read_catalogue_versions(section: Any, *, units: Mapping[str, Unit]) -> list[PriceVersion]:
    """The price versions of the catalogue's section `price_versions`. Raises ValueError, which names the place."""
    return [read_version(row, units=units) for row in _VERSIONS.validate_python(section)]


def read_price_book(section: Any, *, units: Mapping[str, Unit]) -> PriceBook:
    """A price book of the catalogue's versions alone. Raises ValueError, which names the place."""
    return PriceBook(read_catalogue_versions(section, units=units), units=units)


def read_version(row: VersionRow, *, units: Mapping[str, Unit]) -> PriceVersion:
    """A price version. Raises InvalidVersion with every problem."""
    problems: list[Problem] = []
    rates: dict[tuple[str, str], tuple[Rate, ...]] = {}
    for place, model in enumerate(row.models):
        name = f"{model.provider}/{model.model}"
        if (model.provider, model.model) in rates:
            problems.append(Problem(f"models/{place}", f"{name} is listed twice"))
        read: dict[tuple[Quantity, str], Rate] = {}
        for number, each in enumerate(model.rates):
            where = f"models/{place}/rates/{number}"
            if each.unit not in units:
                problems.append(Problem(where, f"{name} is priced in {each.unit}, which is no unit"))
            if (each.quantity, each.unit) in read:
                problems.append(Problem(where, f"{name} has two rates for {each.quantity} in {each.unit}"))
            try:
                read[each.quantity, each.unit] = _rate(each)
            except ValueError as error:
                problems.append(Problem(where, str(error)))
        rates[model.provider, model.model] = tuple(read.values())
    if problems:
        raise InvalidVersion(row.id, problems)
    return PriceVersion(id=row.id, effective_at=row.effective_at.astimezone(UTC), rates=rates)


def stored_version(*, id: str, effective_at: datetime, models: str, units: Mapping[str, Unit]) -> PriceVersion:
    """A version as the table has it. Raises ValueError: it prices in a unit that the catalogue has no longer."""
    rows = _MODELS.validate_json(models)
    return read_version(VersionRow(id=id, effective_at=effective_at.astimezone(UTC), models=rows), units=units)


def models_as_json(version: PriceVersion) -> str:
    """The models of a version as the table keeps them, in order of providers and models."""
    return _ENCODER.encode(_models(version.rates)).decode()


def price_book_as_json(book: PriceBook, versions: Iterable[PriceVersion]) -> bytes:
    """PriceBookRow, with some of the book's versions."""
    units = [
        {
            "name": unit.name,
            "kind": unit.kind,
            "scale": unit.scale,
            "own_key_counts": unit.own_key_counts,
            "mirrors": unit.mirrors,
        }
        for unit in book.units.values()
    ]
    shown = [
        {"id": version.id, "effective_at": version.effective_at, "models": _models(version.rates)}
        for version in versions
    ]
    return _ENCODER.encode({"units": units, "versions": shown})


def difference_row(
    version: PriceVersion, found: Difference, *, compared_with: PriceVersion | None, stored: bool, unchanged: bool
) -> VersionDifference:
    """A difference as HTTP has it."""
    return VersionDifference(
        id=version.id,
        effective_at=version.effective_at,
        stored=stored,
        unchanged=unchanged,
        compared_with=None if compared_with is None else compared_with.id,
        added=[ModelRow.model_validate(row) for row in _models(found.added)],
        removed=[ModelRow.model_validate(row) for row in _models(found.removed)],
        changed=[
            ModelDifference(
                provider=provider,
                model=model,
                rates=[
                    RatesDifference(
                        quantity=each.quantity,
                        unit=each.unit,
                        old=None if each.old is None else RateRow(**_rate_row(each.old)),
                        new=None if each.new is None else RateRow(**_rate_row(each.new)),
                    )
                    for each in rates
                ],
            )
            for (provider, model), rates in found.changed.items()
        ],
    )


def _models(rates: Mapping[tuple[str, str], Sequence[Rate]]) -> list[dict[str, Any]]:
    return [
        {"provider": provider, "model": model, "rates": [_rate_row(each) for each in rates[provider, model]]}
        for provider, model in sorted(rates)
    ]


def _rate_row(of: Rate) -> dict[str, Any]:
    return {"quantity": of.quantity, "unit": of.unit, "price": f"{of.price:f}", "per": of.per}


def _rate(row: RateRow) -> Rate:
    return Rate(quantity=row.quantity, unit=row.unit, price=Decimal(row.price), per=row.per)
