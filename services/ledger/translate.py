"""Between the words of the contracts and the ledger's own: decimal strings and integers, prefixed ids and UUIDs."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Any, Final, assert_never
from uuid import UUID

import msgspec
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from contracts import ledger as words
from contracts.billing import PaymentClaimed, PaymentReceived, payment_subject
from contracts.envelope import NAME_SHOWN_MAX
from contracts.ids import Kind as IdKind
from contracts.ids import make_id, partition_of_id
from contracts.metering import CHARGES_RATED, LINES_MAX, ReversalLine
from contracts.metering import ChargeLine as ContractLine
from contracts.metering import Scope as ContractScope
from contracts.money import Amount, AmountText, Unit, UnitName, format_amount, parse_amount
from contracts.partition import PARTITION_COUNT, partition_of, token
from contracts.streams import charges_rated_subject, ledger_fact_subject
from contracts.times import TIME_MAX, TIME_MIN
from services.kit.dead_letters import Unreadable
from services.kit.outbox import OutboxRow
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
from services.ledger.domain.entries import (
    PSEUDO_KINDS,
    BalanceCrossed,
    HoldExtended,
    HoldPlaced,
    LotGranted,
    LotVoided,
    Move,
    is_contra,
)
from services.ledger.domain.entries import PaymentClaimed as ClaimNoted
from services.ledger.domain.errors import (
    AccountDiffers,
    HoldExists,
    HoldExpired,
    HoldReleased,
    HoldSettled,
    InsufficientFunds,
    MoreThanCharged,
    Refusal,
    UnknownHold,
    UnknownLot,
)
from services.ledger.domain.state import Wallet
from services.ledger.signing import SignedHeads

# Of a charge line that nobody gave a time: it occurs when it is recorded. No message can say so.
WHEN_RECORDED: Final = TIME_MAX

# A problem's pointer to a command of a list.
_IN_LIST: Final = re.compile(r"/commands/(\d+)(?:/|$)")
_PREFIXED_HOLD: Final = len("hold_00_")
_PREFIXED_LOT: Final = len("lot_00_")
_encode: Final = msgspec.json.Encoder(order="sorted").encode


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with what was sent. `code` is a refusal's; `pointer` a JSON pointer into the body."""

    pointer: str
    code: str
    detail: str


class Invalid(ValueError):
    """What was sent cannot be taken; carries every problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{problem.pointer}: {problem.detail}" for problem in problems))
        self.problems = tuple(problems)

    @classmethod
    def of(cls, pointer: str, detail: str) -> "Invalid":
        """One problem with what was sent."""
        return cls([Problem(pointer, "invalid", detail)])


# Commands -------------------------------------------------------------------------------------------------------------


def read_command(command: words.Command, units: Units, *, principal: str) -> Command:
    """A command in the ledger's words. Raises Invalid: units and amounts are looked at here, with the catalogue.

    `principal` is the source of what it settles and debits.
    """
    reader = _Reader(units)
    read = reader.command("", command, principal)
    reader.finish()
    return read


def read_list(asked: words.CommandList, units: Units, *, principal: str) -> tuple[Command, ...]:
    """The commands of a list in the ledger's words. Raises Invalid with every problem of all of them."""
    reader = _Reader(units)
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
        reader = _Reader(units, problems)
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
    return sha256(_encode(content)).digest()


class _Reader:
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
        return hold[_PREFIXED_HOLD:]

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
    return None if scope is None else _scope(scope.provider, scope.model, scope.feature)


def _valid_in(scope: words.LotScope | None) -> LotScope | None:
    """One that names nothing is no scope: the lot is valid everywhere, whatever is known of the use."""
    if scope is None or not (scope.providers or scope.models or scope.features):
        return None
    return LotScope(scope.providers, scope.models, scope.features)


