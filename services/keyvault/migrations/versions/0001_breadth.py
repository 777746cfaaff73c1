"""Secrets, access keys, policies, the audit trail, the outbox; and what the runtime role may do with each."""

from alembic import op
from sqlalchemy import MetaData, Table

from services.kit.leases import leases_table, members_table
from services.kit.outbox import outbox_table, relayed_table

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create everything."""
    for statement in (*TABLES, *TRIGGERS):
        op.execute(statement)
    metadata = MetaData()
    tables: list[Table] = [make(metadata) for make in (outbox_table, relayed_table, leases_table, members_table)]
    metadata.create_all(op.get_bind(), tables=tables)
    for statement in GRANTS:
        op.execute(statement)


TABLES = (
    """
    CREATE TABLE heads (
        partition smallint PRIMARY KEY CHECK (partition BETWEEN 0 AND 63),
        outbox_number bigint NOT NULL,
        recorded_at timestamptz NOT NULL
    ) WITH (fillfactor = 50)
    """,
    "INSERT INTO heads SELECT n, 0, 'epoch' FROM generate_series(0, 63) AS n",
    # A deleted row leaves the pages as soon as the server gets to it: a shredded key does not wait for 50 others.
    """
    CREATE TABLE secrets (
        record uuid PRIMARY KEY,
        owner text NOT NULL CONSTRAINT secrets_owner CHECK (owner IN ('account', 'platform')),
        account text COLLATE "C" NOT NULL,
        provider text NOT NULL,
        name text NOT NULL,
        version integer NOT NULL CONSTRAINT secrets_version CHECK (version > 0),
        ring_version integer NOT NULL,
        wrapped_key bytea NOT NULL,
        commitment bytea NOT NULL CONSTRAINT secrets_commitment CHECK (length(commitment) = 32),
        ciphertext bytea NOT NULL,
        prefix text NOT NULL,
        last4 text NOT NULL CONSTRAINT secrets_last4 CHECK (length(last4) <= 4),
        created_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL,
        last_used_at timestamptz,
        expires_at timestamptz,
        CONSTRAINT secrets_place UNIQUE (account, provider, name, owner),
        CONSTRAINT secrets_of_whom CHECK ((owner = 'platform') = (account = ''))
    ) WITH (autovacuum_vacuum_threshold = 0, autovacuum_vacuum_scale_factor = 0.01)
    """,
    "CREATE INDEX secrets_ring_version ON secrets (ring_version, record)",
    "CREATE INDEX secrets_expires_at ON secrets (expires_at) WHERE expires_at IS NOT NULL",
    """
    CREATE TABLE access_keys (
        key_id text PRIMARY KEY,
        key_sha256 bytea NOT NULL CONSTRAINT access_keys_sha256_length CHECK (length(key_sha256) = 32),
        account text COLLATE "C" NOT NULL,
        holder text COLLATE "C" NOT NULL,
        path text[] NOT NULL,
        name text NOT NULL,
        created_at timestamptz NOT NULL,
        created_by text NOT NULL,
        expires_at timestamptz,
        disabled_at timestamptz,
        disabled_by text,
        disabled_reason text,
        last_used_at timestamptz,
        idempotency_key text,
        request_sha256 bytea,
        CONSTRAINT access_keys_sha256 UNIQUE (key_sha256),
        CONSTRAINT access_keys_account UNIQUE (account),
        CONSTRAINT access_keys_request UNIQUE (created_by, idempotency_key),
        CONSTRAINT access_keys_disabled CHECK (num_nulls(disabled_at, disabled_by, disabled_reason) IN (0, 3))
    ) WITH (fillfactor = 80)
    """,
    "CREATE INDEX access_keys_created_at ON access_keys (created_at, key_id)",
    """
    CREATE TABLE policies (
        account text COLLATE "C" PRIMARY KEY,
        policy text NOT NULL CONSTRAINT policies_policy CHECK (policy IN ('own', 'credits', 'own_then_credits')),
        consent_at timestamptz,
        consented_by text,
        updated_at timestamptz NOT NULL,
        updated_by text NOT NULL,
        CONSTRAINT policies_consent CHECK ((consent_at IS NULL) = (consented_by IS NULL))
    )
    """,
    """
    CREATE TABLE audit (
        id uuid PRIMARY KEY,
        at timestamptz NOT NULL,
        principal text NOT NULL,
        action text NOT NULL,
        account text COLLATE "C",
        record uuid,
        key_id text,
        detail jsonb NOT NULL
    )
    """,
    "CREATE INDEX audit_account ON audit (account, id)",
    # How often a secret was leased, by minute: a row per lease would be as many as there are model calls.
    """
    CREATE TABLE secret_uses (
        record uuid NOT NULL,
        minute timestamptz NOT NULL,
        principal text NOT NULL,
        times bigint NOT NULL,
        PRIMARY KEY (record, minute, principal)
    ) WITH (fillfactor = 80)
    """,
)

TRIGGERS = (
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% on % is refused: it is only ever added to', TG_OP, TG_TABLE_NAME;
    END $$
    """,
    "CREATE TRIGGER never_changed BEFORE UPDATE OR DELETE ON audit FOR EACH ROW EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER never_truncated BEFORE TRUNCATE ON audit EXECUTE FUNCTION refuse_change()",
)

GRANTS = (
    "GRANT SELECT ON schema_version TO keyvault",
    "GRANT SELECT, UPDATE (outbox_number, recorded_at) ON heads TO keyvault",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON secrets TO keyvault",
    # A key is never deleted, and never becomes another one or another's.
    (
        "GRANT SELECT, INSERT, UPDATE (disabled_at, disabled_by, disabled_reason, last_used_at)"
        " ON access_keys TO keyvault"
    ),
    "GRANT SELECT, INSERT, UPDATE ON policies TO keyvault",
    "GRANT SELECT, INSERT ON audit TO keyvault",
    "GRANT SELECT, INSERT, UPDATE (times) ON secret_uses TO keyvault",
    "GRANT SELECT, INSERT, DELETE ON outbox TO keyvault",
    "GRANT SELECT, INSERT, UPDATE ON relayed TO keyvault",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON leases TO keyvault",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON members TO keyvault",
)
