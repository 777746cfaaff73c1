"""What counters of periods carry, charged or given back: to the latest uses that they count.

So nothing that a correction changes of what others cost has to wait for use that may never come.
"""

from collections.abc import Collection
from dataclasses import replace
from datetime import UTC
from typing import Final

from contracts.pricing import Counter, OwnPrice
from services.metering.correcting import versions
from services.metering.correcting.changing import Change, Charged, Rating, Task, VersionNotRead, charged_again, lowered
from services.metering.correcting.versions import Found, Place
from services.metering.domain.corrections import CounterMove
from services.metering.domain.prices import CounterKey, PriceBook, period_end
from services.metering.domain.usage import Key
from services.metering.store import Connection

# Of a counter in a transaction: each is a line given back, and no bundle takes more.
EVENTS_MAX: Final = 250

Changes = dict[Key, Change]


async def settle_corrected(
    connection: Connection, changes: Collection[Change], rating: Rating, task: Task
) -> list[Change]:
    """What becomes of uses that cost more or less since others are corrected, or that is undone. VersionNotRead.

    What had been carried before is not theirs. What none of them can take stays carried: what the correction itself is
    about costs what it says.
    """
    corrected = {each.found.place.key for each in changes}
    settled: Changes = {}
    for key, carried in rating.carried().items():
        left = await settle(connection, key, carried, settled, book=task.book, without=corrected, not_of=task.id)
        rating.settle(key, carried - left)
    return list(settled.values())


async def settle(
    connection: Connection,
    key: CounterKey,
    carried: int,
    settled: Changes,
    *,
    book: PriceBook,
    without: Collection[Key] = (),
    not_of: str | None = None,
) -> int:
    """Have uses that a counter counts cost less by what it carries, or the latest one more; what it carries then.

    `settled` has what becomes of uses already, and of these from now on. Not of those in `without`, nor of what the
    correction `not_of` did anything to. The caller holds the head.
    """
    price = book.counted_price(key[2])
    if price is None or price.period is None:
        raise VersionNotRead(f"with {key[2]}")
    number = 0
    last: Place | None = None
    # Those that have nothing to be given back do not hide the ones before.
    while places := await _find_latest(connection, key, price, more=carried > 0, before=last, not_of=not_of):
        last = places[-1]
        uses = await versions.find_uses(connection, places)
        for place in places:
            if not carried or number == EVENTS_MAX:
                return carried
            if place.key in without:
                continue
            change = settled.get(place.key) or _as_it_is(uses[place.key], book)
            assert isinstance(change.to, Charged)
            to, less = lowered(change.to, key, -carried, book=book)
            if less:
                carried += less
                number += 1
                moved = CounterMove(key, Counter(credit=less))
                settled[place.key] = replace(change, to=to, counted=[*change.counted, moved])
    return carried


def _as_it_is(found: Found, book: PriceBook) -> Change:
    assert found.current is not None
    return Change(found, charged_again(found.current, revision=found.next_revision, units=book.units))


async def _find_latest(
    connection: Connection, key: CounterKey, price: OwnPrice, *, more: bool, before: Place | None, not_of: str | None
) -> list[Place]:
    """The latest uses that may be counted under a price in a period, before one of them.

    Unless they are to cost more: those that were charged something under it.
    """
    partition, account, price_id, period = key
    assert price.period is not None
    place = None if before is None else (before.occurred_at, before.source, before.event_id)
    cursor = await connection.execute(
        """
        SELECT partition, source, event_id, occurred_at FROM usage_log
        WHERE partition = %(partition)s AND account = %(account)s AND type = %(type)s
              AND occurred_at >= %(since)s AND occurred_at < %(until)s AND NOT superseded AND price_version IS NOT NULL
              AND (%(at)s::timestamptz IS NULL
                   OR (occurred_at, source, event_id) < (%(at)s::timestamptz, %(source)s::text, %(event_id)s::text))
              AND NOT EXISTS (SELECT FROM correction_items AS i WHERE i.correction = %(not_of)s
                              AND (i.partition, i.source, i.event_id)
                                  = (usage_log.partition, usage_log.source, usage_log.event_id))
              AND (%(more)s OR (
                   (SELECT sum((each ->> 'exact')::numeric) FROM jsonb_array_elements(line_items) AS each
                    WHERE each ->> 'price_id' = %(price)s) > 0
                   AND EXISTS (SELECT FROM jsonb_array_elements(amounts) AS each
                               WHERE each ->> 'unit' = %(unit)s AND (each ->> 'amount')::numeric > 0)))
        ORDER BY occurred_at DESC, source DESC, event_id DESC LIMIT %(limit)s
        """,
        {
            "partition": partition,
            "account": account,
            "type": price.type,
            "since": period,
            "until": period_end(price.period, period),
            **dict(zip(("at", "source", "event_id"), place or (None, None, None), strict=True)),
            "not_of": not_of,
            "more": more,
            "price": price_id,
            "unit": price.unit,
            "limit": EVENTS_MAX,
        },
    )
    return [Place(number, source, id, at.astimezone(UTC)) for number, source, id, at in await cursor.fetchall()]
