"""What becomes of uses that are corrected: each is priced anew, and written together with what the ledger is told.

Everything about a use, its counters included, is one transaction, under the heads of the partitions that it touches.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, assert_never

import msgspec

from contracts.metering import LINES_MAX
from contracts.money import Unit
from contracts.pricing import Counter, PriceVersion, Rated
from services.kit.clock import now
from services.kit.outbox import OutboxRow, stage
from services.metering import store, translate
from services.metering.correcting import versions
from services.metering.correcting.versions import Found, LoggedVersion, NewVersion, NewWaiting
from services.metering.domain.charging import Head, Reason, advance
from services.metering.domain.corrections import (
    Amounts,
    CounterMove,
    Posting,
    moved_back,
    moves,
    part_of,
    post,
    put_in,
    take_out,
)
from services.metering.domain.prices import CountedFirst, CounterKey, Counts, NoPrice, PriceBook
from services.metering.domain.usage import Key, Usage
from services.metering.store import Connection
from services.metering.store import Counts as IngestCounts

# Of a bundle. The ledger does each by itself, at a cost that grows with the lots of the wallet, and a bundle at once.
REVERSALS_MAX: Final = 250


class VersionNotRead(LookupError):
    """A use was charged under a price version that this process has not read yet."""

    def __init__(self, id: str) -> None:
        super().__init__(f"price version {id} is not read yet")


@dataclass(frozen=True, slots=True)
class Charged:
    """A use that costs something from now on, or as it did before. `line_items` and `amounts_json` are the log's."""

    usage: Usage
    price_version: str
    line_items: str
    amounts_json: str
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Waits:
    """A use that is logged, and waits for its account or for a price: the ledger has nothing of it."""

    usage: Usage
    reason: Reason
    key: str


@dataclass(frozen=True, slots=True)
class WaitsForAlias:
    """A use that nobody knows whose it is, as it is to be when somebody does."""

    body: bytes
    subject: str
    revision: int


@dataclass(frozen=True, slots=True)
class Voided:
    """A use that counts for nothing."""


State = Charged | Waits | WaitsForAlias | Voided


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a use, and by how much counters of periods moved with it."""

    found: Found
    to: State
    counted: Sequence[CounterMove] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What was done to a use: from which version to which, None for none; and what it cost more, in steps by unit."""

    partition: int
    source: str
    event_id: str
    occurred_at: datetime
    account: str | None
    from_revision: int | None
    to_revision: int | None
    charged: bool
    difference: Amounts
    counted: Sequence[CounterMove]
    body: bytes | None
    recorded_at: datetime

    @property
    def key(self) -> Key:
        """The key of the use."""
        return (self.partition, self.source, self.event_id)


