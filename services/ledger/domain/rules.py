"""Recurring grants and plans: set, ended, changed. Renewals are due (`due.py`).

The id of a rule stands for its schedule: a period of it is granted once, whatever becomes of the rule meanwhile.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from contracts.money import AMOUNT_MAX
from services.ledger.domain.commands import ChangePlan, EndRule, Rule, SetRule, Units
from services.ledger.domain.concerned import Place, check_amounts, not_open
from services.ledger.domain.due import terms_moves, void_moves
from services.ledger.domain.entries import Move, RuleEnded, RuleSet
from services.ledger.domain.errors import AccountNotOpen, InvalidRule, Refusal, UnknownRule
from services.ledger.domain.opening import overdraft_problem
from services.ledger.domain.periods import PERIODS, boundary, is_zone, period_at
from services.ledger.domain.state import Account, PartitionState, RuleState, Wallet

# As many as a command may ask for.
EVERY_MAX: Final = 1000
# Nothing else is decided while they are granted: a fifth of a millisecond for each, and more for each of more of them.
CATCH_UP_MAX: Final = 1_000
# Of a wallet, but for those that are over; of a plan.
RULES_MAX: Final = 32
_ANCHOR_YEARS: Final = range(1970, 2200)

Old = Sequence[tuple[Wallet, RuleState]]


def decide_set_rule(state: PartitionState, command: SetRule, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Add a rule, or replace the one of its id from its next period on. One that is over goes on with the current.

    UnknownUnit, InvalidAmount, InvalidRule, AccountNotOpen, WalletNotOpen.
    """
    rule, at = _in_utc(command.rule), place.recorded_at
    if refusal := _check_rule(state, command.account, rule, units=units):
        return refusal
    wallet = state.accounts[command.account].wallets[rule.unit]
    known = wallet.rules.get(rule.id)
    number = rule.first_period
    if known is not None:
        if _is_same(known, rule) and known.rule.end_period == rule.end_period and not known.ended:
            return []
        number = max(number, _first_free(known), period_at(rule, at) if known.is_over else known.next_period)
    if sum(not other.is_over for other in wallet.rules.values() if other is not known) >= RULES_MAX:
        return InvalidRule(rule.id, f"a wallet has at most {RULES_MAX} recurring grants")
    return _check_number(known, rule, number, at) or [_set(wallet, known, rule, number, at)]


def decide_end_rule(state: PartitionState, command: EndRule, *, units: Units, place: Place) -> list[Move] | Refusal:
    """Let a rule grant no more: the current period is its last. AccountNotOpen, UnknownRule."""
    del units
    account = state.accounts.get(command.account)
    if account is None:
        return AccountNotOpen(command.account)
    for wallet in account.wallets.values():
        known = wallet.rules.get(command.rule)
        if known is not None:
            return [] if known.is_over else [_ended(wallet, known, known.next_period, place.recorded_at)]
    return UnknownRule(command.rule, command.account)


