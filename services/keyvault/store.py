"""The statements of keyvault, and the key ring's file. A function takes a connection, and never commits.

Locks are taken in one order by everybody, so that nobody deadlocks: the partition's head, then rows of secrets in the
order of their records, then the rest.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.rows import TupleRow, class_row
from psycopg.types.json import Jsonb

from contracts.keyvault import KeyPolicy
from services.keyvault import translate
from services.keyvault.domain.access_keys import KeyState
from services.keyvault.domain.keyring import KEY_BYTES, Keyring, first_keyring, rotated
from services.keyvault.domain.sealing import Owner, Place, Sealed
from services.kit.files import write_private

Connection = AsyncConnection[TupleRow]

DEFAULT_NAME: Final = "default"


# The key ring ---------------------------------------------------------------------------------------------------------


class KeyringFile:
    """The ring's file, read again whenever it changes: a new version is in use at once, in every process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._ring: Keyring | None = None

    def read(self) -> Keyring:
        """The ring as it stands in the file. Raises InvalidKeyring, or OSError, without the contents."""
        status = self._path.stat()
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if self._ring is None or seen != self._seen:
            self._ring = translate.read_keyring(self._path.read_bytes(), name=self._path.name)
            self._seen = seen
        return self._ring

    @property
    def last_good(self) -> Keyring | None:
        """What was read last, should the file have become unreadable."""
        return self._ring


def make_keyring_file(path: Path) -> Keyring:
    """A new ring of one random key, unless the file exists: then the ring that is in it."""
    with _alone_with(path):
        if path.exists():
            return translate.read_keyring(path.read_bytes(), name=path.name)
        return _write_keyring(path, first_keyring(os.urandom(KEY_BYTES)))


def rotate_keyring_file(path: Path) -> Keyring:
    """Add a random key to the ring in the file and make it current. Rewrapping the rows comes after.

    Raises InvalidKeyring, or OSError; then the file is as it was.
    """
    with _alone_with(path):
        ring = translate.read_keyring(path.read_bytes(), name=path.name)
        return _write_keyring(path, rotated(ring, os.urandom(KEY_BYTES)))


@contextmanager
def _alone_with(path: Path) -> Iterator[None]:
    """Nobody else writes the ring meanwhile: of two versions of one number, one would be lost with what it wrapped."""
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _write_keyring(path: Path, ring: Keyring) -> Keyring:
    # It keeps its owner: keyvault must be able to read it, also when root has rotated it.
    write_private(path, translate.keyring_text(ring))
    return ring


# Heads and audit ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """Where a partition's outbox stands."""

    outbox_number: int
    recorded_at: datetime


async def lock_head(connection: Connection, partition: int) -> Head:
    """Lock a partition until the end of the transaction."""
    async with connection.cursor(row_factory=class_row(Head)) as cursor:
        await cursor.execute(
            "SELECT outbox_number, recorded_at FROM heads WHERE partition = %s FOR NO KEY UPDATE", [partition]
        )
        head = await cursor.fetchone()
    if head is None:
        raise LookupError(f"partition {partition} has no head")
    return head


async def move_head(connection: Connection, partition: int, head: Head) -> None:
    """Write where a locked partition stands now."""
    await connection.execute(
        "UPDATE heads SET outbox_number = %s, recorded_at = %s WHERE partition = %s",
        [head.outbox_number, head.recorded_at, partition],
    )


async def add_audit(
    connection: Connection,
    *,
    audit_id: UUID,
    at: datetime,
    principal: str,
    action: str,
    account: str | None = None,
    record: UUID | None = None,
    key_id: str | None = None,
    detail: Mapping[str, Any],
) -> None:
    """Note who did what. `detail` is shown to whoever may read the trail."""
    await connection.execute(
        "INSERT INTO audit (id, at, principal, action, account, record, key_id, detail)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
        [audit_id, at, principal, action, account, record, key_id, Jsonb(dict(detail))],
    )


# Secrets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSecret:
    """A row of `secrets`, as far as sealing goes."""

    record: UUID
    owner: Owner
    account: str
    provider: str
    name: str
    version: int
    ring_version: int
    wrapped_key: bytes
    commitment: bytes
    ciphertext: bytes
    expires_at: datetime | None

    @property
    def place(self) -> Place:
        """What the secret must have been sealed for."""
        return Place(
            owner=self.owner,
            account=self.account,
            provider=self.provider,
            name=self.name,
            record=self.record,
            version=self.version,
        )

    @property
    def sealed(self) -> Sealed:
        """What was stored of it."""
        return Sealed(
            ring_version=self.ring_version,
            wrapped_key=self.wrapped_key,
            commitment=self.commitment,
            ciphertext=self.ciphertext,
        )


