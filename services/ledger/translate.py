"""Between the words of the contracts and the ledger's own: decimal strings and integers, prefixed ids and UUIDs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Any, Final, assert_never
from uuid import UUID

import msgspec
from pydantic import BaseModel, ValidationError

from contracts import ledger as words
from contracts.billing import PaymentClaimed, PaymentReceived, payment_subject
from contracts.ids import Kind as IdKind
from contracts.ids import make_id, partition_of_id
from contracts.metering import CHARGES_RATED, LINES_MAX
from contracts.metering import ChargeLine as ContractLine
from contracts.money import Amount, Unit, format_amount, parse_amount
from contracts.partition import PARTITION_COUNT, partition_of, token
from contracts.streams import charges_rated_subject, ledger_fact_subject
from contracts.times import TIME_MAX, TIME_MIN
from services.kit.dead_letters import Unreadable
from services.kit.outbox import OutboxRow
from services.ledger.domain.commands import (
    ChargeLine,
    ClaimPayment,
    Command,
    Grant,
    Leg,
    OpenAccount,
    PlaceHold,
    ReleaseHold,
    Scope,
    Units,
)
from services.ledger.domain.entries import HoldPlaced, LotGranted, Move, is_contra
from services.ledger.domain.errors import InsufficientFunds, Refusal
from services.ledger.domain.state import Wallet

_PREFIXED_HOLD: Final = len("hold_00_")
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


def read_command(command: words.Command, units: Units) -> Command:
    """A command in the ledger's words. Raises Invalid: units and amounts are looked at here, with the catalogue."""
    reader = _Reader(units)
    read: Command
    match command:
        case words.OpenAccount():
            for place, wallet in enumerate(command.wallets):
                reader.unit(f"/wallets/{place}/unit", wallet.unit)
            read = OpenAccount(
                account=command.account, wallets=tuple((wallet.unit, wallet.policy) for wallet in command.wallets)
            )
        case words.Grant():
            read = Grant(
                account=command.account,
                unit=command.unit,
                amount=reader.amount("", command.unit, command.amount, least=1),
                kind=command.kind,
                priority=command.priority,
                occurred_at=None if command.occurred_at is None else command.occurred_at.astimezone(UTC),
                reference=command.reference,
            )
        case words.PlaceHold():
            read = PlaceHold(
                hold=reader.hold("/hold", command.hold, command.account),
                account=command.account,
                legs=tuple(reader.leg(f"/legs/{place}", leg) for place, leg in enumerate(command.legs)),
                lifetime_seconds=command.lifetime_seconds,
            )
            reader.once("/legs", [leg.unit for leg in command.legs])
        case words.ReleaseHold():
            read = ReleaseHold(hold=reader.hold("/hold", command.hold, command.account), account=command.account)
        case words.Charge():
            read = reader.line("/line", command.line)
        case words.ClaimPayment():
            read = ClaimPayment(
                account=command.account,
                payment=command.payment,
                claim=command.claim,
                reason=command.reason,
                state=command.state,
                unit=command.claimed.unit,
                claimed=reader.amount("/claimed", command.claimed.unit, command.claimed.amount),
                revision=command.revision,
                occurred_at=None if command.occurred_at is None else command.occurred_at.astimezone(UTC),
            )
        case _:
            assert_never(command)
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
        for name in ("amount", "at_least", "at_most"):
            if isinstance(body.get(name), str) and body["unit"] in units.by_name:
                reader.amount(pointer, body["unit"], body[name], name=name)
    return problems


