"""Load, decide, write, stage: one transaction for a batch of commands and charge bundles of the partitions owned."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, assert_never

import msgspec
import psycopg
from prometheus_client import Counter, Gauge

from contracts.accounts import path
from services.kit.database import Writer
from services.kit.dead_letters import Letter
from services.kit.outbox import OutboxRow
from services.kit.telemetry import REGISTRY, get_logger
from services.ledger import store
from services.ledger.domain.commands import (
    ChargeLine,
    ClaimPayment,
    Command,
    Grant,
    OpenAccount,
    PlaceHold,
    ReleaseHold,
    Units,
)
from services.ledger.domain.decide import decide, decide_charge
from services.ledger.domain.draft import Draft, Head, Transaction
from services.ledger.domain.entries import Charged, HoldPlaced, Move, payment_of
from services.ledger.domain.errors import AlreadyCharged, ChargeDiffers, Refusal
from services.ledger.domain.state import Account, Claim, PartitionState, Wallet
from services.ledger.projections import Row, add_rows, changed_rows
from services.ledger.store import HeadMoved, Loaded, Needs, Written
from services.ledger.translate import (
    BadLine,
    Bundle,
    Fact,
    Problem,
    accepted,
    amounts_text,
    facts_of,
    full_id,
    hold_released_fact,
    lines_hash,
    outbox_row,
    problem_rows,
    refused,
    scope_text,
    split_text,
    usage_charged_fact,
)

log = get_logger(__name__)

LINES: Final = Counter(
    "scrip_ledger_charge_lines", "Charge lines by outcome: charged, repeated, dead.", ("outcome",), registry=REGISTRY
)
COMMANDS: Final = Counter("scrip_ledger_commands", "Commands by outcome.", ("command", "outcome"), registry=REGISTRY)
CHARGES_STOPPED: Final = Gauge(
    "scrip_ledger_charges_stopped", "1 for a partition whose charges conflict.", ("partition",), registry=REGISTRY
)

BATCH_SECONDS_MAX: Final = 10.0
ACCOUNTS_KEPT_MAX: Final = 200_000
HOLDS_KEPT_MAX: Final = 200_000
_ATTEMPTS_MAX: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandItem:
    """A command, who sent it, under which key, and the hash of what was sent."""

    partition: int
    principal: str
    key: str
    body_hash: bytes
    command: Command


@dataclass(frozen=True, slots=True)
class BundleItem:
    """A bundle of charges, and where in its stream it stood."""

    bundle: Bundle
    stream: str
    stream_sequence: int
    subject: str
    # By the places of lines whose charging somebody wants to see.
    traceparents: Mapping[int, str] = field(default_factory=dict)

    @property
    def partition(self) -> int:
        """The partition of all its lines."""
        return self.bundle.partition


Item = CommandItem | BundleItem


@dataclass(frozen=True, slots=True)
class Replied:
    """A command was answered: contracts.ledger.Reply as JSON."""

    body: bytes


@dataclass(frozen=True, slots=True)
class TracedCharge:
    """Where in the journal the charge of a traced line begins, or the code of why it is not there."""

    line: ChargeLine
    traceparent: str
    outcome: str
    transaction: str = ""
    batch: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True)
class Taken:
    """A bundle's charges are in the journal; `repeated`: they had been before."""

    repeated: bool
    traced: Sequence[TracedCharge] = ()


@dataclass(frozen=True, slots=True)
class OutOfOrder:
    """A bundle came before the one with the number `expected`."""

    expected: int


@dataclass(frozen=True, slots=True)
class Conflicting:
    """A bundle has the number of one that was taken, and other contents: the two services disagree about the past."""


@dataclass(frozen=True, slots=True)
class NotOwner:
    """The partition is not, or no longer, owned here."""


Result = Replied | Taken | OutOfOrder | Conflicting | NotOwner


@dataclass(slots=True)
class _Owned:
    """A partition owned here. `stale`: what is in memory may differ from what is stored, and is read again first."""

    head: Head
    state: PartitionState = field(default_factory=PartitionState)
    stale: bool = False

    def distrust(self) -> None:
        self.stale = True
        self.state = PartitionState()


