"""The statements that read by key what a batch needs."""

from collections.abc import Mapping
from typing import Final

from sqlalchemy import Table

from services.ledger import tables
from services.ledger.domain.commands import LATE_GRACE
from services.ledger.store.executing import numbered
from services.ledger.store.needs import OVERDUE_READ_MAX


def _select(table: Table, *, keys: Mapping[str, str], on: str | None = None) -> bytes:
    """SELECT of all columns of the rows with the keys, which are handed over as arrays of the named types.

    `on` says which rows `t` belong to a key `k`, if not those with its columns.
    """
    columns = ", ".join(f"t.{column.name}" for column in table.columns)
    join = f"USING ({', '.join(keys)})" if on is None else f"ON {on}"
    statement = f"SELECT {columns} FROM {_keys(keys)} JOIN {table.name} t {join}"
    return numbered(statement)


def _keys(keys: Mapping[str, str]) -> str:
    return f"(SELECT {', '.join(f'unnest(%s::{kind}[]) AS {name}' for name, kind in keys.items())}) AS k"


_ACCOUNT_KEYS: Final = {"partition": "smallint", "account": "text"}
_HOLD_KEYS: Final = {"partition": "smallint", "hold_id": "uuid", "account": "text"}
_LOT_KEYS: Final = {"partition": "smallint", "lot_id": "uuid", "account": "text"}
_PAST_KEYS: Final = {"partition": "smallint", "account": "text", "at": "timestamptz"}
_COMMAND_KEYS: Final = {"partition": "smallint", "principal": "text", "idempotency_key": "text"}
_TIME_KEYS: Final = {"partition": "smallint", "since": "timestamptz", "until": "timestamptz"}
_LINE_KEYS: Final = {"partition": "smallint", "source": "text", "event_id": "text", "revision": "integer"}
_PAYMENT_KEYS: Final = {"partition": "smallint", "payment": "text", "account": "text", "claiming": "boolean"}

_SAME_LOT: Final = "t.partition = k.partition AND t.lot_id = k.lot_id AND t.account = k.account"
_SAME_HOLD: Final = "t.partition = k.partition AND t.hold_id = k.hold_id"
_SAME_LINE: Final = (
    "t.partition = k.partition AND t.source = k.source AND t.event_id = k.event_id AND t.revision = k.revision"
)
_SAME_TREE: Final = "split_part(t.account, '/', 1) = split_part(k.account, '/', 1)"
# A claim has to know if the payment is another tree's.
_PAYMENT: Final = (
    f"t.partition = k.partition AND t.payment = k.payment AND ((k.claiming AND t.paid > 0) OR {_SAME_TREE})"
)
_CLAIM: Final = f"t.partition = k.partition AND t.payment = k.payment AND {_SAME_TREE}"
# A grant changes its payment's other lots only if something has been claimed.
_CLAIMED: Final = """
(k.claiming OR (
    SELECT true FROM payments p
    WHERE p.partition = k.partition AND p.payment = k.payment AND (p.claimed > 0 OR p.disputed > 0) LIMIT 1
))
"""
# Accounts with lots that refer to a payment.
_PAID_ACCOUNTS: Final = f"""
SELECT DISTINCT t.partition, t.account
FROM {{keys}} JOIN lots t ON t.partition = k.partition AND t.reference = k.payment AND {_SAME_TREE} AND {_CLAIMED}
"""
# Of an account in use: what is not spent, and what ended so lately that a late charge may ask for it.
_ACCOUNT_LOTS: Final = """
WITH a AS ({accounts})
SELECT {columns} FROM a JOIN lots t USING (partition, account) WHERE NOT t.spent
UNION ALL
SELECT {columns} FROM a JOIN heads h USING (partition) JOIN lots t USING (partition, account)
WHERE t.spent AND (t.rule_id IS NOT NULL OR t.expired > 0) AND t.expires_at > h.recorded_at - interval '{late_grace}'
"""
_PAST_LOTS: Final = """
t.partition = k.partition AND t.account = k.account AND t.spent AND (t.rule_id IS NOT NULL OR t.expired > 0)
AND t.expires_at > k.at AND (t.effective_at IS NULL OR t.effective_at <= k.at)
"""
# Of an ended hold, and only for its own account: what it had earmarked.
_EARMARKED: Final = """
SELECT {columns} FROM {keys}
JOIN holds h ON h.partition = k.partition AND h.hold_id = k.hold_id AND h.account = k.account AND h.status <> 'placed'
JOIN hold_lots e ON e.partition = h.partition AND e.hold_id = h.hold_id
JOIN lots t ON t.partition = e.partition AND t.lot_id = e.lot_id
"""
_OVERDUE: Final = f"""
FROM (
    SELECT o.partition, o.hold_id FROM {{keys}} CROSS JOIN LATERAL (
        SELECT * FROM holds h
        WHERE h.partition = k.partition AND h.status = 'placed' AND h.expires_at BETWEEN k.since AND k.until
        ORDER BY h.expires_at FETCH FIRST {OVERDUE_READ_MAX} ROWS WITH TIES
    ) o
) o
"""
# What lines took from.
_LINE_LOTS: Final = f"""
WITH taken AS (
    SELECT DISTINCT t.partition, (part ->> 2)::uuid AS lot_id
    FROM {{keys}} JOIN charge_lines t ON {_SAME_LINE} AND t.account = k.account,
         jsonb_array_elements(t.split::jsonb) AS part
)
SELECT {{columns}} FROM taken JOIN lots t USING (partition, lot_id)
"""
# What refers to a payment, debts in its stead, too.
_PAID_LOTS: Final = f"""
SELECT {{columns}} FROM {{keys}}
JOIN lots t ON t.partition = k.partition AND t.reference = k.payment AND {_SAME_TREE} AND {_CLAIMED}
"""


