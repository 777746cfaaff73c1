"""The price book as the catalogue, the tables and HTTP have it."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from contracts.envelope import (
    Problem,
)
from contracts.money import Unit, UnitName
from contracts.pricing import PriceVersion, Quantity, Rate
from contracts.times import Time
from contracts.usage import ModelName, ProviderName
from services.metering.domain.prices import Difference, PriceBook

# Of a price version.
MODELS_MAX: Final = 5_000
_ENCODER: Final = msgspec.json.Encoder()


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
