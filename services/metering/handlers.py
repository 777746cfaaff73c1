"""What happens to use: logged once, charged once. Each handler is one transaction on a whole batch.

An answer is given (a message acknowledged) after the commit only: whoever dies before it is asked again, and finds
in `seen` what it did. All numbering happens under the lock of the partition's head, which also holds the directory and
the aliases still: an account is either found open by the batch that logs its use, or finds that use set aside when it
is opened; and likewise an alias.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import Final, assert_never

from nats.aio.msg import Msg

from contracts.envelope import Problem
from contracts.ledger import AccountOpened
from contracts.partition import partition_of
from contracts.pricing import Rated
from contracts.streams import USAGE
from services.kit import tracing
from services.kit.clock import now
from services.kit.database import Writer
from services.kit.dead_letters import Letter
from services.kit.dead_letters import record as record_letters
from services.kit.outbox import OutboxRow, stage
from services.kit.telemetry import FAULTS, get_logger
from services.metering import store, translate
from services.metering.domain.charging import (
    Bundle,
    Charge,
    Decided,
    Head,
    Reason,
    SetAside,
    advance,
    bundle,
    decide_charges,
)
from services.metering.domain.ingest import Conflict, Judged, Placed, Subject, first_of_each, judge, place
from services.metering.domain.prices import CountedFirst, CounterKey, NoPrice, PriceBook, rate_in_order
from services.metering.domain.usage import AGE_MAX, Key, Reroute, Usage
from services.metering.store import COUNTERS, Alias, ChargedLine, Connection, Counts, LoggedUsage, TakenUsage
from services.metering.translate import Priced

log = get_logger(__name__)

# Set-aside use charged in one transaction when its account opens; the rest follows in further ones.
SET_ASIDE_ROWS_MAX: Final = 5_000
# Of those each has its body.
MAPPED_ROWS_MAX: Final = 1_000

Tally = dict[tuple[int, str], Counts]
Price = Rated | NoPrice | CountedFirst


@dataclass(slots=True)
class Known:
    """What a process need not ask the database twice: it only ever becomes true, for all processes.

    `subjects` are names of open accounts that are no aliases: what is open never becomes one.
    """

    open_accounts: set[str] = field(default_factory=set)
    subjects: set[str] = field(default_factory=set)
    months: set[date] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Batch:
    """Deliveries, read and priced: everything about them that needs no database. `spans` are of those traced."""

    letters: Sequence[Letter]
    late: Sequence[translate.Late]
    misplaced: Sequence[Reroute]
    usages: Sequence[Usage]
    firsts: Sequence[Usage]
    prices: Mapping[Key, Price]
    priced: Mapping[Key, Priced]
    price_book: PriceBook
    received_at: datetime
    spans: Mapping[Key, tracing.Span] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ingested:
    """What a batch came to, and what the ledger is told of it."""

    counts: Counts
    conflicts: Sequence[Conflict]
    rows: Sequence[OutboxRow]


class Reading:
    """Reads and prices deliveries, slice by slice. Of repeats only the first is priced."""

    def __init__(self, *, price_book: PriceBook, received_at: datetime, age_max: timedelta = AGE_MAX) -> None:
        self._price_book = price_book
        self._received_at = received_at
        self._age_max = age_max
        self._letters: list[Letter] = []
        self._late: list[translate.Late] = []
        self._misplaced: list[Reroute] = []
        self._usages: list[Usage] = []
        self._prices: dict[Key, Price] = {}
        self._priced: dict[Key, Priced] = {}
        self._spans: dict[Key, tracing.Span] = {}
        self._traced = tracing.is_on()

    def add(self, messages: Iterable[Msg]) -> None:
        """Read a slice."""
        for message in messages:
            try:
                self._add(message)
            except Exception as error:
                # Reading is pure: what fails once fails always, and must not hold up what is behind it.
                FAULTS.labels(place="metering.read").inc()
                log.exception("event not readable by a fault of ours, dead-lettered", subject=message.subject)
                problem = Problem("", f"a fault of ours: {type(error).__name__}: {error}")
                self._letters.append(translate.dead(message, [problem]))

    def batch(self) -> Batch:
        """All that was read."""
        return Batch(
            letters=self._letters,
            late=self._late,
            misplaced=self._misplaced,
            usages=self._usages,
            firsts=first_of_each(self._usages),
            prices=self._prices,
            priced=self._priced,
            price_book=self._price_book,
            received_at=self._received_at,
            spans=self._spans,
        )

    def _add(self, message: Msg) -> None:
        match translate.read_delivery(message, age_max=self._age_max):
            case Usage() as usage:
                if usage.key not in self._prices:
                    span = self._begin_span(usage) if self._traced else None
                    self._price(usage, traceparent=None if span is None else span.traceparent)
                self._usages.append(usage)
            case Reroute() as misplaced:
                self._misplaced.append(misplaced)
            case translate.Late() as late:
                self._late.append(late)
            case Letter() as letter:
                self._letters.append(letter)
            case never:
                assert_never(never)

    def _price(self, usage: Usage, *, traceparent: str | None) -> None:
        price = self._price_book.price(usage)
        if isinstance(price, Rated):
            self._priced[usage.key] = translate.priced(
                usage, price, units=self._price_book.units, traceparent=traceparent
            )
        self._prices[usage.key] = price

    def _begin_span(self, usage: Usage) -> tracing.Span | None:
        """The span of a use whose report is a step of a trace. It ends once the use is logged."""
        traceparent = translate.traceparent_of(usage)
        span = tracing.message_span("meter", traceparent=traceparent)
        if span is not None:
            span.set(
                {
                    "scrip.account": usage.account,
                    "scrip.source": usage.source,
                    "scrip.event": usage.event_id,
                    "scrip.partition": usage.partition,
                    "scrip.outcome": "repeat",
                }
            )
            if usage.used is not None:
                span.set({"scrip.model": usage.used.model})
            self._spans[usage.key] = span
        return span


async def ingest(batch: Batch, *, writer: Writer, known: Known) -> Ingested:
    """Log what is new, charge it, send on what belongs elsewhere, and put aside what is dead, conflicting, or waits.

    Refuses nothing. A batch that fails has had no effect, unless its commit was cut off: then repeating it has none.
    """
    await _ensure_months(batch.usages, writer=writer, known=known)
    tally: Tally = {}
    lines: list[ChargedLine] = []
    rows: list[OutboxRow] = []
    async with writer.transaction() as connection:
        if batch.late:
            batch = await _sort_out_late(connection, batch)
        heads, claimed = {}, {}
        if batch.firsts:
            heads = await store.lock_heads(connection, {usage.partition for usage in batch.firsts})
            claimed = await store.claim(connection, batch.firsts)
        judged = judge(batch.usages, claimed=claimed)
        if judged.new:
            lines, rows = await _log_and_charge(connection, batch, judged.new, heads=heads, known=known, tally=tally)
        new_conflicts = await store.add_conflicts(connection, judged.conflicts, received_at=batch.received_at)
        await _record_letters(connection, batch.letters, tally)
        await store.add_reroutes(connection, batch.misplaced, recorded_at=batch.received_at)
        _tally_judged(judged, new_conflicts, tally)
        for each in batch.misplaced:
            _counts(tally, each).rerouted += 1
        await store.count(connection, tally)
        if answers := _answers(judged):
            await store.answer(connection, answers, recorded_at=batch.received_at)
    if batch.spans:
        _end_spans(batch.spans, judged, lines)
    return Ingested(counts=_total(tally), conflicts=new_conflicts, rows=rows)


async def _sort_out_late(connection: Connection, batch: Batch) -> Batch:
    """Of what is too old, repeats are repeats, and the rest is dead."""
    seen = await store.find_seen(connection, {each.usage.key for each in batch.late})
    repeats = [each.usage for each in batch.late if each.usage.key in seen]
    letters = [each.letter for each in batch.late if each.usage.key not in seen]
    usages = [*batch.usages, *repeats]
    return replace(batch, letters=[*batch.letters, *letters], late=(), usages=usages, firsts=first_of_each(usages))


async def put_aside(letters: Sequence[Letter], *, writer: Writer) -> None:
    """Record dead letters, each once."""
    tally: Tally = {}
    async with writer.transaction() as connection:
        await _record_letters(connection, letters, tally)
        await store.count(connection, tally)


async def open_account(fact: AccountOpened, *, writer: Writer, price_book: PriceBook) -> Sequence[OutboxRow]:
    """Let an account's use be charged from now on, and charge what was set aside for it. Repeats do nothing.

    Dying between two of its transactions leaves the rest to the repeat.
    """
    partition = partition_of(fact.account)
    rows: list[OutboxRow] = []
    while True:
        async with writer.transaction() as connection:
            heads = await store.lock_heads(connection, [partition])
            await store.add_to_directory(
                connection, partition=partition, account=fact.account, opened_at=fact.recorded_at
            )
            found = await store.find_unattributed(
                connection,
                partition=partition,
                account=fact.account,
                # Then what was reported under that name is about to go to another account.
                is_alias=bool(await store.find_aliases(connection, [(partition, fact.account)])),
                limit=SET_ASIDE_ROWS_MAX,
            )
            rows += await _charge_set_aside(connection, found, heads=heads, was="unattributed", price_book=price_book)
        if len(found) < SET_ASIDE_ROWS_MAX:
            return rows


async def charge_unpriced(partition: int, key: str, *, writer: Writer, price_book: PriceBook) -> Sequence[OutboxRow]:
    """Charge what was set aside for want of the price `key` and has one by now. Repeats do nothing.

    Dying between two of its transactions leaves the rest to the next sweep, of whichever process.
    """
    rows: list[OutboxRow] = []
    while True:
        async with writer.transaction() as connection:
            heads = await store.lock_heads(connection, [partition])
            found = await store.find_unpriced(
                connection,
                partition=partition,
                key=key,
                times=price_book.priced_times(key),
                limit=SET_ASIDE_ROWS_MAX,
            )
            rows += await _charge_set_aside(connection, found, heads=heads, was="unpriced", price_book=price_book)
        if len(found) < SET_ASIDE_ROWS_MAX:
            return rows


@dataclass(frozen=True, slots=True)
class AliasTaken:
    """The subject is the name of another account already. It is deleted first, deliberately, or left."""

    alias: Alias


@dataclass(frozen=True, slots=True)
class NamesAnAccount:
    """The subject is the id of an open account, and its use is that account's."""


