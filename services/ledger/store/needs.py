"""What a batch has to know, and what was found of it."""

from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Final

from services.ledger.domain.draft import Head
from services.ledger.store.executing import Row

# Open holds of a partition that are read at once because they are, or will be, overdue.
OVERDUE_READ_MAX: Final = 500


@dataclass(slots=True)
class Needs:
    """What a batch has to know, as sets of keys that begin with the partition.

    `accounts`: whole, with wallets, rules, and all lots that are not spent or that a late charge may ask for.
    `holds`, with the account that names them: if it is theirs and they have ended, with the lots they had earmarked.
    `payments`, with the account that names them, and whether a claim is made: if one is, or has been, with the claims
    and every lot of the account's tree that refers to them, and the accounts of those.
    `lines`: what was charged under these keys before. `past_lines`, with the account they are to be given back to: the
    lines with what has been given back of them, and the lots they took from. `lots`, with their account: whether spent
    or not; `repaying` likewise. `past_lots`: those of an account that were valid at a time; only for one longer ago
    than LATE_GRACE, others come with the account. `overdue`, with two times: the open holds that end from one to the
    other, at most OVERDUE_READ_MAX of a partition and those that end at the same time.

    What came to the lots of `past_lines`, `payments`, `repaying` and of holds that were estimated may be given back or
    taken: they come with the lots that repaid them, and with the payments that any of these refer to, as above; and
    so on, until there are no more.
    """

    heads: set[int] = field(default_factory=set)
    accounts: set[tuple[int, str]] = field(default_factory=set)
    holds: set[tuple[int, str, str]] = field(default_factory=set)
    payments: set[tuple[int, str, str, bool]] = field(default_factory=set)
    commands: set[tuple[int, str, str]] = field(default_factory=set)
    lines: set[tuple[int, str, str, int]] = field(default_factory=set)
    past_lines: set[tuple[int, str, str, int, str]] = field(default_factory=set)
    lots: set[tuple[int, str, str]] = field(default_factory=set)
    repaying: set[tuple[int, str, str]] = field(default_factory=set)
    past_lots: set[tuple[int, str, datetime]] = field(default_factory=set)
    bundles: set[tuple[int, int]] = field(default_factory=set)
    overdue: set[tuple[int, datetime, datetime]] = field(default_factory=set)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _NEEDED)


_NEEDED: Final = tuple(each.name for each in fields(Needs))


@dataclass(slots=True)
class Loaded:
    """What was found: heads, rows for `projections.add_rows`, and what had been accepted and charged before.

    `reached`: the accounts with lots that refer to payments on which there are, or will be, claims. `unread_from`: by
    partition whose overdue holds were read, from when on open holds end that were not.
    """

    heads: dict[int, Head] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    reached: set[tuple[int, str]] = field(default_factory=set)
    commands: dict[tuple[int, str, str], tuple[bytes, str]] = field(default_factory=dict)
    lines: dict[tuple[int, str, str, int], tuple[object, ...]] = field(default_factory=dict)
    bundles: dict[tuple[int, int], bytes] = field(default_factory=dict)
    unread_from: dict[int, datetime] = field(default_factory=dict)

    def add(self, more: "Loaded") -> None:
        """Rows that were found later."""
        for name, rows in more.rows.items():
            self.rows.setdefault(name, []).extend(rows)
        self.reached |= more.reached
