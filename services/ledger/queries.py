"""What is read: balances now and then, statements, transactions, charges, holds, totals, trees. From one snapshot.

A balance is exact at the time of reading: what is due is done in memory, by the rules by which it will be journalled.
No question reads more than a bound, whatever the size of the journal; what is longer comes in pages.
"""

import csv
import io
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, LiteralString

import msgspec
from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow
from pydantic import BaseModel
from sqlalchemy import TIMESTAMP, Boolean, Table, Text
from sqlalchemy.dialects.postgresql import UUID

from contracts.ids import partition_of_id
from contracts.money import Unit, format_amount
from contracts.partition import PARTITION_COUNT, partition_of
from services.ledger import tables
from services.ledger.domain.chain import GENESIS
from services.ledger.domain.commands import LATE_GRACE, LotScope, Scope, Units
from services.ledger.domain.concerned import AHEAD_MAX
from services.ledger.domain.draft import Draft, Head
from services.ledger.domain.due import decide_due
from services.ledger.domain.entries import ASIDE_KINDS, HeldLeg
from services.ledger.domain.state import Lot, PartitionState, RuleState, Wallet
from services.ledger.projections import add_rows, lot_of
from services.ledger.translate import full_id

Connection = AsyncConnection[TupleRow]

# How much one question may look at; beyond, there is another page, or a refusal.
LOTS_SHOWN_MAX: Final = 1_000
HOLDS_SHOWN_MAX: Final = 500
ENDS_SHOWN_MAX: Final = 100
ENTRIES_SHOWN_MAX: Final = 10_000
LINES_SHOWN_MAX: Final = 1_000
ENTRIES_SCANNED_MAX: Final = 20_000
LOTS_REFERRED_MAX: Final = 1_000
DUE_STEPS_MAX: Final = 20_000
EXPORT_ROWS: Final = 5_000

_TICK: Final = timedelta(microseconds=1)
_UUID_LENGTH: Final = 36
_decode_legs: Final = msgspec.json.Decoder(tuple[HeldLeg, ...]).decode
_decode_amounts: Final = msgspec.json.Decoder(list[tuple[str, int]]).decode
_decode_taken: Final = msgspec.json.Decoder(list[tuple[str, str, str, str, int, int]]).decode
_decode_returned: Final = msgspec.json.Decoder(list[tuple[str, str, str, int]]).decode
_decode_scope: Final = msgspec.json.Decoder(Scope).decode


class TooMuchDue(Exception):
    """More is due on an account than can be done while somebody waits. The sweeper is at it."""


# What is told ---------------------------------------------------------------------------------------------------------


class ScopeView(BaseModel):
    """Where a lot is valid: one of each that is named. Nothing named: everywhere."""

    providers: list[str]
    models: list[str]
    features: list[str]


class UseView(BaseModel):
    """What is used."""

    provider: str
    model: str
    feature: str | None


class LotView(BaseModel):
    """A lot of which something is left, or a debt, overage or uncapped use. `available` while it is valid only.

    `rule` and `period`: of the recurring grant it comes from, or whose period an overage is counted in.
    """

    lot: str
    kind: str
    priority: int
    granted: str
    posted: str
    held: str
    frozen: str
    available: str
    expired: str
    effective_at: datetime | None
    expires_at: datetime | None
    scope: ScopeView | None
    reference: str | None
    cost_basis: str | None
    origin: str | None
    rule: str | None
    period: int | None
    occurred_at: datetime
    recorded_at: datetime


class ExpiryView(BaseModel):
    """What expires unless it is used before."""

    lot: str
    at: datetime
    amount: str


class RenewalView(BaseModel):
    """The next grant of a rule: its amount, and what is added of the period before at most."""

    rule: str
    plan: str | None
    period: int
    at: datetime
    amount: str
    rollover_max: str


class HeldLotsView(BaseModel):
    """What an open hold had set aside on the wallet at the time."""

    hold: str
    held: str


class WalletView(BaseModel):
    """What an account has of a unit.

    `available` is what may be held or charged for one use or another: of lots that are valid, less `debt`. A hard
    wallet lets `overdraft` more be used. Aside from `posted`: `overage`, counted beyond what a cap had; `uncapped`,
    counted while the wallet was unlimited. Of the past, `policy`, `overdraft` and what is to come are not told, but the
    holds that were open.
    """

    unit: str
    kind: str
    policy: str | None
    overdraft: str | None
    posted: str
    held: str
    frozen: str
    available: str
    debt: str
    overage: str
    uncapped: str
    lots: list[LotView]
    expiries: list[ExpiryView]
    renewals: list[RenewalView]
    holds: list[HeldLotsView] | None = None


class BalanceView(BaseModel):
    """An account's own wallets: exact at `as_of`, or, if that was asked for, as recorded by then."""

    account: str
    opened_at: datetime
    as_of: datetime
    wallets: list[WalletView]


class PostedInView(BaseModel):
    """What was posted of a unit."""

    unit: str
    posted: str


class PostedView(BaseModel):
    """What an account's wallets had posted by what had occurred by `world_at`, as far as it is known by now."""

    account: str
    world_at: datetime
    wallets: list[PostedInView]


class AccountView(BaseModel):
    """An open account and the units it has wallets of."""

    account: str
    opened_at: datetime
    units: list[str]


class TreeWalletView(BaseModel):
    """A wallet of a tree, without its lots; otherwise as in a balance."""

    unit: str
    kind: str
    policy: str
    overdraft: str
    posted: str
    held: str
    frozen: str
    available: str
    debt: str
    overage: str
    uncapped: str


class TreeAccountView(BaseModel):
    """An account of a tree and its own wallets."""

    account: str
    opened_at: datetime
    wallets: list[TreeWalletView]


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


class EntryView(BaseModel):
    """One entry of the journal. An account that begins with `@` is a contra: the other side of what is posted.

    `details` is the JSON that is journalled, and covered by the hash; amounts in it are in the unit's steps.
    """

    batch: int
    position: int
    kind: str
    account: str
    unit: str | None
    lot: str | None
    lot_kind: str | None
    hold: str | None
    posted: str | None
    held: str | None
    frozen: str | None
    occurred_at: datetime
    details: str | None


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
    """What of a charge line was given back, by the lots it had taken from, and why."""

    source: str
    event_id: str
    revision: int
    transaction: str
    recorded_at: datetime
    reason: str | None
    split: list[PartView]


