"""What an account chose: whose secrets pay for its calls."""

from contracts.keyvault import KeyPolicy
from services.keyvault import store
from services.keyvault.handlers.vault import Vault, changing
from services.keyvault.store import StoredPolicy


async def set_policy(
    vault: Vault, account: str, *, chosen: KeyPolicy, consent: bool, consented_by: str | None, principal: str
) -> None:
    """Write what an account chose, and who agreed when to fall back to paid credits. The same again changes nothing."""
    async with changing(vault, account) as change:
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
