"""The spine: the log, what was seen, what waits, the outbox; and what the runtime role may do with each."""

from alembic import op
from sqlalchemy import MetaData, Table

from services.kit.dead_letters import dead_letters_table
from services.kit.leases import leases_table, members_table
from services.kit.outbox import outbox_table, relayed_table

revision = "0001"
down_revision = None

SEEN_PARTS = 8


def upgrade() -> None:
    """Create everything."""
    for statement in (*TABLES, *FUNCTIONS, *TRIGGERS):
        op.execute(statement)
    _create_kit_tables()
    for statement in GRANTS:
        op.execute(statement)


def _create_kit_tables() -> None:
    metadata = MetaData()
    tables: list[Table] = [
        make(metadata) for make in (outbox_table, relayed_table, leases_table, members_table, dead_letters_table)
    ]
    metadata.create_all(op.get_bind(), tables=tables)


TABLES = (
    """
    CREATE TABLE heads (
        partition smallint PRIMARY KEY CHECK (partition BETWEEN 0 AND 63),
        outbox_number bigint NOT NULL,
        recorded_at timestamptz NOT NULL
    ) WITH (fillfactor = 50)
    """,
    "INSERT INTO heads SELECT n, 0, 'epoch' FROM generate_series(0, 63) AS n",
    """
    CREATE TABLE seen (
        partition smallint NOT NULL,
        source text NOT NULL,
        event_id text NOT NULL,
        body_hash bytea NOT NULL,
        occurred_at timestamptz NOT NULL,
        PRIMARY KEY (partition, source, event_id)
    ) PARTITION BY HASH (partition)
    """,
    *(
        f"CREATE TABLE seen_{part} PARTITION OF seen FOR VALUES WITH (MODULUS {SEEN_PARTS}, REMAINDER {part})"
        for part in range(SEEN_PARTS)
    ),
    """
    CREATE TABLE usage_log (
        partition smallint NOT NULL,
        occurred_at timestamptz NOT NULL,
        source text NOT NULL,
        event_id text NOT NULL,
        account text NOT NULL,
        type text NOT NULL,
        recorded_at timestamptz NOT NULL,
        data jsonb NOT NULL,
        context jsonb,
        price_version text,
        line_items jsonb,
        amounts jsonb,
        bundle_number bigint,
        line_number integer,
        PRIMARY KEY (partition, occurred_at, source, event_id),
        CONSTRAINT usage_log_charged_or_not
            CHECK (num_nulls(price_version, line_items, amounts, bundle_number, line_number) IN (0, 5))
    ) PARTITION BY RANGE (occurred_at)
    """,
    # Whatever its time, use is logged: what no month takes goes here.
    "CREATE TABLE usage_log_other PARTITION OF usage_log DEFAULT",
    """
    CREATE TABLE set_aside (
        partition smallint NOT NULL,
        source text NOT NULL,
        event_id text NOT NULL,
        account text NOT NULL,
        occurred_at timestamptz NOT NULL,
        reason text NOT NULL CONSTRAINT set_aside_reason CHECK (reason IN ('unattributed', 'unpriced')),
        key text NOT NULL,
        recorded_at timestamptz NOT NULL,
        PRIMARY KEY (partition, source, event_id)
    )
    """,
    "CREATE INDEX set_aside_waiting_for ON set_aside (partition, reason, key)",
    """
    CREATE TABLE conflicts (
        partition smallint NOT NULL,
        source text NOT NULL,
        event_id text NOT NULL,
        body_hash bytea NOT NULL,
        first_body_hash bytea NOT NULL,
        account text NOT NULL,
        body bytea NOT NULL,
        received_at timestamptz NOT NULL,
        times bigint NOT NULL,
        PRIMARY KEY (partition, source, event_id, body_hash)
    )
    """,
    """
    CREATE TABLE directory (
        partition smallint NOT NULL,
        account text NOT NULL,
        opened_at timestamptz NOT NULL,
        PRIMARY KEY (partition, account)
    )
    """,
    """
    CREATE TABLE ingest_counters (
        partition smallint NOT NULL,
        source text NOT NULL,
        new bigint NOT NULL,
        duplicate bigint NOT NULL,
        conflicting bigint NOT NULL,
        dead bigint NOT NULL,
        unattributed bigint NOT NULL,
        unpriced bigint NOT NULL,
        charged bigint NOT NULL,
        PRIMARY KEY (partition, source)
    ) WITH (fillfactor = 50)
    """,
)