class LineView(BaseModel):
    """What one use was charged: as it was rated, from which lots it was paid, what was given back since."""

    source: str
    event_id: str
    revision: int
    account: str
    occurred_at: datetime
    recorded_at: datetime
    hold: str | None
    scope: UseView
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


class CommandView(BaseModel):
    """Who asked, and under which idempotency key."""

    principal: str
    idempotency_key: str


class TransactionView(BaseModel):
    """A transaction and its cause: commands, or a bundle of charge lines; neither: it was due.

    Of more than 10,000 entries the first are told, and how many there are.
    """

    transaction: str
    batch: int
    recorded_at: datetime
    commands: list[CommandView]
    bundle: int | None
    lines: list[LineView]
    reversals: list[ReversalView]
    entries: list[EntryView]
    entries_total: int


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
    """A hold. One that ended before it was placed has neither legs nor a deadline."""

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


class AccountTotals(BaseModel):
    """Sums over all that was ever posted on a wallet, each above zero as its name says.

    posted less overage and uncapped = granted - charged + reversed - expired - voided - clawed_back + adjusted +
    transferred. Estimates are charged until they are reversed. `granted_by_kind`: by the kind of lot; `by_kind`: all
    that was posted, by the kind of entry, as it was.
    """

    unit: str
    granted: str
    charged: str
    reversed: str
    expired: str
    voided: str
    clawed_back: str
    adjusted: str
    transferred: str
    posted: str
    overage: str
    uncapped: str
    granted_by_kind: dict[str, str]
    by_kind: dict[str, str]


