"""What Postgres does by itself for tables that only grow: once per row, and nothing for what no question asks about."""

from alembic import op

revision = "0010"
down_revision = "0009"

SEEN_PARTS = 8
# No plan depends on what they hold, and to sort and compare them was most of what gathering statistics took.
UNASKED = ("data", "context", "line_items", "amounts", "posted")

NO_STATISTICS = ", ".join(f"ALTER COLUMN {column} SET STATISTICS 0" for column in UNASKED)
# A row that never changes is frozen when it is first looked at, so that no later vacuum reads it again.
FROZEN_AT_ONCE = "autovacuum_freeze_min_age = 0"

STATEMENTS: tuple[str, ...] = (
    f"ALTER TABLE usage_log {NO_STATISTICS}",
    f"""
    DO $$
    DECLARE
        part regclass;
    BEGIN
        FOR part IN SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'usage_log'::regclass LOOP
            EXECUTE format('ALTER TABLE %s SET ({FROZEN_AT_ONCE})', part);
        END LOOP;
    END $$
    """,
    # As before; and a month is kept as those that are there. Neither is copied with LIKE.
    f"""
    CREATE OR REPLACE FUNCTION ensure_usage_month(any_day date) RETURNS boolean
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
        EXECUTE format('CREATE TABLE %I (LIKE usage_log INCLUDING ALL) WITH ({FROZEN_AT_ONCE})', name);
        EXECUTE format('ALTER TABLE %I {NO_STATISTICS}', name);
        EXECUTE format('CREATE TRIGGER never_truncated BEFORE TRUNCATE ON %I EXECUTE FUNCTION refuse_change()', name);
        EXECUTE format('ALTER TABLE usage_log ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                       name, month::timestamptz, (month + interval '1 month')::timestamptz);
        RETURN true;
    END $$
    """,
    "ALTER TABLE seen ALTER COLUMN body_hash SET STATISTICS 0",
    # Asked by key alone, whatever the statistics say.
    *(
        f"ALTER TABLE seen_{part} SET ({FROZEN_AT_ONCE}, autovacuum_analyze_scale_factor = 1)"
        for part in range(SEEN_PARTS)
    ),
)


def upgrade() -> None:
    """Change the schema."""
    for statement in STATEMENTS:
        op.execute(statement)
