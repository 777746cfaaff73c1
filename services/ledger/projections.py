"""The projections: their rows, from the state and back."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from services.ledger.domain.commands import LotScope, Rule, Scope, Threshold
from services.ledger.domain.due import next_due
from services.ledger.domain.entries import HeldLeg
from services.ledger.domain.state import (
    Account,
    Claim,
    Earmark,
    Hold,
    Lot,
    PartitionState,
    PastLine,
    Payment,
    RuleState,
    Wallet,
)

Row = tuple[Any, ...]

_encode: Final = msgspec.json.Encoder(order="sorted").encode
_decode_legs: Final = msgspec.json.Decoder(tuple[HeldLeg, ...]).decode
_decode_rule: Final = msgspec.json.Decoder(Rule).decode
_decode_lot_scope: Final = msgspec.json.Decoder(LotScope).decode
_decode_scope: Final = msgspec.json.Decoder(Scope).decode
_decode_thresholds: Final = msgspec.json.Decoder(tuple[Threshold, ...]).decode
_decode_low: Final = msgspec.json.Decoder(frozenset[Threshold | None]).decode
_decode_repaid: Final = msgspec.json.Decoder(dict[str, int]).decode
_decode_amounts: Final = msgspec.json.Decoder(tuple[tuple[str, int], ...]).decode
_decode_split: Final = msgspec.json.Decoder(list[tuple[str, str, str, str, int, int]]).decode
_decode_reversed: Final = msgspec.json.Decoder(list[tuple[str, str, str, int]]).decode
_NOTHING: Final = "[]"


def changed_rows(partition: int, state: PartitionState) -> dict[str, list[Row]]:
    """The rows of what was touched, by table. When something is due on an account is stored when it has changed."""
    changes = state.changes
    return {
        "accounts": _changed_accounts(partition, state),
        "wallets": [wallet_row(partition, wallet) for wallet in changes.wallets.values()],
        "rules": [rule_row(partition, unit, rule) for (_, unit, _), rule in changes.rules.items()],
        "lots": [lot_row(partition, lot) for lot in changes.lots.values()],
        "holds": [hold_row(partition, hold) for hold in changes.holds.values()],
        "hold_lots": [hold_lot_row(partition, key[0], earmark) for key, earmark in changes.earmarks.items()],
        "payments": [payment_row(partition, payment) for payment in changes.payments.values()],
        "claims": [claim_row(partition, key[0], key[1], claim) for key, claim in changes.claims.items()],
    }


def _changed_accounts(partition: int, state: PartitionState) -> list[Row]:
    rows = []
    for name in {**dict.fromkeys(state.changes.accounts), **{key[0]: None for key in state.changes.wallets}}:
        account = state.accounts[name]
        due_at = next_due(state, (name,))
        if due_at != account.due_at or name in state.changes.accounts:
            account.due_at = due_at
            rows.append(account_row(partition, account))
    return rows


def account_row(partition: int, account: Account) -> Row:
    """A row of `accounts`."""
    return (
        partition,
        account.id,
        account.opened_at,
        account.recorded_at,
        account.batch,
        account.position,
        account.transaction,
        account.due_at,
    )


def wallet_row(partition: int, wallet: Wallet) -> Row:
    """A row of `wallets`."""
    return (
        partition,
        wallet.account,
        wallet.unit,
        wallet.policy,
        wallet.overdraft,
        wallet.recorded_at,
        wallet.batch,
        wallet.position,
        wallet.posted,
        wallet.held,
        wallet.frozen,
        wallet.overage,
        _encode(wallet.thresholds).decode() if wallet.thresholds else _NOTHING,
        wallet.uncapped,
        wallet.owed,
        wallet.owing,
        wallet.full,
        _encode(sorted(wallet.low, key=_encode)).decode() if wallet.low else _NOTHING,
    )


def rule_row(partition: int, unit: str, rule: RuleState) -> Row:
    """A row of `rules`."""
    return (
        partition,
        rule.account,
        unit,
        rule.rule.id,
        _encode(rule.rule).decode(),
        rule.next_period,
        rule.ended,
        rule.recorded_at,
        rule.batch,
        rule.position,
    )


def lot_row(partition: int, lot: Lot) -> Row:
    """A row of `lots`."""
    return (
        partition,
        lot.id,
        lot.account,
        lot.unit,
        lot.kind,
        lot.priority,
        lot.effective_at,
        lot.expires_at,
        None if lot.scope is None else _encode(lot.scope).decode(),
        lot.reference,
        lot.cost_basis,
        lot.origin,
        lot.granted,
        lot.occurred_at,
        lot.recorded_at,
        lot.batch,
        lot.position,
        lot.posted,
        lot.held,
        lot.frozen,
        lot.is_spent,
        lot.clawed,
        lot.clawed_spent,
        lot.pending,
        lot.rule,
        lot.period,
        lot.expired,
        lot.void,
        lot.voided,
        lot.pending_frozen,
        _encode(lot.repaid).decode() if lot.repaid else None,
    )


def hold_row(partition: int, hold: Hold) -> Row:
    """A row of `holds`."""
    return (
        partition,
        hold.id,
        hold.account,
        hold.status,
        hold.expires_at,
        hold.overdue,
        _encode(hold.legs).decode(),
        hold.recorded_at,
        hold.transaction,
        hold.batch,
        hold.position,
        hold.ended_at,
        None if hold.scope is None else _encode(hold.scope).decode(),
    )


def hold_lot_row(partition: int, hold_id: str, earmark: Earmark) -> Row:
    """A row of `hold_lots`."""
    return (
        partition,
        hold_id,
        earmark.account,
        earmark.unit,
        earmark.lot,
        earmark.placed,
        earmark.held,
        earmark.estimated,
    )


def payment_row(partition: int, payment: Payment) -> Row:
    """A row of `payments`."""
    return (
        partition,
        payment.id,
        payment.account,
        payment.unit,
        payment.paid,
        payment.claimed,
        payment.recorded_at,
        payment.batch,
        payment.position,
        payment.disputed,
    )


def claim_row(partition: int, payment: str, account: str, claim: Claim) -> Row:
    """A row of `claims`."""
    return (
        partition,
        payment,
        account,
        claim.id,
        claim.reason,
        claim.state,
        claim.claimed,
        claim.revision,
        claim.occurred_at,
        claim.recorded_at,
        claim.transaction,
        claim.batch,
        claim.position,
    )


def add_rows(states: Mapping[int, PartitionState], rows: Mapping[str, Iterable[Row]]) -> None:
    """Put rows, by table, into the states of their partitions. `past_lines` and `reversals` are as the store has them.

    What a state has already is replaced: the row says the same, or the state is not to be believed.
    """
    _add_accounts(states, rows.get("accounts", ()))
    _add_wallets(states, rows.get("wallets", ()))
    _add_rules(states, rows.get("rules", ()))
    _add_lots(states, rows.get("lots", ()))
    _add_holds(states, rows.get("holds", ()))
    _add_hold_lots(states, rows.get("hold_lots", ()))
    _add_payments(states, rows.get("payments", ()))
    _add_claims(states, rows.get("claims", ()))
    _add_past_lines(states, rows.get("past_lines", ()))
    _add_reversals(states, rows.get("reversals", ()))


def _add_accounts(states: Mapping[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, account, opened_at, recorded_at, batch, position, transaction, due_at in rows:
        states[partition].accounts[account] = Account(
            id=account,
            opened_at=opened_at,
            recorded_at=recorded_at,
            batch=batch,
            position=position,
            transaction=str(transaction),
            due_at=due_at,
        )


def _add_wallets(states: Mapping[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, account, unit, policy, overdraft, recorded_at, batch, position, *more in rows:
        posted, held, frozen, overage, thresholds, uncapped, owed, owing, full, low = more
        states[partition].accounts[account].wallets[unit] = Wallet(
            account=account,
            unit=unit,
            policy=policy,
            overdraft=overdraft,
            recorded_at=recorded_at,
            batch=batch,
            position=position,
            thresholds=_decode_thresholds(thresholds) if thresholds != _NOTHING else (),
            posted=posted,
            held=held,
            frozen=frozen,
            overage=overage,
            uncapped=uncapped,
            owed=owed,
            owing=owing,
            full=full,
            low=_decode_low(low) if low != _NOTHING else frozenset(),
        )


def _add_rules(states: Mapping[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, account, unit, rule_id, rule, next_period, ended, recorded_at, batch, position in rows:
        states[partition].accounts[account].wallets[unit].rules[rule_id] = RuleState(
            rule=_decode_rule(rule),
            account=account,
            next_period=next_period,
            recorded_at=recorded_at,
            batch=batch,
            position=position,
            ended=ended,
        )


def _add_lots(states: Mapping[int, PartitionState], rows: Iterable[Row]) -> None:
    for row in rows:
        lot = lot_of(row)
        states[row[0]].accounts[lot.account].wallets[lot.unit].add(lot)


def lot_of(row: Row) -> Lot:
    """What a row of `lots` says."""
    _partition, lot, account, unit, kind, priority, effective_at, expires_at, *more = row
    scope, reference, cost_basis, origin, granted, occurred_at, recorded_at, batch, position, *amounts = more
    posted, held, frozen, _spent, clawed, clawed_spent, pending, rule, period, expired, void, *last = amounts
    voided, pending_frozen, repaid = last
    return Lot(
        id=str(lot),
        account=account,
        unit=unit,
        kind=kind,
        priority=priority,
        effective_at=effective_at,
        expires_at=expires_at,
        scope=None if scope is None else _decode_lot_scope(scope),
        reference=reference,
        cost_basis=cost_basis,
        origin=origin,
        rule=rule,
        period=period,
        granted=granted,
        occurred_at=occurred_at,
        recorded_at=recorded_at,
        batch=batch,
        position=position,
        posted=posted,
        held=held,
        frozen=frozen,
        expired=expired,
        void=void,
        voided=voided,
        clawed=clawed,
        clawed_spent=clawed_spent,
        pending=pending,
        pending_frozen=pending_frozen,
        repaid={} if repaid is None else _decode_repaid(repaid),
    )


def _add_holds(states: Mapping[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, hold, account, status, expires_at, overdue, legs, recorded_at, transaction, *more in rows:
        batch, position, ended_at, scope = more
        there = states[partition].holds[str(hold)] = Hold(
            id=str(hold),
            account=account,
            status=status,
            expires_at=expires_at,
            overdue=overdue,
            legs=_decode_legs(legs),
            scope=None if scope is None else _decode_scope(scope),
            recorded_at=recorded_at,
            transaction=str(transaction),
            batch=batch,
            position=position,
            ended_at=ended_at,
        )
        if there.status == "placed":
            states[partition].deadlines.note(there)


def _add_hold_lots(states: Mapping[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, hold, account, unit, lot, placed, held, estimated in rows:
        states[partition].holds[str(hold)].earmarks[account, unit, str(lot)] = Earmark(
            account=account, unit=unit, lot=str(lot), placed=placed, held=held, estimated=estimated
        )


def _add_payments(states: Mapping[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, payment, account, unit, paid, _claimed, recorded_at, batch, position, _disputed in rows:
        states[partition].payments[payment, account] = Payment(
            id=payment,
            account=account,
            unit=unit,
            paid=paid,
            recorded_at=recorded_at,
            batch=batch,
            position=position,
        )


def _add_claims(states: Mapping[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, payment, account, claim, reason, state, claimed, revision, *more in rows:
        occurred_at, recorded_at, transaction, batch, position = more
        states[partition].payments[payment, account].claims[claim] = Claim(
            id=claim,
            reason=reason,
            state=state,
            claimed=claimed,
            revision=revision,
            occurred_at=occurred_at,
            recorded_at=recorded_at,
            transaction=str(transaction),
            batch=batch,
            position=position,
        )


def _add_past_lines(states: Mapping[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, source, event_id, revision, account, occurred_at, hold, amounts, split in rows:
        states[partition].lines[source, event_id, revision] = PastLine(
            source=source,
            event_id=event_id,
            revision=revision,
            account=account,
            occurred_at=occurred_at,
            hold=None if hold is None else str(hold),
            amounts=_decode_amounts(amounts),
            split=taken_of(split),
        )


def taken_of(split: str) -> dict[tuple[str, str, str], int]:
    """What a charge line took of each lot, by (account, unit, lot), in the order in which it did."""
    taken: dict[tuple[str, str, str], int] = {}
    for account, unit, lot, _kind, posted, _held in _decode_split(split):
        taken[account, unit, lot] = taken.get((account, unit, lot), 0) - posted
    return taken


def _add_reversals(states: Mapping[int, PartitionState], rows: Iterable[Row]) -> None:
    for partition, source, event_id, revision, split in rows:
        line = states[partition].lines[source, event_id, revision]
        for account, unit, lot, posted in _decode_reversed(split):
            line.reversed[account, unit, lot] = line.reversed.get((account, unit, lot), 0) + posted


def reversed_text(given_back: Mapping[tuple[str, str, str], int]) -> str:
    """What was given back, by (account, unit, lot), as canonical JSON: a row of `reversals` has it as `split`."""
    return _encode([(*key, posted) for key, posted in given_back.items() if posted]).decode()
