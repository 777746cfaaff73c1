"""The records of corrections: what was asked for, how far it is, and what it did to which use."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final, NamedTuple

import msgspec
from psycopg.rows import class_row

from contracts.partition import PARTITION_COUNT, partition_of
from contracts.pricing import Counter
from services.metering.correcting.changing import Change, Item, Task, Written, write
from services.metering.domain.charging import Head
from services.metering.domain.corrections import Amounts, CounterMove, Kind, State
from services.metering.domain.prices import CounterKey
from services.metering.domain.usage import Key
from services.metering.store import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCorrection:
    """A correction that is asked for. `parameters` is JSON; under one id there is one body hash."""

    id: str
    kind: Kind
    body_hash: bytes
    parameters: str
    reason: str
    actor: str

    @property
    def partition(self) -> int:
        """Where its row is."""
        return partition_of(self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A correction as it is recorded. `parameters`, `counts`, `difference` and `cursor` are JSON."""

    id: str
    kind: Kind
    state: State
    body_hash: bytes
    parameters: str
    reason: str
    actor: str
    recorded_at: datetime
    finished_at: datetime | None
    cursor: str | None
    counts: str
    difference: str
    undone_by: str | None
    undo_reason: str | None
    undone_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedItem:
    """What a correction did to a use, as it is recorded; `difference` is JSON, in steps."""

    partition: int
    correction: str
    source: str
    event_id: str
    occurred_at: datetime
    account: str | None
    from_revision: int | None
    to_revision: int | None
    stands_as: int | None
    charged: bool
    difference: str
    counted: str | None
    body: bytes | None
    recorded_at: datetime
    undone: bool
    undone_revision: int | None

    @property
    def key(self) -> Key:
        """The key of the use."""
        return (self.partition, self.source, self.event_id)

    @property
    def place(self) -> "ItemPlace":
        """Where it comes in the order in which corrections are undone."""
        return (self.partition, self.recorded_at, self.occurred_at, self.source, self.event_id)

    @property
    def moves(self) -> list[CounterMove]:
        """By how much counters moved."""
        return [
            CounterMove(
                (self.partition, each.account, each.price, each.period.astimezone(UTC)),
                Counter(quantity=Decimal(each.quantity), credit=each.credit),
                at=None if each.at is None else Decimal(each.at),
            )
            for each in (_MOVES.decode(self.counted) if self.counted else ())
        ]


class _Move(msgspec.Struct, omit_defaults=True):
    account: str
    price: str
    period: datetime
    quantity: str
    credit: int
    at: str | None = None


_MOVES: Final = msgspec.json.Decoder(list[_Move])
_AMOUNTS: Final = msgspec.json.Decoder(dict[str, int])


def amounts_from(text: str) -> dict[str, int]:
    """Steps by unit."""
    return _AMOUNTS.decode(text)


def as_json(value: Mapping[str, object]) -> str:
    """Counts, amounts and parameters as they are stored."""
    return msgspec.json.encode(value).decode()


def sum_of(found: Amounts, further: Amounts) -> dict[str, int]:
    """Two of them together, without what is zero."""
    return {name: total for name in sorted({*found, *further}) if (total := found.get(name, 0) + further.get(name, 0))}


async def begin(connection: Connection, new: NewCorrection, *, state: State, recorded_at: datetime) -> bool:
    """Record that a correction is asked for; False if it was before. Waits for another transaction that does so."""
    cursor = await connection.execute(
        """
        INSERT INTO corrections (partition, id, kind, state, body_hash, parameters, reason, actor, recorded_at, counts,
                                 difference)
        VALUES (%s, %s, %s, %s, %s, %s::jsonb, %s, %s, %s, '{}', '{}') ON CONFLICT DO NOTHING
        """,
        [
            new.partition,
            new.id,
            new.kind,
            state,
            new.body_hash,
            new.parameters,
            new.reason,
            new.actor,
            recorded_at,
        ],
    )
    return cursor.rowcount == 1


async def find(connection: Connection, id: str, *, lock: bool = False) -> Correction | None:
    """A correction. Locked, nobody else goes on with it until the end of the transaction."""
    async with connection.cursor(row_factory=class_row(Correction)) as cursor:
        await cursor.execute(
            f"SELECT {_CORRECTION} FROM corrections WHERE partition = %s AND id = %s"
            f" {'FOR NO KEY UPDATE' if lock else ''}",
            [partition_of(id), id],
        )
        return await cursor.fetchone()


async def find_under_way(connection: Connection, *, without: Collection[str]) -> str | None:
    """The oldest correction that is under way and that nobody else goes on with at this moment; locked."""
    cursor = await connection.execute(
        """
        SELECT id FROM corrections WHERE state IN ('running', 'undoing') AND id <> ALL(%s)
        ORDER BY recorded_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
        """,
        [list(without)],
    )
    row = await cursor.fetchone()
    return None if row is None else str(row[0])


