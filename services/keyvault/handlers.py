"""What happens to secrets, access keys and policies: load, decide, write, stage the fact, one transaction each.

Each docstring lists the refusals. A change that others remember (a key, a policy, an own secret) is told through the
outbox; every change is in the audit trail, in the same transaction.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import psycopg
from prometheus_client import Counter as Metric

from contracts import ledger
from contracts.accounts import path
from contracts.keyvault import (
    KeyCreated,
    KeyDisabled,
    KeyPolicy,
    KeyPolicyChanged,
    Leased,
    LeaseSecret,
    Verified,
    key_hash,
)
from contracts.money import Amount, Unit
from contracts.partition import partition_of
from services.keyvault import store, translate
from services.keyvault.domain import access_keys, errors
from services.keyvault.domain.errors import (
    AlreadyCreated,
    ExpiryPassed,
    IdempotencyConflict,
    KeyUnknown,
    LedgerAway,
    LedgerRefused,
    NoOwnSecret,
    NoPlatformSecret,
    SecretMalformed,
    SecretNotFound,
    SecretUndecryptable,
)
from services.keyvault.domain.formats import check_format, shown_of
from services.keyvault.domain.keyring import Keyring
from services.keyvault.domain.policy import UNCHOSEN, Policy, why_not_leased
from services.keyvault.domain.sealing import (
    REWRAP_ENTROPY_BYTES,
    SEAL_ENTROPY_BYTES,
    Owner,
    Place,
    open_sealed,
    rewrap,
    seal,
)
from services.keyvault.domain.secret import Secret
from services.keyvault.store import Connection, Head, NewKey, StoredPolicy, StoredSecret
from services.keyvault.translate import KeyRefusal, NewHolder
from services.kit.database import Pool
from services.kit.ids import new_uuid7
from services.kit.outbox import OutboxRow, stage
from services.kit.telemetry import REGISTRY, get_logger

log = get_logger(__name__)

# Who does what nobody asked for: expiry.
CLOCK: Final = "clock"

REWRAP_ROWS_MAX: Final = 100
EXPIRED_ROWS_MAX: Final = 100
LAST_USED_SECONDS: Final = 60.0
# Beyond, uses are no longer told apart: what is counted must not be what fills the memory.
USES_KEPT_MAX: Final = 100_000

VERIFICATIONS: Final = Metric(
    "scrip_keyvault_verifications", "Access keys verified, by outcome.", ("outcome",), registry=REGISTRY
)
LEASES: Final = Metric("scrip_keyvault_leases", "Provider secrets leased, by outcome.", ("outcome",), registry=REGISTRY)
UNDECRYPTABLE: Final = Metric(
    "scrip_keyvault_undecryptable", "Stored secrets that could not be opened: each is an alarm.", registry=REGISTRY
)

Ask = Callable[[ledger.Command], Awaitable[ledger.Reply]]


class Uses:
    """What was used since the last flush. Lost if the process dies: it says when and how often, never whether."""

    def __init__(self) -> None:
        self.leases: Counter[tuple[UUID, datetime, str]] = Counter()
        self.secrets: dict[UUID, datetime] = {}
        self.keys: dict[str, datetime] = {}

    def leased(self, record: UUID, *, principal: str, at: datetime) -> None:
        """A secret was leased."""
        if len(self.leases) < USES_KEPT_MAX:
            self.leases[record, translate.minute_of(at), principal] += 1
            self.secrets[record] = at

    def verified(self, key_id: str, *, at: datetime) -> None:
        """A key was verified."""
        if len(self.keys) < USES_KEPT_MAX:
            self.keys[key_id] = at


@dataclass(frozen=True, slots=True, kw_only=True)
class Vault:
    """What the handlers work with. `notify` is told what has been committed to the outbox."""

    pool: Pool
    lookups: Pool
    ring: Callable[[], Keyring]
    ask: Ask
    units: Mapping[str, Unit]
    new_holder: NewHolder
    now: Callable[[], datetime]
    notify: Callable[[Sequence[OutboxRow]], None]
    lease_valid: timedelta
    uses: Uses = field(default_factory=Uses)


# Secrets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretPlace:
    """Where a secret is stored: an empty account is the platform."""

    account: str
    provider: str
    name: str


async def store_secret(
    vault: Vault, at: SecretPlace, secret: Secret, *, ttl: timedelta | None, principal: str
) -> bool | SecretMalformed:
    """Seal a secret and store it, in place of an earlier one; whether there was none. SecretMalformed."""
    if malformed := check_format(secret, provider=at.provider):
        return malformed
    shown = shown_of(secret, provider=at.provider)
    async with _changing(vault, at.account) as change:
        earlier = await store.find_secret(
            change.connection, owner=_owner(at), account=at.account, provider=at.provider, name=at.name
        )
        place = Place(
            owner="account" if at.account else "platform",
            account=at.account,
            provider=at.provider,
            name=at.name,
            record=earlier.record if earlier else new_uuid7(),
            version=earlier.version + 1 if earlier else 1,
        )
        sealed = seal(secret, place=place, ring=vault.ring(), entropy=os.urandom(SEAL_ENTROPY_BYTES))
        expires_at = None if ttl is None else change.at + ttl
        await store.put_secret(
            change.connection,
            place=place,
            sealed=sealed,
            prefix=shown.prefix,
            last4=shown.last4,
            at=change.at,
            expires_at=expires_at,
        )
        await change.audit(
            principal,
            "secret_replaced" if earlier else "secret_stored",
            record=place.record,
            detail=_secret_detail(place) | {"expires_at": expires_at and expires_at.isoformat()},
        )
        change.tell_policy_changed()
    return earlier is None


async def delete_secret(vault: Vault, at: SecretPlace, *, principal: str) -> SecretNotFound | None:
    """Delete a secret for good: its wrapped data key goes with its row. SecretNotFound."""
    async with _changing(vault, at.account) as change:
        found = await store.find_secret(
            change.connection, owner=_owner(at), account=at.account, provider=at.provider, name=at.name
        )
        if found is None:
            return SecretNotFound(account=at.account, provider=at.provider, name=at.name)
        await _shred(change, found, principal=principal, action="secret_deleted")
    return None


async def delete_expired(vault: Vault) -> int:
    """Delete what has expired; how many secrets that were. Nobody waits for it: an expired secret counts as absent."""
    async with vault.pool.connection() as connection:
        expired = await store.find_expired(connection, at=vault.now(), limit=EXPIRED_ROWS_MAX)
    deleted = 0
    for each in expired:
        async with _changing(vault, each.account) as change:
            found = await store.find_secret(
                change.connection, owner=each.owner, account=each.account, provider=each.provider, name=each.name
            )
            # It may have been replaced meanwhile.
            if found is not None and found.expires_at is not None and found.expires_at <= change.at:
                await _shred(change, found, principal=CLOCK, action="secret_expired")
                deleted += 1
    return deleted


async def _shred(change: "_Change", secret: StoredSecret, *, principal: str, action: str) -> None:
    await store.shred(change.connection, secret.record)
    await change.audit(principal, action, record=secret.record, detail=_secret_detail(secret.place))
    change.tell_policy_changed()


def _owner(at: SecretPlace) -> Owner:
    return "account" if at.account else "platform"


def _secret_detail(place: Place) -> dict[str, Any]:
    return {"owner": place.owner, "provider": place.provider, "name": place.name, "version": place.version}


# Access keys ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateAccessKey:
    """A key for `holder`. Under one idempotency key of one principal there is one access key."""

    holder: str
    name: str
    caps: Sequence[Amount]
    expires_at: datetime | None
    idempotency_key: str | None
    request_sha256: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedAccessKey:
    """A new key, with its text: it is shown now or never."""

    key_id: str
    account: str
    key: Secret
    created_at: datetime


CreationRefusal = (
    ExpiryPassed
    | errors.AccountTooDeep
    | errors.CapUnitUnknown
    | errors.CapUnitIsMoney
    | errors.CapInvalid
    | AlreadyCreated
    | IdempotencyConflict
    | LedgerRefused
    | LedgerAway
)


async def create_access_key(
    vault: Vault, command: CreateAccessKey, *, principal: str
) -> CreatedAccessKey | CreationRefusal:
    """Open the holder's and the key's accounts, give the starting grant once and the caps, then make the key.

    Dying in between leaves accounts that the next attempt finds open. ExpiryPassed, AccountTooDeep, CapUnitUnknown,
    CapUnitIsMoney, CapInvalid, AlreadyCreated, IdempotencyConflict, LedgerRefused, LedgerAway.
    """
    planned = _planned(vault, command, principal=principal)
    if not isinstance(planned, _Planned):
        return planned
    if refusal := await _earlier(vault, command, principal=principal) or await _open_in_ledger(
        vault, command, account=planned.account
    ):
        return refusal
    key_id, account = planned.key_id, planned.account
    key = access_keys.new_access_key(key_id=key_id, entropy=os.urandom(access_keys.KEY_BYTES))
    try:
        async with _changing(vault, account) as change:
            row = NewKey(
                key_id=key_id,
                key_sha256=bytes.fromhex(key_hash(key.reveal())),
                account=account,
                holder=command.holder,
                path=path(account),
                name=command.name,
                created_at=change.at,
                created_by=principal,
                expires_at=command.expires_at,
                idempotency_key=command.idempotency_key,
                request_sha256=command.request_sha256,
            )
            await store.add_key(change.connection, row)
            await change.audit(
                principal,
                "access_key_created",
                key_id=key_id,
                detail={
                    "name": command.name,
                    "expires_at": command.expires_at and command.expires_at.isoformat(),
                    "caps": [cap.model_dump() for cap in command.caps],
                },
            )
            change.tell(KeyCreated, key_id=key_id)
            created_at = change.at
    except psycopg.errors.UniqueViolation:
        # The same request came twice at once, and the other one was first.
        if earlier := await _earlier(vault, command, principal=principal):
            return earlier
        raise
    return CreatedAccessKey(key_id=key_id, account=account, key=key, created_at=created_at)


async def disable_access_key(vault: Vault, key_id: str, *, reason: str, principal: str) -> KeyUnknown | None:
    """Let a key never be used again. One that is disabled stays as it is, with its first reason. KeyUnknown."""
    async with vault.pool.connection() as connection:
        account = await store.account_of_key(connection, key_id)
    if account is None:
        return KeyUnknown()
    async with _changing(vault, account) as change:
        if await store.disable_key(change.connection, key_id=key_id, at=change.at, by=principal, reason=reason):
            await change.audit(principal, "access_key_disabled", key_id=key_id, detail={"reason": reason})
            change.tell(KeyDisabled, key_id=key_id)
    return None


@dataclass(frozen=True, slots=True)
class _Planned:
    key_id: str
    account: str


def _planned(
    vault: Vault, command: CreateAccessKey, *, principal: str
) -> (
    _Planned | ExpiryPassed | errors.AccountTooDeep | errors.CapUnitUnknown | errors.CapUnitIsMoney | errors.CapInvalid
):
    """Which key it will be, if there can be such a one."""
    if command.expires_at is not None and command.expires_at <= vault.now():
        return ExpiryPassed(expires_at=command.expires_at)
    if refusal := access_keys.check_caps(command.caps, units=vault.units):
        return refusal
    key_id = (
        access_keys.new_key_id(os.urandom(access_keys.ID_BYTES))
        if command.idempotency_key is None
        else access_keys.derived_key_id(principal=principal, idempotency_key=command.idempotency_key)
    )
    account = access_keys.own_account(holder=command.holder, key_id=key_id)
    return account if isinstance(account, errors.AccountTooDeep) else _Planned(key_id=key_id, account=account)


async def _earlier(
    vault: Vault, command: CreateAccessKey, *, principal: str
) -> AlreadyCreated | IdempotencyConflict | None:
    if command.idempotency_key is None:
        return None
    async with vault.pool.connection() as connection:
        found = await store.find_request(connection, created_by=principal, idempotency_key=command.idempotency_key)
    if found is None:
        return None
    if found.request_sha256 == command.request_sha256:
        return AlreadyCreated(key_id=found.key_id)
    return IdempotencyConflict(key_id=found.key_id)


async def _open_in_ledger(vault: Vault, command: CreateAccessKey, *, account: str) -> LedgerRefused | LedgerAway | None:
    attempt = str(new_uuid7())
    grant = vault.new_holder.starting_grant
    commands: list[ledger.Command] = [
        translate.open_account(command.holder, vault.new_holder.wallets, attempt=attempt),
        *([translate.starting_grant(command.holder, grant)] if grant else []),
        translate.open_account(account, [cap.unit for cap in command.caps], attempt=attempt),
        *(translate.cap_grant(account, cap) for cap in command.caps),
    ]
    for each in commands:
        reply = await vault.ask(each)
        match reply:
            case ledger.Accepted():
                pass
            case ledger.Failed(code="conflict") if isinstance(each, ledger.Grant) and each.account == command.holder:
                # It had its starting grant when the catalogue said another one: a holder has it once.
                log.info("the starting grant was another one", account=command.holder)
            case ledger.Failed(code="conflict" | "invalid"):
                return LedgerRefused(ledger_code=reply.code, reason=reply.message)
            case ledger.Failed():
                return LedgerAway(reason=reply.message)
            case ledger.Refused():
                return LedgerRefused(ledger_code=reply.code, reason=reply.message)
    return None


# Policies -------------------------------------------------------------------------------------------------------------


async def set_policy(
    vault: Vault, account: str, *, chosen: KeyPolicy, consent: bool, consented_by: str | None, principal: str
) -> None:
    """Write what an account chose, and who agreed when to fall back to paid credits. The same again changes nothing."""
    async with _changing(vault, account) as change:
        found = await store.find_policy(change.connection, account)
        by = (consented_by or principal) if consent else None
        if found is not None and (found.policy, found.consented_by) == (chosen, by):
            return
        # Who had agreed before has agreed since then.
        agreed_before = found.consent_at if found is not None and found.consented_by == by else None
        consent_at = (agreed_before or change.at) if consent else None
        await store.put_policy(
            change.connection,
            account=account,
            policy=StoredPolicy(policy=chosen, consent_at=consent_at, consented_by=by),
            at=change.at,
            by=principal,
        )
        await change.audit(
            principal, "policy_changed", detail={"policy": chosen, "consent": consent, "consented_by": by}
        )
        change.tell_policy_changed()


# Verify and lease -----------------------------------------------------------------------------------------------------


async def verify_key(vault: Vault, key_sha256: bytes) -> Verified | KeyRefusal:
    """Whose key this is. KeyUnknown, KeyDisabled, KeyExpired."""
    at = vault.now()
    async with vault.lookups.connection() as connection:
        found = await store.find_key(connection, key_sha256, at=at)
    refusal = KeyUnknown() if found is None else access_keys.why_unusable(found.state, at=at)
    VERIFICATIONS.labels(outcome=refusal.code if refusal else "verified").inc()
    if found is None or refusal is not None:
        return refusal or KeyUnknown()
    vault.uses.verified(found.key_id, at=at)
    chosen = _chosen(found.policy, consent=found.consent)
    return Verified(
        key_id=found.key_id,
        account=found.account,
        policy=chosen.policy,
        consent=chosen.consent,
        own_providers=tuple(found.own_providers),
        expires_at=found.expires_at,
    )


async def lease_secret(vault: Vault, command: LeaseSecret, *, principal: str) -> Leased | KeyRefusal:
    """The provider secret for a call. KeyDisabled, KeyExpired, PolicyForbids, ConsentMissing, NoOwnSecret,
    NoPlatformSecret, SecretUndecryptable."""
    leased = await _lease(vault, command, principal=principal)
    LEASES.labels(outcome="leased" if isinstance(leased, Leased) else leased.code).inc()
    if isinstance(leased, SecretUndecryptable):
        UNDECRYPTABLE.inc()
        log.error("a stored secret cannot be opened", account=command.account, reason=str(leased))
    return leased


async def _lease(vault: Vault, command: LeaseSecret, *, principal: str) -> Leased | KeyRefusal:
    at = vault.now()
    async with vault.lookups.connection() as connection:
        found = await store.find_for_lease(
            connection,
            accounts=path(command.account),
            owner="account" if command.own else "platform",
            provider=command.provider,
            at=at,
        )
    if found.key is not None and (unusable := access_keys.why_unusable(found.key, at=at)):
        return unusable
    if why := why_not_leased(_chosen(found.policy, consent=found.consent), own=command.own, account=command.account):
        return why
    if found.secret is None:
        if command.own:
            return NoOwnSecret(account=command.account, provider=command.provider)
        return NoPlatformSecret(provider=command.provider)
    opened = open_sealed(found.secret.sealed, place=found.secret.place, ring=vault.ring())
    if isinstance(opened, SecretUndecryptable):
        return opened
    vault.uses.leased(found.secret.record, principal=principal, at=at)
    until = at + vault.lease_valid
    return Leased.model_validate(
        {
            "secret": opened.reveal(),
            "own": command.own,
            "record": str(found.secret.record),
            "version": found.secret.version,
            "expires_at": until if found.secret.expires_at is None else min(until, found.secret.expires_at),
        }
    )


async def flush_uses(vault: Vault) -> None:
    """Write down what was used. What cannot be written now is written later."""
    uses = vault.uses
    leases, secrets, keys = uses.leases, uses.secrets, uses.keys
    if not (leases or secrets or keys):
        return
    uses.leases, uses.secrets, uses.keys = Counter(), {}, {}
    try:
        async with vault.pool.connection() as connection, connection.transaction():
            if leases:
                await store.add_uses(connection, leases)
            if secrets:
                await store.touch_secrets(connection, secrets, coarse_seconds=LAST_USED_SECONDS)
            if keys:
                await store.touch_keys(connection, keys, coarse_seconds=LAST_USED_SECONDS)
    except Exception:
        uses.leases.update(leases)
        uses.secrets = secrets | uses.secrets
        uses.keys = keys | uses.keys
        raise


def _chosen(found: KeyPolicy | None, *, consent: bool) -> Policy:
    return UNCHOSEN if found is None else Policy(policy=found, consent=consent)


# The key ring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """What a run of rewrapping came to. `undecryptable` are records that stay as they were."""

    ring_version: int
    rewrapped: int
    undecryptable: Sequence[UUID]


async def rewrap_all(vault: Vault, *, principal: str) -> Rewrapped:
    """Wrap every data key with the ring's current key, some rows at a time, while everything goes on. Refuses nothing.

    Interrupted, it is simply run again. A row that cannot be opened is left alone, reported and alarmed.
    """
    ring = vault.ring()
    count = 0
    undecryptable: list[UUID] = []
    after: UUID | None = None
    while True:
        async with vault.pool.connection() as connection, connection.transaction():
            rows = await store.find_not_wrapped_with(connection, ring.current, after=after, limit=REWRAP_ROWS_MAX)
            if not rows:
                return Rewrapped(ring_version=ring.current, rewrapped=count, undecryptable=undecryptable)
            done = {}
            for row in rows:
                wrapped = rewrap(row.sealed, place=row.place, ring=ring, entropy=os.urandom(REWRAP_ENTROPY_BYTES))
                if isinstance(wrapped, SecretUndecryptable):
                    undecryptable.append(row.record)
                    UNDECRYPTABLE.inc()
                    log.error("a stored secret cannot be rewrapped", reason=str(wrapped))
                else:
                    done[row.record] = wrapped
            await store.replace_wrapping(connection, done)
            await store.add_audit(
                connection,
                audit_id=new_uuid7(),
                at=vault.now(),
                principal=principal,
                action="secrets_rewrapped",
                detail={"ring_version": ring.current, "rewrapped": len(done), "undecryptable": len(rows) - len(done)},
            )
        count += len(done)
        after = rows[-1].record
        # Others have their turn.
        await asyncio.sleep(0)


# One change -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _changing(vault: Vault, account: str) -> AsyncIterator["_Change"]:
    """A transaction that changes something of an account (empty: the platform). What it has to say goes out after."""
    partition = partition_of(account) if account else 0
    async with vault.pool.connection() as connection:
        async with connection.transaction():
            head = await store.lock_head(connection, partition)
            # The clock may have been put back.
            at = max(vault.now(), head.recorded_at + timedelta(microseconds=1))
            change = _Change(connection, account=account, partition=partition, number=head.outbox_number, at=at)
            yield change
            await change.finish()
        vault.notify(change.rows)


class _Change:
    """A transaction under the lock of a partition's head. The platform's secrets are kept with partition 0."""

    def __init__(self, connection: Connection, *, account: str, partition: int, number: int, at: datetime) -> None:
        self.connection = connection
        self.at = at
        self.rows: list[OutboxRow] = []
        self._account = account
        self._partition = partition
        self._number = number

    async def audit(
        self,
        principal: str,
        action: str,
        *,
        record: UUID | None = None,
        key_id: str | None = None,
        detail: Mapping[str, Any],
    ) -> None:
        """Note who did what."""
        await store.add_audit(
            self.connection,
            audit_id=new_uuid7(),
            at=self.at,
            principal=principal,
            action=action,
            account=self._account or None,
            record=record,
            key_id=key_id,
            detail=detail,
        )

    def tell(self, fact: type[KeyCreated] | type[KeyDisabled], *, key_id: str) -> None:
        """Stage a fact about a key."""
        self._number += 1
        self.rows.append(
            translate.outbox_row(
                fact(
                    partition=self._partition,
                    number=self._number,
                    account=self._account,
                    recorded_at=self.at,
                    key_id=key_id,
                )
            )
        )

    def tell_policy_changed(self) -> None:
        """Stage the fact that what was verified below the account is to be asked again. Of the platform nobody asks."""
        if not self._account:
            return
        self._number += 1
        self.rows.append(
            translate.outbox_row(
                KeyPolicyChanged(
                    partition=self._partition, number=self._number, account=self._account, recorded_at=self.at
                )
            )
        )

    async def finish(self) -> None:
        """Write the outbox and where the partition stands now."""
        if self.rows:
            await stage(self.connection, self.rows)
            await store.move_head(
                self.connection, self._partition, Head(outbox_number=self._number, recorded_at=self.at)
            )
