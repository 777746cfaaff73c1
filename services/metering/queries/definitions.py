"""The definitions of meters: versions that are only added to. The newest of a meter is the one that answers."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from contracts.ids import uuid7
from services.kit.telemetry import get_logger
from services.metering.domain.meters import MeterChanged, MeterTaken
from services.metering.translate.meters import (
    CatalogueMeter,
    MeterBody,
    MeterView,
    definition_as_json,
    is_same,
    meter_view,
    read_definition,
)

log = get_logger(__name__)

CATALOGUE: Final = "catalogue"
METERS_MAX: Final = 1_000

Connection = AsyncConnection[TupleRow]


class TooManyMeters(Exception):
    """There are as many meters as there may be."""

    def __init__(self) -> None:
        super().__init__(f"there are {METERS_MAX} meters, and may be no more")


class CatalogueContradicts(ValueError):
    """The catalogue says something else of a meter than it said before under the same version."""

    def __init__(self, meter: CatalogueMeter) -> None:
        super().__init__(
            f"the catalogue's meter {meter.slug} has other contents than those stored of its version {meter.version}: "
            "give the change another version"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMeter:
    """The newest version of a meter, or the one that was asked for."""

    id: str
    version: int
    source: str
    body: MeterBody
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None

    def view(self) -> MeterView:
        """As HTTP has it."""
        return meter_view(
            self.body,
            id=self.id,
            version=self.version,
            source=self.source,
            created_at=self.created_at,
            updated_at=self.updated_at,
            deleted_at=self.deleted_at,
        )


async def find_meter(connection: Connection, id_or_slug: str, *, version: int | None = None) -> StoredMeter | None:
    """A meter that is not deleted, by slug; any, by id. `version` asks for an earlier one of it."""
    found = await find_versions(connection, id_or_slug)
    newest = found[0] if found else None
    if newest is None or (newest.deleted_at is not None and newest.id != id_or_slug):
        return None
    if version is None:
        return newest
    return next((each for each in found if each.version == version and each.id == newest.id), None)


async def find_versions(connection: Connection, id_or_slug: str) -> list[StoredMeter]:
    """All that a meter ever was, newest first; of a slug also the meters before it."""
    cursor = await connection.execute(
        _STORED.format(where="WHERE v.slug = %(name)s OR v.meter_id = %(name)s"), {"name": id_or_slug}
    )
    return [_stored(_Row(*row)) for row in await cursor.fetchall()]


async def list_meters(connection: Connection, *, deleted: bool) -> list[StoredMeter]:
    """The newest version of all meters, by slug; with those that were deleted, if asked for."""
    cursor = await connection.execute(
        _STORED.format(
            where="WHERE v.version = (SELECT max(version) FROM meter_versions AS w WHERE w.meter_id = v.meter_id)"
        )
    )
    found = [_stored(_Row(*row)) for row in await cursor.fetchall()]
    return [each for each in found if deleted or each.deleted_at is None]


async def create_meter(connection: Connection, body: MeterBody, *, source: str, at: datetime) -> StoredMeter:
    """Store a new meter. MeterTaken, TooManyMeters."""
    before = await find_versions(connection, body.slug)
    if before and before[0].deleted_at is None:
        raise MeterTaken(body.slug)
    if len(await list_meters(connection, deleted=False)) >= METERS_MAX:
        raise TooManyMeters
    added = await _add(
        connection, body, id=_new_id(at), version=before[0].version + 1 if before else 1, source=source, at=at
    )
    if not added:
        raise MeterTaken(body.slug)
    return await _reread(connection, body.slug)


async def change_meter(
    connection: Connection, stored: StoredMeter, body: MeterBody, *, source: str, at: datetime
) -> StoredMeter:
    """Store a meter's next version, unless it says the same. MeterChanged."""
    if is_same(body, stored.body):
        return stored
    if not await _add(connection, body, id=stored.id, version=stored.version + 1, source=source, at=at):
        raise MeterChanged(body.slug)
    return await _reread(connection, body.slug)


async def delete_meter(connection: Connection, stored: StoredMeter, *, source: str, at: datetime) -> None:
    """Let a meter answer no more. What it was stays known; nothing of the log changes. MeterChanged."""
    version = stored.version + 1
    if not await _add(connection, stored.body, id=stored.id, version=version, source=source, at=at, deleted=True):
        raise MeterChanged(stored.body.slug)


async def follow_catalogue(connection: Connection, meters: Iterable[CatalogueMeter], *, at: datetime) -> None:
    """Add the meters, and versions of meters, that the catalogue has and the table has not. CatalogueContradicts.

    A higher version in the catalogue is a change, also of a meter that was changed or deleted over HTTP. One that is
    stored stays: so does what was done to its meter since, and a catalogue that is older than what is stored.
    """
    for meter in meters:
        cursor = await connection.execute(
            """
            SELECT catalogue_version, definition::text FROM meter_versions
            WHERE slug = %s AND catalogue_version IS NOT NULL ORDER BY catalogue_version DESC
            """,
            [meter.slug],
        )
        known: dict[int, str] = dict(await cursor.fetchall())
        if meter.version in known:
            if not is_same(read_definition(known[meter.version]), meter):
                raise CatalogueContradicts(meter)
            continue
        if any(version > meter.version for version in known):
            continue
        before = await find_versions(connection, meter.slug)
        added = await _add(
            connection,
            meter,
            id=before[0].id if before and before[0].deleted_at is None else _new_id(at),
            version=before[0].version + 1 if before else 1,
            source=CATALOGUE,
            at=at,
            catalogue_version=meter.version,
        )
        if added:
            log.info("meter stored", slug=meter.slug, catalogue_version=meter.version)


class _Row(NamedTuple):
    slug: str
    version: int
    meter_id: str
    effective_at: datetime
    source: str
    deleted: bool
    definition: str
    created_at: datetime


_STORED: Final = """
SELECT v.slug, v.version, v.meter_id, v.effective_at, v.source, v.deleted, v.definition::text,
       (SELECT min(w.effective_at) FROM meter_versions AS w WHERE w.meter_id = v.meter_id)
FROM meter_versions AS v {where} ORDER BY v.slug, v.version DESC
"""


def _stored(row: _Row) -> StoredMeter:
    return StoredMeter(
        id=row.meter_id,
        version=row.version,
        source=row.source,
        body=read_definition(row.definition),
        created_at=row.created_at,
        updated_at=row.effective_at,
        deleted_at=row.effective_at if row.deleted else None,
    )


async def _reread(connection: Connection, slug: str) -> StoredMeter:
    return (await find_versions(connection, slug))[0]


async def _add(
    connection: Connection,
    body: MeterBody,
    *,
    id: str,
    version: int,
    source: str,
    at: datetime,
    deleted: bool = False,
    catalogue_version: int | None = None,
) -> bool:
    """False if somebody was faster."""
    cursor = await connection.execute(
        """
        INSERT INTO meter_versions (slug, version, meter_id, effective_at, source, catalogue_version, deleted,
                                    definition)
        VALUES (%s, %s, %s, %s, %s, %s, %s, %s::jsonb) ON CONFLICT DO NOTHING
        """,
        [body.slug, version, id, at, source, catalogue_version, deleted, definition_as_json(body)],
    )
    return cursor.rowcount == 1


def _new_id(at: datetime) -> str:
    milliseconds = int(at.timestamp() * 1000)
    return f"meter_{uuid7(milliseconds=milliseconds, entropy=secrets.token_bytes(10))}"
