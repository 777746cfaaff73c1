"""Read what a batch needs, and what that leads on to."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from psycopg import AsyncRawCursor
from psycopg.rows import TupleRow

from contracts.accounts import root
from services.kit.arrays import array, columns
from services.ledger import tables
from services.ledger.domain.entries import payment_of
from services.ledger.domain.state import NEVER
from services.ledger.store.executing import Connection, Row, execute
from services.ledger.store.heads import HEADS, heads_of
from services.ledger.store.lookups import KEYS, KNOWN, LOAD, LOADED_AS, LOADED_BY
from services.ledger.store.needs import OVERDUE_READ_MAX, Loaded, Needs
from services.ledger.tables import place

# Each time one more is asked for, something was found: more than this is no ledger any more.
ROUNDS_MAX: Final = 1_000


class TooEntangled(Exception):
    """What a batch concerns leads on to ever more lots."""


async def load(connection: Connection, needs: Needs) -> Loaded:
    """Read what a batch needs: in one round trip, and in one more for each step that claims or repayments lead on.

    Most keys are new: one statement says which of them are not, and only those are read, in one more round trip.
    """
    if not needs:
        return Loaded()
    found: dict[str, list[TupleRow]] = {}
    closure, more = _Closure(), needs
    known: Needs | None = Needs()
    for _ in range(ROUNDS_MAX):
        fetched = await _fetch(connection, more, known)
        for name, rows_of_name in fetched.items():
            found.setdefault(name, []).extend(rows_of_name)
        more = closure.beyond(more, fetched)
        if known is not None:
            more.commands, more.holds, more.lines, known = known.commands, known.holds, known.lines, None
        if not more:
            break
    else:
        raise TooEntangled(f"lots lead to others {ROUNDS_MAX} times over")
    rows: dict[str, list[Row]] = {}
    for name, table in LOADED_AS.items():
        rows.setdefault(table, []).extend(found.get(name, ()))
    return Loaded(
        heads=heads_of(found.get("heads", ())),
        rows=rows,
        reached={(row[0], row[1]) for row in found.get("paid_accounts", ())},
        commands={(row[0], row[1], row[2]): (row[3], row[4]) for row in found.get("commands", ())},
        lines={(row[0], row[1], row[2], row[3]): tuple(row[4:]) for row in found.get("lines", ())},
        bundles={(row[0], row[1]): row[2] for row in found.get("bundles", ())},
        unread_from=_unread_from(found.get("overdue", ()), found.get("next_deadline", ())),
    )


def _unread_from(overdue: Sequence[TupleRow], following: Iterable[TupleRow]) -> dict[int, datetime]:
    """By partition: when the first of the open holds that were not read ends, or after which of those that were."""
    found = {}
    for partition, next_deadline in following:
        deadlines = [row[_DEADLINE] for row in overdue if row[0] == partition]
        is_more = len(deadlines) >= OVERDUE_READ_MAX
        found[partition] = max(deadlines) + timedelta(microseconds=1) if is_more else next_deadline or NEVER
    return found


async def _fetch(connection: Connection, needs: Needs, known: Needs | None) -> dict[str, list[TupleRow]]:
    """The rows that each statement of `LOAD` finds. `known`, if given, is told which `KEYS` there are."""
    cursors: dict[str, AsyncRawCursor[TupleRow]] = {}
    asked = {} if known is None else {name: list(keys) for name in KEYS if (keys := getattr(needs, name))}
    async with connection.pipeline():
        if asked:
            arrays = [each for name, width in KEYS.items() for each in _key_columns(asked.get(name, ()), width)]
            cursors["known"] = await execute(connection, KNOWN, arrays)
        if needs.heads:
            cursors["heads"] = await execute(connection, HEADS, [array(list(needs.heads))])
        for wanted, names in LOADED_BY.items():
            if wanted not in asked and (keys := getattr(needs, wanted)):
                arrays = columns(keys)
                for name in names:
                    cursors[name] = await execute(connection, LOAD[name], arrays)
    found = {name: await cursor.fetchall() for name, cursor in cursors.items()}
    for name, number in found.pop("known", ()):
        getattr(known, name).add(asked[name][number - 1])
    return found


def _key_columns(keys: Sequence[Sequence[Any]], width: int) -> list[str]:
    return columns(keys) if keys else ["{}"] * width


class _Closure:
    """What was followed so far: lots to those that repaid them, and to the payments that they refer to."""

    def __init__(self) -> None:
        self._lots: set[tuple[int, str]] = set()
        self._payments: set[tuple[int, str, str]] = set()

    def beyond(self, needs: Needs, found: Mapping[str, list[TupleRow]]) -> Needs:
        """What `found`, which is what was needed, leads on to."""
        self._payments.update((partition, payment, root(account)) for partition, payment, account, _ in needs.payments)
        more = Needs()
        lots = [lot for name in _FOLLOWED for lot in found.get(name, ())]
        if estimated := {(row[0], row[1]) for row in found.get("holds", ()) if row[_STATUS] == "estimated"}:
            earmarked = {(row[0], row[_EARMARKED_LOT]) for row in found.get("hold_lots", ()) if row[:2] in estimated}
            lots += [row for row in found.get("earmarked", ()) if row[:2] in earmarked]
        for lot in lots:
            partition, account, reference, repaid = lot[0], lot[_ACCOUNT], lot[_REFERENCE], lot[_REPAID]
            self._lots.add((partition, str(lot[1])))
            # Of whatever kind: a debt in a purchase's stead, too.
            if reference is not None and (payment := payment_of("purchase", reference)) is not None:
                key = (partition, payment, root(account))
                if key not in self._payments:
                    self._payments.add(key)
                    more.payments.add((partition, payment, account, False))
            if repaid is not None:
                more.repaying.update((partition, name, account) for name in msgspec.json.decode(repaid))
        more.repaying = {each for each in more.repaying if each[:2] not in self._lots}
        return more


# Which rows are lots that are followed, and where in a row something stands.
_FOLLOWED: Final = ("line_lots", "paid_lots", "repaying")
_ACCOUNT: Final = place(tables.lots, "account")
_REFERENCE: Final = place(tables.lots, "reference")
_REPAID: Final = place(tables.lots, "repaid")
_STATUS: Final = place(tables.holds, "status")
_DEADLINE: Final = place(tables.holds, "expires_at")
_EARMARKED_LOT: Final = place(tables.hold_lots, "lot_id")