class Totals(BaseModel):
    """Sums over all accounts whose id begins with a prefix: three ways to the same money, and how many uses.

    granted = posted + charged + clawed_back, unless something was reversed, expired, voided or adjusted; of a cap,
    posted less overage counts. `charge_lines` counts those of the accounts' own use.
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


# Balances -------------------------------------------------------------------------------------------------------------


async def read_balance(connection: Connection, account: str, *, units: Units, now: datetime) -> BalanceView | None:
    """The balance of an account at `now`, or None if it is not open."""
    state, draft = await _present(connection, partition_of(account), [account], units=units, now=now)
    found = state.accounts.get(account)
    if found is None:
        return None
    at = draft.recorded_at
    partition = draft.head.partition
    wallets = [_wallet_view(wallet, at, partition, units.by_name) for _, wallet in sorted(found.wallets.items())]
    return BalanceView(account=account, opened_at=found.opened_at, as_of=at, wallets=wallets)


async def read_tree(
    connection: Connection, root: str, *, after: str, limit: int, units: Units, now: datetime
) -> list[TreeAccountView]:
    """Accounts of a tree in the order of their ids, with their wallets at `now`."""
    partition = partition_of(root)
    cursor = await connection.execute(
        """
        SELECT account FROM accounts
        WHERE partition = %(partition)s AND account > %(after)s COLLATE "C"
          AND account >= %(root)s COLLATE "C" AND account < %(beside)s COLLATE "C"
          AND (account = %(root)s OR starts_with(account, %(below)s))
        ORDER BY account COLLATE "C" LIMIT %(limit)s
        """,
        {"partition": partition, "root": root, "after": after, "limit": limit, **_below(root)},
    )
    names = [str(row[0]) for row in await cursor.fetchall()]
    if not names:
        return []
    state, draft = await _present(connection, partition, names, units=units, now=now)
    at, named = draft.recorded_at, units.by_name
    return [
        TreeAccountView(
            account=name,
            opened_at=state.accounts[name].opened_at,
            wallets=[
                TreeWalletView.model_construct(**_amounts(wallet, at, named[wallet.unit]))
                for _, wallet in sorted(state.accounts[name].wallets.items())
            ],
        )
        for name in names
    ]


async def _present(
    connection: Connection, partition: int, accounts: Sequence[str], *, units: Units, now: datetime
) -> tuple[PartitionState, Draft]:
    """Accounts as they are at `now`, whatever is due done in a draft that is never written."""
    cursor = await connection.execute(_PRESENT, {"partition": partition, "accounts": list(accounts)})
    recorded_at, *found = await cursor.fetchone() or (now,)
    state = PartitionState()
    rows = zip(_DECODERS.items(), found, strict=True)
    add_rows({partition: state}, {table.name: decode(text) for (table, decode), text in rows})
    # Only its time matters to what is due: nothing of the draft is written.
    head = Head(
        partition=partition,
        epoch=0,
        batch=0,
        chain_hash=GENESIS,
        recorded_at=recorded_at,
        outbox_number=0,
        charges_number=0,
    )
    draft = Draft(head, state, now=now)
    transaction = draft.begin()
    for _ in range(DUE_STEPS_MAX):
        moves = decide_due(state, accounts, units=units, place=transaction.place)
        if not moves:
            return state, draft
        transaction.record(moves)
    raise TooMuchDue(f"more than {DUE_STEPS_MAX} things are due on {accounts[0]}")


_TYPES: Final[Mapping[type[Any], type[Any]]] = {TIMESTAMP: datetime, Boolean: bool, Text: str, UUID: str}
_READ: Final = (tables.accounts, tables.wallets, tables.rules, tables.lots)


def _row_type(table: Table) -> Any:
    kinds = (_TYPES.get(type(column.type), int) for column in table.columns)
    optional = (kind | None if column.nullable else kind for kind, column in zip(kinds, table.columns, strict=True))
    return list[tuple[tuple(optional)]]  # type: ignore[misc]  # known only when it runs


_DECODERS: Final = {table: msgspec.json.Decoder(_row_type(table)).decode for table in _READ}


def _as_json(table: Table, where: str) -> str:
    columns = ", ".join(f"t.{column.name}" for column in table.columns)
    return f"(SELECT coalesce(json_agg(json_build_array({columns})), '[]')::text FROM {where})"


# In one statement, so that it is of one moment without a transaction; as JSON, which is read in one go.
_OF_ACCOUNTS: Final = "t.partition = %(partition)s AND t.account = ANY (%(accounts)s)"
_PRESENT: Final = sql.SQL(
    "SELECT h.recorded_at, "
    + ", ".join(_as_json(table, f"{table.name} t WHERE {_OF_ACCOUNTS}") for table in _READ[:-1])
    + ", "
    + _as_json(
        tables.lots,
        f"""(
            SELECT t.* FROM lots t WHERE {_OF_ACCOUNTS} AND NOT t.spent
            UNION ALL
            SELECT t.* FROM lots t
            WHERE {_OF_ACCOUNTS} AND t.spent AND (t.rule_id IS NOT NULL OR t.expired > 0)
              AND t.expires_at > h.recorded_at - interval '{LATE_GRACE.total_seconds():.0f} seconds'
        ) t""",
    )
    + " FROM heads h WHERE h.partition = %(partition)s"
)


async def read_balance_as_of(
    connection: Connection, account: str, *, as_of: datetime, units: Units
) -> BalanceView | None:
    """What was recorded of an account by a time, or None if it was not open: sums over the journal up to then.

    They are counted from whichever end is nearer, the account's opening or the present. What was due and not yet
    recorded is not done.
    """
    past = await _past(connection, account, as_of)
    if past is None:
        return None
    lots, holds = await _past_lots(connection, past), await _past_holds(connection, past)
    cursor = await connection.execute(
        "SELECT unit FROM wallets WHERE partition = %(partition)s AND account = %(account)s AND batch <= %(batch)s",
        past.keys,
    )
    views = []
    for unit in sorted(str(row[0]) for row in await cursor.fetchall()):
        wallet = _past_wallet(past, unit, [lot for lot in lots if lot.unit == unit])
        view = _wallet_view(wallet, as_of, past.partition, units.by_name)
        view.policy = view.overdraft = None
        view.expiries = []
        view.holds = [
            HeldLotsView(hold=full_id("hold", past.partition, hold), held=format_amount(held, units.by_name[unit]))
            for (hold, of_unit), held in sorted(holds.items())[:HOLDS_SHOWN_MAX]
            if of_unit == unit
        ]
        views.append(view)
    return BalanceView(account=account, opened_at=past.opened_at, as_of=as_of, wallets=views)


async def read_posted_at(
    connection: Connection, account: str, *, world_at: datetime, units: Units, now: datetime
) -> PostedView | None:
    """What was posted by what had occurred by a time, or None if the account is not open."""
    partition = partition_of(account)
    state, draft = await _present(connection, partition, [account], units=units, now=now)
    found = state.accounts.get(account)
    if found is None:
        return None
    posted = {unit: wallet.posted for unit, wallet in sorted(found.wallets.items())}
    _, due = draft.finish()
    for entry in (recorded.entry for recorded in due):
        if entry.account == account and entry.unit is not None and entry.occurred_at > world_at:
            posted[entry.unit] -= entry.posted
    # Nothing is recorded that is said to occur later than this.
    cursor = await connection.execute(
        f"""
        SELECT unit, {_SUM_OF_POSTED} FROM journal
        WHERE {_OF_ACCOUNT} AND batch > batch_at(%(partition)s::smallint, %(since)s) AND occurred_at > %(world_at)s
        GROUP BY unit
        """,
        {"partition": partition, "account": account, "since": world_at - AHEAD_MAX, "world_at": world_at},
    )
    for unit, later in await cursor.fetchall():
        posted[unit] -= int(later)
    views = [
        PostedInView(unit=unit, posted=format_amount(amount, units.by_name[unit])) for unit, amount in posted.items()
    ]
    return PostedView(account=account, world_at=world_at, wallets=views)


def _below(account: str) -> dict[str, str]:
    """Between which two texts the accounts below one are, byte for byte: "0" is the character after "/"."""
    return {"below": f"{account}/", "beside": f"{account}0"}


@dataclass(frozen=True, slots=True)
class _Past:
    """An account, the last batch of the time in question, and from where its sums are counted."""

    partition: int
    account: str
    opened_at: datetime
    batch: int
    head: int
    backwards: bool

    @property
    def keys(self) -> dict[str, Any]:
        low, high = (self.batch, self.head) if self.backwards else (0, self.batch)
        return {
            "partition": self.partition,
            "account": self.account,
            "batch": self.batch,
            "low": low,
            "high": high,
            **_below(self.account),
        }


async def _past(connection: Connection, account: str, as_of: datetime) -> _Past | None:
    partition = partition_of(account)
    cursor = await connection.execute(
        """
        SELECT a.opened_at, a.batch, batch_at(%(partition)s::smallint, %(as_of)s), h.batch
        FROM accounts a JOIN heads h USING (partition) WHERE a.partition = %(partition)s AND a.account = %(account)s
        """,
        {"partition": partition, "account": account, "as_of": as_of},
    )
    row = await cursor.fetchone()
    if row is None or row[1] > row[2]:
        return None
    opened_at, opening, batch, head = row
    return _Past(partition, account, opened_at, batch, head, backwards=head - batch < batch - opening)


async def _past_lots(connection: Connection, past: _Past) -> list[Lot]:
    """The lots of which something was left, as they were."""
    cursor = await connection.execute(
        f"""
        SELECT lot_id::text, sum(posted)::bigint, sum(held)::bigint, sum(frozen)::bigint,
               -coalesce(sum(posted) FILTER (WHERE kind IN ('lot_expired', 'lot_revived')), 0)::bigint
        FROM journal
        WHERE {_OF_ACCOUNT} AND lot_id IS NOT NULL AND batch > %(low)s AND batch <= %(high)s GROUP BY lot_id
        """,
        past.keys,
    )
    sums = {str(row[0]): [int(amount) for amount in row[1:]] for row in await cursor.fetchall()}
    columns = sql.SQL(", ".join(f"t.{column.name}" for column in tables.lots.columns))
    cursor = await connection.execute(
        sql.SQL(
            """
            SELECT {columns} FROM lots t
            WHERE partition = %(partition)s AND account = %(account)s AND NOT spent AND %(backwards)s
              AND batch <= %(batch)s
            UNION
            SELECT {columns} FROM lots t
            WHERE partition = %(partition)s AND lot_id = ANY (%(lots)s::uuid[]) AND batch <= %(batch)s
            """
        ).format(columns=columns),
        {**past.keys, "lots": list(sums), "backwards": past.backwards},
    )
    lots = [lot_of(row) for row in await cursor.fetchall()]
    for lot in lots:
        amounts = sums.get(lot.id, [0, 0, 0, 0])
        if past.backwards:
            now = (lot.posted, lot.held, lot.frozen, lot.expired)
            amounts = [amount - later for amount, later in zip(now, amounts, strict=True)]
        lot.posted, lot.held, lot.frozen, lot.expired = amounts
    return lots


async def _past_holds(connection: Connection, past: _Past) -> dict[tuple[str, str], int]:
    """What was held on the account's wallets, by hold and unit."""
    cursor = await connection.execute(
        f"""
        SELECT hold_id::text, unit, sum(held)::bigint FROM journal
        WHERE {_OF_ACCOUNT} AND hold_id IS NOT NULL AND batch > %(low)s AND batch <= %(high)s
        GROUP BY hold_id, unit HAVING sum(held) <> 0
        """,
        past.keys,
    )
    sums = {(str(hold), str(unit)): int(held) for hold, unit, held in await cursor.fetchall()}
    if not past.backwards:
        return sums
    cursor = await connection.execute(
        """
        SELECT h.hold_id::text, e.unit, sum(e.held)::bigint FROM holds h JOIN hold_lots e USING (partition, hold_id)
        WHERE h.partition = %(partition)s AND h.status = 'placed' AND e.account = %(account)s AND e.held <> 0
          AND (h.account = %(account)s COLLATE "C"
               OR (h.account > %(below)s COLLATE "C" AND h.account < %(beside)s COLLATE "C"))
        GROUP BY 1, 2
        """,
        past.keys,
    )
    held = {(str(hold), str(unit)): int(amount) for hold, unit, amount in await cursor.fetchall()}
    then = {key: held.get(key, 0) - sums.get(key, 0) for key in held.keys() | sums.keys()}
    return {key: amount for key, amount in then.items() if amount}