# Bundles --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of a bundle that cannot be taken, as it came, and why."""

    body: bytes
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle of charges as it was read, and what is given back before them."""

    partition: int
    number: int
    body_hash: bytes
    body: bytes
    lines: Sequence[ChargeLine | BadLine]
    reversals: Sequence[ReverseCharge | BadLine] = ()

    def line_body(self, place: int) -> bytes:
        """The line at `place` as it came."""
        return bytes(_raw_bundle(self.body).lines[place])

    def reversal_body(self, place: int) -> bytes:
        """The reversal at `place` as it came."""
        return bytes(_raw_bundle(self.body).reversals[place])


class UnreadableBundle(ValueError):
    """A message that is no bundle of charges of its partition at all."""


_Text = Annotated[str, msgspec.Meta(max_length=256)]


class _Amount(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    amount: _Text
    unit: _Text


class _Scope(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    provider: _Text
    model: _Text
    feature: _Text | None = None


class _Line(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    source: _Text
    event_id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    account: Annotated[str, msgspec.Meta(max_length=400)]
    occurred_at: Annotated[datetime, msgspec.Meta(tz=True)]
    scope: _Scope
    price_version: _Text
    amounts: Annotated[list[_Amount], msgspec.Meta(max_length=16)]
    revision: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    hold: _Text | None = None
    own_key: bool = False
    final: bool = True
    traceparent: _Text | None = None


class _Bundle(msgspec.Struct):
    type: str
    partition: int
    number: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    lines: Annotated[list[_Line], msgspec.Meta(max_length=LINES_MAX)]
    # Seldom: each is read slowly.
    reversals: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=LINES_MAX)] = []


class _RawBundle(msgspec.Struct):
    type: str
    partition: int
    number: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    lines: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=LINES_MAX)]
    reversals: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=LINES_MAX)] = []


_BUNDLE: Final = msgspec.json.Decoder(_Bundle)
_RAW_BUNDLE: Final = msgspec.json.Decoder(_RawBundle)


@lru_cache(maxsize=4)
def _raw_bundle(body: bytes) -> _RawBundle:
    return _RAW_BUNDLE.decode(body)


# Postgres has no text with a NUL in it; looked for in the body as a whole.
_NUL: Final = b"\\u0000"


def read_bundle(subject: str, body: bytes, units: Units) -> Bundle:
    """Read what was published as a bundle. Raises UnreadableBundle; a line that cannot be read is a BadLine."""
    partition = int(subject.split(".")[2])
    if subject != charges_rated_subject(partition):
        raise UnreadableBundle(f"nothing is known of {subject}")
    try:
        fast: _Bundle | _RawBundle = _RAW_BUNDLE.decode(body) if _NUL in body else _BUNDLE.decode(body)
    except (msgspec.ValidationError, RecursionError):
        try:
            fast = _RAW_BUNDLE.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UnreadableBundle(f"not a bundle of charges: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnreadableBundle(f"not JSON: {error}") from error
    if fast.type != CHARGES_RATED or fast.partition != partition:
        raise UnreadableBundle(f"not a {CHARGES_RATED} of partition {partition}")
    if not fast.lines and not fast.reversals:
        raise UnreadableBundle("a bundle with neither lines nor reversals")
    lines: list[ChargeLine | BadLine] = []
    if isinstance(fast, _Bundle):
        for place, line in enumerate(fast.lines):
            read: ChargeLine | BadLine | None = _read_line(line, units, partition)
            lines.append(read or _read_line_slowly(bytes(_raw_bundle(body).lines[place]), units, partition))
    else:
        lines.extend(_read_line_slowly(bytes(raw), units, partition) for raw in fast.lines)
    reversals = [_read_reversal(bytes(raw), units, partition, fast.number) for raw in fast.reversals]
    return Bundle(partition, fast.number, sha256(body).digest(), body, lines, reversals)


class _Trace(msgspec.Struct):
    traceparent: str | None = None


class _Traces(msgspec.Struct):
    lines: list[_Trace]


_TRACES: Final = msgspec.json.Decoder(_Traces)


def read_traceparents(body: bytes) -> Mapping[int, str]:
    """Of which traces the lines of a bundle are steps, by place. Looked at only where somebody traces."""
    if b'"traceparent"' not in body:
        return {}
    try:
        lines = _TRACES.decode(body).lines
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # A bad line somewhere: it is charged for all that.
        return {}
    return {place: line.traceparent for place, line in enumerate(lines) if line.traceparent is not None}


def read_line(body: bytes, units: Units) -> ContractLine:
    """A charge line on its own. Raises Invalid with every problem."""
    try:
        line = ContractLine.model_validate_json(body)
    except ValidationError as error:
        raise Invalid(model_problems(error)) from error
    reader = _Reader(units)
    reader.line("", line)
    reader.finish()
    return line


def read_again(body: bytes, units: Units, *, key: str) -> words.Charge | words.ReverseCharge:
    """A line of a bundle on its own, as the command that does what it asks for. Raises Invalid with every problem."""
    if not _is_reversal(body):
        return words.Charge(idempotency_key=key, line=read_line(body, units))
    line = _reversal_line(body)
    reader = _Reader(units)
    reader.reversal("", line, None)
    reader.finish()
    return words.ReverseCharge(
        idempotency_key=key,
        account=line.account,
        source=line.source,
        event_id=line.event_id,
        revision=line.revision,
        amounts=line.amounts,
        reason=line.reason,
        correction=line.correction,
    )


def _is_reversal(body: bytes) -> bool:
    """No charge line names a correction."""
    try:
        return "correction" in msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _reversal_line(body: bytes) -> ReversalLine:
    try:
        return ReversalLine.model_validate_json(body)
    except ValidationError as error:
        raise Invalid(model_problems(error)) from error


def model_problems(error: ValidationError) -> list[Problem]:
    """What pydantic found, as problems."""
    return [Problem(_pointer(found["loc"]), "invalid", _sentence(found)) for found in error.errors(include_url=False)]


def _sentence(found: ErrorDetails) -> str:
    """What is wrong in words: a pattern says nothing to who wrote the text."""
    if found["type"] != "string_pattern_mismatch":
        return found["msg"].removeprefix("Value error, ")
    why = _PATTERNS.get(
        found["ctx"]["pattern"], "has characters that are not allowed here, or is too short or too long"
    )
    return f"{found['input'][:NAME_SHOWN_MAX]!r} {why}"


_PATTERNS: Final[Mapping[str, str]] = {
    TypeAdapter(AmountText).json_schema()["pattern"]: (
        "is not an amount: that is a decimal number, as 12 or -0.05, of at most 19 digits before the point and 9 after"
    ),
    TypeAdapter(UnitName).json_schema()["pattern"]: (
        "is not the name of a unit: that is at most 32 of a-z, 0-9 and _, the first of them a letter"
    ),
}


def _pointer(location: Sequence[int | str]) -> str:
    """A place as a JSON pointer; what pydantic says besides of which command of a list it is, is no part of it."""
    parts = [
        part
        for place, part in enumerate(location)
        if not (place >= 2 and location[place - 2] == "commands" and isinstance(location[place - 1], int))
    ]
    return "".join(f"/{part}" for part in parts)


def _read_line(line: _Line, units: Units, partition: int) -> ChargeLine | None:
    """The hot path; None if anything is odd: then it is read again slowly, to say what."""
    try:
        if partition_of(line.account) != partition or not TIME_MIN <= line.occurred_at < TIME_MAX:
            return None
        hold = line.hold
        if hold is not None:
            if partition_of_id(hold) != partition or not hold.startswith("hold_"):
                return None
            hold = hold[_PREFIXED_HOLD:]
        amounts = tuple([(each.unit, parse_amount(each.amount, units.by_name[each.unit])) for each in line.amounts])
    except (KeyError, ValueError):
        return None
    if len(amounts) > 1 and len({unit for unit, _ in amounts}) != len(amounts):
        return None
    scope, occurred_at = line.scope, line.occurred_at
    return ChargeLine(
        source=line.source,
        event_id=line.event_id,
        revision=line.revision,
        account=line.account,
        occurred_at=occurred_at if occurred_at.tzinfo is UTC else occurred_at.astimezone(UTC),
        hold=hold,
        scope=_scope(scope.provider, scope.model, scope.feature),
        price_version=line.price_version,
        own_key=line.own_key,
        amounts=amounts,
        final=line.final,
    )


def _read_line_slowly(body: bytes, units: Units, partition: int) -> ChargeLine | BadLine:
    try:
        line = read_line(body, units)
    except Invalid as error:
        return BadLine(body, error.problems)
    if partition_of(line.account) != partition:
        return BadLine(body, (_lives_elsewhere(line.account),))
    return _Reader(units).line("", line)


def _read_reversal(body: bytes, units: Units, partition: int, bundle: int) -> ReverseCharge | BadLine:
    reader = _Reader(units)
    try:
        line = _reversal_line(body)
        read = reader.reversal("", line, bundle)
        reader.finish()
    except Invalid as error:
        return BadLine(body, error.problems)
    return read if partition_of(line.account) == partition else BadLine(body, (_lives_elsewhere(line.account),))


def _lives_elsewhere(account: str) -> Problem:
    return Problem("/account", "account_differs", f"{account} lives in partition {partition_of(account)}")


@lru_cache(maxsize=4096)
def _scope(provider: str, model: str, feature: str | None) -> Scope:
    return Scope(provider, model, feature)


# Facts of billing -----------------------------------------------------------------------------------------------------


def read_payment_fact(subject: str, body: bytes) -> list[words.Grant | words.ClaimPayment]:
    """What a fact about a payment asks of the ledger, in order. The same fact always asks under the same keys.

    Raises kit's Unreadable.
    """
    partition = int(subject.split(".")[2])
    asked: list[words.Grant | words.ClaimPayment]
    try:
        if subject == payment_subject(partition=partition, verb="received"):
            asked = [*_received(PaymentReceived.model_validate_json(body))]
        elif subject == payment_subject(partition=partition, verb="claimed"):
            asked = [_claimed(PaymentClaimed.model_validate_json(body))]
        else:
            raise Unreadable(f"nothing is known of {subject}")
    except ValidationError as error:
        raise Unreadable("not a fact about a payment", problems=problem_rows(model_problems(error))) from error
    for command in asked:
        if partition_of(command.account) != partition:
            raise Unreadable(f"{command.account} lives in partition {partition_of(command.account)}, not {partition}")
    return asked


def _received(fact: PaymentReceived) -> Iterator[words.Grant]:
    granted: tuple[tuple[str, words.LotKind, Amount | None], ...] = (
        ("paid", "purchase", fact.paid),
        ("bonus", "bonus", fact.bonus),
    )
    for name, kind, amount in granted:
        if amount is not None:
            yield words.Grant(
                idempotency_key=f"payment:{fact.payment}:{name}",
                account=fact.account,
                unit=amount.unit,
                amount=amount.amount,
                kind=kind,
                occurred_at=fact.occurred_at,
                reference=fact.payment,
            )


def _claimed(fact: PaymentClaimed) -> words.ClaimPayment:
    return words.ClaimPayment(
        idempotency_key=f"claim:{fact.claim}:{fact.number}",
        account=fact.account,
        payment=fact.payment,
        claim=fact.claim,
        reason=fact.reason,
        state=fact.state,
        claimed=fact.claimed,
        revision=fact.number,
        occurred_at=fact.occurred_at,
    )


def problem_rows(problems: Iterable[Problem]) -> list[dict[str, str]]:
    """Problems as they are told and stored."""
    return [{"pointer": each.pointer, "code": each.code, "detail": each.detail} for each in problems]


# What is stored of a charge -------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def scope_text(scope: Scope | None) -> str:
    """A scope as canonical JSON."""
    return _encode(scope).decode()


def amounts_text(amounts: Sequence[tuple[str, int]]) -> str:
    """Amounts as canonical JSON: [[unit, amount], …]."""
    return _encode(amounts).decode()


def split_text(moves: Iterable[Move]) -> str:
    """From which lots a line was paid: [[account, unit, lot, lot kind, posted, held], …]."""
    return _encode(
        [
            (move.account, move.unit, move.lot, move.lot_kind, move.posted, move.held)
            for move in moves
            if move.kind == "charged" and move.lot is not None
        ]
    ).decode()


def lines_hash(rows: Sequence[Sequence[object]]) -> str:
    """SHA-256, in hex, over rows of charge_lines as JSON arrays: it ties them to the entry that carries it."""
    return sha256(_encode(rows)).hexdigest()


# Replies --------------------------------------------------------------------------------------------------------------


def accepted(
    *,
    partition: int,
    transaction: str,
    recorded_at: datetime,
    moves: Sequence[Move],
    remaining: Sequence[tuple[Wallet, int]],
    units: Units,
) -> dict[str, Any]:
    """The outcome of an accepted command, for contracts.ledger.Accepted. `remaining`: what wallets have available."""
    sums: dict[tuple[str, str, str | None, str | None], list[int]] = {}
    exceeded: dict[tuple[str, str], int] = {}
    for move in moves:
        if move.unit is None or move.lot is None or is_contra(move.account):
            continue
        is_pseudo = move.lot_kind in PSEUDO_KINDS
        key = (move.account, move.unit, None if is_pseudo else move.lot, move.lot_kind)
        total = sums.setdefault(key, [0, 0, 0])
        total[0] += move.posted
        total[1] += move.held
        total[2] += move.frozen
        if is_pseudo and move.lot_kind != "uncapped" and move.kind in _BEYOND:
            beyond = max(-move.posted, move.held)
            if beyond > 0:
                exceeded[move.account, move.unit] = exceeded.get((move.account, move.unit), 0) + beyond

    def text(amount: int, unit: str) -> str:
        return format_amount(amount, units.by_name[unit]) if amount else "0"

    outcome: dict[str, Any] = {
        "status": "accepted",
        "transaction": full_id("txn", partition, transaction),
        "recorded_at": recorded_at,
        "movements": [
            {
                "account": account,
                "unit": unit,
                "lot": None if lot is None else full_id("lot", partition, lot),
                "lot_kind": lot_kind,
                "posted": text(posted, unit),
                "held": text(held, unit),
                "frozen": text(frozen, unit),
            }
            for (account, unit, lot, lot_kind), (posted, held, frozen) in sums.items()
        ],
        "remaining": [
            {"account": wallet.account, "unit": wallet.unit, "available": text(available, wallet.unit)}
            for wallet, available in remaining
        ],
        "replayed": False,
    }
    if exceeded:
        outcome["exceeded"] = [
            {"account": account, "unit": unit, "amount": text(amount, unit)}
            for (account, unit), amount in exceeded.items()
        ]
    return outcome


# What takes, or sets aside, more than there is.
_BEYOND: Final = frozenset({"charged", "adjusted", "hold_placed", "hold_extended"})


def refused(refusal: Refusal, *, partition: int, units: Units) -> dict[str, Any]:
    """A refusal as it is told, with its numbers, for contracts.ledger.Refused."""
    told = {"status": "refused", "code": refusal.code, "message": refusal_text(refusal, partition=partition)}
    if not isinstance(refusal, InsufficientFunds | MoreThanCharged):
        return told
    unit = units.by_name[refusal.unit]
    required, remaining = format_amount(refusal.required, unit), format_amount(refusal.remaining, unit)
    numbers = {
        "required": {"amount": required, "unit": unit.name},
        "remaining": {"amount": remaining, "unit": unit.name},
    }
    if isinstance(refusal, MoreThanCharged):
        return {**told, **numbers, "message": f"{told['message']}: {remaining}, not {required}"}
    message = f"the {unit.name} wallet of {refusal.account} has {remaining} available; {required} is required"
    return {**told, **numbers, "message": message, "limit_source": refusal.account}


def refusal_text(refusal: Refusal, *, partition: int) -> str:
    """A refusal as a sentence, in which holds and lots have the ids that others know."""
    match refusal:
        case (
            AccountDiffers(hold=hold)
            | HoldExists(hold=hold)
            | HoldReleased(hold=hold)
            | HoldSettled(hold=hold)
            | HoldExpired(hold=hold)
            | UnknownHold(hold=hold)
        ):
            return str(replace(refusal, hold=full_id("hold", partition, hold)))
        case UnknownLot(lot=lot):
            return str(replace(refusal, lot=full_id("lot", partition, lot)))
        case _:
            return str(refusal)


def refused_as(error: Invalid) -> words.Refused | words.Failed:
    """What could not be read, as an answer over request/reply: all problems in the message."""
    first = error.problems[0]
    if first.code == "invalid":
        return words.Failed(code="invalid", message=str(error))
    in_list = _IN_LIST.match(first.pointer)
    return words.Refused(code=first.code, message=str(error), index=None if in_list is None else int(in_list[1]))


@lru_cache(maxsize=PARTITION_COUNT * 4)
def _id_prefix(kind: IdKind, partition: int) -> str:
    return make_id(kind, partition=partition, uuid=UUID(int=0)).removesuffix(str(UUID(int=0)))


def full_id(kind: IdKind, partition: int, uuid: str) -> str:
    """The id that others know, of a bare UUID text."""
    return _id_prefix(kind, partition) + uuid


# Facts ----------------------------------------------------------------------------------------------------------------


class Fact(msgspec.Struct, frozen=True):
    """What is told to others: its subject's noun and verb, its type, and its own fields."""

    noun: str
    verb: str
    transaction: str
    fields: Mapping[str, Any]


