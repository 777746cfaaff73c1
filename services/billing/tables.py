"""The tables of the schema `billing`. A payment has no partition until it is known whose it is; facts about it do."""

from typing import Final

from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
)

from services.kit.dead_letters import dead_letters_table
from services.kit.leases import leases_table, members_table
from services.kit.outbox import outbox_table, relayed_table

metadata: Final = MetaData()


def _time(name: str, *, nullable: bool = False) -> Column[object]:
    return Column(name, TIMESTAMP(timezone=True), nullable=nullable)


# 65 rows: the partitions, and the lane of what billing says to itself. Whoever numbers a message holds its row.
heads = Table(
    "heads",
    metadata,
    Column("partition", SmallInteger, primary_key=True, autoincrement=False),
    Column("outbox_number", BigInteger, nullable=False),
    _time("recorded_at"),
)

# The inbox: whatever Stripe signed, byte for byte, for ever. `number` is that of its message to ourselves.
stripe_events = Table(
    "stripe_events",
    metadata,
    Column("event", Text, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("type", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    _time("created_at", nullable=True),
    _time("received_at"),
    Column("deliveries", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("detail", Text),
    Column("payment", Text),
    Column("failures", BigInteger, nullable=False),
    _time("processed_at", nullable=True),
    UniqueConstraint("number", name="stripe_events_number"),
    Index("stripe_events_of_payment", "payment"),
    Index("stripe_events_by_status", "status", "number"),
)

# What Stripe answered when it was asked, because of an event, for the refunds of its payment.
listed_refunds = Table(
    "listed_refunds",
    metadata,
    Column("event", Text, ForeignKey("stripe_events.event"), primary_key=True),
    Column("payment", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    _time("listed_at"),
    Index("listed_refunds_of_payment", "payment"),
)

# What was agreed on when a checkout was opened: the terms a payment is held against, whatever the catalogue says later.
checkouts = Table(
    "checkouts",
    metadata,
    Column("checkout", Text, primary_key=True),
    Column("principal", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("body_hash", LargeBinary, nullable=False),
    Column("account", Text, nullable=False),
    Column("package", Text, nullable=False),
    Column("quantity", Integer, nullable=False),
    Column("price_minor", BigInteger, nullable=False),
    Column("denomination", Text, nullable=False),
    Column("unit", Text, nullable=False),
    Column("paid", BigInteger, nullable=False),
    Column("bonus", BigInteger, nullable=False),
    Column("title", Text, nullable=False),
    Column("success_url", Text, nullable=False),
    Column("cancel_url", Text, nullable=False),
    Column("session", Text),
    Column("url", Text),
    _time("expires_at", nullable=True),
    _time("recorded_at"),
    UniqueConstraint("principal", "idempotency_key", name="checkouts_idempotency"),
    UniqueConstraint("session", name="checkouts_session"),
)

# One row per payment intent. From `granted` on its terms never change; `number` is that of the fact that said so.
payments = Table(
    "payments",
    metadata,
    Column("payment", Text, primary_key=True),
    Column("status", Text, nullable=False),
    Column("reason", Text),
    Column("detail", Text),
    Column("session", Text),
    Column("paid_minor", BigInteger),
    Column("denomination", Text),
    _time("paid_at", nullable=True),
    Column("account", Text),
    Column("package", Text),
    Column("quantity", Integer),
    Column("checkout", Text),
    Column("price_minor", BigInteger),
    Column("unit", Text),
    Column("paid", BigInteger),
    Column("bonus", BigInteger),
    Column("partition", SmallInteger),
    Column("number", BigInteger),
    _time("recorded_at"),
    CheckConstraint("status IN ('unpaid', 'unattributed', 'granted')", name="payments_status"),
    CheckConstraint(
        "num_nulls(account, package, quantity, price_minor, unit, paid, bonus, partition, number)"
        " = CASE status WHEN 'granted' THEN 0 ELSE 9 END",
        name="payments_granted_or_not",
    ),
    Index("payments_of_account", "account", "payment"),
    Index("payments_by_status", "status", "payment"),
    Index("payments_of_checkout", "checkout"),
)

# Refunds and disputes as they are now; `told_state`, `told_amount` and `number` are of the last fact about each.
claims = Table(
    "claims",
    metadata,
    Column("claim", Text, primary_key=True),
    Column("payment", Text, ForeignKey("payments.payment"), nullable=False),
    Column("reason", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("claimed_minor", BigInteger, nullable=False),
    Column("denomination", Text, nullable=False),
    _time("claimed_at"),
    Column("told_state", Text),
    Column("told_amount", BigInteger),
    Column("number", BigInteger),
    CheckConstraint("num_nulls(told_state, told_amount, number) IN (0, 3)", name="claims_told_or_not"),
    Index("claims_of_payment", "payment"),
)

# Who said whose an unattributed payment is.
resolutions = Table(
    "resolutions",
    metadata,
    Column("payment", Text, ForeignKey("payments.payment"), primary_key=True),
    Column("event", Text, nullable=False),
    Column("account", Text, nullable=False),
    Column("package", Text, nullable=False),
    Column("quantity", Integer, nullable=False),
    Column("principal", Text, nullable=False),
    _time("recorded_at"),
)

outbox = outbox_table(metadata)
relayed = relayed_table(metadata)
leases = leases_table(metadata)
members = members_table(metadata)
dead_letters = dead_letters_table(metadata)