async def add_alias(connection: Connection, alias: Alias) -> bool | AliasTaken | NamesAnAccount:
    """Map a subject to an account, in the caller's transaction; False if it is already. Use that waits follows soon.

    Refuses with AliasTaken and NamesAnAccount.
    """
    partition = partition_of(alias.subject)
    await store.lock_heads(connection, [partition])
    found = await store.find_alias(connection, partition=partition, subject=alias.subject)
    if found is not None:
        return False if found.account == alias.account else AliasTaken(found)
    if await store.find_open(connection, [(partition, alias.subject)]):
        return NamesAnAccount()
    await store.add_alias(connection, alias, partition=partition)
    return True


async def delete_alias(connection: Connection, subject: str) -> bool:
    """Forget an alias, in the caller's transaction; whether there was one. What was charged by it stays."""
    partition = partition_of(subject)
    await store.lock_heads(connection, [partition])
    return await store.delete_alias(connection, partition=partition, subject=subject)


async def charge_mapped(subject: str, *, writer: Writer, price_book: PriceBook) -> Sequence[OutboxRow]:
    """Charge or send on what waited under a subject that is an alias now. Repeats do nothing.

    Dying between two of its transactions leaves the rest to the next sweep, of whichever process.
    """
    partition = partition_of(subject)
    rows: list[OutboxRow] = []
    left = True
    while left:
        async with writer.transaction() as connection:
            heads = await store.lock_heads(connection, [partition])
            aliases = await store.find_aliases(connection, [(partition, subject)])
            if not aliases:
                return rows
            left = False
            for reason in _BEFORE_AN_ALIAS:
                taken = await store.take_waiting(
                    connection, partition=partition, subject=subject, reason=reason, limit=MAPPED_ROWS_MAX
                )
                left = left or len(taken) == MAPPED_ROWS_MAX
                rows += await _charge_taken(
                    connection, taken, subject=subject, heads=heads, aliases=aliases, was=reason, price_book=price_book
                )
                # It has moved, if anything was charged.
                heads = await store.lock_heads(connection, [partition])
            if not left:
                await store.settle_alias(connection, partition=partition, subject=subject)
    return rows


