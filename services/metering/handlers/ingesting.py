"""A batch of deliveries in one transaction: what is new is logged and charged, the rest put where it belongs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date

from contracts.streams import USAGE
from services.kit import tracing
from services.kit.database import Writer
from services.kit.dead_letters import Letter
from services.kit.dead_letters import record as record_letters
from services.kit.outbox import OutboxRow
from services.metering import store, translate
from services.metering.domain.charging import Head
from services.metering.domain.ingest import Judged, Subject, first_of_each, judge, place
from services.metering.domain.usage import Key, Usage
from services.metering.handlers.batches import Batch, Ingested, Known
from services.metering.handlers.charging import enter
from services.metering.handlers.tallying import Tally, counts_of, tally_judged, total
from services.metering.store import ChargedLine, Connection, Counts


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
        tally_judged(judged, new_conflicts, tally)
        for each in batch.misplaced:
            counts_of(tally, each).rerouted += 1
        await store.count(connection, tally)
        if answers := _answers(judged):
            await store.answer(connection, answers, recorded_at=batch.received_at)
    if batch.spans:
        _end_spans(batch.spans, judged, lines)
    return Ingested(counts=total(tally), conflicts=new_conflicts, rows=rows)


async def put_aside(letters: Sequence[Letter], *, writer: Writer) -> None:
    """Record dead letters, each once."""
    tally: Tally = {}
    async with writer.transaction() as connection:
        await _record_letters(connection, letters, tally)
        await store.count(connection, tally)


async def _sort_out_late(connection: Connection, batch: Batch) -> Batch:
    """Of what is too old, repeats are repeats, and the rest is dead."""
    seen = await store.find_seen(connection, {each.usage.key for each in batch.late})
    repeats = [each.usage for each in batch.late if each.usage.key in seen]
    letters = [each.letter for each in batch.late if each.usage.key not in seen]
    usages = [*batch.usages, *repeats]
    return replace(batch, letters=[*batch.letters, *letters], late=(), usages=usages, firsts=first_of_each(usages))


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
    return await enter(
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


async def _ensure_months(usages: Iterable[Usage], *, writer: Writer, known: Known) -> None:
    """Have the log's tables for the batch made, before and apart from its transaction: making one locks the log."""
    times = {(usage.occurred_at.year, usage.occurred_at.month) for usage in usages}
    months = {date(year, month, 1) for year, month in times} - known.months
    wanted = {month for month in months if month >= store.FIRST_MONTH}
    if wanted:
        async with writer.transaction() as connection:
            await store.ensure_months(connection, wanted)
    known.months |= months


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
