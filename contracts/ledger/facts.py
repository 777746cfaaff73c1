"""The facts that the ledger publishes, through its outbox."""

from typing import Annotated, Final, Literal

from pydantic import Field

from contracts.accounts import AccountId
from contracts.billing import ClaimId, ClaimReason, ClaimState, PaymentId
from contracts.envelope import EventId, SourceName
from contracts.ids import HoldId, LotId, TransactionId
from contracts.ledger.terms import Frozen, LotKind, Reason, Reference, RuleId, Threshold
from contracts.metering import REVISION_MAX, CorrectionId
from contracts.money import Amount
from contracts.partition import Partition
from contracts.times import Time


class _Fact(Frozen):
    partition: Partition
    number: Annotated[int, Field(ge=1)]
    transaction: TransactionId
    recorded_at: Time


class HeadsSigned(Frozen):
    """Where partitions stand after a commit, signed by the ledger: to be kept where whoever may change it cannot reach.

    `heads` is a title, then a line `<partition> <batch> <chain hash>` for each. `signature` is Ed25519, in base64, by
    the key whose public half has `key_id` as the first 16 hexadecimal digits of its SHA-256.
    """

    type: Literal["ledger.heads.signed.v1"] = "ledger.heads.signed.v1"
    partition: Partition
    number: Annotated[int, Field(ge=1)]
    recorded_at: Time
    heads: Annotated[str, Field(min_length=1, max_length=16_384)]
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{86}==$")]
    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class AccountOpened(_Fact):
    """An account exists from now on: usage reported for it can be charged."""

    type: Literal["ledger.account.opened.v1"] = "ledger.account.opened.v1"
    account: AccountId


class LotGranted(_Fact):
    """A lot was added to a wallet. `repaid` of it went to debt at once. Of a recurring grant: its rule and period."""

    type: Literal["ledger.lot.granted.v1"] = "ledger.lot.granted.v1"
    account: AccountId
    lot: LotId
    kind: LotKind
    granted: Amount
    repaid: Amount
    reference: Reference | None = None
    effective_at: Time | None = None
    expires_at: Time | None = None
    rule: RuleId | None = None
    period: Annotated[int, Field(ge=0)] | None = None


class LotExpired(_Fact):
    """What was left of a lot, and not held, has expired. What is held does when it is released."""

    type: Literal["ledger.lot.expired.v1"] = "ledger.lot.expired.v1"
    account: AccountId
    lot: LotId
    kind: LotKind
    expired: Amount


class LotVoided(_Fact):
    """What was left of a lot, and not held, was taken back. What is held is as it is released."""

    type: Literal["ledger.lot.voided.v1"] = "ledger.lot.voided.v1"
    account: AccountId
    lot: LotId
    kind: LotKind
    voided: Amount
    reason: Reason | None = None


class HoldPlaced(_Fact):
    """Amounts were set aside."""

    type: Literal["ledger.hold.placed.v1"] = "ledger.hold.placed.v1"
    account: AccountId
    hold: HoldId
    held: tuple[Amount, ...]
    expires_at: Time


class HoldExtended(_Fact):
    """A hold has a later deadline. `held` is what it has set aside in all, since it was placed."""

    type: Literal["ledger.hold.extended.v1"] = "ledger.hold.extended.v1"
    account: AccountId
    hold: HoldId
    held: tuple[Amount, ...]
    expires_at: Time


class HoldSettled(_Fact):
    """A hold ended with a charge. What was set aside, or charged as an estimate, and was not needed is `released`."""

    type: Literal["ledger.hold.settled.v1"] = "ledger.hold.settled.v1"
    account: AccountId
    hold: HoldId
    released: tuple[Amount, ...]


class HoldExpired(_Fact):
    """A hold was past its deadline and ended as it says itself: released, or its estimate was charged."""

    type: Literal["ledger.hold.expired.v1"] = "ledger.hold.expired.v1"
    account: AccountId
    hold: HoldId
    released: tuple[Amount, ...] = ()
    estimated: tuple[Amount, ...] = ()


class HoldReleased(_Fact):
    """A hold ended without a charge."""

    type: Literal["ledger.hold.released.v1"] = "ledger.hold.released.v1"
    account: AccountId
    hold: HoldId
    released: tuple[Amount, ...]


class AccountCharged(Frozen):
    """What an account was charged, summed per unit over its lines."""

    account: AccountId
    charged: tuple[Amount, ...]
    lines: Annotated[int, Field(ge=1)]


# A transaction that charges more is told in several facts: each stays well below what NATS takes.
CHARGED_ACCOUNTS_MAX: Final = 250


class UsageCharged(_Fact):
    """What accounts were charged in one transaction, each account in one place of one fact."""

    type: Literal["ledger.usage.charged.v2"] = "ledger.usage.charged.v2"
    accounts: Annotated[tuple[AccountCharged, ...], Field(min_length=1, max_length=CHARGED_ACCOUNTS_MAX)]


class UsageChargedToOne(_Fact):
    """What an account was charged in one transaction. Told no more: what was told so before can still be read."""

    type: Literal["ledger.usage.charged.v1"] = "ledger.usage.charged.v1"
    account: AccountId
    charged: tuple[Amount, ...]
    lines: Annotated[int, Field(ge=1)]


class ChargeReversed(_Fact):
    """What a charge took, or a part of it, was given back. `correction`: which of metering's wanted it, if one did."""

    type: Literal["ledger.charge.reversed.v1"] = "ledger.charge.reversed.v1"
    account: AccountId
    source: SourceName
    event_id: EventId
    revision: Annotated[int, Field(ge=0, le=REVISION_MAX)] = 0
    reversed: tuple[Amount, ...]
    reason: Reason | None = None
    # Not written when there is none: readers of before know no such field.
    correction: CorrectionId | None = Field(default=None, exclude_if=lambda value: value is None)


class MoneyTransferred(_Fact):
    """Available money was moved to another account of the tree."""

    type: Literal["ledger.money.transferred.v1"] = "ledger.money.transferred.v1"
    account: AccountId
    to_account: AccountId
    transferred: Amount
    reason: Reason | None = None


class PaymentClaimed(_Fact):
    """A claim on a payment was noted. `clawed_back`, `frozen`: what it took, and froze, at once; below 0: gave back."""

    type: Literal["ledger.payment.claimed.v1"] = "ledger.payment.claimed.v1"
    account: AccountId
    payment: PaymentId
    claim: ClaimId
    reason: ClaimReason
    state: ClaimState
    claimed: Amount
    clawed_back: tuple[Amount, ...] = ()
    frozen: tuple[Amount, ...] = ()


class _BalanceFact(_Fact):
    account: AccountId
    available: Amount


class BalanceLow(_BalanceFact):
    """A wallet is at or below one of its thresholds. Told once, and again only after it has recovered."""

    type: Literal["ledger.balance.low.v1"] = "ledger.balance.low.v1"
    threshold: Threshold


class BalanceExhausted(_BalanceFact):
    """A wallet has nothing available any more. Told once, and again only after it has recovered."""

    type: Literal["ledger.balance.exhausted.v1"] = "ledger.balance.exhausted.v1"


class BalanceRecovered(_BalanceFact):
    """A wallet is above a level that it was told to be at or below. Without a threshold: it has something again."""

    type: Literal["ledger.balance.recovered.v1"] = "ledger.balance.recovered.v1"
    threshold: Threshold | None = None
