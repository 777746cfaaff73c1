"""The permanent usage log: use as it came, and its charge."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Final

import msgspec

from services.kit.database import copy_text
from services.metering.domain.usage import Usage
from services.metering.store.executing import Connection, time_text

# Use before this is logged in the table of what no month takes.
FIRST_MONTH: Final = date(2020, 1, 1)


class ChargedLine(msgspec.Struct, frozen=True, gc=False):
    """What the log keeps of a charge. `line_items` and `amounts` are JSON."""

    usage: Usage
    price_version: str
    line_items: str
    amounts: str
    bundle_number: int
    line_number: int


@dataclass(frozen=True, slots=True)
class LoggedUsage:
    """The columns of a log row that pricing needs; `data` is JSON."""

    partition: int
    source: str
    event_id: str
    account: str
    type: str
    occurred_at: datetime
    data: str
    subject: str | None
    revision: int


async def log_usage(
    connection: Connection,
    usages: Sequence[Usage],
    *,
    recorded_at: Mapping[int, datetime],
    charged: Sequence[ChargedLine],
) -> None:
    """Add usages to the log, with their charge where they have one."""
    times = {partition: str(time) for partition, time in recorded_at.items()}
    rows = [
        (
            *_said(line.usage, times),
            line.price_version,
            line.line_items,
            line.amounts,
            str(line.bundle_number),
            str(line.line_number),
        )
        for line in charged
    ]
    if len(charged) < len(usages):
        keys = {line.usage.key for line in charged}
        rows += [(*_said(usage, times), "", "", "", "", "") for usage in usages if usage.key not in keys]
    async with (
        connection.cursor() as cursor,
        cursor.copy(
            """
            COPY usage_log (partition, occurred_at, source, event_id, account, type, recorded_at, data, context,
                            subject, price_version, line_items, amounts, bundle_number, line_number)
            FROM STDIN (NULL '')
            """
        ) as copy,
    ):
        await copy.write(copy_text(rows))


def _said(usage: Usage, recorded_at: Mapping[int, str]) -> tuple[str, ...]:
    return (
        str(usage.partition),
        time_text(usage.occurred_at),
        usage.source,
        usage.event_id,
        usage.account,
        usage.type,
        recorded_at[usage.partition],
        usage.data,
        usage.context or "",
        "" if usage.subject == usage.account else usage.subject,
    )


async def log_charges(connection: Connection, lines: Sequence[ChargedLine]) -> None:
    """Enter charges into the log and let their use wait no longer."""
    if not lines:
        return
    usages = [line.usage for line in lines]
    keys = [
        [usage.partition for usage in usages],
        [usage.source for usage in usages],
        [usage.event_id for usage in usages],
    ]
    await connection.execute(
        """
        UPDATE usage_log AS l
        SET price_version = c.price_version, line_items = c.line_items::jsonb, amounts = c.amounts::jsonb,
            bundle_number = c.bundle_number, line_number = c.line_number
        FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::timestamptz[], %s::text[], %s::text[], %s::text[],
                    %s::bigint[], %s::integer[])
             AS c (partition, source, event_id, occurred_at, price_version, line_items, amounts,
                   bundle_number, line_number)
        WHERE (l.partition, l.occurred_at, l.source, l.event_id) = (c.partition, c.occurred_at, c.source, c.event_id)
          AND NOT l.superseded
        """,
        [
            *keys,
            [usage.occurred_at for usage in usages],
            [line.price_version for line in lines],
            [line.line_items for line in lines],
            [line.amounts for line in lines],
            [line.bundle_number for line in lines],
            [line.line_number for line in lines],
        ],
    )
    await connection.execute(
        """
        DELETE FROM set_aside USING unnest(%s::smallint[], %s::text[], %s::text[]) AS c (partition, source, event_id)
        WHERE (set_aside.partition, set_aside.source, set_aside.event_id) = (c.partition, c.source, c.event_id)
        """,
        keys,
    )


async def ensure_months(connection: Connection, months: Iterable[date]) -> None:
    """Make the log's tables for months, from FIRST_MONTH on. In a transaction of its own: it locks the log briefly."""
    for month in sorted(months):
        await connection.execute("SELECT ensure_usage_month(%s)", [month])