def facts_of(moves: Sequence[Move], *, account: str, partition: int, transaction: str, units: Units) -> list[Fact]:
    """The facts of a transaction's moves, other than what its command alone knows. `account` is that of its hold."""
    told = _Telling(moves, partition, transaction, units)
    for move in moves:
        # Most are charges, which are told in sums.
        if move.kind != "charged" and move.account[0] != "@":
            told.move(move, account)
    return told.facts


def reversed_fact(command: ReverseCharge, moves: Sequence[Move], *, transaction: str, units: Units) -> Fact:
    """That a charge was given back: what `@usage` has less, per unit (of a cap: on the wallet that had most)."""
    taken: dict[str, dict[str, int]] = {}
    for move in moves:
        if move.unit is not None and move.account.startswith("@usage"):
            wallets = taken.setdefault(move.unit, {})
            wallets[move.account] = wallets.get(move.account, 0) - move.posted
    fields = {
        "account": command.account,
        "source": command.source,
        "event_id": command.event_id,
        "revision": command.revision,
        "reversed": [_amount(max(wallets.values()), unit, units) for unit, wallets in taken.items()],
        "reason": command.reason,
    }
    if command.correction is not None:
        fields["correction"] = command.correction
    return Fact("charge", "reversed", transaction, fields)


def transferred_fact(command: Transfer, *, transaction: str, units: Units) -> Fact:
    """That money was moved from one account to another."""
    fields = {
        "account": command.account,
        "to_account": command.to_account,
        "transferred": _amount(command.amount, command.unit, units),
        "reason": command.reason,
    }
    return Fact("money", "transferred", transaction, fields)