def _statement(text: str, *, table: Table | None = None, keys: Mapping[str, str]) -> bytes:
    """A statement in which {keys} stands for the keys `k`, and {columns} for all columns of the table's rows `t`."""
    columns = "" if table is None else ", ".join(f"t.{column.name}" for column in table.columns)
    accounts = _PAID_ACCOUNTS if keys is _PAYMENT_KEYS else "SELECT * FROM {keys}"
    grace = f"{LATE_GRACE.total_seconds():.0f} seconds"
    filled = text.replace("{late_grace}", grace).replace("{accounts}", accounts)
    filled = filled.replace("{keys}", _keys(keys)).replace("{columns}", columns)
    return numbered(filled)


_OF_PAID_ACCOUNT: Final = "SELECT {columns} FROM ({accounts}) k JOIN"
LOAD: Final[Mapping[str, bytes]] = {
    "accounts": _select(tables.accounts, keys=_ACCOUNT_KEYS),
    "wallets": _select(tables.wallets, keys=_ACCOUNT_KEYS),
    "rules": _select(tables.rules, keys=_ACCOUNT_KEYS),
    "account_lots": _statement(_ACCOUNT_LOTS, table=tables.lots, keys=_ACCOUNT_KEYS),
    "holds": _select(tables.holds, keys=_HOLD_KEYS, on=_SAME_HOLD),
    "hold_lots": _select(tables.hold_lots, keys=_HOLD_KEYS, on=_SAME_HOLD),
    "earmarked": _statement(_EARMARKED, table=tables.lots, keys=_HOLD_KEYS),
    "overdue": _statement(
        f"SELECT {{columns}} {_OVERDUE} JOIN holds t USING (partition, hold_id)", table=tables.holds, keys=_TIME_KEYS
    ),
    "overdue_lots": _statement(
        f"SELECT {{columns}} {_OVERDUE} JOIN hold_lots t USING (partition, hold_id)",
        table=tables.hold_lots,
        keys=_TIME_KEYS,
    ),
    "next_deadline": _statement(
        """
        SELECT k.partition, (
            SELECT min(h.expires_at) FROM holds h
            WHERE h.partition = k.partition AND h.status = 'placed' AND h.expires_at > k.until
        ) FROM {keys}
        """,
        keys=_TIME_KEYS,
    ),
    "payments": _select(tables.payments, keys=_PAYMENT_KEYS, on=_PAYMENT),
    "claims": _select(tables.claims, keys=_PAYMENT_KEYS, on=_CLAIM),
    "paid_accounts": _statement(
        f"{_OF_PAID_ACCOUNT} accounts t USING (partition, account)", table=tables.accounts, keys=_PAYMENT_KEYS
    ),
    "paid_wallets": _statement(
        f"{_OF_PAID_ACCOUNT} wallets t USING (partition, account)", table=tables.wallets, keys=_PAYMENT_KEYS
    ),
    "paid_rules": _statement(
        f"{_OF_PAID_ACCOUNT} rules t USING (partition, account)", table=tables.rules, keys=_PAYMENT_KEYS
    ),
    "paid_account_lots": _statement(_ACCOUNT_LOTS, table=tables.lots, keys=_PAYMENT_KEYS),
    "paid_lots": _statement(_PAID_LOTS, table=tables.lots, keys=_PAYMENT_KEYS),
    "lots": _select(tables.lots, keys=_LOT_KEYS, on=_SAME_LOT),
    "repaying": _select(tables.lots, keys=_LOT_KEYS, on=_SAME_LOT),
    "past_lots": _select(tables.lots, keys=_PAST_KEYS, on=_PAST_LOTS),
    "past_lines": _statement(
        f"""
        SELECT t.partition, t.source, t.event_id, t.revision, t.account, t.occurred_at, t.hold_id, t.amounts, t.split
        FROM {{keys}} JOIN charge_lines t ON {_SAME_LINE}
        """,
        keys=_LINE_KEYS | {"account": "text"},
    ),
    "reversals": _statement(
        f"""
        SELECT t.partition, t.source, t.event_id, t.revision, t.split
        FROM (SELECT DISTINCT partition, source, event_id, revision FROM {{keys}}) k
        JOIN reversals t ON {_SAME_LINE} ORDER BY t.batch, t.position
        """,
        keys=_LINE_KEYS | {"account": "text"},
    ),
    "line_lots": _statement(_LINE_LOTS, table=tables.lots, keys=_LINE_KEYS | {"account": "text"}),
    "commands": _statement(
        """
        SELECT t.partition, t.principal, t.idempotency_key, t.body_hash, t.outcome
        FROM {keys} JOIN commands t USING (partition, principal, idempotency_key)
        """,
        keys=_COMMAND_KEYS,
    ),
    "lines": _statement(
        f"""
        SELECT t.partition, t.source, t.event_id, t.revision,
               t.account, t.occurred_at, t.hold_id::text, t.scope, t.price_version, t.own_key, t.amounts
        FROM {{keys}} JOIN charge_lines t ON {_SAME_LINE}
        """,
        keys=_LINE_KEYS,
    ),
    "bundles": _statement(
        "SELECT t.partition, t.number, t.body_hash FROM {keys} JOIN bundles t USING (partition, number)",
        keys={"partition": "smallint", "number": "bigint"},
    ),
}

