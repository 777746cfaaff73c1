"""The engine: recurring grants, scopes, expiry, levels, reversals, signatures; what is due; indexes of the readers."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add what the whole engine keeps. The new columns of projections that have rows are right after a replay."""
    for statement in (*RECORD, *PROJECTIONS, *FUNCTIONS, *TRIGGERS, *GRANTS):
        op.execute(statement)


RECORD = (
    # Where rows stand in the order of their time an index of page ranges costs next to nothing per row. By it the
    # command, and the charge lines, of a transaction are found: its time is known.
    "ALTER TABLE charge_lines ADD COLUMN recorded_at timestamptz",
    "ALTER TABLE charge_lines DISABLE TRIGGER never_changed",
    """
    UPDATE charge_lines c SET recorded_at = j.recorded_at
    FROM journal j WHERE j.partition = c.partition AND j.batch = c.batch AND j.position = 1
    """,
    "ALTER TABLE charge_lines ENABLE TRIGGER never_changed, ALTER COLUMN recorded_at SET NOT NULL",
    "CREATE INDEX charge_lines_of_time ON charge_lines USING brin (recorded_at) WITH (pages_per_range = 16)",
    "CREATE INDEX commands_of_time ON commands USING brin (recorded_at) WITH (pages_per_range = 16)",
    """
    CREATE TABLE reversals (
        partition smallint NOT NULL,
        source text NOT NULL,
        event_id text NOT NULL,
        revision integer NOT NULL,
        batch bigint NOT NULL,
        position integer NOT NULL,
        transaction_id uuid NOT NULL,
        split text NOT NULL,
        reason text,
        recorded_at timestamptz NOT NULL,
        PRIMARY KEY (partition, source, event_id, revision, batch, position)
    )
    """,
    # The same two questions: which reversals does a transaction hold.
    "CREATE INDEX reversals_of_time ON reversals USING brin (recorded_at) WITH (pages_per_range = 16)",
    """
    CREATE TABLE signatures (
        partition smallint NOT NULL,
        batch bigint NOT NULL CHECK (batch > 0),
        chain_hash bytea NOT NULL CHECK (length(chain_hash) = 32),
        commit_id text NOT NULL,
        signature bytea NOT NULL CHECK (length(signature) = 64),
        key_id text NOT NULL,
        heads text NOT NULL,
        PRIMARY KEY (partition, batch)
    )
    """,
)

PROJECTIONS = (
    "ALTER TABLE accounts ADD COLUMN due_at timestamptz",
    # What the sweeper asks: which accounts have something due.
    "CREATE INDEX accounts_due ON accounts (partition, due_at) WHERE due_at IS NOT NULL",
    # Trees, and accounts by prefix: byte order, whatever the database's own is.
    'CREATE INDEX accounts_in_order ON accounts (account COLLATE "C")',
    """
    ALTER TABLE wallets
        ADD COLUMN thresholds text NOT NULL DEFAULT '[]',
        ADD COLUMN uncapped bigint NOT NULL DEFAULT 0 CHECK (uncapped >= 0),
        ADD COLUMN owed bigint NOT NULL DEFAULT 0 CHECK (owed >= 0),
        ADD COLUMN owing bigint NOT NULL DEFAULT 0 CHECK (owing >= 0 AND owing <= held),
        ADD COLUMN full_posted bigint NOT NULL DEFAULT 0,
        ADD COLUMN low text NOT NULL DEFAULT '[]'
    """,
    """
    CREATE TABLE rules (
        partition smallint NOT NULL,
        account text NOT NULL,
        unit text NOT NULL,
        rule_id text NOT NULL,
        rule text NOT NULL,
        next_period bigint NOT NULL,
        ended boolean NOT NULL,
        recorded_at timestamptz NOT NULL,
        batch bigint NOT NULL,
        position integer NOT NULL,
        PRIMARY KEY (partition, account, unit, rule_id)
    ) WITH (fillfactor = 70)
    """,
    """
    ALTER TABLE lots
        ADD COLUMN rule_id text,
        ADD COLUMN period bigint,
        ADD COLUMN expired bigint NOT NULL DEFAULT 0 CHECK (expired >= 0),
        ADD COLUMN void boolean NOT NULL DEFAULT false,
        ADD COLUMN voided bigint NOT NULL DEFAULT 0 CHECK (voided >= 0),
        ADD COLUMN pending_frozen bigint NOT NULL DEFAULT 0,
        ADD COLUMN repaid text,
        ADD CHECK (pending_frozen >= 0 AND pending_frozen <= held),
        ADD CHECK ((rule_id IS NULL) = (period IS NULL))
    """,
    # Late charges: lots of a wallet that are spent, and may yet be charged, or say whose period it was.
    """
    CREATE INDEX lots_of_past ON lots (partition, account, expires_at)
    WHERE spent AND (rule_id IS NOT NULL OR expired > 0)
    """,
    # Claims, and statements by reference: every lot of it, wherever it was transferred to.
    "DROP INDEX lots_of_payment",
    "CREATE INDEX lots_of_reference ON lots (partition, reference) WHERE reference IS NOT NULL",
    """
    ALTER TABLE holds
        ADD COLUMN scope text,
        DROP CONSTRAINT holds_status_check,
        ADD CHECK (status IN ('placed', 'released', 'expired', 'settled', 'estimated'))
    """,
    # Open holds of a tree. Overdue ones have their own: holds_open.
    "DROP INDEX holds_placed",
    "CREATE INDEX holds_of_account ON holds (partition, account COLLATE \"C\", hold_id) WHERE status = 'placed'",
    "ALTER TABLE hold_lots ADD COLUMN estimated bigint NOT NULL DEFAULT 0 CHECK (estimated >= 0)",
    "ALTER TABLE payments ADD COLUMN disputed numeric NOT NULL DEFAULT 0 CHECK (disputed >= 0)",
    """
    ALTER TABLE claims
        DROP CONSTRAINT claims_state_check,
        ADD CHECK (state IN ('open', 'final', 'void'))
    """,
)

FUNCTIONS = (
    # Batches are numbered without gaps, each has an entry in the first position, and their times rise: no index on
    # the journal's times is needed to find the last batch by a time. 0: there is none.
    """
    CREATE FUNCTION batch_at(of_partition smallint, at timestamptz) RETURNS bigint LANGUAGE plpgsql STABLE AS $$
    DECLARE
        low bigint := 0;
        high bigint;
        middle bigint;
    BEGIN
        SELECT batch INTO high FROM heads WHERE partition = of_partition;
        WHILE low < high LOOP
            middle := (low + high + 1) / 2;
            IF (SELECT recorded_at <= at FROM journal
                WHERE partition = of_partition AND batch = middle AND position = 1) THEN
                low := middle;
            ELSE
                high := middle - 1;
            END IF;
        END LOOP;
        RETURN low;
    END $$
    """,
)

TRIGGERS = tuple(
    statement
    for table in ("reversals", "signatures")
    for statement in (
        f"CREATE TRIGGER never_changed BEFORE UPDATE OR DELETE ON {table}"  # noqa: ISC004  # one statement
        " FOR EACH ROW EXECUTE FUNCTION refuse_change()",
        f"CREATE TRIGGER never_truncated BEFORE TRUNCATE ON {table} EXECUTE FUNCTION refuse_change()",
    )
)

GRANTS = (
    "GRANT SELECT, INSERT ON reversals, signatures TO ledger",
    "GRANT SELECT, INSERT, UPDATE ON rules TO ledger",
    "GRANT EXECUTE ON FUNCTION batch_at TO ledger",
)
