"""What the log keeps of what a use costs, and of its data, as it is read."""

from decimal import Decimal
from typing import Final

import msgspec


class Amount(msgspec.Struct, gc=False):
    """An amount in decimals of its unit."""

    amount: str
    unit: str


_AMOUNTS: Final = msgspec.json.Decoder(list[Amount])
_EXACT: Final = msgspec.json.Decoder(float_hook=Decimal)


def read_amounts(text: str | None) -> list[Amount]:
    """What a use costs; nothing of one that is not charged."""
    return [] if text is None else _AMOUNTS.decode(text)


def is_same_data(one: str | bytes, other: str | bytes) -> bool:
    """Whether two texts of JSON say the same, numbers as they were written: `1.5` and `1.50` do."""
    return bool(_EXACT.decode(one) == _EXACT.decode(other))
