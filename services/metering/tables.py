"""The tables of the schema `metering`. All of business begin with `partition`: it is what metering is ever divided by.

Only the price book is everybody's.
"""

from typing import Final

from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import JSONB

from services.kit.dead_letters import dead_letters_table
from services.kit.leases import leases_table, members_table
from services.kit.outbox import outbox_table, relayed_table

metadata: Final = MetaData()


def _partition(*, primary_key: bool = True) -> Column[int]:
    return Column("partition", SmallInteger, primary_key=primary_key, autoincrement=False)


def _time(name: str, *, nullable: bool = False, primary_key: bool = False) -> Column[object]:
    return Column(name, TIMESTAMP(timezone=True), nullable=nullable, primary_key=primary_key)


# 64 rows. Whoever charges holds its partition's row, so that numbers have no gaps and the directory stands still.
heads = Table(
    "heads",
    metadata,
    _partition(),
    Column("outbox_number", BigInteger, nullable=False),
    _time("recorded_at"),
)

# What was ever reported. Divided by hash of the partition, never by time, and never deleted from.
seen = Table(
    "seen",
    metadata,
    _partition(),
    Column("source", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    Column("body_hash", LargeBinary, nullable=False),
    _time("occurred_at"),
    postgresql_partition_by="HASH (partition)",
)

# The permanent log, divided by month of use. `bundle_number` and `line_number` say under which line it was charged.
usage_log = Table(
    "usage_log",
    metadata,
    _partition(),
    _time("occurred_at", primary_key=True),
    Column("source", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    Column("account", Text, nullable=False),
    Column("type", Text, nullable=False),
    _time("recorded_at"),
    Column("data", JSONB, nullable=False),
    # CloudEvents attributes beyond the columns: dataschema, extensions.
    Column("context", JSONB),
    Column("price_version", Text),
    Column("line_items", JSONB),
    Column("amounts", JSONB),
    Column("bundle_number", BigInteger),
    Column("line_number", Integer),
    CheckConstraint(
        "num_nulls(price_version, line_items, amounts, bundle_number, line_number) IN (0, 5)",
        name="usage_log_charged_or_not",
    ),
    postgresql_partition_by="RANGE (occurred_at)",
)

# Logged and not charged yet; `key` is what it waits for.
set_aside = Table(
    "set_aside",
    metadata,
    _partition(),
    Column("source", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    Column("account", Text, nullable=False),
    _time("occurred_at"),
    Column("reason", Text, nullable=False),
    Column("key", Text, nullable=False),
    _time("recorded_at"),
    CheckConstraint("reason IN ('unattributed', 'unpriced')", name="set_aside_reason"),
    Index("set_aside_waiting_for", "partition", "reason", "key", "occurred_at"),
)

# The key of a use with another content than the one in the log. Not charged, not lost.
conflicts = Table(
    "conflicts",
    metadata,
    _partition(),
    Column("source", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    Column("body_hash", LargeBinary, primary_key=True),
    Column("first_body_hash", LargeBinary, nullable=False),
    Column("account", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    _time("received_at"),
    Column("times", BigInteger, nullable=False),
)

# The accounts the ledger has opened.
directory = Table(
    "directory",
    metadata,
    _partition(),
    Column("account", Text, primary_key=True),
    _time("opened_at"),
)

ingest_counters = Table(
    "ingest_counters",
    metadata,
    _partition(),
    Column("source", Text, primary_key=True),
    *(
        Column(name, BigInteger, nullable=False)
        for name in ("new", "duplicate", "conflicting", "dead", "unattributed", "unpriced", "charged")
    ),
)

# Never changed, and never deleted from: every charge names the version it was priced under.
price_versions = Table(
    "price_versions",
    metadata,
    Column("id", Text, primary_key=True),
    _time("effective_at"),
    _time("recorded_at"),
    # `catalogue`, or the principal who posted it.
    Column("source", Text, nullable=False),
    Column("models", JSONB, nullable=False),
    UniqueConstraint("effective_at", name="price_versions_effective_at"),
)

outbox = outbox_table(metadata)
relayed = relayed_table(metadata)
leases = leases_table(metadata)
members = members_table(metadata)
dead_letters = dead_letters_table(metadata)
