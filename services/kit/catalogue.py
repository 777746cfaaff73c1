"""The catalogue file (TOML): units for everybody; every other section belongs to the service that reads it."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from contracts.money import SCALE_MAX, Unit, UnitName


class InvalidCatalogue(ValueError):
    """The catalogue file cannot be used; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """`units` by name, and the file's other sections as they stand in it."""

    units: Mapping[str, Unit]
    sections: Mapping[str, Any]

    def section(self, name: str) -> Any:
        """A section for its owner to validate; InvalidCatalogue if the file has none of that name."""
        if name not in self.sections:
            raise InvalidCatalogue(f"the catalogue has no section {name!r}; it has {sorted(self.sections)}")
        return self.sections[name]


class _UnitRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: UnitName
    kind: Literal["money", "cap"]
    scale: Annotated[int, Field(ge=0, le=SCALE_MAX, strict=True)]
    own_key_counts: bool = False
    mirrors: UnitName | None = None


_UNITS: TypeAdapter[Sequence[_UnitRow]] = TypeAdapter(Sequence[_UnitRow])


def load_catalogue(path: Path) -> Catalogue:
    """Read and check the catalogue. Raises InvalidCatalogue, or OSError if the file cannot be read."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = _UNITS.validate_python(raw.pop("units", []))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise InvalidCatalogue(f"{path.name}: {error}") from error
    units = {row.name: Unit(**row.model_dump()) for row in rows}
    if not units:
        raise InvalidCatalogue(f"{path.name} names no units")
    if len(units) != len(rows):
        raise InvalidCatalogue(f"{path.name} names a unit twice")
    for unit in units.values():
        if unit.mirrors is not None:
            _check_mirror(unit, units, file=path.name)
    return Catalogue(units=units, sections=raw)


def _check_mirror(unit: Unit, units: Mapping[str, Unit], *, file: str) -> None:
    money = units.get(unit.mirrors or "")
    if unit.kind != "cap" or money is None or money.kind != "money" or money.scale != unit.scale:
        raise InvalidCatalogue(
            f"{file}: unit {unit.name} cannot mirror {unit.mirrors}: a cap mirrors a money unit of the same scale"
        )