def _past_wallet(past: _Past, unit: str, lots: Sequence[Lot]) -> Wallet:
    """A wallet of these lots. What it was told to be is not known, nor needed."""
    wallet = Wallet(
        account=past.account,
        unit=unit,
        policy="hard",
        overdraft=0,
        recorded_at=past.opened_at,
        batch=past.batch,
        position=0,
    )
    for lot in lots:
        wallet.add(lot)
        if lot.kind == "overage":
            wallet.overage -= lot.posted
        elif lot.kind == "uncapped":
            wallet.uncapped -= lot.posted
        else:
            wallet.posted += lot.posted
            wallet.held += lot.held
            wallet.frozen += lot.frozen
        if lot.kind == "debt":
            wallet.owed -= lot.posted
            wallet.owing += lot.held
    return wallet


def _amounts(wallet: Wallet, at: datetime, unit: Unit) -> dict[str, Any]:
    return {
        "unit": unit.name,
        "kind": unit.kind,
        "policy": wallet.policy,
        "overdraft": format_amount(wallet.overdraft, unit),
        "posted": format_amount(wallet.posted, unit),
        "held": format_amount(wallet.held, unit),
        "frozen": format_amount(wallet.frozen, unit),
        "available": format_amount(wallet.available_anywhere(at), unit),
        "debt": format_amount(wallet.owed, unit),
        "overage": format_amount(wallet.overage, unit),
        "uncapped": format_amount(wallet.uncapped, unit),
    }


def _wallet_view(wallet: Wallet, at: datetime, partition: int, units: Mapping[str, Unit]) -> WalletView:
    unit = units[wallet.unit]
    left = [*wallet.burning(), *(lot for lot in wallet.lots.values() if lot.kind in _PSEUDO)]
    shown = [lot for lot in left if lot.posted or lot.held or lot.frozen]
    ends = sorted((lot for lot in shown if _ends(lot, at)), key=_end)
    renewals = sorted((rule for rule in wallet.rules.values() if not rule.is_over), key=RuleState.next_due)
    return WalletView.model_construct(
        **_amounts(wallet, at, unit),
        lots=[_lot_view(lot, at, partition, unit) for lot in shown[:LOTS_SHOWN_MAX]],
        expiries=[
            ExpiryView.model_construct(
                lot=full_id("lot", partition, lot.id), at=_end(lot), amount=format_amount(lot.available, unit)
            )
            for lot in ends[:ENDS_SHOWN_MAX]
        ],
        renewals=[
            RenewalView.model_construct(
                rule=state.rule.id,
                plan=state.rule.plan,
                period=state.next_period,
                at=state.next_due(),
                amount=format_amount(state.rule.amount, unit),
                rollover_max=format_amount(state.rule.rollover_max, unit),
            )
            for state in renewals
        ],
        holds=None,
    )


_PSEUDO: Final = frozenset({"debt", *ASIDE_KINDS})


def _ends(lot: Lot, at: datetime) -> bool:
    return lot.expires_at is not None and lot.expires_at > at and lot.available > 0


def _end(lot: Lot) -> datetime:
    assert lot.expires_at is not None
    return lot.expires_at


def _lot_view(lot: Lot, at: datetime, partition: int, unit: Unit) -> LotView:
    available = lot.available if lot.is_valid(at) else 0
    return LotView.model_construct(
        lot=full_id("lot", partition, lot.id),
        kind=lot.kind,
        priority=lot.priority,
        granted=format_amount(lot.granted, unit),
        posted=format_amount(lot.posted, unit),
        held=format_amount(lot.held, unit),
        frozen=format_amount(lot.frozen, unit),
        available=format_amount(available, unit),
        expired=format_amount(lot.expired, unit),
        effective_at=lot.effective_at,
        expires_at=lot.expires_at,
        scope=None if lot.scope is None else _scope_view(lot.scope),
        reference=lot.reference,
        cost_basis=lot.cost_basis,
        origin=None if lot.origin is None else full_id("lot", partition, lot.origin),
        rule=lot.rule,
        period=lot.period,
        occurred_at=lot.occurred_at,
        recorded_at=lot.recorded_at,
    )


def _scope_view(scope: LotScope) -> ScopeView:
    return ScopeView.model_construct(
        providers=list(scope.providers), models=list(scope.models), features=list(scope.features)
    )


# Accounts -------------------------------------------------------------------------------------------------------------