@dataclass(slots=True)
class _Telling:
    """The facts that are being read off the moves of one transaction."""

    moves: Sequence[Move]
    partition: int
    transaction: str
    units: Units
    facts: list[Fact] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)

    def move(self, move: Move, account: str) -> None:  # noqa: PLR0912 - one case for each
        match move.kind:
            case "account_opened":
                self._add("account", "opened", account=move.account)
            case "lot_granted" if isinstance(move.details, LotGranted) and move.unit and move.lot:
                self._granted(move, move.details, move.unit, move.lot)
            case "lot_expired" if move.unit and move.lot:
                self._lot(move, "expired", expired=_amount(-move.posted, move.unit, self.units))
            case "lot_voided" if move.unit and move.lot:
                reason = move.details.reason if isinstance(move.details, LotVoided) else None
                self._lot(move, "voided", voided=_amount(-move.posted, move.unit, self.units), reason=reason)
            case "hold_placed" if isinstance(move.details, HoldPlaced) and move.hold:
                self._held(move.hold, "placed", move.details.account, move.details)
            case "hold_extended" if isinstance(move.details, HoldExtended) and move.hold:
                self._held(move.hold, "extended", account, move.details)
            case "hold_settled" | "estimate_reversed":
                self._ended(move, account, "settled", "released")
            case "hold_released":
                self._ended(move, account, "released", "released")
            case "hold_expired":
                self._ended(move, account, "expired", "released")
            case "hold_estimated":
                self._ended(move, account, "expired", "estimated")
            case "payment_claimed" if isinstance(move.details, ClaimNoted) and move.unit:
                self._claimed(move, move.details, move.unit)
            case "balance_crossed" if isinstance(move.details, BalanceCrossed) and move.unit:
                self._crossed(move, move.details, move.unit)
            case _:
                pass

    def _add(self, noun: str, verb: str, **fields: Any) -> None:
        self.facts.append(Fact(noun, verb, self.transaction, fields))

    def _granted(self, move: Move, details: LotGranted, unit: str, lot: str) -> None:
        repaid = -sum(each.posted for each in self.moves if each.kind == "debt_repaid" and each.lot == lot)
        said = {
            "effective_at": details.effective_at,
            "expires_at": details.expires_at,
            "rule": details.rule,
            "period": details.period,
        }
        self._add(
            "lot",
            "granted",
            account=move.account,
            lot=full_id("lot", self.partition, lot),
            kind=move.lot_kind,
            granted=_amount(move.posted, unit, self.units),
            repaid=_amount(repaid, unit, self.units),
            reference=details.reference,
            **{name: value for name, value in said.items() if value is not None},
        )

    def _lot(self, move: Move, verb: str, **fields: Any) -> None:
        assert move.lot is not None
        lot = full_id("lot", self.partition, move.lot)
        self._add("lot", verb, account=move.account, lot=lot, kind=move.lot_kind, **fields)

    def _held(self, hold: str, verb: str, account: str, details: HoldPlaced | HoldExtended) -> None:
        self._add(
            "hold",
            verb,
            account=account,
            hold=full_id("hold", self.partition, hold),
            held=[_amount(leg.amount, leg.unit, self.units) for leg in details.legs if leg.wallets],
            expires_at=details.expires_at,
        )

    def _ended(self, move: Move, account: str, verb: str, name: str) -> None:
        """That a hold ended, once, and what of it ended so per unit (of a cap: on the wallet that had most)."""
        if move.hold is None or move.hold in self.ended:
            return
        self.ended.add(move.hold)
        amounts: dict[str, dict[str, int]] = {}
        for each in self.moves:
            if each.kind == move.kind and each.hold == move.hold and each.unit is not None:
                wallets = amounts.setdefault(each.unit, {})
                # What was set aside, or what had been charged as an estimate.
                wallets[each.account] = wallets.get(each.account, 0) + (abs(each.held) or abs(each.posted))
        ended = [_amount(max(wallets.values()), unit, self.units) for unit, wallets in amounts.items()]
        hold = full_id("hold", self.partition, move.hold)
        self._add("hold", verb, account=account, hold=hold, **{name: ended})

    def _claimed(self, move: Move, details: ClaimNoted, unit: str) -> None:
        clawed: dict[str, int] = {}
        frozen: dict[str, int] = {}
        for each in self.moves:
            if each.unit is None or is_contra(each.account):
                continue
            if each.kind in {"clawed_back", "given_back"} and each.posted:
                clawed[each.unit] = clawed.get(each.unit, 0) - each.posted
            elif each.kind == "claim_frozen" and each.frozen:
                frozen[each.unit] = frozen.get(each.unit, 0) + each.frozen
        self._add(
            "payment",
            "claimed",
            account=move.account,
            payment=details.payment,
            claim=details.claim,
            reason=details.reason,
            state=details.state,
            claimed=_amount(details.claimed, unit, self.units),
            clawed_back=[_amount(amount, of, self.units) for of, amount in clawed.items()],
            frozen=[_amount(amount, of, self.units) for of, amount in frozen.items()],
        )

    def _crossed(self, move: Move, details: BalanceCrossed, unit: str) -> None:
        fields: dict[str, Any] = {"account": move.account, "available": _amount(details.available, unit, self.units)}
        if details.threshold is not None:
            amount, percent = details.threshold.amount, details.threshold.percent
            text = None if amount is None else format_amount(amount, self.units.by_name[unit])
            fields["threshold"] = {"amount": text, "percent": percent}
        fallen = "exhausted" if details.threshold is None else "low"
        self._add("balance", fallen if details.is_low else "recovered", **fields)