def body_hash(command: BaseModel) -> bytes:
    """SHA-256 of a command's canonical form: sorted, without what is at its default, its key, and its trace.

    A field added later leaves the hashes of what was sent before as they were.
    """
    left_out: dict[str, Any] = {"idempotency_key": True, "line": {"traceparent"}}
    content = command.model_dump(mode="json", exclude_defaults=True, exclude=left_out)
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

    def unit(self, pointer: str, name: str) -> Unit | None:
        unit = self._units.by_name.get(name)
        if unit is None:
            self._say(pointer, "unknown_unit", f"the catalogue has no unit {name!r}")
        return unit

    def amount(self, pointer: str, unit_name: str, text: str, *, least: int = 0, name: str = "amount") -> int:
        unit = self.unit(f"{pointer}/unit", unit_name)
        if unit is None:
            return 0
        try:
            value = parse_amount(text, unit)
        except ValueError as error:
            self._say(f"{pointer}/{name}", "invalid_amount", str(error))
            return 0
        if value < least:
            bound = "more than 0" if least else "not negative"
            self._say(f"{pointer}/{name}", "invalid_amount", f"{text!r}: an amount here is {bound}")
        return value

    def leg(self, pointer: str, leg: words.HoldLeg) -> Leg:
        at_least = self.amount(pointer, leg.unit, leg.at_least, name="at_least")
        at_most = self.amount(pointer, leg.unit, leg.at_most, name="at_most") if leg.unit in self._units.by_name else 0
        if at_least > at_most:
            self._say(f"{pointer}/at_least", "invalid_amount", "at_least is more than at_most")
        return Leg(leg.unit, at_least, at_most)

    def line(self, pointer: str, line: ContractLine) -> ChargeLine:
        self.once(f"{pointer}/amounts", [amount.unit for amount in line.amounts])
        return ChargeLine(
            source=line.source,
            event_id=line.event_id,
            revision=line.revision,
            account=line.account,
            occurred_at=line.occurred_at.astimezone(UTC),
            hold=None if line.hold is None else self.hold(f"{pointer}/hold", line.hold, line.account),
            scope=Scope(line.scope.provider, line.scope.model, line.scope.feature),
            price_version=line.price_version,
            own_key=line.own_key,
            amounts=tuple(
                (amount.unit, self.amount(f"{pointer}/amounts/{place}", amount.unit, amount.amount))
                for place, amount in enumerate(line.amounts)
            ),
        )

    def hold(self, pointer: str, hold: str, account: str) -> str:
        if partition_of_id(hold) != partition_of(account):
            partitions = (
                f"partition {token(partition_of_id(hold))}, its account lives in {token(partition_of(account))}"
            )
            self._say(pointer, "account_differs", f"{hold} names {partitions}")
        return hold[_PREFIXED_HOLD:]

    def once(self, pointer: str, units: Sequence[str]) -> None:
        for unit in sorted({unit for unit in units if units.count(unit) > 1}):
            self._say(pointer, "invalid_amount", f"the unit {unit} is named more than once")

    def _say(self, pointer: str, code: str, detail: str) -> None:
        self._problems.append(Problem(pointer, code, detail))


