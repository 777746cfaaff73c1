"""What keyvault is asked by the gateway (request/reply), what it answers, and the facts it publishes about keys.

An access key itself never travels: the gateway sends its SHA-256. A provider secret travels only in the answer to a
lease, to the gateway, and is written out by nothing but `Leased.wire`.
"""

import re
from hashlib import sha256
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, SerializationInfo, TypeAdapter, field_serializer

from contracts.accounts import AccountId
from contracts.partition import Partition, token
from contracts.times import Time
from contracts.usage import ProviderName

# `own`: only the account's provider secret. `credits`: only the platform's, paid in credits. `own_then_credits`: the
# account's where it has one, else the platform's, and only with recorded consent.
KeyPolicy = Literal["own", "credits", "own_then_credits"]
AccessKeyId = Annotated[str, Field(pattern=r"^key_[a-z0-9]{8,32}$", examples=["key_7f3k9q2m"])]
Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", examples=["0f" * 32])]

# What is not of this form is no access key, and need not be asked about.
ACCESS_KEY: Final = re.compile(r"sk-scrip-([a-z0-9]{8,32})-([0-9A-Za-z]{43})")

# The only user that a provider secret is leased to.
LEASED_TO: Final = "gateway"

_MASKED: Final = "**********"
_WIRE: Final = "wire"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)


class VerifyKey(_Frozen):
    """Whose access key is this? Refused as: key_unknown, key_disabled, key_expired."""

    command: Literal["verify"] = "verify"
    key_sha256: Sha256Hex


class LeaseSecret(_Frozen):
    """The provider secret for one call of an account, by its key policy. `own`: which one the call was admitted for.

    Refused as: no_own_secret, no_platform_secret, consent_missing, policy_forbids, key_disabled, key_expired,
    secret_undecryptable.
    """

    command: Literal["lease"] = "lease"
    account: AccountId
    provider: ProviderName
    own: bool


KeyCommand = Annotated[VerifyKey | LeaseSecret, Field(discriminator="command")]
KEY_COMMANDS: Final[TypeAdapter[VerifyKey | LeaseSecret]] = TypeAdapter(
    KeyCommand, config=ConfigDict(hide_input_in_errors=True)
)


class Verified(_Frozen):
    """A key that may be used, until `expires_at` if it has one. `account` is the key's own.

    `policy` and `consent` are those of the nearest account on its path that has chosen one; `own_providers`: for which
    providers it, or an account above it, stored a secret.
    """

    status: Literal["verified"] = "verified"
    key_id: AccessKeyId
    account: AccountId
    policy: KeyPolicy
    consent: bool
    own_providers: tuple[ProviderName, ...] = ()
    expires_at: Time | None = None


class Leased(_Frozen):
    """A provider secret, for use until `expires_at` in memory only. `own`: it is an account's, not the platform's.

    `record` and `version` name the stored secret: safe to log, unlike `secret`.
    """

    status: Literal["leased"] = "leased"
    secret: SecretStr
    own: bool
    record: str
    version: Annotated[int, Field(ge=1)]
    expires_at: Time

    def wire(self) -> bytes:
        """The answer as JSON with the secret in the clear. Everything else that writes a lease masks it."""
        return self.model_dump_json(context=_WIRE).encode()

    @field_serializer("secret", when_used="json")
    def _secret_text(self, secret: SecretStr, info: SerializationInfo) -> str:
        return secret.get_secret_value() if info.context == _WIRE else _MASKED


class KeyRefused(_Frozen):
    """Keyvault will not; `code` says why in a stable word. `unavailable` and `fault` are worth another try."""

    status: Literal["refused"] = "refused"
    code: Literal[
        "key_unknown",
        "key_disabled",
        "key_expired",
        "no_own_secret",
        "no_platform_secret",
        "consent_missing",
        "policy_forbids",
        "secret_undecryptable",
        "not_permitted",
        "invalid",
        "unavailable",
        "fault",
    ]
    message: str


KeyReply = Annotated[Verified | Leased | KeyRefused, Field(discriminator="status")]
KEY_REPLIES: Final[TypeAdapter[Verified | Leased | KeyRefused]] = TypeAdapter(
    KeyReply, config=ConfigDict(hide_input_in_errors=True)
)


class _KeyFact(_Frozen):
    partition: Partition
    number: Annotated[int, Field(ge=1)]
    account: AccountId
    recorded_at: Time


class KeyCreated(_KeyFact):
    """An access key exists; its own account is `account`."""

    type: Literal["keyvault.key.created.v1"] = "keyvault.key.created.v1"
    key_id: AccessKeyId


class KeyDisabled(_KeyFact):
    """An access key is no longer valid: whoever remembers it forgets it now."""

    type: Literal["keyvault.key.disabled.v1"] = "keyvault.key.disabled.v1"
    key_id: AccessKeyId


class KeyPolicyChanged(_KeyFact):
    """The key policy or a provider secret of `account` changed: what was verified below it is asked again."""

    type: Literal["keyvault.key.policy_changed.v1"] = "keyvault.key.policy_changed.v1"


KeyFact = KeyCreated | KeyDisabled | KeyPolicyChanged


def key_hash(access_key: str) -> str:
    """What an access key is looked up by: its SHA-256 in hexadecimal. It has 256 random bits, so that is enough."""
    return sha256(access_key.encode("utf-8", "surrogatepass")).hexdigest()


def key_command_subject(*, command: str, principal: str) -> str:
    """Where keyvault takes a command. The last token is the caller: no user may publish another's."""
    return f"rpc.keyvault.v1.{command}.{principal}"


def key_fact_subject(*, partition: int, verb: str) -> str:
    """Where keyvault publishes what happened to keys."""
    return f"keyvault.v1.{token(partition)}.key.{verb}"
