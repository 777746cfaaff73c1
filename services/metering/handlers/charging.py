"""What is new is entered: placed, counted, bundled under the next numbers, logged. The caller holds the heads."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime

from contracts.pricing import Rated
from services.kit.clock import now
from services.kit.outbox import OutboxRow, stage
from services.metering import store, translate
from services.metering.domain.charging import Bundle, Charge, Head, SetAside, advance, bundle, decide_charges
from services.metering.domain.ingest import Placed
from services.metering.domain.prices import CountedFirst, CounterKey, NoPrice, PriceBook, rate_in_order
from services.metering.domain.usage import Key, Usage
from services.metering.handlers.batches import Known, Price
from services.metering.handlers.tallying import Tally, tally_new
from services.metering.store import ChargedLine, Connection
from services.metering.translate import Priced


async def enter(
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
    rated = await count_periods(
        connection, placed.here, prices, open_accounts=known.open_accounts, price_book=price_book
    )
    decided = decide_charges(((usage, rated[usage.key]) for usage in placed.here), open_accounts=known.open_accounts)
    written = dict(priced)
    for charge in decided.charges:
        if charge.usage.key not in written:
            written[charge.usage.key] = translate.priced(charge.usage, charge.rated, units=price_book.units)
    recorded_at = recording_times(heads)
    lines, rows = await stage_charges(connection, decided.charges, heads=heads, recorded_at=recorded_at, priced=written)
    unmapped = [SetAside(usage=usage, reason="unmapped", key=usage.subject) for usage in placed.unmapped]
    await store.log_usage(connection, placed.here, recorded_at=recorded_at, charged=lines)
    await store.set_aside(connection, [*decided.set_aside, *unmapped], recorded_at=recorded_at)
    await store.add_reroutes(connection, placed.elsewhere, recorded_at=now())
    tally_new(placed, decided, tally)
    return lines, rows


def recording_times(heads: Mapping[int, Head]) -> dict[int, datetime]:
    """When what is done now is recorded, by partition: never the same time twice, never backwards."""
    present = now()
    return {partition: advance(head, now=present) for partition, head in heads.items()}


async def count_periods(
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


async def stage_charges(
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
