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
    Date,
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

# The permanent log, divided by month of use. `bundle_number` and `line_number` say under which line it was charged. Of
# the versions of a use at most one is not superseded, and it alone counts; of one that is void there is none.
usage_log = Table(
    "usage_log",
    metadata,
    _partition(),
    _time("occurred_at", primary_key=True),
    Column("source", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False, server_default=text("0")),
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
    Column("superseded", Boolean, nullable=False, server_default=text("false")),
    # Of a version that a correction made: what its line charged, and what was given back of earlier ones, in steps.
    Column("posted", JSONB),
    CheckConstraint(
        "num_nulls(price_version, line_items, amounts) IN (0, 3) AND num_nulls(bundle_number, line_number) IN (0, 2)"
        " AND (bundle_number IS NULL OR amounts IS NOT NULL)"
        " AND (revision > 0 OR (amounts IS NULL) = (bundle_number IS NULL))",
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
    # How often the body was amended.
    Column("revision", Integer, nullable=False, server_default=text("0")),
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
    *(
        Column(name, BigInteger, nullable=False, server_default=text("0"))
        for name in ("unmapped", "rerouted", "voided")
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
    # What is to be given back.
    Index(
        "price_counters_credit",
        "partition",
        "account",
        "price_id",
        "period",
        postgresql_where=text("credit < 0"),
    ),
)

# What was corrected, why and by whom. Once it is done only an undo changes it. The partition is that of the id.
corrections = Table(
    "corrections",
    metadata,
    _partition(),
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    # What was asked for: under one id only one thing can be.
    Column("body_hash", LargeBinary, nullable=False),
    Column("parameters", JSONB, nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    _time("recorded_at"),
    _time("finished_at", nullable=True),
    # How far a long one is, written with what it did.
    Column("cursor", JSONB),
    Column("counts", JSONB, nullable=False),
    # Signed steps by unit.
    Column("difference", JSONB, nullable=False),
    Column("undone_by", Text),
    Column("undo_reason", Text),
    _time("undone_at", nullable=True),
    CheckConstraint("kind IN ('void', 'amend', 'rerate', 'backfill', 'settle')", name="corrections_kind"),
    CheckConstraint(
        "state IN ('staging', 'running', 'done', 'undoing', 'undone', 'discarded')", name="corrections_state"
    ),
    Index("corrections_recorded_at", "recorded_at", "id"),
    Index("corrections_under_way", "recorded_at", postgresql_where=text("state IN ('running', 'undoing')")),
)

# What a correction did to which use: from which version to which (null: there was, or is, none).
correction_items = Table(
    "correction_items",
    metadata,
    _partition(),
    Column("correction", Text, primary_key=True),
    Column("source", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    _time("occurred_at"),
    Column("account", Text),
    Column("from_revision", Integer),
    Column("to_revision", Integer),
    # The version that says the same now, after later corrections were undone.
    Column("stands_as", Integer),
    # Whether the version it made was charged by it.
    Column("charged", Boolean, nullable=False),
    Column("difference", JSONB, nullable=False),
    # By how much counters of periods moved.
    Column("counted", JSONB),
    # Of use that waited for an alias: as it was before.
    Column("body", LargeBinary),
    _time("recorded_at"),
    Column("undone", Boolean, nullable=False, server_default=text("false")),
    Column("undone_revision", Integer),
    Index("correction_items_event", "partition", "source", "event_id"),
    # In the reverse of it they are undone.
    Index("correction_items_done", "partition", "correction", "recorded_at", "occurred_at", "source", "event_id"),
)

# Events that a backfill is to log, until it is applied and ever after; or until it is discarded.
correction_events = Table(
    "correction_events",
    metadata,
    _partition(),
    Column("correction", Text, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("source", Text, primary_key=True),
    Column("event_id", Text, primary_key=True),
    _time("occurred_at"),
    Column("body_hash", LargeBinary, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index("correction_events_number", "partition", "correction", "number", unique=True),
)

# Months whose use was dropped from the log, and is in files: those of a manifest with this SHA-256.
archived_months = Table(
    "archived_months",
    metadata,
    Column("month", Date, primary_key=True),
    Column("rows", BigInteger, nullable=False),
    Column("amounts", JSONB, nullable=False),
    Column("manifest_hash", LargeBinary, nullable=False),
    _time("recorded_at"),
)

outbox = outbox_table(metadata)
relayed = relayed_table(metadata)
leases = leases_table(metadata)
members = members_table(metadata)
dead_letters = dead_letters_table(metadata)