_STORED: Final = (
    "record, owner, account, provider, name, version, ring_version, wrapped_key, commitment, ciphertext, expires_at"
)


async def find_secret(
    connection: Connection, *, owner: Owner, account: str, provider: str, name: str
) -> StoredSecret | None:
    """The row of a place, locked."""
    async with connection.cursor(row_factory=class_row(StoredSecret)) as cursor:
        await cursor.execute(
            f"SELECT {_STORED} FROM secrets"
            " WHERE account = %s AND provider = %s AND name = %s AND owner = %s FOR UPDATE",
            [account, provider, name, owner],
        )
        return await cursor.fetchone()


async def put_secret(
    connection: Connection,
    *,
    place: Place,
    sealed: Sealed,
    prefix: str,
    last4: str,
    at: datetime,
    expires_at: datetime | None,
) -> None:
    """Store a place's first or next version. The caller holds the head and has looked for an earlier one."""
    await connection.execute(
        """
        INSERT INTO secrets (record, owner, account, provider, name, version, ring_version, wrapped_key, commitment,
                             ciphertext, prefix, last4, created_at, updated_at, expires_at)
        VALUES (%(record)s, %(owner)s, %(account)s, %(provider)s, %(name)s, %(version)s, %(ring_version)s,
                %(wrapped_key)s, %(commitment)s, %(ciphertext)s, %(prefix)s, %(last4)s, %(at)s, %(at)s, %(expires_at)s)
        ON CONFLICT (record) DO UPDATE SET
            version = excluded.version, ring_version = excluded.ring_version, wrapped_key = excluded.wrapped_key,
            commitment = excluded.commitment, ciphertext = excluded.ciphertext, prefix = excluded.prefix,
            last4 = excluded.last4, updated_at = excluded.updated_at, expires_at = excluded.expires_at,
            last_used_at = NULL
        """,
        {
            "record": place.record,
            "owner": place.owner,
            "account": place.account,
            "provider": place.provider,
            "name": place.name,
            "version": place.version,
            "ring_version": sealed.ring_version,
            "wrapped_key": sealed.wrapped_key,
            "commitment": sealed.commitment,
            "ciphertext": sealed.ciphertext,
            "prefix": prefix,
            "last4": last4,
            "at": at,
            "expires_at": expires_at,
        },
    )


async def shred(connection: Connection, record: UUID) -> None:
    """Delete a row: with its wrapped data key goes every way to open what it sealed."""
    await connection.execute("DELETE FROM secrets WHERE record = %s", [record])


async def find_expired(connection: Connection, *, at: datetime, limit: int) -> list[StoredSecret]:
    """Secrets whose time is over. Nothing is locked."""
    async with connection.cursor(row_factory=class_row(StoredSecret)) as cursor:
        await cursor.execute(
            f"SELECT {_STORED} FROM secrets WHERE expires_at <= %s ORDER BY expires_at LIMIT %s", [at, limit]
        )
        return await cursor.fetchall()


async def find_not_wrapped_with(
    connection: Connection, ring_version: int, *, after: UUID | None, limit: int
) -> list[StoredSecret]:
    """The next rows that another version of the ring wrapped, locked, in the order of records."""
    async with connection.cursor(row_factory=class_row(StoredSecret)) as cursor:
        await cursor.execute(
            f"SELECT {_STORED} FROM secrets"
            " WHERE ring_version <> %(current)s AND (%(after)s::uuid IS NULL OR record > %(after)s)"
            " ORDER BY record LIMIT %(limit)s FOR UPDATE",
            {"current": ring_version, "after": after, "limit": limit},
        )
        return await cursor.fetchall()


async def replace_wrapping(connection: Connection, rewrapped: Mapping[UUID, Sealed]) -> None:
    """Overwrite the wrapped data keys of locked rows."""
    await connection.execute(
        """
        UPDATE secrets SET ring_version = r.ring_version, wrapped_key = r.wrapped_key
        FROM unnest(%s::uuid[], %s::integer[], %s::bytea[]) AS r (record, ring_version, wrapped_key)
        WHERE secrets.record = r.record
        """,
        [
            list(rewrapped),
            [sealed.ring_version for sealed in rewrapped.values()],
            [sealed.wrapped_key for sealed in rewrapped.values()],
        ],
    )


# Access keys and policies ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A row of `access_keys`."""

    key_id: str
    key_sha256: bytes
    account: str
    holder: str
    path: Sequence[str]
    name: str
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    idempotency_key: str | None
    request_sha256: bytes | None


