"""Key policy: whether a call may use the account's own provider secret or the platform's, paid in credits."""

from dataclasses import dataclass
from typing import Final, assert_never

from contracts.keyvault import KeyPolicy
from services.keyvault.domain.errors import ConsentMissing, PolicyForbids


@dataclass(frozen=True, slots=True)
class Policy:
    """What an account chose, and whether it agreed to fall back from its own keys to paid credits."""

    policy: KeyPolicy
    consent: bool


# Of an account on whose path nobody has chosen: nothing of its own is used unasked.
UNCHOSEN: Final = Policy(policy="credits", consent=False)


def why_not_leased(chosen: Policy, *, own: bool, account: str) -> PolicyForbids | ConsentMissing | None:
    """Why a call may not have an own secret (`own`) or the platform's; null if it may."""
    match chosen.policy:
        case "own":
            return None if own else PolicyForbids(account=account, policy=chosen.policy, own=own)
        case "credits":
            return PolicyForbids(account=account, policy=chosen.policy, own=own) if own else None
        case "own_then_credits":
            return None if own or chosen.consent else ConsentMissing(account=account)
        case _:
            assert_never(chosen.policy)
