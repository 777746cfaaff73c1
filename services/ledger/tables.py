"""The tables of the schema `ledger`. All begin with `partition`. The migrations make them; these lines describe them.

The record is append-only: journal, commands, bundles, charge_lines, reversals, signatures. The projections are sums
over the journal, and a replay rebuilds them: accounts, wallets, rules, lots, holds, hold_lots, payments, claims.
"""

from typing import Any, Final

from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    Boolean,
    Column,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
)
from sqlalchemy.dialects.postgresql import UUID

from services.kit.dead_letters import dead_letters_table
from services.kit.leases import leases_table, members_table
from services.kit.outbox import outbox_table, relayed_table

metadata: Final = MetaData()


def _key(name: str, kind: Any) -> Column[Any]:
    return Column(name, kind, primary_key=True, autoincrement=False)


def _value(name: str, kind: Any, *, nullable: bool = False) -> Column[Any]:
    return Column(name, kind, nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> Column[Any]:
    return Column(name, TIMESTAMP(timezone=True), nullable=nullable)


# Where each partition stands. Every commit is conditional on (epoch, batch), and moves it.
heads = Table(
    "heads",
    metadata,
    _key("partition", SmallInteger),
    _value("epoch", BigInteger),
    _value("batch", BigInteger),
    _value("chain_hash", LargeBinary),
    _time("recorded_at"),
    _value("outbox_number", BigInteger),
    _value("charges_number", BigInteger),
)

# Every column but the last enters the hash, in this order, as text.
journal = Table(
    "journal",
    metadata,
    _key("partition", SmallInteger),
    _key("batch", BigInteger),
    _key("position", Integer),
    _value("transaction_id", UUID),
    _value("kind", Text),
    _value("account", Text),
    _value("unit", Text, nullable=True),
    _value("lot_id", UUID, nullable=True),
    _value("lot_kind", Text, nullable=True),
    _value("hold_id", UUID, nullable=True),
    _value("posted", BigInteger),
    _value("held", BigInteger),
    _value("frozen", BigInteger),
    _time("occurred_at"),
    _time("recorded_at"),
    _value("details", Text, nullable=True),
    _value("hash", LargeBinary),
)

# Accepted commands and their outcomes, for ever. `batch` is that of the transaction that made it so.
commands = Table(
    "commands",
    metadata,
    _key("partition", SmallInteger),
    _key("principal", Text),
    _key("idempotency_key", Text),
    _value("body_hash", LargeBinary),
    _value("transaction_id", UUID),
    _value("batch", BigInteger),
    _time("recorded_at"),
    _value("outcome", Text),
)

# `lines`: what a bundle said in all, reversals and charge lines; the transaction is that of its charge lines, if any.
bundles = Table(
    "bundles",
    metadata,
    _key("partition", SmallInteger),
    _key("number", BigInteger),
    _value("body_hash", LargeBinary),
    _value("batch", BigInteger),
    _value("transaction_id", UUID, nullable=True),
    _value("lines", Integer),
    _value("lines_dead", Integer),
)

# What each use was charged, once, and from which lots. `split`: [[account, unit, lot, lot kind, posted, held], …].
# `recorded_at` is the batch's; lines of a time, and so of a transaction, are found by it.
charge_lines = Table(
    "charge_lines",
    metadata,
    _key("partition", SmallInteger),
    _key("source", Text),
    _key("event_id", Text),
    _key("revision", Integer),
    _value("account", Text),
    _time("occurred_at"),
    _value("hold_id", UUID, nullable=True),
    _value("scope", Text),
    _value("price_version", Text),
    _value("own_key", Boolean),
    _value("amounts", Text),
    _value("split", Text),
    _value("bundle_number", BigInteger, nullable=True),
    _value("line_number", Integer),
    _value("batch", BigInteger),
    _value("transaction_id", UUID),
    _time("recorded_at"),
)

# What of a charge line was given back. `position` is that of the first entry that does so, `split` is as it was given
# back: [[account, unit, lot, posted], …], by the lots that the line took from, and above zero.
reversals = Table(
    "reversals",
    metadata,
    _key("partition", SmallInteger),
    _key("source", Text),
    _key("event_id", Text),
    _key("revision", Integer),
    _key("batch", BigInteger),
    _key("position", Integer),
    _value("transaction_id", UUID),
    _value("split", Text),
    _value("reason", Text, nullable=True),
    _time("recorded_at"),
)

# One for each head that a commit moved, by which `heads` names them all: that text is what was signed.
signatures = Table(
    "signatures",
    metadata,
    _key("partition", SmallInteger),
    _key("batch", BigInteger),
    _value("chain_hash", LargeBinary),
    _value("commit_id", Text),
    _value("signature", LargeBinary),
    _value("key_id", Text),
    _value("heads", Text),
)

# `due_at`: when something is due on a wallet of the account, a lot's end or a renewal; null: never.
accounts = Table(
    "accounts",
    metadata,
    _key("partition", SmallInteger),
    _key("account", Text),
    _time("opened_at"),
    _time("recorded_at"),
    _value("batch", BigInteger),
    _value("position", Integer),
    _value("transaction_id", UUID),
    _time("due_at", nullable=True),
)

# `thresholds`, `low`: JSON, as in the journal; in `low` null stands for exhausted. `full_posted` is the state's `full`.
wallets = Table(
    "wallets",
    metadata,
    _key("partition", SmallInteger),
    _key("account", Text),
    _key("unit", Text),
    _value("policy", Text),
    _value("overdraft", BigInteger),
    _time("recorded_at"),
    _value("batch", BigInteger),
    _value("position", Integer),
    _value("posted", BigInteger),
    _value("held", BigInteger),
    _value("frozen", BigInteger),
    _value("overage", BigInteger),
    _value("thresholds", Text),
    _value("uncapped", BigInteger),
    _value("owed", BigInteger),
    _value("owing", BigInteger),
    _value("full_posted", BigInteger),
    _value("low", Text),
)

# Recurring grants. `rule`: JSON, as in the journal.
rules = Table(
    "rules",
    metadata,
    _key("partition", SmallInteger),
    _key("account", Text),
    _key("unit", Text),
    _key("rule_id", Text),
    _value("rule", Text),
    _value("next_period", BigInteger),
    _value("ended", Boolean),
    _time("recorded_at"),
    _value("batch", BigInteger),
    _value("position", Integer),
)

# `spent` stands for "nothing is left", so that an index can leave those lots out and updates stay in their page.
# `scope`, `repaid`: JSON; a debt's `repaid` is null until something of it is.
lots = Table(
    "lots",
    metadata,
    _key("partition", SmallInteger),
    _key("lot_id", UUID),
    _value("account", Text),
    _value("unit", Text),
    _value("kind", Text),
    _value("priority", Integer),
    _time("effective_at", nullable=True),
    _time("expires_at", nullable=True),
    _value("scope", Text, nullable=True),
    _value("reference", Text, nullable=True),
    _value("cost_basis", Text, nullable=True),
    _value("origin", Text, nullable=True),
    _value("granted", BigInteger),
    _time("occurred_at"),
    _time("recorded_at"),
    _value("batch", BigInteger),
    _value("position", Integer),
    _value("posted", BigInteger),
    _value("held", BigInteger),
    _value("frozen", BigInteger),
    _value("spent", Boolean),
    _value("clawed", BigInteger),
    _value("clawed_spent", BigInteger),
    _value("pending", BigInteger),
    _value("rule_id", Text, nullable=True),
    _value("period", BigInteger, nullable=True),
    _value("expired", BigInteger),
    _value("void", Boolean),
    _value("voided", BigInteger),
    _value("pending_frozen", BigInteger),
    _value("repaid", Text, nullable=True),
)

holds = Table(
    "holds",
    metadata,
    _key("partition", SmallInteger),
    _key("hold_id", UUID),
    _value("account", Text),
    _value("status", Text),
    _time("expires_at", nullable=True),
    _value("overdue", Text),
    _value("legs", Text),
    _time("recorded_at"),
    _value("transaction_id", UUID),
    _value("batch", BigInteger),
    _value("position", Integer),
    _time("ended_at", nullable=True),
    _value("scope", Text, nullable=True),
)

hold_lots = Table(
    "hold_lots",
    metadata,
    _key("partition", SmallInteger),
    _key("hold_id", UUID),
    _key("account", Text),
    _key("unit", Text),
    _key("lot_id", UUID),
    _value("placed", BigInteger),
    _value("held", BigInteger),
    _value("estimated", BigInteger),
)

# What an account was granted for a payment; what has gone back of it for good, and what open claims are about, in all.
payments = Table(
    "payments",
    metadata,
    _key("partition", SmallInteger),
    _key("payment", Text),
    _key("account", Text),
    _value("unit", Text, nullable=True),
    _value("paid", BigInteger),
    _value("claimed", Numeric),
    _time("recorded_at"),
    _value("batch", BigInteger),
    _value("position", Integer),
    _value("disputed", Numeric),
)

claims = Table(
    "claims",
    metadata,
    _key("partition", SmallInteger),
    _key("payment", Text),
    _key("account", Text),
    _key("claim", Text),
    _value("reason", Text),
    _value("state", Text),
    _value("claimed", BigInteger),
    _value("revision", BigInteger),
    _time("occurred_at"),
    _time("recorded_at"),
    _value("transaction_id", UUID),
    _value("batch", BigInteger),
    _value("position", Integer),
)

RECORD: Final = (journal, commands, bundles, charge_lines, reversals, signatures)
PROJECTIONS: Final = (accounts, wallets, rules, lots, holds, hold_lots, payments, claims)

outbox = outbox_table(metadata)
relayed = relayed_table(metadata)
leases = leases_table(metadata)
members = members_table(metadata)
dead_letters = dead_letters_table(metadata)


def place(table: Table, column: str) -> int:
    """Where a column stands in a table's rows."""
    return list(table.columns.keys()).index(column)
