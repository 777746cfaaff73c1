"""What the ledger is asked (request/reply and HTTP), what it answers, and the facts it publishes."""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from contracts.accounts import AccountId
from contracts.billing import ClaimId, ClaimReason, PaymentId
from contracts.ids import HoldId, LotId, TransactionId
from contracts.metering import ChargeLine
from contracts.money import Amount, AmountText, UnitName
from contracts.partition import Partition
from contracts.times import Time

IdempotencyKey = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]+$")]
# Postgres has no text with a NUL in it.
Reference = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")]
LotKind = Literal["plan", "promo", "bonus", "purchase", "adjustment"]
WalletPolicy = Literal["hard"]

WALLETS_MAX = 16
HOLD_LEGS_MAX = 16
HOLD_SECONDS_MAX = 86_400


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class WalletSpec(_Frozen):
    """A wallet to open: the account's holding of one unit."""

    unit: UnitName
    policy: WalletPolicy = "hard"


class OpenAccount(_Frozen):
    """Open an account, all above it that are not open yet, and wallets of its own. What is open already stays as it is.

    Refused as: wallet_policy_differs, unknown_unit.
    """

    command: Literal["open_account"] = "open_account"
    idempotency_key: IdempotencyKey
    account: AccountId
    wallets: Annotated[tuple[WalletSpec, ...], Field(max_length=WALLETS_MAX)] = ()


class Grant(_Frozen):
    """Add a lot to an open wallet; its debt is repaid first. `reference` says what for (a payment, a ticket).

    A purchase, or a bonus, with the id of a payment as its reference is what claims on that payment take back.
    Refused as: unknown_unit, invalid_amount, invalid_time, account_not_open, wallet_not_open.
    """

    command: Literal["grant"] = "grant"
    idempotency_key: IdempotencyKey
    account: AccountId
    unit: UnitName
    amount: AmountText
    kind: LotKind = "adjustment"
    priority: Annotated[int, Field(ge=0, le=1000)] = 100
    occurred_at: Time | None = None
    reference: Reference | None = None


class HoldLeg(_Frozen):
    """How much of a unit to set aside: what is there between the two, or a refusal. Equal means all or nothing."""

    unit: UnitName
    at_least: AmountText
    at_most: AmountText


class PlaceHold(_Frozen):
    """Set amounts aside before work is done, on every wallet concerned, together or not at all.

    Refused as: unknown_unit, invalid_amount, account_not_open, account_differs, insufficient_funds, hold_exists,
    hold_released, hold_settled.
    """

    command: Literal["place_hold"] = "place_hold"
    idempotency_key: IdempotencyKey
    hold: HoldId
    account: AccountId
    legs: Annotated[tuple[HoldLeg, ...], Field(min_length=1, max_length=HOLD_LEGS_MAX)]
    lifetime_seconds: Annotated[int, Field(ge=1, le=HOLD_SECONDS_MAX)] = 900


class ReleaseHold(_Frozen):
    """End a hold and give back what it set aside. Releasing an unknown hold leaves a tombstone: it is never placed.

    Refused as: hold_released, hold_settled, account_differs.
    """

    command: Literal["release_hold"] = "release_hold"
    idempotency_key: IdempotencyKey
    hold: HoldId
    account: AccountId


class Charge(_Frozen):
    """What one use really cost: a fact, never refused for want of money. Settles the hold it names, or stands alone.

    Refused as: unknown_unit, invalid_amount, invalid_time, account_not_open, account_differs, already_charged,
    charge_differs.
    """

    command: Literal["charge"] = "charge"
    idempotency_key: IdempotencyKey
    line: ChargeLine