async def read_accounts(connection: Connection, *, prefix: str, after: str, limit: int) -> list[AccountView]:
    """Open accounts in the order of their ids."""
    cursor = await connection.execute(
        """
        SELECT a.account, a.opened_at,
               ARRAY (SELECT w.unit FROM wallets w WHERE w.partition = a.partition AND w.account = a.account ORDER BY 1)
        FROM accounts a
        WHERE starts_with(a.account COLLATE "C", %(prefix)s) AND a.account > %(after)s COLLATE "C"
          AND a.account >= %(prefix)s COLLATE "C"
        ORDER BY a.account COLLATE "C" LIMIT %(limit)s
        """,
        {"prefix": prefix, "after": after, "limit": limit},
    )
    return [
        AccountView(account=account, opened_at=opened_at, units=units)
        for account, opened_at, units in await cursor.fetchall()
    ]


# Statements -----------------------------------------------------------------------------------------------------------


class StatementPlace(msgspec.Struct, frozen=True):
    """Where a page of a statement ended: the place of the last entry looked at, and each wallet's posted before it."""

    batch: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    position: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    posted: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementFilter:
    """Which entries: of a unit, of a kind, recorded in [since, until), and what a reference stands for.

    A reference is the id of a lot, a hold or a transaction, the reference of a lot, or the id of a charged event.
    """

    unit: str | None = None
    kind: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    reference: str | None = None


async def read_statement(
    connection: Connection,
    account: str,
    *,
    wanted: StatementFilter,
    before: StatementPlace | None,
    limit: int,
    units: Mapping[str, Unit],
) -> tuple[list[StatementEntry], StatementPlace | None]:
    """A page of an account's entries, newest first, and where it ended if there are more.

    It may be short: with a filter it looks at 20,000 entries and no more.
    """
    partition = partition_of(account)
    keys: dict[str, Any] = {"partition": partition, "account": account}
    since = None if wanted.since is None else wanted.since - _TICK
    cursor = await connection.execute(
        "SELECT CASE WHEN %(since)s::timestamptz IS NULL THEN 0 ELSE batch_at(%(partition)s::smallint, %(since)s) END",
        {**keys, "since": since},
    )
    keys["after"] = (await cursor.fetchone() or (0,))[0]
    start = before or await _statement_start(connection, keys, wanted.until)
    conditions = await _conditions(connection, keys, wanted)
    keys |= {
        "batch": start.batch,
        "position": start.position,
        "limit": limit + 1,
        "scanned": ENTRIES_SCANNED_MAX if conditions else limit + 1,
        "unit": wanted.unit,
        "kind": wanted.kind,
    }
    cursor = await connection.execute(_statement(conditions), keys)
    rows = await cursor.fetchall()
    entries = [row for row in rows if row[0]]
    last_scanned = next((row for row in rows if not row[0]), None)
    shown = [_statement_entry(row, partition, start.posted, units) for row in entries[:limit]]
    # Beyond this place nothing was looked at, or there is at least one more.
    ended = entries[limit - 1] if len(entries) > limit else last_scanned
    if ended is None:
        return shown, None
    keys |= {"end_batch": ended[1], "end_position": ended[2]}
    cursor = await connection.execute(_STATEMENT_PASSED, keys)
    posted = dict(start.posted)
    for unit, passed in await cursor.fetchall():
        posted[unit] = posted.get(unit, 0) - int(passed)
    return shown, StatementPlace(ended[1], ended[2], posted)


async def _statement_start(connection: Connection, keys: Mapping[str, Any], until: datetime | None) -> StatementPlace:
    """From where the newest page goes back, and what was posted then."""
    cursor = await connection.execute(
        "SELECT unit, posted FROM wallets WHERE partition = %(partition)s AND account = %(account)s", keys
    )
    posted = {str(unit): int(amount) for unit, amount in await cursor.fetchall()}
    if until is None:
        return StatementPlace(_BIGINT_MAX, 0, posted)
    cursor = await connection.execute(
        f"""
        SELECT unit, {_SUM_OF_POSTED} FROM journal
        WHERE {_OF_ACCOUNT} AND batch > batch_at(%(partition)s::smallint, %(until)s) GROUP BY unit
        """,
        {**keys, "until": until - _TICK},
    )
    for unit, later in await cursor.fetchall():
        posted[unit] -= int(later)
    cursor = await connection.execute(
        "SELECT batch_at(%(partition)s::smallint, %(until)s)", {**keys, "until": until - _TICK}
    )
    return StatementPlace((await cursor.fetchone() or (0,))[0] + 1, 0, posted)


async def _conditions(connection: Connection, keys: dict[str, Any], wanted: StatementFilter) -> list[LiteralString]:
    """What an entry has to be, as SQL over `scanned`. What a reference stands for is put into `keys`."""
    conditions: list[LiteralString] = []
    if wanted.unit is not None:
        conditions.append("unit = %(unit)s")
    if wanted.kind is not None:
        conditions.append("kind = %(kind)s")
    match wanted.reference and wanted.reference.partition("_")[0]:
        case None | "":
            pass
        case "lot" | "hold" | "txn" as kind if _is_id(wanted.reference or ""):
            keys["id"] = (wanted.reference or "")[-_UUID_LENGTH:]
            column: LiteralString = {"lot": "lot_id", "hold": "hold_id", "txn": "transaction_id"}[kind]
            conditions.append(f"{column} = %(id)s::uuid")
        case _:
            keys["reference"], keys["most"] = wanted.reference, LOTS_REFERRED_MAX
            cursor = await connection.execute(_REFERRED, keys)
            found = await cursor.fetchall()
            keys["lots"] = [row[1] for row in found if row[0]]
            keys["transactions"] = [row[1] for row in found if not row[0]]
            conditions.append("(lot_id = ANY (%(lots)s::uuid[]) OR transaction_id = ANY (%(transactions)s::uuid[]))")
    return conditions


def _is_id(text: str) -> bool:
    try:
        partition_of_id(text)
    except ValueError:
        return False
    return True


def _statement(conditions: Sequence[LiteralString]) -> sql.Composed:
    where = sql.SQL(" AND ").join([sql.SQL("true"), *map(sql.SQL, conditions)])
    return sql.SQL(_STATEMENT).format(of_account=sql.SQL(_OF_ACCOUNT), where=where)


def _statement_entry(
    row: TupleRow, partition: int, posted: Mapping[str, int], units: Mapping[str, Unit]
) -> StatementEntry:
    _, batch, position, transaction, kind, name, lot, lot_kind, hold, *amounts, newer, occurred_at, recorded_at = row
    unit = units[name]
    own, held, frozen = (format_amount(amount, unit) for amount in amounts)
    return StatementEntry.model_construct(
        batch=batch,
        position=position,
        transaction=full_id("txn", partition, transaction),
        kind=kind,
        unit=name,
        lot=None if lot is None else full_id("lot", partition, lot),
        lot_kind=lot_kind,
        hold=None if hold is None else full_id("hold", partition, hold),
        posted=own,
        held=held,
        frozen=frozen,
        balance=format_amount(posted.get(name, 0) - int(newer), unit),
        occurred_at=occurred_at,
        recorded_at=recorded_at,
    )