async def list_before(connection: Connection, place: tuple[datetime, str] | None, *, limit: int) -> list[Correction]:
    """Corrections, the latest first, before a place: time and id."""
    before = "WHERE (recorded_at, id) < (%s::timestamptz, %s::text)" if place else ""
    async with connection.cursor(row_factory=class_row(Correction)) as cursor:
        await cursor.execute(
            f"SELECT {_CORRECTION} FROM corrections {before} ORDER BY recorded_at DESC, id DESC LIMIT %s",
            [*(place or ()), limit],
        )
        return await cursor.fetchall()


_CORRECTION: Final = """
id, kind, state, body_hash, parameters::text AS parameters, reason, actor, recorded_at, finished_at,
cursor::text AS cursor, counts::text AS counts, difference::text AS difference, undone_by, undo_reason, undone_at
"""


class Progress(NamedTuple):
    """How far a correction is: JSON of its cursor, None at its end; what it came to so far."""

    state: State
    cursor: str | None
    counts: Mapping[str, int]
    difference: Amounts
    finished_at: datetime | None


async def write_progress(connection: Connection, id: str, progress: Progress) -> None:
    """Record how far a correction is, in the transaction that goes so far."""
    await connection.execute(
        """
        UPDATE corrections SET state = %s, cursor = %s::jsonb, counts = %s::jsonb, difference = %s::jsonb,
               finished_at = %s
        WHERE partition = %s AND id = %s
        """,
        [
            progress.state,
            progress.cursor,
            as_json(progress.counts),
            as_json(progress.difference),
            progress.finished_at,
            partition_of(id),
            id,
        ],
    )


async def apply(connection: Connection, id: str) -> None:
    """Record that what is staged is to be applied. The caller has the correction locked."""
    await connection.execute(
        "UPDATE corrections SET state = 'running' WHERE partition = %s AND id = %s", [partition_of(id), id]
    )


async def discard(connection: Connection, id: str, *, by: str, at: datetime) -> None:
    """Record that what is staged is never to be applied. The caller has the correction locked."""
    await connection.execute(
        """
        UPDATE corrections SET state = 'discarded', undone_by = %(by)s, undone_at = %(at)s, finished_at = %(at)s
        WHERE partition = %(partition)s AND id = %(id)s
        """,
        {"by": by, "at": at, "partition": partition_of(id), "id": id},
    )


async def begin_undo(connection: Connection, id: str, *, by: str, reason: str, at: datetime) -> None:
    """Record that a correction is to be undone. The caller has it locked."""
    await connection.execute(
        """
        UPDATE corrections SET state = 'undoing', cursor = NULL, undone_by = %s, undo_reason = %s, undone_at = %s
        WHERE partition = %s AND id = %s
        """,
        [by, reason, at, partition_of(id), id],
    )


# Items ----------------------------------------------------------------------------------------------------------------


async def write_and_record(
    connection: Connection,
    changes: Sequence[Change],
    task: Task,
    *,
    heads: Mapping[int, Head],
    counters: Mapping[CounterKey, Counter],
) -> Written:
    """Write what becomes of uses, stage what the ledger is told, and record it. The caller holds the heads."""
    written = await write(connection, changes, task, heads=heads, counters=counters)
    if written.items:
        await _add_items(connection, task.id, written.items)
    return written


async def _add_items(connection: Connection, correction: str, items: Sequence[Item]) -> None:
    await connection.execute(
        """
        INSERT INTO correction_items (partition, correction, source, event_id, occurred_at, account, from_revision,
                                      to_revision, stands_as, charged, difference, counted, body, recorded_at)
        SELECT partition, %s, source, event_id, occurred_at, account, from_revision, to_revision, to_revision, charged,
               difference::jsonb, counted::jsonb, body, recorded_at
        FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::timestamptz[], %s::text[], %s::integer[],
                    %s::integer[], %s::boolean[], %s::text[], %s::text[], %s::bytea[], %s::timestamptz[])
             AS n (partition, source, event_id, occurred_at, account, from_revision, to_revision, charged, difference,
                   counted, body, recorded_at)
        """,
        [
            correction,
            [each.partition for each in items],
            [each.source for each in items],
            [each.event_id for each in items],
            [each.occurred_at for each in items],
            [each.account for each in items],
            [each.from_revision for each in items],
            [each.to_revision for each in items],
            [each.charged for each in items],
            [as_json(each.difference) for each in items],
            [_moves_as_json(each.counted) for each in items],
            [each.body for each in items],
            [each.recorded_at for each in items],
        ],
    )