# Bundles --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BadLine:
    """A charge line that cannot be taken, as it came, and why."""

    body: bytes
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle of charges as it was read. `bodies` gives a line as JSON, to be kept if it cannot be charged."""

    partition: int
    number: int
    body_hash: bytes
    body: bytes
    lines: Sequence[ChargeLine | BadLine]

    def line_body(self, place: int) -> bytes:
        """The line at `place` as it came."""
        return bytes(_raw_lines(self.body)[place])


class UnreadableBundle(ValueError):
    """A message that is no bundle of charges of its partition at all."""


_Text = Annotated[str, msgspec.Meta(max_length=256)]


class _Amount(msgspec.Struct, forbid_unknown_fields=True):
    amount: _Text
    unit: _Text


class _Scope(msgspec.Struct, forbid_unknown_fields=True):
    provider: _Text
    model: _Text
    feature: _Text | None = None


class _Line(msgspec.Struct, forbid_unknown_fields=True):
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
    traceparent: _Text | None = None


class _Bundle(msgspec.Struct):
    type: str
    partition: int
    number: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    lines: Annotated[list[_Line], msgspec.Meta(min_length=1, max_length=LINES_MAX)]


class _RawBundle(msgspec.Struct):
    type: str
    partition: int
    number: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    lines: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=LINES_MAX)]


_BUNDLE: Final = msgspec.json.Decoder(_Bundle)
_RAW_BUNDLE: Final = msgspec.json.Decoder(_RawBundle)


@lru_cache(maxsize=4)
def _raw_lines(body: bytes) -> list[msgspec.Raw]:
    return _RAW_BUNDLE.decode(body).lines


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
    lines: list[ChargeLine | BadLine] = []
    if isinstance(fast, _Bundle):
        for place, line in enumerate(fast.lines):
            read: ChargeLine | BadLine | None = _read_line(line, units, partition)
            lines.append(read or _read_line_slowly(bytes(_raw_lines(body)[place]), units, partition))
    else:
        lines.extend(_read_line_slowly(bytes(raw), units, partition) for raw in fast.lines)
    return Bundle(partition, fast.number, sha256(body).digest(), body, lines)


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


def model_problems(error: ValidationError) -> list[Problem]:
    """What pydantic found, as problems."""
    return [
        Problem("".join(f"/{part}" for part in found["loc"]), "invalid", found["msg"])
        for found in error.errors(include_url=False, include_context=False, include_input=False)
    ]


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
    scope = line.scope
    return ChargeLine(
        source=line.source,
        event_id=line.event_id,
        revision=line.revision,
        account=line.account,
        occurred_at=line.occurred_at.astimezone(UTC),
        hold=hold,
        scope=_scope(scope.provider, scope.model, scope.feature),
        price_version=line.price_version,
        own_key=line.own_key,
        amounts=amounts,
    )


def _read_line_slowly(body: bytes, units: Units, partition: int) -> ChargeLine | BadLine:
    try:
        line = read_line(body, units)
    except Invalid as error:
        return BadLine(body, error.problems)
    if partition_of(line.account) != partition:
        problem = Problem(
            "/account", "account_differs", f"{line.account} lives in partition {partition_of(line.account)}"
        )
        return BadLine(body, (problem,))
    return _Reader(units).line("", line)


@lru_cache(maxsize=4096)
def _scope(provider: str, model: str, feature: str | None) -> Scope:
    return Scope(provider, model, feature)


# Facts of billing -----------------------------------------------------------------------------------------------------


def read_payment_fact(subject: str, body: bytes) -> list[words.Grant | words.ClaimPayment]:
    """What a fact about a payment asks of the ledger, in order. The same fact always asks under the same keys.

    Raises kit's Unreadable, also for a claim that may yet go either way: the ledger does not freeze yet.
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
    if fact.state == "open":
        raise Unreadable(f"the claim {fact.claim} is open: what it claims cannot be frozen yet")
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
def scope_text(scope: Scope) -> str:
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
    remaining: Sequence[Wallet],
    units: Units,
) -> dict[str, Any]:
    """The outcome of an accepted command, for contracts.ledger.Accepted. `remaining` are wallets as they are now."""
    sums: dict[tuple[str, str, str | None], list[int]] = {}
    for move in moves:
        if move.unit is None or move.lot is None or is_contra(move.account):
            continue
        lot = None if move.lot_kind in {"debt", "overage"} else move.lot
        total = sums.setdefault((move.account, move.unit, lot), [0, 0])
        total[0] += move.posted
        total[1] += move.held
    return {
        "status": "accepted",
        "transaction": full_id("txn", partition, transaction),
        "recorded_at": recorded_at,
        "movements": [
            {
                "account": account,
                "unit": unit,
                "lot": None if lot is None else full_id("lot", partition, lot),
                "posted": format_amount(posted, units.by_name[unit]),
                "held": format_amount(held, units.by_name[unit]),
            }
            for (account, unit, lot), (posted, held) in sums.items()
        ],
        "remaining": [
            {
                "account": wallet.account,
                "unit": wallet.unit,
                "available": format_amount(wallet.available, units.by_name[wallet.unit]),
            }
            for wallet in remaining
        ],
        "replayed": False,
    }


