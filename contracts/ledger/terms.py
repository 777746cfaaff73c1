"""The words in which the ledger's commands and facts are said: wallets, lots' scopes, rules, and their limits."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from contracts.money import AmountText, UnitName
from contracts.times import Time
from contracts.usage import AttributeName, ModelName, ProviderName

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


class Frozen(BaseModel):
    """What is said does not change, and says nothing that is not known."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Threshold(Frozen):
    """A level at or below which a wallet's owner is told: an amount, or a share of what the last grant made of it."""

    amount: AmountText | None = None
    percent: Annotated[int, Field(ge=1, le=100)] | None = None

    @model_validator(mode="after")
    def _is_one_of_the_two(self) -> Self:
        if (self.amount is None) == (self.percent is None):
            raise ValueError("a threshold is an amount or a percentage")
        return self


class WalletSpec(Frozen):
    """A wallet: the account's holding of one unit, and how it treats what it has not got.

    `hard` refuses holds and debits below its floor, which is 0 or minus its overdraft (of money); `soft` lets them
    through and says so; `unlimited` counts and never refuses.
    """

    unit: UnitName
    policy: WalletPolicy = "hard"
    overdraft: AmountText = "0"
    thresholds: Annotated[tuple[Threshold, ...], Field(max_length=THRESHOLDS_MAX)] = ()


class LotScope(Frozen):
    """Where a lot is valid: one of each that is named. Nothing named: everywhere."""

    providers: Annotated[tuple[ProviderName, ...], Field(max_length=SCOPE_NAMES_MAX)] = ()
    models: Annotated[tuple[ModelName, ...], Field(max_length=SCOPE_NAMES_MAX)] = ()
    features: Annotated[tuple[AttributeName, ...], Field(max_length=SCOPE_NAMES_MAX)] = ()


class RuleSpec(Frozen):
    """A grant that renews itself: period n lasts from `anchor` plus n times `every` periods, by the clock of `zone`.

    Granted are the periods from `first_period` on, without `end_period` and those after it; at once those that have
    begun, if they are no more than a thousand. A month that has no such day begins on its last. Of the lot that ends,
    min(rollover_max, max(unheld remaining, rollover_min)) is added to the next. From its first period on the wallet has
    `policy` and `overdraft`, if given.
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
