"""The schema of the spine: heads, the record, the projections, the outbox; and what the runtime role may do."""

from alembic import op
from sqlalchemy import MetaData, Table

from services.kit.dead_letters import dead_letters_table
from services.kit.leases import leases_table, members_table
from services.kit.outbox import outbox_table, relayed_table

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create everything."""
    for statement in (*RECORD, *PROJECTIONS, *FUNCTIONS, *TRIGGERS):
        op.execute(statement)
    _create_kit_tables()
    for statement in GRANTS:
        op.execute(statement)


def _create_kit_tables() -> None:
    metadata = MetaData()
    tables: list[Table] = [
        make(metadata) for make in (outbox_table, relayed_table, leases_table, members_table, dead_letters_table)
    ]
    metadata.create_all(op.get_bind(), tables=tables)


RECORD = (
    """
    CREATE TABLE heads (
        partition smallint PRIMARY KEY CHECK (partition BETWEEN 0 AND 63),
        epoch bigint NOT NULL,
        batch bigint NOT NULL,
        chain_hash bytea NOT NULL CHECK (length(chain_hash) = 32),
        recorded_at timestamptz NOT NULL,
        outbox_number bigint NOT NULL,
        charges_number bigint NOT NULL
    ) WITH (fillfactor = 50)
    """,
    """
    INSERT INTO heads
    SELECT partition, 0, 0, decode(repeat('00', 32), 'hex'), 'epoch', 0, 0 FROM generate_series(0, 63) AS p (partition)
    """,
    """
    CREATE TABLE journal (
        partition smallint NOT NULL,
        batch bigint NOT NULL CHECK (batch > 0),
        position integer NOT NULL CHECK (position > 0),
        transaction_id uuid NOT NULL,
        kind text NOT NULL,
        account text NOT NULL,
        unit text,
        lot_id uuid,
        lot_kind text,
        hold_id uuid,
        posted bigint NOT NULL,
        held bigint NOT NULL,
        frozen bigint NOT NULL,
        occurred_at timestamptz NOT NULL,
        recorded_at timestamptz NOT NULL,
        details text,
        hash bytea NOT NULL CHECK (length(hash) = 32),
        PRIMARY KEY (partition, batch, position),
        CHECK ((lot_id IS NULL) = (lot_kind IS NULL)),
        CHECK (unit IS NOT NULL OR (posted = 0 AND held = 0 AND frozen = 0))
    )
    """,
    """
    CREATE INDEX journal_statement ON journal (partition, account, batch, position)
    WHERE left(account, 1) <> '@' AND unit IS NOT NULL
    """,
    """
    CREATE TABLE commands (
        partition smallint NOT NULL,
        principal text NOT NULL,
        idempotency_key text NOT NULL,
        body_hash bytea NOT NULL,
        transaction_id uuid NOT NULL,
        batch bigint NOT NULL,
        recorded_at timestamptz NOT NULL,
        outcome text NOT NULL,
        PRIMARY KEY (partition, principal, idempotency_key)
    )
    """,
    """
    CREATE TABLE bundles (
        partition smallint NOT NULL,
        number bigint NOT NULL CHECK (number > 0),
        body_hash bytea NOT NULL,
        batch bigint NOT NULL,
        transaction_id uuid,
        lines integer NOT NULL,
        lines_dead integer NOT NULL,
        PRIMARY KEY (partition, number)
    )
    """,
    """
    CREATE TABLE charge_lines (
        partition smallint NOT NULL,
        source text NOT NULL,
        event_id text NOT NULL,
        revision integer NOT NULL,
        account text NOT NULL,
        occurred_at timestamptz NOT NULL,
        hold_id uuid,
        scope text NOT NULL,
        price_version text NOT NULL,
        own_key boolean NOT NULL,
        amounts text NOT NULL,
        split text NOT NULL,
        bundle_number bigint,
        line_number integer NOT NULL,
        batch bigint NOT NULL,
        transaction_id uuid NOT NULL,
        PRIMARY KEY (partition, source, event_id, revision)
    )
    """,
)

PROJECTIONS = (
    """
    CREATE TABLE accounts (
        partition smallint NOT NULL,
        account text NOT NULL,
        opened_at timestamptz NOT NULL,
        recorded_at timestamptz NOT NULL,
        batch bigint NOT NULL,
        position integer NOT NULL,
        transaction_id uuid NOT NULL,
        PRIMARY KEY (partition, account)
    )
    """,
    """
    CREATE TABLE wallets (
        partition smallint NOT NULL,
        account text NOT NULL,
        unit text NOT NULL,
        policy text NOT NULL,
        overdraft bigint NOT NULL,
        recorded_at timestamptz NOT NULL,
        batch bigint NOT NULL,
        position integer NOT NULL,
        posted bigint NOT NULL,
        held bigint NOT NULL CHECK (held >= 0),
        frozen bigint NOT NULL CHECK (frozen >= 0),
        overage bigint NOT NULL CHECK (overage >= 0),
        PRIMARY KEY (partition, account, unit)
    ) WITH (fillfactor = 70)
    """,
    """
    CREATE TABLE lots (
        partition smallint NOT NULL,
        lot_id uuid NOT NULL,
        account text NOT NULL,
        unit text NOT NULL,
        kind text NOT NULL,
        priority integer NOT NULL,
        effective_at timestamptz,
        expires_at timestamptz,
        scope text,
        reference text,
        cost_basis text,
        origin text,
        granted bigint NOT NULL,
        occurred_at timestamptz NOT NULL,
        recorded_at timestamptz NOT NULL,
        batch bigint NOT NULL,
        position integer NOT NULL,
        posted bigint NOT NULL,
        held bigint NOT NULL CHECK (held >= 0),
        frozen bigint NOT NULL CHECK (frozen >= 0),
        spent boolean NOT NULL,
        PRIMARY KEY (partition, lot_id),
        CHECK (kind IN ('debt', 'overage', 'uncapped') OR posted >= held + frozen),
        CHECK (kind NOT IN ('debt', 'overage', 'uncapped') OR posted <= 0)
    ) WITH (fillfactor = 70)
    """,
    "CREATE INDEX lots_of_wallet ON lots (partition, account, unit) WHERE NOT spent",
    """
    CREATE TABLE holds (
        partition smallint NOT NULL,
        hold_id uuid NOT NULL,
        account text NOT NULL,
        status text NOT NULL CHECK (status IN ('placed', 'released', 'settled')),
        expires_at timestamptz,
        overdue text NOT NULL,
        legs text NOT NULL,
        recorded_at timestamptz NOT NULL,
        transaction_id uuid NOT NULL,
        batch bigint NOT NULL,
        position integer NOT NULL,
        ended_at timestamptz,
        PRIMARY KEY (partition, hold_id)
    )
    """,
    "CREATE INDEX holds_open ON holds (partition, expires_at) WHERE status = 'placed'",
    """
    CREATE TABLE hold_lots (
        partition smallint NOT NULL,
        hold_id uuid NOT NULL,
        account text NOT NULL,
        unit text NOT NULL,
        lot_id uuid NOT NULL,
        placed bigint NOT NULL,
        held bigint NOT NULL CHECK (held >= 0 AND held <= placed),
        PRIMARY KEY (partition, hold_id, account, unit, lot_id)
    ) WITH (fillfactor = 70)
    """,
)

FUNCTIONS = (
    # The condition of every commit: heads stand where they stood when the batch was decided. Locked in order.
    """
    CREATE FUNCTION advance_heads(
        partitions smallint[], epochs bigint[], batches_before bigint[], batches bigint[], chain_hashes bytea[],
        times timestamptz[], outbox_numbers bigint[], charges_numbers bigint[]
    ) RETURNS void LANGUAGE plpgsql AS $$
    DECLARE
        deposed text;
    BEGIN
        PERFORM FROM heads WHERE partition = ANY (partitions) ORDER BY partition FOR NO KEY UPDATE;
        WITH moved AS (
            UPDATE heads h
            SET batch = n.batch, chain_hash = n.chain_hash, recorded_at = n.recorded_at,
                outbox_number = n.outbox_number, charges_number = n.charges_number
            FROM unnest(partitions, epochs, batches_before, batches, chain_hashes, times, outbox_numbers,
                        charges_numbers)
                 AS n (partition, epoch, batch_before, batch, chain_hash, recorded_at, outbox_number, charges_number)
            WHERE h.partition = n.partition AND h.epoch = n.epoch AND h.batch = n.batch_before
            RETURNING h.partition
        )
        SELECT string_agg(p::text, ',') INTO deposed
        FROM unnest(partitions) AS p WHERE p NOT IN (SELECT partition FROM moved);
        IF deposed IS NOT NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'SC001', MESSAGE = 'the head has moved', DETAIL = deposed;
        END IF;
    END $$
    """,
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% of % is refused: rows are only ever added', TG_OP, TG_TABLE_NAME;
    END $$
    """,
)

