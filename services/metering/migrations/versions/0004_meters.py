"""Meters as data, each change a version; and indexes by which use of an account, or a foreign subject, is found."""

from alembic import op

revision = "0004"
down_revision = "0003"

STATEMENTS: tuple[str, ...] = (
    """
    CREATE TABLE meter_versions (
        slug text NOT NULL,
        version integer NOT NULL,
        meter_id text NOT NULL,
        effective_at timestamptz NOT NULL,
        source text NOT NULL,
        catalogue_version integer,
        deleted boolean NOT NULL,
        definition jsonb NOT NULL,
        PRIMARY KEY (slug, version),
        CONSTRAINT meter_versions_catalogue_version UNIQUE (slug, catalogue_version)
    )
    """,
    "CREATE INDEX meter_versions_meter_id ON meter_versions (meter_id)",
    (
        "CREATE TRIGGER never_changed BEFORE UPDATE OR DELETE ON meter_versions"
        " FOR EACH ROW EXECUTE FUNCTION refuse_change()"
    ),
    "CREATE TRIGGER never_truncated BEFORE TRUNCATE ON meter_versions EXECUTE FUNCTION refuse_change()",
    "GRANT SELECT, INSERT ON meter_versions TO metering",
    # A partition's use lies all over the log: without it, one account's costs a look at all that its partition has.
    "CREATE INDEX usage_log_account ON usage_log (partition, account, occurred_at)",
    # Costs nothing for use whose subject is the account.
    "CREATE INDEX usage_log_subject ON usage_log (subject, type, occurred_at) WHERE subject IS NOT NULL",
)


def upgrade() -> None:
    """Change the schema."""
    for statement in STATEMENTS:
        op.execute(statement)
