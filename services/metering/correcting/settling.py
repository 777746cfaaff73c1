"""Giving back what a price has lowered of what was charged already, soon after, instead of taking it off later use.

So what an account is charged in a period under one price is what all of it costs, in whatever order it was used.
"""

from collections.abc import Callable, Collection, Sequence
from hashlib import sha256
from typing import Final

import msgspec

from contracts.pricing import Counter
from services.kit.clock import now
from services.kit.database import Writer
from services.kit.outbox import OutboxRow
from services.metering import store
from services.metering.correcting import carrying, records
from services.metering.correcting.amending import CorrectionExists, total
from services.metering.correcting.carrying import Changes
from services.metering.correcting.changing import Change, Task
from services.metering.correcting.records import NewCorrection, Progress
from services.metering.correcting.turns import InTurn, Turn
from services.metering.domain.corrections import NOT_COUNTED
from services.metering.domain.prices import CounterKey, PriceBook
from services.metering.engine import PriceKeeper
from services.metering.store import Connection

ACTOR: Final = "metering"
REASON: Final = "later use has lowered what this cost"


async def settle(connection: Connection, key: CounterKey, *, book: PriceBook) -> Turn:
    """Give back a counter's credit to the latest use that it counts, in the caller's transaction. VersionNotRead.

    What is more than one transaction gives back stays in the counter. It is stuck if no use that is counted is there.
    """
    heads = await store.lock_heads(connection, [key[0]])
    counter = (await store.find_counters(connection, [key])).get(key, NOT_COUNTED)
    if counter.credit >= 0:
        # Use that came meanwhile took it, or somebody else gave it back.
        return Turn()
    settled: Changes = {}
    credit = await carrying.settle(connection, key, counter.credit, settled, book=book)
    changes = list(settled.values())
    if not changes:
        return Turn(is_stuck=True)
    new = _correction(key, changes, book)
    if not await records.begin(connection, new, state="running", recorded_at=now()):
        raise CorrectionExists(new.id)
    counters = {key: Counter(quantity=counter.quantity, credit=credit)}
    task = Task(new.id, new.reason, book)
    written = await records.write_and_record(connection, changes, task, heads=heads, counters=counters)
    await records.settle_items(connection, new.id, written.items)
    counts = {"events": len(changes), "corrected": len(changes)}
    await records.write_progress(connection, new.id, Progress("done", None, counts, total(written.items), now()))
    return Turn(written.rows)


def _correction(key: CounterKey, changes: Sequence[Change], book: PriceBook) -> NewCorrection:
    """Its record. The id says what is given back, and of which versions: that is only ever done once."""
    partition, account, price, period = key
    counted = book.counted_price(price)
    assert counted is not None
    given_back = [
        (each.found.place.source, each.found.place.event_id, each.found.next_revision, each.counted[0].by.credit)
        for each in changes
    ]
    body_hash = sha256(msgspec.json.encode((partition, account, price, period, given_back))).digest()
    return NewCorrection(
        id=f"settle:{body_hash.hex()[:32]}",
        kind="settle",
        body_hash=body_hash,
        parameters=records.as_json(
            {"account": account, "price": price, "period": period.isoformat(), "unit": counted.unit}
        ),
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
