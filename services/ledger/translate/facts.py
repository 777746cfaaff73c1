"""What others are told: the facts that follow from what was recorded, as rows of the outbox."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from contracts.ledger import CHARGED_ACCOUNTS_MAX
from contracts.money import format_amount
from contracts.partition import token
from contracts.streams import ledger_fact_subject
from services.kit.outbox import OutboxRow
from services.ledger.domain.commands import ReverseCharge, Transfer, Units
from services.ledger.domain.entries import (
    BalanceCrossed,
    HoldExtended,
    HoldPlaced,
    LotGranted,
    LotVoided,
    Move,
    is_contra,
)
from services.ledger.domain.entries import PaymentClaimed as ClaimNoted
from services.ledger.signing import SignedHeads
from services.ledger.translate.outcomes import full_id


class Fact(msgspec.Struct, frozen=True):
    """What is told to others: its subject's noun and verb, its own fields, and the version of its type."""

    noun: str
    verb: str
    transaction: str
    fields: Mapping[str, Any]
    version: int = 1


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


class ChargedSum(msgspec.Struct):
    """What an account was charged in one transaction, in steps by unit."""

    lines: int = 0
    amounts: dict[str, int] = {}


def usage_charged_facts(charged: Mapping[str, ChargedSum], *, transaction: str, units: Units) -> Iterator[Fact]:
    """What accounts were charged in one transaction: one fact, or as many as it takes with that many accounts."""
    accounts = [
        {
            "account": account,
            "charged": [_amount(amount, unit, units) for unit, amount in each.amounts.items()],
            "lines": each.lines,
        }
        for account, each in charged.items()
    ]
    for start in range(0, len(accounts), CHARGED_ACCOUNTS_MAX):
        fields = {"accounts": accounts[start : start + CHARGED_ACCOUNTS_MAX]}
        yield Fact("usage", "charged", transaction, fields, version=2)


def outbox_row(fact: Fact, *, partition: int, number: int, recorded_at: datetime) -> OutboxRow:
    """A fact as it is published."""
    payload = {
        "type": f"ledger.{fact.noun}.{fact.verb}.v{fact.version}",
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
