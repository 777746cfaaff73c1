"""Why keyvault will not: typed, one per cause, each with a stable code. None carries a secret.

Refusal
├── SecretMalformed, ExpiryPassed                          what was asked makes no sense
├── AccountTooDeep, CapUnitUnknown, CapUnitIsMoney,
│   CapInvalid                                             so does this, of a new access key
├── SecretNotFound, NoOwnSecret, NoPlatformSecret,
│   KeyUnknown                                             nothing is there
├── SecretUndecryptable                                    it is there, and cannot be opened
├── KeyDisabled, KeyExpired                                it was valid once
├── PolicyForbids, ConsentMissing                          the account has not agreed
├── AlreadyCreated, IdempotencyConflict                    it was asked for before
└── LedgerRefused, LedgerAway                              the ledger did not open the account
"""

from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class SecretMalformed:
    """It does not look like a secret of that provider."""

    code: ClassVar = "secret_malformed"
    provider: str
    expected: str

    def __str__(self) -> str:
        return f"this is not a secret of {self.provider}: one {self.expected}"


@dataclass(frozen=True, slots=True)
class ExpiryPassed:
    """It would expire before it exists."""

    code: ClassVar = "expiry_passed"
    expires_at: datetime

    def __str__(self) -> str:
        return f"{self.expires_at.isoformat()} has passed already"


@dataclass(frozen=True, slots=True)
class SecretNotFound:
    """No secret is stored there, or it has expired."""

    code: ClassVar = "secret_not_found"
    account: str
    provider: str
    name: str

    def __str__(self) -> str:
        return f"{self.account or 'the platform'} has no secret {self.name!r} for {self.provider}"


@dataclass(frozen=True, slots=True)
class NoOwnSecret:
    """Neither the account nor one above it has stored a secret for the provider."""

    code: ClassVar = "no_own_secret"
    account: str
    provider: str

    def __str__(self) -> str:
        return f"neither {self.account} nor an account above it has a secret for {self.provider}"


@dataclass(frozen=True, slots=True)
class NoPlatformSecret:
    """The operator has stored no secret for the provider."""

    code: ClassVar = "no_platform_secret"
    provider: str

    def __str__(self) -> str:
        return f"the platform has no secret for {self.provider}"


@dataclass(frozen=True, slots=True)
class SecretUndecryptable:
    """A stored secret cannot be opened: its row or the key ring is not what it was. It has to be stored anew."""

    code: ClassVar = "secret_undecryptable"
    record: str
    version: int
    ring_version: int
    reason: str

    def __str__(self) -> str:
        return f"the secret {self.record} (version {self.version}) cannot be opened: {self.reason}"


@dataclass(frozen=True, slots=True)
class AccountTooDeep:
    """There is no room for a key's own account below its holder's."""

    code: ClassVar = "account_too_deep"
    account: str
    depth_max: int

    def __str__(self) -> str:
        return (
            f"{self.account} cannot hold an access key: the key's own account is one below, so that its holder has at"
            f" most {self.depth_max} segments and room for the key's id"
        )


@dataclass(frozen=True, slots=True)
class CapUnitUnknown:
    """The catalogue has no such unit."""

    code: ClassVar = "unknown_unit"
    unit: str

    def __str__(self) -> str:
        return f"the catalogue has no unit {self.unit!r}"


@dataclass(frozen=True, slots=True)
class CapUnitIsMoney:
    """A cap in money would be money of the key's own."""

    code: ClassVar = "cap_unit_is_money"
    unit: str

    def __str__(self) -> str:
        return f"{self.unit} is money: a key is capped in units of the kind cap"


@dataclass(frozen=True, slots=True)
class CapInvalid:
    """A cap that cannot be meant; `reason` is a clause."""

    code: ClassVar = "invalid_cap"
    unit: str
    reason: str

    def __str__(self) -> str:
        return f"the cap in {self.unit}: {self.reason}"


@dataclass(frozen=True, slots=True)
class KeyUnknown:
    """No such access key was ever made."""

    code: ClassVar = "key_unknown"

    def __str__(self) -> str:
        return "there is no such access key"


@dataclass(frozen=True, slots=True)
class KeyDisabled:
    """The access key was disabled."""

    code: ClassVar = "key_disabled"
    key_id: str

    def __str__(self) -> str:
        return f"the access key {self.key_id} is disabled"


@dataclass(frozen=True, slots=True)
class KeyExpired:
    """The access key was valid until a moment that has passed."""

    code: ClassVar = "key_expired"
    key_id: str

    def __str__(self) -> str:
        return f"the access key {self.key_id} has expired"


@dataclass(frozen=True, slots=True)
class PolicyForbids:
    """The account's key policy does not allow this kind of secret."""

    code: ClassVar = "policy_forbids"
    account: str
    policy: str
    own: bool

    def __str__(self) -> str:
        return f"the key policy of {self.account} is {self.policy}: not {'its own' if self.own else 'our'} secret"


@dataclass(frozen=True, slots=True)
class ConsentMissing:
    """Falling back from an own key to paid credits was never agreed to."""

    code: ClassVar = "consent_missing"
    account: str

    def __str__(self) -> str:
        return f"{self.account} has not agreed to fall back from its own keys to paid credits"


@dataclass(frozen=True, slots=True)
class AlreadyCreated:
    """The access key was made by an earlier request, and its text shown in the answer to that."""

    code: ClassVar = "already_created"
    key_id: str

    def __str__(self) -> str:
        return (
            f"this request made the access key {self.key_id} before, and a key is shown once: if it was lost, disable"
            " it and make another"
        )


@dataclass(frozen=True, slots=True)
class IdempotencyConflict:
    """The idempotency key was used for another request."""

    code: ClassVar = "conflict"
    key_id: str

    def __str__(self) -> str:
        return f"the Idempotency-Key was used for another request, which made {self.key_id}"


@dataclass(frozen=True, slots=True)
class LedgerRefused:
    """The ledger will not open the account or grant what the key needs. Asking again is safe."""

    code: ClassVar = "ledger_refused"
    ledger_code: str
    reason: str

    def __str__(self) -> str:
        return f"the ledger refused ({self.ledger_code}): {self.reason}"


@dataclass(frozen=True, slots=True)
class LedgerAway:
    """The ledger did not answer. Asking again completes what was begun, and does nothing twice."""

    code: ClassVar = "ledger_away"
    reason: str

    def __str__(self) -> str:
        return f"the ledger is away, and no key was made: {self.reason}"


Refusal = (
    SecretMalformed
    | ExpiryPassed
    | SecretNotFound
    | NoOwnSecret
    | NoPlatformSecret
    | SecretUndecryptable
    | AccountTooDeep
    | CapUnitUnknown
    | CapUnitIsMoney
    | CapInvalid
    | KeyUnknown
    | KeyDisabled
    | KeyExpired
    | PolicyForbids
    | ConsentMissing
    | AlreadyCreated
    | IdempotencyConflict
    | LedgerRefused
    | LedgerAway
)
