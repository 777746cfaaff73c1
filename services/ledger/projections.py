"""The projections: their rows from the state and back, and what is read from them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec
from psycopg import AsyncConnection, AsyncCursor
from psycopg.rows import TupleRow
from pydantic import BaseModel

from contracts.ids import partition_of_id
from contracts.money import Unit, format_amount
from contracts.partition import partition_of, token
from services.ledger.domain.entries import HeldLeg
from services.ledger.domain.state import (
    Account,
    Changes,
    Claim,
    Earmark,
    Hold,
    Lot,
    PartitionState,
    Payment,
    Wallet,
)

Connection = AsyncConnection[TupleRow]
Row = tuple[Any, ...]

_encode: Final = msgspec.json.Encoder(order="sorted").encode
_decode_legs: Final = msgspec.json.Decoder(tuple[HeldLeg, ...]).decode


def changed_rows(partition: int, changes: Changes) -> dict[str, list[Row]]:
    """The rows of what was touched, by table."""
    return {
        "accounts": [account_row(partition, account) for account in changes.accounts.values()],
        "wallets": [wallet_row(partition, wallet) for wallet in changes.wallets.values()],
        "lots": [lot_row(partition, lot) for lot in changes.lots.values()],
        "holds": [hold_row(partition, hold) for hold in changes.holds.values()],
        "hold_lots": [hold_lot_row(partition, key[0], earmark) for key, earmark in changes.earmarks.items()],
        "payments": [payment_row(partition, payment) for payment in changes.payments.values()],
        "claims": [claim_row(partition, key[0], key[1], claim) for key, claim in changes.claims.items()],
    }


def account_row(partition: int, account: Account) -> Row:
    """A row of `accounts`."""
    return (
        partition,
        account.id,
        account.opened_at,
        account.recorded_at,
        account.batch,
        account.position,
        account.transaction,
    )


def wallet_row(partition: int, wallet: Wallet) -> Row:
    """A row of `wallets`."""
    return (
        partition,
        wallet.account,
        wallet.unit,
        wallet.policy,
        wallet.overdraft,
        wallet.recorded_at,
        wallet.batch,
        wallet.position,
        wallet.posted,
        wallet.held,
        wallet.frozen,
        wallet.overage,
    )


def lot_row(partition: int, lot: Lot) -> Row:
    """A row of `lots`."""
    return (
        partition,
        lot.id,
        lot.account,
        lot.unit,
        lot.kind,
        lot.priority,
        lot.effective_at,
        lot.expires_at,
        lot.scope,
        lot.reference,
        lot.cost_basis,
        lot.origin,
        lot.granted,
        lot.occurred_at,
        lot.recorded_at,
        lot.batch,
        lot.position,
        lot.posted,
        lot.held,
        lot.frozen,
        lot.is_spent,
        lot.clawed,
        lot.clawed_spent,
        lot.pending,
    )


def hold_row(partition: int, hold: Hold) -> Row:
    """A row of `holds`."""
    return (
        partition,
        hold.id,
        hold.account,
        hold.status,
        hold.expires_at,
        hold.overdue,
        _encode(hold.legs).decode(),
        hold.recorded_at,
        hold.transaction,
        hold.batch,
        hold.position,
        hold.ended_at,
    )


def hold_lot_row(partition: int, hold_id: str, earmark: Earmark) -> Row:
    """A row of `hold_lots`."""
    return (partition, hold_id, earmark.account, earmark.unit, earmark.lot, earmark.placed, earmark.held)


def payment_row(partition: int, payment: Payment) -> Row:
    """A row of `payments`."""
    return (
        partition,
        payment.id,
        payment.account,
        payment.unit,
        payment.paid,
        payment.claimed,
        payment.recorded_at,
        payment.batch,
        payment.position,
    )


def claim_row(partition: int, payment: str, account: str, claim: Claim) -> Row:
    """A row of `claims`."""
    return (
        partition,
        payment,
        account,
        claim.id,
        claim.reason,
        claim.state,
        claim.claimed,
        claim.revision,
        claim.occurred_at,
        claim.recorded_at,
        claim.transaction,
        claim.batch,
        claim.position,
    )


def add_rows(states: dict[int, PartitionState], rows: Mapping[str, Iterable[Row]]) -> None:
    """Put rows, by table, into the states of their partitions."""
    _add_accounts(states, rows.get("accounts", ()))
    _add_wallets(states, rows.get("wallets", ()))
    _add_lots(states, rows.get("lots", ()))
    _add_holds(states, rows.get("holds", ()))
    _add_hold_lots(states, rows.get("hold_lots", ()))
    _add_payments(states, rows.get("payments", ()))
    _add_claims(states, rows.get("claims", ()))


def _add_accounts(states: dict[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, account, opened_at, recorded_at, batch, position, transaction in rows:
        states[partition].accounts[account] = Account(
            id=account,
            opened_at=opened_at,
            recorded_at=recorded_at,
            batch=batch,
            position=position,
            transaction=str(transaction),
        )


def _add_wallets(states: dict[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, account, unit, policy, overdraft, recorded_at, batch, position, *amounts in rows:
        posted, held, frozen, overage = amounts
        states[partition].accounts[account].wallets[unit] = Wallet(
            account=account,
            unit=unit,
            policy=policy,
            overdraft=overdraft,
            recorded_at=recorded_at,
            batch=batch,
            position=position,
            posted=posted,
            held=held,
            frozen=frozen,
            overage=overage,
        )


def _add_lots(states: dict[int, PartitionState], rows: Iterable[Row]) -> None:
    for row in rows:
        partition, lot, account, unit, kind, priority, effective_at, expires_at, *more = row
        scope, reference, cost_basis, origin, granted, occurred_at, recorded_at, batch, position, *amounts = more
        posted, held, frozen, _spent, clawed, clawed_spent, pending = amounts
        states[partition].accounts[account].wallets[unit].add(
            Lot(
                id=str(lot),
                account=account,
                unit=unit,
                kind=kind,
                priority=priority,
                effective_at=effective_at,
                expires_at=expires_at,
                scope=scope,
                reference=reference,
                cost_basis=cost_basis,
                origin=origin,
                granted=granted,
                occurred_at=occurred_at,
                recorded_at=recorded_at,
                batch=batch,
                position=position,
                posted=posted,
                held=held,
                frozen=frozen,
                clawed=clawed,
                clawed_spent=clawed_spent,
                pending=pending,
            )
        )


def _add_holds(states: dict[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, hold, account, status, expires_at, overdue, legs, recorded_at, transaction, *more in rows:
        batch, position, ended_at = more
        states[partition].holds[str(hold)] = Hold(
            id=str(hold),
            account=account,
            status=status,
            expires_at=expires_at,
            overdue=overdue,
            legs=_decode_legs(legs),
            recorded_at=recorded_at,
            transaction=str(transaction),
            batch=batch,
            position=position,
            ended_at=ended_at,
        )


def _add_hold_lots(states: dict[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, hold, account, unit, lot, placed, held in rows:
        states[partition].holds[str(hold)].earmarks[account, unit, str(lot)] = Earmark(
            account=account, unit=unit, lot=str(lot), placed=placed, held=held
        )


def _add_payments(states: dict[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, payment, account, unit, paid, _claimed, recorded_at, batch, position in rows:
        states[partition].payments[payment, account] = Payment(
            id=payment,
            account=account,
            unit=unit,
            paid=paid,
            recorded_at=recorded_at,
            batch=batch,
            position=position,
        )


def _add_claims(states: dict[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, payment, account, claim, reason, state, claimed, revision, *more in rows:
        occurred_at, recorded_at, transaction, batch, position = more
        states[partition].payments[payment, account].claims[claim] = Claim(
            id=claim,
            reason=reason,
            state=state,
            claimed=claimed,
            revision=revision,
            occurred_at=occurred_at,
            recorded_at=recorded_at,
            transaction=str(transaction),
            batch=batch,
            position=position,
        )


# Reading --------------------------------------------------------------------------------------------------------------


class LotView(BaseModel):
    """A lot of which something is left, or a debt or overage."""

    lot: str
    kind: str
    priority: int
    granted: str
    posted: str
    held: str
    frozen: str
    available: str
    expires_at: datetime | None
    reference: str | None
    occurred_at: datetime
    recorded_at: datetime


class WalletView(BaseModel):
    """What an account has of a unit. `available` is posted less held and frozen; `overage` is not part of posted."""

    unit: str
    kind: str
    policy: str
    posted: str
    held: str
    frozen: str
    available: str
    debt: str
    overage: str
    lots: list[LotView]


class BalanceView(BaseModel):
    """An account's own wallets, as of the recorded time of its partition's last batch."""

    account: str
    opened_at: datetime
    as_of: datetime
    wallets: list[WalletView]


class AccountView(BaseModel):
    """An open account and the units it has wallets of."""

    account: str
    opened_at: datetime
    units: list[str]


class StatementEntry(BaseModel):
    """One entry of a wallet. `balance` is the wallet's posted after it."""

    batch: int
    position: int
    transaction: str
    kind: str
    unit: str
    lot: str | None
    lot_kind: str | None
    hold: str | None
    posted: str
    held: str
    frozen: str
    balance: str
    occurred_at: datetime
    recorded_at: datetime


