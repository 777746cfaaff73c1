"""Laws of the catalogue file."""

from pathlib import Path

import pytest

from contracts.money import Unit
from services.kit.catalogue import InvalidCatalogue, load_catalogue

UNITS = """
[[units]]
name = "usd"
kind = "money"
scale = 9

[[units]]
name = "calls"
kind = "cap"
scale = 0
own_key_counts = true
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "catalogue.toml"
    path.write_text(text)
    return path


def test_units_are_checked_and_other_sections_handed_on(tmp_path: Path) -> None:
    catalogue = load_catalogue(written(tmp_path, UNITS + '[[prices]]\nid = "p1"\n'))
    assert catalogue.units == {
        "usd": Unit(name="usd", kind="money", scale=9),
        "calls": Unit(name="calls", kind="cap", scale=0, own_key_counts=True),
    }
    assert catalogue.section("prices") == [{"id": "p1"}]
    with pytest.raises(InvalidCatalogue, match="no section 'plans'"):
        catalogue.section("plans")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no units"),
        ("[[units", "catalogue.toml"),
        (UNITS.replace("calls", "usd"), "twice"),
        (UNITS.replace('"money"', '"coins"'), "money"),
        (UNITS.replace("9", "9.5"), "scale"),
        (UNITS.replace("9", "10"), "scale"),
        (UNITS + "colour = 1\n", "colour"),
    ],
)
def test_a_catalogue_with_a_mistake_is_refused_with_its_reason(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidCatalogue, match=reason):
        load_catalogue(written(tmp_path, text))


def test_the_catalogue_we_ship_is_valid() -> None:
    shipped = Path(__file__).resolve().parents[3] / "infra" / "catalogue" / "catalogue.toml"
    assert load_catalogue(shipped).units["usd"] == Unit(name="usd", kind="money", scale=9)