# What counts in a wallet's posted: not what is kept aside of it.
_COUNTS: Final = "lot_kind IS NULL OR lot_kind NOT IN ('overage', 'uncapped')"
_SUM_OF_POSTED: Final = f"coalesce(sum(posted) FILTER (WHERE {_COUNTS}), 0)::bigint"
# As the index journal_statement has it.
_OF_ACCOUNT: Final = """partition = %(partition)s AND account = %(account)s
AND left(account, 1) <> '@' AND unit IS NOT NULL"""
_BIGINT_MAX: Final = 2**63 - 1

# A page, and after it the last entry looked at if there may be more. `newer`: what came after it, in its unit.
_STATEMENT: Final = """
WITH scanned AS MATERIALIZED (
    SELECT j.*, row_number() OVER (ORDER BY batch DESC, position DESC) AS number,
           coalesce(sum(CASE WHEN lot_kind IN ('overage', 'uncapped') THEN 0 ELSE posted END) OVER newer, 0) AS newer
    FROM (
        SELECT batch, position, transaction_id, kind, unit, lot_id, lot_kind, hold_id, posted, held, frozen,
               occurred_at, recorded_at
        FROM journal
        WHERE {of_account} AND (batch, position) < (%(batch)s, %(position)s) AND batch > %(after)s
        ORDER BY batch DESC, position DESC LIMIT %(scanned)s
    ) j
    WINDOW newer AS (
        PARTITION BY unit ORDER BY batch DESC, position DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    )
), page AS (
    SELECT true AS shown, * FROM scanned WHERE {where} ORDER BY number LIMIT %(limit)s
), last AS (
    SELECT false AS shown, * FROM scanned WHERE number = %(scanned)s
)
SELECT shown, batch, position, transaction_id::text, kind, unit, lot_id::text, lot_kind, hold_id::text,
       posted, held, frozen, newer, occurred_at, recorded_at
FROM (SELECT * FROM page UNION ALL SELECT * FROM last) found ORDER BY shown DESC, number
"""

_STATEMENT_PASSED: Final = f"""
SELECT unit, {_SUM_OF_POSTED} FROM journal
WHERE {_OF_ACCOUNT} AND (batch, position) < (%(batch)s, %(position)s)
  AND (batch, position) >= (%(end_batch)s, %(end_position)s)
GROUP BY unit
"""

_REFERRED: Final = """
(SELECT true, lot_id FROM lots
 WHERE partition = %(partition)s AND reference = %(reference)s AND account = %(account)s LIMIT %(most)s)
UNION ALL
(SELECT false, transaction_id FROM charge_lines
 WHERE partition = %(partition)s AND event_id = %(reference)s LIMIT %(most)s)
UNION ALL
(SELECT false, transaction_id FROM reversals
 WHERE partition = %(partition)s AND event_id = %(reference)s LIMIT %(most)s)
"""


# Transactions and charges ---------------------------------------------------------------------------------------------


async def read_transaction(connection: Connection, transaction: str, *, units: Units) -> TransactionView | None:
    """A transaction with its cause, or None if there is none of the id. Its time is in the id."""
    partition, uuid = partition_of_id(transaction), transaction[-_UUID_LENGTH:]
    begin = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=int(uuid[:8] + uuid[9:13], 16))
    keys = {
        "partition": partition,
        "transaction": uuid,
        "begin": begin - _TICK,
        "end": begin + timedelta(milliseconds=1) - _TICK,
        "limit": ENTRIES_SHOWN_MAX,
    }
    cursor = await connection.execute(_ENTRIES, keys)
    rows = await cursor.fetchall()
    if not rows:
        return None
    keys["recorded_at"] = recorded_at = rows[0][13]
    async with connection.pipeline():
        commands = await connection.execute(
            """
            SELECT principal, idempotency_key FROM commands
            WHERE recorded_at = %(recorded_at)s AND partition = %(partition)s AND transaction_id = %(transaction)s
            ORDER BY 1, 2 LIMIT %(limit)s
            """,
            keys,
        )
        lines = await connection.execute(
            f"""
            SELECT {_LINE_COLUMNS} FROM charge_lines
            WHERE recorded_at = %(recorded_at)s AND partition = %(partition)s AND transaction_id = %(transaction)s
            ORDER BY line_number LIMIT {LINES_SHOWN_MAX}
            """,
            keys,
        )
        reversals = await connection.execute(
            f"""
            SELECT {_REVERSAL_COLUMNS} FROM reversals
            WHERE recorded_at = %(recorded_at)s AND partition = %(partition)s AND transaction_id = %(transaction)s
            ORDER BY position LIMIT {LINES_SHOWN_MAX}
            """,
            keys,
        )
    found_lines = await lines.fetchall()
    given_back = await _given_back(connection, found_lines, units.by_name)
    return TransactionView(
        transaction=transaction,
        batch=rows[0][0],
        recorded_at=recorded_at,
        commands=[CommandView(principal=row[0], idempotency_key=row[1]) for row in await commands.fetchall()],
        bundle=found_lines[0][12] if found_lines else None,
        lines=[_line_view(row, given_back, units.by_name) for row in found_lines],
        reversals=[_reversal_view(row, units.by_name) for row in await reversals.fetchall()],
        entries=[_entry_view(row, partition, units.by_name) for row in rows],
        entries_total=rows[0][14],
    )


async def read_charge(
    connection: Connection, source: str, event_id: str, *, account: str | None, units: Units
) -> ChargeView | None:
    """Every revision of what a use was charged, or None. Its partition is its account's; without one, all are asked."""
    partitions = list(range(PARTITION_COUNT)) if account is None else [partition_of(account)]
    cursor = await connection.execute(
        f"""
        SELECT {_LINE_COLUMNS} FROM charge_lines
        WHERE partition = ANY (%(partitions)s) AND source = %(source)s AND event_id = %(event_id)s
          AND (%(account)s::text IS NULL OR account = %(account)s)
        ORDER BY partition, revision LIMIT {LINES_SHOWN_MAX}
        """,
        {"partitions": partitions, "source": source, "event_id": event_id, "account": account},
    )
    rows = await cursor.fetchall()
    given_back = await _given_back(connection, rows, units.by_name)
    return ChargeView(lines=[_line_view(row, given_back, units.by_name) for row in rows]) if rows else None


