"""What keyvault answers about what it keeps, from the tables. These are the models of HTTP: none has a secret."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.rows import TupleRow, class_row
from pydantic import AwareDatetime, BaseModel, Field

from contracts.keyvault import KeyPolicy

Connection = AsyncConnection[TupleRow]


class SecretStatus(BaseModel):
    """What may be known of a stored secret. `last4` is empty for a short one; `ring_version` is what wraps it.

    `account` is null for a platform's secret. `version` counts replacements. `last_used_at` is right to a minute.
    """

    record: UUID
    account: str | None
    provider: str
    name: str
    version: int
    ring_version: int
    prefix: str
    last4: str
    created_at: AwareDatetime
    updated_at: AwareDatetime
    last_used_at: AwareDatetime | None
    expires_at: AwareDatetime | None


class AccessKeyView(BaseModel):
    """An access key without its text, which is kept by nobody. `account` is its own, one below `holder`."""

    key_id: str
    account: str
    holder: str
    name: str
    created_at: AwareDatetime
    created_by: str
    expires_at: AwareDatetime | None
    disabled_at: AwareDatetime | None
    disabled_by: str | None
    disabled_reason: str | None
    last_used_at: AwareDatetime | None


class PolicyView(BaseModel):
    """The key policy in force for an account. `chosen_by` is the account on its path that chose it, if one did."""

    account: str
    policy: KeyPolicy
    consent: bool
    consent_at: AwareDatetime | None
    consented_by: str | None
    chosen_by: str | None
    updated_at: AwareDatetime | None
    updated_by: str | None


class AuditEntry(BaseModel):
    """Who did what. `detail` depends on `action`; it never holds a secret."""

    id: UUID
    at: AwareDatetime
    principal: str
    action: str
    account: str | None
    record: UUID | None
    key_id: str | None
    detail: dict[str, Any]


class SecretUse(BaseModel):
    """How often a secret was leased in one minute."""

    minute: AwareDatetime
    principal: str
    times: Annotated[int, Field(ge=1)]


_STATUS = (
    "record, nullif(account, '') AS account, provider, name, version, ring_version, prefix, last4, created_at,"
    " updated_at, last_used_at, expires_at"
)
_KEY = (
    "key_id, account, holder, name, created_at, created_by, expires_at, disabled_at, disabled_by, disabled_reason,"
    " last_used_at"
)
# An account and all below it, as a range of bytes: '0' comes right after '/'.
_TREE = "(%(account)s::text IS NULL OR {column} = %(account)s OR ({column} > %(below)s AND {column} < %(beyond)s))"


async def secret_status(
    connection: Connection, *, account: str, provider: str, name: str, at: datetime
) -> SecretStatus | None:
    """The status of one secret; an empty account is the platform."""
    async with connection.cursor(row_factory=class_row(SecretStatus)) as cursor:
        await cursor.execute(
            f"SELECT {_STATUS} FROM secrets WHERE account = %s AND provider = %s AND name = %s"
            " AND (expires_at IS NULL OR expires_at > %s)",
            [account, provider, name, at],
        )
        return await cursor.fetchone()


async def secret_statuses(connection: Connection, *, account: str, at: datetime) -> list[SecretStatus]:
    """All secrets of an account; an empty account is the platform."""
    async with connection.cursor(row_factory=class_row(SecretStatus)) as cursor:
        await cursor.execute(
            f"SELECT {_STATUS} FROM secrets WHERE account = %s AND (expires_at IS NULL OR expires_at > %s)"
            " ORDER BY provider, name",
            [account, at],
        )
        return await cursor.fetchall()


async def access_key(connection: Connection, key_id: str) -> AccessKeyView | None:
    """One access key."""
    async with connection.cursor(row_factory=class_row(AccessKeyView)) as cursor:
        await cursor.execute(f"SELECT {_KEY} FROM access_keys WHERE key_id = %s", [key_id])
        return await cursor.fetchone()


async def access_keys(
    connection: Connection, *, account: str | None, before: str | None, limit: int
) -> list[AccessKeyView]:
    """Access keys held by an account or one below it, newest first; `before` is the last id of the page before."""
    async with connection.cursor(row_factory=class_row(AccessKeyView)) as cursor:
        await cursor.execute(
            f"""
            SELECT {_KEY} FROM access_keys
            WHERE {_TREE.format(column="account")}
              AND (%(before)s::text IS NULL
                   OR (created_at, key_id) < (SELECT created_at, key_id FROM access_keys WHERE key_id = %(before)s))
            ORDER BY created_at DESC, key_id DESC LIMIT %(limit)s
            """,
            {**_range(account), "before": before, "limit": limit},
        )
        return await cursor.fetchall()


async def policy_of(connection: Connection, *, account: str, accounts: list[str]) -> PolicyView | None:
    """What the nearest of `accounts` chose."""
    async with connection.cursor(row_factory=class_row(PolicyView)) as cursor:
        await cursor.execute(
            """
            SELECT %s::text AS account, policy, consent_at IS NOT NULL AS consent, consent_at, consented_by,
                   account AS chosen_by, updated_at, updated_by
            FROM policies WHERE account = ANY (%s) ORDER BY length(account) DESC LIMIT 1
            """,
            [account, accounts],
        )
        return await cursor.fetchone()


async def audit_trail(
    connection: Connection, *, account: str | None, before: UUID | None, limit: int
) -> list[AuditEntry]:
    """The trail of an account and all below it, newest first; without an account, of everything."""
    async with connection.cursor(row_factory=class_row(AuditEntry)) as cursor:
        await cursor.execute(
            f"""
            SELECT id, at, principal, action, account, record, key_id, detail FROM audit
            WHERE {_TREE.format(column="account")} AND (%(before)s::uuid IS NULL OR id < %(before)s)
            ORDER BY id DESC LIMIT %(limit)s
            """,
            {**_range(account), "before": before, "limit": limit},
        )
        return await cursor.fetchall()


async def secret_uses(connection: Connection, record: UUID, *, limit: int) -> list[SecretUse]:
    """The last minutes in which a secret was leased, newest first."""
    async with connection.cursor(row_factory=class_row(SecretUse)) as cursor:
        await cursor.execute(
            "SELECT minute, principal, times FROM secret_uses WHERE record = %s ORDER BY minute DESC LIMIT %s",
            [record, limit],
        )
        return await cursor.fetchall()


async def rows_by_ring_version(connection: Connection) -> dict[int, int]:
    """How many secrets each version of the ring wraps."""
    cursor = await connection.execute("SELECT ring_version, count(*) FROM secrets GROUP BY 1 ORDER BY 1")
    return {int(version): int(rows) for version, rows in await cursor.fetchall()}


def _range(account: str | None) -> dict[str, str | None]:
    return {
        "account": account,
        "below": None if account is None else f"{account}/",
        "beyond": None if account is None else f"{account}0",
    }
