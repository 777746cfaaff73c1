"""The price book: versions that are never changed. And an index by which use that has a price by now is found."""

from alembic import op

revision = "0002"
down_revision = "0001"

STATEMENTS = (
    """
    CREATE TABLE price_versions (
        id text PRIMARY KEY,
        effective_at timestamptz NOT NULL CONSTRAINT price_versions_effective_at UNIQUE,
        recorded_at timestamptz NOT NULL,
        source text NOT NULL,
        models jsonb NOT NULL
    )
    """,
    (
        "CREATE TRIGGER never_changed BEFORE UPDATE OR DELETE ON price_versions"
        " FOR EACH ROW EXECUTE FUNCTION refuse_change()"
    ),
    "CREATE TRIGGER never_truncated BEFORE TRUNCATE ON price_versions EXECUTE FUNCTION refuse_change()",
    "GRANT SELECT, INSERT ON price_versions TO metering",
    # Use of a model that has no price yet may be much, and is looked through for what happened when it has one.
    "DROP INDEX set_aside_waiting_for",
    "CREATE INDEX set_aside_waiting_for ON set_aside (partition, reason, key, occurred_at)",
)


def upgrade() -> None:
    """Create the table, and widen the index."""
    for statement in STATEMENTS:
        op.execute(statement)
