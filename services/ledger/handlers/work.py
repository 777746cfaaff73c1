"""Decide what a batch asks of one partition, and note the rows that follow from it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, Final, Literal, NamedTuple, assert_never

import msgspec
from prometheus_client import Counter

from contracts.accounts import path, root
from services.kit.dead_letters import Letter
from services.kit.outbox import OutboxRow
from services.kit.telemetry import REGISTRY
from services.ledger.domain.alerts import decide_alerts
from services.ledger.domain.chain import lines_hash
from services.ledger.domain.charging import decide_charge
from services.ledger.domain.commands import (
    CatchUp,
    ChargeLine,
    ClaimPayment,
    Command,
    ExtendHold,
    Grant,
    PlaceHold,
    ReleaseHold,
    ResolveHold,
    ReverseCharge,
    Scope,
    Transfer,
    Units,
    VoidGrant,
)
from services.ledger.domain.decide import decide
from services.ledger.domain.draft import Draft, Fork, Transaction
from services.ledger.domain.due import decide_due, next_due
from services.ledger.domain.entries import Charged, HoldExtended, HoldPlaced, Move
from services.ledger.domain.errors import AlreadyCharged, ChargeDiffers, Refusal
from services.ledger.domain.overdue import decide_overdue, in_order, overdue, overdue_on
from services.ledger.domain.state import Account, Claim, Hold, PartitionState, PastLine, Wallet
from services.ledger.handlers.items import (
    BundleItem,
    CommandItem,
    Conflicting,
    ListItem,
    OutOfOrder,
    SweepItem,
    Swept,
    Taken,
    TracedCharge,
)
from services.ledger.handlers.needs import accounts_of
from services.ledger.projections import Row, changed_rows, reversed_text, taken_of
from services.ledger.store import Loaded, Written
from services.ledger.translate import (
    WHEN_RECORDED,
    BadLine,
    ChargedSum,
    Fact,
    Problem,
    accepted,
    amounts_text,
    facts_of,
    full_id,
    outbox_row,
    problem_rows,
    refusal_text,
    refused,
    reversed_fact,
    scope_text,
    split_text,
    transferred_fact,
    usage_charged_facts,
)

LINES: Final = Counter(
    "scrip_ledger_charge_lines",
    "Lines of bundles by outcome: charged, reversed, repeated, dead.",
    ("outcome",),
    registry=REGISTRY,
)
COMMANDS: Final = Counter("scrip_ledger_commands", "Commands by outcome.", ("command", "outcome"), registry=REGISTRY)

# What adds nothing that could be due, and what says for which use it is.
_OF_USE: Final = (PlaceHold, ExtendHold, ReleaseHold, ResolveHold, ChargeLine)
_WITH_SCOPE: Final = (PlaceHold, ExtendHold, ChargeLine)
_HELD: Final = (HoldPlaced, HoldExtended)


class _Done(NamedTuple):
    """What came of an accepted command: its outcome, and what made it so."""

    outcome: dict[str, Any]
    transaction: str
    recorded_at: datetime
    batch: int


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where a partition's work stood when it began to try something out."""

    fork: Fork
    lines: int
    reversals: int
    outbox: int


