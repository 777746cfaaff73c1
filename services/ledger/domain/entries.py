"""The journal's lines. Decisions are recorded as entries; every balance is a sum over them."""

import re
from datetime import datetime
from typing import Final, Literal, assert_never

import msgspec

from contracts.money import Unit
from services.ledger.domain.commands import ClaimReason, ClaimState, GrantedKind, Overdue, Policy

Kind = Literal[
    "account_opened",
    "wallet_opened",
    "lot_granted",
    "debt_repaid",
    "hold_placed",
    "hold_released",
    "hold_settled",
    "charged",
    "payment_claimed",
    "clawed_back",
    "given_back",
]
# debt: charged or clawed back beyond the money that was there; the next grant repays it. overage: the same of a cap,
# never owed.
LotKind = Literal[GrantedKind, "debt", "overage"]
Contra = Literal["@usage", "@stripe", "@plan", "@promo", "@adjustment"]


class WalletOpened(msgspec.Struct, frozen=True, tag="wallet_opened", omit_defaults=True):
    """How a wallet treats what it has not got. `overdraft`: how far below zero holds may take it."""

    policy: Policy
    overdraft: int = 0


class LotGranted(msgspec.Struct, frozen=True, tag="lot_granted", omit_defaults=True):
    """What a lot is, but for its kind and its amount. Without `effective_at` it is usable at once."""

    priority: int
    reference: str | None = None
    effective_at: datetime | None = None
    expires_at: datetime | None = None
    scope: str | None = None
    cost_basis: str | None = None
    origin: str | None = None


class DebtRepaid(msgspec.Struct, frozen=True, tag="debt_repaid"):
    """The two sides of a repayment name each other: the lot that paid, and the debt."""

    lot: str
    debt: str


class HeldLeg(msgspec.Struct, frozen=True):
    """One unit of a hold: what was asked, what was set aside, and on whose wallets. They stay the hold's wallets."""

    unit: str
    at_least: int
    at_most: int
    amount: int
    wallets: tuple[str, ...]


class HoldPlaced(msgspec.Struct, frozen=True, tag="hold_placed"):
    """What a hold is. On the first entry of its transaction."""

    account: str
    expires_at: datetime
    overdue: Overdue
    legs: tuple[HeldLeg, ...]


class Charged(msgspec.Struct, frozen=True, tag="charged", omit_defaults=True):
    """How many charge lines a transaction took, and the hash over all of them. On its first entry."""

    lines: int
    lines_hash: str
    bundle: int | None = None


class PaymentClaimed(msgspec.Struct, frozen=True, tag="payment_claimed", omit_defaults=True):
    """What a claim on a payment says from now on. `claimed` is in the entry's unit."""

    payment: str
    claim: str
    reason: ClaimReason
    state: ClaimState
    claimed: int
    revision: int = 0


class ClawedBack(msgspec.Struct, frozen=True, tag="clawed_back", omit_defaults=True):
    """Which lot of which payment the entry takes back from, or gives back to; its own lot may be a debt in its stead.

    `pending` is what is added to what will be taken of the lot as holds of it end. An entry that names a hold takes it.
    """

    payment: str
    lot: str
    pending: int = 0


Details = WalletOpened | LotGranted | DebtRepaid | HoldPlaced | Charged | PaymentClaimed | ClawedBack


class Move(msgspec.Struct, frozen=True, gc=False):
    """An entry as it was decided, before it has a place in the journal.

    `account` is a wallet's, or a contra (`@usage`, for caps `@usage/<account>`), by which the posted of a transaction
    sum to zero per unit. A lot is named with its kind. `posted`, `held`, `frozen` are what is added to the lot and its
    wallet.
    """

    kind: Kind
    account: str
    occurred_at: datetime
    unit: str | None = None
    lot: str | None = None
    lot_kind: LotKind | None = None
    hold: str | None = None
    posted: int = 0
    held: int = 0
    frozen: int = 0
    details: Details | None = None


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A line of the journal: a move and its place. (partition, batch, position) has no gaps."""

    batch: int
    position: int
    transaction: str
    recorded_at: datetime
    kind: Kind
    account: str
    occurred_at: datetime
    unit: str | None
    lot: str | None
    lot_kind: LotKind | None
    hold: str | None
    posted: int
    held: int
    frozen: int
    details: Details | None


def is_contra(account: str) -> bool:
    """Contras are not accounts: they carry the other side of what is posted, and no balance."""
    return account.startswith("@")


_PAYMENT: Final = re.compile(r"[A-Za-z0-9_]{1,128}")


def payment_of(kind: LotKind, reference: str | None) -> str | None:
    """The payment that a lot was granted for: what a purchase or a bonus refers to, if it can be one's id."""
    if reference is None or kind not in {"purchase", "bonus"} or _PAYMENT.fullmatch(reference) is None:
        return None
    return reference


def granted_by(kind: LotKind) -> Contra:
    """The contra on the other side of a lot's grant."""
    match kind:
        case "plan":
            return "@plan"
        case "promo" | "bonus":
            return "@promo"
        case "purchase":
            return "@stripe"
        case "adjustment":
            return "@adjustment"
        case "debt" | "overage":
            raise ValueError(f"nobody grants a lot of kind {kind}")
        case _:
            assert_never(kind)


def contra_move(kind: Kind, contra: Contra, *, account: str, unit: Unit, posted: int, occurred_at: datetime) -> Move:
    """The other side: for money one contra of the partition, for caps one per wallet, as each counts for itself."""
    of_unit = contra if unit.kind == "money" else f"{contra}/{account}"
    return Move(kind=kind, account=of_unit, occurred_at=occurred_at, unit=unit.name, posted=posted)
