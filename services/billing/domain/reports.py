"""What an event of Stripe's says about a payment, in our words. The same object is reported by several events."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from contracts.billing import ClaimReason, ClaimState
from services.billing.domain.offers import Price

# Of reports of the same second the later state counts: a refund is pending, then succeeds, then may still fail.
_RANK: Final[dict[ClaimState, int]] = {"open": 0, "final": 1, "void": 2}


@dataclass(frozen=True, slots=True)
class Naming:
    """What the metadata say a payment is for: our checkout, or account, package and quantity. Text, not checked yet."""

    account: str | None = None
    package: str | None = None
    quantity: str | None = None
    checkout: str | None = None


@dataclass(frozen=True, slots=True)
class PaymentReport:
    """A payment has succeeded."""

    event: str
    told_at: datetime
    paid: Price
    naming: Naming
    session: str | None = None


@dataclass(frozen=True, slots=True)
class ClaimReport:
    """A refund or a dispute is in a state. `claimed_at` is when it began."""

    event: str
    told_at: datetime
    claim: str
    claimed_at: datetime
    reason: ClaimReason
    state: ClaimState
    claimed: Price

    @property
    def recency(self) -> tuple[datetime, int, str]:
        """Of two reports about one claim, the greater one says how it is now."""
        return (self.told_at, _RANK[self.state], self.event)


@dataclass(frozen=True, slots=True)
class RefundedReport:
    """So much of a payment has been refunded in all; by which refunds, other reports say."""

    event: str
    told_at: datetime
    refunded: Price


@dataclass(frozen=True, slots=True)
class RefundsListed:
    """Stripe was asked, because of `event`, for all refunds of the payment: those are reported, too."""

    event: str


Report = PaymentReport | ClaimReport | RefundedReport | RefundsListed
