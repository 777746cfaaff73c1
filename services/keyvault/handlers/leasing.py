"""Whose key this is, and the provider secret for a call: what the gateway asks; and what was used of both."""

from collections import Counter
from typing import Final

from prometheus_client import Counter as Metric

from contracts.accounts import path
from contracts.keyvault import KeyPolicy, Leased, LeaseSecret, Verified
from services.keyvault import store
from services.keyvault.domain import access_keys
from services.keyvault.domain.errors import KeyUnknown, NoOwnSecret, NoPlatformSecret, SecretUndecryptable
from services.keyvault.domain.policy import UNCHOSEN, Policy, why_not_leased
from services.keyvault.domain.sealing import open_sealed
from services.keyvault.handlers.vault import UNDECRYPTABLE, Vault
from services.keyvault.translate import KeyRefusal
from services.kit.telemetry import REGISTRY, get_logger

log = get_logger(__name__)

LAST_USED_SECONDS: Final = 60.0
VERIFICATIONS: Final = Metric(
    "scrip_keyvault_verifications", "Access keys verified, by outcome.", ("outcome",), registry=REGISTRY
)
LEASES: Final = Metric("scrip_keyvault_leases", "Provider secrets leased, by outcome.", ("outcome",), registry=REGISTRY)


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


def _chosen(found: KeyPolicy | None, *, consent: bool) -> Policy:
    return UNCHOSEN if found is None else Policy(policy=found, consent=consent)
