"""Bundles of charges: what they give back and charge, line by line."""

from typing import Literal

from contracts.accounts import path
from services.kit.dead_letters import Letter
from services.ledger.domain.commands import ChargeLine, ReverseCharge
from services.ledger.domain.draft import Transaction
from services.ledger.domain.errors import AlreadyCharged, Refusal
from services.ledger.handlers.carrying_out import Done, carry_out
from services.ledger.handlers.catching_up import catch_up, concerned, is_of_estimate, overdue_before
from services.ledger.handlers.charging import LINES, add_to, charge_line, finish_charge
from services.ledger.handlers.items import BundleItem, Conflicting, OutOfOrder, Taken, TracedCharge
from services.ledger.handlers.work import Work
from services.ledger.projections import Row
from services.ledger.translate import BadLine, ChargedSum, Fact, Problem, facts_of, full_id, problem_rows, refusal_text


def take_bundle(work: Work, item: BundleItem) -> Taken | OutOfOrder | Conflicting:
    """Do what a bundle says line by line, if its number is the next; a line that cannot be is put aside alone.

    What is given back comes first, each in a transaction of its own; what is charged, in one.
    """
    bundle, expected = item.bundle, work.draft.charges_number + 1
    if bundle.number > expected:
        return OutOfOrder(expected)
    if bundle.number < expected:
        known = work.bundle_hashes.get(bundle.number) or work.loaded.bundles.get((work.partition, bundle.number))
        return Taken(repeated=True) if known == bundle.body_hash else Conflicting()
    before = work.draft.entries
    dead = _reverse_all(work, item)
    names = {line.account for line in bundle.lines if isinstance(line, ChargeLine)}
    settling = [line for line in bundle.lines if isinstance(line, ChargeLine) and line.hold is not None]
    reached = {account for line in settling if is_of_estimate(work, line) for account in concerned(work, line)}
    accounts = sorted({account for name in names for account in path(name)} | reached)
    # The bundle has its number, whatever becomes of its lines: nothing of this is to be undone.
    catch_up(work, accounts, overdue_before(work, accounts, settling))
    transaction = work.draft.begin()
    rows: list[Row] = []
    charged: dict[str, ChargedSum] = {}
    facts: list[Fact] = []
    traceparents, traced = item.traceparents, list[TracedCharge]()
    for place, line in enumerate(bundle.lines):
        refusal = _charge(work, line, transaction, rows, bundle=bundle.number, number=place + 1, facts=facts)
        if traceparents and place in traceparents and isinstance(line, ChargeLine):
            assert not isinstance(refusal, BadLine)
            traced.append(_traced(work, line, traceparents[place], refusal, transaction))
        match refusal:
            case None:
                assert isinstance(line, ChargeLine)
                add_to(charged, line)
            case AlreadyCharged():
                LINES.labels(outcome="repeated").inc()
            case _:
                dead += 1
                work.letters.append(_letter(item, place, refusal, name="line"))
    if rows:
        work.tell([*facts, *work.facts((), transaction, "")])
        finish_charge(work, transaction, rows, charged, bundle.number)
    LINES.labels(outcome="charged").inc(len(rows))
    LINES.labels(outcome="dead").inc(dead)
    work.draft.charges_number = bundle.number
    work.bundle_hashes[bundle.number] = bundle.body_hash
    batch = work.draft.batch if work.draft.entries > before else work.draft.head.batch
    transaction_id = transaction.id if rows else None
    lines = len(bundle.lines) + len(bundle.reversals)
    work.bundles.append((work.partition, bundle.number, bundle.body_hash, batch, transaction_id, lines, dead))
    return Taken(repeated=False, traced=traced)


def _reverse_all(work: Work, item: BundleItem) -> int:
    """Give back what a bundle says, as commands would; how many of it could not be, and are put aside."""
    dead = 0
    for place, line in enumerate(item.bundle.reversals):
        refusal = line if isinstance(line, BadLine) else _reverse(work, line)
        if refusal is not None:
            dead += 1
            work.letters.append(_letter(item, place, refusal, name="reversal"))
    LINES.labels(outcome="reversed").inc(len(item.bundle.reversals) - dead)
    return dead


def _reverse(work: Work, line: ReverseCharge) -> Refusal | None:
    accounts = concerned(work, line)
    catch_up(work, accounts, overdue_before(work, accounts, ()))
    done = carry_out(work, line, accounts)
    return None if isinstance(done, Done) else done


def _charge(
    work: Work,
    line: ChargeLine | BadLine,
    transaction: Transaction,
    rows: list[Row],
    *,
    bundle: int,
    number: int,
    facts: list[Fact],
) -> Refusal | BadLine | None:
    if isinstance(line, BadLine):
        return line
    moves = charge_line(work, line, transaction, rows, bundle=bundle, number=number)
    if not isinstance(moves, list):
        return moves
    if line.hold is not None:
        facts += facts_of(
            moves,
            account=line.account,
            partition=work.partition,
            transaction=transaction.id,
            units=work.units,
        )
    return None


def _traced(
    work: Work, line: ChargeLine, traceparent: str, refusal: Refusal | None, transaction: Transaction
) -> TracedCharge:
    if refusal is not None:
        return TracedCharge(line, traceparent, refusal.code)
    identifier = full_id("txn", work.partition, transaction.id)
    return TracedCharge(line, traceparent, "charged", identifier, work.draft.batch, work.line_position)


def _letter(item: BundleItem, place: int, why: Refusal | BadLine, *, name: Literal["line", "reversal"]) -> Letter:
    """A line that cannot be charged, or given back, as a dead letter: its body is the line alone."""
    if isinstance(why, BadLine):
        body, problems = why.body, why.problems
    else:
        body = item.bundle.line_body(place) if name == "line" else item.bundle.reversal_body(place)
        problems = (Problem("", why.code, refusal_text(why, partition=item.partition)),)
    return Letter(
        stream=item.stream,
        stream_sequence=item.stream_sequence,
        subject=item.subject,
        headers={},
        payload=body,
        reason=f"{name} {place + 1} of bundle {item.bundle.number}: "
        + "; ".join(problem.detail for problem in problems),
        problems=problem_rows(problems),
        partition=item.partition,
    )