async def items_after(
    connection: Connection, correction: str, place: tuple[int, str, str], *, limit: int
) -> list[RecordedItem]:
    """What a correction did, in the order of keys, after a place: partition, source, id."""
    async with connection.cursor(row_factory=class_row(RecordedItem)) as cursor:
        await cursor.execute(
            f"""
            SELECT {_ITEM} FROM correction_items
            WHERE correction = %s AND partition = ANY(%s) AND (partition, source, event_id) > (%s, %s::text, %s::text)
            ORDER BY partition, source, event_id LIMIT %s
            """,
            # Named one by one, each is looked up by its key.
            [correction, list(range(max(place[0], 0), 64)), *place, limit],
        )
        return await cursor.fetchall()


# Partition, when it was done, and which use it was done to: time, source, id.
ItemPlace = tuple[int, datetime, datetime, str, str]


async def items_before(
    connection: Connection, correction: str, place: ItemPlace | None, *, limit: int
) -> list[RecordedItem]:
    """What a correction did, before a place, the last first: as it is undone."""
    found: list[RecordedItem] = []
    partitions = range(PARTITION_COUNT)
    if place is not None:
        partition, *rest = place
        partitions = range(partition)
        found = await _items(
            connection,
            "partition = %s AND (recorded_at, occurred_at, source, event_id)"
            " < (%s::timestamptz, %s::timestamptz, %s::text, %s::text)",
            [correction, partition, *rest, limit],
        )
    if len(found) < limit:
        # Named one by one, each is looked up by its key.
        found += await _items(connection, "partition = ANY(%s)", [correction, list(partitions), limit - len(found)])
    return found


async def _items(connection: Connection, condition: str, values: Sequence[object]) -> list[RecordedItem]:
    async with connection.cursor(row_factory=class_row(RecordedItem)) as cursor:
        await cursor.execute(
            f"""
            SELECT {_ITEM} FROM correction_items WHERE correction = %s AND {condition}
            ORDER BY partition DESC, recorded_at DESC, occurred_at DESC, source DESC, event_id DESC LIMIT %s
            """,
            values,
        )
        return await cursor.fetchall()


_ITEM: Final = """
partition, correction, source, event_id, occurred_at, account, from_revision, to_revision, stands_as, charged,
difference::text AS difference, counted::text AS counted, body, recorded_at, undone, undone_revision
"""


_NAMED: Final = """
FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::text[], %s::integer[], %s::integer[])
     AS u (partition, source, event_id, correction, from_revision, revision)
WHERE (i.partition, i.source, i.event_id) = (u.partition, u.source, u.event_id)
"""
_STANDS_AS: Final = f"""
UPDATE correction_items AS i SET stands_as = u.revision {_NAMED}
AND i.correction <> u.correction AND NOT i.undone AND i.stands_as = u.from_revision
"""
# Of earlier ones, that stood as what a later one had settled.
_STANDS_AGAIN_AS: Final = """
UPDATE correction_items AS i SET stands_as = u.revision
FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::integer[], %s::integer[], %s::integer[])
     AS u (partition, source, event_id, to_revision, stood_as, revision)
WHERE (i.partition, i.source, i.event_id) = (u.partition, u.source, u.event_id)
AND NOT i.undone AND i.to_revision < u.to_revision AND i.stands_as = u.stood_as
"""


async def undo_items(connection: Connection, undone: Sequence[tuple[RecordedItem, int | None]]) -> None:
    """Record of items that they are undone, and as which version. Who had made what is restored stands as that."""
    if not undone:
        return
    columns: list[list[object]] = [
        [item.partition for item, _ in undone],
        [item.source for item, _ in undone],
        [item.event_id for item, _ in undone],
        [item.correction for item, _ in undone],
        [item.from_revision for item, _ in undone],
        [revision for _, revision in undone],
    ]
    await connection.execute(
        f"""
        UPDATE correction_items AS i SET undone = true, undone_revision = u.revision {_NAMED}
        AND i.correction = u.correction
        """,
        columns,
    )
    await connection.execute(_STANDS_AS, columns)
    await connection.execute(
        _STANDS_AGAIN_AS,
        [
            *columns[:3],
            [item.to_revision for item, _ in undone],
            [item.stands_as for item, _ in undone],
            [revision for _, revision in undone],
        ],
    )


async def settle_items(connection: Connection, correction: str, settled: Sequence[Item]) -> None:
    """Have what earlier corrections made stand as what it is now settled as: they can be undone as before."""
    await connection.execute(
        _STANDS_AS,
        [
            [each.partition for each in settled],
            [each.source for each in settled],
            [each.event_id for each in settled],
            [correction for _ in settled],
            [each.from_revision for each in settled],
            [each.to_revision for each in settled],
        ],
    )


def _moves_as_json(moved: Sequence[CounterMove]) -> str | None:
    if not moved:
        return None
    return msgspec.json.encode(
        [
            _Move(
                account=account,
                price=price,
                period=period,
                quantity=f"{each.by.quantity:f}",
                credit=each.by.credit,
                at=None if each.at is None else f"{each.at:f}",
            )
            for each in moved
            for _, account, price, period in (each.key,)
        ]
    ).decode()
