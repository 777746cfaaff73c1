"""What billing says: what it heard from Stripe (to itself), and what the ledger must know about payments.

One payment is one id, Stripe's payment intent, however many of Stripe's events report it.
"""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from contracts.accounts import AccountId
from contracts.money import Amount
from contracts.partition import Partition, token
from contracts.times import Time

StripeId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,255}$")]
PaymentId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,128}$", examples=["pi_1PgafyB7WZ01zgkW6dKueIc5"])]
ClaimId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,128}$", examples=["re_1Pgag2B7WZ01zgkWqPvrRrPE"])]
PackageId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", examples=["usd-25"])]
ClaimReason = Literal["refund", "dispute"]
ClaimState = Literal["open", "final", "void"]

STRIPE_RECEIVED_SUBJECT: Final = "billing.v1.stripe.received"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class StripeReceived(_Frozen):
    """An event of Stripe's is in the inbox: to be processed from there, by its id. `number` counts events gaplessly."""

    type: Literal["billing.stripe.received.v1"] = "billing.stripe.received.v1"
    number: Annotated[int, Field(ge=1)]
    event: StripeId
    recorded_at: Time


class _PaymentFact(_Frozen):
    partition: Partition
    number: Annotated[int, Field(ge=1)]
    account: AccountId
    payment: PaymentId
    recorded_at: Time


class PaymentReceived(_PaymentFact):
    """Money arrived for a package: the ledger grants `paid` as a purchase lot and `bonus`, if any, as a bonus lot.

    Said once per payment, before any claim on it.
    """

    type: Literal["billing.payment.received.v1"] = "billing.payment.received.v1"
    package: PackageId
    quantity: Annotated[int, Field(ge=1)] = 1
    paid: Amount
    bonus: Amount | None = None
    occurred_at: Time


class PaymentClaimed(_PaymentFact):
    """Money goes back: a refund or a dispute over part or all of a payment, in the unit of what was granted for it.

    `open`: it may go back. `final`: it has. `void`: it will not, or came again. Of the facts about one claim the one
    with the highest number counts, its amount included. Claims on a payment may sum up to more than it (a refund and a
    dispute): whoever claws back takes no more than was paid.
    """

    type: Literal["billing.payment.claimed.v1"] = "billing.payment.claimed.v1"
    claim: ClaimId
    reason: ClaimReason
    state: ClaimState
    claimed: Amount
    occurred_at: Time


def payment_subject(*, partition: int, verb: Literal["received", "claimed"]) -> str:
    """Where billing says what became of a payment."""
    return f"billing.v1.{token(partition)}.payment.{verb}"