class Work:
    """What is being decided for one partition in one batch, and the rows that follow from it."""

    def __init__(
        self,
        draft: Draft,
        units: Units,
        loaded: Loaded,
        *,
        reversing: frozenset[tuple[Any, ...]],
        paid_accounts: set[str],
    ) -> None:
        """`reversing`: the keys of lines that the batch names to give them back. `paid_accounts`: claims reach them."""
        self._draft = draft
        self._units = units
        self._loaded = loaded
        self._reversing = reversing
        self._paid_accounts = paid_accounts
        self._partition = draft.head.partition
        self._accepted: dict[tuple[str, str], tuple[bytes, dict[str, Any]]] = {}
        self._charged: dict[tuple[str, str, int], Row] = {}
        # Of the line that was charged last.
        self._position = 0
        self._bundle_hashes: dict[int, bytes] = {}
        self._commands: list[Row] = []
        self._bundles: list[Row] = []
        self._lines: list[Row] = []
        self._reversals: list[Row] = []
        self._letters: list[Letter] = []
        self._outbox: list[OutboxRow] = []

    @property
    def is_something(self) -> bool:
        """Whether there is anything to write: a batch of refusals and repeats changes nothing."""
        return bool(self._commands or self._bundles or self._draft.entries)

    def written(self) -> Written:
        """Everything to write."""
        after, entries = self._draft.finish()
        return Written(
            before=self._draft.head,
            after=after,
            entries=entries,
            commands=self._commands,
            bundles=self._bundles,
            lines=self._lines,
            projections=changed_rows(self._partition, self._draft.state),
            outbox=self._outbox,
            letters=self._letters,
            reversals=self._reversals,
        )

    # Commands

    def take_command(self, item: CommandItem, *, is_looked_up: bool) -> bytes | None:
        """Decide a command, or repeat the outcome its key has: the reply as JSON.

        None: it would be refused, unless it was accepted before. Of what is accepted that shows when it is written.
        """
        reply = self._reply(item, is_looked_up=is_looked_up)
        return None if reply["status"] == "refused" and not is_looked_up else _encode(reply)

    def take_list(self, item: ListItem) -> bytes:
        """Decide commands one after the other, each as if it came alone; or all of them, or none: the reply as JSON."""
        if item.key is not None:
            return _encode(self._reply_to_all(item, item.key))
        if not item.dry_run:
            return _encode({"status": "listed", "replies": [self._reply(each) for each in item.commands]})
        mark = self._fork()
        replies = [self._reply(each, is_tried_out=True) for each in item.commands]
        self._drop(mark)
        return _encode({"status": "listed", "replies": replies, "dry_run": True})

    def sweep(self, item: SweepItem) -> Swept:
        """Do what is due. What turns out to be done, or not due, leaves no trace."""
        before = self._draft.entries
        match item.command:
            case CatchUp(account=account):
                self._catch_up((account,), self._overdue((account,), ()))
            case ResolveHold():
                # Of all that are overdue the sweeper asks in order: what was due after this one waits for the next.
                self._catch_up((), self._overdue((), (item.command,)))
            case _:
                assert_never(item.command)
        return Swept(self._draft.entries - before)

    def _reply(self, item: CommandItem, *, is_tried_out: bool = False, is_looked_up: bool = True) -> dict[str, Any]:
        name = type(item.command).__name__
        dry_run = item.dry_run or is_tried_out
        if (known := self._outcome_of(item.principal, item.key)) is not None:
            return self._known(name, item.body_hash, known, dry_run=dry_run)
        # What is tried out as part of a list is known to what comes after it.
        done = self._try(item.command, dry_run=item.dry_run and not is_tried_out)
        if not isinstance(done, _Done):
            if is_looked_up:
                _count(name, done.code)
            return refused(done, partition=self._partition, units=self._units)
        if dry_run:
            _count(name, "dry_run")
            return {**done.outcome, "dry_run": True}
        self._note_accepted(item.command)
        self._record_outcome(item.principal, item.key, item.body_hash, done, done.outcome)
        return done.outcome

    def _reply_to_all(self, item: ListItem, key: str) -> dict[str, Any]:
        if (known := self._outcome_of(item.principal, key)) is not None:
            return self._known("list", item.body_hash, known, dry_run=item.dry_run)
        mark = self._fork()
        done: list[_Done] = []
        for place, each in enumerate(item.commands):
            accounts = self._concerned(each.command)
            self._catch_up(accounts, self._overdue(accounts, (each.command,)))
            decided = self._do(each.command, accounts)
            if not isinstance(decided, _Done):
                self._drop(mark)
                _count("list", decided.code)
                return {**refused(decided, partition=self._partition, units=self._units), "index": place}
            done.append(decided)
        outcome: dict[str, Any] = {"status": "listed", "replies": [each.outcome for each in done], "replayed": False}
        if item.dry_run:
            self._drop(mark)
            _count("list", "dry_run")
            replies = [{**each.outcome, "dry_run": True} for each in done]
            return {**outcome, "replies": replies, "dry_run": True}
        self._join(mark)
        for each in item.commands:
            self._note_accepted(each.command)
        self._record_outcome(item.principal, key, item.body_hash, done[-1], outcome)
        return outcome

    def _known(
        self, name: str, body_hash: bytes, known: tuple[bytes, dict[str, Any]], *, dry_run: bool
    ) -> dict[str, Any]:
        """What is answered under a key that has an outcome."""
        if known[0] != body_hash:
            _count(name, "conflict")
            return {"status": "failed", "code": "conflict", "message": _CONFLICT}
        _count(name, "replayed")
        outcome = {**known[1], "replayed": True}
        return {**outcome, "dry_run": True} if dry_run else outcome

    def _outcome_of(self, principal: str, key: str) -> tuple[bytes, dict[str, Any]] | None:
        if (recent := self._accepted.get((principal, key))) is not None:
            return recent
        stored = self._loaded.commands.get((self._partition, principal, key))
        return None if stored is None else (stored[0], msgspec.json.decode(stored[1]))

    def _note_accepted(self, command: Command) -> None:
        _count(type(command).__name__, "accepted")
        if isinstance(command, ChargeLine):
            LINES.labels(outcome="charged").inc()

    def _record_outcome(self, principal: str, key: str, body_hash: bytes, done: _Done, outcome: dict[str, Any]) -> None:
        self._accepted[principal, key] = (body_hash, outcome)
        self._commands.append(
            (
                self._partition,
                principal,
                key,
                body_hash,
                done.transaction,
                done.batch,
                done.recorded_at,
                _encode(outcome).decode(),
            )
        )

    # Trying out

    def _try(self, command: Command, *, dry_run: bool) -> _Done | Refusal:
        """Carry out a command after what is due. A refusal leaves no trace, nor does a dry run."""
        accounts = self._concerned(command)
        overdue_holds = self._overdue(accounts, (command,))
        if not dry_run and not overdue_holds and not self._is_due(accounts):
            # A refusal has changed nothing: only what is due before it would have.
            return self._do(command, accounts)
        mark = self._fork()
        self._catch_up(accounts, overdue_holds)
        done = self._do(command, accounts)
        if isinstance(done, _Done) and not dry_run:
            self._join(mark)
        else:
            self._drop(mark)
        return done

    def _concerned(self, command: Command) -> Sequence[str]:
        """The accounts on whose wallets a command may act."""
        accounts = accounts_of(command)
        match command:
            case Grant() | ClaimPayment() | ReverseCharge() | VoidGrant():
                return self._with_paid(command.account, accounts)
            case ChargeLine() if self._is_of_estimate(command):
                return self._with_paid(command.account, accounts)
            case _:
                return accounts

    def _with_paid(self, account: str, accounts: Sequence[str]) -> Sequence[str]:
        """And those of its tree that claims reach."""
        of_tree = root(account)
        found = sorted(name for name in self._paid_accounts if root(name) == of_tree)
        return tuple(dict.fromkeys((*accounts, *found)))

    def _is_of_estimate(self, line: ChargeLine) -> bool:
        """Whether a line names a hold whose estimate was charged, or is before it: it will be taken back."""
        hold = None if line.hold is None else self._draft.state.holds.get(line.hold)
        if hold is None or hold.account != line.account or hold.overdue != "charge_estimate":
            return False
        return hold.status == "estimated" or hold.is_overdue(self._draft.recorded_at)

    def _fork(self) -> _Mark:
        return _Mark(self._draft.fork(), len(self._lines), len(self._reversals), len(self._outbox))

    def _join(self, mark: _Mark) -> None:
        self._draft.join(mark.fork)

    def _drop(self, mark: _Mark) -> None:
        self._draft.drop(mark.fork)
        for row in self._lines[mark.lines :]:
            del self._charged[row[1], row[2], row[3]]
        del self._lines[mark.lines :]
        del self._reversals[mark.reversals :]
        del self._outbox[mark.outbox :]

    def _is_due(self, accounts: Sequence[str]) -> bool:
        due = next_due(self._draft.state, accounts)
        return due is not None and due <= self._draft.recorded_at

    def _overdue(self, accounts: Iterable[str], commands: Iterable[Command]) -> Sequence[Hold]:
        """The holds that have to end before commands: those they name, and those on wallets of accounts."""
        state, at = self._draft.state, self._draft.recorded_at
        named = [hold for each in commands if (hold := overdue(state, each, at)) is not None]
        found = overdue_on(state, accounts, at)
        if not found:
            return named if len(named) < 2 else in_order(named)
        return in_order((*named, *found))

    def _catch_up(self, accounts: Sequence[str], overdue_holds: Sequence[Hold] = ()) -> list[Move]:
        """Record what is due, each in a transaction of its own, effective at its own time."""
        done: list[Move] = []
        for hold in overdue_holds:
            transaction = self._draft.begin()
            while moves := decide_overdue(self._draft.state, hold, units=self._units, place=transaction.place):
                done += self._record_due(moves, transaction, hold.account)
                transaction = self._draft.begin()
        for account in accounts:
            # Of one account after the other: what is due on one is nothing to the others.
            while self._is_due((account,)):
                transaction = self._draft.begin()
                moves = decide_due(self._draft.state, (account,), units=self._units, place=transaction.place)
                done += self._record_due(moves, transaction, account)
        return done

    def _record_due(self, moves: list[Move], transaction: Transaction, account: str) -> list[Move]:
        transaction.record(moves)
        self._tell(self._facts(moves, transaction, account))
        return moves

    # Deciding

    def _do(self, command: Command, accounts: Sequence[str]) -> _Done | Refusal:
        """Decide a command, on whose accounts nothing is due any more, and let the state follow."""
        transaction = self._draft.begin()
        if isinstance(command, ChargeLine):
            rows: list[Row] = []
            moves = self._charge_line(command, transaction, rows, None, 1)
            if not isinstance(moves, list):
                return moves
            self._tell(self._facts(moves, transaction, command.account))
            charged = dict[str, ChargedSum]()
            _add_to(charged, command)
            self._finish_charge(transaction, rows, charged, None, required=command.required)
        else:
            moves = decide(self._draft.state, command, units=self._units, place=transaction.place)
            if not isinstance(moves, list):
                return moves
            if moves:
                transaction.record(moves)
                facts = self._facts(moves, transaction, command.account)
                self._tell([*facts, *self._facts_of_command(command, moves, transaction)])
            if isinstance(command, ReverseCharge) and moves:
                self._note_reversal(command, moves, transaction)
        return self._done(command, moves, transaction, accounts)

    def _done(self, command: Command, moves: list[Move], transaction: Transaction, accounts: Sequence[str]) -> _Done:
        transaction_id, recorded_at, batch = transaction.id, self._draft.recorded_at, self._draft.batch
        if not moves:
            since = _since(self._draft.state, command)
            transaction_id, recorded_at, batch = since.transaction, since.recorded_at, since.batch
        if not isinstance(command, _OF_USE) and self._is_due(accounts):
            # A period may have begun, or what was granted have ended, before now.
            moves = [*moves, *self._catch_up(accounts)]
        outcome = accepted(
            partition=self._partition,
            transaction=transaction_id,
            recorded_at=recorded_at,
            moves=moves,
            remaining=self._remaining(command, moves),
            units=self._units,
        )
        return _Done(outcome, transaction_id, recorded_at, batch)

    def _remaining(self, command: Command, moves: Sequence[Move]) -> list[tuple[Wallet, int]]:
        """What the wallets concerned have available now; of a hold, also those on which nothing was set aside."""
        state, at = self._draft.state, self._draft.recorded_at
        keys: dict[tuple[str, str], None] = {}
        for move in moves:
            if isinstance(move.details, _HELD):
                for leg in move.details.legs:
                    for account in leg.wallets:
                        keys[account, leg.unit] = None
            if move.unit is not None and move.account[0] != "@":
                keys[move.account, move.unit] = None
        wallets = [wallet for key in keys if (wallet := state.wallet(*key)) is not None]
        if isinstance(command, _WITH_SCOPE):
            used = self._used(command)
            return [(wallet, wallet.available(at, used)) for wallet in wallets]
        return [(wallet, wallet.available_anywhere(at)) for wallet in wallets]

    def _used(self, command: PlaceHold | ExtendHold | ChargeLine) -> Scope | None:
        """What is used; if it does not say, what its hold is for."""
        scope = None if isinstance(command, ExtendHold) else command.scope
        hold = None if command.hold is None or scope is not None else self._draft.state.holds.get(command.hold)
        return scope if hold is None else hold.scope

    def _facts(self, moves: Sequence[Move], transaction: Transaction, account: str) -> list[Fact]:
        """Add to a transaction what the owners of its wallets are to be told, as its last moves: all facts of it."""
        crossed = self._alert(transaction)
        return facts_of(
            [*moves, *crossed] if crossed else moves,
            account=account,
            partition=self._partition,
            transaction=transaction.id,
            units=self._units,
        )

    def _alert(self, transaction: Transaction) -> list[Move]:
        state = self._draft.state
        wallets = [wallet for key in transaction.wallets() if (wallet := state.wallet(*key)) is not None]
        moves = decide_alerts(wallets, place=transaction.place)
        if moves:
            transaction.record(moves)
        return moves

    def _facts_of_command(self, command: Command, moves: Sequence[Move], transaction: Transaction) -> list[Fact]:
        match command:
            case ReverseCharge():
                return [reversed_fact(command, moves, transaction=transaction.id, units=self._units)]
            case Transfer():
                self._paid_accounts.update((command.account, command.to_account))
                return [transferred_fact(command, transaction=transaction.id, units=self._units)]
            case _:
                return []

    def take_bundle(self, item: BundleItem) -> Taken | OutOfOrder | Conflicting:
        """Do what a bundle says line by line, if its number is the next; a line that cannot be is put aside alone.

        What is given back comes first, each in a transaction of its own; what is charged, in one.
        """
        bundle, expected = item.bundle, self._draft.charges_number + 1
        if bundle.number > expected:
            return OutOfOrder(expected)
        if bundle.number < expected:
            known = self._bundle_hashes.get(bundle.number) or self._loaded.bundles.get((self._partition, bundle.number))
            return Taken(repeated=True) if known == bundle.body_hash else Conflicting()
        before = self._draft.entries
        dead = self._reverse_all(item)
        names = {line.account for line in bundle.lines if isinstance(line, ChargeLine)}
        settling = [line for line in bundle.lines if isinstance(line, ChargeLine) and line.hold is not None]
        reached = {account for line in settling if self._is_of_estimate(line) for account in self._concerned(line)}
        accounts = sorted({account for name in names for account in path(name)} | reached)
        # The bundle has its number, whatever becomes of its lines: nothing of this is to be undone.
        self._catch_up(accounts, self._overdue(accounts, settling))
        transaction = self._draft.begin()
        rows: list[Row] = []
        charged: dict[str, ChargedSum] = {}
        facts: list[Fact] = []
        traceparents, traced = item.traceparents, list[TracedCharge]()
        for place, line in enumerate(bundle.lines):
            refusal = self._charge(line, transaction, rows, bundle=bundle.number, number=place + 1, facts=facts)
            if traceparents and place in traceparents and isinstance(line, ChargeLine):
                assert not isinstance(refusal, BadLine)
                traced.append(self._traced(line, traceparents[place], refusal, transaction))
            match refusal:
                case None:
                    assert isinstance(line, ChargeLine)
                    _add_to(charged, line)
                case AlreadyCharged():
                    LINES.labels(outcome="repeated").inc()
                case _:
                    dead += 1
                    self._letters.append(_letter(item, place, refusal, name="line"))
        if rows:
            self._tell([*facts, *self._facts((), transaction, "")])
            self._finish_charge(transaction, rows, charged, bundle.number)
        LINES.labels(outcome="charged").inc(len(rows))
        LINES.labels(outcome="dead").inc(dead)
        self._draft.charges_number = bundle.number
        self._bundle_hashes[bundle.number] = bundle.body_hash
        batch = self._draft.batch if self._draft.entries > before else self._draft.head.batch
        transaction_id = transaction.id if rows else None
        lines = len(bundle.lines) + len(bundle.reversals)
        self._bundles.append((self._partition, bundle.number, bundle.body_hash, batch, transaction_id, lines, dead))
        return Taken(repeated=False, traced=traced)

    def _reverse_all(self, item: BundleItem) -> int:
        """Give back what a bundle says, as commands would; how many of it could not be, and are put aside."""
        dead = 0
        for place, line in enumerate(item.bundle.reversals):
            refusal = line if isinstance(line, BadLine) else self._reverse(line)
            if refusal is not None:
                dead += 1
                self._letters.append(_letter(item, place, refusal, name="reversal"))
        LINES.labels(outcome="reversed").inc(len(item.bundle.reversals) - dead)
        return dead

    def _reverse(self, line: ReverseCharge) -> Refusal | None:
        accounts = self._concerned(line)
        self._catch_up(accounts, self._overdue(accounts, ()))
        done = self._do(line, accounts)
        return None if isinstance(done, _Done) else done

    def _traced(
        self, line: ChargeLine, traceparent: str, refusal: Refusal | None, transaction: Transaction
    ) -> TracedCharge:
        if refusal is not None:
            return TracedCharge(line, traceparent, refusal.code)
        identifier = full_id("txn", self._partition, transaction.id)
        return TracedCharge(line, traceparent, "charged", identifier, self._draft.batch, self._position)

    def _charge(
        self,
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
        moves = self._charge_line(line, transaction, rows, bundle, number)
        if not isinstance(moves, list):
            return moves
        if line.hold is not None:
            facts += facts_of(
                moves,
                account=line.account,
                partition=self._partition,
                transaction=transaction.id,
                units=self._units,
            )
        return None

    def _charge_line(
        self, line: ChargeLine, transaction: Transaction, rows: list[Row], bundle: int | None, number: int
    ) -> list[Move] | Refusal:
        """Charge one line, or say why not. Its row goes to `rows`."""
        key = (line.source, line.event_id, line.revision)
        said_when = line.occurred_at != WHEN_RECORDED
        content = (
            line.account,
            line.occurred_at if said_when else self._draft.recorded_at,
            line.hold,
            scope_text(line.scope),
            line.price_version,
            line.own_key,
            amounts_text(line.amounts),
        )
        before = self._charged.get(key) or self._loaded.lines.get((self._partition, *key))
        if before is not None:
            is_same = before == content if said_when else (before[0], *before[2:]) == (content[0], *content[2:])
            return AlreadyCharged(*key) if is_same else ChargeDiffers(*key)
        if not said_when or line.scope is None:
            line = msgspec.structs.replace(line, occurred_at=content[1], scope=self._used(line))
        moves = decide_charge(self._draft.state, line, units=self._units, place=transaction.place)
        if not isinstance(moves, list):
            return moves
        if bundle is None:
            transaction.record(moves)
        else:
            self._position = transaction.record_summed(moves)
        self._charged[key] = content
        split = split_text(moves)
        rows.append(
            (
                self._partition,
                *key,
                *content,
                split,
                bundle,
                number,
                self._draft.batch,
                transaction.id,
            )
        )
        if self._reversing and key in self._reversing:
            # Given back in the same batch: it is not in the tables yet.
            self._draft.state.setting(self._draft.state.lines, key)
            self._draft.state.lines[key] = PastLine(
                source=line.source,
                event_id=line.event_id,
                revision=line.revision,
                account=line.account,
                occurred_at=line.occurred_at,
                hold=line.hold,
                amounts=line.amounts,
                split=taken_of(split),
            )
        return moves

    def _finish_charge(
        self,
        transaction: Transaction,
        rows: list[Row],
        charged: Mapping[str, ChargedSum],
        bundle: int | None,
        *,
        required: bool = False,
    ) -> None:
        transaction.finish(Charged(lines=len(rows), lines_hash=lines_hash(rows), bundle=bundle, required=required))
        self._lines.extend(rows)
        self._tell(usage_charged_facts(charged, transaction=transaction.id, units=self._units))

    def _note_reversal(self, command: ReverseCharge, moves: Sequence[Move], transaction: Transaction) -> None:
        key = (command.source, command.event_id, command.revision)
        given_back = _given_back(moves)
        line = self._draft.state.lines[key]
        for part, amount in given_back.items():
            self._draft.state.setting(line.reversed, part)
            line.reversed[part] = line.reversed.get(part, 0) + amount
        self._reversals.append(
            (
                self._partition,
                *key,
                self._draft.batch,
                transaction.position,
                transaction.id,
                reversed_text(given_back),
                command.reason,
            )
        )

    def _tell(self, facts: Iterable[Fact]) -> None:
        self._outbox.extend(
            outbox_row(
                fact,
                partition=self._partition,
                number=self._draft.next_outbox_number(),
                recorded_at=self._draft.recorded_at,
            )
            for fact in facts
        )


def _count(command: str, outcome: str) -> None:
    _counter(command, outcome).inc()


@cache
def _counter(command: str, outcome: str) -> Counter:
    # Looking a counter up by its labels costs more than counting.
    return COMMANDS.labels(command=command, outcome=outcome)


def _since(state: PartitionState, command: Command) -> Account | Claim:
    """Since when it is as a command without moves would have it: a claim was made, or else an account opened."""
    if isinstance(command, ClaimPayment):
        return state.payments[command.payment, command.account].claims[command.claim]
    return state.accounts[command.account]


def _given_back(moves: Sequence[Move]) -> dict[tuple[str, str, str], int]:
    """What a reversal gave back of what its line took, by (account, unit, lot) of the line."""
    found: dict[tuple[str, str, str], int] = {}
    for move in moves:
        if move.kind == "reversed" and move.unit is not None and move.lot is not None:
            key = (move.account, move.unit, move.lot)
            found[key] = found.get(key, 0) + move.posted
    return found


_encode: Final = msgspec.json.Encoder().encode
_CONFLICT: Final = "the idempotency key was used for a command with another body"


def _add_to(charged: dict[str, ChargedSum], line: ChargeLine) -> None:
    """Add a charged line to the sums by account."""
    if (found := charged.get(line.account)) is None:
        found = charged[line.account] = ChargedSum()
    found.lines += 1
    for unit, amount in line.amounts:
        found.amounts[unit] = found.amounts.get(unit, 0) + amount


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
