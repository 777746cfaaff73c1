"""A ledger of one partition without tables: a process that forgets everything after each command, beside an archive.

What `_read` brings back for a command is what a process must have read to decide it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from datetime import timedelta

from contracts.accounts import path, root
from services.ledger.domain.chain import GENESIS
from services.ledger.domain.commands import (
    ChargeLine,
    ClaimPayment,
    Command,
    Grant,
    GrantedKind,
    LotScope,
    OpenAccount,
    Policy,
    ResolveHold,
    ReverseCharge,
    Transfer,
    Units,
    WalletTerms,
)
from services.ledger.domain.decide import decide
from services.ledger.domain.draft import Draft, Head, Transaction
from services.ledger.domain.due import decide_due
from services.ledger.domain.entries import PSEUDO_KINDS, Charged, Entry, Move, is_contra, payment_of
from services.ledger.domain.errors import Refusal
from services.ledger.domain.evolve import evolve
from services.ledger.domain.overdue import decide_overdue, in_order, overdue, overdue_on
from services.ledger.domain.state import CHANGED, Changes, Lot, PartitionState, PastLine, Wallet
from tests.unit.ledger.book import BEGIN, PARTITION, UNITS


class Archive:
    """`all` is everything the journal says; each command is decided on what is read of it, and no more."""

    def __init__(self, units: Units = UNITS) -> None:
        self.units = units
        self.all = PartitionState()
        self.entries: list[Entry] = []
        self.now = BEGIN
        self._lines: dict[tuple[str, str, int], PastLine] = {}
        self._head = Head(
            partition=PARTITION,
            epoch=1,
            batch=0,
            chain_hash=GENESIS,
            recorded_at=BEGIN,
            outbox_number=0,
            charges_number=0,
        )

    # Given and when

    def open(self, account: str, *units: str, policy: Policy = "hard", overdraft: int = 0) -> None:
        """Open an account with wallets of one policy."""
        terms = tuple(WalletTerms(unit=unit, policy=policy, overdraft=overdraft) for unit in units)
        self.do(OpenAccount(account=account, wallets=terms))

    def grant(
        self,
        account: str,
        unit: str,
        amount: int,
        *,
        kind: GrantedKind = "purchase",
        reference: str | None = None,
        days: float | None = None,
        scope: LotScope | None = None,
        priority: int = 100,
    ) -> str:
        """Grant a lot that ends in so many days; its id."""
        moves = self.do(
            Grant(
                account=account,
                unit=unit,
                amount=amount,
                kind=kind,
                reference=reference,
                expires_at=None if days is None else self.now + timedelta(days=days),
                scope=scope,
                priority=priority,
            )
        )
        assert moves[0].lot is not None
        return moves[0].lot

    def wait(self, **span: float) -> None:
        """Let time pass."""
        self.now += timedelta(**span)

    def do(self, command: Command) -> list[Move]:
        """Carry out what must be accepted; the moves of the command itself."""
        decided = self.ask(command)
        assert isinstance(decided, list), decided
        return decided

    def ask(self, command: Command) -> list[Move] | Refusal:
        """Read, do what is due, decide, and keep it if it is accepted."""
        self.now += timedelta(milliseconds=1)
        draft = Draft(self._head, self._read(command), now=self.now)
        transaction = self._begin(draft, command)
        before = _facts(deepcopy(draft.state))
        decided = decide(draft.state, command, units=self.units, place=transaction.place)
        assert _facts(draft.state) == before, "a decision changes nothing"
        if isinstance(decided, list):
            transaction.record(decided)
            self._commit(draft)
            self._note(command, decided)
        return decided

    def bundle(self, lines: Sequence[ChargeLine]) -> None:
        """Charge lines in one transaction, summed, as a bundle."""
        self.now += timedelta(milliseconds=1)
        draft = Draft(self._head, self._read(*lines), now=self.now)
        transaction = self._begin(draft, *lines)
        for each in lines:
            decided = decide(draft.state, each, units=self.units, place=transaction.place)
            assert isinstance(decided, list), decided
            transaction.record_summed(decided)
            self._note(each, decided)
        transaction.finish(Charged(lines=len(lines), lines_hash=""))
        self._commit(draft)

    def _begin(self, draft: Draft, *commands: Command) -> Transaction:
        """What is due before commands, then their transaction. Before a hold is resolved, what was due by its end."""
        named = [hold for each in commands if (hold := overdue(draft.state, each, draft.recorded_at))]
        is_resolved = bool(named) and isinstance(commands[0], ResolveHold)
        paths = sorted({name for each in commands for name in path(each.account)})
        also = [] if is_resolved else overdue_on(draft.state, paths, draft.recorded_at)
        late = in_order([*named, *also])
        transaction = draft.begin()
        for hold in late:
            while moves := decide_overdue(draft.state, hold, units=self.units, place=transaction.place):
                if is_resolved and moves[0].hold is not None:
                    return transaction
                transaction.record(moves)
                transaction = draft.begin()
        accounts = draft.state.accounts
        while moves := decide_due(draft.state, accounts, units=self.units, place=transaction.place):
            transaction.record(moves)
            transaction = draft.begin()
        return transaction

    # Then

    def wallet(self, account: str, unit: str) -> Wallet:
        """An open wallet."""
        found = self.all.wallet(account, unit)
        assert found is not None
        return found

    def amounts(self, account: str, unit: str) -> tuple[int, int]:
        """posted and held of a wallet."""
        wallet = self.wallet(account, unit)
        return wallet.posted, wallet.held

    def available(self, account: str, unit: str) -> int:
        """What may be used of a wallet in one way or another."""
        return self.wallet(account, unit).available_anywhere(self.now)

    def debt(self, account: str, unit: str = "usd") -> int:
        """What a wallet owes."""
        return self.wallet(account, unit).owed

    def lot(self, lot: str) -> Lot:
        """A lot, spent or not."""
        return next(each for each in self.all.lots() if each.id == lot)

    def lots(self) -> dict[str, tuple[int, int, int]]:
        """posted, held and frozen of all lots of which there is something."""
        return {lot.id: (lot.posted, lot.held, lot.frozen) for lot in self.all.lots() if lot.posted or lot.held}

    def check(self) -> None:
        """What is always so: sums over the lots, and no lot below zero, or owed and above it."""
        for account in self.all.accounts.values():
            for wallet in account.wallets.values():
                counted = [lot for lot in wallet.lots.values() if lot.kind not in {"overage", "uncapped"}]
                assert wallet.posted == sum(lot.posted for lot in counted)
                assert wallet.held == sum(lot.held for lot in counted)
                assert wallet.frozen == sum(lot.frozen for lot in counted)
                for lot in wallet.lots.values():
                    if lot.kind in PSEUDO_KINDS:
                        assert lot.posted <= 0, lot
                    else:
                        assert min(lot.available, lot.held, lot.frozen, lot.expired, lot.voided) >= 0, lot
                        assert min(lot.clawed, lot.clawed_spent, lot.pending, lot.pending_frozen) >= 0, lot
                        assert lot.pending + lot.pending_frozen <= lot.held, lot

    def _commit(self, draft: Draft) -> None:
        self._head, recorded = draft.finish()
        sums: Counter[tuple[str, ...]] = Counter()
        for each in recorded:
            entry = each.entry
            self.entries.append(entry)
            evolve(self.all, entry)
            if entry.unit is not None:
                of: tuple[str, ...] = (entry.transaction, entry.unit)
                if self.units.by_name[entry.unit].kind == "cap":
                    of = (*of, entry.account.partition("/")[2] if is_contra(entry.account) else entry.account)
                sums[of] += entry.posted
        assert not any(sums.values()), sums
        for lot in draft.state.lots():
            assert lot == self.lot(lot.id)

    def _note(self, command: Command, moves: Iterable[Move]) -> None:
        """What the service keeps of charge lines."""
        if isinstance(command, ChargeLine):
            split: Counter[tuple[str, str, str]] = Counter()
            for move in moves:
                if move.kind == "charged" and move.lot and move.unit:
                    split[move.account, move.unit, move.lot] -= move.posted
            self._lines[command.source, command.event_id, command.revision] = PastLine(
                source=command.source,
                event_id=command.event_id,
                revision=command.revision,
                account=command.account,
                occurred_at=command.occurred_at,
                hold=command.hold,
                amounts=command.amounts,
                split=dict(split),
            )
        if isinstance(command, ReverseCharge):
            given_back = self._lines[command.source, command.event_id, command.revision].reversed
            for move in moves:
                if move.kind == "reversed" and move.lot and move.unit:
                    key = (move.account, move.unit, move.lot)
                    given_back[key] = given_back.get(key, 0) + move.posted

    def _read(self, *commands: Command) -> PartitionState:
        """The accounts on the paths and those concerned besides, whole but for spent lots; and the lots of `_lots`."""
        names: set[str] = set()
        wanted: set[str] = set()
        payments: set[str] = set()
        lines: dict[tuple[str, str, int], PastLine] = {}
        holds: set[str] = set()
        for command in commands:
            names.update(path(command.account))
            if isinstance(command, Transfer):
                names.add(command.to_account)
            if isinstance(command, ClaimPayment):
                payments.add(command.payment)
            if isinstance(command, Grant) and (payment := payment_of(command.kind, command.reference)) is not None:
                payments.add(payment)
            if isinstance(command, ReverseCharge):
                key = (command.source, command.event_id, command.revision)
                if key in self._lines:
                    lines[key] = self._lines[key]
                    wanted |= {lot for _, _, lot in self._lines[key].split}
            hold = self.all.holds.get(getattr(command, "hold", None) or "")
            if hold is not None:
                holds.add(hold.id)
                names |= {earmark.account for earmark in hold.earmarks.values()}
                if hold.overdue == "charge_estimate":
                    wanted |= {earmark.lot for earmark in hold.earmarks.values()}
        late = overdue_on(self.all, sorted(names), self.now)
        holds |= {hold.id for hold in late}
        names |= {name for hold in late for name in path(hold.account)}
        lots, known = self._lots({root(command.account) for command in commands}, wanted, payments)
        names |= {lot.account for lot in lots.values()}
        state = deepcopy(
            PartitionState(
                accounts={name: self.all.accounts[name] for name in names if name in self.all.accounts},
                holds={name: self.all.holds[name] for name in holds},
                payments={key: payment for key, payment in self.all.payments.items() if key[0] in known},
                lines=lines,
                deadlines=self.all.deadlines,
            )
        )
        for account in state.accounts.values():
            for wallet in account.wallets.values():
                for lot in list(wallet.lots.values()):
                    if lot.is_spent and not lot.is_remembered and lot.id not in lots:
                        wallet.forget(lot)
        return state

    def _lots(self, trees: set[str], wanted: set[str], payments: set[str]) -> tuple[dict[str, Lot], set[str]]:
        """The lots named, those that repaid debts among them, and all that refer to a payment that one refers to.

        Until there are no more. Spent or not, in all accounts of the tree.
        """
        there = {lot.id: lot for lot in self.all.lots() if root(lot.account) in trees}
        found: dict[str, Lot] = {}
        names = set(wanted)
        while True:
            names |= {lot.id for lot in there.values() if lot.reference in payments}
            new = [there[name] for name in names if name not in found]
            if not new:
                return found, payments
            for lot in new:
                found[lot.id] = lot
                names |= lot.repaid.keys()
                if lot.reference is not None and (of := payment_of("purchase", lot.reference)) is not None:
                    payments = payments | {of}


def _facts(state: PartitionState) -> tuple[object, ...]:
    """All that a state says, but for what was looked up."""
    wallets = [wallet for account in state.accounts.values() for wallet in account.wallets.values()]
    said = [name for name in Wallet.__slots__ if not name.startswith("_")]
    sums = [[getattr(wallet, name) for name in said] for wallet in wallets]
    names = [list(state.accounts), *(list(account.wallets) for account in state.accounts.values())]
    return names, sums, state.holds, state.payments, state.lines, _keys(state.changes)


def _keys(changes: Changes) -> list[list[object]]:
    """The keys of what has changed."""
    return [list(getattr(changes, name)) for name in CHANGED]
