"""What is stored of a charge, as text: it is hashed, compared and read again."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

import msgspec

from services.ledger.domain.commands import Scope
from services.ledger.domain.entries import Move

canonical_json: Final = msgspec.json.Encoder(order="sorted").encode


@lru_cache(maxsize=4096)
def scope_text(scope: Scope | None) -> str:
    """A scope as canonical JSON."""
    return canonical_json(scope).decode()


def amounts_text(amounts: Sequence[tuple[str, int]]) -> str:
    """Amounts as canonical JSON: [[unit, amount], …]."""
    return canonical_json(amounts).decode()


def split_text(moves: Iterable[Move]) -> str:
    """From which lots a line was paid: [[account, unit, lot, lot kind, posted, held], …]."""
    return canonical_json(
        [
            (move.account, move.unit, move.lot, move.lot_kind, move.posted, move.held)
            for move in moves
            if move.kind == "charged" and move.lot is not None
        ]
    ).decode()