class HoldLegView(BaseModel):
    """What a hold set aside of one unit: between how much and how much was asked, and how much it was."""

    unit: str
    at_least: str
    at_most: str
    amount: str


class HeldView(BaseModel):
    """What a hold set aside on one wallet, and what of that it still holds."""

    account: str
    unit: str
    placed: str
    held: str


class HoldView(BaseModel):
    """A hold. One that ended before it was placed has neither legs nor a deadline."""

    hold: str
    account: str
    status: str
    recorded_at: datetime
    expires_at: datetime | None
    ended_at: datetime | None
    legs: list[HoldLegView]
    wallets: list[HeldView]


class Totals(BaseModel):
    """Sums over all accounts whose id begins with a prefix: three ways to the same money, and how many uses.

    granted = posted + charged + clawed_back, unless something was reversed; of a cap, posted less overage counts.
    `charge_lines` counts those of the accounts' own use.
    """

    unit: str
    account_prefix: str
    charged: str
    clawed_back: str
    granted: str
    posted: str
    overage: str
    charge_lines: int
    charge_lines_by_source: dict[str, int]


@dataclass(frozen=True, slots=True)
class StatementPlace:
    """Where a page of a statement ended: the place of its last entry, and each wallet's posted before it."""

    batch: int
    position: int
    posted: Mapping[str, int]