# Use waits under its subject because nobody has that name, or because an account might that is not open.
_BEFORE_AN_ALIAS: Final[tuple[Reason, ...]] = ("unmapped", "unattributed")


async def _charge_taken(
    connection: Connection,
    taken: Sequence[TakenUsage],
    *,
    subject: str,
    heads: Mapping[int, Head],
    aliases: Mapping[Subject, str],
    was: Reason,
    price_book: PriceBook,
) -> list[OutboxRow]:
    """Log and charge, or send on, what has waited for an alias, as if it came now."""
    usages = [
        translate.waiting_usage(each.body, occurred_at=each.occurred_at, body_hash=each.body_hash)
        if each.body is not None
        else translate.taken_usage(
            source=each.source,
            event_id=each.event_id,
            subject=subject,
            type=each.type or "",
            occurred_at=each.occurred_at,
            data=each.data or "{}",
            context=each.context,
            body_hash=each.body_hash,
        )
        for each in taken
    ]
    tally: Tally = {}
    for usage in usages:
        counts = _counts(tally, usage)
        counts.new -= 1
        _wait_no_more(counts, was)
    placed = place(usages, aliases=aliases)
    prices = {usage.key: price_book.price(usage) for usage in placed.here}
    rows: list[OutboxRow] = []
    if usages:
        _, rows = await _enter(
            connection, placed, heads=heads, prices=prices, priced={}, price_book=price_book, known=Known(), tally=tally
        )
    await store.count(connection, tally)
    return rows


