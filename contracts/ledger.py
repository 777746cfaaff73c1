"""What the ledger is asked (request/reply and HTTP), what it answers, and the facts it publishes."""

from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from contracts.accounts import AccountId, root
from contracts.billing import ClaimId, ClaimReason, ClaimState, PaymentId
from contracts.envelope import EventId, SourceName
from contracts.ids import HoldId, LotId, TransactionId
from contracts.metering import REVISION_MAX, ChargeLine, CorrectionId, Scope
from contracts.money import Amount, AmountText, UnitName
from contracts.partition import Partition
from contracts.times import Time
from contracts.usage import AttributeName, ModelName, PriceVersionId, ProviderName

IdempotencyKey = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]+$")]
# Postgres has no text with a NUL in it.
Reference = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")]
Reason = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00]+$")]
# What somebody paid for a lot, in words of the product: `8.00 eur`.
CostBasis = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f]+$", examples=["8.00 eur"])]
RuleId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$", examples=["pro-tokens"])]
PlanId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$", examples=["pro"])]
LotKind = Literal["plan", "promo", "bonus", "purchase", "adjustment"]
# debt: of money, owed. overage: of a cap, beyond it. uncapped: counted while the wallet was unlimited. None is granted.
AnyLotKind = Literal["plan", "promo", "bonus", "purchase", "adjustment", "debt", "overage", "uncapped"]
WalletPolicy = Literal["hard", "soft", "unlimited"]
Overdue = Literal["release", "charge_estimate"]
RulePeriod = Literal["day", "week", "month", "year"]

WALLETS_MAX = 16
HOLD_LEGS_MAX = 16
HOLD_SECONDS_MAX = 86_400
THRESHOLDS_MAX = 16
SCOPE_NAMES_MAX = 64
RULES_MAX = 32
EVERY_MAX = 1_000
LIST_MAX = 256


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class _Command(_Frozen):
    """`dry_run`: decided and answered as it would be, changed and recorded is nothing."""

    idempotency_key: IdempotencyKey
    dry_run: bool = False


class Threshold(_Frozen):
    """A level at or below which a wallet's owner is told: an amount, or a share of what the last grant made of it."""

    amount: AmountText | None = None
    percent: Annotated[int, Field(ge=1, le=100)] | None = None

    @model_validator(mode="after")
    def _is_one_of_the_two(self) -> Self:
        if (self.amount is None) == (self.percent is None):
            raise ValueError("a threshold is an amount or a percentage")
        return self


class WalletSpec(_Frozen):
    """A wallet: the account's holding of one unit, and how it treats what it has not got.

    `hard` refuses holds and debits below its floor, which is 0 or minus its overdraft (of money); `soft` lets them
    through and says so; `unlimited` counts and never refuses.
    """

    unit: UnitName
    policy: WalletPolicy = "hard"
    overdraft: AmountText = "0"
    thresholds: Annotated[tuple[Threshold, ...], Field(max_length=THRESHOLDS_MAX)] = ()


class LotScope(_Frozen):
    """Where a lot is valid: one of each that is named. Nothing named: everywhere."""

    providers: Annotated[tuple[ProviderName, ...], Field(max_length=SCOPE_NAMES_MAX)] = ()
    models: Annotated[tuple[ModelName, ...], Field(max_length=SCOPE_NAMES_MAX)] = ()
    features: Annotated[tuple[AttributeName, ...], Field(max_length=SCOPE_NAMES_MAX)] = ()


class RuleSpec(_Frozen):
    """A grant that renews itself: period n lasts from `anchor` plus n times `every` periods, by the clock of `zone`.

    A month that has no such day ends on its last. Of the lot that ends, min(rollover_max, max(unheld remaining,
    rollover_min)) is added to the next. From its first period on the wallet has `policy` and `overdraft`, if given.
    """

    id: RuleId
    unit: UnitName
    amount: AmountText
    period: RulePeriod
    anchor: Time
    zone: Annotated[
        str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_+/-]+$", examples=["Europe/Berlin"])
    ] = "UTC"
    every: Annotated[int, Field(ge=1, le=EVERY_MAX)] = 1
    kind: LotKind = "plan"
    priority: Annotated[int, Field(ge=0, le=1000)] = 100
    rollover_min: AmountText = "0"
    rollover_max: AmountText = "0"
    scope: LotScope | None = None
    plan: PlanId | None = None
    policy: WalletPolicy | None = None
    overdraft: AmountText | None = None
    first_period: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    end_period: Annotated[int, Field(ge=0, le=1_000_000)] | None = None


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


class HoldLeg(_Frozen):
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


class CommandList(_Frozen):
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


class Movement(_Frozen):
    """How a transaction changed one lot of one wallet. `lot` is null of what is no lot: debt and overage."""

    account: AccountId
    unit: UnitName
    lot: LotId | None
    lot_kind: AnyLotKind | None = None
    posted: AmountText
    held: AmountText
    frozen: AmountText = "0"


class Remaining(_Frozen):
    """What a wallet has available after the command: of a hold or a charge, for what they use."""

    account: AccountId
    unit: UnitName
    available: AmountText


class Exceeded(_Frozen):
    """How much a command held or took of a wallet that no lot of it had: overdrawn, owed, or beyond the cap."""

    account: AccountId
    unit: UnitName
    amount: AmountText


class Accepted(_Frozen):
    """The command's first accepted outcome; `replayed` if this very command had been accepted before.

    Of a `dry_run` it is what would be: nothing was recorded, and there is no such transaction.
    """

    status: Literal["accepted"] = "accepted"
    transaction: TransactionId
    recorded_at: Time
    movements: tuple[Movement, ...] = ()
    remaining: tuple[Remaining, ...] = ()
    exceeded: tuple[Exceeded, ...] = ()
    replayed: bool = False
    dry_run: bool = False


class Refused(_Frozen):
    """The ledger will not: nothing was changed; asking again decides anew. Numbers are of the wallet that refused.

    `index`: which command of an all-or-nothing list it was, from 0.
    """

    status: Literal["refused"] = "refused"
    code: str
    message: str
    limit_source: AccountId | None = None
    required: Amount | None = None
    remaining: Amount | None = None
    index: Annotated[int, Field(ge=0, lt=LIST_MAX)] | None = None


class Failed(_Frozen):
    """The command was not decided. `conflict`: its key was used for another body. `busy`, `unavailable`: try again."""

    status: Literal["failed"] = "failed"
    code: Literal["invalid", "conflict", "busy", "unavailable", "fault"]
    message: str


class Listed(_Frozen):
    """What became of the commands of a list, one by one; of one that is all or nothing: all were accepted."""

    status: Literal["listed"] = "listed"
    replies: tuple[Annotated[Accepted | Refused | Failed, Field(discriminator="status")], ...]
    replayed: bool = False
    dry_run: bool = False


Reply = Accepted | Refused | Failed
REPLIES: Final[TypeAdapter[Accepted | Refused | Failed]] = TypeAdapter(
    Annotated[Accepted | Refused | Failed, Field(discriminator="status")]
)
# A list is answered by one of these: refused if it is all or nothing, failed if nothing of it was decided.
ListReply = Listed | Refused | Failed
LIST_REPLIES: Final[TypeAdapter[Listed | Refused | Failed]] = TypeAdapter(
    Annotated[Listed | Refused | Failed, Field(discriminator="status")]
)


class _Fact(_Frozen):
    partition: Partition
    number: Annotated[int, Field(ge=1)]
    transaction: TransactionId
    recorded_at: Time


class HeadsSigned(_Frozen):
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


class AccountCharged(_Frozen):
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
