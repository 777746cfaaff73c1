"""Which months of the log are in files. Only the owner, who drops them and brings them back, writes it."""

from alembic import op

revision = "0007"
down_revision = "0006"

STATEMENTS: tuple[str, ...] = (
    """
    CREATE TABLE archived_months (
        month date PRIMARY KEY CHECK (month = date_trunc('month', month::timestamp)),
        rows bigint NOT NULL,
        amounts jsonb NOT NULL,
        manifest_hash bytea NOT NULL,
        recorded_at timestamptz NOT NULL
    )
    """,
    "GRANT SELECT ON archived_months TO metering",
)


def upgrade() -> None:
    """Make the table."""
    for statement in STATEMENTS:
        op.execute(statement)
