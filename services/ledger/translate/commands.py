"""Commands as they are sent, in the words of the ledger: steps for decimal strings, UUIDs for prefixed ids."""

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final, assert_never

from pydantic import BaseModel

from contracts import ledger as words
from contracts.ids import partition_of_id
from contracts.metering import ChargeLine as ContractLine
from contracts.metering import ReversalLine
from contracts.metering import Scope as ContractScope
from contracts.money import Amount, Unit, parse_amount
from contracts.partition import partition_of, token
from contracts.times import TIME_MAX
from services.ledger.domain.commands import (
    Adjust,
    ChangePlan,
    ChargeLine,
    ClaimPayment,
    Command,
    EndRule,
    ExtendHold,
    Grant,
    Leg,
    LotScope,
    OpenAccount,
    PlaceHold,
    ReleaseHold,
    ReverseCharge,
    Rule,
    Scope,
    SetRule,
    SetWallet,
    Threshold,
    Transfer,
    Units,
    VoidGrant,
    WalletTerms,
)
from services.ledger.translate.problems import Invalid, Problem
from services.ledger.translate.stored import canonical_json

# Of a charge line that nobody gave a time: it occurs when it is recorded. No message can say so.
WHEN_RECORDED: Final = TIME_MAX


PREFIXED_HOLD: Final = len("hold_00_")


_PREFIXED_LOT: Final = len("lot_00_")


def read_command(command: words.Command, units: Units, *, principal: str) -> Command:
    """A command in the ledger's words. Raises Invalid: units and amounts are looked at here, with the catalogue.

    `principal` is the source of what it settles and debits.
    """
    reader = Reader(units)
    read = reader.command("", command, principal)
    reader.finish()
    return read


def read_list(asked: words.CommandList, units: Units, *, principal: str) -> tuple[Command, ...]:
    """The commands of a list in the ledger's words. Raises Invalid with every problem of all of them."""
    reader = Reader(units)
    read = tuple(
        reader.command(f"/commands/{place}", command, principal) for place, command in enumerate(asked.commands)
    )
    reader.finish()
    return read


def body_problems(body: object, units: Units, *, pointer: str = "") -> list[Problem]:
    """What is wrong with units and amounts anywhere in a body that is not even a command: all is named at once."""
    if isinstance(body, list):
        return [
            found
            for place, part in enumerate(body)
            for found in body_problems(part, units, pointer=f"{pointer}/{place}")
        ]
    if not isinstance(body, dict):
        return []
    problems = [
        found for name, part in body.items() for found in body_problems(part, units, pointer=f"{pointer}/{name}")
    ]
    if isinstance(body.get("unit"), str):
        reader = Reader(units, problems)
        reader.unit(f"{pointer}/unit", body["unit"])
        least = None if body.get("command") == "adjust" else 0
        for name in ("amount", "at_least", "at_most"):
            if isinstance(body.get(name), str) and body["unit"] in units.by_name:
                reader.amount(pointer, body["unit"], body[name], name=name, least=least)
    return problems


# A trace is no part of what is asked, wherever a line stands; neither is whether it is meant.
_NOT_COMPARED: Final[dict[str, Any]] = {
    "idempotency_key": True,
    "dry_run": True,
    "line": {"traceparent"},
    "commands": {"__all__": {"line": {"traceparent"}}},
}


def body_hash(command: BaseModel) -> bytes:
    """SHA-256 of a command's canonical form: sorted, without defaults, its key, its trace, and if it is meant.

    A field added later leaves the hashes of what was sent before as they were.
    """
    content = command.model_dump(mode="json", exclude_defaults=True, exclude=_NOT_COMPARED)
    return sha256(canonical_json(content)).digest()


