"""Claims on payments: what was granted for a payment, what is claimed of it, and what that takes of its lots."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns to lots, two projections, and the indexes by which payments and open holds are found."""
    for statement in STATEMENTS:
        op.execute(statement)


STATEMENTS = (
    """
    ALTER TABLE lots
        ADD COLUMN clawed bigint NOT NULL DEFAULT 0 CHECK (clawed >= 0),
        ADD COLUMN clawed_spent bigint NOT NULL DEFAULT 0 CHECK (clawed_spent >= 0),
        ADD COLUMN pending bigint NOT NULL DEFAULT 0,
        ADD CHECK (pending >= 0 AND pending <= held)
    """,
    """
    CREATE INDEX lots_of_payment ON lots (partition, reference)
    WHERE reference IS NOT NULL AND kind IN ('purchase', 'bonus')
    """,
    """
    CREATE TABLE payments (
        partition smallint NOT NULL,
        payment text NOT NULL,
        account text NOT NULL,
        unit text,
        paid bigint NOT NULL CHECK (paid >= 0),
        claimed numeric NOT NULL CHECK (claimed >= 0),
        recorded_at timestamptz NOT NULL,
        batch bigint NOT NULL,
        position integer NOT NULL,
        PRIMARY KEY (partition, payment, account)
    )
    """,
    """
    CREATE TABLE claims (
        partition smallint NOT NULL,
        payment text NOT NULL,
        account text NOT NULL,
        claim text NOT NULL,
        reason text NOT NULL CHECK (reason IN ('refund', 'dispute')),
        state text NOT NULL CHECK (state IN ('final', 'void')),
        claimed bigint NOT NULL CHECK (claimed >= 0),
        revision bigint NOT NULL,
        occurred_at timestamptz NOT NULL,
        recorded_at timestamptz NOT NULL,
        transaction_id uuid NOT NULL,
        batch bigint NOT NULL,
        position integer NOT NULL,
        PRIMARY KEY (partition, payment, account, claim)
    )
    """,
    "CREATE INDEX holds_placed ON holds (partition, hold_id) WHERE status = 'placed'",
    "GRANT SELECT, INSERT, UPDATE ON payments, claims TO ledger",
)
