"""Load, decide, write, stage: one transaction for a batch of commands and charge bundles of the partitions owned."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, assert_never

import psycopg

from services.kit.database import Writer
from services.kit.outbox import OutboxRow
from services.kit.telemetry import get_logger
from services.ledger import store
from services.ledger.domain.commands import ResolveHold, Units
from services.ledger.domain.draft import Draft
from services.ledger.handlers.bundles import take_bundle
from services.ledger.handlers.catching_up import sweep
from services.ledger.handlers.commands import take_command, take_list
from services.ledger.handlers.items import (
    BundleItem,
    CommandItem,
    Item,
    ListItem,
    NotLookedUp,
    NotOwner,
    Replied,
    Result,
    SweepItem,
)
from services.ledger.handlers.keys import Keys
from services.ledger.handlers.needs import (
    BATCH_SECONDS_MAX,
    Owned,
    late_needs_of,
    may_repeat,
    need_repeats,
    needs_of,
    overdue_needs_of,
)
from services.ledger.handlers.work import Work
from services.ledger.projections import add_rows
from services.ledger.signing import Signer
from services.ledger.store import OVERDUE_READ_MAX, HeadMoved, Loaded, Needs, Signature, Written
from services.ledger.translate import heads_signed_row

log = get_logger(__name__)

ACCOUNTS_KEPT_MAX: Final = 200_000
HOLDS_KEPT_MAX: Final = 200_000
_ATTEMPTS_MAX: Final = 5
# Each command of a batch may be tried out after the end of each hold that is overdue. If that is more than this, the
# holds are ended first.
OVERDUE_TRIED_MAX: Final = 2_000
# What says that something was done before: under this key, for this use, under this id.
_REPEATED: Final = frozenset({"commands_pkey", "charge_lines_pkey", "holds_pkey"})


class _InVain(Exception):
    """A batch was decided on another that was not committed."""


@dataclass(frozen=True, slots=True)
class _Decision:
    """What is to be answered once all that is to be written is committed."""

    results: list[Result]
    written: list[Written]
    signature: Signature | None


class Ledger:
    """The partitions owned by this process, their state, and the one connection through which it changes."""

    def __init__(
        self,
        *,
        writer: Writer,
        units: Units,
        now: Callable[[], datetime],
        on_committed: Callable[[Iterable[OutboxRow]], None],
        signer: Signer | None = None,
    ) -> None:
        """`on_committed` is told of the outbox rows of each commit. Without a `signer` heads are not signed."""
        self._writer = writer
        self._units = units
        self._now = now
        self._on_committed = on_committed
        self._signer = signer
        self._owned: dict[int, Owned] = {}
        # Whoever holds both is alone. They are waited for in order: batches commit in the order they were decided.
        self._deciding = asyncio.Lock()
        self._committing = asyncio.Lock()
        # How many batches were decided in vain: what was decided after them, and before they failed, is so, too.
        self._failures = 0
        self._keys = Keys()

    @property
    def partitions(self) -> frozenset[int]:
        """What is owned here."""
        return frozenset(self._owned)

    async def take_over(self, epochs: Mapping[int, int]) -> frozenset[int]:
        """Own partitions whose leases were won. From here on no commit of an earlier owner succeeds."""
        async with self._deciding, self._committing, self._writer.transaction() as connection:
            heads = await store.take_heads(connection, epochs)
        for partition, head in heads.items():
            self._owned[partition] = Owned(head)
        return frozenset(heads)

    def give_up(self, partitions: Iterable[int]) -> None:
        """Own partitions no longer."""
        for partition in partitions:
            self._owned.pop(partition, None)

    async def process(self, items: Sequence[Item], decided: Callable[[], None] = lambda: None) -> list[Result]:
        """Decide items in order, commit what was accepted, and only then answer. Nothing is done if it raises.

        Tells `decided` if others may be processed while these commit: what they are decided on is not stored then.
        """
        look_up = False
        async with asyncio.timeout(BATCH_SECONDS_MAX):
            for _ in range(_ATTEMPTS_MAX):
                try:
                    await self._end_overdue(items)
                    return await self._attempt(items, decided, look_up=look_up)
                except (HeadMoved, _InVain) as error:
                    log.warning("a batch was decided in vain, the heads are read again", reason=str(error))
                except psycopg.errors.UniqueViolation as error:
                    # Seldom: so nothing is looked up beforehand until it turns out to be a repeat.
                    if look_up or error.diag.constraint_name not in _REPEATED:
                        raise
                    look_up = True
                    self._keys.be_wary(self._now())
        raise HeadMoved(f"the heads moved {_ATTEMPTS_MAX} times while a batch was decided")

    async def _end_overdue(self, items: Sequence[Item]) -> None:
        """End holds past their deadline, if there are more of them than are to be ended with what is decided.

        In commits of their own, as if the sweeper had come: what was done of it stays, whatever becomes of the items.
        """
        commands = sum(len(item.commands) if isinstance(item, ListItem) else 1 for item in items)
        most = max(1, min(OVERDUE_READ_MAX, OVERDUE_TRIED_MAX // commands))
        for partition in {item.partition for item in items} & self._owned.keys():
            while (owned := self._owned.get(partition)) is not None:
                at = max(self._now(), owned.head.recorded_at)
                if not owned.state.deadlines.may_be_more(at, owned.state.holds, than=most):
                    break
                async with self._deciding, self._committing, self._writer.transaction() as connection:
                    holds = await store.overdue_holds(connection, [partition], at, OVERDUE_READ_MAX)
                if len(holds) < most:
                    break
                ends = [SweepItem(partition, ResolveHold(hold=hold, account=account)) for _, hold, account in holds]
                await self._attempt(ends, lambda: None, look_up=False)

    async def _attempt(self, items: Sequence[Item], decided: Callable[[], None], *, look_up: bool) -> list[Result]:
        async with self._deciding:
            now = self._now()
            needs = needs_of(items, self._owned, look_up_lines=look_up, now=now)
            if (
                needs
                or look_up
                or may_repeat(items, self._keys, now)
                or late_needs_of(items, self._owned, units=self._units, now=now)
            ):
                # What is to be read has to be what the batch before has left behind.
                async with self._committing:
                    return await self._alone(items, look_up_lines=look_up)
            failures = self._failures
            with self._distrusting(items):
                decision = await self._decide_all(items, needs, Loaded())
        with self._distrusting(items):
            async with self._committing:
                self._check(failures)
                async with self._writer.transaction() as connection:
                    await self._commit(connection, decision, decided)
        return decision.results

    async def _alone(self, items: Sequence[Item], *, look_up_lines: bool) -> list[Result]:
        """Read what is not in memory, decide and commit, all in one transaction."""
        with self._distrusting(items):
            async with self._writer.transaction() as connection:
                needs = needs_of(items, self._owned, look_up_lines=look_up_lines, now=self._now())
                # It costs little where something is read.
                need_repeats(needs, items, self._owned)
                loaded = await store.load(connection, needs)
                self._refresh(needs, loaded)
                self._stay_wary(loaded)
                reached = loaded.reached
                if late := late_needs_of(items, self._owned, units=self._units, now=self._now(), reached=reached):
                    # Together: an account that is read again is read with the lots that it was given before.
                    loaded.add(await store.load(connection, late))
                    self._refresh(late, loaded)
                    # It may have led to payments, and claims on them to other wallets.
                    more = overdue_needs_of(items, self._owned, now=self._now(), reached=loaded.reached)
                    loaded.add(await store.load(connection, more))
                    self._refresh(more, loaded)
                decision = await self._decide_all(items, needs, loaded)
                await self._commit(connection, decision)
        return decision.results

    def _stay_wary(self, loaded: Loaded) -> None:
        """Go on looking up keys that are not recent for as long as some of them turn out to be known."""
        now = self._now()
        if self._keys.is_wary(now) and any(not self._keys.is_recent(key) for key in loaded.commands):
            self._keys.be_wary(now)

    def _check(self, failures: int) -> None:
        """Raises _InVain if a batch has failed since there were so many failures."""
        if failures != self._failures:
            raise _InVain("the batch before it was not committed")

    @contextmanager
    def _distrusting(self, items: Sequence[Item]) -> Iterator[None]:
        """If this fails, what is in memory may be what was never stored: of the batch, and of any decided after it.

        For who decides, and for who has decided and not committed: while one reads there is nobody else of these.
        """
        try:
            yield
        except BaseException:
            self._failures += 1
            for partition in {item.partition for item in items} & set(self._owned):
                self._owned[partition].distrust()
            raise

    async def _decide_all(self, items: Sequence[Item], needs: Needs, loaded: Loaded) -> "_Decision":
        """Decide items, and go on from there: if this is not committed, what is in memory is not to be believed."""
        works: dict[int, Work] = {}
        results, failures = [], self._failures
        for item in items:
            results.append(self._decide(item, works, needs, loaded))
            if isinstance(item, BundleItem):
                # It takes long: what else there is to do, the commit on its way above all, is not to wait for them all.
                await asyncio.sleep(0)
                self._check(failures)
        written = [work.written() for work in works.values() if work.is_something]
        signature = self._sign(written) if written else None
        for one in written:
            if (owned := self._owned.get(one.after.partition)) is not None:
                owned.head = one.after
                owned.state.written(one.after.recorded_at)
            # Before they are committed: a repeat right behind waits for that, and finds them.
            self._keys.accept((partition, principal, key) for partition, principal, key, *_ in one.commands)
        self._forget_some()
        return _Decision(results, written, signature)

    async def _commit(
        self, connection: store.Connection, decision: "_Decision", sent: Callable[[], None] = lambda: None
    ) -> None:
        if decision.written:
            await store.write(connection, decision.written, decision.signature, sent)
        for one in decision.written:
            self._on_committed(one.outbox)

    def _sign(self, written: Sequence[Written]) -> Signature | None:
        """Sign the heads that a commit moves, and tell it, in the outbox of the first of them."""
        moved = [one.after for one in written if one.after.batch != one.before.batch]
        if self._signer is None or not moved:
            return None
        signed = self._signer.sign_heads(moved)
        first = next(one for one in written if one.after.partition == signed.partition)
        number = first.after.outbox_number + 1
        first.after = replace(first.after, outbox_number=number)
        recorded_at = first.after.recorded_at
        first.outbox.append(
            heads_signed_row(signed, partition=signed.partition, number=number, recorded_at=recorded_at)
        )
        return Signature(signed.commit_id, signed.signature, signed.key_id, signed.heads)

    def _forget_some(self) -> None:
        """Keep memory flat: of what is too much, each partition forgets what is beyond its share."""
        states = [owned.state for owned in self._owned.values()]
        accounts, holds = sum([len(state.accounts) for state in states]), sum([len(state.holds) for state in states])
        if accounts > ACCOUNTS_KEPT_MAX or holds > HOLDS_KEPT_MAX:
            for state in states:
                state.shrink(accounts_max=ACCOUNTS_KEPT_MAX // len(states), holds_max=HOLDS_KEPT_MAX // len(states))

    def _refresh(self, needs: Needs, loaded: Loaded) -> None:
        for partition in needs.heads:
            # It may have been given up while its head was read.
            if (owned := self._owned.get(partition)) is None:
                continue
            head = loaded.heads[partition]
            if head.epoch == owned.head.epoch:
                owned.head = head
                owned.stale = False
            else:
                log.error("partition has another owner", partition=partition, epoch=head.epoch)
                del self._owned[partition]
        # What was read for a partition that has just been lost goes nowhere: it may belong to what was in memory.
        states = {partition: owned.state for partition, owned in self._owned.items()}
        add_rows(states, {name: [row for row in rows if row[0] in states] for name, rows in loaded.rows.items()})
        for partition in loaded.unread_from.keys() & states.keys():
            states[partition].deadlines.unread_from = loaded.unread_from[partition]

    def _decide(self, item: Item, works: dict[int, "Work"], needs: Needs, loaded: Loaded) -> Result:
        owned = self._owned.get(item.partition)
        if owned is None:
            return NotOwner()
        work = works.get(item.partition)
        if work is None:
            draft = Draft(owned.head, owned.state, now=self._now())
            if owned.state.deadlines.unread_from <= draft.recorded_at and not _ends_a_hold(item):
                raise _InVain("more holds have come to their deadlines than were read")
            work = works[item.partition] = Work(
                draft,
                self._units,
                loaded,
                reversing=frozenset(each[1:4] for each in needs.past_lines if each[0] == item.partition),
                paid_accounts={account for partition, account in loaded.reached if partition == item.partition},
            )
        match item:
            case CommandItem():
                is_looked_up = (item.partition, item.principal, item.key) in needs.commands
                reply = take_command(work, item, is_looked_up=is_looked_up)
                return NotLookedUp() if reply is None else Replied(reply)
            case ListItem():
                return Replied(take_list(work, item))
            case SweepItem():
                return sweep(work, item)
            case BundleItem():
                return take_bundle(work, item)
            case _:
                assert_never(item)


def _ends_a_hold(item: Item) -> bool:
    """Whether all it needs to know of holds is one that it names."""
    return isinstance(item, SweepItem) and isinstance(item.command, ResolveHold)
