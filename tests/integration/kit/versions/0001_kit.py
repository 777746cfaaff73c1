"""A schema with the kit's tables and nothing else."""

from alembic import op
from sqlalchemy import MetaData

from services.kit.dead_letters import dead_letters_table
from services.kit.leases import leases_table, members_table
from services.kit.outbox import outbox_table, relayed_table

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables, and let the runtime role use them."""
    metadata = MetaData()
    for make in (outbox_table, relayed_table, leases_table, members_table, dead_letters_table):
        make(metadata)
    metadata.create_all(op.get_bind())
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON outbox, relayed, leases, members, dead_letters TO kit")
