"""Giving back what a price has lowered of what was charged already, soon after, instead of taking it off later use.

So what an account is charged in a period under one price is what all of it costs, in whatever order it was used.
"""

from collections.abc import Callable, Collection, Sequence
from datetime import UTC
from hashlib import sha256
from typing import Final

import msgspec

from contracts.pricing import Counter, OwnPrice
from services.kit.clock import now
from services.kit.database import Writer
from services.kit.outbox import OutboxRow
from services.metering import store
from services.metering.correcting import records, versions
from services.metering.correcting.amending import CorrectionExists, total
from services.metering.correcting.changing import Change, Task, VersionNotRead, charged_again, lowered
from services.metering.correcting.records import NewCorrection, Progress
from services.metering.correcting.turns import InTurn, Turn
from services.metering.correcting.versions import Place
from services.metering.domain.corrections import NOT_COUNTED, CounterMove
from services.metering.domain.prices import CounterKey, PriceBook, period_end
from services.metering.engine import PriceKeeper
from services.metering.store import Connection

# Of a transaction: each is a line given back, and no bundle takes more.
EVENTS_MAX: Final = 250
ACTOR: Final = "metering"
REASON: Final = "later use has lowered what this cost"


async def settle(connection: Connection, key: CounterKey, *, book: PriceBook) -> Turn:
    """Give back a counter's credit to the latest use that it counts, in the caller's transaction. VersionNotRead.

    What is more than one transaction gives back stays in the counter. It is stuck if no use that is counted is there.
    """
    partition, _, price_id, _ = key
    heads = await store.lock_heads(connection, [partition])
    counter = (await store.find_counters(connection, [key])).get(key, NOT_COUNTED)
    if counter.credit >= 0:
        # Use that came meanwhile took it, or somebody else gave it back.
        return Turn()
    price = book.counted_price(price_id)
    if price is None or price.period is None:
        raise VersionNotRead(f"with {price_id}")
    changes = await _lower(connection, key, price, -counter.credit, book=book)
    if not changes:
        return Turn(is_stuck=True)
    new = _correction(key, changes, unit=price.unit)
    if not await records.begin(connection, new, state="running", recorded_at=now()):
        raise CorrectionExists(new.id)
    credit = counter.credit + sum(each.counted[0].by.credit for each in changes)
    counters = {key: Counter(quantity=counter.quantity, credit=credit)}
    task = Task(new.id, new.reason, book)
    written = await records.write_and_record(connection, changes, task, heads=heads, counters=counters)
    await records.settle_items(connection, new.id, written.items)
    counts = {"events": len(changes), "corrected": len(changes)}
    await records.write_progress(connection, new.id, Progress("done", None, counts, total(written.items), now()))
    return Turn(written.rows)


async def _lower(
    connection: Connection, key: CounterKey, price: OwnPrice, steps: int, *, book: PriceBook
) -> list[Change]:
    """The latest uses that a counter counts, each to cost less, by no more than that in all."""
    changes: list[Change] = []
    last: Place | None = None
    # Those that cost less than a step under the price have nothing to be given back: they do not hide the ones before.
    while not changes and (places := await _find_latest(connection, key, price, before=last)):
        last = places[-1]
        uses = await versions.find_uses(connection, places)
        for found in (uses[place.key] for place in places):
            if steps == 0:
                break
            assert found.current is not None
            again = charged_again(found.current, revision=found.next_revision, units=book.units)
            to, less = lowered(again, key, steps, book=book)
            if less:
                steps -= less
                changes.append(Change(found, to, [CounterMove(key, Counter(credit=less))]))
    return changes


async def _find_latest(
    connection: Connection, key: CounterKey, price: OwnPrice, *, before: Place | None
) -> list[Place]:
    """The latest uses that may have been charged something under a price in a period, before one of them."""
    partition, account, price_id, period = key
    assert price.period is not None
    place = None if before is None else (before.occurred_at, before.source, before.event_id)
    cursor = await connection.execute(
        """
        SELECT partition, source, event_id, occurred_at FROM usage_log
        WHERE partition = %(partition)s AND account = %(account)s AND type = %(type)s
              AND occurred_at >= %(since)s AND occurred_at < %(until)s AND NOT superseded
              AND (%(at)s::timestamptz IS NULL
                   OR (occurred_at, source, event_id) < (%(at)s::timestamptz, %(source)s::text, %(event_id)s::text))
              AND (SELECT sum((each ->> 'exact')::numeric) FROM jsonb_array_elements(line_items) AS each
                   WHERE each ->> 'price_id' = %(price)s) > 0
              AND EXISTS (SELECT FROM jsonb_array_elements(amounts) AS each
                          WHERE each ->> 'unit' = %(unit)s AND (each ->> 'amount')::numeric > 0)
        ORDER BY occurred_at DESC, source DESC, event_id DESC LIMIT %(limit)s
        """,
        {
            "partition": partition,
            "account": account,
            "type": price.type,
            "since": period,
            "until": period_end(price.period, period),
            **dict(zip(("at", "source", "event_id"), place or (None, None, None), strict=True)),
            "price": price_id,
            "unit": price.unit,
            "limit": EVENTS_MAX,
        },
    )
    return [Place(number, source, id, at.astimezone(UTC)) for number, source, id, at in await cursor.fetchall()]


def _correction(key: CounterKey, changes: Sequence[Change], *, unit: str) -> NewCorrection:
    """Its record. The id says what is given back, and of which versions: that is only ever done once."""
    partition, account, price, period = key
    given_back = [
        (each.found.place.source, each.found.place.event_id, each.found.next_revision, each.counted[0].by.credit)
        for each in changes
    ]
    body_hash = sha256(msgspec.json.encode((partition, account, price, period, given_back))).digest()
    return NewCorrection(
        id=f"settle:{body_hash.hex()[:32]}",
        kind="settle",
        body_hash=body_hash,
        parameters=records.as_json({"account": account, "price": price, "period": period.isoformat(), "unit": unit}),
        reason=REASON,
        actor=ACTOR,
    )


class Settler(InTurn[CounterKey]):
    """Gives back what counters of this process's partitions carry, counter by counter."""

    place = "metering.settle"
    poll_seconds = 1.0
    # What cannot be given back waits for use to be taken off; or for its month, if that is archived.
    retry_seconds = 60.0

    def __init__(
        self,
        *,
        writer: Writer,
        prices: PriceKeeper,
        partitions: Callable[[], frozenset[int]],
        notify: Callable[[Sequence[OutboxRow]], None],
    ) -> None:
        """`writer` is the settler's own. `notify` is told what has been committed to the outbox."""
        super().__init__(writer=writer, prices=prices, notify=notify)
        self._partitions = partitions

    async def find(self, connection: Connection, *, without: Collection[CounterKey]) -> CounterKey | None:
        """A counter that carries what is to be given back."""
        partitions = self._partitions()
        return await store.find_credit(connection, partitions, without=without) if partitions else None

    async def go_on(self, connection: Connection, id: CounterKey) -> Turn:
        """Give back some of it."""
        return await settle(connection, id, book=self._prices.book())
