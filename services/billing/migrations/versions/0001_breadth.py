"""The inbox, checkouts, payments and claims, the outbox; and what the runtime role may do with each."""

from alembic import op
from sqlalchemy import MetaData, Table

from services.kit.dead_letters import dead_letters_table
from services.kit.leases import leases_table, members_table
from services.kit.outbox import outbox_table, relayed_table

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create everything."""
    for statement in (*TABLES, *FUNCTIONS, *TRIGGERS):
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


TABLES = (
    """
    CREATE TABLE heads (
        partition smallint PRIMARY KEY CHECK (partition BETWEEN 0 AND 64),
        outbox_number bigint NOT NULL,
        recorded_at timestamptz NOT NULL
    ) WITH (fillfactor = 50)
    """,
    "INSERT INTO heads SELECT n, 0, 'epoch' FROM generate_series(0, 64) AS n",
    """
    CREATE TABLE stripe_events (
        event text PRIMARY KEY,
        number bigint NOT NULL CONSTRAINT stripe_events_number UNIQUE,
        type text NOT NULL,
        payload bytea NOT NULL,
        created_at timestamptz,
        received_at timestamptz NOT NULL,
        deliveries bigint NOT NULL,
        status text NOT NULL,
        detail text,
        payment text,
        failures bigint NOT NULL,
        processed_at timestamptz
    )
    """,
    "CREATE INDEX stripe_events_of_payment ON stripe_events (payment)",
    "CREATE INDEX stripe_events_by_status ON stripe_events (status, number)",
    """
    CREATE TABLE listed_refunds (
        event text PRIMARY KEY REFERENCES stripe_events,
        payment text NOT NULL,
        payload bytea NOT NULL,
        listed_at timestamptz NOT NULL
    )
    """,
    "CREATE INDEX listed_refunds_of_payment ON listed_refunds (payment)",
    """
    CREATE TABLE checkouts (
        checkout text PRIMARY KEY,
        principal text NOT NULL,
        idempotency_key text NOT NULL,
        body_hash bytea NOT NULL,
        account text NOT NULL,
        package text NOT NULL,
        quantity integer NOT NULL,
        price_minor bigint NOT NULL,
        denomination text NOT NULL,
        unit text NOT NULL,
        paid bigint NOT NULL,
        bonus bigint NOT NULL,
        title text NOT NULL,
        success_url text NOT NULL,
        cancel_url text NOT NULL,
        session text CONSTRAINT checkouts_session UNIQUE,
        url text,
        expires_at timestamptz,
        recorded_at timestamptz NOT NULL,
        CONSTRAINT checkouts_idempotency UNIQUE (principal, idempotency_key)
    )
    """,
    """
    CREATE TABLE payments (
        payment text PRIMARY KEY,
        status text NOT NULL CONSTRAINT payments_status CHECK (status IN ('unpaid', 'unattributed', 'granted')),
        reason text,
        detail text,
        session text,
        paid_minor bigint,
        denomination text,
        paid_at timestamptz,
        account text,
        package text,
        quantity integer,
        checkout text,
        price_minor bigint,
        unit text,
        paid bigint,
        bonus bigint,
        partition smallint,
        number bigint,
        recorded_at timestamptz NOT NULL,
        CONSTRAINT payments_granted_or_not
            CHECK (num_nulls(account, package, quantity, price_minor, unit, paid, bonus, partition, number)
                   = CASE status WHEN 'granted' THEN 0 ELSE 9 END)
    )
    """,
    "CREATE INDEX payments_of_account ON payments (account, payment)",
    "CREATE INDEX payments_by_status ON payments (status, payment)",
    "CREATE INDEX payments_of_checkout ON payments (checkout)",
    """
    CREATE TABLE claims (
        claim text PRIMARY KEY,
        payment text NOT NULL REFERENCES payments,
        reason text NOT NULL,
        state text NOT NULL,
        claimed_minor bigint NOT NULL,
        denomination text NOT NULL,
        claimed_at timestamptz NOT NULL,
        told_state text,
        told_amount bigint,
        number bigint,
        CONSTRAINT claims_told_or_not CHECK (num_nulls(told_state, told_amount, number) IN (0, 3))
    )
    """,
    "CREATE INDEX claims_of_payment ON claims (payment)",
    """
    CREATE TABLE resolutions (
        payment text PRIMARY KEY REFERENCES payments,
        event text NOT NULL,
        account text NOT NULL,
        package text NOT NULL,
        quantity integer NOT NULL,
        principal text NOT NULL,
        recorded_at timestamptz NOT NULL
    )
    """,
)

FUNCTIONS = (
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% on % is refused: it is only ever added to', TG_OP, TG_TABLE_NAME;
    END $$
    """,
    """
    CREATE FUNCTION keep_the_event() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF (OLD.event, OLD.number, OLD.type, OLD.payload, OLD.created_at, OLD.received_at)
           IS DISTINCT FROM (NEW.event, NEW.number, NEW.type, NEW.payload, NEW.created_at, NEW.received_at)
        THEN
            RAISE EXCEPTION 'a change of % is refused: what Stripe said stays as it was said', TG_TABLE_NAME;
        END IF;
        RETURN NEW;
    END $$
    """,
    """
    CREATE FUNCTION grant_once() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF OLD.status = 'granted'
           AND (OLD.payment, OLD.status, OLD.account, OLD.package, OLD.quantity, OLD.price_minor, OLD.unit, OLD.paid,
                OLD.bonus, OLD.partition, OLD.number)
               IS DISTINCT FROM
               (NEW.payment, NEW.status, NEW.account, NEW.package, NEW.quantity, NEW.price_minor, NEW.unit, NEW.paid,
                NEW.bonus, NEW.partition, NEW.number)
        THEN
            RAISE EXCEPTION 'a change of payment % is refused: it was granted', OLD.payment;
        END IF;
        RETURN NEW;
    END $$
    """,
)

