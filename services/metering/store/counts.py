"""What became of deliveries, counted by partition and source."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from services.metering.store.executing import Connection


@dataclass(slots=True)
class Counts:
    """What became of a source's events in one partition. As a change, what waits may be negative.

    So may `new`, for what was logged or waited here and turned out to belong elsewhere.
    """

    new: int = 0
    duplicate: int = 0
    conflicting: int = 0
    dead: int = 0
    unattributed: int = 0
    unpriced: int = 0
    charged: int = 0
    unmapped: int = 0
    rerouted: int = 0
    voided: int = 0


COUNTERS: Final = tuple(field.name for field in fields(Counts))


async def count(connection: Connection, changes: Mapping[tuple[int, str], Counts]) -> None:
    """Add to the counters of (partition, source)."""
    if not changes:
        return
    keys = sorted(changes)
    columns = [[getattr(changes[key], name) for key in keys] for name in COUNTERS]
    additions = ", ".join(f"{name} = c.{name} + excluded.{name}" for name in COUNTERS)
    await connection.execute(
        f"""
        INSERT INTO ingest_counters AS c (partition, source, {", ".join(COUNTERS)})
        SELECT unnest(%s::smallint[]), unnest(%s::text[]){", unnest(%s::bigint[])" * len(COUNTERS)}
        ON CONFLICT (partition, source) DO UPDATE SET {additions}
        """,
        [[partition for partition, _ in keys], [source for _, source in keys], *columns],
    )
