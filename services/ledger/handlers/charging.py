"""Charge a line, and note its row: of a command, or of a bundle."""

from collections.abc import Mapping
from typing import Final

import msgspec
from prometheus_client import Counter

from services.kit.telemetry import REGISTRY
from services.ledger.domain.chain import lines_hash
from services.ledger.domain.charging import decide_charge
from services.ledger.domain.commands import ChargeLine, ExtendHold, PlaceHold, Scope
from services.ledger.domain.draft import Transaction
from services.ledger.domain.entries import Charged, Move
from services.ledger.domain.errors import AlreadyCharged, ChargeDiffers, Refusal
from services.ledger.domain.state import PastLine
from services.ledger.handlers.work import Work
from services.ledger.projections import Row, taken_of
from services.ledger.translate import (
    WHEN_RECORDED,
    ChargedSum,
    amounts_text,
    scope_text,
    split_text,
    usage_charged_facts,
)

LINES: Final = Counter(
    "scrip_ledger_charge_lines",
    "Lines of bundles by outcome: charged, reversed, repeated, dead.",
    ("outcome",),
    registry=REGISTRY,
)


def charge_line(
    work: Work, line: ChargeLine, transaction: Transaction, rows: list[Row], *, bundle: int | None, number: int
) -> list[Move] | Refusal:
    """Charge one line, or say why not. Its row goes to `rows`."""
    key = (line.source, line.event_id, line.revision)
    said_when = line.occurred_at != WHEN_RECORDED
    content = (
        line.account,
        line.occurred_at if said_when else work.draft.recorded_at,
        line.hold,
        scope_text(line.scope),
        line.price_version,
        line.own_key,
        amounts_text(line.amounts),
    )
    before = work.charged.get(key) or work.loaded.lines.get((work.partition, *key))
    if before is not None:
        is_same = before == content if said_when else (before[0], *before[2:]) == (content[0], *content[2:])
        return AlreadyCharged(*key) if is_same else ChargeDiffers(*key)
    if not said_when or line.scope is None:
        line = msgspec.structs.replace(line, occurred_at=content[1], scope=used_scope(work, line))
    moves = decide_charge(work.draft.state, line, units=work.units, place=transaction.place)
    if not isinstance(moves, list):
        return moves
    if bundle is None:
        transaction.record(moves)
    else:
        work.line_position = transaction.record_summed(moves)
    work.charged[key] = content
    split = split_text(moves)
    rows.append(
        (
            work.partition,
            *key,
            *content,
            split,
            bundle,
            number,
            work.draft.batch,
            transaction.id,
        )
    )
    if work.reversing and key in work.reversing:
        # Given back in the same batch: it is not in the tables yet.
        work.draft.state.setting(work.draft.state.lines, key)
        work.draft.state.lines[key] = PastLine(
            source=line.source,
            event_id=line.event_id,
            revision=line.revision,
            account=line.account,
            occurred_at=line.occurred_at,
            hold=line.hold,
            amounts=line.amounts,
            split=taken_of(split),
        )
    return moves


def finish_charge(
    work: Work,
    transaction: Transaction,
    rows: list[Row],
    charged: Mapping[str, ChargedSum],
    bundle: int | None,
    *,
    required: bool = False,
) -> None:
    """End a transaction that charges lines: their rows are written, and it is told what was charged."""
    transaction.finish(Charged(lines=len(rows), lines_hash=lines_hash(rows), bundle=bundle, required=required))
    work.lines.extend(rows)
    work.tell(usage_charged_facts(charged, transaction=transaction.id, units=work.units))


def used_scope(work: Work, command: PlaceHold | ExtendHold | ChargeLine) -> Scope | None:
    """What is used; if it does not say, what its hold is for."""
    scope = None if isinstance(command, ExtendHold) else command.scope
    hold = None if command.hold is None or scope is not None else work.draft.state.holds.get(command.hold)
    return scope if hold is None else hold.scope


def add_to(charged: dict[str, ChargedSum], line: ChargeLine) -> None:
    """Add a charged line to the sums by account."""
    if (found := charged.get(line.account)) is None:
        found = charged[line.account] = ChargedSum()
    found.lines += 1
    for unit, amount in line.amounts:
        found.amounts[unit] = found.amounts.get(unit, 0) + amount
