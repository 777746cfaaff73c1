"""Corrections: versions of a use in the log, what each correction did to which use, and what is staged for one."""

from alembic import op

revision = "0006"
down_revision = "0005"

STATEMENTS: tuple[str, ...] = (
    """
    ALTER TABLE usage_log
        ADD COLUMN revision integer NOT NULL DEFAULT 0,
        ADD COLUMN superseded boolean NOT NULL DEFAULT false,
        ADD COLUMN posted jsonb
    """,
    "ALTER TABLE usage_log DROP CONSTRAINT usage_log_pkey",
    "ALTER TABLE usage_log ADD PRIMARY KEY (partition, occurred_at, source, event_id, revision)",
    "ALTER TABLE usage_log DROP CONSTRAINT usage_log_charged_or_not",
    # A correction may have charged a use and have had nothing to charge more.
    """
    ALTER TABLE usage_log ADD CONSTRAINT usage_log_charged_or_not CHECK (
        num_nulls(price_version, line_items, amounts) IN (0, 3) AND num_nulls(bundle_number, line_number) IN (0, 2)
        AND (bundle_number IS NULL OR amounts IS NOT NULL)
        AND (revision > 0 OR (amounts IS NULL) = (bundle_number IS NULL))
    )
    """,
    "GRANT UPDATE (superseded) ON usage_log TO metering",
    # As in 0003, with the revision; and a version of a use may be followed by another one, or by none.
    """
    CREATE OR REPLACE FUNCTION only_charge_once() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF (OLD.partition, OLD.occurred_at, OLD.source, OLD.event_id, OLD.account, OLD.type, OLD.recorded_at,
            OLD.data, OLD.context, OLD.subject, OLD.revision, OLD.posted)
           IS DISTINCT FROM
           (NEW.partition, NEW.occurred_at, NEW.source, NEW.event_id, NEW.account, NEW.type, NEW.recorded_at,
            NEW.data, NEW.context, NEW.subject, NEW.revision, NEW.posted)
           OR OLD.superseded
           OR (CASE WHEN NEW.superseded
              THEN (OLD.price_version, OLD.line_items, OLD.amounts, OLD.bundle_number, OLD.line_number)
                   IS DISTINCT FROM
                   (NEW.price_version, NEW.line_items, NEW.amounts, NEW.bundle_number, NEW.line_number)
              ELSE OLD.price_version IS NOT NULL OR NEW.bundle_number IS NULL
              END)
        THEN
            RAISE EXCEPTION 'a change of % is refused: logged use is charged once, and superseded once',
                TG_TABLE_NAME;
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE OR REPLACE FUNCTION only_move_to_account() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF OLD.price_version IS NOT NULL OR OLD.subject IS NOT NULL OR NOT EXISTS (
            SELECT FROM metering.aliases WHERE partition = OLD.partition AND subject = OLD.account
        ) THEN
            RAISE EXCEPTION '% on % is refused: it is only ever added to', TG_OP, TG_TABLE_NAME;
        END IF;
        RETURN OLD;
    END $$
    """,
    # All versions leave; what is logged anew, or sent on, is the one that counts.
    """
    CREATE OR REPLACE FUNCTION take_from_log(
        any_partition smallint, times timestamptz[], sources text[], event_ids text[]
    )
    RETURNS SETOF usage_log
    LANGUAGE sql SECURITY DEFINER SET search_path = metering, pg_temp AS $$
        WITH taken AS (
            DELETE FROM usage_log AS l USING unnest(times, sources, event_ids) AS t (occurred_at, source, event_id)
            WHERE (l.partition, l.occurred_at, l.source, l.event_id)
                = (any_partition, t.occurred_at, t.source, t.event_id)
            RETURNING l.*
        )
        SELECT * FROM taken WHERE NOT superseded
    $$
    """,
    "ALTER TABLE set_aside ADD COLUMN revision integer NOT NULL DEFAULT 0",
    "ALTER TABLE ingest_counters ADD COLUMN voided bigint NOT NULL DEFAULT 0",
    "GRANT UPDATE (voided) ON ingest_counters TO metering",
    """
    CREATE TABLE corrections (
        partition smallint NOT NULL,
        id text NOT NULL,
        kind text NOT NULL CONSTRAINT corrections_kind CHECK (kind IN ('void', 'amend', 'rerate', 'backfill')),
        state text NOT NULL
            CONSTRAINT corrections_state CHECK (state IN ('staging', 'running', 'done', 'undoing', 'undone')),
        body_hash bytea NOT NULL,
        parameters jsonb NOT NULL,
        reason text NOT NULL,
        actor text NOT NULL,
        recorded_at timestamptz NOT NULL,
        finished_at timestamptz,
        cursor jsonb,
        counts jsonb NOT NULL,
        difference jsonb NOT NULL,
        undone_by text,
        undo_reason text,
        undone_at timestamptz,
        PRIMARY KEY (partition, id)
    ) WITH (fillfactor = 50)
    """,
    "CREATE INDEX corrections_recorded_at ON corrections (recorded_at, id)",
    "CREATE INDEX corrections_under_way ON corrections (recorded_at) WHERE state IN ('running', 'undoing')",
    (
        "GRANT SELECT, INSERT, UPDATE (state, finished_at, cursor, counts, difference, undone_by, undo_reason,"
        " undone_at) ON corrections TO metering"
    ),
    """
    CREATE TABLE correction_items (
        partition smallint NOT NULL,
        correction text NOT NULL,
        source text NOT NULL,
        event_id text NOT NULL,
        occurred_at timestamptz NOT NULL,
        account text,
        from_revision integer,
        to_revision integer,
        stands_as integer,
        charged boolean NOT NULL,
        difference jsonb NOT NULL,
        counted jsonb,
        body bytea,
        recorded_at timestamptz NOT NULL,
        undone boolean NOT NULL DEFAULT false,
        undone_revision integer,
        PRIMARY KEY (partition, correction, source, event_id)
    ) WITH (fillfactor = 80)
    """,
    "CREATE INDEX correction_items_event ON correction_items (partition, source, event_id)",
    "GRANT SELECT, INSERT, UPDATE (stands_as, undone, undone_revision) ON correction_items TO metering",
    """
    CREATE TABLE correction_events (
        partition smallint NOT NULL,
        correction text NOT NULL,
        number bigint NOT NULL,
        source text NOT NULL,
        event_id text NOT NULL,
        occurred_at timestamptz NOT NULL,
        body_hash bytea NOT NULL,
        body bytea NOT NULL,
        PRIMARY KEY (partition, correction, source, event_id)
    )
    """,
    "CREATE UNIQUE INDEX correction_events_number ON correction_events (partition, correction, number)",
    "GRANT SELECT, INSERT ON correction_events TO metering",
    *(
        f"CREATE TRIGGER never_{word} BEFORE {verb} ON {table} {each} EXECUTE FUNCTION refuse_change()"
        for table in ("corrections", "correction_items")
        for word, verb, each in (("deleted", "DELETE", "FOR EACH ROW"), ("truncated", "TRUNCATE", ""))
    ),
)


def upgrade() -> None:
    """Change the schema."""
    for statement in STATEMENTS:
        op.execute(statement)