def refused(refusal: Refusal, *, units: Units) -> words.Refused:
    """A refusal as it is told, with its numbers."""
    if not isinstance(refusal, InsufficientFunds):
        return words.Refused(code=refusal.code, message=str(refusal))
    unit = units.by_name[refusal.unit]
    required, remaining = format_amount(refusal.required, unit), format_amount(refusal.remaining, unit)
    return words.Refused(
        code=refusal.code,
        message=f"the {unit.name} wallet of {refusal.account} has {remaining} available; {required} is required",
        limit_source=refusal.account,
        required=Amount(amount=required, unit=unit.name),
        remaining=Amount(amount=remaining, unit=unit.name),
    )


def refused_as(error: Invalid) -> words.Refused | words.Failed:
    """What could not be read, as an answer over request/reply: all problems in the message."""
    code = error.problems[0].code
    if code == "invalid":
        return words.Failed(code="invalid", message=str(error))
    return words.Refused(code=code, message=str(error))


@lru_cache(maxsize=PARTITION_COUNT * 4)
def _id_prefix(kind: IdKind, partition: int) -> str:
    return make_id(kind, partition=partition, uuid=UUID(int=0)).removesuffix(str(UUID(int=0)))


def full_id(kind: IdKind, partition: int, uuid: str) -> str:
    """The id that others know, of a bare UUID text."""
    return _id_prefix(kind, partition) + uuid


# Facts ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fact:
    """What is told to others: its subject's noun and verb, its type, and its own fields."""

    noun: str
    verb: str
    transaction: str
    fields: Mapping[str, Any]


def facts_of(moves: Sequence[Move], *, partition: int, transaction: str, units: Units) -> list[Fact]:
    """The facts of a command's moves, other than charges."""
    facts: list[Fact] = []

    def add(noun: str, verb: str, **fields: Any) -> None:
        facts.append(Fact(noun, verb, transaction, fields))

    for move in moves:
        if is_contra(move.account):
            continue
        match move.kind:
            case "account_opened":
                add("account", "opened", account=move.account)
            case "lot_granted" if isinstance(move.details, LotGranted) and move.unit and move.lot:
                repaid = -sum(each.posted for each in moves if each.kind == "debt_repaid" and each.lot == move.lot)
                add(
                    "lot",
                    "granted",
                    account=move.account,
                    lot=full_id("lot", partition, move.lot),
                    kind=move.lot_kind,
                    granted=_amount(move.posted, move.unit, units),
                    repaid=_amount(repaid, move.unit, units),
                    reference=move.details.reference,
                )
            case "hold_placed" if isinstance(move.details, HoldPlaced) and move.hold:
                add(
                    "hold",
                    "placed",
                    account=move.details.account,
                    hold=full_id("hold", partition, move.hold),
                    held=[_amount(leg.amount, leg.unit, units) for leg in move.details.legs if leg.wallets],
                    expires_at=move.details.expires_at,
                )
            case _:
                pass
    return facts


def hold_released_fact(
    command: ReleaseHold, moves: Sequence[Move], *, partition: int, transaction: str, units: Units
) -> Fact:
    """That a hold ended without a charge, and what it held per unit (of a cap: on the wallet that had most)."""
    released: dict[str, dict[str, int]] = {}
    for move in moves:
        if move.unit is not None and move.kind == "hold_released":
            wallets = released.setdefault(move.unit, {})
            wallets[move.account] = wallets.get(move.account, 0) - move.held
    amounts = [_amount(max(wallets.values()), unit, units) for unit, wallets in released.items()]
    fields = {"account": command.account, "hold": full_id("hold", partition, command.hold), "released": amounts}
    return Fact("hold", "released", transaction, fields)


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


def _amount(value: int, unit: str, units: Units) -> dict[str, str]:
    return {"amount": format_amount(value, units.by_name[unit]), "unit": unit}
