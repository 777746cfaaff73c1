"""What an account has: now, as it was recorded at a time, and by what had occurred at a time."""

from datetime import datetime
from typing import Final

from pydantic import BaseModel

from contracts.money import format_amount
from contracts.partition import partition_of
from services.ledger.domain.commands import Units
from services.ledger.domain.concerned import AHEAD_MAX
from services.ledger.domain.entries import ASIDE_KINDS
from services.ledger.queries.past import find_past, past_holds, past_lots, past_wallet
from services.ledger.queries.present import present
from services.ledger.queries.selection import OF_ACCOUNT, SUM_OF_POSTED, Connection
from services.ledger.queries.wallets import HeldLotsView, WalletView, wallet_view
from services.ledger.translate import full_id

# Of a wallet of the past.
HOLDS_SHOWN_MAX: Final = 500


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


async def read_balance(connection: Connection, account: str, *, units: Units, now: datetime) -> BalanceView | None:
    """The balance of an account at `now`, or None if it is not open."""
    state, draft = await present(connection, partition_of(account), [account], units=units, now=now)
    found = state.accounts.get(account)
    if found is None:
        return None
    at = draft.recorded_at
    partition = draft.head.partition
    wallets = [wallet_view(wallet, at, partition, units.by_name) for _, wallet in sorted(found.wallets.items())]
    return BalanceView(account=account, opened_at=found.opened_at, as_of=at, wallets=wallets)


async def read_balance_as_of(
    connection: Connection, account: str, *, as_of: datetime, units: Units
) -> BalanceView | None:
    """What was recorded of an account by a time, or None if it was not open: sums over the journal up to then.

    They are counted from whichever end is nearer, the account's opening or the present. What was due and not yet
    recorded is not done.
    """
    past = await find_past(connection, account, as_of)
    if past is None:
        return None
    lots, holds = await past_lots(connection, past), await past_holds(connection, past)
    cursor = await connection.execute(
        "SELECT unit FROM wallets WHERE partition = %(partition)s AND account = %(account)s AND batch <= %(batch)s",
        past.keys,
    )
    views = []
    for unit in sorted(str(row[0]) for row in await cursor.fetchall()):
        wallet = past_wallet(past, unit, [lot for lot in lots if lot.unit == unit])
        view = wallet_view(wallet, as_of, past.partition, units.by_name)
        view.policy = view.overdraft = None
        view.expiries = []
        view.holds = [
            HeldLotsView(hold=full_id("hold", past.partition, hold), held=format_amount(held, units.by_name[unit]))
            for hold, held in sorted((hold, held) for (hold, of_unit), held in holds.items() if of_unit == unit)
        ][:HOLDS_SHOWN_MAX]
        views.append(view)
    return BalanceView(account=account, opened_at=past.opened_at, as_of=as_of, wallets=views)


async def read_posted_at(
    connection: Connection, account: str, *, world_at: datetime, units: Units, now: datetime
) -> PostedView | None:
    """What was posted by what had occurred by a time, or None if the account is not open."""
    partition = partition_of(account)
    state, draft = await present(connection, partition, [account], units=units, now=now)
    found = state.accounts.get(account)
    if found is None:
        return None
    posted = {unit: wallet.posted for unit, wallet in sorted(found.wallets.items())}
    _, due = draft.finish()
    for entry in (recorded.entry for recorded in due):
        aside = entry.lot_kind in ASIDE_KINDS
        if entry.account == account and entry.unit is not None and not aside and entry.occurred_at > world_at:
            posted[entry.unit] -= entry.posted
    # Nothing is recorded that is said to occur later than this.
    cursor = await connection.execute(
        f"""
        SELECT unit, {SUM_OF_POSTED} FROM journal
        WHERE {OF_ACCOUNT} AND batch > batch_at(%(partition)s::smallint, %(since)s) AND occurred_at > %(world_at)s
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