async def read_balance(connection: Connection, account: str, units: Mapping[str, Unit]) -> BalanceView | None:
    """The balance of an account, or None if it is not open. In the caller's snapshot."""
    partition = partition_of(account)
    keys = {"partition": partition, "account": account}
    async with connection.pipeline():
        opened = await connection.execute(_OPENED, keys)
        wallets = await connection.execute(_WALLETS, keys)
        lots = await connection.execute(_LOTS, keys)
    found = await opened.fetchone()
    if found is None:
        return None
    views = {row[0]: _wallet_view(row, units) for row in await wallets.fetchall()}
    debts = dict.fromkeys(views, 0)
    for row in await lots.fetchall():
        views[row[0]].lots.append(_lot_view(row, partition, units))
        if row[2] == "debt":
            debts[row[0]] -= row[5]
    for unit, debt in debts.items():
        views[unit].debt = format_amount(debt, units[unit])
    return BalanceView(account=account, opened_at=found[0], as_of=found[1], wallets=list(views.values()))


async def read_accounts(connection: Connection, *, prefix: str, after: str, limit: int) -> list[AccountView]:
    """Open accounts in the order of their ids."""
    cursor = await connection.execute(
        """
        SELECT a.account, a.opened_at,
               ARRAY (SELECT w.unit FROM wallets w WHERE w.partition = a.partition AND w.account = a.account ORDER BY 1)
        FROM accounts a
        WHERE starts_with(a.account, %(prefix)s) AND a.account > %(after)s COLLATE "C"
        ORDER BY a.account COLLATE "C" LIMIT %(limit)s
        """,
        {"prefix": prefix, "after": after, "limit": limit},
    )
    return [
        AccountView(account=account, opened_at=opened_at, units=units)
        for account, opened_at, units in await cursor.fetchall()
    ]