async def _log_and_charge(
    connection: Connection,
    batch: Batch,
    new: Sequence[Usage],
    *,
    heads: Mapping[int, Head],
    known: Known,
    tally: Tally,
) -> tuple[list[ChargedLine], list[OutboxRow]]:
    # The heads are locked: nobody opens an account of these partitions meanwhile, or maps a subject.
    aliases = await _find_aliases(connection, new, known)
    placed = place(new, aliases=aliases)
    prices, priced = batch.prices, batch.priced
    if aliases:
        # When the batch was read these had no account, or another one.
        sent_on = {usage.key for usage in new if usage.is_mapped}
        mapped = {usage.key: usage for usage in placed.here if usage.is_mapped and usage.key not in sent_on}
        prices = {**prices, **{key: batch.price_book.price(usage) for key, usage in mapped.items()}}
        priced = {key: each for key, each in priced.items() if key not in mapped}
    return await _enter(
        connection,
        placed,
        heads=heads,
        prices=prices,
        priced=priced,
        price_book=batch.price_book,
        known=known,
        tally=tally,
    )


async def _find_aliases(connection: Connection, new: Iterable[Usage], known: Known) -> Mapping[Subject, str]:
    """The aliases among subjects, as far as it is not known of them that they are none."""
    unknown = {
        (usage.partition, usage.subject) for usage in new if usage.subject not in known.subjects and not usage.is_mapped
    }
    if not unknown:
        return {}
    aliases = await store.find_aliases(connection, unknown)
    open_accounts = await store.find_open(connection, unknown)
    known.open_accounts |= open_accounts
    known.subjects |= open_accounts - {subject for _, subject in aliases}
    return aliases


async def _enter(
    connection: Connection,
    placed: Placed,
    *,
    heads: Mapping[int, Head],
    prices: Mapping[Key, Price],
    priced: Mapping[Key, Priced],
    price_book: PriceBook,
    known: Known,
    tally: Tally,
) -> tuple[list[ChargedLine], list[OutboxRow]]:
    """Log what belongs here and charge it; send on what does not; have wait what nobody knows whose it is."""
    unknown = {(usage.partition, usage.account) for usage in placed.here if usage.account not in known.open_accounts}
    if unknown:
        known.open_accounts |= await store.find_open(connection, unknown)
    rated = await _count(connection, placed.here, prices, open_accounts=known.open_accounts, price_book=price_book)
    decided = decide_charges(((usage, rated[usage.key]) for usage in placed.here), open_accounts=known.open_accounts)
    written = dict(priced)
    for charge in decided.charges:
        if charge.usage.key not in written:
            written[charge.usage.key] = translate.priced(charge.usage, charge.rated, units=price_book.units)
    recorded_at = _recording_times(heads)
    lines, rows = await _stage(connection, decided.charges, heads=heads, recorded_at=recorded_at, priced=written)
    unmapped = [SetAside(usage=usage, reason="unmapped", key=usage.subject) for usage in placed.unmapped]
    await store.log_usage(connection, placed.here, recorded_at=recorded_at, charged=lines)
    await store.set_aside(connection, [*decided.set_aside, *unmapped], recorded_at=recorded_at)
    await store.add_reroutes(connection, placed.elsewhere, recorded_at=now())
    _tally_new(placed, decided, tally)
    return lines, rows