# What is seldom there already, and how many columns its keys have.
KEYS: Final = {"commands": 3, "holds": 3, "lines": 4}
# Which of these keys there are: what was asked for, and its place in the arrays.
KNOWN: Final = numbered(
    """
    SELECT 'commands', k.place
    FROM unnest(%s::smallint[], %s::text[], %s::text[])
         WITH ORDINALITY AS k (partition, principal, idempotency_key, place)
    JOIN commands t USING (partition, principal, idempotency_key)
    UNION ALL
    SELECT 'holds', k.place
    FROM unnest(%s::smallint[], %s::uuid[], %s::text[]) WITH ORDINALITY AS k (partition, hold_id, account, place)
    JOIN holds t USING (partition, hold_id)
    UNION ALL
    SELECT 'lines', k.place
    FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::integer[])
         WITH ORDINALITY AS k (partition, source, event_id, revision, place)
    JOIN charge_lines t USING (partition, source, event_id, revision)
    """
)

# By what is needed: the statements that read it.
LOADED_BY: Final[Mapping[str, tuple[str, ...]]] = {
    "accounts": ("accounts", "wallets", "rules", "account_lots"),
    "holds": ("holds", "hold_lots", "earmarked"),
    "overdue": ("overdue", "overdue_lots", "next_deadline"),
    "payments": (
        "payments",
        "claims",
        "paid_accounts",
        "paid_wallets",
        "paid_rules",
        "paid_account_lots",
        "paid_lots",
    ),
    "lots": ("lots",),
    "repaying": ("repaying",),
    "past_lots": ("past_lots",),
    "past_lines": ("past_lines", "reversals", "line_lots"),
    "commands": ("commands",),
    "lines": ("lines",),
    "bundles": ("bundles",),
}

# By statement: what its rows are to `projections.add_rows`.
LOADED_AS: Final[Mapping[str, str]] = {
    "accounts": "accounts",
    "paid_accounts": "accounts",
    "wallets": "wallets",
    "paid_wallets": "wallets",
    "rules": "rules",
    "paid_rules": "rules",
    "account_lots": "lots",
    "paid_account_lots": "lots",
    "earmarked": "lots",
    "paid_lots": "lots",
    "lots": "lots",
    "repaying": "lots",
    "past_lots": "lots",
    "line_lots": "lots",
    "holds": "holds",
    "overdue": "holds",
    "hold_lots": "hold_lots",
    "overdue_lots": "hold_lots",
    "payments": "payments",
    "claims": "claims",
    "past_lines": "past_lines",
    "reversals": "reversals",
}
