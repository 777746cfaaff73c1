"""Corrections are undone in the reverse of the order in which they were done."""

from alembic import op

revision = "0009"
down_revision = "0008"

STATEMENTS: tuple[str, ...] = (
    """
    CREATE INDEX correction_items_done
        ON correction_items (partition, correction, recorded_at, occurred_at, source, event_id)
    """,
)


def upgrade() -> None:
    """Change the schema."""
    for statement in STATEMENTS:
        op.execute(statement)
