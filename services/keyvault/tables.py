"""The tables of the schema `keyvault`. No column holds a secret in the clear: sealed bytes, hashes, the last four."""

from typing import Final

from sqlalchemy import (
    ARRAY,
    TIMESTAMP,
    UUID,
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from services.kit.leases import leases_table, members_table
from services.kit.outbox import outbox_table, relayed_table

metadata: Final = MetaData()


def _account(*, primary_key: bool = False, nullable: bool = False) -> Column[str]:
    # Bytes in order: an account's tree is then one range of an index.
    return Column("account", Text(collation="C"), primary_key=primary_key, nullable=nullable)


def _time(name: str, *, nullable: bool = False, primary_key: bool = False) -> Column[object]:
    return Column(name, TIMESTAMP(timezone=True), nullable=nullable, primary_key=primary_key)


# 64 rows. Whoever has something to say holds its partition's row, so that numbers have no gaps.
heads = Table(
    "heads",
    metadata,
    Column("partition", SmallInteger, primary_key=True, autoincrement=False),
    Column("outbox_number", BigInteger, nullable=False),
    _time("recorded_at"),
)

# Provider secrets, sealed; a platform's secret has an empty account. Deleting a row shreds its data key.
secrets = Table(
    "secrets",
    metadata,
    Column("record", UUID, primary_key=True),
    Column("owner", Text, nullable=False),
    _account(),
    Column("provider", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("ring_version", Integer, nullable=False),
    Column("wrapped_key", LargeBinary, nullable=False),
    Column("commitment", LargeBinary, nullable=False),
    Column("ciphertext", LargeBinary, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("last4", Text, nullable=False),
    _time("created_at"),
    _time("updated_at"),
    _time("last_used_at", nullable=True),
    _time("expires_at", nullable=True),
    UniqueConstraint("account", "provider", "name", "owner", name="secrets_place"),
    CheckConstraint("owner IN ('account', 'platform')", name="secrets_owner"),
    CheckConstraint("(owner = 'platform') = (account = '')", name="secrets_of_whom"),
    Index("secrets_ring_version", "ring_version", "record"),
    Index("secrets_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
)

# Access keys by the hash of their text. `account` is the key's own, `holder` the one above, `path` all of them.
access_keys = Table(
    "access_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("key_sha256", LargeBinary, nullable=False),
    _account(),
    Column("holder", Text(collation="C"), nullable=False),
    Column("path", ARRAY(Text), nullable=False),
    Column("name", Text, nullable=False),
    _time("created_at"),
    Column("created_by", Text, nullable=False),
    _time("expires_at", nullable=True),
    _time("disabled_at", nullable=True),
    Column("disabled_by", Text),
    Column("disabled_reason", Text),
    _time("last_used_at", nullable=True),
    Column("idempotency_key", Text),
    Column("request_sha256", LargeBinary),
    UniqueConstraint("key_sha256", name="access_keys_sha256"),
    UniqueConstraint("account", name="access_keys_account"),
    UniqueConstraint("created_by", "idempotency_key", name="access_keys_request"),
    Index("access_keys_created_at", "created_at", "key_id"),
)

# What an account chose, and who agreed, when, to fall back from own keys to paid credits.
policies = Table(
    "policies",
    metadata,
    _account(primary_key=True),
    Column("policy", Text, nullable=False),
    _time("consent_at", nullable=True),
    Column("consented_by", Text),
    _time("updated_at"),
    Column("updated_by", Text, nullable=False),
)

# Who did what, when. Only ever added to: no role may change it, not even the schema's owner.
audit = Table(
    "audit",
    metadata,
    Column("id", UUID, primary_key=True),
    _time("at"),
    Column("principal", Text, nullable=False),
    Column("action", Text, nullable=False),
    _account(nullable=True),
    Column("record", UUID),
    Column("key_id", Text),
    Column("detail", JSONB, nullable=False),
    Index("audit_account", "account", "id"),
)

# How often a secret was leased, by minute and by whom.
secret_uses = Table(
    "secret_uses",
    metadata,
    Column("record", UUID, primary_key=True),
    _time("minute", primary_key=True),
    Column("principal", Text, primary_key=True),
    Column("times", BigInteger, nullable=False),
)

outbox = outbox_table(metadata)
relayed = relayed_table(metadata)
leases = leases_table(metadata)
members = members_table(metadata)
