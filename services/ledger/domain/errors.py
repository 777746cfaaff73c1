"""Why the ledger will not: typed, with the numbers a caller needs. A refusal changes nothing.

Refusal
├── UnknownUnit, InvalidAmount, InvalidTime,
│   InvalidRule, InvalidTransfer, InvalidTerms   what was asked makes no sense
├── AccountNotOpen, WalletNotOpen, UnknownHold,
│   UnknownLot, UnknownRule, UnknownCharge        nothing is there
├── WalletPolicyDiffers, AccountDiffers,
│   PaymentDiffers                                it is there, and other than was said
├── HoldExists, HoldReleased, HoldSettled,
│   HoldExpired                                   a hold begins once and ends once
├── AlreadyCharged, ChargeDiffers                 a use is charged once
├── MoreThanCharged                               what was charged is given back once
└── InsufficientFunds                             a hard wallet stays above its floor
"""

from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class UnknownUnit:
    """The catalogue has no such unit."""

    code: ClassVar = "unknown_unit"
    unit: str

    def __str__(self) -> str:
        return f"the catalogue has no unit {self.unit!r}"


@dataclass(frozen=True, slots=True)
class InvalidAmount:
    """An amount that cannot be meant; `reason` is a clause."""

    code: ClassVar = "invalid_amount"
    unit: str
    reason: str

    def __str__(self) -> str:
        return f"{self.unit}: {self.reason}"


@dataclass(frozen=True, slots=True)
class InvalidTime:
    """Something happened later than now, or ends before it begins, or has ended; `reason` is a clause."""

    code: ClassVar = "invalid_time"
    occurred_at: datetime
    recorded_at: datetime
    reason: str = "is later than now"

    def __str__(self) -> str:
        return f"{self.occurred_at.isoformat()} {self.reason}, {self.recorded_at.isoformat()}"


@dataclass(frozen=True, slots=True)
class AccountNotOpen:
    """Nobody opened the account."""

    code: ClassVar = "account_not_open"
    account: str

    def __str__(self) -> str:
        return f"the account {self.account} is not open"


@dataclass(frozen=True, slots=True)
class WalletNotOpen:
    """The account has no wallet of the unit."""

    code: ClassVar = "wallet_not_open"
    account: str
    unit: str

    def __str__(self) -> str:
        return f"the account {self.account} has no {self.unit} wallet"


@dataclass(frozen=True, slots=True)
class WalletPolicyDiffers:
    """The wallet is open with another policy."""

    code: ClassVar = "wallet_policy_differs"
    account: str
    unit: str
    policy: str
    asked: str

    def __str__(self) -> str:
        return f"the {self.unit} wallet of {self.account} is {self.policy}, not {self.asked}"


@dataclass(frozen=True, slots=True)
class AccountDiffers:
    """The hold is another account's."""

    code: ClassVar = "account_differs"
    hold: str
    account: str

    def __str__(self) -> str:
        return f"the hold {self.hold} is not one of {self.account}"


@dataclass(frozen=True, slots=True)
class PaymentDiffers:
    """The payment is another account's."""

    code: ClassVar = "account_differs"
    payment: str
    account: str

    def __str__(self) -> str:
        return f"the payment {self.payment} is not one of {self.account}"


@dataclass(frozen=True, slots=True)
class HoldExists:
    """A hold of this id is open already."""

    code: ClassVar = "hold_exists"
    hold: str

    def __str__(self) -> str:
        return f"the hold {self.hold} has been placed already"


@dataclass(frozen=True, slots=True)
class HoldReleased:
    """The hold has ended without a charge, or was released before it was placed."""

    code: ClassVar = "hold_released"
    hold: str

    def __str__(self) -> str:
        return f"the hold {self.hold} has been released"


@dataclass(frozen=True, slots=True)
class HoldSettled:
    """The hold has ended with a charge, or a charge named it before it was placed."""

    code: ClassVar = "hold_settled"
    hold: str

    def __str__(self) -> str:
        return f"the hold {self.hold} has been settled"


