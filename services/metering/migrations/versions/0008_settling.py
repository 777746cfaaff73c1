"""What counters carry is given back, as corrections of a kind of their own; and a staged backfill can be discarded."""

from alembic import op

revision = "0008"
down_revision = "0007"

STATEMENTS: tuple[str, ...] = (
    "CREATE INDEX price_counters_credit ON price_counters (partition, account, price_id, period) WHERE credit < 0",
    "ALTER TABLE corrections DROP CONSTRAINT corrections_kind, DROP CONSTRAINT corrections_state",
    """
    ALTER TABLE corrections
        ADD CONSTRAINT corrections_kind CHECK (kind IN ('void', 'amend', 'rerate', 'backfill', 'settle')),
        ADD CONSTRAINT corrections_state
            CHECK (state IN ('staging', 'running', 'done', 'undoing', 'undone', 'discarded'))
    """,
    "GRANT DELETE ON correction_events TO metering",
)


def upgrade() -> None:
    """Change the schema."""
    for statement in STATEMENTS:
        op.execute(statement)