FUNCTIONS = (
    # The runtime role makes no tables, but it may have a month made. Attaching a table, unlike creating a partition,
    # does not lock the log against those who read or write it.
    """
    CREATE FUNCTION ensure_usage_month(any_day date) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = metering, pg_temp SET timezone = 'UTC' AS $$
    DECLARE
        month timestamp := date_trunc('month', any_day::timestamp);
        name text := 'usage_log_' || to_char(month, 'YYYY_MM');
    BEGIN
        IF month < '2020-01-01' OR month > now() AT TIME ZONE 'UTC' + interval '3 months' THEN
            RAISE EXCEPTION 'no month is made for %', any_day;
        END IF;
        PERFORM pg_advisory_xact_lock(hashtext('metering.usage_log'));
        IF to_regclass(format('metering.%I', name)) IS NOT NULL THEN
            RETURN false;
        END IF;
        EXECUTE format('CREATE TABLE %I (LIKE usage_log INCLUDING ALL)', name);
        EXECUTE format('CREATE TRIGGER never_truncated BEFORE TRUNCATE ON %I EXECUTE FUNCTION refuse_change()', name);
        EXECUTE format('ALTER TABLE usage_log ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                       name, month::timestamptz, (month + interval '1 month')::timestamptz);
        RETURN true;
    END $$
    """,
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% on % is refused: it is only ever added to', TG_OP, TG_TABLE_NAME;
    END $$
    """,
    """
    CREATE FUNCTION only_charge_once() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF OLD.bundle_number IS NOT NULL OR NEW.bundle_number IS NULL
           OR (OLD.partition, OLD.occurred_at, OLD.source, OLD.event_id, OLD.account, OLD.type, OLD.recorded_at,
               OLD.data, OLD.context)
              IS DISTINCT FROM
              (NEW.partition, NEW.occurred_at, NEW.source, NEW.event_id, NEW.account, NEW.type, NEW.recorded_at,
               NEW.data, NEW.context)
        THEN
            RAISE EXCEPTION 'a change of % is refused: logged use is charged once, and nothing else', TG_TABLE_NAME;
        END IF;
        RETURN NEW;
    END $$
    """,
)

TRIGGERS = (
    "CREATE TRIGGER only_charged_once BEFORE UPDATE ON usage_log FOR EACH ROW EXECUTE FUNCTION only_charge_once()",
    "CREATE TRIGGER never_deleted BEFORE DELETE ON usage_log FOR EACH ROW EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER never_changed BEFORE UPDATE OR DELETE ON seen FOR EACH ROW EXECUTE FUNCTION refuse_change()",
    *(
        f"CREATE TRIGGER never_truncated BEFORE TRUNCATE ON {table} EXECUTE FUNCTION refuse_change()"
        for table in ("usage_log", "usage_log_other", "seen", *(f"seen_{part}" for part in range(SEEN_PARTS)))
    ),
)

GRANTS = (
    "GRANT SELECT ON schema_version TO metering",
    "GRANT SELECT, UPDATE (outbox_number, recorded_at) ON heads TO metering",
    "GRANT SELECT, INSERT ON seen TO metering",
    (
        "GRANT SELECT, INSERT, UPDATE (price_version, line_items, amounts, bundle_number, line_number)"
        " ON usage_log TO metering"
    ),
    "GRANT SELECT, INSERT, UPDATE (reason, key), DELETE ON set_aside TO metering",
    "GRANT SELECT, INSERT, UPDATE (times) ON conflicts TO metering",
    "GRANT SELECT, INSERT ON directory TO metering",
    (
        "GRANT SELECT, INSERT, UPDATE (new, duplicate, conflicting, dead, unattributed, unpriced, charged)"
        " ON ingest_counters TO metering"
    ),
    # Kept for ever: the bundles are the record of what was charged.
    "GRANT SELECT, INSERT ON outbox TO metering",
    "GRANT SELECT, INSERT, UPDATE ON relayed TO metering",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON leases TO metering",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON members TO metering",
    "GRANT SELECT, INSERT, UPDATE (redriven_at, redriven_by) ON dead_letters TO metering",
    "GRANT EXECUTE ON FUNCTION ensure_usage_month(date) TO metering",
)
