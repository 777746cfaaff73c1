"""The tables of the schema `metering`. All of business begin with `partition`: it is what metering is ever divided by.

Only the price book is everybody's.
"""

from typing import Final

from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
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
    # As sent, where that is not the account.
    Column("subject", Text),
    CheckConstraint(
        "num_nulls(price_version, line_items, amounts, bundle_number, line_number) IN (0, 5)",
        name="usage_log_charged_or_not",
    ),
    Index("usage_log_account", "partition", "account", "occurred_at"),
    Index("usage_log_subject", "subject", "type", "occurred_at", postgresql_where=text("subject IS NOT NULL")),
    postgresql_partition_by="RANGE (occurred_at)",
)

# Not charged yet; `key` is what it waits for. It is logged, unless it is unmapped: then nobody knows whose it is, and
# its body is here.
set_aside = Table(
    "set_aside",
    metadata,
    _partition(),
    Column("source", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    Column("account", Text),
    _time("occurred_at"),
    Column("reason", Text, nullable=False),
    Column("key", Text, nullable=False),
    _time("recorded_at"),
    Column("body", LargeBinary),
    CheckConstraint("reason IN ('unattributed', 'unpriced', 'unmapped')", name="set_aside_reason"),
    CheckConstraint(
        "(reason = 'unmapped') = (account IS NULL) AND (reason = 'unmapped') = (body IS NOT NULL)",
        name="set_aside_unmapped",
    ),
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

# What publishers call accounts, in the partition of what they call them. `pending`: use that waited for it may be left.
aliases = Table(
    "aliases",
    metadata,
    _partition(),
    Column("subject", Text, primary_key=True),
    Column("account", Text, nullable=False),
    _time("recorded_at"),
    Column("recorded_by", Text, nullable=False),
    Column("pending", Boolean, nullable=False),
    Index("aliases_pending", "partition", "subject", postgresql_where=text("pending")),
)

# Use that is on its way to the partition of its account. A row is gone when the stream has it.
reroutes = Table(
    "reroutes",
    metadata,
    _partition(),
    Column("source", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    Column("body_hash", LargeBinary, primary_key=True),
    Column("to_partition", SmallInteger, nullable=False),
    Column("account", Text),
    _time("occurred_at"),
    Column("body", LargeBinary, nullable=False),
    _time("recorded_at"),
)

# What became of reports that somebody waits to hear of. Forgotten when told, or soon after.
answers = Table(
    "answers",
    metadata,
    _partition(),
    Column("question", Text, primary_key=True),
    Column("outcome", Text, nullable=False),
    _time("recorded_at"),
    Index("answers_recorded_at", "recorded_at"),
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
    *(Column(name, BigInteger, nullable=False, server_default=text("0")) for name in ("unmapped", "rerouted")),
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
    # Own prices, surcharges, overrides, if there are any.
    Column("further", JSONB),
    UniqueConstraint("effective_at", name="price_versions_effective_at"),
)

# Never changed, and never deleted from: a change, also that a meter is gone, is a further version of its slug.
meter_versions = Table(
    "meter_versions",
    metadata,
    Column("slug", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("meter_id", Text, nullable=False),
    _time("effective_at"),
    # `catalogue`, or the principal who said so; and under which version the catalogue says it.
    Column("source", Text, nullable=False),
    Column("catalogue_version", Integer),
    Column("deleted", Boolean, nullable=False),
    Column("definition", JSONB, nullable=False),
    UniqueConstraint("slug", "catalogue_version", name="meter_versions_catalogue_version"),
    Index("meter_versions_meter_id", "meter_id"),
)

# What was counted under own prices, for whom, in the period that began then. `credit` is in steps of the price's unit.
price_counters = Table(
    "price_counters",
    metadata,
    _partition(),
    Column("account", Text, primary_key=True),
    Column("price_id", Text, primary_key=True),
    _time("period", primary_key=True),
    Column("quantity", Numeric, nullable=False),
    Column("credit", BigInteger, nullable=False),
)

outbox = outbox_table(metadata)
relayed = relayed_table(metadata)
leases = leases_table(metadata)
members = members_table(metadata)
dead_letters = dead_letters_table(metadata)
