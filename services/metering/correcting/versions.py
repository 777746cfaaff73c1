"""The versions of uses in the log: found, superseded, added. Takes a connection, and never commits.

The caller holds the heads of the partitions: nobody else charges, maps or corrects their use meanwhile.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple

import msgspec
from psycopg.rows import class_row

from contracts.money import Unit, parse_amount
from services.metering import translate
from services.metering.domain.charging import Reason
from services.metering.domain.corrections import Amounts, GivenBack, History, Version
from services.metering.domain.usage import Key, Usage
from services.metering.store import Connection
from services.metering.translate.items import read_amounts


class Named(NamedTuple):
    """A use as somebody names it. `account` is needed only if several have that source and id."""

    source: str
    event_id: str
    account: str | None = None


class Place(NamedTuple):
    """Where a use is logged, if it is."""

    partition: int
    source: str
    event_id: str
    occurred_at: datetime

    @property
    def key(self) -> Key:
        """The key of the use."""
        return (self.partition, self.source, self.event_id)

    @property
    def in_order(self) -> tuple[int, datetime, str, str]:
        """Where it comes in the order of use."""
        return (self.partition, self.occurred_at, self.source, self.event_id)


@dataclass(frozen=True, slots=True)
class LoggedVersion:
    """A row of the log. `data`, `context`, `line_items`, `amounts` and `posted` are JSON."""

    partition: int
    source: str
    event_id: str
    occurred_at: datetime
    revision: int
    superseded: bool
    account: str
    subject: str | None
    type: str
    data: str
    context: str | None
    price_version: str | None
    line_items: str | None
    amounts: str | None
    bundle_number: int | None
    posted: str | None

    @property
    def key(self) -> Key:
        """The key of the use."""
        return (self.partition, self.source, self.event_id)

    def usage(self) -> Usage:
        """The use as this version has it."""
        return translate.logged_usage(
            partition=self.partition,
            source=self.source,
            event_id=self.event_id,
            account=self.account,
            type=self.type,
            occurred_at=self.occurred_at,
            data=self.data,
            subject=self.subject,
            context=self.context,
            revision=self.revision,
        )


@dataclass(frozen=True, slots=True)
class WaitingUse:
    """What a use waits for. Of one that is unmapped, its body, and how often that was amended."""

    partition: int
    source: str
    event_id: str
    reason: Reason
    key: str
    body: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Found:
    """A use as it stands. Without versions it waits for an alias, was void while it did, or is not here at all."""

    place: Place
    versions: Sequence[LoggedVersion]
    waiting: WaitingUse | None
    was_voided_unmapped: bool = False

    @property
    def current(self) -> LoggedVersion | None:
        """The version that counts."""
        return next((each for each in self.versions if not each.superseded), None)

    @property
    def is_void(self) -> bool:
        """Whether none counts, though there was one."""
        return self.was_voided_unmapped or (bool(self.versions) and self.current is None)

    @property
    def is_here(self) -> bool:
        """Whether it was not sent on elsewhere."""
        return bool(self.versions) or self.waiting is not None or self.was_voided_unmapped

    @property
    def account(self) -> str | None:
        """Whose it is, if that is known."""
        return self.versions[-1].account if self.versions else None

    @property
    def revision(self) -> int | None:
        """Which version counts."""
        if self.versions:
            return None if self.current is None else self.current.revision
        return None if self.waiting is None else self.waiting.revision

    @property
    def next_revision(self) -> int:
        """The revision of the version that would come next."""
        if self.versions:
            return self.versions[-1].revision + 1
        return 0 if self.waiting is None else self.waiting.revision + 1

    def history(self, units: Mapping[str, Unit]) -> History:
        """The versions, as what they took and gave back."""
        return History([version_of(each, units) for each in self.versions], is_void=self.is_void)


class _StoredPosting(msgspec.Struct):
    given_back: list[tuple[int, dict[str, int]]] = []
    # None of a version that waited, and was charged in full if it was charged later.
    charged: dict[str, int] | None = None


_POSTING: Final = msgspec.json.Decoder(_StoredPosting)


def amounts_of(text: str | None, units: Mapping[str, Unit]) -> dict[str, int]:
    """Amounts of the log in steps."""
    return {each.unit: parse_amount(each.amount, units[each.unit]) for each in read_amounts(text)}


def posted_as_json(*, charged: Amounts | None, given_back: Sequence[GivenBack]) -> str:
    """What the log keeps of a posting."""
    back = [(each.revision, dict(each.amounts)) for each in given_back]
    return msgspec.json.encode(
        _StoredPosting(given_back=back, charged=None if charged is None else dict(charged))
    ).decode()


def version_of(row: LoggedVersion, units: Mapping[str, Unit]) -> Version:
    """A row of the log as what it took, and what was given back before it."""
    amounts = None if row.amounts is None else amounts_of(row.amounts, units)
    posted = _StoredPosting() if row.posted is None else _POSTING.decode(row.posted)
    charged = posted.charged
    if charged is None:
        charged = (amounts or {}) if row.bundle_number is not None else {}
    return Version(
        revision=row.revision,
        amounts=amounts,
        charged={unit: steps for unit, steps in charged.items() if steps},
        given_back=[GivenBack(revision, by_unit) for revision, by_unit in posted.given_back],
    )


# Finding --------------------------------------------------------------------------------------------------------------


async def find_places(connection: Connection, named: Sequence[Named]) -> list[list[Place]]:
    """Where uses were ever reported, for each that is named. The sources that ever reported are few."""
    cursor = await connection.execute(
        """
        SELECT n.number, s.partition, s.source, s.event_id, s.occurred_at
        FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS n (source, event_id, number)
        JOIN ingest_counters AS i ON i.source = n.source
        CROSS JOIN LATERAL (
            SELECT partition, source, event_id, occurred_at FROM seen
            WHERE seen.partition = i.partition AND seen.source = i.source AND seen.event_id = n.event_id LIMIT 1
        ) AS s
        ORDER BY n.number, s.partition
        """,
        [[each.source for each in named], [each.event_id for each in named]],
    )
    found: list[list[Place]] = [[] for _ in named]
    for number, partition, source, event_id, occurred_at in await cursor.fetchall():
        found[number - 1].append(Place(partition, source, event_id, occurred_at.astimezone(UTC)))
    return found


async def find_uses(connection: Connection, places: Collection[Place]) -> dict[Key, Found]:
    """Uses as they stand."""
    by_key = {each.key: each for each in places}
    columns: list[list[object]] = [list(column) for column in zip(*by_key.values(), strict=True)] or [[], [], [], []]
    versions: dict[Key, list[LoggedVersion]] = {}
    async with connection.cursor(row_factory=class_row(LoggedVersion)) as cursor:
        await cursor.execute(
            f"""
            SELECT {LOGGED} FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::timestamptz[])
                AS asked (partition, source, event_id, occurred_at)
            JOIN usage_log AS l USING (partition, occurred_at, source, event_id)
            ORDER BY partition, source, event_id, l.revision
            """,
            columns,
        )
        for row in await cursor.fetchall():
            versions.setdefault(row.key, []).append(row)
    waiting: dict[Key, WaitingUse] = {}
    async with connection.cursor(row_factory=class_row(WaitingUse)) as cursor_of_waiting:
        await cursor_of_waiting.execute(
            """
            SELECT partition, source, event_id, w.reason, w.key, w.body, w.revision
            FROM unnest(%s::smallint[], %s::text[], %s::text[]) AS asked (partition, source, event_id)
            JOIN set_aside AS w USING (partition, source, event_id)
            """,
            columns[:3],
        )
        for each in await cursor_of_waiting.fetchall():
            waiting[each.partition, each.source, each.event_id] = each
    nowhere = [by_key[key] for key in by_key if key not in versions and key not in waiting]
    voided = await _find_voided(connection, nowhere) if nowhere else set()
    return {key: Found(place, versions.get(key, ()), waiting.get(key), key in voided) for key, place in by_key.items()}


LOGGED: Final = """
partition, source, event_id, occurred_at, l.revision, l.superseded, l.account, l.subject, l.type, l.data::text AS data,
l.context::text AS context, l.price_version, l.line_items::text AS line_items, l.amounts::text AS amounts,
l.bundle_number, l.posted::text AS posted
"""


async def _find_voided(connection: Connection, places: Sequence[Place]) -> set[Key]:
    """Of uses that are neither logged nor wait, those that waited for an alias when they were voided."""
    cursor = await connection.execute(
        """
        SELECT DISTINCT partition, source, event_id
        FROM unnest(%s::smallint[], %s::text[], %s::text[]) AS asked (partition, source, event_id)
        JOIN correction_items AS i USING (partition, source, event_id)
        WHERE i.to_revision IS NULL AND i.body IS NOT NULL AND NOT i.undone
        """,
        [[each[place] for each in places] for place in range(3)],
    )
    return {(partition, source, event_id) for partition, source, event_id in await cursor.fetchall()}


# Changing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion:
    """A row to be added to the log. The line is that of a bundle, if the version has one."""

    usage: Usage
    recorded_at: datetime
    posted: str | None
    price_version: str | None = None
    line_items: str | None = None
    amounts: str | None = None
    bundle_number: int | None = None
    line_number: int | None = None


async def supersede(connection: Connection, versions: Iterable[LoggedVersion]) -> None:
    """Have versions count no more."""
    rows = list(versions)
    if not rows:
        return
    await connection.execute(
        """
        UPDATE usage_log AS l SET superseded = true
        FROM unnest(%s::smallint[], %s::timestamptz[], %s::text[], %s::text[], %s::integer[])
             AS c (partition, occurred_at, source, event_id, revision)
        WHERE (l.partition, l.occurred_at, l.source, l.event_id, l.revision)
            = (c.partition, c.occurred_at, c.source, c.event_id, c.revision)
        """,
        [
            [row.partition for row in rows],
            [row.occurred_at for row in rows],
            [row.source for row in rows],
            [row.event_id for row in rows],
            [row.revision for row in rows],
        ],
    )


async def add_versions(connection: Connection, rows: Sequence[NewVersion]) -> None:
    """Add versions to the log."""
    if not rows:
        return
    usages = [row.usage for row in rows]
    await connection.execute(
        """
        INSERT INTO usage_log (partition, occurred_at, source, event_id, revision, account, subject, type, recorded_at,
                               data, context, price_version, line_items, amounts, bundle_number, line_number, posted)
        SELECT partition, occurred_at, source, event_id, revision, account, subject, type, recorded_at, data::jsonb,
               context::jsonb, price_version, line_items::jsonb, amounts::jsonb, bundle_number, line_number,
               posted::jsonb
        FROM unnest(%s::smallint[], %s::timestamptz[], %s::text[], %s::text[], %s::integer[], %s::text[], %s::text[],
                    %s::text[], %s::timestamptz[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[],
                    %s::bigint[], %s::integer[], %s::text[])
             AS n (partition, occurred_at, source, event_id, revision, account, subject, type, recorded_at, data,
                   context, price_version, line_items, amounts, bundle_number, line_number, posted)
        """,
        [
            [usage.partition for usage in usages],
            [usage.occurred_at for usage in usages],
            [usage.source for usage in usages],
            [usage.event_id for usage in usages],
            [usage.revision for usage in usages],
            [usage.account for usage in usages],
            [None if usage.subject == usage.account else usage.subject for usage in usages],
            [usage.type for usage in usages],
            [row.recorded_at for row in rows],
            [usage.data for usage in usages],
            [usage.context for usage in usages],
            [row.price_version for row in rows],
            [row.line_items for row in rows],
            [row.amounts for row in rows],
            [row.bundle_number for row in rows],
            [row.line_number for row in rows],
            [row.posted for row in rows],
        ],
    )


async def wait_no_more(connection: Connection, keys: Collection[Key]) -> None:
    """Take uses out of what is set aside."""
    if keys:
        await connection.execute(
            """
            DELETE FROM set_aside USING unnest(%s::smallint[], %s::text[], %s::text[])
                AS c (partition, source, event_id)
            WHERE (set_aside.partition, set_aside.source, set_aside.event_id) = (c.partition, c.source, c.event_id)
            """,
            [list(column) for column in zip(*sorted(keys), strict=True)],
        )


@dataclass(frozen=True, slots=True)
class NewWaiting:
    """What a use waits for from now on."""

    place: Place
    account: str | None
    reason: Reason
    key: str
    recorded_at: datetime
    body: bytes | None
    revision: int


async def wait_for(connection: Connection, found: Iterable[NewWaiting]) -> None:
    """Set uses aside; and have those looked for again that may wait for what is an alias already."""
    rows = sorted(found, key=lambda each: each.place.key)
    if not rows:
        return
    await connection.execute(
        """
        INSERT INTO set_aside (partition, source, event_id, account, occurred_at, reason, key, recorded_at, body,
                               revision)
        SELECT * FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::text[], %s::timestamptz[], %s::text[],
                             %s::text[], %s::timestamptz[], %s::bytea[], %s::integer[])
        """,
        [
            [row.place.partition for row in rows],
            [row.place.source for row in rows],
            [row.place.event_id for row in rows],
            [row.account for row in rows],
            [row.place.occurred_at for row in rows],
            [row.reason for row in rows],
            [row.key for row in rows],
            [row.recorded_at for row in rows],
            [row.body for row in rows],
            [row.revision for row in rows],
        ],
    )
    # Whoever mapped the name had found nothing that waited for it.
    await connection.execute(
        """
        UPDATE aliases SET pending = true FROM unnest(%s::smallint[], %s::text[]) AS w (partition, subject)
        WHERE (aliases.partition, aliases.subject) = (w.partition, w.subject) AND NOT aliases.pending
        """,
        [
            [row.place.partition for row in rows if row.reason != "unpriced"],
            [row.key for row in rows if row.reason != "unpriced"],
        ],
    )