async def _charge_set_aside(
    connection: Connection,
    found: Sequence[LoggedUsage],
    *,
    heads: Mapping[int, Head],
    was: Reason,
    price_book: PriceBook,
) -> list[OutboxRow]:
    """Charge what has waited and has a price and an open account now; what the ledger is told of it.

    The caller holds the heads. What has no price waits for that, so that it is not found again under its old key.
    """
    if not found:
        return []
    usages = [
        translate.logged_usage(
            partition=row.partition,
            source=row.source,
            event_id=row.event_id,
            account=row.account,
            type=row.type,
            occurred_at=row.occurred_at,
            data=row.data,
            subject=row.subject,
            revision=row.revision,
        )
        for row in found
    ]
    # Either it is the account that has just been opened, or the account was open when the price was missing.
    open_accounts = {usage.account for usage in usages}
    prices = {usage.key: price_book.price(usage) for usage in usages}
    rated = await _count(connection, usages, prices, open_accounts=open_accounts, price_book=price_book)
    decided = decide_charges(((usage, rated[usage.key]) for usage in usages), open_accounts=open_accounts)
    priced = {
        charge.usage.key: translate.priced(charge.usage, charge.rated, units=price_book.units)
        for charge in decided.charges
    }
    recorded_at = _recording_times(heads)
    lines, rows = await _stage(connection, decided.charges, heads=heads, recorded_at=recorded_at, priced=priced)
    await store.log_charges(connection, lines)
    await store.wait_for_price(connection, decided.set_aside)
    tally: Tally = {}
    for charge in decided.charges:
        counts = _counts(tally, charge.usage)
        counts.charged += 1
    for each in decided.set_aside:
        counts = _counts(tally, each.usage)
        counts.unpriced += 1
    for usage in usages:
        _wait_no_more(_counts(tally, usage), was)
    await store.count(connection, tally)
    return rows


async def _count(
    connection: Connection,
    usages: Sequence[Usage],
    prices: Mapping[Key, Price],
    *,
    open_accounts: Collection[str],
    price_book: PriceBook,
) -> Mapping[Key, Rated | NoPrice]:
    """What uses cost, of those too whose price depends on what was used before in a period. The caller holds the heads.

    Only what is charged is counted: what has no open account is not, and then has no price yet.
    """
    found = {key: price for key, price in prices.items() if not isinstance(price, CountedFirst)}
    if len(found) == len(prices):
        return found
    counted: list[Usage] = []
    keys: set[CounterKey] = set()
    for usage in usages:
        price = prices[usage.key]
        if not isinstance(price, CountedFirst):
            continue
        if usage.account in open_accounts:
            counted.append(usage)
            keys.update(price.counters)
        else:
            found[usage.key] = NoPrice(key=usage.account)
    rated, moved = rate_in_order(counted, book=price_book, counters=await store.find_counters(connection, keys))
    await store.write_counters(connection, moved)
    return found | rated


async def _stage(
    connection: Connection,
    charges: Sequence[Charge],
    *,
    heads: Mapping[int, Head],
    recorded_at: Mapping[int, datetime],
    priced: Mapping[Key, Priced],
) -> tuple[list[ChargedLine], list[OutboxRow]]:
    """Bundle charges under the next numbers of their partitions, and move the heads there."""
    bundles = bundle(charges, heads=heads, recorded_at=recorded_at)
    rows = [translate.outbox_row(each, (priced[charge.usage.key].line for charge in each.charges)) for each in bundles]
    await stage(connection, rows)
    numbers = {row.partition: row.number for row in rows}
    await store.move_heads(
        connection,
        {
            partition: Head(
                outbox_number=numbers.get(partition, head.outbox_number), recorded_at=recorded_at[partition]
            )
            for partition, head in heads.items()
        },
    )
    return [line for each in bundles for line in _lines(each, priced)], rows


def _lines(of: Bundle, priced: Mapping[Key, Priced]) -> Iterable[ChargedLine]:
    for number, charge in enumerate(of.charges, start=1):
        usage = charge.usage
        as_json = priced[usage.key]
        yield ChargedLine(usage, charge.rated.price_version, as_json.items, as_json.amounts, of.number, number)


def _end_spans(spans: Mapping[Key, tracing.Span], judged: Judged, lines: Iterable[ChargedLine]) -> None:
    """End the spans of a batch that is committed, each with what became of its use."""
    for conflict in judged.conflicts:
        if (span := spans.get(conflict.usage.key)) is not None:
            span.set({"scrip.outcome": "conflict"})
    for usage in judged.new:
        if (span := spans.get(usage.key)) is not None:
            span.set({"scrip.outcome": "set_aside"})
    for line in lines:
        if (span := spans.get(line.usage.key)) is not None:
            span.set(
                {
                    "scrip.outcome": "charged",
                    "scrip.bundle": line.bundle_number,
                    "scrip.line": line.line_number,
                    "scrip.price_version": line.price_version,
                    "scrip.amounts": line.amounts,
                }
            )
    for span in spans.values():
        span.end()