async def read_statement(
    connection: Connection,
    account: str,
    *,
    unit: str | None,
    before: StatementPlace | None,
    limit: int,
    units: Mapping[str, Unit],
) -> tuple[list[StatementEntry], StatementPlace | None]:
    """A page of an account's entries, newest first, and where it ended if there are more. In the caller's snapshot."""
    partition = partition_of(account)
    posted = dict(before.posted) if before is not None else {}
    if before is None:
        cursor = await connection.execute(
            "SELECT unit, posted FROM wallets WHERE partition = %s AND account = %s", [partition, account]
        )
        posted = {str(name): int(value) for name, value in await cursor.fetchall()}
    cursor = await connection.execute(
        """
        SELECT batch, position, transaction_id::text, kind, unit, lot_id::text, lot_kind, hold_id::text,
               posted, held, frozen, occurred_at, recorded_at
        FROM journal
        WHERE partition = %(partition)s AND account = %(account)s AND left(account, 1) <> '@' AND unit IS NOT NULL
          AND (batch, position) < (%(batch)s, %(position)s) AND (%(unit)s::text IS NULL OR unit = %(unit)s)
        ORDER BY batch DESC, position DESC LIMIT %(limit)s
        """,
        {
            "partition": partition,
            "account": account,
            "batch": before.batch if before is not None else _BIGINT_MAX,
            "position": before.position if before is not None else 0,
            "unit": unit,
            "limit": limit + 1,
        },
    )
    rows = await cursor.fetchall()
    entries = []
    for row in rows[:limit]:
        name, steps = str(row[4]), units[row[4]]
        entries.append(
            StatementEntry(
                batch=row[0],
                position=row[1],
                transaction=f"txn_{token(partition)}_{row[2]}",
                kind=row[3],
                unit=name,
                lot=None if row[5] is None else f"lot_{token(partition)}_{row[5]}",
                lot_kind=row[6],
                hold=None if row[7] is None else f"hold_{token(partition)}_{row[7]}",
                posted=format_amount(row[8], steps),
                held=format_amount(row[9], steps),
                frozen=format_amount(row[10], steps),
                balance=format_amount(posted.get(name, 0), steps),
                occurred_at=row[11],
                recorded_at=row[12],
            )
        )
        if row[6] != "overage":
            posted[name] = posted.get(name, 0) - row[8]
    more = len(rows) > limit
    return entries, StatementPlace(rows[limit - 1][0], rows[limit - 1][1], posted) if more else None


async def read_open_holds(
    connection: Connection, account: str, *, after: str | None, limit: int, units: Mapping[str, Unit]
) -> list[HoldView]:
    """Open holds of an account and of all below it, oldest first. In the caller's snapshot."""
    partition = partition_of(account)
    cursor = await connection.execute(
        f"""
        SELECT {_HOLD_COLUMNS} FROM holds
        WHERE partition = %(partition)s AND status = 'placed' AND hold_id > %(after)s::uuid
          AND (account = %(account)s OR starts_with(account, %(below)s))
        ORDER BY hold_id LIMIT %(limit)s
        """,
        {
            "partition": partition,
            "account": account,
            "below": f"{account}/",
            "after": _NO_UUID if after is None else after[-len(_NO_UUID) :],
            "limit": limit,
        },
    )
    return await _hold_views(connection, partition, await cursor.fetchall(), units)


async def read_hold(connection: Connection, hold: str, *, units: Mapping[str, Unit]) -> HoldView | None:
    """A hold, open or ended, or None if it is not known. In the caller's snapshot."""
    partition = partition_of_id(hold)
    cursor = await connection.execute(
        f"SELECT {_HOLD_COLUMNS} FROM holds WHERE partition = %s AND hold_id = %s::uuid",
        [partition, hold[-len(_NO_UUID) :]],
    )
    views = await _hold_views(connection, partition, await cursor.fetchall(), units)
    return views[0] if views else None


async def _hold_views(
    connection: Connection, partition: int, rows: Sequence[TupleRow], units: Mapping[str, Unit]
) -> list[HoldView]:
    cursor = await connection.execute(
        """
        SELECT hold_id::text, account, unit, sum(placed)::bigint, sum(held)::bigint FROM hold_lots
        WHERE partition = %s AND hold_id = ANY (%s::uuid[]) GROUP BY 1, 2, 3 ORDER BY 1, 3, 2
        """,
        [partition, [row[0] for row in rows]],
    )
    wallets: dict[str, list[HeldView]] = {}
    for hold, account, unit, placed, held in await cursor.fetchall():
        amounts = {"placed": format_amount(placed, units[unit]), "held": format_amount(held, units[unit])}
        wallets.setdefault(hold, []).append(HeldView(account=account, unit=unit, **amounts))
    return [
        HoldView(
            hold=f"hold_{token(partition)}_{hold}",
            account=account,
            status=status,
            recorded_at=recorded_at,
            expires_at=expires_at,
            ended_at=ended_at,
            legs=[_leg_view(leg, units[leg.unit]) for leg in _decode_legs(legs)],
            wallets=wallets.get(hold, []),
        )
        for hold, account, status, recorded_at, expires_at, ended_at, legs in rows
    ]