@dataclass(frozen=True, slots=True)
class Task:
    """A correction, and the prices by which it is made.

    `counters` are those that earlier slices moved, if what they did was taken back: of a dry run.
    """

    id: str
    reason: str
    book: PriceBook
    counters: Mapping[CounterKey, Counter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Written:
    """What a transaction of a correction came to, and where the counters stand that moved."""

    items: Sequence[Item] = ()
    rows: Sequence[OutboxRow] = ()
    counters: Mapping[CounterKey, Counter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slice:
    """What a transaction of a long correction came to, and where the next one goes on; None: it was the last."""

    cursor: msgspec.Struct | None
    counts: Mapping[str, int] = field(default_factory=dict)
    written: Written = Written()


class Rating:
    """Prices uses one after another within a transaction, each with what the ones before it left counted."""

    def __init__(
        self, *, book: PriceBook, open_accounts: Collection[str], counters: Mapping[CounterKey, Counter]
    ) -> None:
        self._book = book
        self._open_accounts = open_accounts
        self._counters = dict(counters)
        self._first = dict(counters)
        self._before: dict[CounterKey, Counter] = {}
        self._moved: set[CounterKey] = set()

    @classmethod
    async def of(
        cls,
        connection: Connection,
        uses: Iterable[tuple[Found, Usage | None]],
        task: Task,
        *,
        under: PriceVersion | None = None,
        further: Iterable[CounterKey] = (),
    ) -> "Rating":
        """With all that pricing uses anew, as what they are and as what they are to be, has to know."""
        keys = set(further)
        accounts: set[tuple[int, str]] = set()
        for found, usage in uses:
            if found.current is not None and found.current.price_version is not None:
                keys.update(share.key for share in counts_of(found.current, task.book).shares)
            if usage is not None:
                accounts.add((usage.partition, usage.account))
                if isinstance(price := task.book.price(usage, under=under), CountedFirst):
                    keys.update(price.counters)
        open_accounts = await store.find_open(connection, accounts) if accounts else set()
        counters = {**await store.find_counters(connection, keys), **task.counters}
        return cls(book=task.book, open_accounts=open_accounts, counters=counters)

    def take_out(self, version: LoggedVersion) -> None:
        """Have a version counted no more, if it is."""
        counts, amounts = counts_of(version, self._book), versions.amounts_of(version.amounts, self._book.units)
        self._move(take_out(self._counters, counts, amounts))

    def put_in(self, version: LoggedVersion) -> None:
        """Have a version counted again, at what it costs, if it ever was."""
        counts, amounts = counts_of(version, self._book), versions.amounts_of(version.amounts, self._book.units)
        self._move(put_in(self._counters, counts, amounts))

    def carry(self, made: LoggedVersion, now: LoggedVersion) -> None:
        """Have carried what a charged version costs less by now than when it was made, since it was settled."""
        units = self._book.units
        was, cost = (versions.amounts_of(each.amounts, units) for each in (made, now))
        for share in counts_of(now, self._book).shares:
            unit = share.unit.name
            if less := was.pop(unit, 0) - cost.pop(unit, 0):
                counter = self._counters.get(share.key, Counter())
                self._move({share.key: Counter(quantity=counter.quantity, credit=counter.credit - less)})

    def stands_at(self, moved: Iterable[CounterMove]) -> bool:
        """Whether as much is counted as when counters moved."""
        return all(self._counters.get(each.key, Counter()).quantity == each.at for each in moved)

    def move_back(self, moved: Sequence[CounterMove]) -> None:
        """Have counters stand where they would without a correction."""
        self._move(moved_back(self._counters, moved))

    def rated(self, usage: Usage, *, under: PriceVersion | None = None) -> Charged | Waits:
        """What a use comes to, and have it counted."""
        if usage.account not in self._open_accounts:
            return Waits(usage, "unattributed", usage.account)
        price = self._book.price(usage, counted=self._counters, under=under)
        assert not isinstance(price, CountedFirst)
        if isinstance(price, NoPrice):
            return Waits(usage, "unpriced", price.key)
        self._move(
            {(usage.partition, usage.account, each.price_id, each.period): each.counter for each in price.counting}
        )
        return charged(usage, price, units=self._book.units)

    def carried(self) -> dict[CounterKey, int]:
        """What counters carry by now that they did not before: above 0 what is owed, below 0 what was paid too much."""
        found = {}
        for key in sorted(self._moved):
            credit, before = self._counters[key].credit, self._first.get(key, Counter()).credit
            if more := max(credit - max(before, 0), 0) + min(credit - min(before, 0), 0):
                found[key] = more
        return found

    def settle(self, key: CounterKey, steps: int) -> None:
        """Have a counter carry so much less: it was charged, or, below 0, given back."""
        counter = self._counters[key]
        self._move({key: Counter(quantity=counter.quantity, credit=counter.credit - steps)})

    def moves(self) -> list[CounterMove]:
        """By how much counters moved since the last time this was asked."""
        found = moves(self._before, {key: self._counters[key] for key in self._before})
        self._before = {}
        return found

    def moved(self) -> dict[CounterKey, Counter]:
        """Where counters stand that moved, to be written."""
        return {key: self._counters[key] for key in self._moved}

    def _move(self, to: Mapping[CounterKey, Counter]) -> None:
        for key, counter in to.items():
            self._before.setdefault(key, self._counters.get(key, Counter()))
            self._moved.add(key)
            self._counters[key] = counter


def counts_of(version: LoggedVersion, book: PriceBook) -> Counts:
    """What a version was counted as when it was charged. VersionNotRead."""
    if version.price_version is None:
        return Counts()
    found = book.find(version.price_version)
    if found is None:
        raise VersionNotRead(version.price_version)
    return book.counts(version.usage(), found)


def charged(usage: Usage, price: Rated, *, units: Mapping[str, Unit]) -> Charged:
    """A use and what it costs."""
    as_json = translate.priced(usage, price, units=units)
    return Charged(usage, price.price_version, as_json.items, as_json.amounts, price.amounts)


def lowered(to: Charged, key: CounterKey, steps: int, *, book: PriceBook) -> tuple[Charged, int]:
    """A use that costs up to so much less, on account of a counter that counts it; and by how much. VersionNotRead.

    Below 0 it costs more, by all of it.
    """
    version = book.find(to.price_version)
    if version is None:
        raise VersionNotRead(to.price_version)
    counts = book.counts(to.usage, version)
    share = next((each for each in counts.shares if each.key == key), None)
    if share is None:
        return to, 0
    if steps > 0:
        exact = translate.exact_of(to.line_items, share.price.id)
        steps = min(steps, part_of(share, counts, to.amounts, exact=exact))
    if not steps:
        return to, 0
    items, amounts = translate.settled(to.line_items, to.amounts_json, steps, price_id=share.price.id, unit=share.unit)
    unit = share.unit.name
    less = {**to.amounts, unit: to.amounts[unit] - steps}
    return replace(to, line_items=items, amounts_json=amounts, amounts=less), steps


def charged_again(version: LoggedVersion, *, revision: int, units: Mapping[str, Unit]) -> Charged:
    """A use as a version had it, to the last digit, as a further one."""
    assert version.price_version is not None
    assert version.line_items is not None
    assert version.amounts is not None
    usage = msgspec.structs.replace(version.usage(), revision=revision)
    amounts = versions.amounts_of(version.amounts, units)
    return Charged(usage, version.price_version, version.line_items, version.amounts, amounts)


# Writing --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Postings:
    """What a partition's ledger is told, in bundles that hold no more than they may."""

    partition: int
    number: int
    recorded_at: datetime
    rows: list[OutboxRow] = field(default_factory=list)
    reversals: list[msgspec.Raw] = field(default_factory=list)
    lines: list[msgspec.Raw] = field(default_factory=list)

    def add(self, reversals: Sequence[msgspec.Raw], line: msgspec.Raw | None) -> tuple[int, int] | None:
        """Take what a use comes to; under which bundle and line it is charged, if it is."""
        if len(self.reversals) + len(reversals) > REVERSALS_MAX or len(self.lines) == LINES_MAX:
            self.close()
        # A use that was corrected very often has more lines than a bundle takes.
        for start in range(0, len(reversals), REVERSALS_MAX):
            if len(self.reversals) + len(part := reversals[start : start + REVERSALS_MAX]) > REVERSALS_MAX:
                self.close()
            self.reversals += part
        if line is None:
            return None
        self.lines.append(line)
        return (self.number + 1, len(self.lines))

    def close(self) -> None:
        """End a bundle."""
        if not self.reversals and not self.lines:
            return
        self.number += 1
        self.rows.append(
            translate.correction_row(
                partition=self.partition,
                number=self.number,
                recorded_at=self.recorded_at,
                lines=self.lines,
                reversals=self.reversals,
            )
        )
        self.reversals, self.lines = [], []


async def write(
    connection: Connection,
    changes: Sequence[Change],
    task: Task,
    *,
    heads: Mapping[int, Head],
    counters: Mapping[CounterKey, Counter],
) -> Written:
    """Write what becomes of uses, and stage what the ledger is told. The caller holds the heads."""
    if not changes:
        return Written()
    present, units = now(), task.book.units
    ordered = sorted(changes, key=lambda each: (each.found.place.partition, each.found.place.occurred_at))
    postings: dict[int, _Postings] = {}
    for partition in sorted({each.found.place.partition for each in ordered}):
        head = heads[partition]
        postings[partition] = _Postings(partition, head.outbox_number, advance(head, now=present))
    items, new_versions, new_waiting = [], [], []
    tally: dict[tuple[int, str], IngestCounts] = {}
    for change in ordered:
        of = postings[change.found.place.partition]
        posting = _posting(change, units)
        line = None
        if isinstance(change.to, Charged) and (posting.charged or change.to.usage.revision == 0):
            # What was never charged is, even if that is nothing; else what is to be charged more.
            amounts = posting.charged if change.to.usage.revision else change.to.amounts
            line = translate.difference_line(
                change.to.usage, amounts, price_version=change.to.price_version, units=units
            )
        placed = of.add(_reversals(change, posting, task), line)
        match change.to:
            case Charged() | Waits():
                new_versions.append(_version(change.to, posting, placed, recorded_at=of.recorded_at))
            case WaitsForAlias() | Voided():
                pass
            case _:
                assert_never(change.to)
        if (waits := _waiting(change, recorded_at=of.recorded_at)) is not None:
            new_waiting.append(waits)
        items.append(_item(change, posting, recorded_at=of.recorded_at))
        _tally(change, tally)
    for each in postings.values():
        each.close()
    rows = [row for each in postings.values() for row in each.rows]
    await stage(connection, rows)
    await store.move_heads(
        connection,
        {each.partition: Head(outbox_number=each.number, recorded_at=each.recorded_at) for each in postings.values()},
    )
    await versions.supersede(connection, [each.found.current for each in ordered if each.found.current is not None])
    await versions.wait_no_more(
        connection, {each.found.place.key for each in ordered if each.found.waiting is not None}
    )
    await versions.add_versions(connection, new_versions)
    await versions.wait_for(connection, new_waiting)
    await store.write_counters(connection, counters)
    await store.count(connection, tally)
    return Written(items, rows, counters)


def _posting(change: Change, units: Mapping[str, Unit]) -> Posting:
    return post(change.found.history(units), change.to.amounts if isinstance(change.to, Charged) else {})


def _reversals(change: Change, posting: Posting, task: Task) -> list[msgspec.Raw]:
    if not posting.given_back:
        return []
    # Account, source and id are the same in all of them.
    usage = change.found.versions[-1].usage()
    return [
        translate.reversal_line(
            usage,
            each.amounts,
            revision=each.revision,
            correction=task.id,
            reason=task.reason,
            units=task.book.units,
        )
        for each in posting.given_back
    ]


def _version(
    to: Charged | Waits, posting: Posting, placed: tuple[int, int] | None, *, recorded_at: datetime
) -> NewVersion:
    first = to.usage.revision == 0
    if isinstance(to, Waits):
        posted = None if first else versions.posted_as_json(charged=None, given_back=posting.noted)
        return NewVersion(usage=to.usage, recorded_at=recorded_at, posted=posted)
    number, line = placed or (None, None)
    return NewVersion(
        usage=to.usage,
        recorded_at=recorded_at,
        posted=None if first else versions.posted_as_json(charged=posting.charged, given_back=posting.noted),
        price_version=to.price_version,
        line_items=to.line_items,
        amounts=to.amounts_json,
        bundle_number=number,
        line_number=line,
    )


def _waiting(change: Change, *, recorded_at: datetime) -> NewWaiting | None:
    place = change.found.place
    match change.to:
        case Waits(usage=usage, reason=reason, key=key):
            return NewWaiting(place, usage.account, reason, key, recorded_at, None, 0)
        case WaitsForAlias(body=body, subject=subject, revision=revision):
            return NewWaiting(place, None, "unmapped", subject, recorded_at, body, revision)
        case Charged() | Voided():
            return None
        case _:
            assert_never(change.to)


def _item(change: Change, posting: Posting, *, recorded_at: datetime) -> Item:
    found, to = change.found, change.to
    revision: int | None
    account: str | None
    match to:
        case Charged(usage=usage) | Waits(usage=usage):
            revision, account = usage.revision, usage.account
        case WaitsForAlias(revision=number):
            revision, account = number, None
        case Voided():
            revision, account = None, found.account
        case _:
            assert_never(to)
    return Item(
        partition=found.place.partition,
        source=found.place.source,
        event_id=found.place.event_id,
        occurred_at=found.place.occurred_at,
        account=account,
        from_revision=found.revision,
        to_revision=revision,
        charged=isinstance(to, Charged),
        difference={unit: steps for unit, steps in posting.difference.items() if steps},
        counted=change.counted,
        body=None if found.waiting is None else found.waiting.body,
        recorded_at=recorded_at,
    )


def _tally(change: Change, tally: dict[tuple[int, str], IngestCounts]) -> None:
    counts = tally.setdefault((change.found.place.partition, change.found.place.source), IngestCounts())
    found = change.found
    was: str
    becomes: str
    if found.waiting is not None:
        was = found.waiting.reason
    elif found.is_void:
        was = "voided"
    else:
        was = "charged" if found.is_here else ""
    match change.to:
        case Charged():
            becomes = "charged"
        case Waits(reason=reason):
            becomes = reason
        case WaitsForAlias():
            becomes = "unmapped"
        case Voided():
            becomes = "voided"
        case _:
            assert_never(change.to)
    if was:
        setattr(counts, was, getattr(counts, was) - 1)
    else:
        counts.new += 1
    setattr(counts, becomes, getattr(counts, becomes) + 1)
