"""Events of any type, foreign subjects and their accounts."""

from alembic import op

revision = "0003"
down_revision = "0002"

STATEMENTS: tuple[str, ...] = (
    "ALTER TABLE usage_log ADD COLUMN subject text",
    "ALTER TABLE set_aside ALTER COLUMN account DROP NOT NULL",
    "ALTER TABLE set_aside ADD COLUMN body bytea",
    "ALTER TABLE set_aside DROP CONSTRAINT set_aside_reason",
    """
    ALTER TABLE set_aside
        ADD CONSTRAINT set_aside_reason CHECK (reason IN ('unattributed', 'unpriced', 'unmapped')),
        ADD CONSTRAINT set_aside_unmapped
            CHECK ((reason = 'unmapped') = (account IS NULL) AND (reason = 'unmapped') = (body IS NOT NULL))
    """,
    """
    ALTER TABLE ingest_counters
        ADD COLUMN unmapped bigint NOT NULL DEFAULT 0,
        ADD COLUMN rerouted bigint NOT NULL DEFAULT 0
    """,
    "GRANT UPDATE (unmapped, rerouted) ON ingest_counters TO metering",
    """
    CREATE TABLE aliases (
        partition smallint NOT NULL,
        subject text NOT NULL,
        account text NOT NULL,
        recorded_at timestamptz NOT NULL,
        recorded_by text NOT NULL,
        pending boolean NOT NULL,
        PRIMARY KEY (partition, subject)
    )
    """,
    "CREATE INDEX aliases_pending ON aliases (partition, subject) WHERE pending",
    "GRANT SELECT, INSERT, UPDATE (pending), DELETE ON aliases TO metering",
    """
    CREATE TABLE reroutes (
        partition smallint NOT NULL,
        source text NOT NULL,
        event_id text NOT NULL,
        body_hash bytea NOT NULL,
        to_partition smallint NOT NULL,
        account text,
        occurred_at timestamptz NOT NULL,
        body bytea NOT NULL,
        recorded_at timestamptz NOT NULL,
        PRIMARY KEY (partition, source, event_id, body_hash)
    )
    """,
    "GRANT SELECT, INSERT, DELETE ON reroutes TO metering",
    """
    CREATE TABLE answers (
        partition smallint NOT NULL,
        question text NOT NULL,
        outcome text NOT NULL,
        recorded_at timestamptz NOT NULL,
        PRIMARY KEY (partition, question)
    )
    """,
    "CREATE INDEX answers_recorded_at ON answers (recorded_at)",
    "GRANT SELECT, INSERT, DELETE ON answers TO metering",
    # As in 0001, with the subject.
    """
    CREATE OR REPLACE FUNCTION only_charge_once() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF OLD.bundle_number IS NOT NULL OR NEW.bundle_number IS NULL
           OR (OLD.partition, OLD.occurred_at, OLD.source, OLD.event_id, OLD.account, OLD.type, OLD.recorded_at,
               OLD.data, OLD.context, OLD.subject)
              IS DISTINCT FROM
              (NEW.partition, NEW.occurred_at, NEW.source, NEW.event_id, NEW.account, NEW.type, NEW.recorded_at,
               NEW.data, NEW.context, NEW.subject)
        THEN
            RAISE EXCEPTION 'a change of % is refused: logged use is charged once, and nothing else', TG_TABLE_NAME;
        END IF;
        RETURN NEW;
    END $$
    """,
    # Use that was logged under a name which turns out to be an alias moves to the account, if it is not charged.
    """
    CREATE FUNCTION only_move_to_account() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF OLD.bundle_number IS NOT NULL OR OLD.subject IS NOT NULL OR NOT EXISTS (
            SELECT FROM metering.aliases WHERE partition = OLD.partition AND subject = OLD.account
        ) THEN
            RAISE EXCEPTION '% on % is refused: it is only ever added to', TG_OP, TG_TABLE_NAME;
        END IF;
        RETURN OLD;
    END $$
    """,
    "DROP TRIGGER never_deleted ON usage_log",
    "CREATE TRIGGER only_moved BEFORE DELETE ON usage_log FOR EACH ROW EXECUTE FUNCTION only_move_to_account()",
    # The runtime role deletes nothing from the log, but it may have such use moved: it logs it anew, or sends it on.
    """
    CREATE FUNCTION take_from_log(any_partition smallint, times timestamptz[], sources text[], event_ids text[])
    RETURNS SETOF usage_log
    LANGUAGE sql SECURITY DEFINER SET search_path = metering, pg_temp AS $$
        DELETE FROM usage_log AS l USING unnest(times, sources, event_ids) AS t (occurred_at, source, event_id)
        WHERE (l.partition, l.occurred_at, l.source, l.event_id)
            = (any_partition, t.occurred_at, t.source, t.event_id)
        RETURNING l.*
    $$
    """,
    "REVOKE ALL ON FUNCTION take_from_log(smallint, timestamptz[], text[], text[]) FROM public",
    "GRANT EXECUTE ON FUNCTION take_from_log(smallint, timestamptz[], text[], text[]) TO metering",
)


def upgrade() -> None:
    """Change the schema."""
    for statement in STATEMENTS:
        op.execute(statement)
