"""What the ledger is asked, by request/reply and over HTTP."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from contracts.accounts import AccountId, root
from contracts.billing import ClaimId, ClaimReason, ClaimState, PaymentId
from contracts.envelope import EventId, SourceName
from contracts.ids import HoldId, LotId
from contracts.ledger.terms import (
    HOLD_LEGS_MAX,
    HOLD_SECONDS_MAX,
    LIST_MAX,
    RULES_MAX,
    WALLETS_MAX,
    CostBasis,
    Frozen,
    IdempotencyKey,
    LotKind,
    LotScope,
    Overdue,
    PlanId,
    Reason,
    Reference,
    RuleId,
    RuleSpec,
    WalletSpec,
)
from contracts.metering import REVISION_MAX, ChargeLine, CorrectionId, Scope
from contracts.money import Amount, AmountText, UnitName
from contracts.times import Time
from contracts.usage import PriceVersionId


class _Command(Frozen):
    """`dry_run`: decided and answered as it would be, changed and recorded is nothing."""

    idempotency_key: IdempotencyKey
    dry_run: bool = False


class OpenAccount(_Command):
    """Open an account, all above it that are not open yet, and wallets of its own. What is open already stays as it is.

    Refused as: wallet_policy_differs, unknown_unit, invalid_terms.
    """

    command: Literal["open_account"] = "open_account"
    account: AccountId
    wallets: Annotated[tuple[WalletSpec, ...], Field(max_length=WALLETS_MAX)] = ()


class SetWallet(_Command):
    """Change the terms of an open wallet: all of them are as given from now on.

    Refused as: unknown_unit, invalid_terms, account_not_open, wallet_not_open.
    """

    command: Literal["set_wallet"] = "set_wallet"
    account: AccountId
    wallet: WalletSpec


class Grant(_Command):
    """Add a lot to an open wallet; its debt is repaid first. `reference` says what for (a payment, a ticket).

    A lot that begins later repays no debt: that counts against what is available until the next lot repays it.

    A purchase, or a bonus, with the id of a payment as its reference is what claims on that payment take back.
    Usable from `effective_at` until `expires_at`, and where its `scope` says.
    Refused as: unknown_unit, invalid_amount, invalid_time, account_not_open, wallet_not_open.
    """

    command: Literal["grant"] = "grant"
    account: AccountId
    unit: UnitName
    amount: AmountText
    kind: LotKind = "adjustment"
    priority: Annotated[int, Field(ge=0, le=1000)] = 100
    occurred_at: Time | None = None
    reference: Reference | None = None
    effective_at: Time | None = None
    expires_at: Time | None = None
    scope: LotScope | None = None
    cost_basis: CostBasis | None = None


class VoidGrant(_Command):
    """Take back what is unheld of a lot now, and what is held as its holds end. What was spent stays spent.

    Refused as: account_not_open, unknown_lot.
    """

    command: Literal["void_grant"] = "void_grant"
    account: AccountId
    lot: LotId
    reason: Reason | None = None


class Adjust(_Command):
    """Correct a wallet by an amount, above or below zero. Below its floor only if `force`: then it is owed.

    Refused as: unknown_unit, invalid_amount, account_not_open, wallet_not_open, insufficient_funds.
    """

    command: Literal["adjust"] = "adjust"
    account: AccountId
    unit: UnitName
    amount: AmountText
    reason: Reason
    force: bool = False


class HoldLeg(Frozen):
    """How much of a unit to set aside: what is there between the two, or a refusal. Equal means all or nothing."""

    unit: UnitName
    at_least: AmountText
    at_most: AmountText


class PlaceHold(_Command):
    """Set amounts aside before work is done, on every wallet concerned, together or not at all.

    `scope`: what will be used; without it only lots that are valid everywhere are there. `overdue`: what becomes of it
    when it is past its deadline. Refused as: unknown_unit, invalid_amount, account_not_open, account_differs,
    insufficient_funds, hold_exists, hold_released, hold_settled, hold_expired.
    """

    command: Literal["place_hold"] = "place_hold"
    hold: HoldId
    account: AccountId
    legs: Annotated[tuple[HoldLeg, ...], Field(min_length=1, max_length=HOLD_LEGS_MAX)]
    lifetime_seconds: Annotated[int, Field(ge=1, le=HOLD_SECONDS_MAX)] = 900
    scope: Scope | None = None
    overdue: Overdue = "release"


class ExtendHold(_Command):
    """Give an open hold a later deadline, so many seconds from now, and set more aside: legs are what is added.

    Refused as: unknown_hold, account_differs, hold_released, hold_settled, hold_expired, unknown_unit, invalid_amount,
    insufficient_funds.
    """

    command: Literal["extend_hold"] = "extend_hold"
    hold: HoldId
    account: AccountId
    lifetime_seconds: Annotated[int, Field(ge=1, le=HOLD_SECONDS_MAX)]
    legs: Annotated[tuple[HoldLeg, ...], Field(max_length=HOLD_LEGS_MAX)] = ()


class SettleHold(_Command):
    """Charge work against its hold: once per (caller, `settlement`). `final` ends the hold and releases the rest.

    It is a charge whose source is the caller and whose event is the settlement. Without a scope it has its hold's,
    without a time it occurred when it is recorded. Refused as a charge is.
    """

    command: Literal["settle_hold"] = "settle_hold"
    hold: HoldId
    account: AccountId
    settlement: EventId
    amounts: Annotated[tuple[Amount, ...], Field(max_length=16)]
    final: bool = True
    scope: Scope | None = None
    price_version: PriceVersionId | None = None
    occurred_at: Time | None = None


class ReleaseHold(_Command):
    """End a hold and give back what it set aside. Releasing an unknown hold leaves a tombstone: it is never placed.

    Refused as: hold_released, hold_settled, hold_expired, account_differs.
    """

    command: Literal["release_hold"] = "release_hold"
    hold: HoldId
    account: AccountId


class Charge(_Command):
    """What one use really cost: a fact, never refused for want of money. Settles the hold it names, or stands alone.

    Refused as: unknown_unit, invalid_amount, invalid_time, account_not_open, account_differs, already_charged,
    charge_differs.
    """

    command: Literal["charge"] = "charge"
    line: ChargeLine

    @property
    def account(self) -> AccountId:
        """Whose use it was."""
        return self.line.account


class Debit(_Command):
    """Take an amount now, or be refused: once per (caller, `debit`).

    It is a charge for which no hard wallet goes into debt: refused as a charge is, and as insufficient_funds.
    """

    command: Literal["debit"] = "debit"
    account: AccountId
    debit: EventId
    amounts: Annotated[tuple[Amount, ...], Field(min_length=1, max_length=16)]
    scope: Scope | None = None
    price_version: PriceVersionId | None = None


class ReverseCharge(_Command):
    """Give back what a charge took, or the named amounts of it, to the very lots it took it from. All of it once.

    `correction`: of metering's, whose reversal could not be done when it came, and is asked for again.
    Refused as: unknown_unit, invalid_amount, account_not_open, unknown_charge, more_than_charged.
    """

    command: Literal["reverse_charge"] = "reverse_charge"
    account: AccountId
    source: SourceName
    event_id: EventId
    revision: Annotated[int, Field(ge=0, le=REVISION_MAX)] = 0
    amounts: Annotated[tuple[Amount, ...], Field(min_length=1, max_length=16)] | None = None
    reason: Reason | None = None
    # Not written when there is none: readers of before know no such field.
    correction: CorrectionId | None = Field(default=None, exclude_if=lambda value: value is None)


class Transfer(_Command):
    """Move available money to another account of the tree. The lots keep what they are.

    Refused as: unknown_unit, invalid_amount, invalid_transfer, account_not_open, wallet_not_open, insufficient_funds.
    """

    command: Literal["transfer"] = "transfer"
    account: AccountId
    to_account: AccountId
    unit: UnitName
    amount: AmountText
    reason: Reason | None = None

    @model_validator(mode="after")
    def _stays_in_its_tree(self) -> Self:
        if root(self.account) != root(self.to_account):
            raise ValueError("a transfer stays within one tree of accounts")
        return self


class ClaimPayment(_Command):
    """A refund of, or a dispute over, part or all of what was granted for a payment; it may come before the grant.

    A claim's state of the highest `revision` counts, of equal ones the latest: a lower one that comes late changes
    nothing. Of all claims on a payment, `final` ones are clawed back, up to what was paid, and the bonus in proportion:
    from what is left of the payment's lots at once, from what is held when it is released, and what was spent as debt.
    What `open` ones are about is frozen: neither held nor charged. A `void` one gives back what it took. Refused as:
    unknown_unit, invalid_amount, invalid_time, account_not_open, wallet_not_open, account_differs.
    """

    command: Literal["claim_payment"] = "claim_payment"
    account: AccountId
    payment: PaymentId
    claim: ClaimId
    reason: ClaimReason
    state: ClaimState
    claimed: Amount
    revision: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    occurred_at: Time | None = None


class SetRule(_Command):
    """Add a recurring grant to an open wallet, or replace the one of the same id from its next period on.

    Refused as: unknown_unit, invalid_amount, invalid_rule, account_not_open, wallet_not_open.
    """

    command: Literal["set_rule"] = "set_rule"
    account: AccountId
    rule: RuleSpec


class EndRule(_Command):
    """Let a recurring grant end with its current period. Refused as: account_not_open, unknown_rule."""

    command: Literal["end_rule"] = "end_rule"
    account: AccountId
    rule: RuleId


class ChangePlan(_Command):
    """Replace all rules that belong to a plan by those of another; at once, or `at_period_end` as each period ends.

    At once, the unheld remaining of the old plan's lots is voided, and what is held of them as it is released.
    Refused as: unknown_unit, invalid_amount, invalid_rule, account_not_open, wallet_not_open.
    """

    command: Literal["change_plan"] = "change_plan"
    account: AccountId
    plan: PlanId
    rules: Annotated[tuple[RuleSpec, ...], Field(max_length=RULES_MAX)] = ()
    at_period_end: bool = False

    @model_validator(mode="after")
    def _rules_are_its_own(self) -> Self:
        if any(rule.plan not in {None, self.plan} for rule in self.rules):
            raise ValueError("the rules of a plan belong to that plan")
        if len({rule.id for rule in self.rules}) != len(self.rules):
            raise ValueError("a rule is named once")
        return self


Command = (
    OpenAccount
    | SetWallet
    | Grant
    | VoidGrant
    | Adjust
    | PlaceHold
    | ExtendHold
    | SettleHold
    | ReleaseHold
    | Charge
    | Debit
    | ReverseCharge
    | Transfer
    | ClaimPayment
    | SetRule
    | EndRule
    | ChangePlan
)


class CommandList(Frozen):
    """Commands on one tree of accounts, in order.

    Each has its own key and its own reply, as if it had been sent alone after the one before it. With `all_or_nothing`
    they are accepted together, under the key of the list, or the first that is refused refuses them all, and its
    `index` is told; their own keys then only tell them apart. A dry run is one of the whole list.
    """

    command: Literal["list"] = "list"
    commands: Annotated[
        tuple[Annotated[Command, Field(discriminator="command")], ...], Field(min_length=1, max_length=LIST_MAX)
    ]
    all_or_nothing: bool = False
    idempotency_key: IdempotencyKey | None = None
    dry_run: bool = False

    @property
    def account(self) -> AccountId:
        """One account of the tree: it says where the tree lives."""
        return self.commands[0].account

    @model_validator(mode="after")
    def _is_one_list(self) -> Self:
        if len({root(command.account) for command in self.commands}) > 1:
            raise ValueError("the commands of a list concern one tree of accounts")
        if len({command.idempotency_key for command in self.commands}) < len(self.commands):
            raise ValueError("each command of a list has a key of its own")
        if any(command.dry_run for command in self.commands):
            raise ValueError("a dry run is one of the whole list")
        if self.all_or_nothing != (self.idempotency_key is not None):
            raise ValueError("a list has a key if it is all or nothing, and none if it is not")
        return self


Request = Command | CommandList
COMMANDS: Final[TypeAdapter[Request]] = TypeAdapter(Annotated[Request, Field(discriminator="command")])
