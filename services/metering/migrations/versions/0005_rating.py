"""Own prices, overrides, and what a receipt needs."""

from alembic import op

revision = "0005"
down_revision = "0004"

STATEMENTS: tuple[str, ...] = (
    "ALTER TABLE price_versions ADD COLUMN further jsonb",
    """
    CREATE TABLE price_counters (
        partition smallint NOT NULL,
        account text NOT NULL,
        price_id text NOT NULL,
        period timestamptz NOT NULL,
        quantity numeric NOT NULL,
        credit bigint NOT NULL,
        PRIMARY KEY (partition, account, price_id, period)
    ) WITH (fillfactor = 50)
    """,
    "GRANT SELECT, INSERT, UPDATE (quantity, credit) ON price_counters TO metering",
)


def upgrade() -> None:
    """Change the schema."""
    for statement in STATEMENTS:
        op.execute(statement)