@dataclass(frozen=True, slots=True)
class AlreadyCharged:
    """This very line was charged before."""

    code: ClassVar = "already_charged"
    source: str
    event_id: str
    revision: int

    def __str__(self) -> str:
        return f"{self.source} {self.event_id} revision {self.revision} has been charged"


@dataclass(frozen=True, slots=True)
class ChargeDiffers:
    """The use was charged before, and that line said something else."""

    code: ClassVar = "charge_differs"
    source: str
    event_id: str
    revision: int

    def __str__(self) -> str:
        return f"{self.source} {self.event_id} revision {self.revision} has been charged with another content"


@dataclass(frozen=True, slots=True)
class InsufficientFunds:
    """A wallet has less available than the least that was asked for. Amounts in the unit's steps."""

    code: ClassVar = "insufficient_funds"
    account: str
    unit: str
    required: int
    remaining: int

    def __str__(self) -> str:
        return f"the {self.unit} wallet of {self.account} has not got what is required"


@dataclass(frozen=True, slots=True)
class InvalidRule:
    """A recurring grant that cannot be meant; `reason` is a clause."""

    code: ClassVar = "invalid_rule"
    rule: str
    reason: str

    def __str__(self) -> str:
        return f"rule {self.rule}: {self.reason}"


@dataclass(frozen=True, slots=True)
class InvalidTerms:
    """Terms of a wallet that cannot be meant; `reason` is a clause."""

    code: ClassVar = "invalid_terms"
    unit: str
    reason: str

    def __str__(self) -> str:
        return f"{self.unit}: {self.reason}"


@dataclass(frozen=True, slots=True)
class InvalidTransfer:
    """A transfer that cannot be meant; `reason` is a clause."""

    code: ClassVar = "invalid_transfer"
    account: str
    to_account: str
    reason: str

    def __str__(self) -> str:
        return f"{self.account} to {self.to_account}: {self.reason}"


@dataclass(frozen=True, slots=True)
class UnknownHold:
    """There has never been such a hold."""

    code: ClassVar = "unknown_hold"
    hold: str

    def __str__(self) -> str:
        return f"there is no hold {self.hold}"


@dataclass(frozen=True, slots=True)
class HoldExpired:
    """The hold is past its deadline, and ends or has ended as it says itself."""

    code: ClassVar = "hold_expired"
    hold: str

    def __str__(self) -> str:
        return f"the hold {self.hold} is past its deadline"


@dataclass(frozen=True, slots=True)
class UnknownLot:
    """The account has no such lot, or nothing is left of it."""

    code: ClassVar = "unknown_lot"
    lot: str
    account: str

    def __str__(self) -> str:
        return f"the account {self.account} has no lot {self.lot} of which anything is left"


@dataclass(frozen=True, slots=True)
class UnknownRule:
    """The account has no such recurring grant."""

    code: ClassVar = "unknown_rule"
    rule: str
    account: str

    def __str__(self) -> str:
        return f"the account {self.account} has no rule {self.rule}"


@dataclass(frozen=True, slots=True)
class UnknownCharge:
    """No such line was charged to the account."""

    code: ClassVar = "unknown_charge"
    source: str
    event_id: str
    revision: int

    def __str__(self) -> str:
        return f"{self.source} {self.event_id} revision {self.revision} has not been charged to this account"


@dataclass(frozen=True, slots=True)
class MoreThanCharged:
    """More is to be given back than the line took and has not been given back yet. Amounts in the unit's steps."""

    code: ClassVar = "more_than_charged"
    unit: str
    required: int
    remaining: int

    def __str__(self) -> str:
        return f"less {self.unit} than that is left of the charge to give back"


Refusal = (
    UnknownUnit
    | InvalidAmount
    | InvalidTime
    | AccountNotOpen
    | WalletNotOpen
    | WalletPolicyDiffers
    | AccountDiffers
    | PaymentDiffers
    | HoldExists
    | HoldReleased
    | HoldSettled
    | AlreadyCharged
    | ChargeDiffers
    | InsufficientFunds
    | InvalidRule
    | InvalidTerms
    | InvalidTransfer
    | UnknownHold
    | HoldExpired
    | UnknownLot
    | UnknownRule
    | UnknownCharge
    | MoreThanCharged
)
