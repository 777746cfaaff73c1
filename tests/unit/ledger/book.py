"""A ledger of one partition without servers: decided and evolved as the service does it, its tables kept in dicts."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from contracts.accounts import path, root
from contracts.ids import uuid7
from contracts.money import Unit
from services.ledger import tables
from services.ledger.domain.alerts import decide_alerts
from services.ledger.domain.chain import GENESIS
from services.ledger.domain.commands import (
    LATE_GRACE,
    CatchUp,
    ChargeLine,
    ClaimPayment,
    Command,
    Grant,
    GrantedKind,
    Leg,
    OpenAccount,
    Policy,
    ResolveHold,
    ReverseCharge,
    Scope,
    Transfer,
    Units,
    VoidGrant,
    WalletTerms,
)
from services.ledger.domain.decide import decide
from services.ledger.domain.draft import Draft, Head, Recorded, Transaction
from services.ledger.domain.due import decide_due, next_due
from services.ledger.domain.entries import Charged, Details, Entry, Move, is_contra, payment_of
from services.ledger.domain.errors import AlreadyCharged, ChargeDiffers, Refusal
from services.ledger.domain.evolve import evolve
from services.ledger.domain.laws import Breach, Laws
from services.ledger.domain.overdue import decide_overdue, in_order, overdue, overdue_on
from services.ledger.domain.state import NEVER, Hold, PartitionState, PastLine, Wallet
from services.ledger.projections import Row, add_rows, changed_rows, lot_of
from services.ledger.translate import scope_text, split_text

PARTITION: Final = 7
BEGIN: Final = datetime(2026, 7, 1, 12, tzinfo=UTC)
TICK: Final = timedelta(milliseconds=1)

UNITS: Final = Units(
    by_name={
        unit.name: unit
        for unit in (
            Unit("usd", "money", 9),
            Unit("points", "money", 0),
            Unit("usd_cap", "cap", 9, mirrors="usd"),
            Unit("tokens", "cap", 0),
            Unit("calls", "cap", 0),
        )
    },
    mirrors={"usd": ("usd_cap",)},
)

LineKey = tuple[str, str, int]
Tables = dict[str, dict[tuple[object, ...], Row]]

_LOT: Final = {name: place for place, name in enumerate(tables.lots.columns.keys())}
_lines = itertools.count(1)
_holds = itertools.count(1)


def hold_id() -> str:
    """The id of a new hold."""
    return str(uuid7(milliseconds=1, entropy=next(_holds).to_bytes(10, "big")))


def leg(unit: str, at_least: int, at_most: int | None = None) -> Leg:
    """A leg of a hold; all or nothing if only one amount is given."""
    return Leg(unit, at_least, at_least if at_most is None else at_most)


def line(
    account: str,
    *amounts: tuple[str, int],
    hold: str | None = None,
    at: datetime = BEGIN,
    scope: Scope | None = Scope("openai", "gpt-4o-mini"),  # noqa: B008 - it never changes
    final: bool = True,
    required: bool = False,
) -> ChargeLine:
    """What a new use cost."""
    return ChargeLine(
        source="demo",
        event_id=f"event-{next(_lines)}",
        account=account,
        occurred_at=at,
        hold=hold,
        scope=scope,
        price_version="v1",
        amounts=amounts,
        final=final,
        required=required,
    )


@dataclass(slots=True)
class _Noted:
    """What a batch says of charge lines, to be kept when it is committed."""

    contents: dict[LineKey, tuple[object, ...]] = field(default_factory=dict)
    charged: dict[LineKey, PastLine] = field(default_factory=dict)
    given_back: list[tuple[LineKey, dict[tuple[str, str, str], int]]] = field(default_factory=list)
    # By transaction, as an audit reads them.
    lines: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)


class Book:
    """State, journal and tables of a partition. `restart` forgets the state and reads it from the tables.

    A `whole` one keeps everything in memory, as a replay does; else what has ended is forgotten, and read when it is
    named, as the service does.
    """

    def __init__(self, units: Units = UNITS, *, whole: bool = False) -> None:
        self.units = units
        self.whole = whole
        self.state = PartitionState()
        self.journal: list[Recorded] = []
        self.tables: Tables = {table.name: {} for table in tables.PROJECTIONS}
        self.lines: dict[LineKey, PastLine] = {}
        self.contents: dict[LineKey, tuple[object, ...]] = {}
        self.charged: dict[str, list[tuple[Any, ...]]] = {}
        self.head = Head(
            partition=PARTITION,
            epoch=1,
            batch=0,
            chain_hash=GENESIS,
            recorded_at=BEGIN,
            outbox_number=0,
            charges_number=0,
        )
        self.now = BEGIN
        # How long each command takes. The service's clock stands still if a test's does.
        self.tick = TICK
        self._noted = _Noted()

    # Given and when

    def open(self, account: str, *units: str, policy: Policy = "hard", overdraft: int = 0) -> None:
        """Open an account with wallets."""
        terms = tuple(WalletTerms(unit, policy, overdraft) for unit in units)
        self.do(OpenAccount(account=account, wallets=terms))

    def grant(
        self,
        account: str,
        unit: str,
        amount: int,
        *,
        kind: GrantedKind = "purchase",
        reference: str | None = None,
        **more: Any,
    ) -> str:
        """Grant a lot; its id."""
        moves = self.do(Grant(account=account, unit=unit, amount=amount, kind=kind, reference=reference, **more))
        assert moves[0].lot is not None
        return moves[0].lot

    def wait(self, duration: timedelta) -> None:
        """Let time pass."""
        self.now += duration

    def do(self, command: Command) -> list[Move]:
        """Carry out what must be accepted; the moves of its own transaction, without what was due before."""
        decided = self.ask(command)
        assert isinstance(decided, list), decided
        return decided

    def ask(self, command: Command, *, dry_run: bool = False) -> list[Move] | Refusal:
        """Carry out a command in a batch of its own, if it is accepted: first what is due, then it, then alerts."""
        self._recall(command)
        draft = self._draft()
        decided = self._attempt(draft, command, dry_run=dry_run)
        if isinstance(decided, list) and not dry_run:
            self._commit(draft)
        return decided

    def listed(
        self, commands: Sequence[Command], *, all_or_nothing: bool = True, dry_run: bool = False
    ) -> list[list[Move] | Refusal]:
        """Commands in one batch, each as if alone, or all or none: then the outcomes end with the first refusal."""
        self._recall(*commands)
        draft = self._draft()
        tried = draft.fork()
        outcomes: list[list[Move] | Refusal] = []
        for command in commands:
            outcomes.append(self._attempt(draft, command))
            if all_or_nothing and not isinstance(outcomes[-1], list):
                break
        if dry_run or (all_or_nothing and not isinstance(outcomes[-1], list)):
            draft.drop(tried)
        else:
            draft.join(tried)
            self._commit(draft)
        return outcomes

    def bundle(self, lines: Sequence[ChargeLine]) -> list[list[Move] | Refusal]:
        """Charge lines in one transaction, as a bundle, after what is due: what became of each."""
        self._recall(*lines)
        draft = self._draft()
        accounts = {account: None for each in lines for account in self.concerned(each)}
        # A bundle has been taken, whatever becomes of its lines: so what is due is done.
        self._do_due(draft, accounts, late=self._late(draft, lines, accounts))
        transaction = draft.begin()
        outcomes: list[list[Move] | Refusal] = []
        for each in lines:
            decided = self._decide(draft, each, transaction)
            if isinstance(decided, list):
                transaction.record_summed(decided)
                self._note(draft, each, decided, transaction)
            outcomes.append(decided)
        charged = sum(isinstance(outcome, list) for outcome in outcomes)
        if charged:
            self._alert(draft, transaction)
            transaction.finish(Charged(lines=charged, lines_hash="", bundle=1))
        if draft.entries:
            self._commit(draft)
        return outcomes

    def catch_up(self) -> None:
        """Do what is due on all accounts."""
        for account in sorted(self.state.accounts):
            self.do(CatchUp(account=account))

    def restart(self) -> None:
        """What another process would know: what is in the tables. Holds, payments and lines are read when named."""
        self.state = PartitionState()
        rows = {name: list(self.tables[name].values()) for name in ("accounts", "wallets", "rules", "lots")}
        if self.whole:
            rows |= {name: list(self.tables[name].values()) for name in ("holds", "hold_lots", "payments", "claims")}
        else:
            grace = self.head.recorded_at - LATE_GRACE
            rows["lots"] = [
                row
                for row in rows["lots"]
                if not row[_LOT["spent"]]
                or ((row[_LOT["rule_id"]] is not None or row[_LOT["expired"]] > 0) and _later(row, grace))
            ]
        add_rows({PARTITION: self.state}, rows)

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

    def available(self, account: str, unit: str, used: Scope | None = None) -> int:
        """What is read now as available, whatever has been journalled."""
        return self.wallet(account, unit).available(self.now, used)

    def lot(self, lot: str) -> tuple[int, int]:
        """posted and held of a lot, as stored."""
        row = dict(zip(tables.lots.columns.keys(), self.tables["lots"][PARTITION, lot], strict=True))
        return row["posted"], row["held"]

    def replayed(self) -> Tables:
        """The tables as the journal alone has them, through its stored form."""
        state = PartitionState()
        for recorded in self.journal:
            details = recorded.columns[-1]
            stored = None if details is None else msgspec.json.decode(details, type=Details)
            evolve(state, msgspec.structs.replace(recorded.entry, details=stored))
        return _keyed(changed_rows(PARTITION, state))

    def breaches(self) -> list[Breach]:
        """What an audit finds in the journal."""
        laws = Laws(PARTITION, caps={unit.name for unit in self.units.by_name.values() if unit.kind == "cap"})
        for transaction, recorded in itertools.groupby(self.journal, key=lambda each: each.entry.transaction):
            rows = [each.columns[1:] for each in recorded]
            told = laws.add(rows)
            if isinstance(told, Charged):
                laws.check_lines(rows, self.charged.get(transaction, ()), required=told.required)
        return laws.breaches

    @property
    def entries(self) -> list[Entry]:
        """The journal."""
        return [recorded.entry for recorded in self.journal]

    @property
    def upcoming(self) -> datetime:
        """When the next command will be recorded."""
        return max(self.now + self.tick, self.head.recorded_at + timedelta(microseconds=1))

    def concerned(self, command: Command) -> list[str]:
        """The accounts on whose wallets a command may act: what is due on them is done before."""
        found = dict.fromkeys(path(command.account))
        if isinstance(command, Transfer) and root(command.account) == root(command.to_account):
            found |= dict.fromkeys(path(command.to_account))
        hold = self.state.holds.get(getattr(command, "hold", None) or "")
        if hold is not None and hold.account == command.account:
            found |= dict.fromkeys(account for each in hold.legs for account in each.wallets)
            found |= dict.fromkeys(earmark.account for earmark in hold.earmarks.values())
        if isinstance(command, ReverseCharge):
            past = self.lines.get((command.source, command.event_id, command.revision))
            if past is not None and past.account == command.account:
                found |= dict.fromkeys(account for account, _, _ in past.split)
        for reference in self._references(command):
            rows = self.tables["lots"].values()
            found |= {row[_LOT["account"]]: None for row in rows if row[_LOT["reference"]] == reference}
        return [account for account in found if account in self.state.accounts and _same_tree(account, command.account)]

    # One command

    def _attempt(self, draft: Draft, command: Command, *, dry_run: bool = False) -> list[Move] | Refusal:
        accounts = self.concerned(command)
        due = next_due(draft.state, accounts)
        late = self._late(draft, [command], accounts)
        if not dry_run and not late and (due is None or due > draft.recorded_at):
            return self._decided(draft, command, accounts)
        tried = draft.fork()
        noted = self._noted
        if dry_run:
            self._noted = _Noted(dict(noted.contents))
        later = self._resolving(draft, command, late)
        if later is None:
            self._do_due(draft, accounts, late=late)
        decided = self._decided(draft, command, accounts, late=later or ())
        if isinstance(decided, list) and not dry_run:
            draft.join(tried)
        else:
            draft.drop(tried)
            self._noted = noted
        return decided

    def _resolving(self, draft: Draft, command: Command, late: Sequence[Hold]) -> Sequence[Hold] | None:
        """Before an overdue hold is resolved by command: what comes before its end, which is the command's.

        The holds that end after it; None if the command is another.
        """
        named = overdue(draft.state, command, draft.recorded_at)
        if named is None or not isinstance(command, ResolveHold):
            return None
        place = late.index(named)
        self._end(draft, late[:place])
        while True:
            transaction = draft.begin()
            moves = decide_overdue(draft.state, named, units=self.units, place=transaction.place)
            if moves[0].hold is not None:
                return late[place + 1 :]
            transaction.record(moves)
            self._alert(draft, transaction)

    def _decided(
        self, draft: Draft, command: Command, accounts: Iterable[str], *, late: Iterable[Hold] = ()
    ) -> list[Move] | Refusal:
        transaction = draft.begin()
        decided = self._decide(draft, command, transaction)
        if isinstance(decided, list):
            transaction.record(decided)
            self._note(draft, command, decided, transaction)
            if decided:
                self._alert(draft, transaction)
            if isinstance(command, ChargeLine):
                transaction.finish(Charged(lines=1, lines_hash="", required=command.required))
            # A period may have begun before now.
            self._do_due(draft, accounts, late=late)
        return decided

    def _late(self, draft: Draft, commands: Iterable[Command], accounts: Iterable[str]) -> list[Hold]:
        """The holds past their deadline that commands name, or that hold something of the wallets of accounts."""
        found = (overdue(draft.state, command, draft.recorded_at) for command in commands)
        named = [hold for hold in found if hold is not None]
        return in_order([*named, *overdue_on(draft.state, accounts, draft.recorded_at)])

    def _end(self, draft: Draft, late: Iterable[Hold]) -> None:
        for hold in late:
            while True:
                transaction = draft.begin()
                moves = decide_overdue(draft.state, hold, units=self.units, place=transaction.place)
                if not moves:
                    break
                transaction.record(moves)
                self._alert(draft, transaction)

    def _do_due(self, draft: Draft, accounts: Iterable[str], *, late: Iterable[Hold] = ()) -> None:
        """Each thing that is due, in the order of its time, in a transaction of its own; overdue holds before."""
        names = list(accounts)
        self._end(draft, late)
        for _ in range(100_000):
            transaction = draft.begin()
            moves = decide_due(draft.state, names, units=self.units, place=transaction.place)
            if not moves:
                return
            transaction.record(moves)
            self._alert(draft, transaction)
        raise AssertionError("what is due never ends")

    def _decide(self, draft: Draft, command: Command, transaction: Transaction) -> list[Move] | Refusal:
        if isinstance(command, ChargeLine):
            key = (command.source, command.event_id, command.revision)
            before = self._noted.contents.get(key) or self.contents.get(key)
            if before is not None:
                return AlreadyCharged(*key) if before == _content(command) else ChargeDiffers(*key)
            hold = draft.state.holds.get(command.hold or "")
            if command.scope is None and hold is not None:
                command = msgspec.structs.replace(command, scope=hold.scope)
        return decide(draft.state, command, units=self.units, place=transaction.place)

    def _alert(self, draft: Draft, transaction: Transaction) -> None:
        wallets = [draft.state.wallet(*key) for key in transaction.wallets()]
        found = decide_alerts([wallet for wallet in wallets if wallet is not None], place=transaction.place)
        transaction.record(found)

    def _note(self, draft: Draft, command: Command, moves: Sequence[Move], transaction: Transaction) -> None:
        if isinstance(command, ChargeLine):
            key = (command.source, command.event_id, command.revision)
            hold = draft.state.holds.get(command.hold or "")
            scope = hold.scope if command.scope is None and hold is not None else command.scope
            about = (command.account, command.occurred_at, command.hold, scope_text(scope))
            row = (PARTITION, *key, *about, command.price_version, command.own_key, "[]", split_text(moves))
            self._noted.lines.append((transaction.id, row))
            taken = PastLine(
                source=command.source,
                event_id=command.event_id,
                revision=command.revision,
                account=command.account,
                occurred_at=command.occurred_at,
                hold=command.hold,
                amounts=command.amounts,
                split=_moved(moves, "charged", sign=-1),
            )
            self._noted.contents[key] = _content(command)
            self._noted.charged[key] = taken
            draft.state.setting(draft.state.lines, key)
            draft.state.lines[key] = replace(taken, reversed={})
        if isinstance(command, ReverseCharge):
            key = (command.source, command.event_id, command.revision)
            back = _moved(moves, "reversed", sign=1)
            self._noted.given_back.append((key, back))
            there = draft.state.lines[key].reversed
            for part in back:
                draft.state.setting(there, part)
            _add(there, back)

    # Memory

    def _recall(self, *commands: Command) -> None:
        """Read from the tables what commands name and is not in memory; and what is overdue, or will be by then."""
        if not self.whole and self.state.deadlines.unread_from <= self.upcoming:
            self._recall_open()
        for command in commands:
            if isinstance(command, ReverseCharge):
                self._recall_line((command.source, command.event_id, command.revision), command)
            if self.whole:
                continue
            for reference in self._references(command):
                self._recall_payment(reference, command)
            if isinstance(command, VoidGrant):
                self._recall_lots(row for key, row in self.tables["lots"].items() if key[1] == command.lot)
            hold = getattr(command, "hold", None)
            known = self.state.holds.get(hold or "")
            if (known is None or known.status != "placed") and (PARTITION, hold) in self.tables["holds"]:
                assert hold is not None
                self._recall_hold(hold, command)
            if isinstance(command, ChargeLine):
                self._recall_past(command)

    def _recall_open(self) -> None:
        """All that end until some time after now."""
        until = self.upcoming + timedelta(minutes=20)
        open_holds = [row for row in self.tables["holds"].values() if row[3] == "placed"]
        rows = [row for row in open_holds if row[4] <= until and row[1] not in self.state.holds]
        earmarks = [row for key, row in self.tables["hold_lots"].items() if key[1] in {row[1] for row in rows}]
        add_rows({PARTITION: self.state}, {"holds": rows, "hold_lots": earmarks})
        self.state.deadlines.unread_from = min((row[4] for row in open_holds if row[4] > until), default=NEVER)

    def _recall_hold(self, hold: str, command: Command) -> None:
        earmarks = [row for key, row in self.tables["hold_lots"].items() if key[:2] == (PARTITION, hold)]
        add_rows({PARTITION: self.state}, {"holds": [self.tables["holds"][PARTITION, hold]], "hold_lots": earmarks})
        known = self.state.holds[hold]
        if known.account == command.account and known.status != "placed":
            self._recall_lots(self.tables["lots"][PARTITION, lot] for _, _, lot in known.earmarks)
            self._recall_repaying([lot for _, _, lot in known.earmarks])

    def _references(self, command: Command) -> list[str]:
        """The payments that a command is about."""
        match command:
            case Grant():
                found = payment_of(command.kind, command.reference)
                return [] if found is None else [found]
            case ClaimPayment():
                return [command.payment]
            case ReverseCharge():
                past = self.lines.get((command.source, command.event_id, command.revision))
                if past is None or past.account != command.account:
                    return []
                named = {lot for _, _, lot in past.split}
                lots = [lot_of(self.tables["lots"][PARTITION, lot]) for lot in named | self._repaying(named)]
                return sorted({of for lot in lots if (of := payment_of(lot.kind, lot.reference)) is not None})
            case ChargeLine():
                named = self._estimated(command)
                lots = [lot_of(self.tables["lots"][PARTITION, lot]) for lot in named | self._repaying(named)]
                return sorted({of for lot in lots if (of := payment_of(lot.kind, lot.reference)) is not None})
            case _:
                return []

    def _estimated(self, line: ChargeLine) -> set[str]:
        """The lots of which a line's hold charged an estimate, or may have to before it."""
        row = self.tables["holds"].get((PARTITION, line.hold or ""))
        hold = {} if row is None else dict(zip(tables.holds.columns.keys(), row, strict=True))
        if not hold or (hold["account"], hold["overdue"]) != (line.account, "charge_estimate"):
            return set()
        return {str(row[4]) for key, row in self.tables["hold_lots"].items() if key[1] == line.hold}

    def _recall_payment(self, payment: str, command: Command) -> None:
        claiming = not isinstance(command, Grant)
        payments = [row for row in self.tables["payments"].values() if row[1] == payment]
        rows = {
            "payments": [row for row in payments if _same_tree(row[2], command.account) or (claiming and row[4] > 0)],
            "claims": [
                row
                for row in self.tables["claims"].values()
                if row[1] == payment and _same_tree(row[2], command.account)
            ],
        }
        add_rows({PARTITION: self.state}, rows)
        if claiming or any(row[5] or row[9] for row in rows["payments"]):
            referring = [
                row
                for row in self.tables["lots"].values()
                if row[_LOT["reference"]] == payment and _same_tree(row[_LOT["account"]], command.account)
            ]
            self._recall_lots(referring)
            self._recall_repaying([str(row[_LOT["lot_id"]]) for row in referring])

    def _recall_line(self, key: LineKey, command: Command) -> None:
        past = self.lines.get(key)
        if past is None:
            return
        self.state.lines[key] = replace(past, reversed=dict(past.reversed))
        if past.account == command.account and not self.whole:
            named = [lot for _, _, lot in past.split]
            self._recall_lots(self.tables["lots"][PARTITION, lot] for lot in named)
            self._recall_repaying(named)

    def _recall_past(self, command: ChargeLine) -> None:
        """The lots that were there when it occurred, or when its hold was placed, if that is long ago."""
        hold = self.state.holds.get(command.hold or "")
        at = command.occurred_at if hold is None or hold.expires_at is None else hold.recorded_at
        if at > self.head.recorded_at - LATE_GRACE:
            return
        accounts = self.concerned(command)
        self._recall_lots(
            row
            for row in self.tables["lots"].values()
            if row[_LOT["account"]] in accounts
            and row[_LOT["spent"]]
            and (row[_LOT["rule_id"]] is not None or row[_LOT["expired"]] > 0)
            and _later(row, at)
            and (row[_LOT["effective_at"]] is None or row[_LOT["effective_at"]] <= at)
        )

    def _recall_repaying(self, named: Iterable[str]) -> None:
        self._recall_lots(self.tables["lots"][PARTITION, lot] for lot in self._repaying(named))

    def _repaying(self, named: Iterable[str]) -> set[str]:
        debts = (lot_of(self.tables["lots"][PARTITION, lot]) for lot in named)
        return {lot for debt in debts for lot in debt.repaid}

    def _recall_lots(self, rows: Iterable[Row]) -> None:
        known = {lot.id for lot in self.state.lots()}
        add_rows({PARTITION: self.state}, {"lots": [row for row in rows if str(row[_LOT["lot_id"]]) not in known]})

    def _draft(self) -> Draft:
        self.now += self.tick
        self._noted = _Noted()
        return Draft(self.head, self.state, now=self.now)

    def _commit(self, draft: Draft) -> None:
        self.head, recorded = draft.finish()
        self.journal.extend(recorded)
        for name, rows in _keyed(changed_rows(PARTITION, self.state)).items():
            self.tables[name].update(rows)
        if self.whole:
            self.state.changes = type(self.state.changes)()
            self.state.lines.clear()
        else:
            self.state.written(self.head.recorded_at)
        self.contents |= self._noted.contents
        self.lines |= self._noted.charged
        for transaction, told in self._noted.lines:
            self.charged.setdefault(transaction, []).append(told)
        for key, back in self._noted.given_back:
            _add(self.lines[key].reversed, back)