class Reader:
    """Reads parts of a command and collects what is wrong with them."""

    def __init__(self, units: Units, problems: list[Problem] | None = None) -> None:
        self._units = units
        self._problems = [] if problems is None else problems

    def finish(self) -> None:
        """Raise what was found."""
        if self._problems:
            raise Invalid(self._problems)

    # One case for each command.
    def command(self, at: str, command: words.Command, principal: str) -> Command:  # noqa: PLR0911, PLR0912 - a case each
        """The command at a place."""
        match command:
            case words.OpenAccount():
                wallets = tuple(
                    self.terms(f"{at}/wallets/{place}", wallet) for place, wallet in enumerate(command.wallets)
                )
                return OpenAccount(account=command.account, wallets=wallets)
            case words.SetWallet():
                return SetWallet(account=command.account, terms=self.terms(f"{at}/wallet", command.wallet))
            case words.Grant():
                return self.grant(at, command)
            case words.VoidGrant():
                lot = self.lot(f"{at}/lot", command.lot, command.account)
                return VoidGrant(account=command.account, lot=lot, reason=command.reason)
            case words.Adjust():
                return Adjust(
                    account=command.account,
                    unit=command.unit,
                    amount=self.amount(at, command.unit, command.amount, least=None),
                    reason=command.reason,
                    force=command.force,
                )
            case words.PlaceHold() | words.ExtendHold() | words.SettleHold() | words.ReleaseHold():
                return self.of_hold(at, command, principal)
            case words.Charge():
                return self.line(f"{at}/line", command.line)
            case words.Debit():
                return ChargeLine(
                    source=principal,
                    event_id=command.debit,
                    account=command.account,
                    occurred_at=WHEN_RECORDED,
                    scope=_used(command.scope),
                    price_version=command.price_version or "",
                    amounts=self.amounts(f"{at}/amounts", command.amounts),
                    required=True,
                )
            case words.ReverseCharge():
                amounts = None if command.amounts is None else self.amounts(f"{at}/amounts", command.amounts)
                return ReverseCharge(
                    account=command.account,
                    source=command.source,
                    event_id=command.event_id,
                    revision=command.revision,
                    amounts=amounts,
                    reason=command.reason,
                    correction=command.correction,
                )
            case words.Transfer():
                return Transfer(
                    account=command.account,
                    to_account=command.to_account,
                    unit=command.unit,
                    amount=self.amount(at, command.unit, command.amount, least=1),
                    reason=command.reason,
                )
            case words.ClaimPayment():
                return ClaimPayment(
                    account=command.account,
                    payment=command.payment,
                    claim=command.claim,
                    reason=command.reason,
                    state=command.state,
                    unit=command.claimed.unit,
                    claimed=self.amount(f"{at}/claimed", command.claimed.unit, command.claimed.amount),
                    revision=command.revision,
                    occurred_at=_utc(command.occurred_at),
                )
            case words.SetRule():
                rule = self.rule(f"{at}/rule", command.rule, command.rule.plan)
                return SetRule(account=command.account, rule=rule)
            case words.EndRule():
                return EndRule(account=command.account, rule=command.rule)
            case words.ChangePlan():
                rules = tuple(
                    self.rule(f"{at}/rules/{place}", rule, command.plan) for place, rule in enumerate(command.rules)
                )
                return ChangePlan(
                    account=command.account, plan=command.plan, rules=rules, at_period_end=command.at_period_end
                )
            case _:
                assert_never(command)

    def of_hold(
        self,
        at: str,
        command: words.PlaceHold | words.ExtendHold | words.SettleHold | words.ReleaseHold,
        principal: str,
    ) -> Command:
        hold = self.hold(f"{at}/hold", command.hold, command.account)
        match command:
            case words.PlaceHold():
                return PlaceHold(
                    hold=hold,
                    account=command.account,
                    legs=self.legs(f"{at}/legs", command.legs),
                    lifetime_seconds=command.lifetime_seconds,
                    overdue=command.overdue,
                    scope=_used(command.scope),
                )
            case words.ExtendHold():
                return ExtendHold(
                    hold=hold,
                    account=command.account,
                    lifetime_seconds=command.lifetime_seconds,
                    legs=self.legs(f"{at}/legs", command.legs),
                )
            case words.SettleHold():
                return ChargeLine(
                    source=principal,
                    event_id=command.settlement,
                    account=command.account,
                    occurred_at=_utc(command.occurred_at) or WHEN_RECORDED,
                    hold=hold,
                    scope=_used(command.scope),
                    price_version=command.price_version or "",
                    amounts=self.amounts(f"{at}/amounts", command.amounts),
                    final=command.final,
                )
            case words.ReleaseHold():
                return ReleaseHold(hold=hold, account=command.account)
            case _:
                assert_never(command)

    def grant(self, at: str, command: words.Grant) -> Grant:
        return Grant(
            account=command.account,
            unit=command.unit,
            amount=self.amount(at, command.unit, command.amount, least=1),
            kind=command.kind,
            priority=command.priority,
            occurred_at=_utc(command.occurred_at),
            reference=command.reference,
            effective_at=_utc(command.effective_at),
            expires_at=_utc(command.expires_at),
            scope=_valid_in(command.scope),
            cost_basis=command.cost_basis,
        )

    def terms(self, pointer: str, wallet: words.WalletSpec) -> WalletTerms:
        return WalletTerms(
            unit=wallet.unit,
            policy=wallet.policy,
            overdraft=self.amount(pointer, wallet.unit, wallet.overdraft, name="overdraft"),
            thresholds=tuple(
                Threshold(
                    amount=None
                    if threshold.amount is None or wallet.unit not in self._units.by_name
                    else self.amount(f"{pointer}/thresholds/{place}", wallet.unit, threshold.amount),
                    percent=threshold.percent,
                )
                for place, threshold in enumerate(wallet.thresholds)
            ),
        )

    def rule(self, pointer: str, rule: words.RuleSpec, plan: str | None) -> Rule:
        def amount(name: str, text: str) -> int:
            return self.amount(pointer, rule.unit, text, name=name) if rule.unit in self._units.by_name else 0

        return Rule(
            id=rule.id,
            unit=rule.unit,
            amount=self.amount(pointer, rule.unit, rule.amount),
            period=rule.period,
            anchor=rule.anchor.astimezone(UTC),
            zone=rule.zone,
            every=rule.every,
            kind=rule.kind,
            priority=rule.priority,
            rollover_min=amount("rollover_min", rule.rollover_min),
            rollover_max=amount("rollover_max", rule.rollover_max),
            scope=_valid_in(rule.scope),
            plan=plan,
            policy=rule.policy,
            overdraft=None if rule.overdraft is None else amount("overdraft", rule.overdraft),
            first_period=rule.first_period,
            end_period=rule.end_period,
        )

    def unit(self, pointer: str, name: str) -> Unit | None:
        unit = self._units.by_name.get(name)
        if unit is None:
            self._say(pointer, "unknown_unit", f"the catalogue has no unit {name!r}")
        return unit

    def amount(self, pointer: str, unit_name: str, text: str, *, least: int | None = 0, name: str = "amount") -> int:
        """An amount that is at least `least`; None: of either sign."""
        unit = self.unit(f"{pointer}/unit", unit_name)
        if unit is None:
            return 0
        try:
            value = parse_amount(text, unit)
        except ValueError as error:
            self._say(f"{pointer}/{name}", "invalid_amount", str(error))
            return 0
        if least is not None and value < least:
            bound = "more than 0" if least else "not negative"
            self._say(f"{pointer}/{name}", "invalid_amount", f"{text!r}: an amount here is {bound}")
        return value

    def amounts(self, pointer: str, amounts: Sequence[Amount], *, least: int = 0) -> tuple[tuple[str, int], ...]:
        self.once(pointer, [amount.unit for amount in amounts])
        return tuple(
            (amount.unit, self.amount(f"{pointer}/{place}", amount.unit, amount.amount, least=least))
            for place, amount in enumerate(amounts)
        )

    def legs(self, pointer: str, legs: Sequence[words.HoldLeg]) -> tuple[Leg, ...]:
        self.once(pointer, [leg.unit for leg in legs])
        return tuple(self.leg(f"{pointer}/{place}", leg) for place, leg in enumerate(legs))

    def leg(self, pointer: str, leg: words.HoldLeg) -> Leg:
        at_least = self.amount(pointer, leg.unit, leg.at_least, name="at_least")
        at_most = self.amount(pointer, leg.unit, leg.at_most, name="at_most") if leg.unit in self._units.by_name else 0
        if at_least > at_most:
            self._say(f"{pointer}/at_least", "invalid_amount", "at_least is more than at_most")
        return Leg(leg.unit, at_least, at_most)

    def line(self, pointer: str, line: ContractLine) -> ChargeLine:
        return ChargeLine(
            source=line.source,
            event_id=line.event_id,
            revision=line.revision,
            account=line.account,
            occurred_at=line.occurred_at.astimezone(UTC),
            hold=None if line.hold is None else self.hold(f"{pointer}/hold", line.hold, line.account),
            scope=_used(line.scope),
            price_version=line.price_version,
            own_key=line.own_key,
            amounts=self.amounts(f"{pointer}/amounts", line.amounts),
            final=line.final,
        )

    def reversal(self, pointer: str, line: ReversalLine, bundle: int | None) -> ReverseCharge:
        return ReverseCharge(
            account=line.account,
            source=line.source,
            event_id=line.event_id,
            revision=line.revision,
            amounts=self.amounts(f"{pointer}/amounts", line.amounts, least=1),
            reason=line.reason,
            correction=line.correction,
            bundle=bundle,
        )

    def hold(self, pointer: str, hold: str, account: str) -> str:
        self.lives_there(pointer, hold, account)
        return hold[PREFIXED_HOLD:]

    def lot(self, pointer: str, lot: str, account: str) -> str:
        self.lives_there(pointer, lot, account)
        return lot[_PREFIXED_LOT:]

    def lives_there(self, pointer: str, identifier: str, account: str) -> None:
        """An id and its account name one partition."""
        if partition_of_id(identifier) != partition_of(account):
            partitions = (
                f"partition {token(partition_of_id(identifier))}, its account lives in {token(partition_of(account))}"
            )
            self._say(pointer, "account_differs", f"{identifier} names {partitions}")

    def once(self, pointer: str, units: Sequence[str]) -> None:
        for unit in sorted({unit for unit in units if units.count(unit) > 1}):
            self._say(pointer, "invalid_amount", f"the unit {unit} is named more than once")

    def _say(self, pointer: str, code: str, detail: str) -> None:
        self._problems.append(Problem(pointer, code, detail))


def _utc(time: datetime | None) -> datetime | None:
    return None if time is None else time.astimezone(UTC)


def _used(scope: ContractScope | None) -> Scope | None:
    return None if scope is None else scope_of_use(scope.provider, scope.model, scope.feature)


def _valid_in(scope: words.LotScope | None) -> LotScope | None:
    """One that names nothing is no scope: the lot is valid everywhere, whatever is known of the use."""
    if scope is None or not (scope.providers or scope.models or scope.features):
        return None
    return LotScope(scope.providers, scope.models, scope.features)


@lru_cache(maxsize=4096)
def scope_of_use(provider: str, model: str, feature: str | None) -> Scope:
    return Scope(provider, model, feature)
