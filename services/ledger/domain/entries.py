"""The journal's lines. Decisions are recorded as entries; every balance is a sum over them."""

import re
from datetime import datetime
from typing import Final, Literal, assert_never, get_args

import msgspec

from contracts.money import Unit
from services.ledger.domain.commands import (
    ClaimReason,
    ClaimState,
    GrantedKind,
    LotScope,
    Overdue,
    Policy,
    Rule,
    Scope,
    Threshold,
)

Kind = Literal[
    "account_opened",
    "wallet_opened",
    "wallet_set",
    "rule_set",
    "rule_ended",
    "lot_granted",
    "lot_opened",
    "lot_expired",
    "lot_revived",
    "lot_voided",
    "debt_repaid",
    "hold_placed",
    "hold_extended",
    "hold_released",
    "hold_expired",
    "hold_settled",
    "hold_estimated",
    "estimate_reversed",
    "charged",
    "reversed",
    "adjusted",
    "transferred",
    "payment_claimed",
    "clawed_back",
    "given_back",
    "claim_frozen",
    "balance_crossed",
]
# Pseudo-lots, made by what is beyond what is there. debt: of money, owed; the next grant repays it. overage: of a cap,
# of its period, never owed. uncapped: what was counted while the wallet was unlimited, never owed.
PseudoKind = Literal["debt", "overage", "uncapped"]
LotKind = Literal[GrantedKind, PseudoKind]
Contra = Literal["@usage", "@stripe", "@plan", "@promo", "@expired", "@adjustment"]
PSEUDO_KINDS: Final[frozenset[str]] = frozenset(get_args(PseudoKind))
# What holds set aside of them was not there: of a charge they take only what is still not there.
STAND_INS: Final = frozenset({"debt", "overage"})
# What counts, but is nothing the wallet has or owes: not in its posted and held.
ASIDE_KINDS: Final[frozenset[str]] = frozenset({"overage", "uncapped"})


class WalletOpened(msgspec.Struct, frozen=True, tag="wallet_opened", omit_defaults=True):
    """The terms of a wallet, from now on. Of `wallet_opened` and `wallet_set`."""

    policy: Policy
    overdraft: int = 0
    thresholds: tuple[Threshold, ...] = ()


class RuleSet(msgspec.Struct, frozen=True, tag="rule_set"):
    """A recurring grant of the wallet, from now on in this form. It keeps the number of the period it is to grant."""

    rule: Rule
    next_period: int


class RuleEnded(msgspec.Struct, frozen=True, tag="rule_ended"):
    """A recurring grant is not renewed from the period `end_period` on. None: it is gone at once."""

    rule: str
    end_period: int | None


class LotGranted(msgspec.Struct, frozen=True, tag="lot_granted", omit_defaults=True):
    """What a lot is, but for its kind and its amount. Without `effective_at` it is usable at once.

    Of a recurring grant: its `rule` and `period`, and what of the amount was rolled over from the period before.
    `origin`: the lot it was transferred from, or of a debt the lot in whose stead it is owed. Also of `lot_opened`,
    which makes a pseudo-lot, and of the `transferred` that makes the target lot.
    """

    priority: int
    reference: str | None = None
    effective_at: datetime | None = None
    expires_at: datetime | None = None
    scope: LotScope | None = None
    cost_basis: str | None = None
    origin: str | None = None
    rule: str | None = None
    period: int | None = None
    rolled_over: int = 0


class LotVoided(msgspec.Struct, frozen=True, tag="lot_voided", omit_defaults=True):
    """The lot is void: what is held of it is voided, too, as its holds end. On each entry that voids of it."""

    reason: str | None = None


class DebtRepaid(msgspec.Struct, frozen=True, tag="debt_repaid"):
    """The two sides of a repayment name each other: the lot that paid, and the debt. Undone with the signs reversed."""

    lot: str
    debt: str