def _content(command: ChargeLine) -> tuple[object, ...]:
    return (
        command.account,
        command.occurred_at,
        command.hold,
        command.scope,
        command.price_version,
        command.own_key,
        command.amounts,
    )


def _moved(moves: Iterable[Move], kind: str, *, sign: int) -> dict[tuple[str, str, str], int]:
    """What moves of a kind added to lots, or took of them, by (account, unit, lot)."""
    found: dict[tuple[str, str, str], int] = {}
    for move in moves:
        if move.kind == kind and move.lot is not None and move.unit is not None and not is_contra(move.account):
            _add(found, {(move.account, move.unit, move.lot): sign * move.posted})
    return found


def _add(sums: dict[tuple[str, str, str], int], more: dict[tuple[str, str, str], int]) -> None:
    for key, amount in more.items():
        sums[key] = sums.get(key, 0) + amount


def _later(row: Row, at: datetime) -> bool:
    ends = row[_LOT["expires_at"]]
    return ends is not None and ends > at


def _same_tree(one: str, other: str) -> bool:
    return root(one) == root(other)


def _keyed(rows: dict[str, list[Row]]) -> Tables:
    return {
        table.name: {row[: len(table.primary_key.columns)]: row for row in rows[table.name]}
        for table in tables.PROJECTIONS
    }