def _recording_times(heads: Mapping[int, Head]) -> dict[int, datetime]:
    present = now()
    return {partition: advance(head, now=present) for partition, head in heads.items()}


async def _ensure_months(usages: Iterable[Usage], *, writer: Writer, known: Known) -> None:
    """Have the log's tables for the batch made, before and apart from its transaction: making one locks the log."""
    times = {(usage.occurred_at.year, usage.occurred_at.month) for usage in usages}
    months = {date(year, month, 1) for year, month in times} - known.months
    wanted = {month for month in months if month >= store.FIRST_MONTH}
    if wanted:
        async with writer.transaction() as connection:
            await store.ensure_months(connection, wanted)
    known.months |= months


async def _record_letters(connection: Connection, letters: Sequence[Letter], tally: Tally) -> None:
    """Record letters. One that was recorded before (a redelivery) does not count again."""
    await record_letters(connection, [letter for letter in letters if letter.stream != USAGE])
    by_reporter: dict[tuple[int, str], list[Letter]] = {}
    for letter in letters:
        if letter.stream == USAGE:
            key = (letter.partition or 0, translate.source_of(letter))
            by_reporter.setdefault(key, []).append(letter)
    for key, of_reporter in sorted(by_reporter.items()):
        recorded = await record_letters(connection, sorted(of_reporter, key=lambda letter: letter.stream_sequence))
        tally.setdefault(key, Counts()).dead += recorded


def _tally_new(placed: Placed, decided: Decided, tally: Tally) -> None:
    for key, count in _by_source(placed.here).items():
        tally.setdefault(key, Counts()).new += count
    for usage in placed.unmapped:
        counts = _counts(tally, usage)
        counts.new += 1
        counts.unmapped += 1
    for rerouted in placed.elsewhere:
        # Not new here: it is where it goes to.
        _counts(tally, rerouted).rerouted += 1
    for key, count in _by_source(charge.usage for charge in decided.charges).items():
        tally.setdefault(key, Counts()).charged += count
    for each in decided.set_aside:
        counts = _counts(tally, each.usage)
        match each.reason:
            case "unattributed":
                counts.unattributed += 1
            case "unpriced":
                counts.unpriced += 1
            case "unmapped":
                counts.unmapped += 1
            case _:
                assert_never(each.reason)


def _wait_no_more(counts: Counts, was: Reason) -> None:
    match was:
        case "unattributed":
            counts.unattributed -= 1
        case "unpriced":
            counts.unpriced -= 1
        case "unmapped":
            counts.unmapped -= 1
        case _:
            assert_never(was)


def _answers(judged: Judged) -> dict[tuple[int, str], str]:
    """What became of reports that somebody asks about."""
    outcomes: tuple[tuple[Iterable[Usage], str], ...] = (
        (judged.new, "new"),
        (judged.repeats, "duplicate"),
        ((conflict.usage for conflict in judged.conflicts), "conflicting"),
    )
    return {
        (usage.partition, usage.question): outcome
        for usages, outcome in outcomes
        for usage in usages
        if usage.question is not None
    }


def _tally_judged(judged: Judged, new_conflicts: Sequence[Conflict], tally: Tally) -> None:
    """A conflict counts once; the same content once more is a repeat of it."""
    for usage in judged.repeats:
        _counts(tally, usage).duplicate += 1
    for conflict in judged.conflicts:
        _counts(tally, conflict.usage).duplicate += 1
    for conflict in new_conflicts:
        counts = _counts(tally, conflict.usage)
        counts.conflicting += 1
        counts.duplicate -= 1


def _by_source(usages: Iterable[Usage]) -> Mapping[tuple[int, str], int]:
    return Counter([(usage.partition, usage.source) for usage in usages])


def _counts(tally: Tally, of: Usage | Reroute) -> Counts:
    key = (of.partition, of.source)
    if (counts := tally.get(key)) is None:
        counts = tally[key] = Counts()
    return counts


def _total(tally: Tally) -> Counts:
    """The sums over partitions and sources."""
    return Counts(*(sum(getattr(counts, name) for counts in tally.values()) for name in COUNTERS))
