"""Provider secrets: stored sealed, replaced, deleted for good, and deleted when they expire."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from services.keyvault import store
from services.keyvault.domain.errors import (
    SecretMalformed,
    SecretNotFound,
)
from services.keyvault.domain.formats import check_format, shown_of
from services.keyvault.domain.sealing import SEAL_ENTROPY_BYTES, Owner, Place, seal
from services.keyvault.domain.secret import Secret
from services.keyvault.handlers.vault import Change, Vault, changing
from services.keyvault.store import StoredSecret
from services.kit.ids import new_uuid7

# Who does what nobody asked for: expiry.
CLOCK: Final = "clock"
EXPIRED_ROWS_MAX: Final = 100


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
    async with changing(vault, at.account) as change:
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
    async with changing(vault, at.account) as change:
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
        async with changing(vault, each.account) as change:
            found = await store.find_secret(
                change.connection, owner=each.owner, account=each.account, provider=each.provider, name=each.name
            )
            # It may have been replaced meanwhile.
            if found is not None and found.expires_at is not None and found.expires_at <= change.at:
                await _shred(change, found, principal=CLOCK, action="secret_expired")
                deleted += 1
    return deleted


async def _shred(change: "Change", secret: StoredSecret, *, principal: str, action: str) -> None:
    await store.shred(change.connection, secret.record)
    await change.audit(principal, action, record=secret.record, detail=_secret_detail(secret.place))
    change.tell_policy_changed()


def _owner(at: SecretPlace) -> Owner:
    return "account" if at.account else "platform"


def _secret_detail(place: Place) -> dict[str, Any]:
    return {"owner": place.owner, "provider": place.provider, "name": place.name, "version": place.version}
