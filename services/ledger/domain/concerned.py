"""What a command concerns: its place in the journal, the wallets on its path, the amounts it may name.

Money is paid by the nearest open wallet up the path, whole. A cap is counted on every wallet of its unit on the path.
A path without a wallet of a unit is not limited in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, assert_never

import msgspec

from contracts.accounts import path
from contracts.ids import derived_uuid7
from contracts.money import AMOUNT_MAX, Unit
from services.ledger.domain.commands import Units
from services.ledger.domain.entries import LotGranted, LotKind, Move
from services.ledger.domain.errors import AccountNotOpen, InvalidAmount, UnknownUnit, WalletNotOpen
from services.ledger.domain.periods import period_at
from services.ledger.domain.state import PartitionState, Wallet

# Clocks differ a little; what is said to happen later than this is a mistake.
AHEAD_MAX: Final = timedelta(minutes=5)
# What a wallet may come to hold, or to owe: well inside a bigint.
BALANCE_MAX: Final = 4 * AMOUNT_MAX


# A struct, as are all of which each line takes one: to make a frozen dataclass takes ten times as long.
class Place(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where in the journal a decision will stand: its next new entry's position, and where its transaction began."""

    partition: int
    batch: int
    position: int
    transaction_position: int
    recorded_at: datetime

    def new_lot(self, count: int) -> str:
        """The id of the `count`-th lot, from 0, that a decision makes: each makes at least one new entry, too."""
        return str(
            derived_uuid7(
                recorded_at=self.recorded_at,
                partition=self.partition,
                batch=self.batch,
                position=self.position + count,
            )
        )


def not_open(state: PartitionState, account: str, unit: str) -> AccountNotOpen | WalletNotOpen:
    """Why there is no such wallet."""
    return WalletNotOpen(account, unit) if account in state.accounts else AccountNotOpen(account)


def wallets_of(state: PartitionState, account: str, unit: Unit) -> Sequence[Wallet]:
    """Who pays: for money the nearest open wallet up the path; for a cap every one on the path."""
    accounts, name = state.accounts, unit.name
    found = []
    for each in path(account):
        opened = accounts.get(each)
        if opened is not None and (wallet := opened.wallets.get(name)) is not None:
            found.append(wallet)
            if unit.kind == "money":
                break
    return found


def counted_in(units: Units, unit: str) -> tuple[str, ...]:
    """A unit, and those that count what is paid in it."""
    mirrors = units.mirrors.get(unit)
    return (unit,) if mirrors is None else (unit, *mirrors)


def check_amounts(units: Units, amounts: Sequence[tuple[str, int]]) -> UnknownUnit | InvalidAmount | None:
    """Known units, each once, none that follows another, amounts from 0 to the largest."""
    for unit, amount in amounts:
        if unit not in units.by_name:
            return UnknownUnit(unit)
        if not 0 <= amount <= AMOUNT_MAX:
            return InvalidAmount(unit, "an amount is at least 0 and at most the largest amount")
    if len(amounts) > 1:
        seen: set[str] = set()
        for unit, _ in amounts:
            if unit in seen:
                return InvalidAmount(unit, "a unit is named once")
            seen.update(counted_in(units, unit))
    return None


def beyond(wallet: Wallet, unit: Unit, *, at: datetime, occurred_at: datetime, new_lots: Iterator[str]) -> "Beyond":
    """The pseudo-lot for what is not there: of money a new debt; of a cap the overage of the period that `at` is in."""
    match unit.kind:
        case "money":
            return Beyond(next(new_lots), "debt", ())
        case "cap":
            rule, period = _period_of(wallet, at)
            overage = wallet.overage_lot(rule=rule, period=period)
            if overage is not None:
                return Beyond(overage.id, "overage", (), overage.held)
            lot = next(new_lots)
            if rule is None:
                return Beyond(lot, "overage", ())
            opened = Move(
                kind="lot_opened",
                account=wallet.account,
                occurred_at=occurred_at,
                unit=wallet.unit,
                lot=lot,
                lot_kind="overage",
                details=LotGranted(priority=0, rule=rule, period=period),
            )
            return Beyond(lot, "overage", (opened,))
        case _:
            assert_never(unit.kind)


def uncapped(wallet: Wallet, new_lots: Iterator[str]) -> "Beyond":
    """The pseudo-lot that counts while a wallet is unlimited."""
    lot = wallet.uncapped_lot()
    return Beyond(next(new_lots), "uncapped", ()) if lot is None else Beyond(lot.id, "uncapped", (), lot.held)


@dataclass(slots=True)
class Beyond:
    """A pseudo-lot, what must be entered first to make it, and what holds have set aside on it so far."""

    lot: str
    kind: LotKind
    opened: tuple[Move, ...]
    held: int = 0


def _period_of(wallet: Wallet, at: datetime) -> tuple[str | None, int | None]:
    """The recurring grant and its period that a time is in, if any: whose lot was valid then, or would have been."""
    for lot in wallet.burning():
        if lot.rule is not None and not lot.void and lot.is_valid(at):
            return lot.rule, lot.period
    # A lot that is over and spent is not kept for ever; its rule is.
    for state in sorted(wallet.rules.values(), key=lambda each: (each.ended, each.rule.priority, each.rule.id)):
        period = period_at(state.rule, at)
        if state.rule.first_period <= period < state.next_period:
            return state.rule.id, period
    return None, None