_LineKey = tuple[int, str, str, int]

_ENTRIES: Final = """
SELECT batch, position, kind, account, unit, lot_id::text, lot_kind, hold_id::text, posted, held, frozen,
       occurred_at, details, recorded_at, count(*) OVER ()
FROM journal
WHERE partition = %(partition)s AND transaction_id = %(transaction)s
  AND batch > batch_at(%(partition)s::smallint, %(begin)s) AND batch <= batch_at(%(partition)s::smallint, %(end)s)
ORDER BY batch, position LIMIT %(limit)s
"""

_LINE_COLUMNS: Final = """partition, source, event_id, revision, account, occurred_at, hold_id::text, scope,
price_version, own_key, amounts, split, bundle_number, line_number, transaction_id::text, recorded_at"""

_REVERSAL_COLUMNS: Final = "partition, source, event_id, revision, transaction_id::text, recorded_at, reason, split"


async def _given_back(
    connection: Connection, lines: Sequence[TupleRow], units: Mapping[str, Unit]
) -> dict[_LineKey, list[ReversalView]]:
    """What was given back of lines."""
    if not lines:
        return {}
    cursor = await connection.execute(
        f"""
        SELECT {", ".join(f"r.{name.strip()}" for name in _REVERSAL_COLUMNS.split(","))}
        FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::integer[]) AS k (partition, source, event_id, revision)
        JOIN reversals r USING (partition, source, event_id, revision) ORDER BY r.batch, r.position LIMIT %s
        """,
        [*(list(column) for column in zip(*(row[:4] for row in lines), strict=True)), ENTRIES_SHOWN_MAX],
    )
    found: dict[_LineKey, list[ReversalView]] = {}
    for row in await cursor.fetchall():
        found.setdefault((row[0], row[1], row[2], row[3]), []).append(_reversal_view(row, units))
    return found


def _line_view(row: TupleRow, given_back: Mapping[_LineKey, list[ReversalView]], units: Mapping[str, Unit]) -> LineView:
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
        scope=_use_view(scope),
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


def _use_view(scope: str) -> UseView:
    used = _decode_scope(scope)
    return UseView(provider=used.provider, model=used.model, feature=used.feature)