def usage_charged_fact(account: str, amounts: Mapping[str, int], *, lines: int, transaction: str, units: Units) -> Fact:
    """What an account was charged in one transaction."""
    charged = [_amount(amount, unit, units) for unit, amount in amounts.items()]
    return Fact("usage", "charged", transaction, {"account": account, "charged": charged, "lines": lines})


def outbox_row(fact: Fact, *, partition: int, number: int, recorded_at: datetime) -> OutboxRow:
    """A fact as it is published."""
    payload = {
        "type": f"ledger.{fact.noun}.{fact.verb}.v1",
        "partition": partition,
        "number": number,
        "transaction": full_id("txn", partition, fact.transaction),
        "recorded_at": recorded_at,
        **fact.fields,
    }
    return OutboxRow(
        partition=partition,
        number=number,
        subject=ledger_fact_subject(partition=partition, noun=fact.noun, verb=fact.verb),
        message_id=f"ledger-{token(partition)}-{number}",
        payload=msgspec.json.encode(payload),
        recorded_at=recorded_at,
    )


def heads_signed_row(signed: SignedHeads, *, partition: int, number: int, recorded_at: datetime) -> OutboxRow:
    """That heads were signed, as it is published: of no transaction."""
    payload = {
        "type": "ledger.heads.signed.v1",
        "partition": partition,
        "number": number,
        "recorded_at": recorded_at,
        "heads": signed.heads,
        "signature": signed.signature_text,
        "key_id": signed.key_id,
    }
    return OutboxRow(
        partition=partition,
        number=number,
        subject=ledger_fact_subject(partition=partition, noun="heads", verb="signed"),
        message_id=f"ledger-{token(partition)}-{number}",
        payload=msgspec.json.encode(payload),
        recorded_at=recorded_at,
    )


def _amount(value: int, unit: str, units: Units) -> dict[str, str]:
    return {"amount": format_amount(value, units.by_name[unit]), "unit": unit}
