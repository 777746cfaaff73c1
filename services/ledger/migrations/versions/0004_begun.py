"""Lots that were granted for later, by when they begin: whose balance is low is told when it has recovered."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the index by which the sweeper finds them."""
    op.execute(
        "CREATE INDEX lots_to_begin ON lots (partition, effective_at, lot_id)"
        " WHERE effective_at > recorded_at AND NOT spent"
    )