TRIGGERS = tuple(
    statement
    for table in ("journal", "commands", "bundles", "charge_lines")
    for statement in (
        f"CREATE TRIGGER never_changed BEFORE UPDATE OR DELETE ON {table}"  # noqa: ISC004  # one statement
        " FOR EACH ROW EXECUTE FUNCTION refuse_change()",
        f"CREATE TRIGGER never_truncated BEFORE TRUNCATE ON {table} EXECUTE FUNCTION refuse_change()",
    )
)

GRANTS = (
    "GRANT SELECT ON schema_version TO ledger",
    "GRANT SELECT, UPDATE (epoch, batch, chain_hash, recorded_at, outbox_number, charges_number) ON heads TO ledger",
    "GRANT SELECT, INSERT ON journal, commands, bundles, charge_lines TO ledger",
    "GRANT SELECT, INSERT, UPDATE ON accounts, wallets, lots, holds, hold_lots TO ledger",
    # What has been relayed can be told again from the journal; the outbox keeps a week of it.
    "GRANT SELECT, INSERT, DELETE ON outbox TO ledger",
    "GRANT SELECT, INSERT, UPDATE ON relayed TO ledger",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON leases TO ledger",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON members TO ledger",
    "GRANT SELECT, INSERT, UPDATE (redriven_at, redriven_by) ON dead_letters TO ledger",
    "GRANT EXECUTE ON FUNCTION advance_heads TO ledger",
)