def _reversal_view(row: TupleRow, units: Mapping[str, Unit]) -> ReversalView:
    partition, source, event_id, revision, transaction, recorded_at, reason, split = row
    return ReversalView(
        source=source,
        event_id=event_id,
        revision=revision,
        transaction=full_id("txn", partition, transaction),
        recorded_at=recorded_at,
        reason=reason,
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


def _entry_view(row: TupleRow, partition: int, units: Mapping[str, Unit]) -> EntryView:
    batch, position, kind, account, name, lot, lot_kind, hold, *amounts, occurred_at, details, _recorded_at, _ = row
    unit = None if name is None else units[name]
    posted, held, frozen = (None if unit is None else format_amount(amount, unit) for amount in amounts)
    return EntryView(
        batch=batch,
        position=position,
        kind=kind,
        account=account,
        unit=name,
        lot=None if lot is None else full_id("lot", partition, lot),
        lot_kind=lot_kind,
        hold=None if hold is None else full_id("hold", partition, hold),
        posted=posted,
        held=held,
        frozen=frozen,
        occurred_at=occurred_at,
        details=details,
    )


# Holds ----------------------------------------------------------------------------------------------------------------


async def read_open_holds(
    connection: Connection, account: str, *, after: str | None, limit: int, units: Mapping[str, Unit]
) -> list[HoldView]:
    """Open holds of an account and of all below it, oldest first."""
    partition = partition_of(account)
    cursor = await connection.execute(
        f"""
        SELECT {_HOLD_COLUMNS} FROM holds
        WHERE partition = %(partition)s AND status = 'placed' AND hold_id > %(after)s::uuid
          AND (account = %(account)s COLLATE "C"
               OR (account > %(below)s COLLATE "C" AND account < %(beside)s COLLATE "C"))
        ORDER BY hold_id LIMIT %(limit)s
        """,
        {
            "partition": partition,
            "account": account,
            **_below(account),
            "after": _NO_UUID if after is None else after[-_UUID_LENGTH:],
            "limit": limit,
        },
    )
    return await _hold_views(connection, partition, await cursor.fetchall(), units)


async def read_hold(connection: Connection, hold: str, *, units: Mapping[str, Unit]) -> HoldView | None:
    """A hold, open or ended, or None if it is not known."""
    partition = partition_of_id(hold)
    cursor = await connection.execute(
        f"SELECT {_HOLD_COLUMNS} FROM holds WHERE partition = %s AND hold_id = %s::uuid",
        [partition, hold[-_UUID_LENGTH:]],
    )
    views = await _hold_views(connection, partition, await cursor.fetchall(), units)
    return views[0] if views else None


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
            scope=None if scope is None else _use_view(scope),
            recorded_at=recorded_at,
            expires_at=expires_at,
            ended_at=ended_at,
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


# Totals ---------------------------------------------------------------------------------------------------------------


async def read_account_totals(connection: Connection, account: str, *, units: Units) -> list[AccountTotals] | None:
    """What was ever posted on an account's wallets, or None if it is not open. As journalled."""
    keys = {"partition": partition_of(account), "account": account}
    cursor = await connection.execute(
        """
        SELECT w.unit, w.posted, w.overage, w.uncapped
        FROM accounts a LEFT JOIN wallets w USING (partition, account)
        WHERE a.partition = %(partition)s AND a.account = %(account)s ORDER BY w.unit
        """,
        keys,
    )
    wallets = await cursor.fetchall()
    if not wallets:
        return None
    cursor = await connection.execute(
        f"""
        SELECT unit, kind, lot_kind, sum(posted)::bigint FROM journal WHERE {_OF_ACCOUNT}
        GROUP BY unit, kind, lot_kind HAVING sum(posted) <> 0
        """,
        keys,
    )
    sums: dict[str, dict[tuple[str, str], int]] = {}
    for unit, kind, lot_kind, posted in await cursor.fetchall():
        sums.setdefault(unit, {})[kind, lot_kind] = int(posted)
    return [
        _account_totals(sums.get(unit, {}), units.by_name[unit], posted=posted, overage=overage, uncapped=uncapped)
        for unit, posted, overage, uncapped in wallets
        if unit is not None
    ]


def _account_totals(
    sums: Mapping[tuple[str, str], int], unit: Unit, *, posted: int, overage: int, uncapped: int
) -> AccountTotals:
    def told(*kinds: str, sign: int = 1) -> str:
        return format_amount(sign * sum(amount for (kind, _), amount in sums.items() if kind in kinds), unit)

    return AccountTotals(
        unit=unit.name,
        granted=told("lot_granted"),
        charged=told("charged", "hold_estimated", "estimate_reversed", sign=-1),
        reversed=told("reversed"),
        expired=told("lot_expired", "lot_revived", sign=-1),
        voided=told("lot_voided", sign=-1),
        clawed_back=told("clawed_back", "given_back", sign=-1),
        adjusted=told("adjusted"),
        transferred=told("transferred"),
        posted=format_amount(posted, unit),
        overage=format_amount(overage, unit),
        uncapped=format_amount(uncapped, unit),
        granted_by_kind={
            lot_kind: format_amount(amount, unit)
            for (kind, lot_kind), amount in sorted(sums.items())
            if kind == "lot_granted"
        },
        by_kind={kind: told(kind) for kind in sorted({kind for kind, _ in sums})},
    )


async def read_totals(connection: Connection, unit: Unit, *, account_prefix: str) -> Totals:
    """What was charged by the journal, granted by the lots, and is left in the wallets. As journalled."""
    keys = {"unit": unit.name, "prefix": account_prefix}
    async with connection.pipeline():
        charged = await connection.execute(
            """
            SELECT coalesce(-sum(posted), 0) FROM journal
            WHERE kind IN ('charged', 'hold_estimated', 'estimate_reversed') AND unit = %(unit)s
              AND left(account, 1) <> '@' AND starts_with(account, %(prefix)s)
            """,
            keys,
        )
        lots = await connection.execute(
            """
            SELECT coalesce(sum(clawed), 0), coalesce(sum(granted) FILTER (WHERE origin IS NULL), 0) FROM lots
            WHERE unit = %(unit)s AND starts_with(account, %(prefix)s)
            """,
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
    clawed, granted = await lots.fetchone() or (0, 0)
    by_source = {str(source): int(count) for source, count in await lines.fetchall()}
    return Totals(
        unit=unit.name,
        account_prefix=account_prefix,
        charged=format_amount(int((await charged.fetchone() or (0,))[0]), unit),
        clawed_back=format_amount(int(clawed), unit),
        granted=format_amount(int(granted), unit),
        posted=format_amount(int(posted), unit),
        overage=format_amount(int(overage), unit),
        charge_lines=sum(by_source.values()),
        charge_lines_by_source=by_source,
    )


# Export ---------------------------------------------------------------------------------------------------------------

EXPORTED: Final = (
    "partition",
    "batch",
    "position",
    "transaction",
    "kind",
    "account",
    "unit",
    "lot",
    "lot_kind",
    "hold",
    "posted",
    "held",
    "frozen",
    "occurred_at",
    "recorded_at",
    "details",
)


async def exported_accounts(connection: Connection, account: str, *, below: bool) -> tuple[int, list[str]]:
    """The accounts of an export, itself and if `below` those under it, and up to which batch it goes. 0: not open."""
    partition = partition_of(account)
    cursor = await connection.execute(
        """
        SELECT h.batch, a.account FROM accounts a JOIN heads h USING (partition)
        WHERE a.partition = %(partition)s AND (
            a.account = %(account)s
            OR (%(whole)s AND a.account > %(below)s COLLATE "C" AND a.account < %(beside)s COLLATE "C")
        )
        ORDER BY a.account COLLATE "C"
        """,
        {"partition": partition, "account": account, "whole": below, **_below(account)},
    )
    rows = await cursor.fetchall()
    accounts = [str(row[1]) for row in rows]
    return (int(rows[0][0]), accounts) if account in accounts else (0, [])


async def exported_csv(
    connect: Callable[[], AbstractAsyncContextManager[Connection]],
    accounts: Iterable[str],
    *,
    batch: int,
    units: Mapping[str, Unit],
) -> AsyncIterator[bytes]:
    """The entries of accounts up to a batch, as CSV, account by account and in order.

    Entries are never changed: so no connection is kept between two pages, however slowly they are taken.
    """
    yield _csv([EXPORTED])
    for account in accounts:
        keys: dict[str, Any] = {"partition": partition_of(account), "account": account, "until": batch}
        place: tuple[int, int] | None = (0, 0)
        while place is not None:
            keys |= {"batch": place[0], "position": place[1], "limit": EXPORT_ROWS}
            async with connect() as connection:
                cursor = await connection.execute(_EXPORT, keys)
                rows = await cursor.fetchall()
            if rows:
                yield _csv([_exported(row, units) for row in rows])
            place = (rows[-1][1], rows[-1][2]) if len(rows) == EXPORT_ROWS else None


_EXPORT: Final = f"""
SELECT partition, batch, position, transaction_id::text, kind, account, unit, lot_id::text, lot_kind, hold_id::text,
       posted, held, frozen, occurred_at, recorded_at, details
FROM journal
WHERE {_OF_ACCOUNT} AND (batch, position) > (%(batch)s, %(position)s) AND batch <= %(until)s
ORDER BY batch, position LIMIT %(limit)s
"""


def _exported(row: TupleRow, units: Mapping[str, Unit]) -> list[Any]:
    partition, batch, position, transaction, kind, account, unit, lot, lot_kind, hold, *more = row
    posted, held, frozen, occurred_at, recorded_at, details = more
    steps = units[unit]
    return [
        partition,
        batch,
        position,
        full_id("txn", partition, transaction),
        kind,
        account,
        unit,
        None if lot is None else full_id("lot", partition, lot),
        lot_kind,
        None if hold is None else full_id("hold", partition, hold),
        format_amount(posted, steps),
        format_amount(held, steps),
        format_amount(frozen, steps),
        occurred_at.isoformat(),
        recorded_at.isoformat(),
        details,
    ]


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