class ClaimPayment(_Frozen):
    """A refund of, or a dispute over, part or all of what was granted for a payment; it may come before the grant.

    A claim's state of the highest `revision` counts, of equal ones the latest: a lower one that comes late changes
    nothing. Of all claims on a payment, `final` ones are clawed back, up to what was paid, and the bonus in proportion:
    from what is left of the payment's lots at once, from what is held when it is released, and what was spent as debt.
    A `void` one gives back what it took. Refused as: unknown_unit, invalid_amount, invalid_time, account_not_open,
    wallet_not_open, account_differs.
    """

    command: Literal["claim_payment"] = "claim_payment"
    idempotency_key: IdempotencyKey
    account: AccountId
    payment: PaymentId
    claim: ClaimId
    reason: ClaimReason
    state: Literal["final", "void"]
    claimed: Amount
    revision: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    occurred_at: Time | None = None


Command = Annotated[
    OpenAccount | Grant | PlaceHold | ReleaseHold | Charge | ClaimPayment, Field(discriminator="command")
]
COMMANDS: Final[TypeAdapter[OpenAccount | Grant | PlaceHold | ReleaseHold | Charge | ClaimPayment]] = TypeAdapter(
    Command
)


class Movement(_Frozen):
    """How a transaction changed one lot of one wallet. Debt is a pseudo-lot: `lot` is then null."""

    account: AccountId
    unit: UnitName
    lot: LotId | None
    posted: AmountText
    held: AmountText


class Remaining(_Frozen):
    """What a wallet that a hold was placed on has available after it."""

    account: AccountId
    unit: UnitName
    available: AmountText


class Accepted(_Frozen):
    """The command's first accepted outcome; `replayed` if this very command had been accepted before."""

    status: Literal["accepted"] = "accepted"
    transaction: TransactionId
    recorded_at: Time
    movements: tuple[Movement, ...] = ()
    remaining: tuple[Remaining, ...] = ()
    replayed: bool = False


class Refused(_Frozen):
    """The ledger will not: nothing was changed; asking again decides anew. Numbers are of the wallet that refused."""

    status: Literal["refused"] = "refused"
    code: str
    message: str
    limit_source: AccountId | None = None
    required: Amount | None = None
    remaining: Amount | None = None


class Failed(_Frozen):
    """The command was not decided. `conflict`: its key was used for another body. `busy`, `unavailable`: try again."""

    status: Literal["failed"] = "failed"
    code: Literal["invalid", "conflict", "busy", "unavailable", "fault"]
    message: str


Reply = Annotated[Accepted | Refused | Failed, Field(discriminator="status")]
REPLIES: Final[TypeAdapter[Accepted | Refused | Failed]] = TypeAdapter(Reply)


class _Fact(_Frozen):
    partition: Partition
    number: Annotated[int, Field(ge=1)]
    transaction: TransactionId
    recorded_at: Time


class AccountOpened(_Fact):
    """An account exists from now on: usage reported for it can be charged."""

    type: Literal["ledger.account.opened.v1"] = "ledger.account.opened.v1"
    account: AccountId


class LotGranted(_Fact):
    """A lot was added to a wallet. `repaid` of it went to debt at once."""

    type: Literal["ledger.lot.granted.v1"] = "ledger.lot.granted.v1"
    account: AccountId
    lot: LotId
    kind: LotKind
    granted: Amount
    repaid: Amount
    reference: Reference | None = None


class HoldPlaced(_Fact):
    """Amounts were set aside."""

    type: Literal["ledger.hold.placed.v1"] = "ledger.hold.placed.v1"
    account: AccountId
    hold: HoldId
    held: tuple[Amount, ...]
    expires_at: Time


class HoldReleased(_Fact):
    """A hold ended without a charge."""

    type: Literal["ledger.hold.released.v1"] = "ledger.hold.released.v1"
    account: AccountId
    hold: HoldId
    released: tuple[Amount, ...]


class UsageCharged(_Fact):
    """What an account was charged in one transaction, summed per unit over its lines."""

    type: Literal["ledger.usage.charged.v1"] = "ledger.usage.charged.v1"
    account: AccountId
    charged: tuple[Amount, ...]
    lines: Annotated[int, Field(ge=1)]
