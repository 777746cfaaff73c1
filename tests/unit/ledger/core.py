"""The pure core of a partition and nothing else: due things are done, commands decided, moves evolved and checked."""

import itertools
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from contracts.accounts import path
from contracts.money import Unit
from services.ledger.domain.commands import (
    ChargeLine,
    Command,
    Grant,
    GrantedKind,
    Leg,
    LotScope,
    OpenAccount,
    Policy,
    ResolveHold,
    Scope,
    Units,
    WalletTerms,
)
from services.ledger.domain.concerned import Place
from services.ledger.domain.decide import decide
from services.ledger.domain.due import decide_due
from services.ledger.domain.entries import PSEUDO_KINDS, Entry, Move, is_contra, placed
from services.ledger.domain.errors import Refusal
from services.ledger.domain.evolve import evolve
from services.ledger.domain.overdue import decide_overdue, in_order, overdue, overdue_on
from services.ledger.domain.state import Hold, Lot, PartitionState, Wallet

BEGIN: Final = datetime(2026, 7, 1, 12, tzinfo=UTC)
SCOPE: Final = Scope("openai", "gpt-4o-mini")
UNITS: Final = Units.of(
    {
        unit.name: unit
        for unit in (
            Unit("usd", "money", 9),
            Unit("points", "money", 0),
            Unit("usd_cap", "cap", 9, mirrors="usd"),
            Unit("tokens", "cap", 0),
        )
    }
)

_ids = itertools.count(1)


def new_hold() -> str:
    """The id of a new hold."""
    return f"hold-{next(_ids)}"


def leg(unit: str, at_least: int, at_most: int | None = None) -> Leg:
    """A leg of a hold; all or nothing if only one amount is given."""
    return Leg(unit, at_least, at_least if at_most is None else at_most)


class Core:
    """Journal and state. Lots are never forgotten, as if all that a command may ask for were always read."""

    def __init__(self, units: Units = UNITS, *, now: datetime = BEGIN) -> None:
        self.units = units
        self.state = PartitionState()
        self.entries: list[Entry] = []
        self.now = now
        self.batch = 0

    # Given and when

    def later(self, **by: int) -> None:
        """Let time pass."""
        self.now += timedelta(**by)

    def open(self, account: str, *units: str, policy: Policy = "hard", overdraft: int = 0) -> None:
        """Open an account with wallets."""
        wallets = tuple(WalletTerms(unit, policy, overdraft) for unit in units)
        self.do(OpenAccount(account=account, wallets=wallets))

    def grant(
        self,
        account: str,
        unit: str,
        amount: int,
        *,
        kind: GrantedKind = "purchase",
        begins: datetime | None = None,
        ends: datetime | None = None,
        scope: LotScope | None = None,
        reference: str | None = None,
    ) -> str:
        """Grant a lot; its id."""
        granted = Grant(
            account=account,
            unit=unit,
            amount=amount,
            kind=kind,
            effective_at=begins,
            expires_at=ends,
            scope=scope,
            reference=reference,
        )
        lot = self.do(granted)[0].lot
        assert lot is not None
        return lot

    def line(
        self,
        account: str,
        *amounts: tuple[str, int],
        hold: str | None = None,
        at: datetime | None = None,
        scope: Scope = SCOPE,
        final: bool = True,
        required: bool = False,
    ) -> ChargeLine:
        """What a new use cost."""
        return ChargeLine(
            source="demo",
            event_id=f"event-{next(_ids)}",
            account=account,
            occurred_at=at or self.now,
            hold=hold,
            scope=scope,
            price_version="v1",
            amounts=amounts,
            final=final,
            required=required,
        )

    def do(self, command: Command) -> list[Move]:
        """Carry out what must be accepted."""
        decided = self.ask(command)
        assert isinstance(decided, list), decided
        return decided

    def ask(self, command: Command) -> list[Move] | Refusal:
        """Carry out a command, if it is accepted, in a batch of its own, after what is due."""
        hold = overdue(self.state, command, self.now)
        for each in in_order(
            [*([] if hold is None else [hold]), *overdue_on(self.state, path(command.account), self.now)]
        ):
            if not isinstance(command, ResolveHold) or each is hold:
                self._end(each, itself=not isinstance(command, ResolveHold))
        if hold is None or not isinstance(command, ResolveHold):
            self.due()
        decided = decide(self.state, command, units=self.units, place=self._place())
        if isinstance(decided, list):
            self._record(decided)
        if isinstance(command, ResolveHold):
            self.due()
        return decided

    def due(self) -> None:
        """Do what is due."""
        for _ in range(10_000):
            moves = decide_due(self.state, self.state.accounts, units=self.units, place=self._place())
            if not moves:
                return
            self._record(moves)
        raise AssertionError("something is due for ever")

    def _end(self, hold: Hold, *, itself: bool) -> None:
        """Do what was due by the deadline of an overdue hold, and let it end, if `itself` is to."""
        for _ in range(10_000):
            moves = decide_overdue(self.state, hold, units=self.units, place=self._place())
            if not moves or (not itself and moves[0].hold is not None):
                return
            self._record(moves)
        raise AssertionError("something is due for ever")

    # Then

    def wallet(self, account: str, unit: str) -> Wallet:
        """An open wallet."""
        found = self.state.wallet(account, unit)
        assert found is not None
        return found

    def amounts(self, account: str, unit: str) -> tuple[int, int]:
        """posted and held of a wallet."""
        wallet = self.wallet(account, unit)
        return wallet.posted, wallet.held

    def lot(self, lot: str) -> Lot:
        """A lot, spent or not."""
        return next(each for each in self.state.lots() if each.id == lot)

    def of_kind(self, account: str, unit: str, kind: str) -> int:
        """posted of all lots of a kind in a wallet."""
        return sum(lot.posted for lot in self.wallet(account, unit).lots.values() if lot.kind == kind)

    def _place(self) -> Place:
        return Place(partition=7, batch=self.batch + 1, position=1, transaction_position=1, recorded_at=self.now)

    def _record(self, moves: Sequence[Move]) -> None:
        self.batch += 1
        # Each batch is recorded later than the one before.
        recorded_at = self.now
        self.now += timedelta(microseconds=1)
        for position, move in enumerate(moves, 1):
            entry = placed(
                move,
                batch=self.batch,
                position=position,
                transaction=f"transaction-{self.batch}",
                recorded_at=recorded_at,
            )
            self.entries.append(entry)
            evolve(self.state, entry)
        self._check(moves)

    def _check(self, moves: Sequence[Move]) -> None:
        sums: Counter[tuple[str, str]] = Counter()
        for move in moves:
            if move.unit is not None:
                # The contra of a cap names the wallet that it belongs to.
                wallet = move.account.partition("/")[2] if is_contra(move.account) else move.account
                sums[move.unit, wallet if self.units.by_name[move.unit].kind == "cap" else ""] += move.posted
        assert not any(sums.values()), sums
        for lot in self.state.lots():
            if lot.kind in PSEUDO_KINDS:
                assert lot.posted <= 0 <= lot.held, lot
            else:
                assert lot.available >= 0, lot
                assert lot.held >= 0, lot
                assert lot.expired >= 0, lot
