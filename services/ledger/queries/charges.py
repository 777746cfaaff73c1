"""What a use was charged, from which lots, and what of that was given back."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec
from psycopg.rows import TupleRow
from pydantic import BaseModel

from contracts.money import Unit, format_amount
from contracts.partition import PARTITION_COUNT, partition_of
from services.ledger.domain.commands import Scope, Units
from services.ledger.queries.selection import Connection
from services.ledger.translate import full_id

# What is told of one transaction, or of one use, at most.
ENTRIES_SHOWN_MAX: Final = 10_000
LINES_SHOWN_MAX: Final = 1_000

_decode_amounts: Final = msgspec.json.Decoder(list[tuple[str, int]]).decode
_decode_taken: Final = msgspec.json.Decoder(list[tuple[str, str, str, str, int, int]]).decode
_decode_returned: Final = msgspec.json.Decoder(list[tuple[str, str, str, int]]).decode
_decode_scope: Final = msgspec.json.Decoder(Scope | None).decode


class UseView(BaseModel):
    """What is used."""

    provider: str
    model: str
    feature: str | None


class AmountView(BaseModel):
    """An amount and its unit."""

    unit: str
    amount: str


class PartView(BaseModel):
    """What was moved of one lot."""

    account: str
    unit: str
    lot: str
    lot_kind: str | None
    amount: str


class ReversalView(BaseModel):
    """What of a charge line was given back, by the lots it had taken from, and why.

    `correction` of metering wanted it, in the bundle of that number; null: it was asked for by a command.
    """

    source: str
    event_id: str
    revision: int
    transaction: str
    recorded_at: datetime
    reason: str | None
    correction: str | None
    bundle: int | None
    split: list[PartView]


class LineView(BaseModel):
    """What one use was charged: as it was rated, from which lots it was paid, what was given back since.

    `scope` is as it was said, null if nothing was: then its hold's counts, if it has one.
    """

    source: str
    event_id: str
    revision: int
    account: str
    occurred_at: datetime
    recorded_at: datetime
    hold: str | None
    scope: UseView | None
    price_version: str
    own_key: bool
    amounts: list[AmountView]
    split: list[PartView]
    bundle: int | None
    line: int
    transaction: str
    reversals: list[ReversalView]


class ChargeView(BaseModel):
    """Every revision of what a use was charged."""

    lines: list[LineView]


async def read_charge(
    connection: Connection, source: str, event_id: str, *, account: str | None, units: Units
) -> ChargeView | None:
    """Every revision of what a use was charged, or None. Its partition is its account's; without one, all are asked."""
    partitions = list(range(PARTITION_COUNT)) if account is None else [partition_of(account)]
    cursor = await connection.execute(
        f"""
        SELECT {LINE_COLUMNS} FROM charge_lines
        WHERE partition = ANY (%(partitions)s) AND source = %(source)s AND event_id = %(event_id)s
          AND (%(account)s::text IS NULL OR account = %(account)s)
        ORDER BY partition, revision LIMIT {LINES_SHOWN_MAX}
        """,
        {"partitions": partitions, "source": source, "event_id": event_id, "account": account},
    )
    rows = await cursor.fetchall()
    given_back = await reversals_of(connection, rows, units.by_name)
    return ChargeView(lines=[line_view(row, given_back, units.by_name) for row in rows]) if rows else None


LineKey = tuple[int, str, str, int]


LINE_COLUMNS: Final = """partition, source, event_id, revision, account, occurred_at, hold_id::text, scope,
price_version, own_key, amounts, split, bundle_number, line_number, transaction_id::text, recorded_at"""


# Whose correction it was is journalled with the first entry that gives back, which is among the first of all.
REVERSAL_COLUMNS: Final = """r.partition, r.source, r.event_id, r.revision, r.transaction_id::text, r.recorded_at,
r.reason, r.split, j.details::json ->> 'correction', (j.details::json ->> 'bundle')::bigint"""
REVERSAL_ENTRY: Final = """
LEFT JOIN LATERAL (
    SELECT e.details FROM journal e
    WHERE e.partition = r.partition AND e.batch = r.batch AND e.position >= r.position
      AND e.transaction_id = r.transaction_id AND e.kind = 'reversed' AND e.details IS NOT NULL
    ORDER BY e.position LIMIT 1
) j ON true
"""


async def reversals_of(
    connection: Connection, lines: Sequence[TupleRow], units: Mapping[str, Unit]
) -> dict[LineKey, list[ReversalView]]:
    """What was given back of lines, rows of `LINE_COLUMNS`."""
    if not lines:
        return {}
    cursor = await connection.execute(
        f"""
        SELECT {REVERSAL_COLUMNS}
        FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::integer[]) AS k (partition, source, event_id, revision)
        JOIN reversals r USING (partition, source, event_id, revision) {REVERSAL_ENTRY}
        ORDER BY r.batch, r.position LIMIT %s
        """,
        [*(list(column) for column in zip(*(row[:4] for row in lines), strict=True)), ENTRIES_SHOWN_MAX],
    )
    found: dict[LineKey, list[ReversalView]] = {}
    for row in await cursor.fetchall():
        found.setdefault((row[0], row[1], row[2], row[3]), []).append(reversal_view(row, units))
    return found


def line_view(row: TupleRow, given_back: Mapping[LineKey, list[ReversalView]], units: Mapping[str, Unit]) -> LineView:
    """A row of `LINE_COLUMNS`, as it is told."""
    partition, source, event_id, revision, account, occurred_at, hold, scope, price_version, own_key, *more = row
    amounts, split, bundle, line, transaction, recorded_at = more
    return LineView(
        source=source,
        event_id=event_id,
        revision=revision,
        account=account,
        occurred_at=occurred_at,
        recorded_at=recorded_at,
        hold=None if hold is None else full_id("hold", partition, hold),
        scope=use_view(scope),
        price_version=price_version,
        own_key=own_key,
        amounts=[
            AmountView(unit=unit, amount=format_amount(amount, units[unit]))
            for unit, amount in _decode_amounts(amounts)
        ],
        split=[
            PartView(
                account=payer,
                unit=unit,
                lot=full_id("lot", partition, lot),
                lot_kind=kind,
                amount=format_amount(-posted, units[unit]),
            )
            for payer, unit, lot, kind, posted, _held in _decode_taken(split)
        ],
        bundle=bundle,
        line=line,
        transaction=full_id("txn", partition, transaction),
        reversals=given_back.get((partition, source, event_id, revision), []),
    )


def use_view(scope: str) -> UseView | None:
    """What is used, of its text in a row; None if that says nothing."""
    used = _decode_scope(scope)
    return None if used is None else UseView(provider=used.provider, model=used.model, feature=used.feature)


def reversal_view(row: TupleRow, units: Mapping[str, Unit]) -> ReversalView:
    """A row of `REVERSAL_COLUMNS`, as it is told."""
    partition, source, event_id, revision, transaction, recorded_at, reason, split, correction, bundle = row
    return ReversalView(
        source=source,
        event_id=event_id,
        revision=revision,
        transaction=full_id("txn", partition, transaction),
        recorded_at=recorded_at,
        reason=reason,
        correction=correction,
        bundle=bundle,
        split=[
            PartView(
                account=payer,
                unit=unit,
                lot=full_id("lot", partition, lot),
                lot_kind=None,
                amount=format_amount(posted, units[unit]),
            )
            for payer, unit, lot, posted in _decode_returned(split)
        ],
    )
