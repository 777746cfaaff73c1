"""A decision in the making: its moves so far, and the state as it is with them. What it began with stays as it is."""

from collections.abc import Iterable, Iterator

from contracts.accounts import root
from services.ledger.domain.commands import Units
from services.ledger.domain.concerned import Place
from services.ledger.domain.entries import Entry, Move
from services.ledger.domain.evolve import evolve
from services.ledger.domain.state import Account, Lot, PartitionState, Payment, Wallet


class Attempt:
    """For decisions in which a move depends on what those before it made of the lots.

    Accounts are copied when they are first asked for. A lot that it hands out follows the moves.
    """

    def __init__(self, state: PartitionState, *, units: Units, place: Place, holds: Iterable[str] = ()) -> None:
        self.units = units
        self.place = place
        self.moves: list[Move] = []
        self._before = state
        self._state = PartitionState(payments=state.payments, holds=state.holds).fork(accounts=(), holds=holds)
        self._new_lots = 0

    def do(self, *moves: Move) -> None:
        """Add moves."""
        for move in moves:
            if move.account in self._before.accounts:
                self._account(move.account)
            evolve(self._state, self._entry(move))
            self.moves.append(move)

    def new_lot(self) -> str:
        """The id of the next lot that the decision makes."""
        self._new_lots += 1
        return self.place.new_lot(self._new_lots - 1)

    def state(self, accounts: Iterable[str]) -> PartitionState:
        """Those of some accounts that are open and the holds it was begun with, with the moves. It follows them."""
        for account in accounts:
            if account in self._before.accounts:
                self._account(account)
        return self._state

    def wallet(self, account: str, unit: str) -> Wallet:
        """An open wallet, with the moves."""
        return self._account(account).wallets[unit]

    def wallet_of(self, lot: Lot) -> Wallet:
        """The wallet that a lot is in, with the moves."""
        return self.wallet(lot.account, lot.unit)

    def payment(self, payment: str, account: str) -> Payment | None:
        """A payment, with the moves, if it was read."""
        return self._state.payments.get((payment, account))

    def is_claimed(self, payment: str) -> bool:
        """Whether there are claims on a payment that was read, of whatever account."""
        return any(of == payment and bool(found.claims) for (of, _), found in self._state.payments.items())

    def referring(self, reference: str, account: str) -> list[Lot]:
        """The lots in all accounts of a tree that refer to something, with the moves."""
        found = []
        for name in self._tree(account):
            seen = self._state.accounts.get(name) or self._before.accounts[name]
            if any(lot.reference == reference for wallet in seen.wallets.values() for lot in wallet.lots.values()):
                wallets = self._account(name).wallets.values()
                found += [lot for wallet in wallets for lot in wallet.lots.values() if lot.reference == reference]
        return found

    def wallets(self) -> Iterator[tuple[Wallet, Wallet]]:
        """The wallets that may have changed: as they were, and with the moves."""
        for account in self._state.accounts.values():
            for wallet in account.wallets.values():
                yield self._before.accounts[account.id].wallets[wallet.unit], wallet

    def _tree(self, account: str) -> Iterator[str]:
        top = root(account)
        beneath = f"{top}/"
        return (name for name in self._before.accounts if name == top or name.startswith(beneath))

    def _account(self, name: str) -> Account:
        found = self._state.accounts.get(name)
        if found is None:
            alone = PartitionState(accounts={name: self._before.accounts[name]})
            found = alone.fork(accounts=(name,), holds=()).accounts[name]
            self._state.accounts[name] = found
        return found

    def _entry(self, move: Move) -> Entry:
        return Entry(
            batch=self.place.batch,
            position=self.place.position + len(self.moves),
            transaction="",
            recorded_at=self.place.recorded_at,
            kind=move.kind,
            account=move.account,
            occurred_at=move.occurred_at,
            unit=move.unit,
            lot=move.lot,
            lot_kind=move.lot_kind,
            hold=move.hold,
            posted=move.posted,
            held=move.held,
            frozen=move.frozen,
            details=move.details,
        )
