"""A decision in the making: its moves so far, and the state as it is with them; when it ends that is as it was."""

from collections.abc import Iterator
from types import TracebackType
from typing import Self

from contracts.accounts import root
from services.ledger.domain.commands import Units
from services.ledger.domain.concerned import Place
from services.ledger.domain.entries import Entry, Move, is_contra, placed
from services.ledger.domain.evolve import evolve
from services.ledger.domain.state import Lot, PartitionState, Payment, Wallet


class Attempt:
    """For decisions in which a move depends on what those before it made of the lots.

    While it is entered, the state and all that is of it follow its moves. Nothing else may change it meanwhile.
    """

    def __init__(self, state: PartitionState, *, units: Units, place: Place) -> None:
        self.state = state
        self.units = units
        self.place = place
        self.moves: list[Move] = []
        self._new_lots = 0
        # What was counted of the wallets it moves.
        self._before: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Self:
        self._trial = self.state.try_out()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.state.undo(self._trial)

    def do(self, *moves: Move) -> None:
        """Add moves."""
        for move in moves:
            if move.unit is not None and not is_contra(move.account):
                wallet = self.wallet(move.account, move.unit)
                self._before.setdefault((move.account, move.unit), wallet.counted)
            evolve(self.state, self._entry(move))
            self.moves.append(move)

    def new_lot(self) -> str:
        """The id of the next lot that the decision makes."""
        self._new_lots += 1
        return self.place.new_lot(self._new_lots - 1)

    def wallet(self, account: str, unit: str) -> Wallet:
        """An open wallet."""
        return self.state.accounts[account].wallets[unit]

    def wallet_of(self, lot: Lot) -> Wallet:
        """The wallet that a lot is in."""
        return self.wallet(lot.account, lot.unit)

    def payment(self, payment: str, account: str) -> Payment | None:
        """A payment, if it was read."""
        return self.state.payments.get((payment, account))

    def is_claimed(self, payment: str) -> bool:
        """Whether there are claims on a payment that was read, of whatever account."""
        return any(of == payment and bool(found.claims) for (of, _), found in self.state.payments.items())

    def referring(self, reference: str, account: str) -> list[Lot]:
        """The lots in all accounts of a tree that refer to something."""
        return [
            lot
            for name in self._tree(account)
            for wallet in self.state.accounts[name].wallets.values()
            for lot in wallet.lots.values()
            if lot.reference == reference
        ]

    def wallets(self) -> Iterator[tuple[int, Wallet]]:
        """The wallets that were moved, and what was counted of each before."""
        for (account, unit), before in self._before.items():
            yield before, self.wallet(account, unit)

    def _tree(self, account: str) -> Iterator[str]:
        top = root(account)
        beneath = f"{top}/"
        return (name for name in self.state.accounts if name == top or name.startswith(beneath))

    def _entry(self, move: Move) -> Entry:
        return placed(
            move,
            batch=self.place.batch,
            position=self.place.position + len(self.moves),
            transaction="",
            recorded_at=self.place.recorded_at,
        )
