"""Which format of an export is meant: the one that is named, or what `Accept` likes best (RFC 9110, section 12.5.1)."""

import re
from decimal import Decimal
from typing import Final

from services.kit.problems import Problem
from services.ledger.queries.exports import FORMATS, Format

_WEIGHT: Final = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


def export_format(named: str | None, accept: str) -> Format:
    """The one that the query names, or else the one that Accept likes best, or else CSV. Problem 400: there is none."""
    if named is None:
        return _liked_best(accept)
    if named not in FORMATS:
        raise Problem(400, "unknown_format", f"{named!r} is no format of an export: it is {' or '.join(FORMATS)}")
    return FORMATS[named]


def _liked_best(accept: str) -> Format:
    """By weight; of equal weight what is named before, and by its own name rather than by a range; else CSV."""
    liked: dict[str, tuple[int, int, int]] = {}
    for place, part in enumerate(accept.split(",")):
        media_range, *parameters = (each.strip().lower() for each in part.split(";"))
        weights = [each[2:] for each in parameters if each.startswith("q=")]
        if all(_WEIGHT.fullmatch(weight) for weight in weights):
            thousandths = int(Decimal(weights[0]) * 1000) if weights else 1000
            # The most specific range that covers a type says how much it is liked.
            specific = 0 if media_range == "*/*" else 1 if media_range.endswith("/*") else 2
            if media_range not in liked:
                liked[media_range] = (specific, thousandths, -place)
    best, chosen = (0, 0, 0), FORMATS["csv"]
    for each in FORMATS.values():
        ranges = (each.media_type, f"{each.media_type.partition('/')[0]}/*", "*/*")
        specific, thousandths, place = next((liked[name] for name in ranges if name in liked), (0, 0, 0))
        if thousandths and (thousandths, specific, place) > best:
            best, chosen = (thousandths, specific, place), each
    return chosen
