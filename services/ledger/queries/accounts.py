"""Which accounts are open, and the accounts of a tree with their wallets."""

from datetime import datetime

from pydantic import BaseModel

from contracts.partition import partition_of
from services.ledger.domain.commands import Units
from services.ledger.queries.present import present
from services.ledger.queries.selection import Connection, bounds_below, is_open
from services.ledger.queries.wallets import wallet_amounts


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


async def read_tree(
    connection: Connection, root: str, *, after: str, limit: int, units: Units, now: datetime
) -> list[TreeAccountView] | None:
    """Accounts of a tree in the order of their ids, with their wallets at `now`, or None if its root is not open."""
    partition = partition_of(root)
    cursor = await connection.execute(
        """
        SELECT account FROM accounts
        WHERE partition = %(partition)s AND account > %(after)s COLLATE "C"
          AND account >= %(root)s COLLATE "C" AND account < %(beside)s COLLATE "C"
          AND (account = %(root)s OR starts_with(account, %(below)s))
        ORDER BY account COLLATE "C" LIMIT %(limit)s
        """,
        {"partition": partition, "root": root, "after": after, "limit": limit, **bounds_below(root)},
    )
    names = [str(row[0]) for row in await cursor.fetchall()]
    if not names:
        return [] if await is_open(connection, root) else None
    state, draft = await present(connection, partition, names, units=units, now=now)
    at, named = draft.recorded_at, units.by_name
    return [
        TreeAccountView(
            account=name,
            opened_at=state.accounts[name].opened_at,
            wallets=[
                TreeWalletView.model_construct(**wallet_amounts(wallet, at, named[wallet.unit]))
                for _, wallet in sorted(state.accounts[name].wallets.items())
            ],
        )
        for name in names
    ]