def _leg_view(leg: HeldLeg, unit: Unit) -> HoldLegView:
    return HoldLegView(
        unit=leg.unit,
        at_least=format_amount(leg.at_least, unit),
        at_most=format_amount(leg.at_most, unit),
        amount=format_amount(leg.amount, unit),
    )


async def read_totals(connection: Connection, unit: Unit, *, account_prefix: str) -> Totals:
    """What was charged by the journal, granted by the lots, and is left in the wallets. In the caller's snapshot."""
    keys = {"unit": unit.name, "prefix": account_prefix}
    async with connection.pipeline():
        charged = await connection.execute(
            """
            SELECT coalesce(-sum(posted), 0) FROM journal
            WHERE kind = 'charged' AND unit = %(unit)s AND left(account, 1) <> '@' AND starts_with(account, %(prefix)s)
            """,
            keys,
        )
        clawed = await connection.execute(
            "SELECT coalesce(sum(clawed), 0) FROM lots WHERE unit = %(unit)s AND starts_with(account, %(prefix)s)",
            keys,
        )
        granted = await connection.execute(
            "SELECT coalesce(sum(granted), 0) FROM lots WHERE unit = %(unit)s AND starts_with(account, %(prefix)s)",
            keys,
        )
        left = await connection.execute(
            """
            SELECT coalesce(sum(posted), 0), coalesce(sum(overage), 0) FROM wallets
            WHERE unit = %(unit)s AND starts_with(account, %(prefix)s)
            """,
            keys,
        )
        lines = await connection.execute(
            """
            SELECT source, count(*) FROM charge_lines WHERE starts_with(account, %(prefix)s) GROUP BY source
            ORDER BY source
            """,
            keys,
        )
    posted, overage = await left.fetchone() or (0, 0)
    by_source = {str(source): int(count) for source, count in await lines.fetchall()}
    return Totals(
        unit=unit.name,
        account_prefix=account_prefix,
        charged=format_amount(await _number(charged), unit),
        clawed_back=format_amount(await _number(clawed), unit),
        granted=format_amount(await _number(granted), unit),
        posted=format_amount(int(posted), unit),
        overage=format_amount(int(overage), unit),
        charge_lines=sum(by_source.values()),
        charge_lines_by_source=by_source,
    )


_BIGINT_MAX: Final = 2**63 - 1
_NO_UUID: Final = str(UUID(int=0))

_HOLD_COLUMNS: Final = "hold_id::text, account, status, recorded_at, expires_at, ended_at, legs"

_OPENED: Final = """
SELECT a.opened_at, h.recorded_at FROM accounts a JOIN heads h USING (partition)
WHERE a.partition = %(partition)s AND a.account = %(account)s
"""

_WALLETS: Final = """
SELECT unit, policy, posted, held, frozen, overage FROM wallets
WHERE partition = %(partition)s AND account = %(account)s ORDER BY unit
"""

_LOTS: Final = """
SELECT unit, lot_id::text, kind, priority, granted, posted, held, frozen, expires_at, reference,
       occurred_at, recorded_at
FROM lots WHERE partition = %(partition)s AND account = %(account)s AND NOT spent
ORDER BY unit, priority, expires_at NULLS LAST, batch, position
"""


def _wallet_view(row: TupleRow, units: Mapping[str, Unit]) -> WalletView:
    unit, policy, posted, held, frozen, overage = row
    steps = units[unit]
    return WalletView(
        unit=unit,
        kind=steps.kind,
        policy=policy,
        posted=format_amount(posted, steps),
        held=format_amount(held, steps),
        frozen=format_amount(frozen, steps),
        available=format_amount(posted - held - frozen, steps),
        debt="0",
        overage=format_amount(overage, steps),
        lots=[],
    )


def _lot_view(row: TupleRow, partition: int, units: Mapping[str, Unit]) -> LotView:
    unit, lot, kind, priority, granted, posted, held, frozen, expires_at, reference, occurred_at, recorded_at = row
    steps = units[unit]
    return LotView(
        lot=f"lot_{token(partition)}_{lot}",
        kind=kind,
        priority=priority,
        granted=format_amount(granted, steps),
        posted=format_amount(posted, steps),
        held=format_amount(held, steps),
        frozen=format_amount(frozen, steps),
        available=format_amount(posted - held - frozen, steps),
        expires_at=expires_at,
        reference=reference,
        occurred_at=occurred_at,
        recorded_at=recorded_at,
    )


async def _number(cursor: AsyncCursor[TupleRow]) -> int:
    row = await cursor.fetchone()
    return 0 if row is None else int(row[0])
