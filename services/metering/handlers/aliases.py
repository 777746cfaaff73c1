"""What publishers call accounts: set, forgotten, and what waited under such a name charged or sent on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from contracts.partition import partition_of
from services.kit.database import Writer
from services.kit.outbox import OutboxRow
from services.metering import store, translate
from services.metering.domain.charging import Head, Reason
from services.metering.domain.ingest import Subject, place
from services.metering.domain.prices import PriceBook
from services.metering.handlers.batches import Known
from services.metering.handlers.charging import enter
from services.metering.handlers.tallying import Tally, counts_of, wait_no_more
from services.metering.store import Alias, Connection, TakenUsage

# Taken in one transaction: fewer than of what is set aside otherwise, for each may have its body.
MAPPED_ROWS_MAX: Final = 1_000

# Use waits under its subject because nobody has that name, or because an account might that is not open.
_BEFORE_AN_ALIAS: Final[tuple[Reason, ...]] = ("unmapped", "unattributed")


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
        counts = counts_of(tally, usage)
        counts.new -= 1
        wait_no_more(counts, was)
    placed = place(usages, aliases=aliases)
    prices = {usage.key: price_book.price(usage) for usage in placed.here}
    rows: list[OutboxRow] = []
    if usages:
        _, rows = await enter(
            connection, placed, heads=heads, prices=prices, priced={}, price_book=price_book, known=Known(), tally=tally
        )
    await store.count(connection, tally)
    return rows
