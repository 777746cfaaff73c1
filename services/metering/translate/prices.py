"""The price book as the catalogue, the tables and HTTP have it."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import msgspec
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from contracts.money import Unit, UnitName
from contracts.pricebook import (
    FurtherRow,
    InvalidVersion,
    ModelRow,
    PriceBookRow,
    RateRow,
    VersionRow,
    further_as_row,
    models_as_rows,
    rate_as_row,
    read_version,
    unit_as_row,
    version_as_row,
)
from contracts.pricing import PriceVersion, Quantity
from contracts.times import Time
from contracts.usage import ModelName, ProviderName, ServiceTier
from services.metering.domain.prices import Difference, PriceBook

__all__ = [
    "InvalidVersion",
    "PriceBookRow",
    "VersionDifference",
    "VersionRow",
    "difference_row",
    "further_as_json",
    "models_as_json",
    "price_book_as_json",
    "read_catalogue_versions",
    "read_price_book",
    "read_version",
    "stored_version",
]

_ENCODER: Final = msgspec.json.Encoder()


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RatesDifference(_Row):
    """A rate that is another one now: null where there was or will be none."""

    quantity: Quantity
    unit: UnitName
    service_tier: Annotated[ServiceTier | None, Field(exclude_if=lambda value: value is None)] = None
    old: RateRow | None
    new: RateRow | None


class ModelDifference(_Row):
    """A model whose rates change."""

    provider: ProviderName
    model: ModelName
    rates: list[RatesDifference]


class VersionDifference(_Row):
    """What a version changes against `compared_with`, the version it takes over from (null: there is none).

    `stored`: whether it is stored now. `unchanged`: it had been stored before, with the same contents. `others`: what
    changes beside the rates of models, as places: `prices/renders`, `markup`, `plans/pro`, `accounts/acme`.
    """

    id: str
    effective_at: Time
    stored: bool
    unchanged: bool
    compared_with: str | None
    added: list[ModelRow]
    removed: list[ModelRow]
    changed: list[ModelDifference]
    others: list[str] = []


_VERSIONS: Final[TypeAdapter[list[VersionRow]]] = TypeAdapter(list[VersionRow])
_MODELS: Final[TypeAdapter[list[ModelRow]]] = TypeAdapter(list[ModelRow])


def read_catalogue_versions(section: Any, *, units: Mapping[str, Unit]) -> list[PriceVersion]:
    """The price versions of the catalogue's section `price_versions`. Raises ValueError, which names the place."""
    return [read_version(row, units=units) for row in _VERSIONS.validate_python(section)]


def read_price_book(section: Any, *, units: Mapping[str, Unit]) -> PriceBook:
    """A price book of the catalogue's versions alone. Raises ValueError, which names the place."""
    return PriceBook(read_catalogue_versions(section, units=units), units=units)


def stored_version(
    *, id: str, effective_at: datetime, models: str, further: str | None = None, units: Mapping[str, Unit]
) -> PriceVersion:
    """A version as the table has it. Raises ValueError: it prices in a unit that the catalogue has no longer."""
    rows = _MODELS.validate_json(models)
    more = {} if further is None else dict(FurtherRow.model_validate_json(further))
    return read_version(VersionRow(id=id, effective_at=effective_at.astimezone(UTC), models=rows, **more), units=units)


def models_as_json(version: PriceVersion) -> str:
    """The models of a version as the table keeps them, in order of providers and models."""
    return _ENCODER.encode(models_as_rows(version.rates)).decode()


def further_as_json(version: PriceVersion) -> str | None:
    """What a version says beyond its models, as the table keeps it; None if that is nothing."""
    row = further_as_row(version)
    return _ENCODER.encode(row).decode() if row else None


def price_book_as_json(book: PriceBook, versions: Iterable[PriceVersion]) -> bytes:
    """PriceBookRow, with some of the book's versions."""
    units = [unit_as_row(unit) for unit in book.units.values()]
    return _ENCODER.encode({"units": units, "versions": [version_as_row(version) for version in versions]})


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
        added=[ModelRow.model_validate(row) for row in models_as_rows(found.added)],
        removed=[ModelRow.model_validate(row) for row in models_as_rows(found.removed)],
        changed=[
            ModelDifference(
                provider=provider,
                model=model,
                rates=[
                    RatesDifference(
                        quantity=each.quantity,
                        unit=each.unit,
                        service_tier=each.service_tier,
                        old=None if each.old is None else RateRow(**rate_as_row(each.old)),
                        new=None if each.new is None else RateRow(**rate_as_row(each.new)),
                    )
                    for each in rates
                ],
            )
            for (provider, model), rates in found.changed.items()
        ],
        others=list(found.others),
    )
