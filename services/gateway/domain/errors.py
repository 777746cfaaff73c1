"""Why a call is not served: typed, each with a stable code and its numbers. None carries a secret.

Refusal
├── KeyRefused                                   who is it
├── RequestInvalid, BodyTooLarge, BodyTooSlow    what was sent
├── ModelNotPriced, NoProvider, UnknownPath      nothing of that name
├── SecretRefused                                the account has not agreed, or has no secret
├── InsufficientFunds, AccountNotOpen            it may not start
├── Unavailable                                  it cannot be decided now: never means allowed
├── ClientLeft                                   nobody waits for it any more
├── ProviderFailed                               the provider did not serve it
└── NotRecorded                                  it was served, and its usage is nowhere durable
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from contracts.money import Amount

# No priced model has a longer name.
_MODEL_LENGTH_MAX: Final = 128


class Refusal(Exception):
    """A call that is not served, or not to its end."""

    code: str


@dataclass(eq=False, kw_only=True)
class KeyRefused(Refusal):
    """The access key is missing, unknown, disabled or expired."""

    code: str
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False, kw_only=True)
class RequestInvalid(Refusal):
    """The request cannot be served as it stands. `param` is its place, where there is one."""

    reason: str
    param: str | None = None
    code: str = "invalid_value"

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False, kw_only=True)
class BodyTooLarge(Refusal):
    """More than one call may send."""

    bytes_max: int
    code: str = "body_too_large"

    def __str__(self) -> str:
        return f"the body has more than {self.bytes_max} bytes"


@dataclass(eq=False, kw_only=True)
class BodyTooSlow(Refusal):
    """The body did not arrive in time."""

    code: str = "body_too_slow"

    def __str__(self) -> str:
        return "the body did not arrive in time"


@dataclass(eq=False, kw_only=True)
class ModelNotPriced(Refusal):
    """The price book has no price for the model: it is refused, never free."""

    model: str
    price_version: str
    code: str = "model_not_priced"

    def __str__(self) -> str:
        return f"the price book (version {self.price_version}) has no price for the model {_short(self.model)!r}"


@dataclass(eq=False, kw_only=True)
class NoProvider(Refusal):
    """The model has a price, and nobody who serves it."""

    model: str
    providers: tuple[str, ...]
    code: str = "provider_not_configured"

    def __str__(self) -> str:
        return f"no provider of the model {self.model!r} is configured here ({', '.join(self.providers)})"


@dataclass(eq=False, kw_only=True)
class UnknownPath(Refusal):
    """Nothing is passed through that is not metered."""

    method: str
    path: str
    code: str = "unknown_url"

    def __str__(self) -> str:
        return f"unknown request: {self.method} {self.path}"


@dataclass(eq=False, kw_only=True)
class SecretRefused(Refusal):
    """There is no provider secret that this call may use. `own`: it would have been the account's."""

    code: str
    reason: str
    own: bool

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False, kw_only=True)
class InsufficientFunds(Refusal):
    """A wallet has not got what the call may cost. `affordable_max_tokens` output tokens a choice would fit."""

    limit_source: str | None
    required: Amount | None
    remaining: Amount | None
    affordable_max_tokens: int
    code: str = "insufficient_quota"

    def __str__(self) -> str:
        if self.required is None or self.remaining is None:
            return "there is not enough left for this call"
        return (
            f"this call may cost {self.required.amount} {self.required.unit}, and {self.limit_source} has"
            f" {self.remaining.amount} {self.remaining.unit} left, enough for max_tokens={self.affordable_max_tokens}"
        )


@dataclass(eq=False, kw_only=True)
class AccountNotOpen(Refusal):
    """The key's account is not open in the ledger."""

    account: str
    code: str = "account_not_open"

    def __str__(self) -> str:
        return f"the account {self.account} is not open"


@dataclass(eq=False, kw_only=True)
class Unavailable(Refusal):
    """Something that has to answer first does not. Nothing was forwarded."""

    reason: str
    retry_after_seconds: int = 1
    code: str = "unavailable"

    def __str__(self) -> str:
        return f"{self.reason}; nothing was forwarded: try again"


@dataclass(eq=False, kw_only=True)
class ClientLeft(Refusal):
    """The client left before its call was forwarded."""

    code: str = "client_left"

    def __str__(self) -> str:
        return "the client left before its call was forwarded"


@dataclass(eq=False, kw_only=True)
class ProviderFailed(Refusal):
    """The provider refused, could not be reached, broke off or took too long.

    `status` is what the client is told. `produced`: it had begun to answer, so that trying again costs again.
    """

    reason: str
    code: str = "provider_failed"
    status: int = 502
    param: str | None = None
    produced: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False, kw_only=True)
class NotRecorded(Refusal):
    """Neither the stream nor the spool took the usage event."""

    request_id: str
    code: str = "usage_not_recorded"

    def __str__(self) -> str:
        return f"the use of the call {self.request_id} could not be recorded"


def _short(name: str) -> str:
    """What a client sent, in no more letters than an answer and a log should repeat."""
    return name if len(name) <= _MODEL_LENGTH_MAX else f"{name[:_MODEL_LENGTH_MAX]}…"
