"""Holds, open and ended: what was set aside, on which wallets, and what of it still is.

At its deadline a hold ends as it says itself, whether that is recorded yet or not.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec
from psycopg.rows import TupleRow
from pydantic import BaseModel

from contracts.ids import partition_of_id
from contracts.money import Unit, format_amount
from contracts.partition import partition_of
from services.ledger.domain.commands import Units
from services.ledger.domain.entries import HeldLeg
from services.ledger.domain.state import Hold
from services.ledger.queries.charges import UseView, use_view
from services.ledger.queries.present import PRESENT_TIME, present
from services.ledger.queries.selection import UUID_LENGTH, Connection, bounds_below, is_open
from services.ledger.translate import full_id

_decode_legs: Final = msgspec.json.Decoder(tuple[HeldLeg, ...]).decode


class HoldLegView(BaseModel):
    """What a hold set aside of one unit: between how much and how much was asked, and how much it was."""

    unit: str
    at_least: str
    at_most: str
    amount: str


class HeldView(BaseModel):
    """What a hold set aside on one wallet, what of that it still holds, what of it stands charged as an estimate."""

    account: str
    unit: str
    placed: str
    held: str
    estimated: str


class HoldView(BaseModel):
    """A hold. One that ended before it was placed has neither legs nor a deadline. By itself it ends then."""

    hold: str
    account: str
    status: str
    overdue: str
    scope: UseView | None
    recorded_at: datetime
    expires_at: datetime | None
    ended_at: datetime | None
    legs: list[HoldLegView]
    wallets: list[HeldView]


async def read_open_holds(
    connection: Connection, account: str, *, after: str | None, limit: int, units: Units, now: datetime
) -> list[HoldView] | None:
    """Holds of an account and of all below it that are open at `now`, oldest first, or None if it is not open."""
    partition = partition_of(account)
    cursor = await connection.execute(
        f"""
        SELECT {_HOLD_COLUMNS} FROM holds
        WHERE partition = %(partition)s AND status = 'placed' AND hold_id > %(after)s::uuid
          AND expires_at > (SELECT {PRESENT_TIME} FROM heads h WHERE h.partition = %(partition)s)
          AND (account = %(account)s COLLATE "C"
               OR (account > %(below)s COLLATE "C" AND account < %(beside)s COLLATE "C"))
        ORDER BY hold_id LIMIT %(limit)s
        """,
        {
            "partition": partition,
            "account": account,
            **bounds_below(account),
            "after": _NO_UUID if after is None else after[-UUID_LENGTH:],
            "limit": limit,
            "now": now,
        },
    )
    rows = await cursor.fetchall()
    if not rows:
        return [] if await is_open(connection, account) else None
    return await _hold_views(connection, partition, rows, units.by_name)


async def read_hold(connection: Connection, hold: str, *, units: Units, now: datetime) -> HoldView | None:
    """A hold, open or ended at `now`, or None if it is not known."""
    partition = partition_of_id(hold)
    cursor = await connection.execute(
        f"SELECT {_HOLD_COLUMNS} FROM holds WHERE partition = %s AND hold_id = %s::uuid",
        [partition, hold[-UUID_LENGTH:]],
    )
    views = await _hold_views(connection, partition, await cursor.fetchall(), units.by_name)
    if not views:
        return None
    (view,) = views
    if view.status == "placed":
        state, _ = await present(
            connection, partition, [view.account], units=units, now=now, holds=[hold[-UUID_LENGTH:]]
        )
        if (ended := state.holds.get(hold[-UUID_LENGTH:])) is not None:
            _end(view, ended, units.by_name)
    return view


def _end(view: HoldView, ended: Hold, units: Mapping[str, Unit]) -> None:
    """Tell of a hold that is past its deadline what will be recorded."""
    view.status, view.ended_at = ended.status, ended.expires_at
    for each in view.wallets:
        of_wallet = [
            earmark
            for earmark in ended.earmarks.values()
            if (earmark.account, earmark.unit) == (each.account, each.unit)
        ]
        each.held = format_amount(sum(earmark.held for earmark in of_wallet), units[each.unit])
        each.estimated = format_amount(sum(earmark.estimated for earmark in of_wallet), units[each.unit])


_ENDED_BY_ITSELF: Final = frozenset({"expired", "estimated"})
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
_HOLD_COLUMNS: Final = "hold_id::text, account, status, overdue, scope, recorded_at, expires_at, ended_at, legs"


async def _hold_views(
    connection: Connection, partition: int, rows: Sequence[TupleRow], units: Mapping[str, Unit]
) -> list[HoldView]:
    cursor = await connection.execute(
        """
        SELECT hold_id::text, account, unit, sum(placed)::bigint, sum(held)::bigint, sum(estimated)::bigint
        FROM hold_lots
        WHERE partition = %s AND hold_id = ANY (%s::uuid[]) GROUP BY 1, 2, 3 ORDER BY 1, 3, 2
        """,
        [partition, [row[0] for row in rows]],
    )
    wallets: dict[str, list[HeldView]] = {}
    for hold, account, unit, *amounts in await cursor.fetchall():
        placed, held, estimated = (format_amount(amount, units[unit]) for amount in amounts)
        view = HeldView(account=account, unit=unit, placed=placed, held=held, estimated=estimated)
        wallets.setdefault(hold, []).append(view)
    return [
        HoldView(
            hold=full_id("hold", partition, hold),
            account=account,
            status=status,
            overdue=overdue,
            scope=None if scope is None else use_view(scope),
            recorded_at=recorded_at,
            expires_at=expires_at,
            # It is effective at its deadline, and recorded later.
            ended_at=expires_at if status in _ENDED_BY_ITSELF else ended_at,
            legs=[_leg_view(leg, units[leg.unit]) for leg in _decode_legs(legs)],
            wallets=wallets.get(hold, []),
        )
        for hold, account, status, overdue, scope, recorded_at, expires_at, ended_at, legs in rows
    ]


def _leg_view(leg: HeldLeg, unit: Unit) -> HoldLegView:
    return HoldLegView(
        unit=leg.unit,
        at_least=format_amount(leg.at_least, unit),
        at_most=format_amount(leg.at_most, unit),
        amount=format_amount(leg.amount, unit),
    )
