"""Access keys: made once, with their accounts and caps in the ledger, and disabled for good."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg

from contracts import ledger
from contracts.accounts import path
from contracts.keyvault import KeyCreated, KeyDisabled, key_hash
from contracts.money import Amount
from services.keyvault import store, translate
from services.keyvault.domain import access_keys, errors
from services.keyvault.domain.errors import (
    AlreadyCreated,
    ExpiryPassed,
    IdempotencyConflict,
    KeyUnknown,
    LedgerAway,
    LedgerRefused,
)
from services.keyvault.domain.secret import Secret
from services.keyvault.handlers.vault import Vault, changing
from services.keyvault.store import NewKey
from services.kit.ids import new_uuid7
from services.kit.telemetry import get_logger

log = get_logger(__name__)


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
        async with changing(vault, account) as change:
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
    async with changing(vault, account) as change:
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
