"""Amounts: decimals with their unit. A float is refused: it is never what was meant."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

Number = Decimal | int | str


@dataclass(frozen=True, slots=True)
class Amount:
    """So much of a unit: `Amount(Decimal("0.25"), "usd")`."""

    amount: Decimal
    unit: str

    def __str__(self) -> str:
        return f"{decimal_text(self.amount)} {self.unit}"


def decimal_text(number: Number) -> str:
    """The number as the ledger reads it: no exponent, no needless zeros. TypeError for a float."""
    if isinstance(number, float | bool) or not isinstance(number, Decimal | int | str):
        raise TypeError(f"an amount is a Decimal, an int or text, not {number!r}")
    exact = Decimal(number)
    if not exact.is_finite():
        raise ValueError(f"{number!r} is not an amount")
    text = f"{exact:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else text


def read_amount(value: Any) -> Amount | None:
    """An amount as the ledger writes it, or None if there is none."""
    return None if value is None else Amount(Decimal(value["amount"]), value["unit"])