def decide_change_plan(
    state: PartitionState, command: ChangePlan, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """Replace the rules that belong to a plan. What is in both plans as it is goes on as if nothing were asked.

    Now: the other old rules are gone, what is unheld of their lots is voided, and the new ones grant the period that
    contains now, unless they did so before: then the next. At the period's end: the old ones end with theirs, and the
    new ones begin with their first period after the old ones of their unit, or after all, if none is of it. When no old
    one has a current period, it is always now.
    UnknownUnit, InvalidAmount, InvalidRule, AccountNotOpen, WalletNotOpen.
    """
    account = state.accounts.get(command.account)
    if account is None:
        return AccountNotOpen(command.account)
    asked = {rule.id: msgspec.structs.replace(_in_utc(rule), plan=command.plan) for rule in command.rules}
    if len(asked) < len(command.rules) or len(asked) > RULES_MAX:
        reason = f"a plan has at most {RULES_MAX} recurring grants, each with an id of its own"
        return InvalidRule(command.rules[0].id, reason)
    for rule in asked.values():
        if refusal := _check_rule(state, command.account, rule, units=units):
            return refusal
    at = place.recorded_at
    old = [
        (wallet, known)
        for _, wallet in sorted(account.wallets.items())
        for _, known in sorted(wallet.rules.items())
        if known.rule.plan is not None
    ]
    ends = [(wallet.unit, _next_boundary(known)) for wallet, known in old if _has_current(known, at)]
    if command.at_period_end and ends:
        return _change_later(account, old, asked, ends, at)
    return _change_now(account, old, asked, at, units=units)


def _change_now(
    account: Account, old: Old, asked: Mapping[str, Rule], at: datetime, *, units: Units
) -> list[Move] | InvalidRule:
    moves: list[Move] = []
    for wallet, each in old:
        same = asked.get(each.rule.id)
        if same is None or not (_has_current(each, at) and _is_same(each, same)):
            moves += _gone(wallet, each, at, units=units)
    for rule in asked.values():
        wallet = account.wallets[rule.unit]
        known = wallet.rules.get(rule.id)
        if known is not None and _has_current(known, at):
            if not _is_same(known, rule):
                reason = "its current period has been granted in another form: what replaces it now has another id"
                return InvalidRule(rule.id, reason)
            if known.rule.end_period == rule.end_period:
                continue
            number = known.next_period
        else:
            number = max(0, rule.first_period, period_at(rule, at))
            if number < _first_free(known):
                number = _first_free(known)
                moves += terms_moves(wallet, rule, at)
        if refusal := _check_number(known, rule, number, at):
            return refusal
        moves.append(_set(wallet, known, rule, number, at))
    return moves


def _change_later(
    account: Account, old: Old, asked: Mapping[str, Rule], ends: Sequence[tuple[str, datetime]], at: datetime
) -> list[Move] | InvalidRule:
    moves = [
        _ended(wallet, known, known.next_period, at)
        for wallet, known in old
        if known.rule.id not in asked and not known.is_over
    ]
    for rule in asked.values():
        wallet = account.wallets[rule.unit]
        known = wallet.rules.get(rule.id)
        if known is not None and _has_current(known, at):
            number = known.next_period
        else:
            begins = max([end for unit, end in ends if unit == rule.unit] or [end for _, end in ends])
            number = max(rule.first_period, _first_free(known), _first_from(rule, begins))
        if (
            known is not None
            and not known.ended
            and _is_same(known, rule)
            and (known.next_period, known.rule.end_period) == (number, rule.end_period)
        ):
            continue
        if refusal := _check_number(known, rule, number, at):
            return refusal
        moves.append(_set(wallet, known, rule, number, at))
    return moves


def _check_rule(state: PartitionState, account: str, rule: Rule, *, units: Units) -> Refusal | None:
    """What can be said of a rule without those there are."""
    if refusal := check_amounts(units, [(rule.unit, rule.amount)]):
        return refusal
    if reason := _problem(rule, units=units):
        return InvalidRule(rule.id, reason)
    if state.wallet(account, rule.unit) is None:
        return not_open(state, account, rule.unit)
    for wallet in state.accounts[account].wallets.values():
        if wallet.unit != rule.unit and rule.id in wallet.rules:
            return InvalidRule(rule.id, f"it is a grant of {wallet.unit}: what grants {rule.unit} has another id")
    return None


def _problem(rule: Rule, *, units: Units) -> str | None:  # noqa: PLR0911 - one clause each
    if rule.period not in PERIODS:
        return f"{rule.period!r} is no period"
    if not 1 <= rule.every <= EVERY_MAX:
        return f"it is renewed every 1 to {EVERY_MAX} periods"
    if not is_zone(rule.zone):
        return f"{rule.zone!r} is no zone"
    if not _has_anchor(rule):
        return f"its anchor has a zone, and is from {_ANCHOR_YEARS[0]} to {_ANCHOR_YEARS[-1]}"
    if not 0 <= rule.rollover_min <= rule.rollover_max <= AMOUNT_MAX:
        return "rollover_min is between 0 and rollover_max, and that is at most the largest amount"
    if rule.first_period < 0:
        return "its first period is at least 0"
    if rule.overdraft is not None:
        return overdraft_problem(units.by_name[rule.unit], rule.policy or "hard", rule.overdraft)
    return None


def _check_number(known: RuleState | None, rule: Rule, number: int, at: datetime) -> InvalidRule | None:
    """Whether a rule can begin, or go on, with a period."""
    if known is not None and _has_begun(known) and _schedule(known.rule) != _schedule(rule):
        reason = "periods of it have been granted by another schedule: another schedule has another id"
        return InvalidRule(rule.id, reason)
    if rule.end_period is not None and rule.end_period <= number:
        return InvalidRule(rule.id, f"it ends before period {rule.end_period}, and its first is {number}")
    try:
        boundary(rule, number + 1)
    except (ValueError, OverflowError):
        return InvalidRule(rule.id, f"the calendar does not go so far as its period {number}")
    current = period_at(rule, at)
    end = current + 1 if rule.end_period is None else min(current + 1, rule.end_period)
    if end - number > CATCH_UP_MAX:
        reason = (
            f"more than {CATCH_UP_MAX} periods of it would be granted at once:"
            f" with {current} as its first_period it begins with the current one"
        )
        return InvalidRule(rule.id, reason)
    return None


def _set(wallet: Wallet, known: RuleState | None, rule: Rule, number: int, at: datetime) -> Move:
    """The rule from its period `number` on. It keeps its very first period: it tells what was granted ever."""
    first = known.rule.first_period if known is not None and _has_begun(known) else number
    rule = msgspec.structs.replace(rule, first_period=first, terms_from=number)
    return Move(
        kind="rule_set",
        account=wallet.account,
        occurred_at=at,
        unit=wallet.unit,
        details=RuleSet(rule=rule, next_period=number),
    )


def _ended(wallet: Wallet, known: RuleState, end_period: int | None, at: datetime) -> Move:
    return Move(
        kind="rule_ended",
        account=wallet.account,
        occurred_at=at,
        unit=wallet.unit,
        details=RuleEnded(known.rule.id, end_period),
    )


def _gone(wallet: Wallet, known: RuleState, at: datetime, *, units: Units) -> list[Move]:
    """Void what is unheld of a rule's lots, and let it end at once. What has ended before is left to expire."""
    moves = [
        move
        for lot in wallet.burning()
        if lot.rule == known.rule.id and not lot.void
        if lot.expires_at is None or lot.expires_at > at
        for move in void_moves(lot, max(lot.available, 0), units=units, occurred_at=at, reason="plan changed")
    ]
    if not known.is_over or _has_current(known, at):
        moves.append(_ended(wallet, known, None, at))
    return moves


def _in_utc(rule: Rule) -> Rule:
    """With its anchor in UTC: times in different zones do not always compare."""
    return msgspec.structs.replace(rule, anchor=rule.anchor.astimezone(UTC)) if _has_anchor(rule) else rule


def _has_anchor(rule: Rule) -> bool:
    return rule.anchor.tzinfo is not None and rule.anchor.year in _ANCHOR_YEARS


def _is_same(known: RuleState, rule: Rule) -> bool:
    """Whether it is the same grant, but for when it begins and ends."""
    there = known.rule
    return rule == msgspec.structs.replace(
        there, first_period=rule.first_period, end_period=rule.end_period, terms_from=rule.terms_from
    )


def _has_begun(known: RuleState) -> bool:
    """Whether a period of it was ever granted."""
    return known.next_period > known.rule.first_period


def _has_current(known: RuleState, at: datetime) -> bool:
    """Whether the period before its next one lasts at a time, and was granted, and not voided."""
    return not known.ended and _has_begun(known) and _next_boundary(known) > at


def _first_free(known: RuleState | None) -> int:
    """The first period that has not been granted."""
    return known.next_period if known is not None and _has_begun(known) else 0


def _next_boundary(known: RuleState) -> datetime:
    """When its next period begins, or would begin if it did not end."""
    return boundary(known.rule, known.next_period)


def _first_from(rule: Rule, at: datetime) -> int:
    """The first period, from 0, that begins at a time or later."""
    number = period_at(rule, at)
    return max(0, number if boundary(rule, number) >= at else number + 1)


def _schedule(rule: Rule) -> tuple[object, ...]:
    return rule.period, rule.every, rule.anchor, rule.zone
