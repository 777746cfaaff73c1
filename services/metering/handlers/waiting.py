"""Use that waited for an account or a price is charged once that is there."""

from collections.abc import Mapping, Sequence
from typing import Final

from contracts.ledger import AccountOpened
from contracts.partition import partition_of
from services.kit.database import Writer
from services.kit.outbox import OutboxRow
from services.metering import store, translate
from services.metering.domain.charging import Head, Reason, decide_charges
from services.metering.domain.prices import PriceBook
from services.metering.handlers.charging import count_periods, recording_times, stage_charges
from services.metering.handlers.tallying import Tally, counts_of, wait_no_more
from services.metering.store import Connection, LoggedUsage

# Set-aside use charged in one transaction when its account opens; the rest follows in further ones.
SET_ASIDE_ROWS_MAX: Final = 5_000


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
    rated = await count_periods(connection, usages, prices, open_accounts=open_accounts, price_book=price_book)
    decided = decide_charges(((usage, rated[usage.key]) for usage in usages), open_accounts=open_accounts)
    priced = {
        charge.usage.key: translate.priced(charge.usage, charge.rated, units=price_book.units)
        for charge in decided.charges
    }
    recorded_at = recording_times(heads)
    lines, rows = await stage_charges(connection, decided.charges, heads=heads, recorded_at=recorded_at, priced=priced)
    await store.log_charges(connection, lines)
    await store.wait_for_price(connection, decided.set_aside)
    tally: Tally = {}
    for charge in decided.charges:
        counts = counts_of(tally, charge.usage)
        counts.charged += 1
    for each in decided.set_aside:
        counts = counts_of(tally, each.usage)
        counts.unpriced += 1
    for usage in usages:
        wait_no_more(counts_of(tally, usage), was)
    await store.count(connection, tally)
    return rows
