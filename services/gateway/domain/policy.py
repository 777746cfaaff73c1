"""Which provider secret a call may use, by the key policy of its account."""

from typing import assert_never

from contracts.keyvault import Verified
from services.gateway.domain.errors import SecretRefused


def uses_own_secret(verified: Verified, *, provider: str) -> bool:
    """Whether the call uses the account's own secret, or the platform's and credits.

    SecretRefused: no_own_secret, consent_missing.
    """
    has_own = provider in verified.own_providers
    match verified.policy:
        case "own":
            if not has_own:
                raise SecretRefused(
                    code="no_own_secret",
                    reason=f"{verified.account} uses its own keys only, and none is stored for {provider}:"
                    " please configure your key",
                    own=True,
                )
            return True
        case "credits":
            return False
        case "own_then_credits":
            if not has_own and not verified.consent:
                raise SecretRefused(
                    code="consent_missing",
                    reason=f"{verified.account} has no own key for {provider}, and has not agreed to fall back to"
                    " credits",
                    own=False,
                )
            return has_own
        case _:
            assert_never(verified.policy)
