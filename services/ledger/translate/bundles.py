"""Bundles of charges as metering sends them; what cannot be read is put aside line by line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Final

import msgspec
from pydantic import ValidationError

from contracts import ledger as words
from contracts.ids import partition_of_id
from contracts.metering import CHARGES_RATED, LINES_MAX, ReversalLine
from contracts.metering import ChargeLine as ContractLine
from contracts.money import parse_amount
from contracts.partition import partition_of
from contracts.streams import charges_rated_subject
from contracts.times import TIME_MAX, TIME_MIN
from services.ledger.domain.commands import ChargeLine, ReverseCharge, Units
from services.ledger.translate.commands import PREFIXED_HOLD, Reader, scope_of_use
from services.ledger.translate.problems import Invalid, Problem, model_problems


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
    reader = Reader(units)
    reader.line("", line)
    reader.finish()
    return line


def read_again(body: bytes, units: Units, *, key: str) -> words.Charge | words.ReverseCharge:
    """A line of a bundle on its own, as the command that does what it asks for. Raises Invalid with every problem."""
    if not _is_reversal(body):
        return words.Charge(idempotency_key=key, line=read_line(body, units))
    line = _reversal_line(body)
    reader = Reader(units)
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


def _read_line(line: _Line, units: Units, partition: int) -> ChargeLine | None:
    """The hot path; None if anything is odd: then it is read again slowly, to say what."""
    try:
        if partition_of(line.account) != partition or not TIME_MIN <= line.occurred_at < TIME_MAX:
            return None
        hold = line.hold
        if hold is not None:
            if partition_of_id(hold) != partition or not hold.startswith("hold_"):
                return None
            hold = hold[PREFIXED_HOLD:]
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
        scope=scope_of_use(scope.provider, scope.model, scope.feature),
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
    return Reader(units).line("", line)


def _read_reversal(body: bytes, units: Units, partition: int, bundle: int) -> ReverseCharge | BadLine:
    reader = Reader(units)
    try:
        line = _reversal_line(body)
        read = reader.reversal("", line, bundle)
        reader.finish()
    except Invalid as error:
        return BadLine(body, error.problems)
    return read if partition_of(line.account) == partition else BadLine(body, (_lives_elsewhere(line.account),))


def _lives_elsewhere(account: str) -> Problem:
    return Problem("/account", "account_differs", f"{account} lives in partition {partition_of(account)}")