@dataclass(frozen=True, slots=True)
class EarlierRequest:
    """What an idempotency key was used for."""

    key_id: str
    request_sha256: bytes | None


@dataclass(frozen=True, slots=True)
class LockedKey:
    """A key that is about to be disabled."""

    account: str
    disabled_at: datetime | None


async def find_request(connection: Connection, *, created_by: str, idempotency_key: str) -> EarlierRequest | None:
    """The key that a principal made under an idempotency key."""
    async with connection.cursor(row_factory=class_row(EarlierRequest)) as cursor:
        await cursor.execute(
            "SELECT key_id, request_sha256 FROM access_keys WHERE created_by = %s AND idempotency_key = %s",
            [created_by, idempotency_key],
        )
        return await cursor.fetchone()


async def add_key(connection: Connection, key: NewKey) -> None:
    """Add a key. Raises UniqueViolation if its request was carried out before."""
    await connection.execute(
        "INSERT INTO access_keys (key_id, key_sha256, account, holder, path, name, created_at, created_by, expires_at,"
        " idempotency_key, request_sha256) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        [
            key.key_id,
            key.key_sha256,
            key.account,
            key.holder,
            list(key.path),
            key.name,
            key.created_at,
            key.created_by,
            key.expires_at,
            key.idempotency_key,
            key.request_sha256,
        ],
    )


async def account_of_key(connection: Connection, key_id: str) -> str | None:
    """A key's own account: it never changes."""
    cursor = await connection.execute("SELECT account FROM access_keys WHERE key_id = %s", [key_id])
    row = await cursor.fetchone()
    return None if row is None else str(row[0])


async def disable_key(connection: Connection, *, key_id: str, at: datetime, by: str, reason: str) -> bool:
    """Disable a key that is not disabled yet; whether it was not."""
    cursor = await connection.execute(
        "UPDATE access_keys SET disabled_at = %s, disabled_by = %s, disabled_reason = %s"
        " WHERE key_id = %s AND disabled_at IS NULL",
        [at, by, reason, key_id],
    )
    return cursor.rowcount == 1


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """A row of `policies`."""

    policy: KeyPolicy
    consent_at: datetime | None
    consented_by: str | None


async def find_policy(connection: Connection, account: str) -> StoredPolicy | None:
    """What an account itself chose."""
    async with connection.cursor(row_factory=class_row(StoredPolicy)) as cursor:
        await cursor.execute("SELECT policy, consent_at, consented_by FROM policies WHERE account = %s", [account])
        return await cursor.fetchone()


async def put_policy(connection: Connection, *, account: str, policy: StoredPolicy, at: datetime, by: str) -> None:
    """Write what an account chose."""
    await connection.execute(
        """
        INSERT INTO policies (account, policy, consent_at, consented_by, updated_at, updated_by)
        VALUES (%s, %s, %s, %s, %s, %s)
        ON CONFLICT (account) DO UPDATE SET
            policy = excluded.policy, consent_at = excluded.consent_at, consented_by = excluded.consented_by,
            updated_at = excluded.updated_at, updated_by = excluded.updated_by
        """,
        [account, policy.policy, policy.consent_at, policy.consented_by, at, by],
    )


# Verify and lease: one statement each ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundKey:
    """A key by its hash, and what counts for its account. `policy` is null where nobody on its path has chosen."""

    key_id: str
    account: str
    disabled_at: datetime | None
    expires_at: datetime | None
    policy: KeyPolicy | None
    consent: bool
    own_providers: list[str]

    @property
    def state(self) -> KeyState:
        """Whether it may be used."""
        return KeyState(key_id=self.key_id, disabled_at=self.disabled_at, expires_at=self.expires_at)


async def find_key(connection: Connection, key_sha256: bytes, *, at: datetime) -> FoundKey | None:
    """The key of a hash."""
    async with connection.cursor(row_factory=class_row(FoundKey)) as cursor:
        await cursor.execute(
            """
            SELECT k.key_id, k.account, k.disabled_at, k.expires_at,
                   p.policy, p.consent_at IS NOT NULL AS consent,
                   ARRAY(SELECT DISTINCT s.provider FROM secrets s
                         WHERE s.account = ANY (k.path) AND s.owner = 'account'
                           AND (s.expires_at IS NULL OR s.expires_at > %(at)s)
                         ORDER BY s.provider) AS own_providers
            FROM access_keys k
            LEFT JOIN LATERAL (SELECT policy, consent_at FROM policies WHERE account = ANY (k.path)
                               ORDER BY length(account) DESC LIMIT 1) AS p ON true
            WHERE k.key_sha256 = %(key_sha256)s
            """,
            {"key_sha256": key_sha256, "at": at},
        )
        return await cursor.fetchone()


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundForLease:
    """What decides a lease, and the nearest secret if there is one."""

    key: KeyState | None
    policy: KeyPolicy | None
    consent: bool
    secret: StoredSecret | None