TRIGGERS = (
    "CREATE TRIGGER kept BEFORE UPDATE ON stripe_events FOR EACH ROW EXECUTE FUNCTION keep_the_event()",
    "CREATE TRIGGER granted_once BEFORE UPDATE ON payments FOR EACH ROW EXECUTE FUNCTION grant_once()",
    *(
        f"CREATE TRIGGER never_changed BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_change()"
        for table in ("resolutions", "listed_refunds")
    ),
    *(
        f"CREATE TRIGGER never_deleted BEFORE DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_change()"
        for table in ("stripe_events", "payments", "claims", "checkouts", "resolutions", "listed_refunds")
    ),
    *(
        f"CREATE TRIGGER never_truncated BEFORE TRUNCATE ON {table} EXECUTE FUNCTION refuse_change()"
        for table in ("stripe_events", "payments", "claims", "checkouts", "resolutions", "listed_refunds")
    ),
)

GRANTS = (
    "GRANT SELECT ON schema_version TO billing",
    "GRANT SELECT, UPDATE (outbox_number, recorded_at) ON heads TO billing",
    (
        "GRANT SELECT, INSERT, UPDATE (deliveries, status, detail, payment, failures, processed_at)"
        " ON stripe_events TO billing"
    ),
    "GRANT SELECT, INSERT ON listed_refunds TO billing",
    "GRANT SELECT, INSERT, UPDATE (session, url, expires_at) ON checkouts TO billing",
    "GRANT SELECT, INSERT, UPDATE ON payments TO billing",
    "GRANT SELECT, INSERT, UPDATE (state, claimed_minor, told_state, told_amount, number) ON claims TO billing",
    "GRANT SELECT, INSERT ON resolutions TO billing",
    # Kept for ever: the facts are the record of what the ledger was told.
    "GRANT SELECT, INSERT ON outbox TO billing",
    "GRANT SELECT, INSERT, UPDATE ON relayed TO billing",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON leases TO billing",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON members TO billing",
    "GRANT SELECT, INSERT, UPDATE (redriven_at, redriven_by) ON dead_letters TO billing",
)
