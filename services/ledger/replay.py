"""Replay: every projection is rebuilt from the journal into the schema ledger_shadow and compared with the live one.

It uses the same `evolve` as the service, and one snapshot for everything, so it may run while the service works.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString

import msgspec
import psycopg
from psycopg import Connection, sql
from psycopg.rows import TupleRow
from pydantic import SecretStr
from sqlalchemy import Table

from services.ledger import tables
from services.ledger.domain.entries import Details, Entry
from services.ledger.domain.evolve import evolve
from services.ledger.domain.state import Changes, PartitionState
from services.ledger.projections import Row, changed_rows

SHADOW: Final = "ledger_shadow"
DIFFERENCES_SHOWN_MAX: Final = 5
FETCH_ROWS: Final = 20_000

_decode_details: Final = msgspec.json.Decoder(Details).decode


class ShadowMissing(Exception):
    """There is no schema to replay into, and this role may not make one."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A projection: rows live and replayed, how many rows only one of them has, and the first of those."""

    table: str
    live: int
    replayed: int
    different: int
    first_differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found. It is equal if no table differs and every partition's head is its journal's last entry."""

    entries: int
    seconds: float
    tables: tuple[Compared, ...]
    heads_astray: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether everything can be rebuilt from the journal."""
        return not self.heads_astray and not any(table.different for table in self.tables)

    @property
    def entries_per_second(self) -> float:
        """The rate of rebuilding, without the comparison."""
        return self.entries / max(self.seconds, 1e-9)


def replay(owner_url: SecretStr, *, on_progress: Callable[[int, int], None] = lambda _done, _all: None) -> Replayed:
    """Rebuild and compare, as the role that owns the schema. The shadow stays to be looked at."""
    with psycopg.connect(
        owner_url.get_secret_value(), application_name="scrip-replay", options="-c timezone=UTC -c search_path=ledger"
    ) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        _make_shadow(connection)
        total = _count(connection, "journal")
        started = time.monotonic()
        last: dict[int, tuple[int, bytes]] = {}
        entries = 0
        for rebuilt in _rebuilt(connection, lambda done: on_progress(done, total)):
            _copy(connection, rebuilt.partition, rebuilt.state)
            last[rebuilt.partition] = rebuilt.end
            entries += rebuilt.entries
        seconds = time.monotonic() - started
        compared = tuple(_compare(connection, table) for table in tables.PROJECTIONS)
        astray = tuple(_heads_astray(connection, last))
    return Replayed(entries, seconds, compared, astray)


def _make_shadow(connection: Connection[TupleRow]) -> None:
    if connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", [SHADOW]).fetchone() is None:
        try:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(SHADOW)))
        except psycopg.errors.InsufficientPrivilege as error:
            raise ShadowMissing(f"there is no schema {SHADOW}, and this role may not create it") from error
    for table in tables.PROJECTIONS:
        names = {"shadow": sql.Identifier(SHADOW, table.name), "live": sql.Identifier(table.name)}
        connection.execute(sql.SQL("DROP TABLE IF EXISTS {shadow}").format(**names))
        connection.execute(sql.SQL("CREATE TABLE {shadow} (LIKE {live} INCLUDING ALL)").format(**names))


@dataclass(slots=True)
class _Rebuilt:
    """A partition as its journal has it: its state, how many entries, the last one's batch and hash."""

    partition: int
    state: PartitionState = field(default_factory=PartitionState)
    entries: int = 0
    end: tuple[int, bytes] = (0, b"")


def _rebuilt(connection: Connection[TupleRow], on_progress: Callable[[int], None]) -> Iterator[_Rebuilt]:
    """Each partition that has entries."""
    current = _Rebuilt(-1)
    for done, row in enumerate(_entries(connection), start=1):
        if row[0] != current.partition:
            if current.entries:
                yield current
            current = _Rebuilt(row[0])
        evolve(current.state, _entry(row))
        current.end = (row[1], row[16])
        current.entries += 1
        if done % FETCH_ROWS == 0:
            on_progress(done)
    if current.entries:
        yield current


def _entries(connection: Connection[TupleRow]) -> Iterator[TupleRow]:
    """The journal in order. Contras are read, too: each partition's last entry is compared with its head."""
    with connection.cursor(name="replay") as cursor:
        cursor.itersize = FETCH_ROWS
        cursor.execute(
            """
            SELECT partition, batch, position, transaction_id::text, kind, account, unit, lot_id::text, lot_kind,
                   hold_id::text, posted, held, frozen, occurred_at, recorded_at, details, hash
            FROM journal ORDER BY partition, batch, position
            """
        )
        yield from cursor


def _entry(row: TupleRow) -> Entry:
    return Entry(
        batch=row[1],
        position=row[2],
        transaction=row[3],
        kind=row[4],
        account=row[5],
        unit=row[6],
        lot=row[7],
        lot_kind=row[8],
        hold=row[9],
        posted=row[10],
        held=row[11],
        frozen=row[12],
        occurred_at=row[13],
        recorded_at=row[14],
        details=None if row[15] is None else _decode_details(row[15]),
    )


def _copy(connection: Connection[TupleRow], partition: int, state: PartitionState) -> None:
    """Write a partition's state. Its changes are all of it: nothing was there before."""
    rows = changed_rows(partition, state.changes)
    state.changes = Changes()
    for table in tables.PROJECTIONS:
        _copy_rows(connection, table, rows[table.name])


def _copy_rows(connection: Connection[TupleRow], table: Table, rows: Iterable[Row]) -> None:
    columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.columns)
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(SHADOW, table.name), columns)
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def _compare(connection: Connection[TupleRow], table: Table) -> Compared:
    """Every column of every row, as text."""
    statement = f"""
        WITH live AS (SELECT t::text AS line FROM {table.name} t),
             replayed AS (SELECT t::text AS line FROM {SHADOW}.{table.name} t),
             differing AS (
                 SELECT 'only live: ' || line AS line
                 FROM (SELECT line FROM live EXCEPT ALL SELECT line FROM replayed) a
                 UNION ALL
                 SELECT 'only replayed: ' || line
                 FROM (SELECT line FROM replayed EXCEPT ALL SELECT line FROM live) b
             )
        SELECT (SELECT count(*) FROM live), (SELECT count(*) FROM replayed), count(*),
               (array_agg(line ORDER BY substr(line, strpos(line, ':')), line))[1:{DIFFERENCES_SHOWN_MAX}]
        FROM differing
        """
    row: Any = connection.execute(sql.SQL(statement)).fetchone()
    return Compared(table.name, row[0], row[1], row[2], tuple(row[3] or ()))


def _heads_astray(connection: Connection[TupleRow], last: dict[int, tuple[int, bytes]]) -> Iterator[str]:
    for partition, batch, chain_hash in connection.execute("SELECT partition, batch, chain_hash FROM heads ORDER BY 1"):
        end, hash_of_end = last.get(partition, (0, bytes(32)))
        if (batch, chain_hash) != (end, hash_of_end):
            yield f"partition {partition}: its head is at batch {batch}, its journal ends with batch {end}"


def _count(connection: Connection[TupleRow], table: LiteralString) -> int:
    row = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))).fetchone()
    return 0 if row is None else int(row[0])