async def find_for_lease(
    connection: Connection, *, accounts: Sequence[str], owner: Owner, provider: str, at: datetime
) -> FoundForLease:
    """What decides a lease to the first of `accounts` (the rest are those above it). Of several secrets of one account
    the one named `default`, else the latest."""
    cursor = await connection.execute(
        f"""
        SELECT k.key_id, k.disabled_at, k.expires_at, p.policy, p.consent_at IS NOT NULL, {_QUALIFIED}
        FROM (SELECT 1) AS one
        LEFT JOIN access_keys k ON k.account = %(account)s
        LEFT JOIN LATERAL (SELECT policy, consent_at FROM policies WHERE account = ANY (%(accounts)s)
                           ORDER BY length(account) DESC LIMIT 1) AS p ON true
        LEFT JOIN LATERAL (SELECT * FROM secrets
                           WHERE account = ANY (%(of)s) AND provider = %(provider)s AND owner = %(owner)s
                             AND (expires_at IS NULL OR expires_at > %(at)s)
                           ORDER BY length(account) DESC, name <> %(default)s, updated_at DESC LIMIT 1) AS s ON true
        """,
        {
            "account": accounts[0],
            "accounts": list(accounts),
            "of": list(accounts) if owner == "account" else [""],
            "provider": provider,
            "owner": owner,
            "at": at,
            "default": DEFAULT_NAME,
        },
    )
    row = await cursor.fetchone()
    if row is None:
        raise LookupError("a statement that always has a row had none")
    key_id, disabled_at, expires_at, policy, consent, *columns = row
    return FoundForLease(
        key=None if key_id is None else KeyState(key_id=key_id, disabled_at=disabled_at, expires_at=expires_at),
        policy=policy,
        consent=consent,
        secret=None if columns[0] is None else StoredSecret(**dict(zip(_STORED.split(", "), columns, strict=True))),
    )


_QUALIFIED: Final = ", ".join(f"s.{column}" for column in _STORED.split(", "))


# Uses -----------------------------------------------------------------------------------------------------------------


async def add_uses(connection: Connection, uses: Mapping[tuple[UUID, datetime, str], int]) -> None:
    """Count leases of secrets by (record, minute, principal)."""
    keys = sorted(uses)
    await connection.execute(
        """
        INSERT INTO secret_uses AS u (record, minute, principal, times)
        SELECT * FROM unnest(%s::uuid[], %s::timestamptz[], %s::text[], %s::bigint[])
        ON CONFLICT (record, minute, principal) DO UPDATE SET times = u.times + excluded.times
        """,
        [
            [record for record, _, _ in keys],
            [minute for _, minute, _ in keys],
            [principal for _, _, principal in keys],
            [uses[key] for key in keys],
        ],
    )


async def touch_secrets(connection: Connection, used: Mapping[UUID, datetime], *, coarse_seconds: float) -> None:
    """Note when secrets were last used, no more often than every `coarse_seconds`."""
    await connection.execute(
        """
        WITH used AS (
            SELECT s.record, u.at FROM secrets s
            JOIN unnest(%s::uuid[], %s::timestamptz[]) AS u (record, at) USING (record)
            WHERE s.last_used_at IS NULL OR s.last_used_at < u.at - make_interval(secs => %s)
            ORDER BY s.record FOR NO KEY UPDATE OF s
        )
        UPDATE secrets SET last_used_at = used.at FROM used WHERE secrets.record = used.record
        """,
        [list(used), list(used.values()), coarse_seconds],
    )


async def touch_keys(connection: Connection, used: Mapping[str, datetime], *, coarse_seconds: float) -> None:
    """Note when keys were last used, no more often than every `coarse_seconds`."""
    await connection.execute(
        """
        WITH used AS (
            SELECT k.key_id, u.at FROM access_keys k
            JOIN unnest(%s::text[], %s::timestamptz[]) AS u (key_id, at) USING (key_id)
            WHERE k.last_used_at IS NULL OR k.last_used_at < u.at - make_interval(secs => %s)
            ORDER BY k.key_id FOR NO KEY UPDATE OF k
        )
        UPDATE access_keys SET last_used_at = used.at FROM used WHERE access_keys.key_id = used.key_id
        """,
        [list(used), list(used.values()), coarse_seconds],
    )