class Ledger:
    """The partitions owned by this process, their state, and the one connection through which it changes."""

    def __init__(
        self,
        *,
        writer: Writer,
        units: Units,
        now: Callable[[], datetime],
        on_committed: Callable[[Iterable[OutboxRow]], None],
    ) -> None:
        """`on_committed` is told of the outbox rows of each commit."""
        self._writer = writer
        self._units = units
        self._now = now
        self._on_committed = on_committed
        self._owned: dict[int, _Owned] = {}
        self._one_at_a_time = asyncio.Lock()

    @property
    def partitions(self) -> frozenset[int]:
        """What is owned here."""
        return frozenset(self._owned)

    async def take_over(self, epochs: Mapping[int, int]) -> frozenset[int]:
        """Own partitions whose leases were won. From here on no commit of an earlier owner succeeds."""
        async with self._one_at_a_time, self._writer.transaction() as connection:
            heads = await store.take_heads(connection, epochs)
        for partition, head in heads.items():
            self._owned[partition] = _Owned(head)
        return frozenset(heads)

    def give_up(self, partitions: Iterable[int]) -> None:
        """Own partitions no longer."""
        for partition in partitions:
            self._owned.pop(partition, None)

    async def process(self, items: Sequence[Item]) -> list[Result]:
        """Decide items in order, commit what was accepted, and only then answer. Nothing is done if it raises."""
        look_up_lines = False
        async with self._one_at_a_time, asyncio.timeout(BATCH_SECONDS_MAX):
            for _ in range(_ATTEMPTS_MAX):
                try:
                    return await self._attempt(items, look_up_lines=look_up_lines)
                except HeadMoved as error:
                    log.warning("a commit was refused, the heads are read again", reason=str(error))
                except psycopg.errors.UniqueViolation as error:
                    # Seldom: so lines are not looked up beforehand until one turns out to be a repeat.
                    if look_up_lines or error.diag.constraint_name != "charge_lines_pkey":
                        raise
                    look_up_lines = True
        raise HeadMoved(f"the heads moved {_ATTEMPTS_MAX} times while a batch was decided")

    async def _attempt(self, items: Sequence[Item], *, look_up_lines: bool) -> list[Result]:
        try:
            async with self._writer.transaction() as connection:
                needs = self._needs(items, look_up_lines=look_up_lines)
                loaded = await store.load(connection, needs)
                self._refresh(needs, loaded)
                works: dict[int, _Work] = {}
                results = [self._decide(item, works, loaded) for item in items]
                written = [work.written() for work in works.values() if work.is_something]
                if written:
                    await store.write(connection, written)
        except BaseException:
            for partition in {item.partition for item in items} & set(self._owned):
                self._owned[partition].distrust()
            raise
        for one in written:
            self._committed(one)
        self._forget_some()
        return results

    def _committed(self, written: Written) -> None:
        if (owned := self._owned.get(written.after.partition)) is not None:
            owned.head = written.after
            owned.state.written()
        self._on_committed(written.outbox)

    def _forget_some(self) -> None:
        """Keep memory flat: of what is too much, each partition forgets what is beyond its share."""
        states = [owned.state for owned in self._owned.values()]
        if (
            sum(len(state.accounts) for state in states) > ACCOUNTS_KEPT_MAX
            or sum(len(state.holds) for state in states) > HOLDS_KEPT_MAX
        ):
            for state in states:
                state.shrink(accounts_max=ACCOUNTS_KEPT_MAX // len(states), holds_max=HOLDS_KEPT_MAX // len(states))

    def _needs(self, items: Sequence[Item], *, look_up_lines: bool) -> Needs:
        """What is not in memory."""
        needs = Needs()
        for item in items:
            owned = self._owned.get(item.partition)
            if owned is None:
                continue
            if owned.stale:
                needs.heads.add(item.partition)
            match item:
                case CommandItem():
                    needs.commands.add((item.partition, item.principal, item.key))
                    _need(needs, item.partition, owned.state, item.command, look_up_lines=True)
                case BundleItem(bundle=bundle):
                    if owned.stale or bundle.number <= owned.head.charges_number:
                        needs.bundles.add((item.partition, bundle.number))
                    for line in bundle.lines:
                        if isinstance(line, ChargeLine):
                            _need(needs, item.partition, owned.state, line, look_up_lines=look_up_lines)
                case _:
                    assert_never(item)
        return needs

    def _refresh(self, needs: Needs, loaded: Loaded) -> None:
        for partition in needs.heads:
            head = loaded.heads[partition]
            if head.epoch == self._owned[partition].head.epoch:
                self._owned[partition].head = head
                self._owned[partition].stale = False
            else:
                log.error("partition has another owner", partition=partition, epoch=head.epoch)
                del self._owned[partition]
        # What was read for a partition that has just been lost goes nowhere.
        states = defaultdict(PartitionState, {partition: owned.state for partition, owned in self._owned.items()})
        add_rows(states, loaded.rows)

    def _decide(self, item: Item, works: dict[int, "_Work"], loaded: Loaded) -> Result:
        owned = self._owned.get(item.partition)
        if owned is None:
            return NotOwner()
        work = works.get(item.partition)
        if work is None:
            draft = Draft(owned.head, owned.state, now=self._now())
            work = works[item.partition] = _Work(draft, self._units, loaded)
        match item:
            case CommandItem():
                return Replied(work.take_command(item))
            case BundleItem():
                return work.take_bundle(item)
            case _:
                assert_never(item)


def _need(needs: Needs, partition: int, state: PartitionState, command: Command, *, look_up_lines: bool) -> None:
    needs.accounts.update((partition, account) for account in path(command.account) if account not in state.accounts)
    match command:
        case ChargeLine():
            if look_up_lines:
                needs.lines.add((partition, command.source, command.event_id, command.revision))
            if command.hold is not None and command.hold not in state.holds:
                needs.holds.add((partition, command.hold))
        case OpenAccount():
            pass
        case Grant():
            if (payment := payment_of(command.kind, command.reference)) is not None:
                needs.payments.add((partition, payment, command.account, False))
        case ClaimPayment():
            needs.payments.add((partition, command.payment, command.account, True))
        case PlaceHold() | ReleaseHold():
            if command.hold not in state.holds:
                needs.holds.add((partition, command.hold))
        case _:
            assert_never(command)


class _Work:
    """What is being decided for one partition in one batch, and the rows that follow from it."""

    def __init__(self, draft: Draft, units: Units, loaded: Loaded) -> None:
        self._draft = draft
        self._units = units
        self._loaded = loaded
        self._partition = draft.head.partition
        self._accepted: dict[tuple[str, str], tuple[bytes, dict[str, Any]]] = {}
        self._charged: dict[tuple[str, str, int], Row] = {}
        # Of the line that was charged last.
        self._position = 0
        self._bundle_hashes: dict[int, bytes] = {}
        self._commands: list[Row] = []
        self._bundles: list[Row] = []
        self._lines: list[Row] = []
        self._letters: list[Letter] = []
        self._outbox: list[OutboxRow] = []

    @property
    def is_something(self) -> bool:
        """Whether there is anything to write: a batch of refusals and repeats changes nothing."""
        return bool(self._commands or self._bundles)

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
            projections=changed_rows(self._partition, self._draft.state.changes),
            outbox=self._outbox,
            letters=self._letters,
        )

    def take_command(self, item: CommandItem) -> bytes:
        """Decide a command, or repeat the outcome its key has: the reply as JSON."""
        name = type(item.command).__name__
        if (known := self._outcome_of(item)) is not None:
            body_hash, outcome = known
            if body_hash != item.body_hash:
                COMMANDS.labels(command=name, outcome="conflict").inc()
                return _encode({"status": "failed", "code": "conflict", "message": _CONFLICT})
            COMMANDS.labels(command=name, outcome="replayed").inc()
            return _encode({**outcome, "replayed": True})
        decided = self._decide_command(item)
        if not isinstance(decided, dict):
            COMMANDS.labels(command=name, outcome=decided.code).inc()
            return refused(decided, units=self._units).model_dump_json(exclude_none=True).encode()
        COMMANDS.labels(command=name, outcome="accepted").inc()
        self._accepted[item.principal, item.key] = (item.body_hash, decided)
        return _encode(decided)

    def take_bundle(self, item: BundleItem) -> Taken | OutOfOrder | Conflicting:
        """Charge a bundle's lines one by one, if its number is the next; a line that cannot be is put aside alone."""
        bundle, expected = item.bundle, self._draft.charges_number + 1
        if bundle.number > expected:
            return OutOfOrder(expected)
        if bundle.number < expected:
            known = self._bundle_hashes.get(bundle.number) or self._loaded.bundles.get((self._partition, bundle.number))
            return Taken(repeated=True) if known == bundle.body_hash else Conflicting()
        transaction = self._draft.begin()
        rows: list[Row] = []
        charged: dict[str, _Charged] = {}
        dead = 0
        traceparents, traced = item.traceparents, list[TracedCharge]()
        for place, line in enumerate(bundle.lines):
            refusal = self._charge(line, transaction, rows, bundle.number, place + 1)
            if traceparents and place in traceparents and isinstance(line, ChargeLine):
                assert not isinstance(refusal, BadLine)
                traced.append(self._traced(line, traceparents[place], refusal, transaction))
            match refusal:
                case None:
                    assert isinstance(line, ChargeLine)
                    charged.setdefault(line.account, _Charged()).add(line)
                case AlreadyCharged():
                    LINES.labels(outcome="repeated").inc()
                case _:
                    dead += 1
                    self._letters.append(_letter(item, place, refusal))
        if rows:
            self._finish_charge(transaction, rows, charged, bundle.number)
        LINES.labels(outcome="charged").inc(len(rows))
        LINES.labels(outcome="dead").inc(dead)
        self._draft.charges_number = bundle.number
        self._bundle_hashes[bundle.number] = bundle.body_hash
        batch, transaction_id = (self._draft.batch, transaction.id) if rows else (self._draft.head.batch, None)
        self._bundles.append(
            (self._partition, bundle.number, bundle.body_hash, batch, transaction_id, len(bundle.lines), dead)
        )
        return Taken(repeated=False, traced=traced)

    def _traced(
        self, line: ChargeLine, traceparent: str, refusal: Refusal | None, transaction: Transaction
    ) -> TracedCharge:
        if refusal is not None:
            return TracedCharge(line, traceparent, refusal.code)
        identifier = full_id("txn", self._partition, transaction.id)
        return TracedCharge(line, traceparent, "charged", identifier, self._draft.batch, self._position)

    def _outcome_of(self, item: CommandItem) -> tuple[bytes, dict[str, Any]] | None:
        if (recent := self._accepted.get((item.principal, item.key))) is not None:
            return recent
        stored = self._loaded.commands.get((item.partition, item.principal, item.key))
        return None if stored is None else (stored[0], msgspec.json.decode(stored[1]))

    def _decide_command(self, item: CommandItem) -> dict[str, Any] | Refusal:
        command = item.command
        transaction = self._draft.begin()
        batch = self._draft.batch
        if isinstance(command, ChargeLine):
            rows: list[Row] = []
            moves = self._charge_line(command, transaction, rows, None, 1)
            if not isinstance(moves, list):
                return moves
            self._finish_charge(transaction, rows, {command.account: _Charged().add(command)}, None)
            LINES.labels(outcome="charged").inc()
        else:
            moves = decide(self._draft.state, command, units=self._units, place=transaction.place)
            if not isinstance(moves, list):
                return moves
            transaction.record(moves)
            self._tell(self._facts(command, moves, transaction))
        transaction_id, recorded_at = transaction.id, self._draft.recorded_at
        if not moves:
            since = _since(self._draft.state, command)
            transaction_id, recorded_at, batch = since.transaction, since.recorded_at, since.batch
        outcome = accepted(
            partition=self._partition,
            transaction=transaction_id,
            recorded_at=recorded_at,
            moves=moves,
            remaining=_wallets_held_on(self._draft.state, moves),
            units=self._units,
        )
        self._commands.append(
            (
                self._partition,
                item.principal,
                item.key,
                item.body_hash,
                transaction_id,
                batch,
                recorded_at,
                _encode(outcome).decode(),
            )
        )
        return outcome

    def _facts(self, command: Command, moves: Sequence[Move], transaction: Transaction) -> list[Fact]:
        if isinstance(command, ReleaseHold):
            return [
                hold_released_fact(
                    command, moves, partition=self._partition, transaction=transaction.id, units=self._units
                )
            ]
        return facts_of(moves, partition=self._partition, transaction=transaction.id, units=self._units)

    def _charge(
        self, line: ChargeLine | BadLine, transaction: Transaction, rows: list[Row], bundle: int, number: int
    ) -> Refusal | BadLine | None:
        if isinstance(line, BadLine):
            return line
        moves = self._charge_line(line, transaction, rows, bundle, number)
        return None if isinstance(moves, list) else moves

    def _charge_line(
        self, line: ChargeLine, transaction: Transaction, rows: list[Row], bundle: int | None, number: int
    ) -> list[Move] | Refusal:
        """Charge one line, or say why not. Its row goes to `rows`."""
        key = (line.source, line.event_id, line.revision)
        content = (
            line.account,
            line.occurred_at,
            line.hold,
            scope_text(line.scope),
            line.price_version,
            line.own_key,
            amounts_text(line.amounts),
        )
        before = self._charged.get(key) or self._loaded.lines.get((self._partition, *key))
        if before is not None:
            return AlreadyCharged(*key) if before == content else ChargeDiffers(*key)
        moves = decide_charge(self._draft.state, line, units=self._units, place=transaction.place)
        if not isinstance(moves, list):
            return moves
        if bundle is None:
            transaction.record(moves)
        else:
            self._position = transaction.record_summed(moves)
        self._charged[key] = content
        rows.append(
            (
                self._partition,
                *key,
                *content,
                split_text(moves),
                bundle,
                number,
                self._draft.batch,
                transaction.id,
            )
        )
        return moves

    def _finish_charge(
        self, transaction: Transaction, rows: list[Row], charged: Mapping[str, "_Charged"], bundle: int | None
    ) -> None:
        transaction.finish(Charged(lines=len(rows), lines_hash=lines_hash(rows), bundle=bundle))
        self._lines.extend(rows)
        self._tell(
            usage_charged_fact(account, each.amounts, lines=each.lines, transaction=transaction.id, units=self._units)
            for account, each in charged.items()
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


def _since(state: PartitionState, command: Command) -> Account | Claim:
    """Since when it is as a command without moves would have it: a claim was made, or else an account opened."""
    if isinstance(command, ClaimPayment):
        return state.payments[command.payment, command.account].claims[command.claim]
    return state.accounts[command.account]


def _wallets_held_on(state: PartitionState, moves: Sequence[Move]) -> list[Wallet]:
    """The wallets of a hold that has just been placed, each once."""
    placed = (move.details for move in moves if isinstance(move.details, HoldPlaced))
    keys = dict.fromkeys((account, leg.unit) for each in placed for leg in each.legs for account in leg.wallets)
    return [wallet for key in keys if (wallet := state.wallet(*key)) is not None]


_encode: Final = msgspec.json.Encoder().encode
_CONFLICT: Final = "the idempotency key was used for a command with another body"


@dataclass(slots=True)
class _Charged:
    """What an account was charged in one transaction."""

    lines: int = 0
    amounts: dict[str, int] = field(default_factory=dict)

    def add(self, line: ChargeLine) -> "_Charged":
        self.lines += 1
        for unit, amount in line.amounts:
            self.amounts[unit] = self.amounts.get(unit, 0) + amount
        return self


def _letter(item: BundleItem, place: int, why: Refusal | BadLine) -> Letter:
    """A charge line that cannot be charged, as a dead letter: its body is the line alone."""
    if isinstance(why, BadLine):
        body, problems = why.body, why.problems
    else:
        body, problems = item.bundle.line_body(place), (Problem("", why.code, str(why)),)
    return Letter(
        stream=item.stream,
        stream_sequence=item.stream_sequence,
        subject=item.subject,
        headers={},
        payload=body,
        reason=f"line {place + 1} of bundle {item.bundle.number}: " + "; ".join(problem.detail for problem in problems),
        problems=problem_rows(problems),
        partition=item.partition,
    )