class HeldLeg(msgspec.Struct, frozen=True):
    """One unit of a hold: what was asked, what was set aside, and on whose wallets. They stay the hold's wallets."""

    unit: str
    at_least: int
    at_most: int
    amount: int
    wallets: tuple[str, ...]


class HoldPlaced(msgspec.Struct, frozen=True, tag="hold_placed", omit_defaults=True):
    """What a hold is. On the first `hold_placed` entry of its transaction."""

    account: str
    expires_at: datetime
    overdue: Overdue
    legs: tuple[HeldLeg, ...]
    scope: Scope | None = None


class HoldExtended(msgspec.Struct, frozen=True, tag="hold_extended"):
    """A hold's new deadline, and all of its legs as they are from now on. On the first entry of its transaction."""

    expires_at: datetime
    legs: tuple[HeldLeg, ...]


class Charged(msgspec.Struct, frozen=True, tag="charged", omit_defaults=True):
    """How many charge lines a transaction took, and the hash over all of them. On its first entry without details.

    `required`: it is a debit, which takes no hard wallet below its floor.
    """

    lines: int
    lines_hash: str
    bundle: int | None = None
    required: bool = False


class Reversed(msgspec.Struct, frozen=True, tag="reversed", omit_defaults=True):
    """Which charge line was given back, and why. On the first entry that gives back of its transaction.

    `correction` of metering wanted it, in the bundle of that number.
    """

    source: str
    event_id: str
    revision: int
    reason: str | None = None
    correction: str | None = None
    bundle: int | None = None


class Noted(msgspec.Struct, frozen=True, tag="noted", omit_defaults=True):
    """Why an amount was adjusted or transferred. `forced`: even if that takes a hard wallet below its floor."""

    reason: str | None = None
    forced: bool = False


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


class ClaimFrozen(msgspec.Struct, frozen=True, tag="claim_frozen", omit_defaults=True):
    """What open claims on a payment freeze of a lot, or no longer: the entry's `frozen`, now.

    `pending` is what is added to what will be frozen of the lot as holds of it end. An entry that names a hold does so.
    """

    payment: str
    pending: int = 0


class BalanceCrossed(msgspec.Struct, frozen=True, tag="balance_crossed", omit_defaults=True):
    """The owner is told that the wallet is at or below a level, or above it again. No threshold: it is exhausted."""

    is_low: bool
    available: int
    threshold: Threshold | None = None


Details = (
    WalletOpened
    | RuleSet
    | RuleEnded
    | LotGranted
    | LotVoided
    | DebtRepaid
    | HoldPlaced
    | HoldExtended
    | Charged
    | Reversed
    | Noted
    | PaymentClaimed
    | ClawedBack
    | ClaimFrozen
    | BalanceCrossed
)


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


def placed(move: Move, *, batch: int, position: int, transaction: str, recorded_at: datetime) -> Entry:
    """A move as the entry it is at a place in the journal."""
    return Entry(
        batch=batch,
        position=position,
        transaction=transaction,
        recorded_at=recorded_at,
        kind=move.kind,
        account=move.account,
        occurred_at=move.occurred_at,
        unit=move.unit,
        lot=move.lot,
        lot_kind=move.lot_kind,
        hold=move.hold,
        posted=move.posted,
        held=move.held,
        frozen=move.frozen,
        details=move.details,
    )


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
        case "debt" | "overage" | "uncapped":
            raise ValueError(f"nobody grants a lot of kind {kind}")
        case _:
            assert_never(kind)


def contra_move(kind: Kind, contra: Contra, *, account: str, unit: Unit, posted: int, occurred_at: datetime) -> Move:
    """The other side: for money one contra of the partition, for caps one per wallet, as each counts for itself."""
    of_unit = contra if unit.kind == "money" else f"{contra}/{account}"
    return Move(kind=kind, account=of_unit, occurred_at=occurred_at, unit=unit.name, posted=posted)
